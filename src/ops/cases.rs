//! The ops at the shapes of the models, prepared on any device: what `megafuse bench` and benches/ops.rs time.

use std::cell::{Cell, RefCell};

use rayon::prelude::*;
use serde_json::{Value, json};

use super::conv::Geometry;
use super::{
    Activation, Attention, AttentionOptions, Conv2d, ConvNorm, GroupNorm, Guidance, LayerNorm, Linear, Modulation,
    PatchLayout, Patches, Repaint, RmsNorm, SampleState, Source, StepCoefficients, StepColumns, StepIndex, StepRow,
    StepRows, StepTable, TimestepEmbedding, Upsampler, WindowShift, Windows,
};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Tensor};

/// One call of the op; what it returns is one of its results.
pub type Call = Box<dyn Fn() -> Result<Tensor>>;
pub type Prepare = Box<dyn Fn(&Inputs) -> Result<Call>>;

/// A call that can be prepared on any device.
pub struct Case {
    pub op: &'static str,
    /// The op and its shapes, for people.
    pub name: String,
    /// Sizes and options as a JSON object, for scripts: enough to build the same call elsewhere. `c`, `h` and `w` are what
    /// a convolution sees: both sources side by side, after a resize.
    pub shape: Value,
    /// Makes the inputs, random, and returns the call.
    pub prepare: Prepare,
}

fn case(op: &'static str, name: String, shape: Value, prepare: impl Fn(&Inputs) -> Result<Call> + 'static) -> Case {
    Case { op, name: format!("{op} {name}"), shape, prepare: Box::new(prepare) }
}

