//! What the UNet is told beside its sample: the text, the timestep, for SDXL the pooled text and the picture's sizes, and for
//! DeepFloyd IF's second stage how noisy the picture is that it enlarges.

use super::blocks::Projections;
use super::text_pooling::TextPooling;
use super::{ImagePrompt, TIME_IDS, Unet, UnetConfig};
use crate::error::{Error, Result};
use crate::models::layers::{Conv2d, Linear};
use crate::models::weights::Weights;
use crate::ops::{self, Activation, Source, StepIndex, StepRows, TimestepEmbedding};
use crate::runtime::{DType, Device, Tensor};

/// The conditioning of R prompts. A batch of N samples is R equal parts in this order, so with classifier-free guidance the
/// unconditional row or rows come first.
#[derive(Clone, Copy, Debug)]
pub struct TextConditioning<'a> {
    /// `[R, L, D]`, D as in [`UnetConfig::text_dim`].
    pub text: &'a Tensor,
    /// Given exactly when the model has [`UnetConfig::added`].
    pub added: Option<AddedConditioning<'a>>,
    /// The number that a model with [`UnetConfig::time_cond_proj_dim`] was trained to read as its guidance scale (the
    /// published pipelines pass the guidance scale minus 1). Without one the embedding is left out.
    pub guidance: Option<f32>,
    /// A timestep: given exactly when the model has [`UnetConfig::reads_noise_level`].
    pub noise_level: Option<f32>,
}

impl<'a> From<&'a Tensor> for TextConditioning<'a> {
    fn from(text: &'a Tensor) -> TextConditioning<'a> {
        TextConditioning { text, added: None, guidance: None, noise_level: None }
    }
}

/// What SDXL's UNet reads beside the text. Podell et al. 2023, arXiv:2307.01952, sec. 2.2.
#[derive(Clone, Copy, Debug)]
pub struct AddedConditioning<'a> {
    /// `[R, pooled_dim]`, in the model's dtype.
    pub pooled: &'a Tensor,
    /// Height and width of the original image, top and left of the crop, height and width of the target, in pixels; one
    /// entry for all rows, or R.
    pub time_ids: &'a [[f32; TIME_IDS]],
}

/// What is the same for every step of a run, computed once: K and V of the text for every cross-attention, and each
/// ResNet's projection of every timestep's embedding.
#[derive(Clone, Debug)]
pub struct UnetConditioning {
    rows: Vec<Tensor>, // one a ResNet: [steps * rows_per_step, C_out], with scale_shift 2 C_out, those of a step together
    rows_per_step: usize, // R where rows have embeddings of their own, of samples with sizes of their own their number, else 1
    kv: Vec<Tensor>,      // one a cross-attention: [R, L, 2, heads, head_dim]
    text_rows: usize,     // R
    steps: usize,
    guidance: Option<f32>,
    noise_level: Option<f32>,
    pooled: Option<Tensor>, // of the text, where it is added to the timestep's embedding: [R, T]
    /// With twins whose rows are not the others': the same tables of the others and of the twins.
    twins: Option<[PartRows; 2]>,
    /// What pictures add to every cross-attention.
    images: Vec<ImagePrompt>,
}

/// The rows of one part of a batch.
#[derive(Clone, Debug)]
struct PartRows {
    tables: Vec<Tensor>, // one a ResNet: [steps * per_step, C_out]
    per_step: usize,
}

impl UnetConditioning {
    /// Rows of the text, R; a call has a multiple of them as its samples.
    pub fn text_rows(&self) -> usize {
        self.text_rows
    }

    /// Timesteps it was made for.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// With pictures as prompts beside the text, in place of those that it has.
    ///
    /// # Errors
    /// [`Error::Argument`]: rows of a prompt that do not divide the text's, or K and V of another number of cross-attentions than
    /// the UNet has.
    pub fn with_images(self, unet: &Unet, images: Vec<ImagePrompt>) -> Result<UnetConditioning> {
        let attentions = unet.config().cross_attentions().in_files().len();
        for ImagePrompt { kv, .. } in &images {
            if kv.len() != attentions {
                let want = format!("{attentions}, the cross-attentions of the network");
                return Err(Error::argument("unet", "keys and values of an image prompt", kv.len(), want));
            }
            let rows = kv.first().and_then(|kv| kv.shape().first()).copied().unwrap_or(1);
            if rows == 0 || !self.text_rows.is_multiple_of(rows) {
                let want = format!("a number that divides the text's {}", self.text_rows);
                return Err(Error::argument("unet", "rows of an image prompt", rows, want));
            }
        }
        Ok(UnetConditioning { images, ..self })
    }

