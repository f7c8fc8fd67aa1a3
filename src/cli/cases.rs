//! The cases of `megafuse check`: every op, in the variants that its kernels have, with inputs made from seeds, and how
//! far from the cpu's result a card's may be.

use megafuse::ops::cases::{random, step_table};
use megafuse::ops::{
    self, Activation, Attention, AttentionOptions, Conv2d, ConvNorm, FreeU, GroupNorm, Guidance, LayerNorm, Linear,
    LowPass, Modulation, PatchLayout, Patches, RelayNoise, Repaint, RmsNorm, SampleState, Source, SpectralFilter,
    StepColumns, StepIndex, StepRows, Upsampler, Variant, WindowShift, Windows,
};
use megafuse::{DType, Device, Result, Tensor};

/// Makes a case's inputs: the same values on every device.
pub struct Inputs<'a> {
    device: &'a Device,
    /// What the values are rounded to.
    stored: DType,
    /// What the tensors are then, so that f32 computes with the rounded values.
    dtype: DType,
    /// For the result to compare with, all of it in f32.
    reference: bool,
    seed: u64,
}

impl<'a> Inputs<'a> {
    /// As the device gets them.
    pub fn new(device: &'a Device, dtype: DType) -> Inputs<'a> {
        Inputs { device, stored: dtype, dtype, reference: false, seed: 0 }
    }

    /// The same values in f32, for the result to compare with.
    pub fn in_f32(self) -> Inputs<'a> {
        Inputs { dtype: DType::F32, reference: true, ..self }
    }

    /// Uniform in [-size, size).
    fn uniform(&mut self, shape: &[usize], size: f32) -> Result<Tensor> {
        self.shifted(shape, 0.0, size)
    }

    /// Uniform in [middle - size, middle + size).
    fn shifted(&mut self, shape: &[usize], middle: f32, size: f32) -> Result<Tensor> {
        self.seed += 1;
        let values: Vec<f32> =
            random(shape.iter().product(), self.seed).iter().map(|value| middle + size * value).collect();
        self.values(shape, &values)
    }

    fn values(&self, shape: &[usize], values: &[f32]) -> Result<Tensor> {
        // The cpu that the case runs on, where it does: another would be another device.
        let host = if let Device::Cpu(_) = self.device { self.device.clone() } else { Device::cpu() };
        let rounded = Tensor::from_f32(&host, shape, self.stored, values)?;
        rounded.to_dtype(self.dtype)?.to_device(self.device)
    }

    /// For [`ops::with_variants`]: this one of the op's, where the device has it for the dtype, else the op's choice.
    fn kernel(&self, op: &str, name: &str) -> String {
        let there = ops::variants_on(op, self.device, self.dtype).iter().any(|variant| variant.name == name);
        if there { format!("{op}={name}") } else { String::new() }
    }

    /// f32 whatever the dtype: samples and noise.
    fn f32(&mut self, shape: &[usize]) -> Result<Tensor> {
        self.seed += 1;
        Tensor::from_f32(self.device, shape, DType::F32, &random(shape.iter().product(), self.seed))
    }
}

/// How far from the exact result a correct kernel may be, beside half an ulp of its store. The inputs are bounded, so
/// these are bounds too.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// Size of the terms that a value is computed from: f32 arithmetic errs by a few f32 ulps of that.
    pub terms: f64,
    /// Size of what is rounded to the dtype on the way: half an ulp of the dtype of that.
    pub intermediate: f64,
    /// Anything else: levels of an 8-bit picture.
    pub absolute: f64,
}

type Run = Box<dyn Fn(&mut Inputs) -> Result<Vec<Tensor>>>;

pub struct Case {
    pub op: &'static str,
    pub name: String,
    pub allowed: Allowed,
    /// Tensors and results are f32 only.
    pub only_f32: bool,
    /// All results.
    pub run: Run,
}

fn case(
    op: &'static str,
    name: impl Into<String>,
    terms: f64,
    run: impl Fn(&mut Inputs) -> Result<Vec<Tensor>> + 'static,
) -> Case {
    let allowed = Allowed { terms, ..Allowed::default() };
    Case { op, name: name.into(), allowed, only_f32: false, run: Box::new(run) }
}

impl Case {
    fn intermediate(mut self, size: f64) -> Case {
        self.allowed.intermediate = size;
        self
    }

    fn absolute(mut self, size: f64) -> Case {
        self.allowed.absolute = size;
        self
    }

    fn only_f32(self) -> Case {
        Case { only_f32: true, ..self }
    }
}

pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    linears(&mut cases);
    convolutions(&mut cases);
    norms(&mut cases);
    attentions(&mut cases);
    pointwise(&mut cases);
    resizes(&mut cases);
    steps(&mut cases);
    methods(&mut cases);
    cases
}

fn linears(cases: &mut Vec<Case>) {
    // Widths of whole 16-byte chunks and others; inputs up to 2, weights up to 1: a term is 1/2 on average.
    for (m, k, n) in [(97, 320, 136), (3, 67, 5)] {
        for activation in Activation::ALL {
            let name = format!("[{m},{k}] -> {n} {activation:?}").to_lowercase();
            // GEGLU: each factor's error times the other factor, which is within a few deviations of 0.67 sqrt(k).
            let factor = if activation.is_gated() { 4.0 * (k as f64).sqrt() } else { 1.0 };
            cases.push(case("linear", name, factor * k as f64 / 2.0, move |inputs| {
                linear(inputs, [m, k, n], activation)
            }));
        }
    }
    for (m, k, n) in [(67, 320, 136), (3, 67, 5)] {
        cases.push(case("linear", format!("[3,{m},{k}] -> {n} gate"), k as f64 / 2.0, move |inputs| {
            gated_linear(inputs, [m, k, n])
        }));
    }
    for Variant { name, .. } in ops::variants("linear") {
        cases.push(case("linear", format!("[150,192] -> 280 kernel {name}"), 96.0, move |inputs| {
            let kernel = inputs.kernel("linear", name);
            ops::with_variants(&kernel, || linear(inputs, [150, 192, 280], Activation::None))
        }));
    }
}

fn linear(inputs: &mut Inputs, [m, k, n]: [usize; 3], activation: Activation) -> Result<Vec<Tensor>> {
    let rows = if activation.is_gated() { 2 * n } else { n };
    let (x, weight, bias) =
        (inputs.uniform(&[m, k], 2.0)?, inputs.uniform(&[rows, k], 1.0)?, inputs.uniform(&[rows], 2.0)?);
    let residual = inputs.uniform(&[m, n], 4.0)?;
    let args = Linear { bias: Some(&bias), activation, ..Linear::new(&x, &weight) };
    Ok(vec![ops::linear(args)?, ops::linear(Linear { residual: Some(&residual), ..args })?])
}

/// Of three images, the rows of a table's second step.
fn gated_linear(inputs: &mut Inputs, [m, k, n]: [usize; 3]) -> Result<Vec<Tensor>> {
    let (x, weight, bias) =
        (inputs.uniform(&[3, m, k], 2.0)?, inputs.uniform(&[n, k], 1.0)?, inputs.uniform(&[n], 2.0)?);
    let (residual, table) = (inputs.uniform(&[3, m, n], 4.0)?, inputs.uniform(&[6, n + 8], 1.0)?);
    let step = StepIndex::one(x.device(), 1)?;
    let gate = Some(StepColumns { rows: StepRows { table: &table, step: &step, rows: 3 }, first: 8 });
    let args = Linear { bias: Some(&bias), gate, residual: Some(&residual), ..Linear::new(&x, &weight) };
    Ok(vec![ops::linear(args)?])
}

/// A convolution of one image or two of 9x11 pixels, with a bias.
#[derive(Clone, Copy)]
struct Conv {
    channels: usize,
    /// Channels of the second source.
    skip: usize,
    outputs: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    norm: Option<Norm>,
    resize_to: Option<[usize; 2]>,
    /// A row of the time embedding, a residual and a scale.
    fused: bool,
    /// A kernel of conv2d's by name.
    kernel_name: Option<&'static str>,
    splits: Option<usize>,
}

/// Modulated by the second step's row of each image, or not, and what follows.
#[derive(Clone, Copy)]
struct Norm {
    modulated: bool,
    activation: Activation,
}

impl Norm {
    const PLAIN: Norm = Norm { modulated: false, activation: Activation::None };
    const SILU: Norm = Norm { activation: Activation::Silu, ..Norm::PLAIN };
    const GELU: Norm = Norm { activation: Activation::Gelu, ..Norm::PLAIN };
    const MODULATED: Norm = Norm { modulated: true, ..Norm::GELU };
}

const CONV: Conv = Conv {
    channels: 64,
    skip: 0,
    outputs: 48,
    kernel: 3,
    stride: 1,
    dilation: 1,
    norm: None,
    resize_to: None,
    fused: false,
    kernel_name: None,
    splits: None,
};

