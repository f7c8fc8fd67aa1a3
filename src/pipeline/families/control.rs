//! ControlNets beside a UNet: what they are told in a run, and what of it a stage's steps read.
//!
//! The picture's embedding does not depend on the step: it is made once per stage, for each size of map that a step asks for, in its
//! first call, which is launched and not recorded. Views move from step to step, so theirs is made in the step, of the part of the
//! picture that a view shows (zeros around it), as the published code of DemoFusion does.

use std::sync::{Arc, Mutex, MutexGuard};

use super::super::memory::{LoadOptions, Role};
use super::super::resident::{Module, Resident};
use super::super::{ControlFiles, ModelFiles, WeightReport};
use super::conditioning::{Crops, StageConditioning};
use super::{PromptEmbeds, misfit};
use crate::error::{Error, Result};
use crate::methods::ViewPlaces;
use crate::models::{
    AddedConditioning, Control, ControlNet, ControlOptions, TIME_IDS, TextConditioning, UnetConditioning, UnetConfig,
    ZeroConvs,
};
use crate::ops::{self, PatchLayout, Patches, StepCoefficients, StepRow, StepTable};
use crate::runtime::{Device, Tensor};

/// The ControlNets of a pipeline, as modules.
pub struct ControlNets {
    nets: Vec<Arc<Resident<ControlNet>>>,
    weights: Vec<WeightReport>,
}

impl ControlNets {
    /// Those of the options, for a model with this UNet and latents with cells of `factor` pixels.
    ///
    /// # Errors
    /// Those of the files; [`Error::Config`] naming ControlNet and model: they do not fit together; more than
    /// [`ControlOptions::MOST`].
    pub fn open(files: &ModelFiles, options: &LoadOptions, unet: &UnetConfig, factor: usize) -> Result<ControlNets> {
        let (mut nets, mut weights) = (Vec::new(), Vec::new());
        if options.controls.len() > ControlOptions::MOST {
            let (count, most) = (options.controls.len(), ControlOptions::MOST);
            return misfit(files, format!("is given {count} ControlNets, expected at most {most}"));
        }
        for path in &options.controls {
            let control = ControlFiles::open(path)?;
            if let Err(reason) = control.config().check_fit(unet, factor) {
                return misfit(files, format!("the ControlNet {} {reason}", path.display()));
            }
            let (_, report) = control.net_of(control.outline(&options.device, options.dtype)?)?;
            weights.push(report);
            let (device, dtype) = (options.device.clone(), options.dtype);
            let load = move || Ok(control.net_of(control.store(&device, dtype)?)?.0);
            nets.push(Arc::new(Resident::new(Role::Network, load)));
        }
        Ok(ControlNets { nets, weights })
    }

    pub fn modules(&self) -> impl Iterator<Item = &dyn Module> {
        self.nets.iter().map(|net| &**net as &dyn Module)
    }

    pub fn weights(&self) -> &[WeightReport] {
        &self.weights
    }

    /// What they are told in a run.
    pub fn conditions(&self, strengths: Vec<ControlStrength>, repeats: usize) -> ControlConditions {
        let control = |(net, strength)| ControlCondition { net, strength, made: None };
        ControlConditions { controls: self.nets.iter().cloned().zip(strengths).map(control).collect(), repeats }
    }
}

/// How a ControlNet counts in a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ControlStrength {
    pub scale: f32,
    /// Guess mode.
    pub guess: bool,
}

/// What the ControlNets are told in a run: what the UNet is.
pub struct ControlConditions {
    controls: Vec<ControlCondition>,
    /// How often a sample stands in the UNet's batch.
    repeats: usize,
}

struct ControlCondition {
    net: Arc<Resident<ControlNet>>,
    strength: ControlStrength,
    /// Of the latest stage, whose K and V the next one has too.
    made: Option<(UnetConditioning, ZeroConvs)>,
}