    pub(super) fn images(&self) -> &[ImagePrompt] {
        &self.images
    }

    /// For a batch that ends with twins ([`UnetCall::twins`](super::UnetCall::twins)), as many as the samples of the text's rows
    /// from `first` on, whose text and sizes they have.
    ///
    /// # Errors
    /// [`Error::Argument`]: `first` is not below R, or the rows from there on are more than those before it but all;
    /// [`Error::OutOfMemory`].
    pub fn with_twins(&self, first: usize) -> Result<UnetConditioning> {
        let (all, per_step) = (self.text_rows, self.rows_per_step);
        let again = all.saturating_sub(first);
        if again == 0 || !all.is_multiple_of(again) {
            let want = format!("below the text's {all} rows, so that a part of equal size begins there");
            return Err(Error::argument("unet", "first row of the twins", first, want));
        }
        let kv = |kv: &Tensor| Tensor::concat(&[kv.clone(), kv.rows(first..all)?]);
        let kv = self.kv.iter().map(kv).collect::<Result<_>>()?;
        let images = self.images.iter().map(|prompt| prompt.with_twins(first, all)).collect::<Result<_>>()?;
        if per_step == 1 || self.steps == 0 {
            // The rows are the same for all samples.
            return Ok(UnetConditioning { kv, images, text_rows: all + again, ..self.clone() });
        }
        let of_step = |step: usize, first: usize| step * per_step + first..(step + 1) * per_step;
        let twins = |table: &Tensor| {
            Tensor::concat(&(0..self.steps).map(|step| table.rows(of_step(step, first))).collect::<Result<Vec<_>>>()?)
        };
        let both = |table: &Tensor| {
            let of = |step: usize| [table.rows(of_step(step, 0)), table.rows(of_step(step, first))];
            Tensor::concat(&(0..self.steps).flat_map(of).collect::<Result<Vec<_>>>()?)
        };
        let others = PartRows { tables: self.rows.clone(), per_step };
        let twins = PartRows { tables: self.rows.iter().map(twins).collect::<Result<_>>()?, per_step: again };
        Ok(UnetConditioning {
            rows: self.rows.iter().map(both).collect::<Result<_>>()?,
            rows_per_step: per_step + again,
            kv,
            images,
            text_rows: all + again,
            twins: Some([others, twins]),
            ..self.clone()
        })
    }

    /// The same in memory of its own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`].
    pub fn duplicate(&self) -> Result<UnetConditioning> {
        let all = |tensors: &[Tensor]| tensors.iter().map(Tensor::duplicate).collect::<Result<Vec<_>>>();
        let part = |part: &PartRows| Ok(PartRows { tables: all(&part.tables)?, per_step: part.per_step });
        let twins = match &self.twins {
            Some([others, twins]) => Some([part(others)?, part(twins)?]),
            None => None,
        };
        let image = |prompt: &ImagePrompt| Ok(ImagePrompt { kv: all(&prompt.kv)?, scale: prompt.scale });
        let images = self.images.iter().map(image).collect::<Result<_>>()?;
        Ok(UnetConditioning { rows: all(&self.rows)?, kv: all(&self.kv)?, twins, images, ..self.clone() })
    }

    /// Another conditioning of the same shapes, in the memory of this one: a recorded step then reads it.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `from` has other shapes; [`Error::Driver`].
    pub fn copy_from(&mut self, from: &UnetConditioning) -> Result<()> {
        let of_twins = self.twins.iter_mut().flatten().flat_map(|part| &mut part.tables);
        let from_twins = from.twins.iter().flatten().flat_map(|part| &part.tables);
        let of_images = self.images.iter_mut().flat_map(|prompt| &mut prompt.kv);
        let from_images = from.images.iter().flat_map(|prompt| &prompt.kv);
        let to = self.rows.iter_mut().chain(&mut self.kv).chain(of_twins).chain(of_images);
        to.zip(from.rows.iter().chain(&from.kv).chain(from_twins).chain(from_images))
            .try_for_each(|(to, from)| to.copy_from(from))
    }