fn convolutions(cases: &mut Vec<Case>) {
    let mut push = |name: String, conv: Conv| {
        let terms = (conv.kernel * conv.kernel * (conv.channels + conv.skip)) as f64;
        // A card rounds the normalised input, and Hopper's kernels sums of the weights to enlarge by two: independent errors of
        // up to half an ulp of terms of 1/2 on average, 1.7 at most; six deviations of their sum.
        let intermediate = if conv.norm.is_some() || conv.resize_to.is_some() { 6.0 * terms.sqrt() } else { 0.0 };
        let run = move |inputs: &mut Inputs| {
            let kernel = conv.kernel_name.map(|name| inputs.kernel("conv2d", name)).unwrap_or_default();
            let splits = conv.splits.map(|splits| format!(",conv2d.splits={splits}")).unwrap_or_default();
            ops::with_variants(&(kernel + &splits), || conv2d(inputs, conv))
        };
        cases.push(case("conv2d", name, terms, run).intermediate(intermediate));
    };
    push("3x3".into(), CONV);
    push("3x3, 4 channels".into(), Conv { channels: 4, ..CONV });
    push("3x3, 3 outputs".into(), Conv { outputs: 3, ..CONV });
    push("1x1".into(), Conv { kernel: 1, ..CONV });
    push("1x1, two sources".into(), Conv { kernel: 1, skip: 32, ..CONV });
    push("stride 2".into(), Conv { stride: 2, ..CONV });
    push("dilation 2".into(), Conv { dilation: 2, ..CONV });
    push("two sources, norm silu".into(), Conv { skip: 32, norm: Some(Norm::SILU), ..CONV });
    push("1x1, norm".into(), Conv { kernel: 1, norm: Some(Norm::PLAIN), ..CONV });
    push("norm silu".into(), Conv { norm: Some(Norm::SILU), ..CONV });
    push("norm gelu".into(), Conv { norm: Some(Norm::GELU), ..CONV });
    push("two sources, norm modulated gelu".into(), Conv { skip: 32, norm: Some(Norm::MODULATED), ..CONV });
    push("resized to 18x22".into(), Conv { resize_to: Some([18, 22]), ..CONV });
    push("row, residual, scale".into(), Conv { fused: true, ..CONV });
    push("in 3 parts, row, residual, scale".into(), Conv { fused: true, splits: Some(3), ..CONV });
    for Variant { name, .. } in ops::variants("conv2d") {
        // What the kernel is for.
        let dilation = if name.contains("halo2") { 2 } else { 1 };
        let resize_to = name.contains("doubled").then_some([18, 22]);
        push(format!("kernel {name}"), Conv { outputs: 136, dilation, resize_to, kernel_name: Some(name), ..CONV });
    }
}

fn conv2d(inputs: &mut Inputs, conv: Conv) -> Result<Vec<Tensor>> {
    const N: usize = 2;
    let [h, w] = [9, 11];
    let channels = conv.channels + conv.skip;
    let (a, b) = (inputs.uniform(&[N, h, w, conv.channels], 1.7)?, inputs.uniform(&[N, h, w, conv.skip], 1.7)?);
    let weight = inputs.uniform(&[conv.outputs, conv.kernel, conv.kernel, channels], 1.0)?;
    let bias = inputs.uniform(&[conv.outputs], 2.0)?;
    let (gamma, beta) = (inputs.shifted(&[channels], 1.0, 0.2)?, inputs.uniform(&[channels], 0.2)?);
    let rows = inputs.uniform(&[2 * N, conv.outputs], 2.0)?;
    let step = StepIndex::one(inputs.device, 1)?;
    let modulations = inputs.uniform(&[2 * N, 2 * channels], 0.3)?;
    let by_image =
        Modulation { rows: StepRows { table: &modulations, step: &step, rows: N }, scale: 0, shift: channels };
    let norm = conv.norm.map(|Norm { modulated, activation }| {
        let modulation = modulated.then_some(by_image);
        ConvNorm { gamma: &gamma, beta: &beta, groups: 8, eps: 1e-5, modulation, activation }
    });
    let reach = conv.dilation * (conv.kernel / 2);
    let x = if conv.skip > 0 { Source::Two(&a, &b) } else { Source::One(&a) };
    let args = Conv2d {
        bias: Some(&bias),
        stride: conv.stride,
        dilation: conv.dilation,
        padding: [reach; 4],
        norm,
        resize_to: conv.resize_to,
        ..Conv2d::new(x, &weight)
    };
    if !conv.fused {
        return Ok(vec![ops::conv2d(args)?]);
    }
    let residual = inputs.uniform(&[N, h, w, conv.outputs], 4.0)?;
    let row = Some(StepRows { table: &rows, step: &step, rows: N });
    Ok(vec![ops::conv2d(Conv2d { row, residual: Some(&residual), scale: 0.7, negative_slope: 0.2, ..args })?])
}