/// Uniform in [-1, 1), SplitMix64. Never zeros: power, and so clocks, follow the data.
pub fn random(count: usize, seed: u64) -> Vec<f32> {
    let value = |i: usize| {
        let z = (i as u64 + (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).into_par_iter().map(value).collect()
}

/// What the tensors of a case are made of: the same values for the same seed on every device.
pub struct Inputs<'a> {
    pub device: &'a Device,
    pub dtype: DType,
    /// What the values are rounded to, before they are stored in `dtype`.
    rounded: DType,
    /// Of the next tensor.
    seed: Cell<u64>,
}

impl<'a> Inputs<'a> {
    /// Calls with another `seed` have other values in all their tensors.
    pub fn new(device: &'a Device, dtype: DType, seed: u64) -> Inputs<'a> {
        Inputs { device, dtype, rounded: dtype, seed: Cell::new(seed * TENSORS + 1) }
    }

    /// The values that [`new`](Inputs::new) would have in `rounded`, stored in f32: for a result to compare with.
    pub fn in_f32(device: &'a Device, rounded: DType, seed: u64) -> Inputs<'a> {
        Inputs { rounded, ..Inputs::new(device, DType::F32, seed) }
    }

    /// [`random`] values; none on the meta device.
    pub fn tensor(&self, shape: &[usize]) -> Result<Tensor> {
        self.of(shape, self.rounded, self.dtype)
    }

    /// f32 whatever the dtype: samples and noise.
    pub fn f32(&self, shape: &[usize]) -> Result<Tensor> {
        self.of(shape, DType::F32, DType::F32)
    }

    fn of(&self, shape: &[usize], rounded: DType, dtype: DType) -> Result<Tensor> {
        if let Device::Meta(_) = self.device {
            return Tensor::uninit(self.device, shape, dtype);
        }
        let values = random(shape.iter().product(), self.seed.replace(self.seed.get() + 1));
        if rounded == dtype {
            return Tensor::from_f32(self.device, shape, dtype, &values);
        }
        let host = if let Device::Cpu(_) = self.device { self.device.clone() } else { Device::cpu() };
        Tensor::from_f32(&host, shape, rounded, &values)?.to_dtype(dtype)?.to_device(self.device)
    }
}

/// Tensors of a call, at most.
const TENSORS: u64 = 16;

/// The UNet of Stable Diffusion 1.5 in a guided step (batch 2), latents of `l` x `l`: 64 for 512x512 pixels.
pub fn sd15(l: usize) -> Vec<Case> {
    let [half, quarter, eighth] = [l / 2, l / 4, l / 8];
    let mut cases = vec![
        conv(Conv { name: "conv_in".into(), shape: [2, l, l, 4], outputs: 320, ..Conv::default() }),
        res(2, l, 320, 0, 320),
        res(2, l, 640, 320, 320),
        conv(Conv { name: format!("down {l}"), shape: [2, l, l, 320], outputs: 320, stride: 2, ..Conv::default() }),
        res(2, half, 640, 0, 640),
        up(2, half, 640),
        res(2, quarter, 1280, 0, 1280),
        res(2, eighth, 1280, 0, 1280),
        res(2, eighth, 1280, 1280, 1280),
        conv(Conv {
            name: format!("shortcut {l}"),
            shape: [2, l, l, 640],
            skip: 320,
            outputs: 320,
            kernel: 1,
            ..Conv::default()
        }),
        conv(Conv { name: "conv_out".into(), shape: [2, l, l, 320], outputs: 4, ..Conv::default() }.normed()),
    ];
    let [m, m2, m4] = [2 * l * l, 2 * half * half, 2 * quarter * quarter];
    for (m, k, n) in [
        (m, 320, 960),
        (m, 320, 320),
        (m, 1280, 320),
        (m2, 640, 640),
        (m2, 2560, 640),
        (m4, 1280, 1280),
        (m4, 5120, 1280),
        (154, 768, 640),
        (154, 768, 2560),
        (2, 1280, 1280),
    ] {
        cases.push(linear(m, k, n, Activation::None));
    }
    for (m, k, n) in [(m, 320, 2560), (m2, 640, 5120), (m4, 1280, 10240)] {
        cases.push(linear(m, k, n, Activation::Geglu));
    }
    cases.push(linear(154, 768, 3072, Activation::QuickGelu));
    cases.extend([group_norm([2, l, l, 320], 0), group_norm([2, l, l, 640], 320)]);
    cases.extend([(m, 320), (m2, 640), (m4, 1280)].map(|(rows, c)| layer_norm(rows, c)));
    for (l, head_dim) in [(l, 40), (half, 80), (quarter, 160), (eighth, 160)] {
        cases.push(self_attention(2, l * l, 8, head_dim, false));
    }
    cases.push(self_attention(2, 77, 12, 64, true));
    for (l, head_dim) in [(l, 40), (half, 80), (quarter, 160), (eighth, 160)] {
        cases.push(cross_attention(2, l * l, 77, 8, head_dim));
    }
    cases.extend([activation([2, 1280]), add([2, l, l, 320]), embedding(2, 77, 49408, 768)]);
    cases
}

/// The UNet of SDXL in a guided step, as its configuration has it: 320, 640 and 1280 channels, head_dim 64, 77 tokens of
/// 2048. `l`: 128 for 1024x1024 pixels.
pub fn sdxl(l: usize) -> Vec<Case> {
    let (half, quarter) = (l / 2, l / 4);
    let mut cases = vec![res(2, l, 320, 0, 320), res(2, half, 640, 0, 640), res(2, quarter, 1280, 0, 1280)];
    cases.extend([res(2, quarter, 1280, 1280, 1280), up(2, quarter, 1280)]);
    for (l, c) in [(half, 640), (quarter, 1280)] {
        let m = 2 * l * l;
        for (k, n) in [(c, 3 * c), (c, c), (4 * c, c)] {
            cases.push(linear(m, k, n, Activation::None));
        }
        cases.push(linear(m, c, 8 * c, Activation::Geglu));
        cases.push(linear(154, 2048, 2 * c, Activation::None));
        cases.push(layer_norm(m, c));
        cases.push(self_attention(2, l * l, c / 64, 64, false));
        cases.push(cross_attention(2, l * l, 77, c / 64, 64));
    }
    cases.extend(hidiffusion(2 * half));
    // ScaleDiff's, of the same maps.
    cases.push(neighbourhood_attention(2, [l; 2], [half; 2], 10, 64));
    cases.extend(scalecrafter(2 * half));
    cases.extend(fouriscale(2 * half));
    cases
}

/// What ScaleCrafter asks of SDXL's UNet beside its own ops, where its deepest maps are `l / 2` on a side: a re-dilated convolution
/// of a whole factor and the two resizes of a broken one, 5x5 kernels, and what FreeU makes of the skip connections.
fn scalecrafter(l: usize) -> Vec<Case> {
    let half = l / 2;
    let redilated =
        |name, dilation| Conv { name, shape: [2, half, half, 1280], outputs: 1280, dilation, ..Conv::default() };
    vec![
        conv(redilated(format!("re-dilated 2 {half}"), 2)),
        conv(redilated(format!("re-dilated 4 {half}"), 4)),
        resize_bilinear([2, half, half, 1280], [half * 6 / 5; 2]),
        resize_bilinear([2, half * 6 / 5, half * 6 / 5, 1280], [half; 2]),
        disperse(1280, 1280),
        freeu([2, half, half], 1280, 1280),
        freeu([2, l, l], 640, 640),
    ]
}

/// What FouriScale asks of SDXL's UNet beside its own ops, at twice the sides: the filters of its two finest filtered levels over three
/// samples, each with the dilated convolution that it precedes, and the self-attention of the twins.
fn fouriscale(l: usize) -> Vec<Case> {
    let half = l / 2;
    let dilated = |side: usize, channels: usize, outputs| {
        let (name, shape) = (format!("dilated 2 {side}"), [3, side, side, channels]);
        conv(Conv { name, shape, outputs, dilation: 2, ..Conv::default() })
    };
    vec![
        spectral_filter([3, half, half, 1280], [half; 2]),
        dilated(half, 1280, 1280),
        spectral_filter([3, l, l, 1280], [l; 2]),
        dilated(l, 1280, 640),
        borrowed_attention(1, l * l, 10, 64),
    ]
}

/// What HiDiffusion asks of SDXL's UNet beside its own ops, on maps of `l` x `l` with 10 heads: 128 for 2048x2048 pixels. The same
/// map's self-attention within windows, that of windows which lie in memory one after the other (without the copies that put
/// them there and back), and that of the whole map.
fn hidiffusion(l: usize) -> Vec<Case> {
    let half = l / 2;
    vec![
        self_attention(2, l * l, 10, 64, false),
        self_attention(8, half * half, 10, 64, false),
        windowed_attention(2, [l, l], 10, 64),
        windowed_attention(2, [half, half], 10, 64),
        conv(Conv {
            name: format!("wide down {l}"),
            shape: [2, l, l, 640],
            outputs: 640,
            stride: 4,
            dilation: 2,
            ..Conv::default()
        }),
        avg_pool([2, l, l, 640]),
        resize([2, half, half, 640], [l; 2], Upsampler::BicubicTorch),
    ]
}

/// The VAE's decoder, one picture, latents of `l` x `l`.
pub fn vae_decode(l: usize) -> Vec<Case> {
    let (quadruple, picture) = (4 * l, 8 * l);
    let vae = |name: &str, size: usize, channels: usize, outputs: usize| {
        let (name, shape) = (format!("vae {name}"), [1, size, size, channels]);
        conv(Conv { name, shape, outputs, ..Conv::default() }.normed())
    };
    vec![
        vae(&l.to_string(), l, 512, 512),
        vae(&(2 * l).to_string(), 2 * l, 512, 512),
        vae(&quadruple.to_string(), quadruple, 256, 256),
        vae(&picture.to_string(), picture, 128, 128),
        up(1, quadruple, 256),
        vae("conv_out", picture, 128, 3),
        group_norm([1, picture, picture, 128], 0),
        self_attention(1, l * l, 1, 512, false),
        linear(l * l, 512, 1536, Activation::None),
    ]
}

/// A relay from latents of `l` x `l` to twice that, and what a step does around its models.
pub fn relay(l: usize) -> Vec<Case> {
    let (picture, target) = (8 * l, 16 * l);
    let all = [
        Upsampler::Bilinear,
        Upsampler::Bicubic,
        Upsampler::BicubicTorch,
        Upsampler::BicubicGaussian,
        Upsampler::BicubicEdge,
    ];
    let mut cases: Vec<Case> =
        all.into_iter().map(|upsampler| resize([1, picture, picture, 3], [target; 2], upsampler)).collect();
    cases.extend([
        resize_u8([1, picture, picture, 3], [target; 2]),
        resize_nearest([1, l, l, 4], [2 * l; 2]),
        sampler_step([1, 2 * l, 2 * l, 4]),
        scale_input([1, 2 * l, 2 * l, 4]),
        add_noise([1, 2 * l, 2 * l, 4]),
        repaint([1, 2 * l, 2 * l, 4]),
        diagonal_gaussian([1, 2 * l, 2 * l, 8]),
        clamp([1, target, target, 3]),
        scale_cast([1, 2 * l, 2 * l, 4]),
        count_non_finite([1, target, target, 3]),
        timestep_embedding(50),
    ]);
    cases
}

/// What methods do beside the network, one picture: views of `l` x `l` on latents of twice the sides, with half a view between
/// neighbours, and crops' strided samples (MultiDiffusion, DemoFusion); patches that are merged by weight (PixelRush); the low
/// bands of the picture and its sharpening (DiffuseHigh); the second call's correction (Upsample Guidance); moments of latents.
/// Attention within windows and neighbourhoods, beside that of the whole map, is among SDXL's own.
pub fn methods(l: usize) -> Vec<Case> {
    let (map, picture) = ([2 * l; 2], [1, 16 * l, 16 * l, 3]);
    let latents = [1, 2 * l, 2 * l, 4];
    let views = |size| patches_over(map, [size; 2], size / 2);
    let strided = PatchesOf { layout: PatchLayout { map, size: [l; 2], stride: 2, wraps: false }, origins: strided(2) };
    vec![
        gather_patches(views(l)),
        step_patches(views(l)),
        gather_patches(strided.clone()),
        step_patches(strided),
        merge_patches(views(l)),
        exchange_low_band(picture),
        sharpen(picture),
        pool_latents(latents, 2),
        upsample_guidance(latents, 2),
        latent_moments(latents),
        standardise_latents(latents),
        add_masked(2, l * l, 320),
    ]
}

/// T5-XXL at 256 tokens: its norm.
pub fn rms_norms() -> Vec<Case> {
    vec![rms_norm(512, 4096)]
}

/// SD 3's transformer (24 heads of 64) at latents of `l` x `l`, guided, with 333 tokens of text: a block's calls for the picture,
/// and the map at the end. The attention is that of [`self_attention`] with the text's keys beside its own.
pub fn sd3(l: usize) -> Vec<Case> {
    let (side, c) = (l / 2, 1536);
    let (picture, text) = (2 * side * side, 2 * 333);
    vec![
        modulated_layer_norm(picture, c, 2),
        linear(picture, c, 3 * c, Activation::None),
        rms_norm_heads([2, side * side, 3, 24, 64]),
        gated_linear(picture, c, c, 2),
        linear(picture, c, 4 * c, Activation::GeluTanh),
        gated_linear(picture, 4 * c, c, 2),
        linear(text, c, 3 * c, Activation::None),
        gated_linear(text, 4 * c, c, 2),
        unpatchify([2, side, side], 2, 16),
    ]
}

/// The UNet of DeepFloyd IF-I-XL in a guided step, pictures of `l` x `l`: 64 as it was trained. Of its ResNets the convolutions,
/// whose norms are followed by GELU and of which each image modulates the second by its timestep, and that norm alone.
pub fn if_xl(l: usize) -> Vec<Case> {
    let levels = [704, 1408, 2112, 2816].into_iter().enumerate().map(|(level, c)| (l >> level, c));
    levels
        .flat_map(|(l, c)| [gelu_res(2, l, c, false), gelu_res(2, l, c, true), modulated_group_norm([2, l, l, c])])
        .collect()
}

/// Every op once, so small that an emulated card does them all in seconds.
pub fn small() -> Vec<Case> {
    let mut cases = vec![
        res(1, 8, 64, 0, 64),
        res(1, 8, 32, 32, 64),
        gelu_res(2, 4, 64, true),
        up(1, 4, 32),
        linear(64, 64, 64, Activation::None),
        linear(64, 64, 128, Activation::Geglu),
        gated_linear(64, 64, 64, 2),
        group_norm([1, 8, 8, 64], 0),
        modulated_group_norm([2, 8, 8, 64]),
        layer_norm(16, 64),
        modulated_layer_norm(16, 64, 2),
        rms_norm(16, 64),
        rms_norm_heads([1, 9, 3, 2, 64]),
        unpatchify([1, 3, 5], 2, 16),
        self_attention(1, 64, 2, 40, false),
        self_attention(1, 77, 1, 64, true),
        cross_attention(1, 64, 77, 2, 40),
        activation([2, 64]),
        add([1, 8, 8, 64]),
        embedding(1, 7, 50, 64),
        windowed_attention(1, [16, 16], 1, 64),
        neighbourhood_attention(1, [11, 16], [8, 8], 1, 64),
        avg_pool([1, 5, 8, 16]),
        resize_bilinear([1, 5, 8, 16], [6, 7]),
        disperse(4, 8),
        freeu([1, 5, 8], 16, 8),
        spectral_filter([3, 5, 8, 16], [6, 8]),
        borrowed_attention(1, 64, 2, 40),
    ];
    cases.extend(relay(2));
    cases.extend(methods(4));
    cases
}

/// 3x3, stride 1, nothing fused but the bias.
struct Conv {
    name: String,
    /// `[N, H, W, C]` of the first source.
    shape: [usize; 4],
    /// Channels of the second source, 0 for none.
    skip: usize,
    outputs: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    /// Top, bottom, left, right; `None`: as much as keeps the size at stride 1.
    padding: Option<[usize; 4]>,
    bias: bool,
    /// Groups of the group norm of the input, images and conditioning rows of a step by which it is modulated, and what follows.
    norm_groups: Option<usize>,
    modulation: Option<[usize; 2]>,
    activation: Activation,
    resize_to: Option<[usize; 2]>,
    /// A row for each image (of its timestep), and a tensor of the result's shape, are added.
    row: bool,
    residual: bool,
}

impl Default for Conv {
    fn default() -> Conv {
        Conv {
            name: String::new(),
            shape: [1; 4],
            skip: 0,
            outputs: 1,
            kernel: 3,
            stride: 1,
            dilation: 1,
            padding: None,
            bias: true,
            norm_groups: None,
            modulation: None,
            activation: Activation::None,
            resize_to: None,
            row: false,
            residual: false,
        }
    }
}

impl Conv {
    /// Group norm of 32 groups and SiLU.
    fn normed(self) -> Conv {
        Conv { norm_groups: Some(32), activation: Activation::Silu, ..self }
    }
}

fn res(n: usize, l: usize, channels: usize, skip: usize, outputs: usize) -> Case {
    let name = format!("res {l}{}", if skip > 0 { " skip" } else { "" });
    conv(Conv { name, shape: [n, l, l, channels], skip, outputs, ..Conv::default() }.normed())
}

/// As [`res`], by GELU; `modulated`: the second convolution, which adds what the ResNet began with.
fn gelu_res(n: usize, l: usize, channels: usize, modulated: bool) -> Case {
    let (name, shape, activation) = (format!("res {l}"), [n, l, l, channels], Activation::Gelu);
    let modulation = modulated.then_some([n, n]);
    let plain = Conv { name, shape, outputs: channels, modulation, residual: modulated, ..Conv::default() };
    conv(Conv { activation, ..plain.normed() })
}

fn up(n: usize, l: usize, channels: usize) -> Case {
    let (shape, resize_to) = ([n, l, l, channels], Some([2 * l; 2]));
    conv(Conv { name: format!("up {l}"), shape, outputs: channels, resize_to, ..Conv::default() })
}

/// What [`Case::shape`] says of a convolution.
pub(super) fn conv_shape(args: &Conv2d, g: &Geometry) -> Value {
    let second = args.x.second().map_or(0, |second| second.shape()[3]);
    let mut shape = json!({
        "n": g.images, "h": g.input[0], "w": g.input[1], "c": g.channels, "o": g.outputs, "kernel": g.kernel[0],
        "stride": args.stride, "dilation": args.dilation, "bias": args.bias.is_some(), "second_source": second,
        "resized_from": args.resize_to.map(|_| g.stored), "norm_groups": args.norm.map(|norm| norm.groups),
        "activation": activation_name(args.norm.map_or(Activation::None, |norm| norm.activation)),
        "padding": args.padding, "row": args.row.is_some(), "residual": args.residual.is_some(),
    });
    if let Some(modulation) = args.norm.and_then(|norm| norm.modulation) {
        shape["modulation"] = json!([g.images, modulation.rows.rows]);
    }
    if args.stripe.is_some() || g.kernel[0] != g.kernel[1] {
        shape["part"] = true.into(); // which of_shape does not make
    }
    shape
}

/// As JSON and names of cases have it.
fn activation_name(activation: Activation) -> String {
    format!("{activation:?}").to_lowercase()
}

fn conv(c: Conv) -> Case {
    let [n, h, w, channels] = c.shape;
    let skip = if c.skip > 0 { format!("+{}", c.skip) } else { String::new() };
    let mut name = format!("[{n},{h},{w},{channels}{skip}] {k}x{k} -> {o}", k = c.kernel, o = c.outputs);
    if !c.name.is_empty() {
        name = format!("{} {name}", c.name);
    }
    let followed = format!(" {}", activation_name(c.activation));
    let said = [
        (c.norm_groups.is_some(), " norm"),
        (c.modulation.is_some(), " modulated"),
        (c.activation != Activation::None, &followed),
        (c.row, " row"),
        (c.residual, " residual"),
        (!c.bias, " without bias"),
    ];
    said.iter().filter(|(is, _)| *is).for_each(|(_, words)| name += words);
    let [seen_h, seen_w] = c.resize_to.unwrap_or([h, w]);
    let padding = c.padding.unwrap_or([c.dilation * (c.kernel / 2); 4]);
    let mut fields = json!({
        "n": n, "h": seen_h, "w": seen_w, "c": channels + c.skip, "o": c.outputs, "kernel": c.kernel,
        "stride": c.stride, "dilation": c.dilation, "bias": c.bias, "second_source": c.skip,
        "resized_from": c.resize_to.map(|_| [h, w]), "norm_groups": c.norm_groups,
        "activation": activation_name(c.activation), "padding": padding, "row": c.row, "residual": c.residual,
    });
    if let Some(modulation) = c.modulation {
        fields["modulation"] = json!(modulation);
    }
    let reach = c.dilation * (c.kernel - 1) + 1;
    let output =
        |size: usize, before: usize, after: usize| (size + before + after).saturating_sub(reach) / c.stride + 1;
    let output = [output(seen_h, padding[0], padding[1]), output(seen_w, padding[2], padding[3])];
    case("conv2d", name, fields, move |inputs| {
        let t = |shape: &[usize]| inputs.tensor(shape);
        let some = |is: bool, shape: &[usize]| is.then(|| inputs.tensor(shape)).transpose();
        let (a, b) = (t(&c.shape)?, t(&[n, h, w, c.skip])?);
        let weight = t(&[c.outputs, c.kernel, c.kernel, channels + c.skip])?;
        let (bias, gamma) = (some(c.bias, &[c.outputs])?, t(&[channels + c.skip])?);
        let table = some(c.row, &[n, c.outputs])?;
        let step = StepIndex::one(inputs.device, 0)?;
        let residual = some(c.residual, &[n, output[0], output[1], c.outputs])?;
        let modulations = c.modulation.map(|[_, rows]| t(&[rows, 2 * (channels + c.skip)])).transpose()?;
        let (two, groups, activation, stride, dilation, resize_to) =
            (c.skip > 0, c.norm_groups, c.activation, c.stride, c.dilation, c.resize_to);
        Ok(Box::new(move || {
            let x = if two { Source::Two(&a, &b) } else { Source::One(&a) };
            let rows_of = |table, rows| StepRows { table, step: &step, rows };
            let modulation = modulations.as_ref().map(|table| rows_of(table, table.shape()[0]));
            let modulation = modulated_by(modulation, gamma.numel());
            let (gamma, beta, eps) = (&gamma, &gamma, 1e-5);
            let norm = groups.map(|groups| ConvNorm { gamma, beta, groups, eps, modulation, activation });
            let row = table.as_ref().map(|table| rows_of(table, n));
            let (bias, residual) = (bias.as_ref(), residual.as_ref());
            let plain = Conv2d::new(x, &weight);
            super::conv2d(Conv2d { bias, norm, stride, dilation, padding, resize_to, row, residual, ..plain })
        }))
    })
}

/// What [`Case::shape`] says of a linear layer; `[m, n, k]`: rows of x, rows of the weight, terms of a sum. `gate`: images, and
/// conditioning rows of a step.
pub(super) fn linear_shape(
    [m, n, k]: [usize; 3],
    bias: bool,
    activation: Activation,
    gate: Option<[usize; 2]>,
    residual: bool,
) -> Value {
    let activation = activation_name(activation);
    let mut fields = json!({ "m": m, "n": n, "k": k, "bias": bias, "activation": activation, "residual": residual });
    if let Some(gate) = gate {
        fields["gate"] = json!(gate);
    }
    fields
}

fn linear(m: usize, k: usize, rows: usize, activation: Activation) -> Case {
    linear_with([m, rows, k], true, activation, None, false)
}

/// With a gate and a residual, as a diffusion transformer ends a branch.
fn gated_linear(m: usize, k: usize, rows: usize, images: usize) -> Case {
    linear_with([m, rows, k], true, Activation::None, Some([images, images]), true)
}

fn linear_with(
    [m, rows, k]: [usize; 3],
    bias: bool,
    activation: Activation,
    gate: Option<[usize; 2]>,
    residual: bool,
) -> Case {
    let mut name = format!("[{m},{k}] -> {rows}");
    if activation != Activation::None {
        name += &format!(" {activation:?}").to_lowercase();
    }
    [(gate.is_some(), " gate"), (residual, " residual"), (!bias, " without bias")]
        .iter()
        .filter(|(is, _)| *is)
        .for_each(|(_, words)| name += words);
    case("linear", name, linear_shape([m, rows, k], bias, activation, gate, residual), move |inputs| {
        let some = |is: bool, shape: &[usize]| is.then(|| inputs.tensor(shape)).transpose();
        let images = gate.map_or(1, |[images, _]| images);
        let x = inputs.tensor(&[images, m / images.max(1), k])?;
        let (weight, bias) = (inputs.tensor(&[rows, k])?, some(bias, &[rows])?);
        let n = if activation.is_gated() { rows / 2 } else { rows };
        let residual = some(residual, &[images, m / images.max(1), n])?;
        let table = gate.map(|[_, per_step]| inputs.tensor(&[per_step, n])).transpose()?;
        let step = StepIndex::one(inputs.device, 0)?;
        Ok(Box::new(move || {
            let (bias, residual) = (bias.as_ref(), residual.as_ref());
            let of = |(table, [_, rows]): (_, [usize; 2])| StepRows { table, step: &step, rows };
            let gate = table.as_ref().zip(gate).map(|gate| StepColumns { rows: of(gate), first: 0 });
            super::linear(Linear { bias, activation, gate, residual, ..Linear::new(&x, &weight) })
        }))
    })
}

/// What [`Case::shape`] says of a group norm.
pub(super) fn group_norm_shape(args: &GroupNorm, [n, h, w, c]: [usize; 4]) -> Value {
    let second = args.x.second().map_or(0, |second| second.shape()[3]);
    let modulation = args.modulation.map(|modulation| [n, modulation.rows.rows]);
    group_norm_fields([n, h, w, c], second, args.groups, modulation, args.activation)
}

fn group_norm_fields(
    [n, h, w, c]: [usize; 4],
    second: usize,
    groups: usize,
    modulation: Option<[usize; 2]>,
    activation: Activation,
) -> Value {
    let activation = activation_name(activation);
    let mut fields = json!({
        "n": n, "h": h, "w": w, "c": c, "second_source": second, "groups": groups, "activation": activation,
    });
    if let Some(modulation) = modulation {
        fields["modulation"] = json!(modulation);
    }
    fields
}

/// Of a table whose rows hold C scales, then C shifts.
fn modulated_by(rows: Option<StepRows>, c: usize) -> Option<Modulation> {
    rows.map(|rows| Modulation { rows, scale: 0, shift: c })
}

/// What [`Case::shape`] says of a norm of rows.
pub(super) fn rows_shape(x: &Tensor, c: usize) -> Value {
    json!({ "rows": x.numel() / c.max(1), "c": c })
}

fn group_norm(shape: [usize; 4], skip: usize) -> Case {
    group_norm_with(shape, skip, 32, None, Activation::Silu)
}

/// Each image by a row of its own, then GELU.
fn modulated_group_norm(shape: [usize; 4]) -> Case {
    group_norm_with(shape, 0, 32, Some([shape[0]; 2]), Activation::Gelu)
}

/// `modulation`: images, and conditioning rows of a step.
fn group_norm_with(
    shape: [usize; 4],
    skip: usize,
    groups: usize,
    modulation: Option<[usize; 2]>,
    activation: Activation,
) -> Case {
    let [n, h, w, channels] = shape;
    let c = channels + skip;
    let fields = group_norm_fields([n, h, w, c], skip, groups, modulation, activation);
    let mut name = if modulation.is_some() { "modulated ".to_owned() } else { String::new() };
    if activation != Activation::None {
        name += &format!("{} ", activation_name(activation));
    }
    case("group_norm", format!("{name}[{n},{h},{w},{channels}+{skip}]"), fields, move |inputs| {
        let t = |shape: &[usize]| inputs.tensor(shape);
        let (a, b, gamma) = (t(&shape)?, t(&[n, h, w, skip])?, t(&[c])?);
        let table = modulation.map(|[_, per_step]| t(&[per_step, 2 * c])).transpose()?;
        let step = StepIndex::one(inputs.device, 0)?;
        Ok(Box::new(move || {
            let x = if skip > 0 { Source::Two(&a, &b) } else { Source::One(&a) };
            let of = |(table, [_, rows]): (_, [usize; 2])| StepRows { table, step: &step, rows };
            let modulation = modulated_by(table.as_ref().zip(modulation).map(of), c);
            let (gamma, beta, eps) = (&gamma, &gamma, 1e-5);
            super::group_norm(GroupNorm { x, gamma, beta, groups, eps, modulation, activation })
        }))
    })
}

/// What [`Case::shape`] says of a layer norm.
pub(super) fn layer_norm_shape(args: &LayerNorm, c: usize) -> Value {
    let modulation = args.modulation.map(|modulation| [args.x.shape()[0], modulation.rows.rows]);
    layer_norm_fields(args.x.numel() / c.max(1), c, args.gamma.is_some(), modulation)
}

fn layer_norm_fields(rows: usize, c: usize, affine: bool, modulation: Option<[usize; 2]>) -> Value {
    let mut fields = json!({ "rows": rows, "c": c });
    if !affine {
        fields["affine"] = json!(false);
    }
    if let Some(modulation) = modulation {
        fields["modulation"] = json!(modulation);
    }
    fields
}

fn layer_norm(rows: usize, c: usize) -> Case {
    layer_norm_with(rows, c, true, None)
}

/// Without gamma and beta, but modulated, each image by a row of its own.
fn modulated_layer_norm(rows: usize, c: usize, images: usize) -> Case {
    layer_norm_with(rows, c, false, Some([images, images]))
}

/// `modulation`: images, and conditioning rows of a step.
fn layer_norm_with(rows: usize, c: usize, affine: bool, modulation: Option<[usize; 2]>) -> Case {
    let name = format!("[{rows},{c}]{}", if modulation.is_some() { " modulated" } else { "" });
    case("layer_norm", name, layer_norm_fields(rows, c, affine, modulation), move |inputs| {
        let images = modulation.map_or(1, |[images, _]| images);
        let x = inputs.tensor(&[images, rows / images.max(1), c])?;
        let gamma = affine.then(|| inputs.tensor(&[c])).transpose()?;
        let table = modulation.map(|[_, per_step]| inputs.tensor(&[per_step, 2 * c])).transpose()?;
        let step = StepIndex::one(inputs.device, 0)?;
        Ok(Box::new(move || {
            let gamma = gamma.as_ref();
            let of = |(table, [_, rows]): (_, [usize; 2])| StepRows { table, step: &step, rows };
            let modulation = modulated_by(table.as_ref().zip(modulation).map(of), c);
            super::layer_norm(LayerNorm { gamma, beta: gamma, modulation, ..LayerNorm::new(&x, 1e-5) })
        }))
    })
}

/// What [`Case::shape`] says of the norms of heads.
pub(super) fn heads_shape(shape: &[usize]) -> Value {
    json!({ "dims": shape })
}

/// `[N, L, P, heads, head_dim]`
fn rms_norm_heads(shape: [usize; 5]) -> Case {
    case("rms_norm_heads", format!("{shape:?}"), heads_shape(&shape), move |inputs| {
        let [.., parts, _, head_dim] = shape;
        let gammas = (1..parts).map(|_| inputs.tensor(&[head_dim])).collect::<Result<Vec<_>>>()?;
        let x = RefCell::new(inputs.tensor(&shape)?);
        Ok(Box::new(move || {
            let mut x = x.borrow_mut();
            if !x.is_unshared() {
                *x = x.duplicate()?; // somebody keeps the result before
            }
            super::rms_norm_heads(&mut x, &gammas.iter().collect::<Vec<_>>(), 1e-6)?;
            Ok(x.clone())
        }))
    })
}

fn unpatchify([n, h, w]: [usize; 3], patch: usize, c: usize) -> Case {
    let fields = json!({ "dims": [n, h, w, c], "patch": patch });
    case("unpatchify", format!("[{n},{h}*{w},{patch}*{patch}*{c}]"), fields, move |inputs| {
        let x = inputs.tensor(&[n, h * w, patch * patch * c])?;
        Ok(Box::new(move || super::unpatchify(&x, [h, w], patch)))
    })
}

fn rms_norm(rows: usize, c: usize) -> Case {
    case("rms_norm", format!("[{rows},{c}]"), json!({ "rows": rows, "c": c }), move |inputs| {
        let (x, gamma) = (inputs.tensor(&[rows, c])?, inputs.tensor(&[c])?);
        Ok(Box::new(move || super::rms_norm(RmsNorm { x: &x, gamma: &gamma, eps: 1e-6 })))
    })
}

/// What [`Case::shape`] says of attention; `[n, queries, keys, heads, head_dim]`. `packed`: over one projection of q, k and v.
pub(super) fn attention_shape(
    [n, queries, keys, heads, head_dim]: [usize; 5],
    images_per_kv: usize,
    packed: bool,
    causal: bool,
) -> Value {
    json!({
        "n": n, "queries": queries, "keys": keys, "heads": heads, "head_dim": head_dim, "causal": causal,
        "packed": packed, "kv_rows": n / images_per_kv.max(1),
    })
}

fn self_attention(n: usize, l: usize, heads: usize, head_dim: usize, causal: bool) -> Case {
    let suffix = if causal { " causal" } else { "" };
    let fields = attention_shape([n, l, l, heads, head_dim], 1, true, causal);
    case("attention", format!("[{n},{l},3,{heads},{head_dim}]{suffix}"), fields, move |inputs| {
        let qkv = inputs.tensor(&[n, l, 3, heads, head_dim])?;
        Ok(Box::new(move || super::attention(Attention::Packed { qkv: &qkv, causal })))
    })
}

/// Four windows, shifted by a quarter of one, as a step of MSW-MSA reads them.
fn windowed_attention(n: usize, map: [usize; 2], heads: usize, head_dim: usize) -> Case {
    let [h, w] = map;
    let window = map.map(|side| side / 2);
    let mut fields = attention_shape([n, h * w, h * w, heads, head_dim], 1, true, false);
    fields["map"] = json!(map);
    fields["window"] = json!(window);
    let name = format!("[{n},{},3,{heads},{head_dim}] in windows of {}x{}", h * w, window[0], window[1]);
    case("attention", name, fields, move |inputs| {
        let qkv = inputs.tensor(&[n, h * w, 3, heads, head_dim])?;
        let factors = Tensor::from_u32(inputs.device, &[1, 1, 1], &[1])?;
        let step = StepIndex::one(inputs.device, 0)?;
        Ok(Box::new(move || {
            let unit = window.map(|side| side / 4);
            let shift = Some(WindowShift { factors: &factors, step: &step, column: 0, unit });
            let windows = Some(Windows { map, window, keys: None, shift });
            let options = AttentionOptions { windows, ..AttentionOptions::default() };
            super::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options)
        }))
    })
}

/// Windows of half the sides of the box of keys around each: neighbourhood patch attention, of a map that is larger than the
/// model's own by what it is larger than `keys`.
fn neighbourhood_attention(n: usize, map: [usize; 2], keys: [usize; 2], heads: usize, head_dim: usize) -> Case {
    let [h, w] = map;
    let window = keys.map(|side| side / 2);
    let mut fields = attention_shape([n, h * w, h * w, heads, head_dim], 1, true, false);
    fields["map"] = json!(map);
    fields["window"] = json!(window);
    fields["window_keys"] = json!(keys);
    let boxes = format!("in windows of {}x{} with keys of {}x{}", window[0], window[1], keys[0], keys[1]);
    let name = format!("[{n},{},3,{heads},{head_dim}] {boxes}", h * w);
    case("attention", name, fields, move |inputs| {
        let qkv = inputs.tensor(&[n, h * w, 3, heads, head_dim])?;
        let windows = Some(Windows { map, window, keys: Some(keys), shift: None });
        let options = AttentionOptions { windows, ..AttentionOptions::default() };
        Ok(Box::new(move || super::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options)))
    })
}

fn resize_bilinear(shape: [usize; 4], size: [usize; 2]) -> Case {
    let values = json!({ "dims": shape, "size": size });
    case("resize_bilinear", format!("{shape:?} to {size:?}"), values, move |inputs| {
        let x = inputs.tensor(&shape)?;
        Ok(Box::new(move || super::resize_bilinear(&x, size)))
    })
}

fn disperse(outputs: usize, channels: usize) -> Case {
    let shape = [outputs, 3, 3, channels];
    case("disperse", format!("{shape:?}"), json!({ "dims": shape }), move |inputs| {
        let weight = inputs.tensor(&shape)?;
        Ok(Box::new(move || super::disperse(&weight)))
    })
}

fn freeu([n, h, w]: [usize; 3], backbone: usize, skip: usize) -> Case {
    let values = json!({ "dims": [n, h, w], "channels": [backbone, skip] });
    case("freeu", format!("[{n}, {h}, {w}] {backbone} + {skip}"), values, move |inputs| {
        let (b, s) = (inputs.tensor(&[n, h, w, backbone])?, inputs.tensor(&[n, h, w, skip])?);
        Ok(Box::new(move || super::freeu(&b, &s, super::FreeU { backbone: 1.1, skip: 0.6 })))
    })
}

/// The filter of maps within maps of these sides, the last one's the weak one.
fn spectral_filter(shape: [usize; 4], padded: [usize; 2]) -> Case {
    let values = json!({ "dims": shape, "padded": padded });
    case("spectral_filter", format!("{shape:?} in {padded:?}"), values, move |inputs| {
        let x = inputs.tensor(&shape)?;
        let pass = super::LowPass { scale: 2.0, floor: 0.6 };
        Ok(Box::new(move || super::spectral_filter(super::SpectralFilter { x: &x, padded, pass, weak: 1 })))
    })
}

/// Self-attention by the weights of other tokens.
fn borrowed_attention(n: usize, l: usize, heads: usize, head_dim: usize) -> Case {
    let name = format!("[{n},{l},{heads},{head_dim}] borrowed weights");
    let values = json!({ "dims": [n, l, heads, head_dim], "borrowed": true });
    case("attention", name, values, move |inputs| {
        let shape = [n, l, 3, heads, head_dim];
        let (qk, v) = (inputs.tensor(&shape)?, inputs.tensor(&shape)?);
        Ok(Box::new(move || super::attention(Attention::Borrowed { qk: &qk, v: &v })))
    })
}

fn avg_pool(shape: [usize; 4]) -> Case {
    case("avg_pool", format!("{shape:?}"), json!({ "dims": shape }), move |inputs| {
        let x = inputs.tensor(&shape)?;
        Ok(Box::new(move || super::avg_pool(&x)))
    })
}

fn cross_attention(n: usize, queries: usize, keys: usize, heads: usize, head_dim: usize) -> Case {
    cross_attention_with([n, queries, keys, heads, head_dim], n)
}

fn cross_attention_with([n, queries, keys, heads, head_dim]: [usize; 5], rows: usize) -> Case {
    let fields = attention_shape([n, queries, keys, heads, head_dim], n / rows.max(1), false, false);
    let shared = if rows == n { String::new() } else { format!(" of {rows}") };
    let name = format!("[{n},{queries},{heads},{head_dim}] x {keys} keys{shared}");
    case("attention", name, fields, move |inputs| {
        let q = inputs.tensor(&[n, queries, heads, head_dim])?;
        let kv = inputs.tensor(&[rows, keys, 2, heads, head_dim])?;
        Ok(Box::new(move || super::attention(Attention::Cross { q: &q, kv: &kv })))
    })
}

/// The case that [`Case::shape`] describes; `None` for ops that no recorded run asks for, and for parts of one.
///
/// # Errors
/// [`Error::Config`]: a field that is missing, no number or no name.
pub fn of_shape(op: &str, shape: &Value) -> Result<Option<Case>> {
    let wrong = |field: &str| Error::config(format!("{op} {shape}"), format!("its {field:?} cannot be read"));
    let number = |field: &str| shape[field].as_u64().map(|value| value as usize).ok_or_else(|| wrong(field));
    let flag = |field: &str| shape[field].as_bool().ok_or_else(|| wrong(field));
    let numbers = |field: &str| -> Result<Option<Vec<usize>>> {
        if shape[field].is_null() {
            return Ok(None);
        }
        let values: Option<Vec<u64>> = serde_json::from_value(shape[field].clone()).ok();
        Ok(Some(values.ok_or_else(|| wrong(field))?.into_iter().map(|value| value as usize).collect()))
    };
    let pair = |field: &str| -> Result<Option<[usize; 2]>> {
        let values = numbers(field)?;
        values.map(|values| values.try_into().map_err(|_| wrong(field))).transpose()
    };
    let activation = || {
        let named = |activation: &&Activation| shape["activation"] == activation_name(**activation).as_str();
        Activation::ALL.iter().find(named).copied().ok_or_else(|| wrong("activation"))
    };
    if !shape["part"].is_null() {
        return Ok(None);
    }
    Ok(Some(match op {
        "linear" => {
            let (activation, size) = (activation()?, [number("m")?, number("n")?, number("k")?]);
            linear_with(size, flag("bias")?, activation, pair("gate")?, flag("residual")?)
        }
        "conv2d" => {
            let (skip, seen) = (number("second_source")?, [number("h")?, number("w")?]);
            let from = numbers("resized_from")?;
            let [h, w] = match &from {
                Some(from) => from[..].try_into().map_err(|_| wrong("resized_from"))?,
                None => seen,
            };
            let padding = numbers("padding")?.ok_or_else(|| wrong("padding"))?;
            let channels = number("c")?.checked_sub(skip).ok_or_else(|| wrong("second_source"))?;
            let (kernel, stride, dilation) = (number("kernel")?, number("stride")?, number("dilation")?);
            if kernel == 0 || stride == 0 || dilation == 0 {
                return Err(wrong(if kernel == 0 { "kernel" } else { "stride" }));
            }
            conv(Conv {
                name: String::new(),
                shape: [number("n")?, h, w, channels],
                skip,
                outputs: number("o")?,
                kernel,
                stride,
                dilation,
                padding: Some(padding[..].try_into().map_err(|_| wrong("padding"))?),
                bias: flag("bias")?,
                norm_groups: if shape["norm_groups"].is_null() { None } else { Some(number("norm_groups")?) },
                modulation: pair("modulation")?,
                activation: activation()?,
                resize_to: from.is_some().then_some(seen),
                row: flag("row")?,
                residual: flag("residual")?,
            })
        }
        "attention" => {
            let [n, queries, heads, head_dim] =
                [number("n")?, number("queries")?, number("heads")?, number("head_dim")?];
            match flag("packed")? {
                true => self_attention(n, queries, heads, head_dim, flag("causal")?),
                false => cross_attention_with([n, queries, number("keys")?, heads, head_dim], number("kv_rows")?),
            }
        }
        "group_norm" => {
            let skip = number("second_source")?;
            let channels = number("c")?.checked_sub(skip).ok_or_else(|| wrong("second_source"))?;
            group_norm_with(
                [number("n")?, number("h")?, number("w")?, channels],
                skip,
                number("groups")?,
                pair("modulation")?,
                activation()?,
            )
        }
        "layer_norm" => {
            let affine = shape["affine"].is_null() || flag("affine")?;
            layer_norm_with(number("rows")?, number("c")?, affine, pair("modulation")?)
        }
        "rms_norm" => rms_norm(number("rows")?, number("c")?),
        "rms_norm_heads" => {
            let dims = numbers("dims")?.and_then(|dims| dims.try_into().ok());
            rms_norm_heads(dims.ok_or_else(|| wrong("dims"))?)
        }
        _ => return Ok(None),
    }))
}

fn activation(shape: [usize; 2]) -> Case {
    case("activation", format!("silu {shape:?}"), json!({ "dims": shape, "activation": "silu" }), move |inputs| {
        let x = inputs.tensor(&shape)?;
        Ok(Box::new(move || super::activation(&x, Activation::Silu)))
    })
}

fn add(shape: [usize; 4]) -> Case {
    case("add", format!("{shape:?}"), json!({ "dims": shape }), move |inputs| {
        let (a, b) = (inputs.tensor(&shape)?, inputs.tensor(&shape)?);
        Ok(Box::new(move || super::add(&a, &b)))
    })
}

/// An image prompt under a mask.
fn add_masked(n: usize, l: usize, c: usize) -> Case {
    case("add_masked", format!("[{n},{l},{c}]"), json!({ "n": n, "l": l, "c": c }), move |inputs| {
        let (a, b) = (inputs.tensor(&[n, l, c])?, inputs.tensor(&[n, l, c])?);
        let mask = inputs.f32(&[l])?;
        Ok(Box::new(move || super::add_masked(&a, &b, &mask, 0.6)))
    })
}

fn embedding(n: usize, l: usize, rows: usize, c: usize) -> Case {
    let fields = json!({ "n": n, "l": l, "rows": rows, "c": c });
    case("embedding", format!("[{n},{l}] of [{rows},{c}]"), fields, move |inputs| {
        let ids: Vec<u32> = (0..n * l).map(|i| (i * 7919 % rows) as u32).collect();
        let ids = Tensor::from_u32(inputs.device, &[n, l], &ids)?;
        let (table, positions) = (inputs.tensor(&[rows, c])?, inputs.tensor(&[l, c])?);
        Ok(Box::new(move || super::embedding(&ids, &table, &positions)))
    })
}

/// Made on the host: no kernel, but part of every run.
fn timestep_embedding(steps: usize) -> Case {
    case("timestep_embedding", format!("[{steps},320]"), json!({ "steps": steps, "dim": 320 }), move |inputs| {
        let timesteps: Vec<f32> = (0..steps).map(|step| (981 * (steps - step) / steps) as f32).collect();
        let embedding = TimestepEmbedding { dim: 320, flip_sin_to_cos: true, freq_shift: 0.0 };
        let (device, dtype) = (inputs.device.clone(), inputs.dtype);
        Ok(Box::new(move || super::timestep_embedding(&timesteps, embedding, &device, dtype)))
    })
}

fn resize_fields([n, h, w, c]: [usize; 4], [to_h, to_w]: [usize; 2], filter: &str) -> Value {
    json!({ "n": n, "h": h, "w": w, "c": c, "to_h": to_h, "to_w": to_w, "upsampler": filter })
}

fn resize(shape: [usize; 4], size: [usize; 2], upsampler: Upsampler) -> Case {
    let fields = resize_fields(shape, size, &format!("{upsampler:?}"));
    case("resize", format!("{upsampler:?} {shape:?} -> {size:?}"), fields, move |inputs| {
        let x = inputs.tensor(&shape)?;
        Ok(Box::new(move || super::resize(&x, size, upsampler, Some((-1.0, 1.0)), None)))
    })
}

fn resize_u8(shape: [usize; 4], size: [usize; 2]) -> Case {
    let fields = resize_fields(shape, size, "Bicubic");
    case("resize_u8", format!("Bicubic {shape:?} -> {size:?}"), fields, move |inputs| {
        let x = inputs.tensor(&shape)?;
        Ok(Box::new(move || super::resize_u8(&x, size, Upsampler::Bicubic)))
    })
}

fn resize_nearest(shape: [usize; 4], size: [usize; 2]) -> Case {
    let fields = resize_fields(shape, size, "nearest");
    case("resize_nearest", format!("{shape:?} -> {size:?}"), fields, move |inputs| {
        let x = inputs.tensor(&shape)?;
        Ok(Box::new(move || super::resize_nearest(&x, size)))
    })
}

/// One step of a table.
pub fn step_table(device: &Device) -> Result<StepTable> {
    let coefficients = StepCoefficients {
        x0_from_x: 1.1,
        x0_from_e: -0.5,
        clip: None,
        next_from_x: 0.0,
        next_from_e: 0.4,
        next_from_x0: 0.9,
        ..StepCoefficients::default()
    };
    StepTable::new(device, vec![StepRow { input_scale: 0.7, coefficients }])
}

fn sampler_step([n, h, w, c]: [usize; 4]) -> Case {
    let fields = json!({ "n": n, "h": h, "w": w, "c": c, "guidance": 7.0 });
    case("sampler_step", format!("guided [{n},{h},{w},{c}]"), fields, move |inputs| {
        let (x, output) = (inputs.f32(&[n, h, w, c])?, inputs.tensor(&[2 * n, h, w, c])?);
        let (steps, guidance) = (step_table(inputs.device)?, Guidance::uniform(inputs.device, n, 7.0)?);
        let state = RefCell::new(SampleState::new(x)?);
        Ok(Box::new(move || {
            let mut state = state.borrow_mut();
            super::sampler_step(&mut state, &output, Some(&guidance), &steps, None)?;
            Ok(state.x0().clone())
        }))
    })
}

fn scale_input(shape: [usize; 4]) -> Case {
    case("scale_input", format!("twice {shape:?}"), json!({ "dims": shape, "repeats": 2 }), move |inputs| {
        let (x, steps, dtype) = (inputs.f32(&shape)?, step_table(inputs.device)?, inputs.dtype);
        Ok(Box::new(move || super::scale_input(&x, &steps, dtype, 2)))
    })
}

fn scale_cast(shape: [usize; 4]) -> Case {
    case("scale_cast", format!("f32 {shape:?}"), json!({ "dims": shape, "repeats": 1 }), move |inputs| {
        let (x, dtype) = (inputs.f32(&shape)?, inputs.dtype);
        Ok(Box::new(move || super::scale_cast(&x, 5.5, 0.0, dtype, 1)))
    })
}

fn add_noise(shape: [usize; 4]) -> Case {
    case("add_noise", format!("f32 {shape:?}"), json!({ "dims": shape }), move |inputs| {
        let (x, noise) = (inputs.f32(&shape)?, inputs.f32(&shape)?);
        Ok(Box::new(move || super::add_noise(&x, &noise, 0.8, 0.6)))
    })
}

/// Half of it is kept.
fn repaint(shape: [usize; 4]) -> Case {
    case("repaint", format!("half of {shape:?}"), json!({ "dims": shape }), move |inputs| {
        let [_, h, w, _] = shape;
        let [x, known, noise] = [inputs.f32(&shape)?, inputs.f32(&shape)?, inputs.f32(&shape)?];
        let mask: Vec<f32> = (0..h * w).map(|pixel| if pixel % w < w / 2 { 1.0 } else { 0.0 }).collect();
        let mask = Tensor::from_f32(inputs.device, &[1, h, w, 1], DType::F32, &mask)?;
        let levels = Tensor::from_f32(inputs.device, &[1, 2], DType::F32, &[0.8, 0.6])?;
        let (step, x) = (StepIndex::one(inputs.device, 0)?, RefCell::new(x));
        Ok(Box::new(move || {
            let mut x = x.borrow_mut();
            if !x.is_unshared() {
                *x = x.duplicate()?; // somebody keeps the result before
            }
            let args = Repaint { mask: &mask, known: &known, noise: &noise, levels: &levels, step: &step };
            super::repaint(&mut x, args)?;
            Ok(x.clone())
        }))
    })
}

fn diagonal_gaussian(shape: [usize; 4]) -> Case {
    case("diagonal_gaussian", format!("{shape:?}"), json!({ "dims": shape, "noise": true }), move |inputs| {
        let [n, h, w, c] = shape;
        let (moments, noise) = (inputs.tensor(&shape)?, inputs.f32(&[n, h, w, c / 2])?);
        Ok(Box::new(move || super::diagonal_gaussian(&moments, Some(&noise))))
    })
}

fn clamp(shape: [usize; 4]) -> Case {
    case("clamp", format!("{shape:?}"), json!({ "dims": shape }), move |inputs| {
        let x = inputs.tensor(&shape)?;
        Ok(Box::new(move || super::clamp(&x, -0.5, 0.5)))
    })
}

/// On a card with the wait for the counter.
fn count_non_finite(shape: [usize; 4]) -> Case {
    case("count_non_finite", format!("{shape:?}"), json!({ "dims": shape }), move |inputs| {
        let x = inputs.tensor(&shape)?;
        Ok(Box::new(move || {
            super::count_non_finite(&x)?;
            Ok(x.clone())
        }))
    })
}

/// Patches of one map.
#[derive(Clone)]
struct PatchesOf {
    layout: PatchLayout,
    origins: Vec<[i32; 2]>,
}

/// The map in patches of `size`, `step` cells from one to the next.
fn patches_over(map: [usize; 2], size: [usize; 2], step: usize) -> PatchesOf {
    let along = |axis: usize| (0..=map[axis] - size[axis]).step_by(step).map(|at| at as i32);
    let origins = along(0).flat_map(|row| along(1).map(move |column| [row, column])).collect();
    PatchesOf { layout: PatchLayout { map, size, stride: 1, wraps: false }, origins }
}

/// Every cell of a square of `stride` cells begins a strided sample.
fn strided(stride: i32) -> Vec<[i32; 2]> {
    (0..stride * stride).map(|i| [i / stride, i % stride]).collect()
}

impl PatchesOf {
    fn name(&self) -> String {
        let PatchLayout { map, size, stride, .. } = self.layout;
        let strided = if stride > 1 { format!(" by {stride}") } else { String::new() };
        format!("{} of {size:?}{strided} on {map:?}", self.origins.len())
    }

    fn fields(&self) -> Value {
        let PatchLayout { map, size, stride, wraps } = self.layout;
        json!({ "map": map, "size": size, "stride": stride, "wraps": wraps, "patches": self.origins.len(), "c": 4 })
    }

    fn on(&self, device: &Device) -> Result<Patches> {
        let mut patches = Patches::new(device, 1, self.origins.len(), self.layout)?;
        patches.place(&self.origins)?;
        Ok(patches)
    }

    /// Of latents, so many images in all.
    fn shape(&self, images: usize) -> [usize; 4] {
        let [h, w] = self.layout.size;
        [images * self.origins.len(), h, w, 4]
    }

    fn map(&self) -> [usize; 4] {
        let [h, w] = self.layout.map;
        [1, h, w, 4]
    }
}

fn gather_patches(of: PatchesOf) -> Case {
    case("gather_patches", format!("twice {}", of.name()), of.fields(), move |inputs| {
        let (x, patches, steps) = (inputs.f32(&of.map())?, of.on(inputs.device)?, step_table(inputs.device)?);
        let dtype = inputs.dtype;
        Ok(Box::new(move || super::gather_patches(&x, &patches, None, &steps, dtype, 2)))
    })
}

fn step_patches(of: PatchesOf) -> Case {
    case("step_patches", format!("guided {}", of.name()), of.fields(), move |inputs| {
        let (x, patches, steps) = (inputs.f32(&of.map())?, of.on(inputs.device)?, step_table(inputs.device)?);
        let output = inputs.tensor(&of.shape(2))?;
        let guidance = Guidance::uniform(inputs.device, of.origins.len(), 7.0)?;
        let sums = RefCell::new(Tensor::uninit(inputs.device, &of.map(), DType::F32)?);
        Ok(Box::new(move || {
            let mut sums = sums.borrow_mut();
            if !sums.is_unshared() {
                *sums = Tensor::uninit(sums.device(), sums.shape(), DType::F32)?; // somebody keeps the result before
            }
            super::step_patches(&x, &patches, &output, Some(&guidance), &steps, &mut sums)?;
            Ok(sums.clone())
        }))
    })
}

fn merge_patches(of: PatchesOf) -> Case {
    case("merge_patches", of.name(), of.fields(), move |inputs| {
        let (values, patches) = (inputs.f32(&of.shape(1))?, of.on(inputs.device)?);
        let weights = |length: usize| -> Result<Tensor> {
            let values: Vec<f32> = (0..length).map(|i| 1.0 + i.min(length - 1 - i) as f32).collect();
            Tensor::from_f32(inputs.device, &[length], DType::F32, &values)
        };
        let [rows, columns] = of.layout.size.map(weights);
        let (rows, columns) = (rows?, columns?);
        Ok(Box::new(move || super::merge_patches(&values, &patches, &rows, &columns)))
    })
}

fn exchange_low_band(shape: [usize; 4]) -> Case {
    case("exchange_low_band", format!("f32 {shape:?}"), json!({ "dims": shape }), move |inputs| {
        let (x, guide) = (inputs.f32(&shape)?, inputs.f32(&shape)?);
        Ok(Box::new(move || super::exchange_low_band(&x, &guide)))
    })
}

fn sharpen(shape: [usize; 4]) -> Case {
    case("sharpen", format!("f32 {shape:?}"), json!({ "dims": shape, "sigma": 1.0 }), move |inputs| {
        let x = inputs.f32(&shape)?;
        Ok(Box::new(move || super::sharpen(&x, 1.0)))
    })
}

fn pool_latents(shape: [usize; 4], scale: usize) -> Case {
    case("pool_latents", format!("f32 {shape:?} by {scale}"), json!({ "dims": shape, "scale": scale }), move |inputs| {
        let x = inputs.f32(&shape)?;
        Ok(Box::new(move || super::pool_latents(&x, scale)))
    })
}

fn upsample_guidance(shape: [usize; 4], scale: usize) -> Case {
    let fields = json!({ "dims": shape, "scale": scale, "repeats": 2 });
    case("upsample_guidance", format!("guided {shape:?} by {scale}"), fields, move |inputs| {
        let [n, h, w, c] = shape;
        let (output, low) = (inputs.tensor(&[2 * n, h, w, c])?, inputs.tensor(&[2 * n, h / scale, w / scale, c])?);
        let pooled = inputs.f32(&[n, h / scale, w / scale, c])?;
        let table = Tensor::from_f32(inputs.device, &[1, 3], DType::F32, &[0.6, 0.3, 0.5])?;
        let step = StepIndex::one(inputs.device, 0)?;
        Ok(Box::new(move || {
            let factors = StepRows { table: &table, step: &step, rows: 1 };
            super::upsample_guidance(&output, &low, &pooled, factors)
        }))
    })
}

fn latent_moments(shape: [usize; 4]) -> Case {
    case("latent_moments", format!("f32 {shape:?}"), json!({ "dims": shape }), move |inputs| {
        let x = inputs.f32(&shape)?;
        // Away from a mean of 0, whose relative error says nothing.
        let x = super::scale_cast(&x, 1.0, 2.0, DType::F32, 1)?;
        Ok(Box::new(move || super::latent_moments(&x, 0)))
    })
}

fn standardise_latents(shape: [usize; 4]) -> Case {
    case("standardise_latents", format!("f32 {shape:?}"), json!({ "dims": shape }), move |inputs| {
        let x = inputs.f32(&shape)?;
        let moments =
            |values: [f32; 2]| Tensor::from_f32(inputs.device, &[shape[0], 2], DType::F32, &values.repeat(shape[0]));
        let (from, to) = (moments([0.25, 0.6])?, moments([-0.5, 1.1])?);
        Ok(Box::new(move || super::standardise_latents(&x, &from, &to)))
    })
}