    /// The same with the projections alone, where both have K and V of one memory.
    ///
    /// # Errors
    /// As [`copy_from`](UnetConditioning::copy_from).
    pub fn copy_rows_from(&mut self, from: &UnetConditioning) -> Result<()> {
        self.rows.iter_mut().zip(&from.rows).try_for_each(|(to, from)| to.copy_from(from))
    }

    pub(super) fn rows<'a>(&'a self, resnet: usize, step: &'a StepIndex) -> StepRows<'a> {
        StepRows { table: &self.rows[resnet], step, rows: self.rows_per_step }
    }

    /// Of the samples before the twins and of the twins, where they are not those of the whole batch.
    pub(super) fn rows_of_twins<'a>(&'a self, resnet: usize, step: &'a StepIndex) -> Option<[StepRows<'a>; 2]> {
        let parts = self.twins.as_ref()?;
        Some([0, 1].map(|part| StepRows { table: &parts[part].tables[resnet], step, rows: parts[part].per_step }))
    }

    pub(super) fn kv(&self, attention: usize) -> &Tensor {
        &self.kv[attention]
    }

    /// Made for `n` samples `x` at these steps?
    ///
    /// # Errors
    /// [`Error::Shape`]: N; [`Error::Argument`]: a step.
    pub(super) fn check(&self, x: &Tensor, n: usize, step: &StepIndex) -> Result<()> {
        if n == 0 || self.text_rows == 0 || !n.is_multiple_of(self.text_rows) {
            let want = format!("N as a multiple of the text's {} rows", self.text_rows);
            return Err(Error::shape("unet", "x", x, want));
        }
        if !n.is_multiple_of(step.images()) {
            let want = format!("N as a multiple of the {} images with a step of their own", step.images());
            return Err(Error::shape("unet", "x", x, want));
        }
        if step.last() >= self.steps {
            let want = format!("below {}, the number of timesteps of the conditioning", self.steps);
            return Err(Error::argument("unet", "step", step.last(), want));
        }
        Ok(())
    }
}

/// Sinusoid of the timestep, two linear layers, and what is added to them.
pub(super) struct TimeEmbedding {
    mlp: EmbeddingMlp,
    cond_proj: Option<Linear>, // [C_0, time_cond_proj_dim], no bias
    add_embedding: Option<AddEmbedding>,
    text_pooling: Option<TextPooling>,
    noise_level: Option<EmbeddingMlp>,
}

/// Two linear layers behind a sinusoid.
struct EmbeddingMlp {
    linear_1: Linear, // [T, C_0]
    linear_2: Linear, // [T, T]
    activation: Activation,
}

impl EmbeddingMlp {
    fn load(w: &Weights, config: &UnetConfig) -> Result<EmbeddingMlp> {
        let (t, first) = (config.time_embed_dim, config.block_out_channels[0]);
        Ok(EmbeddingMlp {
            linear_1: Linear::load(&w.at("linear_1"), t, first)?,
            linear_2: Linear::load(&w.at("linear_2"), t, t)?,
            activation: config.activation,
        })
    }

    /// `[rows, C_0]` to `[rows, T]`, with `activation` after the second layer, or with `[rows, T]` added to it.
    fn forward(&self, sinusoid: &Tensor, activation: Activation, added: Option<&Tensor>) -> Result<Tensor> {
        self.linear_2.fused(&self.linear_1.fused(sinusoid, self.activation, None)?, activation, added)
    }
}

/// `add_embedding`: of the pooled text and the sizes.
struct AddEmbedding {
    /// A 1x1 convolution of two sources, so that pooled text and sinusoids lie side by side without a copy.
    linear_1: Conv2d, // [T, 1, 1, pooled_dim + TIME_IDS * time_id.dim]
    linear_2: Linear, // [T, T]
}