fn norms(cases: &mut Vec<Case>) {
    // Values up to 1.5 of deviation 0.6, means of half that: (2 + 1) / 0.6 of each, gamma up to 1.5, beta up to 1.
    const TERMS: f64 = 10.0;
    for (name, [n, h, w, c], skip, norm) in [
        ("[2,9,11,64]", [2, 9, 11, 64], 0, Norm::PLAIN),
        ("[2,9,11,64] silu", [2, 9, 11, 64], 0, Norm::SILU),
        ("[2,9,11,64] modulated gelu", [2, 9, 11, 64], 0, Norm::MODULATED),
        ("[2,9,11,40+24] silu", [2, 9, 11, 40], 24, Norm::SILU),
        ("[2,9,11,40+24] modulated gelu", [2, 9, 11, 40], 24, Norm::MODULATED),
        ("[1,48,48,64] silu", [1, 48, 48, 64], 0, Norm::SILU),
        ("[1,48,48,64] modulated gelu", [1, 48, 48, 64], 0, Norm::MODULATED),
    ] {
        cases.push(case("group_norm", name, TERMS, move |inputs| {
            let (a, b) = (inputs.shifted(&[n, h, w, c], 0.5, 1.0)?, inputs.shifted(&[n, h, w, skip], 0.5, 1.0)?);
            let (gamma, beta) = (inputs.shifted(&[c + skip], 1.0, 0.5)?, inputs.uniform(&[c + skip], 1.0)?);
            let x = if skip > 0 { Source::Two(&a, &b) } else { Source::One(&a) };
            let table = inputs.uniform(&[2 * n, 2 * (c + skip)], 0.5)?;
            let step = StepIndex::one(a.device(), 1)?;
            let rows = StepRows { table: &table, step: &step, rows: n };
            let modulation = norm.modulated.then_some(Modulation { rows, scale: 0, shift: c + skip });
            let (gamma, beta, activation) = (&gamma, &beta, norm.activation);
            Ok(vec![ops::group_norm(GroupNorm { x, gamma, beta, groups: 8, eps: 1e-5, modulation, activation })?])
        }));
    }
    for (rows, c) in [(37, 320), (5, 1280), (3, 67)] {
        cases.push(case("layer_norm", format!("[{rows},{c}]"), TERMS, move |inputs| {
            let x = inputs.shifted(&[rows, c], 0.5, 1.0)?;
            let (gamma, beta) = (inputs.shifted(&[c], 1.0, 0.5)?, inputs.uniform(&[c], 1.0)?);
            let affine = LayerNorm { gamma: Some(&gamma), beta: Some(&beta), ..LayerNorm::new(&x, 1e-5) };
            let table = inputs.uniform(&[2, 2 * c], 1.0)?;
            let step = StepIndex::one(x.device(), 1)?;
            let rows = StepRows { table: &table, step: &step, rows: 1 };
            let modulation = Some(Modulation { rows, scale: 0, shift: c });
            let modulated = LayerNorm { modulation, ..LayerNorm::new(&x, 1e-6) };
            Ok(vec![ops::layer_norm(affine)?, ops::layer_norm(modulated)?])
        }));
    }
    // A warp a row, a block a row; by vectors and by elements.
    for (rows, c) in [(37, 64), (9, 67), (5, 4096), (3, 1100)] {
        cases.push(case("rms_norm", format!("[{rows},{c}]"), TERMS, move |inputs| {
            let (x, gamma) = (inputs.shifted(&[rows, c], 0.5, 1.0)?, inputs.shifted(&[c], 1.0, 0.5)?);
            Ok(vec![ops::rms_norm(RmsNorm { x: &x, gamma: &gamma, eps: 1e-6 })?])
        }));
    }
    for (parts, head_dim) in [(3, 64), (2, 160), (3, 13)] {
        cases.push(case("rms_norm_heads", format!("[2,19,{parts},3,{head_dim}]"), TERMS, move |inputs| {
            let mut x = inputs.shifted(&[2, 19, parts, 3, head_dim], 0.5, 1.0)?;
            let gammas = [inputs.shifted(&[head_dim], 1.0, 0.5)?, inputs.shifted(&[head_dim], 1.0, 0.5)?];
            let gammas: Vec<&Tensor> = gammas.iter().take(parts - 1).collect();
            ops::rms_norm_heads(&mut x, &gammas, 1e-6)?;
            Ok(vec![x])
        }));
    }
}