impl ControlConditions {
    /// The ControlNets of a stage. `prompts` and `time_ids`: what the UNet is told.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn begin_stage(
        &mut self,
        prompts: &PromptEmbeds,
        time_ids: Option<[f32; TIME_IDS]>,
        timesteps: &[f32],
    ) -> Result<Controls> {
        let repeats = self.repeats;
        let begin = |control: &mut ControlCondition| control.begin_stage(prompts, time_ids, timesteps, repeats);
        self.controls.iter_mut().map(begin).collect::<Result<_>>().map(Controls)
    }
}

impl ControlCondition {
    fn begin_stage(
        &mut self,
        prompts: &PromptEmbeds,
        time_ids: Option<[f32; TIME_IDS]>,
        timesteps: &[f32],
        repeats: usize,
    ) -> Result<Controlled> {
        let ControlStrength { scale, guess } = self.strength;
        let net = self.net.get()?;
        // In guess mode it sees the conditional samples alone.
        let skipped = if guess { repeats - 1 } else { 0 };
        let all = prompts.embeds.shape()[0];
        let rows = all / repeats * skipped..all;
        let pooled = prompts.pooled.as_ref().map(|pooled| pooled.rows(rows.clone())).transpose()?;
        let ids = time_ids.map(|ids| [ids]);
        let added = match (&pooled, &ids) {
            (Some(pooled), Some(ids)) => Some(AddedConditioning { pooled, time_ids: ids }),
            _ => None,
        };
        let (conditioning, zero_convs) = match self.made.take() {
            Some((made, zero_convs)) => (net.conditioner().recondition(&made, added, timesteps)?, zero_convs),
            None => {
                let text = prompts.embeds.rows(rows)?;
                let text = TextConditioning { text: &text, added, guidance: None, noise_level: None };
                (net.conditioner().condition(text, timesteps)?, net.zero_convs(scale, guess)?)
            }
        };
        self.made = Some((conditioning.clone(), zero_convs.clone()));
        let crops = match (pooled, time_ids) {
            (Some(pooled), Some(time_ids)) => Some(Crops { pooled, time_ids, timesteps: timesteps.to_vec() }),
            _ => None,
        };
        Ok(Controlled {
            conditioning: StageConditioning::new(conditioning, repeats - skipped, crops),
            skipped,
            net,
            zero_convs,
            picture: None,
            hints: Mutex::default(),
            views: Vec::new(),
        })
    }
}

/// The ControlNets of a stage.
pub struct Controls(Vec<Controlled>);

struct Controlled {
    net: Arc<ControlNet>,
    zero_convs: ZeroConvs,
    /// Of the rows of the text that it is told: with guess mode the conditional ones.
    conditioning: StageConditioning,
    /// How often a sample stands in the batch before those that it sees.
    skipped: usize,
    /// `[1, H, W, 3]`, f32: of the stage's size.
    picture: Option<Tensor>,
    hints: Mutex<Vec<Hint>>,
    views: Vec<Views>,
}

/// The picture's embedding for maps of one kind; a recorded step reads it where it lies.
struct Hint {
    kind: HintKind,
    /// `[samples, h, w, C_0]`
    embedding: Tensor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HintKind {
    samples: usize,
    map: [usize; 2],
    /// The picture is resized by nearest neighbour, as the samples are; else it is averaged.
    nearest: bool,
}

/// Where the views of a group lie on the picture.
struct Views {
    /// Cells of a view, and from one to the next.
    cells: (usize, [usize; 2], usize),
    patches: Patches,
    origins: Vec<[i32; 2]>,
    /// The picture is read as it is.
    scale: StepTable,
}

impl Controls {
    /// The same, on a card in memory of their own: a recorded step reads it, and the next run writes into it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; those of the device.
    pub fn in_own_memory(self) -> Result<Controls> {
        let own = |control: Controlled| {
            let device = control.net.device();
            let zero_convs = match device {
                Device::Cpu(_) => control.zero_convs,
                Device::Cuda(_) | Device::Meta(_) => control.zero_convs.duplicate()?,
            };
            let conditioning = control.conditioning.in_own_memory(device)?;
            Ok(Controlled { conditioning, zero_convs, ..control })
        };
        self.0.into_iter().map(own).collect::<Result<_>>().map(Controls)
    }