impl TimeEmbedding {
    pub(super) fn load(w: &Weights, config: &UnetConfig) -> Result<TimeEmbedding> {
        let (time, added) = (w.at("time_embedding"), w.at("add_embedding"));
        let (t, first, text) = (config.time_embed_dim, config.block_out_channels[0], config.text_dim());
        let cond_proj = match config.time_cond_proj_dim {
            None => None,
            Some(dim) => Some(Linear::load_without_bias(&time.at("cond_proj"), first, dim)?),
        };
        let add_embedding = match &config.added {
            None => None,
            Some(config) => {
                let (linear_1, inputs) = (added.at("linear_1"), config.input_dim());
                let weight = linear_1.matrix("weight", t, inputs)?.reshape(&[t, 1, 1, inputs])?;
                Some(AddEmbedding {
                    linear_1: Conv2d::new(weight, linear_1.tensor("bias", &[t])?),
                    linear_2: Linear::load(&added.at("linear_2"), t, t)?,
                })
            }
        };
        let text_pooling =
            config.text_pooling_heads.map(|heads| TextPooling::load(&added, text, t, heads)).transpose()?;
        let noise_level = match config.reads_noise_level {
            true => Some(EmbeddingMlp::load(&w.at("class_embedding"), config)?),
            false => None,
        };
        let mlp = EmbeddingMlp::load(&time, config)?;
        Ok(TimeEmbedding { mlp, cond_proj, add_embedding, text_pooling, noise_level })
    }
}

impl AddEmbedding {
    /// `pooled: [R, P]`, `ids: [R, TIME_IDS * dim]` to `[R, T]`.
    fn forward(&self, pooled: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let ([r, p], [_, i]) = (pooled.dims("unet", "pooled")?, ids.dims("unet", "time_ids")?);
        let t = self.linear_2.weight.rows();
        let (pooled, ids) = (pooled.reshape(&[r, 1, 1, p])?, ids.reshape(&[r, 1, 1, i])?);
        let h = self.linear_1.forward(Source::Two(&pooled, &ids))?;
        self.linear_2.forward(&ops::activation(&h.reshape(&[r, t])?, Activation::Silu)?)
    }
}

impl Unet {
    /// What a run needs of the text and of its timesteps. `timesteps`: all of the run, in the order in which
    /// [`forward`](Unet::forward) will name them by index. Without added conditioning `&Tensor` is enough:
    /// `unet.condition(&text, &timesteps)`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `text`, `pooled`; [`Error::Argument`]: `added` or `guidance`
    /// missing or superfluous, a noise level likewise, other than 1 or R `time_ids`; [`Error::OutOfMemory`].
    pub fn condition<'a>(
        &self,
        conditioning: impl Into<TextConditioning<'a>>,
        timesteps: &[f32],
    ) -> Result<UnetConditioning> {
        self.conditioner.condition(conditioning, timesteps)
    }

    /// As [`condition`](Unet::condition) with the text and the guidance of `conditioning`, whose K and V stay: for a stage
    /// with other timesteps, or with other sizes in SDXL's added conditioning.
    ///
    /// # Errors
    /// As [`condition`](Unet::condition).
    pub fn recondition(
        &self,
        conditioning: &UnetConditioning,
        added: Option<AddedConditioning>,
        timesteps: &[f32],
    ) -> Result<UnetConditioning> {
        self.conditioner.recondition(conditioning, added, timesteps)
    }
}

/// What a conditioning says whatever the timesteps and the sizes.
struct Told {
    kv: Vec<Tensor>,
    text_rows: usize,
    pooled: Option<Tensor>,
    guidance: Option<f32>,
    noise_level: Option<f32>,
}

impl Told {
    fn of(conditioning: &UnetConditioning) -> Told {
        let &UnetConditioning { ref kv, text_rows, ref pooled, guidance, noise_level, .. } = conditioning;
        Told { kv: kv.clone(), text_rows, pooled: pooled.clone(), guidance, noise_level }
    }
}

/// The layers whose input is the same in every step of a run: of the UNet, and of a ControlNet, which reads what the UNet is told.
pub struct Conditioner {
    pub(super) config: UnetConfig,
    pub(super) device: Device,
    pub(super) dtype: DType,
    pub(super) time_embedding: TimeEmbedding,
    /// `encoder_hid_proj`
    pub(super) text_projection: Option<Linear>, // [cross_attention_dim, D]
    pub(super) projections: Projections,
}