fn attentions(cases: &mut Vec<Case>) {
    // Values up to 2, so every weighted mean of them and its parts too. Scores' terms: head_dim of 4/4 on average, over
    // sqrt(head_dim); their errors move the weights by as much, relatively. The weights are rounded to the dtype.
    const SIZE: f32 = 2.0;
    let allowed = |head_dim: usize| 2.0 * (1.0 + (head_dim as f64).sqrt());
    for (l, heads, head_dim, causal) in [
        (77, 2, 40, false),
        (130, 2, 64, false),
        (77, 3, 64, true),
        (65, 2, 80, false),
        (70, 1, 160, false),
        (45, 1, 512, false),
        (33, 2, 20, true),
    ] {
        let name = format!("[2,{l},3,{heads},{head_dim}]{}", if causal { " causal" } else { "" });
        let run = move |inputs: &mut Inputs| {
            let qkv = inputs.uniform(&[2, l, 3, heads, head_dim], SIZE)?;
            Ok(vec![ops::attention(Attention::Packed { qkv: &qkv, causal })?])
        };
        cases.push(case("attention", name, allowed(head_dim), run).intermediate(f64::from(SIZE)));
    }
    for (queries, keys, heads, head_dim) in
        [(64, 77, 2, 40), (50, 77, 2, 64), (64, 77, 2, 80), (33, 77, 1, 160), (129, 65, 64, 40)]
    {
        let name = format!("[1,{queries},{heads},{head_dim}] x {keys} keys");
        let run = move |inputs: &mut Inputs| {
            let q = inputs.uniform(&[1, queries, heads, head_dim], SIZE)?;
            let kv = inputs.uniform(&[1, keys, 2, heads, head_dim], SIZE)?;
            Ok(vec![ops::attention(Attention::Cross { q: &q, kv: &kv })?])
        };
        cases.push(case("attention", name, allowed(head_dim), run).intermediate(f64::from(SIZE)));
    }
    for (map, window, unit, head_dim) in
        [([16, 32], [8, 16], [8, 8], 64), ([16, 16], [8, 8], [8, 8], 40), ([6, 10], [3, 5], [1, 2], 24)]
    {
        let [h, w]: [usize; 2] = map;
        let name = format!("[2,{},3,1,{head_dim}] in windows of {}x{}", h * w, window[0], window[1]);
        let run = move |inputs: &mut Inputs| {
            let qkv = inputs.uniform(&[2, h * w, 3, 1, head_dim], SIZE)?;
            let factors = Tensor::from_u32(inputs.device, &[1, 2, 2], &[0, 1, 0, 3])?;
            let step = StepIndex::one(inputs.device, 0)?;
            let shift = Some(WindowShift { factors: &factors, step: &step, column: 1, unit });
            let options = AttentionOptions {
                windows: Some(Windows { map, window, keys: None, shift }),
                ..AttentionOptions::default()
            };
            Ok(vec![ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options)?])
        };
        cases.push(case("attention", name, allowed(head_dim), run).intermediate(f64::from(SIZE)));
    }
    for (map, window, keys, head_dim) in [([16, 23], [5, 8], [10, 17], 64), ([9, 7], [4, 4], [7, 8], 24)] {
        let [h, w]: [usize; 2] = map;
        let boxes = format!("{}x{} with keys of {}x{}", window[0], window[1], keys[0], keys[1]);
        let run = move |inputs: &mut Inputs| {
            let qkv = inputs.uniform(&[2, h * w, 3, 1, head_dim], SIZE)?;
            let windows = Some(Windows { map, window, keys: Some(keys), shift: None });
            let options = AttentionOptions { windows, ..AttentionOptions::default() };
            Ok(vec![ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options)?])
        };
        let name = format!("[2,{},3,1,{head_dim}] in windows of {boxes}", h * w);
        cases.push(case("attention", name, allowed(head_dim), run).intermediate(f64::from(SIZE)));
    }
}

