//! `megafuse probe`: one module of a model on tensors of a file, NCHW in and out, to compare with other programs.

use std::collections::BTreeMap;
use std::path::Path;

use megafuse::models::{
    AddedConditioning, ClipOutput, ClipTextModel, Control, ControlNet, Mmdit, TIME_IDS, TextConditioning,
    TextEmbeddings, Unet, UnetCall, UnetOptions, Vae,
};
use megafuse::ops::StepIndex;
use megafuse::pipeline::{ControlFiles, IF_T5_LENGTH, ModelFiles, T5_LENGTH, WeightReport};
use megafuse::{DType, Device, Error, Result, Tensor};

use super::args::{Module, ProbeArgs};
use super::console::say;
use super::output;
use super::safetensors_file::{self, Array, Inputs, Values};
use super::session::variants_line;

type Arrays = BTreeMap<String, Array>;

pub fn run(args: &ProbeArgs) -> Result<()> {
    check_flags(args)?;
    let device = args.device.open()?;
    output::check_writable(&args.out)?;
    let files = ModelFiles::open(&args.added.source(args.model.as_deref()))?;
    let input = |module: &str| match &args.input {
        Some(path) => Inputs::open(path),
        None => Err(missing("--in", format!("--module {module} needs a safetensors file of inputs"))),
    };
    let mut reports = Vec::new();
    let mut loaded = |report: WeightReport| reports.push(report);
    let arrays = match args.module {
        Module::Text => text(&files, args.prompt.as_deref().unwrap_or_default(), &device, args.dtype, &mut loaded)?,
        Module::Unet => {
            let input = input("unet")?;
            let options = UnetOptions { mid_dilation: args.dilation.unwrap_or(1), ..UnetOptions::default() };
            let (model, report) = files.unet(&device, args.dtype)?;
            loaded(report);
            let control = args.control.as_deref().map(|path| control(path, &files, &model, &device, args.dtype));
            let control = match control.transpose()? {
                None => None,
                Some((net, report)) => {
                    loaded(report);
                    Some((net, args.control_scale.unwrap_or(1.0)))
                }
            };
            unet(&model, control, &input, &options, &device, args.dtype)?
        }
        Module::Transformer => {
            let input = input("transformer")?;
            let (model, report) = files.transformer(&device, args.dtype)?;
            loaded(report);
            transformer(&model, &input)?
        }
        Module::VaeEncode | Module::VaeDecode => {
            let encodes = matches!(args.module, Module::VaeEncode);
            let input = input(if encodes { "vae-encode" } else { "vae-decode" })?;
            let (vae, report) = files.vae(&device, args.dtype)?;
            loaded(report);
            if encodes { vae_encode(&vae, &input)? } else { vae_decode(&vae, &input)? }
        }
    };
    files.warnings(&reports)?.iter().for_each(|warning| say!("warning: {warning}"));
    variants_line(&reports).iter().for_each(|line| say!("{line}"));
    safetensors_file::write(&args.out, &arrays)?;
    output::print_name(&args.out);
    Ok(())
}

/// The ControlNet at `path`, which must fit the model.
fn control(
    path: &Path,
    files: &ModelFiles,
    unet: &Unet,
    device: &Device,
    dtype: DType,
) -> Result<(ControlNet, WeightReport)> {
    let control = ControlFiles::open(path)?;
    let fits = control.config().check_fit(unet.config(), files.vae_config()?.factor());
    fits.map_err(|reason| Error::config(path.display().to_string(), reason))?;
    control.net_of(control.store(device, dtype)?)
}

fn check_flags(args: &ProbeArgs) -> Result<()> {
    if let (Some(control), false) = (&args.control, matches!(args.module, Module::Unet)) {
        let reason = "belongs to --module unet".into();
        return Err(Error::Request { field: "--control", value: control.display().to_string(), reason });
    }
    let unused = |flag, value: String, module: &str| {
        Err(Error::Request { field: flag, value, reason: format!("belongs to --module {module}") })
    };
    match (args.module, &args.prompt, &args.input, args.dilation) {
        (Module::Text, None, _, _) => Err(missing("--prompt", "--module text needs a prompt; it may be empty".into())),
        (Module::Text, _, Some(input), _) => {
            unused("--in", input.display().to_string(), "unet, transformer, vae-encode or vae-decode")
        }
        (Module::Unet | Module::Transformer | Module::VaeEncode | Module::VaeDecode, Some(prompt), _, _) => {
            unused("--prompt", format!("{prompt:?}"), "text")
        }
        (Module::Text | Module::Transformer | Module::VaeEncode | Module::VaeDecode, _, _, Some(dilation)) => {
            unused("--dilation", dilation.to_string(), "unet")
        }
        _ => Ok(()),
    }
}