impl Conditioner {
    /// As [`Unet::condition`].
    ///
    /// # Errors
    /// As [`Unet::condition`].
    pub fn condition<'a>(
        &self,
        conditioning: impl Into<TextConditioning<'a>>,
        timesteps: &[f32],
    ) -> Result<UnetConditioning> {
        let TextConditioning { text, added, guidance, noise_level } = conditioning.into();
        let [text_rows, length, _] = text.dims("unet", "text")?;
        text.expect("unet", "text", &[text_rows, length, self.config.text_dim()], self.dtype, &self.device)?;
        let pooled = self.time_embedding.text_pooling.as_ref().map(|pooling| pooling.forward(text)).transpose()?;
        let projected = self.text_projection.as_ref().map(|projection| projection.forward(text)).transpose()?;
        let text = projected.as_ref().unwrap_or(text);
        let kv = self.projections.to_kv.iter().map(|to_kv| to_kv.forward(text)).collect::<Result<_>>()?;
        let text = Told { kv, text_rows, pooled, guidance, noise_level };
        self.with_rows(text, text_rows, added, timesteps)
    }

    /// As [`Unet::recondition`].
    ///
    /// # Errors
    /// As [`Unet::condition`].
    pub fn recondition(
        &self,
        conditioning: &UnetConditioning,
        added: Option<AddedConditioning>,
        timesteps: &[f32],
    ) -> Result<UnetConditioning> {
        let made = self.with_rows(Told::of(conditioning), conditioning.text_rows, added, timesteps)?;
        Ok(UnetConditioning { images: conditioning.images.clone(), ..made })
    }

    /// One timestep for a batch whose samples have sizes of their own, with the text and the guidance of `conditioning`, whose
    /// K and V stay. `added`: pooled text `[N, pooled_dim]` and N time ids, sample by sample; N is a multiple of R.
    ///
    /// # Errors
    /// As [`Unet::condition`].
    pub fn condition_samples(
        &self,
        conditioning: &UnetConditioning,
        added: AddedConditioning,
        timestep: f32,
    ) -> Result<UnetConditioning> {
        let [samples, _] = added.pooled.dims("unet", "pooled")?;
        let made = self.with_rows(Told::of(conditioning), samples, Some(added), &[timestep])?;
        Ok(UnetConditioning { images: conditioning.images.clone(), ..made })
    }

    /// `samples`: rows of the added conditioning.
    fn with_rows(
        &self,
        told: Told,
        samples: usize,
        added: Option<AddedConditioning>,
        timesteps: &[f32],
    ) -> Result<UnetConditioning> {
        let Told { kv, text_rows, pooled, guidance, noise_level } = told;
        let steps = timesteps.len();
        let of_rows = match (self.added(samples, added)?, &pooled) {
            (Some(added), _) => Some(added),
            (None, pooled) => pooled.clone(),
        };
        let rows_per_step = of_rows.as_ref().map_or(1, |of_rows| of_rows.shape()[0]);
        // Of a step R times the same, with the rows of the added conditioning.
        let repeated: Vec<f32> = timesteps.iter().flat_map(|&t| std::iter::repeat_n(t, rows_per_step)).collect();
        let of_level = self.noise_level(noise_level, repeated.len())?;
        let mut emb = ops::timestep_embedding(&repeated, self.config.timestep, &self.device, self.dtype)?; // [rows, C_0]
        if let Some((cond_proj, guidance)) = self.guidance(guidance, repeated.len())? {
            emb = cond_proj.forward_residual(&guidance, &emb)?;
        }
        let added = match of_rows {
            Some(of_rows) if steps > 0 => Some(ops::scale_cast(&of_rows, 1.0, 0.0, self.dtype, steps)?), // [R, T] of each step
            _ => None,
        };
        let added = match (added, of_level) {
            (Some(added), Some(of_level)) => Some(ops::add(&added, &of_level)?),
            (added, of_level) => added.or(of_level),
        };
        // The ResNets read what their activation makes of it: [rows, T].
        let mlp = &self.time_embedding.mlp;
        let (fused, rest) = match (&added, &self.config.time_activations[..]) {
            (None, [first, rest @ ..]) => (*first, rest),
            (_, all) => (Activation::None, all),
        };
        let mut emb = mlp.forward(&emb, fused, added.as_ref())?;
        for &activation in rest {
            emb = ops::activation(&emb, activation)?;
        }
        let rows = self.projections.time_emb_proj.iter().map(|proj| proj.forward(&emb)).collect::<Result<_>>()?;
        let (twins, images) = (None, Vec::new());
        Ok(UnetConditioning { rows, rows_per_step, kv, text_rows, steps, guidance, noise_level, pooled, twins, images })
    }

    /// The embedding of the noise level, `[rows, T]`, every row the same.
    fn noise_level(&self, level: Option<f32>, rows: usize) -> Result<Option<Tensor>> {
        match (&self.time_embedding.noise_level, level) {
            (Some(mlp), Some(level)) => {
                let sinusoid =
                    ops::timestep_embedding(&vec![level; rows], self.config.timestep, &self.device, self.dtype)?;
                mlp.forward(&sinusoid, Activation::None, None).map(Some)
            }
            (Some(_), None) => {
                Err(Error::argument("unet", "noise level", "missing", "a timestep: class_embed_type is \"timestep\""))
            }
            (None, Some(level)) => {
                Err(Error::argument("unet", "noise level", level, "none: the model has no class_embed_type"))
            }
            (None, None) => Ok(None),
        }
    }

    /// The embedding of the added conditioning of `rows` rows, `[rows, T]`.
    fn added(&self, rows: usize, added: Option<AddedConditioning>) -> Result<Option<Tensor>> {
        let (config, embedding, AddedConditioning { pooled, time_ids }) =
            match (self.config.added, &self.time_embedding.add_embedding, added) {
                (Some(config), Some(embedding), Some(added)) => (config, embedding, added),
                (Some(_), _, None) => {
                    let want = "pooled text and time ids: addition_embed_type is \"text_time\"";
                    return Err(Error::argument("unet", "added conditioning", "missing", want));
                }
                (None, _, Some(_)) => {
                    let want = "none: the model has no addition_embed_type";
                    return Err(Error::argument("unet", "added conditioning", "given", want));
                }
                _ => return Ok(None),
            };
        pooled.expect("unet", "pooled", &[rows, config.pooled_dim], self.dtype, &self.device)?;
        if ![1, rows].contains(&time_ids.len()) {
            let want = format!("1 for all rows of the text, or {rows}, one for each");
            return Err(Error::argument("unet", "number of time_ids", time_ids.len(), want));
        }
        let ids: Vec<f32> = time_ids.iter().cycle().take(rows).flatten().copied().collect();
        let ids = ops::timestep_embedding(&ids, config.time_id, &self.device, self.dtype)?;
        embedding.forward(pooled, &ids.reshape(&[rows, TIME_IDS * config.time_id.dim])?).map(Some)
    }

    /// The guidance scale's projection and its sinusoid `[rows, time_cond_proj_dim]`, every row the same. Meng et al. 2023,
    /// arXiv:2210.03142, sec. 3; Luo et al. 2023, arXiv:2310.04378.
    fn guidance(&self, guidance: Option<f32>, rows: usize) -> Result<Option<(&Linear, Tensor)>> {
        match (&self.time_embedding.cond_proj, self.config.time_cond_proj_dim, guidance) {
            (Some(cond_proj), Some(dim), Some(guidance)) => {
                // The published sinusoid: of a thousand times the scale, sines first, the last frequency exactly 1e-4.
                let sinusoid = TimestepEmbedding { dim, flip_sin_to_cos: false, freq_shift: 1.0 };
                let guidance = vec![guidance * 1000.0; rows];
                Ok(Some((cond_proj, ops::timestep_embedding(&guidance, sinusoid, &self.device, self.dtype)?)))
            }
            (None, _, Some(guidance)) => {
                Err(Error::argument("unet", "guidance", guidance, "none: the model has no time_cond_proj_dim"))
            }
            _ => Ok(None),
        }
    }
}