fn pointwise(cases: &mut Vec<Case>) {
    for activation in Activation::ALL.into_iter().filter(|activation| !activation.is_gated()) {
        cases.push(case("activation", format!("{activation:?} [3,2731]").to_lowercase(), 4.0, move |inputs| {
            Ok(vec![ops::activation(&inputs.uniform(&[3, 2731], 6.0)?, activation)?])
        }));
    }
    cases.push(case("add", "[3,2731]", 4.0, |inputs| {
        Ok(vec![ops::add(&inputs.uniform(&[3, 2731], 2.0)?, &inputs.uniform(&[3, 2731], 2.0)?)?])
    }));
    for (patch, c) in [(2, 16), (3, 5)] {
        cases.push(case("unpatchify", format!("[2,5*7,{patch}*{patch}*{c}]"), 0.0, move |inputs| {
            Ok(vec![ops::unpatchify(&inputs.uniform(&[2, 5 * 7, patch * patch * c], 2.0)?, [5, 7], patch)?])
        }));
    }
    cases.push(case("add_masked", "[3,67,2,24]", 4.0, |inputs| {
        let [a, b] = [inputs.uniform(&[3, 67, 2, 24], 2.0)?, inputs.uniform(&[3, 67, 2, 24], 2.0)?];
        Ok(vec![ops::add_masked(&a, &b, &inputs.f32(&[67])?, 0.5)?])
    }));
    cases.push(case("clamp", "[3,2731]", 0.0, |inputs| {
        Ok(vec![ops::clamp(&inputs.uniform(&[3, 2731], 2.0)?, -0.5, 1.25)?])
    }));
    cases.push(case("scale_cast", "[2,2731] to every dtype, twice", 6.0, |inputs| {
        let x = inputs.uniform(&[2, 2731], 2.0)?;
        DType::FLOATS.into_iter().map(|dtype| ops::scale_cast(&x, 2.5, 1.0, inputs.result(dtype), 2)).collect()
    }));
    cases.push(case("embedding", "[2,77] of [999,64]", 2.0, |inputs| {
        let ids: Vec<u32> = (0..154).map(|i| i * 7919 % 999).collect();
        let ids = Tensor::from_u32(inputs.device, &[2, 77], &ids)?;
        Ok(vec![ops::embedding(&ids, &inputs.uniform(&[999, 64], 1.0)?, &inputs.uniform(&[80, 64], 1.0)?)?])
    }));
    cases.push(case("count_non_finite", "3 of [8193]", 0.0, |inputs| {
        let mut values = random(8193, 1);
        (values[5], values[4096], values[8192]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let count = ops::count_non_finite(&inputs.values(&[8193], &values)?)?;
        Ok(vec![Tensor::from_f32(inputs.device, &[1], DType::F32, &[count as f32])?])
    }));
}

impl Inputs<'_> {
    /// The dtype of a result that is to be `dtype` on the card.
    fn result(&self, dtype: DType) -> DType {
        if self.reference { DType::F32 } else { dtype }
    }
}

const UPSAMPLERS: [Upsampler; 5] = [
    Upsampler::Bilinear,
    Upsampler::Bicubic,
    Upsampler::BicubicTorch,
    Upsampler::BicubicGaussian,
    Upsampler::BicubicEdge,
];

fn resizes(cases: &mut Vec<Case>) {
    const SHAPE: [usize; 4] = [2, 13, 17, 3];
    for upsampler in UPSAMPLERS {
        // Absolute weights of a cubic are below 1.6 a direction, of the edge filter 9 in all.
        let terms = if upsampler == Upsampler::BicubicEdge { 24.0 } else { 3.0 };
        for (what, size) in [("larger", [29, 34]), ("smaller", [7, 9])] {
            let name = format!("{upsampler:?} {what}").to_lowercase();
            cases.push(case("resize", name.clone(), terms, move |inputs| {
                let x = inputs.uniform(&SHAPE, 1.0)?;
                let noise = inputs.f32(&[SHAPE[0], size[0], size[1], SHAPE[3]])?;
                let relay = RelayNoise { noise: &noise, signal: 0.8, sigma: 0.6 };
                let clamp = Some((-0.9, 0.9));
                Ok(vec![
                    ops::resize(&x, size, upsampler, clamp, None)?,
                    ops::resize(&x, size, upsampler, clamp, Some(relay))?,
                ])
            }));
            // Without integer weights a sum next to a half may round to the other level.
            let float = matches!(upsampler, Upsampler::BicubicTorch | Upsampler::BicubicGaussian);
            let level = if float { 2.0 / 255.0 } else { 0.0 };
            let run = move |inputs: &mut Inputs| {
                let x = inputs.uniform(&SHAPE, 1.0)?;
                Ok(vec![ops::resize_u8(&x, size, upsampler)?])
            };
            cases.push(case("resize_u8", name, 2.0, run).absolute(level));
        }
    }
    cases.push(case("resize_nearest", "[2,13,17,3] to [29,34]", 0.0, |inputs| {
        Ok(vec![ops::resize_nearest(&inputs.uniform(&SHAPE, 1.0)?, [29, 34])?])
    }));
    // Means of means of two values up to 1.
    cases.push(case("resize_bilinear", "[2,13,17,3] to [16,11]", 4.0, |inputs| {
        Ok(vec![ops::resize_bilinear(&inputs.uniform(&SHAPE, 1.0)?, [16, 11])?])
    }));
    // Sums of nine products, of which R has rows of up to 2.
    cases.push(case("disperse", "[5,3,3,24]", 16.0, |inputs| {
        Ok(vec![ops::disperse(&inputs.uniform(&[5, 3, 3, 24], 1.0)?)?])
    }));
    // A value up to 1 and four waves of as much, whose phases err by an ulp of a number up to 2, times pi.
    cases.push(case("freeu", "[2,13,17,16] and [2,13,17,24]", 48.0, |inputs| {
        let [backbone, skip] = [16, 24].map(|c| inputs.uniform(&[2, 13, 17, c], 1.0));
        Ok(vec![ops::freeu(&backbone?, &skip?, FreeU { backbone: 1.1, skip: 0.6 })?])
    }));
    // Two products per axis, of sums of up to 18 products of a value up to 1 and a weight; their intermediate is f32.
    cases.push(case("spectral_filter", "[2,13,17,16] in [16,18]", 64.0, |inputs| {
        let x = inputs.uniform(&[2, 13, 17, 16], 1.0)?;
        let pass = LowPass { scale: 2.0, floor: 0.6 };
        Ok(vec![ops::spectral_filter(SpectralFilter { x: &x, padded: [16, 18], pass, weak: 1 })?])
    }));
    // Sums of four values up to 1, in one order, and a quotient.
    cases.push(case("avg_pool", "[2,13,17,3]", 4.0, |inputs| Ok(vec![ops::avg_pool(&inputs.uniform(&SHAPE, 1.0)?)?])));
}