    /// Tells these, of an earlier stage, what `from` is told, in the memory of these.
    ///
    /// # Errors
    /// Those of the device.
    pub fn replace(&mut self, from: Controls) -> Result<()> {
        for (own, from) in self.0.iter_mut().zip(from.0) {
            own.conditioning.replace(from.conditioning)?;
            own.zero_convs.copy_from(&from.zero_convs)?;
        }
        Ok(())
    }

    /// The pictures of a stage, one for each; where there were some, in the same memory.
    ///
    /// # Errors
    /// Those of the device and the networks.
    pub fn set_pictures(&mut self, pictures: &[Tensor]) -> Result<()> {
        for (own, picture) in self.0.iter_mut().zip(pictures) {
            match &mut own.picture {
                Some(to) => to.copy_from(picture)?,
                None => own.picture = Some(picture.clone()),
            }
            let mut hints = std::mem::take(&mut *locked(&own.hints));
            for hint in &mut hints {
                hint.embedding.copy_from(&own.embed(hint.kind)?)?;
            }
            *locked(&own.hints) = hints;
        }
        Ok(())
    }

    /// Where the views lie that are denoised next; no part of what a card records.
    ///
    /// # Errors
    /// Those of the device.
    pub fn place_views(&mut self, places: &ViewPlaces) -> Result<()> {
        self.0.iter_mut().try_for_each(|own| own.place_views(places))
    }

    /// As [`Denoiser::tell_crops`](crate::methods::Denoiser::tell_crops).
    ///
    /// # Errors
    /// Those of the networks.
    pub fn tell_crops(&mut self, evaluation: usize, crops: &[[f32; 2]]) -> Result<()> {
        let tell = |own: &mut Controlled| own.conditioning.tell_crops(own.net.conditioner(), evaluation, crops);
        self.0.iter_mut().try_for_each(tell)
    }

    fn on(&self, options: ControlOptions) -> impl Iterator<Item = &Controlled> {
        self.0.iter().enumerate().filter(move |&(index, _)| options.is_on(index)).map(|(_, control)| control)
    }

    /// The hints of those that are on, for whole maps: `images` samples of it, `more` of them twice.
    ///
    /// # Errors
    /// Those of the networks; [`Error::Config`]: there are no pictures.
    pub fn hints(&self, options: ControlOptions, map: [usize; 2], images: usize, more: usize) -> Result<Vec<Tensor>> {
        let of = |own: &Controlled| {
            let kind = HintKind {
                samples: own.conditioning.repeats() * images + more,
                map: options.map.unwrap_or(map),
                nearest: options.map.is_some(),
            };
            own.hint(kind)
        };
        self.on(options).map(of).collect()
    }

    /// The hints of those that are on, for the views that were placed last: `samples` of this layout.
    ///
    /// # Errors
    /// As [`hints`](Controls::hints); [`Error::Config`]: views that were not placed.
    pub fn view_hints(&self, options: ControlOptions, layout: PatchLayout, samples: usize) -> Result<Vec<Tensor>> {
        self.on(options).map(|own| own.view_hint(layout, samples)).collect()
    }

    /// A call's ControlNets. `samples`: of the batch without repeats.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn calls<'a>(
        &'a self,
        options: ControlOptions,
        hints: &'a [Tensor],
        samples: usize,
        told: Told,
    ) -> Result<Vec<Control<'a>>> {
        let call = |(own, hint): (&'a Controlled, &'a Tensor)| {
            let seen = own.conditioning.repeats() * samples;
            let conditioning = match told {
                Told::Whole => own.conditioning.whole(),
                Told::Twins => own.conditioning.twins()?,
                Told::Crops => own.conditioning.cropped(seen).ok_or_else(|| untold("where the crops lie"))?,
            };
            let (net, zero_convs, first) = (&*own.net, &own.zero_convs, own.skipped * samples);
            Ok(Control { net, zero_convs, conditioning, hint, first })
        };
        self.on(options).zip(hints).map(call).collect()
    }
}