fn missing(flag: &'static str, reason: String) -> Error {
    Error::Request { field: flag, value: "is missing".into(), reason }
}

/// T5, of a model that has one: `t5.input_ids`, `t5.attention_mask`, `t5.last_hidden_state`, of `length` tokens; `masked`: nothing
/// attends to the padding.
fn t5(
    files: &ModelFiles,
    [tokenizer, encoder]: [&'static str; 2],
    (prompt, length, masked): (&str, usize, bool),
    device: &Device,
    dtype: DType,
    loaded: &mut dyn FnMut(WeightReport),
) -> Result<Arrays> {
    let (model, report) = files.t5(encoder, device, dtype)?;
    loaded(report);
    let tokenizer = files.t5_tokenizer(tokenizer)?.fitted(model.config().vocab_size)?;
    let tokens = tokenizer.encode(prompt, length)?;
    if let Some(rest) = &tokens.truncated {
        say!("warning: the prompt is longer than T5's {length} tokens; cut off: {rest:?}");
    }
    let lengths = masked.then_some(std::slice::from_ref(&tokens.length));
    let hidden = model.forward(std::slice::from_ref(&tokens.ids), lengths)?;
    let ids = tokens.ids.iter().map(|&id| i64::from(id)).collect();
    let mask = (0..length).map(|token| i64::from(token < tokens.length)).collect();
    Ok(Arrays::from([
        ("t5.input_ids".into(), Array::i64(&[1, length], ids)),
        ("t5.attention_mask".into(), Array::i64(&[1, length], mask)),
        ("t5.last_hidden_state".into(), Array::f32(hidden.shape(), hidden.to_f32_vec()?)),
    ]))
}

/// One encoder: `input_ids`, `last_hidden_state`, `penultimate`, `pooled`, and `prompt_embeds`, which is what the UNet of the
/// SD 1.x/2.x family reads, the last hidden state. Two (SDXL): the same of each as `clip1.*` and `clip2.*`, `prompt_embeds`, both
/// penultimate states side by side, and `pooled_prompt_embeds`, the second one's projection. Of SD3 [`told_sd3`], and T5's own; of
/// DeepFloyd IF T5's alone, which are the `prompt_embeds`.
fn text(
    files: &ModelFiles,
    prompt: &str,
    device: &Device,
    dtype: DType,
    loaded: &mut dyn FnMut(WeightReport),
) -> Result<Arrays> {
    if files.is_of_pixels() {
        let prompt = prompt.to_lowercase();
        let read = (prompt.trim(), IF_T5_LENGTH, true);
        let mut arrays = t5(files, ["tokenizer", "text_encoder"], read, device, dtype, loaded)?;
        if let Some(hidden) = arrays.get("t5.last_hidden_state").cloned() {
            arrays.insert("prompt_embeds".into(), hidden);
        }
        return Ok(arrays);
    }
    let mut arrays = Arrays::new();
    let mut part = |[tokenizer, encoder]: [&'static str; 2], prefix: &str| -> Result<(TextEmbeddings, Tensor)> {
        let (model, report) = files.clip(encoder, device, dtype)?;
        loaded(report);
        encode(files, tokenizer, &model, prompt, prefix, &mut arrays)
    };
    if !files.has_part("text_encoder_2") {
        let (last, _) = part(["tokenizer", "text_encoder"], "")?;
        arrays.insert("prompt_embeds".into(), Array::f32(last.hidden.shape(), last.hidden.to_f32_vec()?));
        return Ok(arrays);
    }
    let (first, first_hidden) = part(["tokenizer", "text_encoder"], "clip1.")?;
    let (second, second_hidden) = part(["tokenizer_2", "text_encoder_2"], "clip2.")?;
    let embeds = Tensor::concat_channels(&first_hidden, &second_hidden)?;
    if files.has_part("transformer") {
        return told_sd3(files, [first, second], embeds, arrays, prompt, device, dtype, loaded);
    }
    arrays.insert("prompt_embeds".into(), Array::f32(embeds.shape(), embeds.to_f32_vec()?));
    if let Some(projected) = &second.projected {
        arrays.insert("pooled_prompt_embeds".into(), Array::f32(projected.shape(), projected.to_f32_vec()?));
    }
    Ok(arrays)
}

/// What SD3's transformer is told: `prompt_embeds`, `embeds` of both CLIPs padded to the width of T5, then its tokens (zeros without
/// it); `pooled_prompt_embeds`, both projections.
#[allow(clippy::too_many_arguments)]
fn told_sd3(
    files: &ModelFiles,
    [first, second]: [TextEmbeddings; 2],
    embeds: Tensor,
    mut arrays: Arrays,
    prompt: &str,
    device: &Device,
    dtype: DType,
    loaded: &mut dyn FnMut(WeightReport),
) -> Result<Arrays> {
    let width = files.transformer_config()?.joint_attention_dim;
    let [_, tokens, own] = embeds.shape()[..] else { unreachable!("a row of tokens") };
    let mut all = vec![0.0; (tokens + T5_LENGTH) * width];
    for (to, from) in all.chunks_exact_mut(width).zip(embeds.to_f32_vec()?.chunks_exact(own)) {
        to[..own].copy_from_slice(from);
    }
    if files.has("text_encoder_3") {
        let read = (prompt, T5_LENGTH, false);
        let t5 = t5(files, ["tokenizer_3", "text_encoder_3"], read, device, dtype, loaded)?;
        if let Some(Array { values: Values::F32(values), .. }) = t5.get("t5.last_hidden_state") {
            all[tokens * width..].copy_from_slice(values);
        }
        arrays.extend(t5);
    }
    arrays.insert("prompt_embeds".into(), Array::f32(&[1, tokens + T5_LENGTH, width], all));
    let pooled = |text: TextEmbeddings| text.projected.or(text.pooled).map(|x| x.to_f32_vec()).transpose();
    let pooled: Vec<f32> = [pooled(first)?, pooled(second)?].into_iter().flatten().flatten().collect();
    arrays.insert("pooled_prompt_embeds".into(), Array::f32(&[1, pooled.len()], pooled));
    Ok(arrays)
}

/// The last hidden state with its pooled outputs, and the penultimate one, of one encoder; what is written of it gets `prefix`.
fn encode(
    files: &ModelFiles,
    tokenizer: &str,
    encoder: &ClipTextModel,
    prompt: &str,
    prefix: &str,
    arrays: &mut Arrays,
) -> Result<(TextEmbeddings, Tensor)> {
    let config = encoder.config();
    let tokenizer = files.tokenizer(tokenizer)?.fitted(config.vocab_size, config.max_position_embeddings)?;
    let tokens = tokenizer.encode(prompt)?;
    if let Some(rest) = &tokens.truncated {
        say!("warning: the prompt is longer than {} tokens; cut off: {rest:?}", tokens.ids.len());
    }
    let rows = std::slice::from_ref(&tokens.ids);
    let last = encoder.forward(rows, ClipOutput::LAST.with_pooled())?;
    let penultimate = encoder.forward(rows, ClipOutput::PENULTIMATE)?.hidden;
    let ids: Vec<i64> = tokens.ids.iter().map(|&id| i64::from(id)).collect();
    arrays.insert(format!("{prefix}input_ids"), Array::i64(&[1, ids.len()], ids));
    for (name, tensor) in [
        ("last_hidden_state", Some(&last.hidden)),
        ("penultimate", Some(&penultimate)),
        ("pooled", last.pooled.as_ref()),
    ] {
        if let Some(tensor) = tensor {
            arrays.insert(format!("{prefix}{name}"), Array::f32(tensor.shape(), tensor.to_f32_vec()?));
        }
    }
    Ok((last, penultimate))
}

/// `sample`, with its shape as the file has it.
fn sample(input: &Inputs, channels: usize, device: &Device, dtype: DType) -> Result<(Tensor, [usize; 4])> {
    let wanted = format!("[N, {channels}, H, W]");
    let (shape, values) = input.get_shaped::<4>("sample", &wanted)?;
    if shape[1] != channels {
        return Err(input.mismatch("sample", &shape, &wanted));
    }
    Ok((from_nchw(device, dtype, shape, &values)?, shape))
}

/// `prompt_embeds` of `n` samples.
fn prompt_embeds(input: &Inputs, [n, width]: [usize; 2], device: &Device, dtype: DType) -> Result<Tensor> {
    let wanted = format!("[{n}, L, {width}] (or [1, L, {width}], used for every sample)");
    let (shape, text) = input.get_shaped::<3>("prompt_embeds", &wanted)?;
    let [rows, length, of_file] = shape;
    if of_file != width || (rows != n && rows != 1) {
        return Err(input.mismatch("prompt_embeds", &shape, &wanted));
    }
    let text = if rows == n { text } else { text.repeat(n) };
    Tensor::from_f32(device, &[n, length, width], dtype, &text)
}

/// `pooled_prompt_embeds` of `n` samples.
fn pooled_prompt_embeds(input: &Inputs, [n, width]: [usize; 2], device: &Device, dtype: DType) -> Result<Tensor> {
    let wanted = format!("[{n}, {width}] (or [1, {width}], used for every sample)");
    let (shape, pooled) = input.get_shaped::<2>("pooled_prompt_embeds", &wanted)?;
    if shape[1] != width || ![1, n].contains(&shape[0]) {
        return Err(input.mismatch("pooled_prompt_embeds", &shape, &wanted));
    }
    let pooled = if shape[0] == n { pooled } else { pooled.repeat(n) };
    Tensor::from_f32(device, &[n, width], dtype, &pooled)
}

/// `timestep`, the same of all `n` samples.
fn timestep(input: &Inputs, n: usize) -> Result<f32> {
    of_all(input, "timestep", n)
}

/// A number that is the same of all `n` samples.
fn of_all(input: &Inputs, name: &str, n: usize) -> Result<f32> {
    let (shape, values) = input.get(name)?;
    match values.first() {
        Some(&first) if values.iter().all(|&value| value == first) && [1, n].contains(&values.len()) => Ok(first),
        _ => Err(input.mismatch(name, &shape, &format!("one value (or {n} equal ones)"))),
    }
}

fn transformer(model: &Mmdit, input: &Inputs) -> Result<Arrays> {
    let (config, device, dtype) = (model.config(), model.device(), model.dtype());
    let (x, [n, ..]) = sample(input, config.in_channels, device, dtype)?;
    let text = prompt_embeds(input, [n, config.joint_attention_dim], device, dtype)?;
    let pooled = pooled_prompt_embeds(input, [n, config.pooled_projection_dim], device, dtype)?;
    let conditioning = model.condition(&text, &pooled, &[timestep(input, n)?])?;
    let out = model.forward(&x, &StepIndex::one(device, 0)?, &conditioning)?;
    Ok(Arrays::from([("out".into(), to_nchw(&out)?)]))
}

/// `control`: a ControlNet and its scale.
fn unet(
    unet: &Unet,
    control: Option<(ControlNet, f32)>,
    input: &Inputs,
    options: &UnetOptions,
    device: &Device,
    dtype: DType,
) -> Result<Arrays> {
    let (in_channels, width) = (unet.config().in_channels, unet.config().text_dim());
    let (x, sample_shape) = sample(input, in_channels, device, dtype)?;
    let n = sample_shape[0];
    let (text, timestep) = (prompt_embeds(input, [n, width], device, dtype)?, timestep(input, n)?);
    let added = match unet.config().added {
        None => None,
        Some(config) => {
            let pooled = pooled_prompt_embeds(input, [n, config.pooled_dim], device, dtype)?;
            let wanted = format!("[{n}, {TIME_IDS}] (or [1, {TIME_IDS}], used for every sample)");
            let (ids_shape, ids) = input.get_shaped::<2>("time_ids", &wanted)?;
            if ids_shape[1] != TIME_IDS || ![1, n].contains(&ids_shape[0]) {
                return Err(input.mismatch("time_ids", &ids_shape, &wanted));
            }
            let ids: Vec<[f32; TIME_IDS]> = ids.as_chunks().0.to_vec();
            Some((pooled, ids))
        }
    };
    let added = added.as_ref().map(|(pooled, time_ids)| AddedConditioning { pooled, time_ids });
    let noise_level = match unet.config().reads_noise_level {
        true => Some(of_all(input, "class_labels", n)?),
        false => None,
    };
    let told = TextConditioning { text: &text, added, guidance: None, noise_level };
    let (conditioning, step) = (unet.condition(told, &[timestep])?, StepIndex::one(device, 0)?);
    let Some((net, scale)) = control else {
        let out = unet.forward(&x, &step, &conditioning, options)?;
        return Ok(Arrays::from([("out".into(), to_nchw(&out)?)]));
    };
    let factor = net.config().factor();
    let [_, _, h, w] = sample_shape;
    let wanted = format!("[{n}, 3, {}, {}], {factor} times the sample's sides", factor * h, factor * w);
    let (shape, picture) = input.get_shaped::<4>("control", &wanted)?;
    if shape != [n, 3, factor * h, factor * w] {
        return Err(input.mismatch("control", &shape, &wanted));
    }
    if let Some(value) = picture.iter().find(|value| !(0.0..=1.0).contains(*value)) {
        return Err(input.mismatch("control", &shape, &format!("values from 0 to 1, not {value}")));
    }
    let hint = net.hint(&from_nchw(device, dtype, shape, &picture)?)?;
    let (told, zero_convs) = (net.conditioner().condition(told, &[timestep])?, net.zero_convs(scale, false)?);
    let added = net.forward(&x, &hint, &step, &told, &zero_convs)?;
    let control = [Control { net: &net, zero_convs: &zero_convs, conditioning: &told, hint: &hint, first: 0 }];
    let out = unet.forward(&x, &step, &conditioning, UnetCall { controls: &control, ..options.into() })?;
    let mut arrays = Arrays::from([("out".into(), to_nchw(&out)?)]);
    let last = added.len() - 1;
    for (index, added) in added.iter().enumerate() {
        let name = if index == last { "control.mid".into() } else { format!("control.down{index}") };
        arrays.insert(name, to_nchw(added)?);
    }
    Ok(arrays)
}

/// In the VAE's own dtype, which is f32 where the configuration says that f16 overflows.
fn vae_encode(vae: &Vae, input: &Inputs) -> Result<Arrays> {
    let factor = vae.config().factor();
    let wanted = format!("[N, 3, H, W] with H and W multiples of {factor}");
    let (shape, image) = input.get_shaped::<4>("image", &wanted)?;
    if shape[1] != 3 || shape[2] % factor != 0 || shape[3] % factor != 0 {
        return Err(input.mismatch("image", &shape, &wanted));
    }
    let moments = to_nchw(&vae.encode(&from_nchw(vae.device(), vae.dtype(), shape, &image)?)?)?;
    let Values::F32(values) = &moments.values else { unreachable!("to_nchw gives f32") };
    let [n, both, h, w] = moments.shape[..] else { unreachable!("to_nchw gives four dimensions") };
    let half = both / 2 * h * w;
    // [N, 2c, h, w]: of every sample the first half of the channels, then the second.
    let part = |second: usize| values.chunks_exact(2 * half).flat_map(move |x| &x[second * half..][..half]).copied();
    let shape = [n, both / 2, h, w];
    Ok(Arrays::from([
        ("mean".into(), Array::f32(&shape, part(0).collect())),
        ("logvar".into(), Array::f32(&shape, part(1).map(|x| x.clamp(-30.0, 20.0)).collect())),
    ]))
}

fn vae_decode(vae: &Vae, input: &Inputs) -> Result<Arrays> {
    let channels = vae.config().latent_channels;
    let wanted = format!("[N, {channels}, h, w]");
    let (shape, latent) = input.get_shaped::<4>("latent", &wanted)?;
    if shape[1] != channels {
        return Err(input.mismatch("latent", &shape, &wanted));
    }
    let decoded = vae.decode(&from_nchw(vae.device(), vae.dtype(), shape, &latent)?)?;
    Ok(Arrays::from([("decoded".into(), to_nchw(&decoded)?)]))
}

/// `[N, C, H, W]` values to a tensor `[N, H, W, C]`.
fn from_nchw(device: &Device, dtype: DType, [n, c, h, w]: [usize; 4], values: &[f32]) -> Result<Tensor> {
    Tensor::from_f32(device, &[n, h, w, c], dtype, &swapped(values, c, h * w))
}

/// A tensor `[N, H, W, C]` to an array `[N, C, H, W]`.
fn to_nchw(x: &Tensor) -> Result<Array> {
    let [n, h, w, c] = x.dims("probe", "result")?;
    Ok(Array::f32(&[n, c, h, w], swapped(&x.to_f32_vec()?, h * w, c)))
}

/// `[N, rows, columns]` to `[N, columns, rows]`.
fn swapped(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let sample = |x: &[f32]| -> Vec<f32> {
        (0..columns).flat_map(|column| x[column..].iter().step_by(columns).copied().take(rows)).collect()
    };
    values.chunks_exact((rows * columns).max(1)).flat_map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swapping_two_dimensions() {
        let x: Vec<f32> = (0..12u8).map(f32::from).collect(); // [2, 2, 3]
        assert_eq!(swapped(&x, 2, 3), [0., 3., 1., 4., 2., 5., 6., 9., 7., 10., 8., 11.]);
        assert_eq!(swapped(&swapped(&x, 2, 3), 3, 2), x);
    }
}