fn steps(cases: &mut Vec<Case>) {
    const SHAPE: [usize; 4] = [2, 9, 11, 4];
    // With guidance 7 from outputs up to 1: 1 + 7 * 2, times at most 1.
    cases.push(case("sampler_step", "guided", 20.0, |inputs| {
        let (x, output) = (inputs.f32(&SHAPE)?, inputs.uniform(&[4, 9, 11, 4], 1.0)?);
        let (mut state, steps) = (SampleState::new(x)?, step_table(inputs.device)?);
        let guidance = Guidance::uniform(inputs.device, state.x().shape()[0], 7.0)?;
        ops::sampler_step(&mut state, &output, Some(&guidance), &steps, None)?;
        let (x, x0) = state.into_parts();
        Ok(vec![x, x0])
    }));
    cases.push(case("scale_input", "twice", 2.0, |inputs| {
        let (x, steps) = (inputs.f32(&SHAPE)?, step_table(inputs.device)?);
        Ok(vec![ops::scale_input(&x, &steps, inputs.dtype, 2)?])
    }));
    let add_noise = |inputs: &mut Inputs| {
        let (x, noise) = (inputs.f32(&SHAPE)?, inputs.f32(&SHAPE)?);
        Ok(vec![ops::add_noise(&x, &noise, 0.8, 0.6)?])
    };
    cases.push(case("add_noise", "[2,9,11,4]", 2.0, add_noise).only_f32());
    cases.push(
        case("repaint", "half of [2,9,11,4]", 2.0, |inputs| {
            let (mut x, known, noise) = (inputs.f32(&SHAPE)?, inputs.f32(&SHAPE)?, inputs.f32(&SHAPE)?);
            let mask: Vec<f32> = (0..99).map(|pixel| if pixel % 2 == 0 { 1.0 } else { 0.0 }).collect();
            let mask = Tensor::from_f32(inputs.device, &[1, 9, 11, 1], DType::F32, &mask)?;
            let levels = Tensor::from_f32(inputs.device, &[1, 2], DType::F32, &[0.8, 0.6])?;
            let step = StepIndex::one(inputs.device, 0)?;
            let args = Repaint { mask: &mask, known: &known, noise: &noise, levels: &levels, step: &step };
            ops::repaint(&mut x, args)?;
            Ok(vec![x])
        })
        .only_f32(),
    );
    // exp(2 / 2) times noise up to 1; the exponent's error is relative.
    cases.push(case("diagonal_gaussian", "mean and sample", 8.0, |inputs| {
        let (moments, noise) = (inputs.uniform(&[2, 9, 11, 8], 2.0)?, inputs.f32(&SHAPE)?);
        Ok(vec![ops::diagonal_gaussian(&moments, None)?, ops::diagonal_gaussian(&moments, Some(&noise))?])
    }));
}