/// What a call is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Whole,
    /// The batch ends with the conditional samples once more.
    Twins,
    /// Each sample's crop.
    Crops,
}

fn locked(hints: &Mutex<Vec<Hint>>) -> MutexGuard<'_, Vec<Hint>> {
    hints.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn untold(what: &str) -> Error {
    Error::config("controlnet", format!("was not told {what}"))
}

impl Controlled {
    fn picture(&self) -> Result<&Tensor> {
        self.picture.as_ref().ok_or_else(|| Error::config("controlnet", "has no picture in this stage"))
    }

    /// The embedding of pictures `[N, H, W, 3]`, f32, `repeats` times.
    fn embedding(&self, pictures: &Tensor, repeats: usize) -> Result<Tensor> {
        let dtype = self.net.dtype();
        let hint = match pictures.dtype() == dtype {
            true => self.net.hint(pictures)?,
            false => self.net.hint(&ops::scale_cast(pictures, 1.0, 0.0, dtype, 1)?)?,
        };
        if repeats == 1 { Ok(hint) } else { ops::scale_cast(&hint, 1.0, 0.0, dtype, repeats) }
    }

    /// Of the stage's picture.
    fn embed(&self, HintKind { samples, map, nearest }: HintKind) -> Result<Tensor> {
        let picture = self.picture()?;
        let [_, height, width, _] = picture.dims("controlnet", "picture")?;
        let size = map.map(|side| side * self.net.config().factor());
        if size == [height, width] {
            return self.embedding(picture, samples);
        }
        let times = height / size[0].max(1);
        let resized = match nearest {
            false if times > 0 && size.map(|side| side * times) == [height, width] => {
                ops::pool_latents(picture, times)?
            }
            _ => ops::resize_nearest(picture, size)?,
        };
        self.embedding(&resized, samples)
    }

    fn hint(&self, kind: HintKind) -> Result<Tensor> {
        let mut hints = locked(&self.hints);
        if let Some(hint) = hints.iter().find(|hint| hint.kind == kind) {
            return Ok(hint.embedding.clone());
        }
        let embedding = self.embed(kind)?;
        hints.push(Hint { kind, embedding: embedding.clone() });
        Ok(embedding)
    }

    fn place_views(&mut self, ViewPlaces { layout, origins }: &ViewPlaces) -> Result<()> {
        let factor = self.net.config().factor();
        let cells = (origins.len(), layout.size, layout.stride);
        let at = match self.views.iter().position(|views| views.cells == cells) {
            Some(at) => at,
            None => {
                let device = self.net.device();
                let pixels = |cells: [usize; 2]| cells.map(|cells| cells * factor);
                let layout = PatchLayout { map: pixels(layout.map), size: pixels(layout.size), ..*layout };
                let patches = Patches::new(device, 1, origins.len(), layout)?;
                let row = StepRow { input_scale: 1.0, coefficients: StepCoefficients::default() };
                let scale = StepTable::new(device, vec![row])?;
                self.views.push(Views { cells, patches, origins: Vec::new(), scale });
                self.views.len() - 1
            }
        };
        let views = &mut self.views[at];
        if views.origins != *origins {
            let pixels = |&at: &[i32; 2]| at.map(|cells| cells * factor as i32);
            views.patches.place(&origins.iter().map(pixels).collect::<Vec<_>>())?;
            views.origins = origins.to_vec();
        }
        Ok(())
    }

    fn view_hint(&self, layout: PatchLayout, samples: usize) -> Result<Tensor> {
        let cells = (samples, layout.size, layout.stride);
        let views = self.views.iter().find(|views| views.cells == cells);
        let views = views.ok_or_else(|| untold("where the views lie"))?;
        let dtype = self.net.dtype();
        let parts = ops::gather_patches(self.picture()?, &views.patches, None, &views.scale, dtype, 1)?;
        self.embedding(&parts, self.conditioning.repeats())
    }
}