/// What methods do beside the network.
fn methods(cases: &mut Vec<Case>) {
    const SHAPE: [usize; 4] = [2, 10, 12, 4];
    // Patches over the edges, in places of their own on each map; some cells are in none.
    fn patches(device: &Device, stride: usize) -> Result<Patches> {
        let layout = PatchLayout { map: [SHAPE[1], SHAPE[2]], size: [5, 4], stride, wraps: false };
        let mut patches = Patches::new(device, SHAPE[0], 3, layout)?;
        patches.place(&[[-1, -2], [2, 3], [4, 4], [0, 5], [6, 9], [3, 1]])?;
        Ok(patches)
    }
    for stride in [1, 2] {
        cases.push(case("gather_patches", format!("6 of [5,4], stride {stride}"), 2.0, move |inputs| {
            let (x, steps) = (inputs.f32(&SHAPE)?, step_table(inputs.device)?);
            Ok(vec![ops::gather_patches(&x, &patches(inputs.device, stride)?, None, &steps, inputs.dtype, 2)?])
        }));
        // As of sampler_step, of three patches.
        cases.push(case("step_patches", format!("6 of [5,4], stride {stride}"), 60.0, move |inputs| {
            let (x, output) = (inputs.f32(&SHAPE)?, inputs.uniform(&[12, 5, 4, 4], 1.0)?);
            let (steps, guidance) = (step_table(inputs.device)?, Guidance::uniform(inputs.device, 6, 7.0)?);
            let mut sums = Tensor::zeros(inputs.device, &SHAPE, DType::F32)?;
            ops::step_patches(&x, &patches(inputs.device, stride)?, &output, Some(&guidance), &steps, &mut sums)?;
            Ok(vec![sums])
        }));
    }
    let merge = |inputs: &mut Inputs| {
        let values = inputs.f32(&[6, 5, 4, 4])?;
        let weights = |values: &[f32]| Tensor::from_f32(inputs.device, &[values.len()], DType::F32, values);
        let (rows, columns) = (weights(&[0.5, 1.0, 1.5, 1.0, 0.5])?, weights(&[0.25, 1.0, 1.0, 0.25])?);
        Ok(vec![ops::merge_patches(&values, &patches(inputs.device, 1)?, &rows, &columns)?])
    };
    cases.push(case("merge_patches", "6 of [5,4]", 8.0, merge).only_f32());
    // The low band's absolute weights are below 2 along each axis, of a difference up to 2.
    let exchange = |inputs: &mut Inputs| Ok(vec![ops::exchange_low_band(&inputs.f32(&SHAPE)?, &inputs.f32(&SHAPE)?)?]);
    cases.push(case("exchange_low_band", "[2,10,12,4]", 16.0, exchange).only_f32());
    let sharpen = |inputs: &mut Inputs| Ok(vec![ops::sharpen(&inputs.f32(&SHAPE)?, 1.0)?]);
    cases.push(case("sharpen", "[2,10,12,4]", 4.0, sharpen).only_f32());
    let pool = |inputs: &mut Inputs| Ok(vec![ops::pool_latents(&inputs.f32(&SHAPE)?, 2)?]);
    cases.push(case("pool_latents", "[2,10,12,4] by 2", 4.0, pool).only_f32());
    cases.push(case("upsample_guidance", "guided [2,10,12,4] by 2", 8.0, |inputs| {
        let (output, low) = (inputs.uniform(&[4, 10, 12, 4], 1.0)?, inputs.uniform(&[4, 5, 6, 4], 1.0)?);
        let (pooled, step) = (inputs.f32(&[2, 5, 6, 4])?, StepIndex::one(inputs.device, 0)?);
        let table = Tensor::from_f32(inputs.device, &[1, 3], DType::F32, &[0.6, 0.3, 0.5])?;
        let factors = StepRows { table: &table, step: &step, rows: 1 };
        Ok(vec![ops::upsample_guidance(&output, &low, &pooled, factors)?])
    }));
    // Sums of 480 values.
    let moments = |inputs: &mut Inputs| Ok(vec![ops::latent_moments(&inputs.f32(&SHAPE)?, 20)?]);
    cases.push(case("latent_moments", "[2,10,12,4] and 20 zeros", 32.0, moments).only_f32());
    let standardise = |inputs: &mut Inputs| {
        let x = inputs.f32(&SHAPE)?;
        let moments = |values: &[f32]| Tensor::from_f32(inputs.device, &[2, 2], DType::F32, values);
        let (from, to) = (moments(&[0.25, 0.6, -0.1, 0.5])?, moments(&[-0.5, 1.1, 0.0, 0.9])?);
        Ok(vec![ops::standardise_latents(&x, &from, &to)?])
    };
    cases.push(case("standardise_latents", "[2,10,12,4]", 8.0, standardise).only_f32());
}
