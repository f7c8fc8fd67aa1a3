use std::ops::Range;

use rayon::prelude::*;

use super::cpu::gemm::{K_BLOCK, TILE_STRIDE};
use super::cpu::kernels::Kernel;
use super::cpu::math::{self, exp_nonpositive, simd};
use super::{StepIndex, Tensor, by_dtype, cases, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// Arguments of [`attention`]; heads are as the projections leave them, so nothing is transposed or copied.
#[derive(Clone, Copy, Debug)]
pub enum Attention<'a> {
    /// Self-attention on the fused projection `[N, L, 3, heads, head_dim]` (q, k, v).
    Packed { qkv: &'a Tensor, causal: bool },
    /// Cross-attention: q `[N, L_q, heads, head_dim]`, kv `[R, L_k, 2, heads, head_dim]`. R divides N, and image i attends to
    /// row `i / (N / R)`: to keys and values of its own where R is N, to those that all images share where R is 1.
    Cross { q: &'a Tensor, kv: &'a Tensor },
    /// Self-attention by the weights of other tokens: q and k of the fused projection `qk`, v of the fused projection `v`, both
    /// `[N, L, 3, heads, head_dim]`, where they are.
    Borrowed { qk: &'a Tensor, v: &'a Tensor },
}

/// What attention does beyond `softmax(q k^T / sqrt(head_dim)) v`: arguments of [`attention_with`]. The default is nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionOptions<'a> {
    /// Factor of the scores, positive; `None`: 1 / sqrt(head_dim). T5 has 1.
    pub scale: Option<f32>,
    /// `[B, heads, L_q, L_k]`, dtype of q, added to the scaled scores: T5's relative positions, or a mask of -inf. B divides N;
    /// image i has row `i / (N / B)`.
    pub bias: Option<&'a Tensor>,
    /// Further keys and values.
    pub second: Option<SecondSource<'a>>,
    /// Self-attention within the windows of a map, with neither of the above but the scale.
    pub windows: Option<Windows<'a>>,
}

/// Windows of a map whose tokens, row by row, are those of [`Attention::Packed`]: each token attends to those of its own
/// window, and nothing is rolled, cut or put together in memory (MSW-MSA of HiDiffusion, Zhang et al. 2024,
/// arXiv:2311.17528, without its resize of odd maps). Or, with `keys`, to those of a larger box around its window
/// (neighbourhood patch attention of ScaleDiff, 2025, arXiv:2510.25818).
#[derive(Clone, Copy, Debug)]
pub struct Windows<'a> {
    /// H and W, with H W = L.
    pub map: [usize; 2],
    /// Rows and columns of a window. Without `keys` they divide those of the map; with them the last window of an axis is short
    /// where they do not, and a window larger than the map is the map.
    pub window: [usize; 2],
    /// Rows and columns of the keys' box, at least those of a window; along an axis with fewer cells it is the whole axis. That of
    /// a window which begins at row (or column) `i` begins at `i - (keys - window) / 2`, moved inside the map. `None`: the keys
    /// of a window are its own tokens. Not beside a shift.
    pub keys: Option<[usize; 2]>,
    /// `None`: the windows begin at the map's first token.
    pub shift: Option<WindowShift<'a>>,
}

/// A cyclic shift of [`Windows`], read on the device, so that a recorded step has each time another: that of image i is
/// `factors[step of i, i mod M, column] * unit`, and its windows begin so many rows and columns further.
#[derive(Clone, Copy, Debug)]
pub struct WindowShift<'a> {
    /// `[steps, M, C]`, u32, below 2^16: a column for each of the calls in a step, say. M divides N: 1 for all images alike, or
    /// the pictures of a batch, each with shifts of its own.
    pub factors: &'a Tensor,
    pub step: &'a StepIndex,
    pub column: usize,
    /// Rows and columns. Hopper's kernel wants multiples of 8.
    pub unit: [usize; 2],
}

/// Keys and values beside those of [`Attention`].
#[derive(Clone, Copy, Debug)]
pub struct SecondSource<'a> {
    /// `[R, L_k2, P, heads, head_dim]`: keys and values are the last two of P = 2 or 3 parts, so that the fused projection of
    /// another stream serves as it is. R divides N, as in [`Attention::Cross`].
    pub kv: &'a Tensor,
    /// `None`: their scores enter the same softmax. That is how the streams of SD 3's transformer attend to both (Esser et al.
    /// 2024, arXiv:2403.03206), each by a call of its own. `Some(weight)`: they have a softmax of their own, whose result is
    /// added with this weight (IP-Adapter, Ye et al. 2023, arXiv:2308.06721).
    pub weight: Option<f32>,
}

/// `softmax(q k^T / sqrt(head_dim)) v` per head: `[N, L_q, heads, head_dim]`, without the score matrix in memory. The
/// softmax is f32 whatever the dtype (so `upcast_attention` has nothing left to ask for). `causal`: query i sees keys
/// `0..=i`. Dao et al. 2022, arXiv:2205.14135.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): queries but no keys, rows of kv that do not divide the
/// images; on a card, a head wider than 512.
pub fn attention(args: Attention) -> Result<Tensor> {
    attention_with(args, AttentionOptions::default())
}

/// [`attention`] with a scale, a bias, or a second source of keys and values:
/// `softmax(scale q k^T + bias) v`, of `[k; k2]` and `[v; v2]`, or plus `weight softmax(scale q k2^T) v2`.
///
/// # Errors
/// As [`attention`]; [`Error::Argument`](crate::Error::Argument): a scale that is not positive, a second source that has no
/// keys or stands beside `causal` or, joined, beside `bias`; windows that do not divide their map, a map that is not the
/// tokens', or windows beside what they do not go with, a step or column that the factors do not have.
pub fn attention_with(args: Attention, options: AttentionOptions) -> Result<Tensor> {
    const OP: &str = "attention";
    let fused = |arg: &'static str, qkv: &Tensor| {
        let [_, _, three, _, _] = qkv.dims(OP, arg)?;
        float(OP, arg, qkv)?;
        match three {
            3 => Ok(()),
            _ => Err(Error::shape(OP, arg, qkv, "[N, L, 3, heads, head_dim]")),
        }
    };
    let (q, kv, causal, parts) = match args {
        Attention::Packed { qkv, causal } => {
            fused("qkv", qkv)?;
            (qkv, qkv, causal, 3)
        }
        Attention::Borrowed { qk, v } => {
            fused("qk", qk)?;
            v.expect(OP, "v", qk.shape(), qk.dtype(), qk.device())?;
            (qk, qk, false, 3)
        }
        Attention::Cross { q, kv } => {
            let [_, _, heads, head_dim] = q.dims(OP, "q")?;
            let [rows, keys, _, _, _] = kv.dims(OP, "kv")?;
            float(OP, "q", q)?;
            kv.expect(OP, "kv", &[rows, keys, 2, heads, head_dim], q.dtype(), q.device())?;
            (q, kv, false, 2)
        }
    };
    let [n, queries] = [q.shape()[0], q.shape()[1]];
    let &[rows, keys, _, heads, head_dim] = kv.shape() else { unreachable!("checked: five dimensions") };
    let images_per_kv = images_of_a_row(OP, "rows of kv", rows, n)?;
    let shape = [n, queries, heads, head_dim];
    let empty = shape.contains(&0);
    if keys == 0 && !empty {
        return Err(Error::argument(OP, "L_k", keys, "at least one key"));
    }
    let scale = options.scale.unwrap_or((1.0 / (head_dim as f64).sqrt()) as f32);
    if options.scale.is_some_and(|scale| !(scale > 0.0 && scale.is_finite())) {
        return Err(Error::argument(OP, "scale", scale, "a positive number"));
    }
    let mut images_per_bias = 1;
    if let Some(bias) = options.bias {
        let [rows, _, _, _] = bias.dims(OP, "bias")?;
        bias.expect(OP, "bias", &[rows, heads, queries, keys], q.dtype(), q.device())?;
        images_per_bias = images_of_a_row(OP, "rows of bias", rows, n)?;
    }
    let second = match options.second {
        None => None,
        Some(SecondSource { kv, weight }) => {
            let [rows, keys, parts, _, _] = kv.dims(OP, "second.kv")?;
            if !(2..=3).contains(&parts) {
                return Err(Error::shape(OP, "second.kv", kv, "[R, L_k2, 2 or 3, heads, head_dim]"));
            }
            kv.expect(OP, "second.kv", &[rows, keys, parts, heads, head_dim], q.dtype(), q.device())?;
            if causal {
                return Err(Error::argument(OP, "causal", causal, "false beside a second source"));
            }
            if options.bias.is_some() && weight.is_none() {
                return Err(Error::argument(OP, "bias", "given", "none beside a second source in the same softmax"));
            }
            if keys == 0 && !empty {
                return Err(Error::argument(OP, "L_k2", keys, "at least one key"));
            }
            let images_per_kv = images_of_a_row(OP, "rows of second.kv", rows, n)?;
            Some(SecondDims { keys, images_per_kv, weight })
        }
    };
    let mut windows = None;
    if let Some(given) = options.windows {
        let packed = matches!(args, Attention::Packed { causal: false, .. });
        if !packed || options.bias.is_some() || second.is_some() {
            let want = "given for packed q, k and v, not causal, without bias and second source";
            return Err(Error::argument(OP, "windows", "given", want));
        }
        windows = Some(given.check(OP, n, queries, q.device())?);
    }
    let (n, queries, keys) = match windows {
        Some(WindowDims { count, window: [h, w], keys: [key_h, key_w], .. }) => (n * count, h * w, key_h * key_w),
        None => (n, queries, keys),
    };
    let dims =
        Dims { n, images_per_kv, queries, keys, heads, head_dim, scale, causal, second, images_per_bias, windows };
    let operands = Operands {
        q: Part { tensor: q, part: 0, parts: if parts == 3 { 3 } else { 1 } },
        kv: match args {
            Attention::Borrowed { v, .. } => {
                let of = |tensor, part| Part { tensor, part, parts };
                [of(kv, 1), of(v, 2)]
            }
            Attention::Packed { .. } | Attention::Cross { .. } => last_two(kv, parts),
        },
        second: options.second.map(|second| last_two(second.kv, second.kv.shape()[2])),
        bias: options.bias,
        shift: options.windows.and_then(|windows| windows.shift),
    };

    let mut y = Tensor::uninit(q.device(), &shape, q.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    let AttentionOptions { scale, bias, second: given, windows: within } = options;
    // The recorded shapes have no words for the options.
    let borrowed = matches!(args, Attention::Borrowed { .. });
    if scale.is_none() && bias.is_none() && given.is_none() && within.is_none() && !borrowed {
        let packed = matches!(args, Attention::Packed { .. });
        profile::call(OP, || {
            cases::attention_shape([n, queries, keys, heads, head_dim], images_per_kv, packed, causal)
        });
    }
    match q.device() {
        Device::Meta(meta) => {
            let rows = |images_per_kv: usize, keys: usize| 2 * (n / images_per_kv.max(1)) * keys * heads * head_dim;
            let second = second.map_or(0, |second| rows(second.images_per_kv, second.keys));
            // Boxes of keys overlap; each token is read from memory once.
            let first = if windows.is_some() { 2 * y.numel() } else { rows(images_per_kv, keys) };
            let values = first + second + options.bias.map_or(0, Tensor::numel);
            let bytes = 2 * y.bytes() + (values * y.dtype().size_bytes()) as u64;
            meta.record(OP, OpKind::Attention, y.shape(), dims.work(bytes));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(q.dtype(), T => attention_cpu::<T>(&operands, &dims, &mut y)),
        Device::Cuda(card) => cuda::attention::attention(card, &operands, &dims, &mut y)?,
    }
    Ok(y)
}

impl Windows<'_> {
    fn check(&self, op: &'static str, n: usize, tokens: usize, device: &Device) -> Result<WindowDims> {
        let Windows { map, mut window, keys, shift } = *self;
        if map[0].checked_mul(map[1]) != Some(tokens) {
            return Err(Error::argument(op, "map", format!("{map:?}"), format!("{tokens} tokens, as q has")));
        }
        let divides = map.iter().zip(window).all(|(map, window)| window > 0 && map.is_multiple_of(window));
        if window.contains(&0) || (keys.is_none() && !divides) {
            let want = format!("sizes that divide those of the map, {map:?}");
            return Err(Error::argument(op, "window", format!("{window:?}"), want));
        }
        let mut key_box = window;
        if let Some(keys) = keys {
            if keys.iter().zip(window).any(|(&keys, window)| keys < window) {
                let want = format!("sizes of at least those of the window, {window:?}");
                return Err(Error::argument(op, "keys", format!("{keys:?}"), want));
            }
            if shift.is_some() {
                return Err(Error::argument(op, "shift", "given", "none beside a box of keys"));
            }
            let within = |sizes: [usize; 2]| [0, 1].map(|axis| sizes[axis].min(map[axis]));
            (window, key_box) = (within(window), within(keys));
        }
        let mut unit = [0, 0];
        if let Some(shift) = shift {
            let [steps, images, columns] = shift.factors.dims(op, "factors")?;
            shift.factors.expect(op, "factors", &[steps, images, columns], DType::U32, device)?;
            images_of_a_row(op, "images of factors", images, n)?;
            if !shift.step.tensor().device().same(device) {
                let got = shift.step.tensor().device().to_string();
                return Err(Error::Device { op, arg: "step", got, want: device.to_string() });
            }
            shift.step.check_images(op, n)?;
            if shift.column >= columns {
                return Err(Error::argument(op, "column", shift.column, format!("below {columns}")));
            }
            if n > 0 && shift.step.last() >= steps {
                return Err(Error::argument(op, "step", shift.step.last(), format!("below {steps}")));
            }
            if shift.unit.iter().zip(map).any(|(&unit, map)| unit > map) {
                let want = format!("at most the map, {map:?}");
                return Err(Error::argument(op, "unit", format!("{:?}", shift.unit), want));
            }
            unit = shift.unit;
        }
        let count = match map {
            [0, _] | [_, 0] => 0,
            _ => map[0].div_ceil(window[0]) * map[1].div_ceil(window[1]),
        };
        Ok(WindowDims { map, window, keys: key_box, around: keys.is_some(), unit, count })
    }
}

/// Images that share each of `rows` rows.
pub(super) fn images_of_a_row(op: &'static str, what: &'static str, rows: usize, n: usize) -> Result<usize> {
    if n > 0 && (rows == 0 || !n.is_multiple_of(rows)) {
        let want = format!("a number that divides the {n} images of q");
        return Err(Error::argument(op, what, rows, want));
    }
    Ok(n / rows.max(1))
}

/// One of the `parts` that lie side by side in each token's row: `[_, L, parts, heads, head_dim]`.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub tensor: &'a Tensor,
    pub part: usize,
    pub parts: usize,
}

fn last_two(tensor: &Tensor, parts: usize) -> [Part<'_>; 2] {
    [parts - 2, parts - 1].map(|part| Part { tensor, part, parts })
}

pub(super) struct Operands<'a> {
    pub q: Part<'a>,
    pub kv: [Part<'a>; 2],
    pub second: Option<[Part<'a>; 2]>,
    pub bias: Option<&'a Tensor>,
    pub shift: Option<WindowShift<'a>>,
}

fn attention_cpu<T: Element>(operands: &Operands, dims: &Dims, y: &mut Tensor) {
    // Rows of all heads, so the distance of two tokens' rows of one head.
    let width = dims.heads * dims.head_dim;
    if let Some(windows) = &dims.windows {
        return windows_cpu::<T>(operands, dims, windows, width, y);
    }
    let second = operands.second.as_ref().zip(dims.second);
    let inputs = Inputs {
        q: Tokens::of(&operands.q, width),
        first: KeySource::of(&operands.kv, width, dims.keys, dims.images_per_kv),
        second: second.map(|(kv, second)| KeySource::of(kv, width, second.keys, second.images_per_kv)),
        bias: operands.bias.map(|bias| bias.cpu::<T>()),
    };
    forward(dims, &inputs, y.cpu_mut());
}

/// Window by window: the tokens of its queries and of its keys side by side, attention as of an image of its own, and the results
/// back in their places.
fn windows_cpu<T: Element>(operands: &Operands, dims: &Dims, windows: &WindowDims, width: usize, y: &mut Tensor) {
    let WindowDims { map: [map_h, map_w], window, unit, count, .. } = *windows;
    let factor = |image: usize| match &operands.shift {
        Some(WindowShift { factors, step, column, .. }) => {
            let &[_, images, columns] = factors.shape() else { unreachable!("checked: three dimensions") };
            factors.cpu::<u32>()[(step.get(image) * images + image % images) * columns + column] as usize
        }
        None => 0,
    };
    let qkv = operands.q.tensor.cpu::<T>();
    let y = y.cpu_mut::<T>();
    for number in 0..dims.n {
        let (image, across) = (number / count, map_w.div_ceil(window[1]));
        let first = [number % count / across * window[0], number % count % across * window[1]];
        let shift = unit.map(|unit| factor(image) * unit);
        // Where the tokens of a box lie among those of all images.
        let places = |[top, left]: [usize; 2], [h, w]: [usize; 2]| -> Vec<usize> {
            let of = |i: usize| [(top + shift[0] + i / w) % map_h, (left + shift[1] + i % w) % map_w];
            (0..h * w).map(of).map(|[row, column]| (image * map_h + row) * map_w + column).collect()
        };
        let tokens = |places: &[usize], part: usize| -> Vec<T> {
            places.iter().flat_map(|place| &qkv[(place * 3 + part) * width..][..width]).copied().collect()
        };
        let queries = places(first, windows.queries_at(first));
        let keys = places(windows.keys_at(first), windows.keys);
        let [q, k, v] = [tokens(&queries, 0), tokens(&keys, 1), tokens(&keys, 2)];
        let of = |data| Tokens { data, offset: 0, stride: width };
        let first = KeySource { k: of(&k), v: of(&v), keys: keys.len(), images_per_kv: 1 };
        let dims = Dims { n: 1, queries: queries.len(), keys: keys.len(), ..*dims };
        let mut results = q.clone();
        forward(&dims, &Inputs { q: of(&q), first, second: None, bias: None }, &mut results);
        for (from, place) in results.chunks_exact(width).zip(queries) {
            y[place * width..][..width].copy_from_slice(from);
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Dims {
    /// Images; windows of all images.
    pub n: usize,
    /// Images that share a row of keys and values.
    pub images_per_kv: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// Of the scores.
    pub scale: f32,
    pub causal: bool,
    pub second: Option<SecondDims>,
    /// Images that share a row of the bias.
    pub images_per_bias: usize,
    pub windows: Option<WindowDims>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct WindowDims {
    pub map: [usize; 2],
    /// Of the queries, at most the map.
    pub window: [usize; 2],
    /// Of the keys, at most the map.
    pub keys: [usize; 2],
    /// Are the keys those around the queries, with windows that may be short, and not the queries' own tokens?
    pub around: bool,
    /// What a factor of 1 shifts by.
    pub unit: [usize; 2],
    /// Windows of an image.
    pub count: usize,
}

impl WindowDims {
    /// Rows and columns of the window that begins at `first`: the last of an axis may be short.
    fn queries_at(&self, first: [usize; 2]) -> [usize; 2] {
        [0, 1].map(|axis| self.window[axis].min(self.map[axis] - first[axis]))
    }

    /// Where its keys begin.
    fn keys_at(&self, first: [usize; 2]) -> [usize; 2] {
        if !self.around {
            return first;
        }
        [0, 1].map(|axis| {
            let before = (self.keys[axis] - self.window[axis]) / 2;
            first[axis].saturating_sub(before).min(self.map[axis] - self.keys[axis])
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct SecondDims {
    pub keys: usize,
    pub images_per_kv: usize,
    /// Of a softmax of its own.
    pub weight: Option<f32>,
}

impl Dims {
    fn work(&self, bytes: u64) -> Work {
        let (queries, keys) = (self.queries as u64, self.keys as u64);
        let pairs = if self.causal { queries.saturating_mul(queries + 1) / 2 } else { queries.saturating_mul(keys) };
        let second = self.second.map_or(0, |second| queries.saturating_mul(second.keys as u64));
        let heads = self.heads as u64;
        let scores = match self.windows {
            // Of the map's tokens, whichever window is short.
            Some(WindowDims { map: [h, w], count, .. }) => {
                ((self.n / count.max(1) * h * w) as u64).saturating_mul(keys).saturating_mul(heads)
            }
            None => pairs.saturating_add(second).saturating_mul(self.n as u64 * heads),
        };
        let macs = scores.saturating_mul(2 * self.head_dim as u64);
        // Beside the products: scale, maximum, subtraction, exponential and sum of each score.
        let flops = macs.saturating_mul(2).saturating_add(scores.saturating_mul(5));
        Work { macs, flops, bytes, launches: 1 }
    }
}

/// q, k or v where the projection left it: token `i` of batch `b` starts at element `offset + (b * L + i) * stride`.
#[derive(Clone, Copy)]
struct Tokens<'a, T> {
    data: &'a [T],
    offset: usize,
    stride: usize,
}

impl<'a, T: Element> Tokens<'a, T> {
    fn of(&Part { tensor, part, parts }: &Part<'a>, width: usize) -> Tokens<'a, T> {
        Tokens { data: tensor.cpu(), offset: part * width, stride: parts * width }
    }

    /// From token `token` (counted over the whole batch) of head `head` on.
    fn from(&self, token: usize, head: usize, head_dim: usize) -> &'a [T] {
        &self.data[self.offset + token * self.stride + head * head_dim..]
    }
}

/// Keys and values: row `image / images_per_kv` of `keys` tokens.
#[derive(Clone, Copy)]
struct KeySource<'a, T> {
    k: Tokens<'a, T>,
    v: Tokens<'a, T>,
    keys: usize,
    images_per_kv: usize,
}

impl<'a, T: Element> KeySource<'a, T> {
    fn of([k, v]: &[Part<'a>; 2], width: usize, keys: usize, images_per_kv: usize) -> KeySource<'a, T> {
        KeySource { k: Tokens::of(k, width), v: Tokens::of(v, width), keys, images_per_kv }
    }
}

struct Inputs<'a, T> {
    q: Tokens<'a, T>,
    first: KeySource<'a, T>,
    second: Option<KeySource<'a, T>>,
    bias: Option<&'a [T]>,
}

/// Queries of one task, about: so many rows share the packed keys and values.
const MAX_QUERIES: usize = 256;

/// Keys of one block: the depth of the product with the values.
const KEYS: usize = K_BLOCK;

/// The blocks of one head, one rayon task per head and block of queries. A task walks the keys in blocks: keys and values
/// are packed into the kernel's panels, then each tile of queries gets its scores (a tile by a block, in L1), the
/// running softmax, and the product with the values, which is added to the tile's rows of `sums`.
fn forward<T: Element>(dims: &Dims, inputs: &Inputs<T>, y: &mut [T]) {
    let kernel = Kernel::best();
    let Dims { n, queries, heads, head_dim, .. } = *dims;
    // Equal blocks of whole tiles; smaller ones where there would be fewer than four tasks a thread.
    let fair = (n * heads * queries).div_ceil(4 * rayon::current_num_threads());
    let block = queries.div_ceil(queries.div_ceil(fair.min(MAX_QUERIES))).next_multiple_of(kernel.rows);
    let blocks = queries.div_ceil(block);
    let y = Output { data: y.as_mut_ptr(), len: y.len() };
    (0..n * heads * blocks).into_par_iter().for_each_init(
        || Scratch::new(kernel, block, dims),
        |scratch, task| {
            let (batch, head, first) = (task / blocks / heads, task / blocks % heads, task % blocks * block);
            let rows = first..queries.min(first + block);
            scratch.attend(dims, inputs, batch, head, rows.clone());
            for (i, query) in rows.enumerate() {
                let at = ((batch * queries + query) * heads + head) * head_dim;
                // SAFETY: a row of a head belongs to one task alone, and no task reads y.
                let row = unsafe { y.slice_mut(at..at + head_dim) };
                scratch.finish(i, dims, row);
            }
        },
    );
}

/// The output, shared by tasks that write disjoint parts of it.
#[derive(Clone, Copy)]
struct Output<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: the pointer is only used through slice_mut, whose callers hold disjoint ranges.
unsafe impl<T: Send> Sync for Output<T> {}

impl<T> Output<T> {
    /// # Safety
    /// No two live slices overlap, and the tensor outlives them.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds as just asserted; exclusive by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

/// Memory of one task, bounded by the block sizes: about 2 MiB at head_dim 512, 0.4 MiB at 40.
struct Scratch {
    kernel: Kernel,
    head_dim: usize,
    /// head_dim, rounded up to whole panels.
    width: usize,
    /// `[head_dim / K_BLOCK, queries, TILE_STRIDE]`: the scaled queries in the kernel's tiles.
    q: Vec<f32>,
    queries: usize,
    /// `[panel of keys, head_dim, columns]`
    k: Vec<f32>,
    /// `[panel of head_dim, keys, columns]`
    v: Vec<f32>,
    /// Keys that a panel of `v` has room for.
    keys: usize,
    /// `[tile's rows, TILE_STRIDE]`: scores, then their exponentials.
    scores: Vec<f32>,
    /// `[queries, width]`: sums of exponential times value.
    sums: Vec<f32>,
    /// For each query the largest score so far and the sum of the exponentials relative to it.
    max: Vec<f32>,
    total: Vec<f32>,
    /// `[queries, width]`: what a first softmax gave, where there is another.
    kept: Vec<f32>,
    /// A row of the bias for one block of keys.
    bias: Vec<f32>,
}

impl Scratch {
    fn new(kernel: Kernel, queries: usize, dims: &Dims) -> Scratch {
        let head_dim = dims.head_dim;
        let width = head_dim.next_multiple_of(kernel.columns);
        let most = dims.keys.max(dims.second.map_or(0, |second| second.keys));
        let keys = most.min(KEYS).next_multiple_of(kernel.columns);
        let keeps = dims.second.is_some_and(|second| second.weight.is_some());
        Scratch {
            kernel,
            head_dim,
            width,
            q: vec![0.0; head_dim.div_ceil(K_BLOCK) * queries * TILE_STRIDE],
            queries,
            k: vec![0.0; keys * head_dim],
            v: vec![0.0; keys * width],
            keys,
            scores: vec![0.0; kernel.rows * TILE_STRIDE],
            sums: vec![0.0; queries * width],
            max: vec![0.0; queries],
            total: vec![0.0; queries],
            kept: vec![0.0; if keeps { queries * width } else { 0 }],
            bias: vec![0.0; keys],
        }
    }

    /// One head's block of queries against all the keys it sees; the result waits in `sums` and `total`, and `kept`.
    fn attend<T: Element>(&mut self, dims: &Dims, inputs: &Inputs<T>, batch: usize, head: usize, rows: Range<usize>) {
        let count = rows.len();
        self.load_queries(inputs.q, batch * dims.queries + rows.start, head, count, dims.scale);
        self.begin(count);
        let bias = inputs.bias.map(|bias| {
            let block = batch / dims.images_per_bias * dims.heads + head;
            &bias[(block * dims.queries + rows.start) * dims.keys..]
        });
        self.walk(&inputs.first, dims.causal, bias, true, batch, head, rows.clone());
        let Some(second) = &inputs.second else { return };
        let apart = !self.kept.is_empty();
        if apart {
            for (i, row) in self.sums[..count * self.width].chunks_mut(self.width).enumerate() {
                multiply(row, 1.0 / self.total[i]);
            }
            self.kept[..count * self.width].copy_from_slice(&self.sums[..count * self.width]);
            self.begin(count);
        }
        self.walk(second, false, None, apart, batch, head, rows);
    }

    fn begin(&mut self, count: usize) {
        self.max[..count].fill(f32::NEG_INFINITY);
        self.total[..count].fill(0.0);
    }

    /// A source's keys, block by block. `bias`: from the first of the queries on. `fresh`: nothing was added to the sums yet.
    #[allow(clippy::too_many_arguments)]
    fn walk<T: Element>(
        &mut self,
        source: &KeySource<T>,
        causal: bool,
        bias: Option<&[T]>,
        fresh: bool,
        batch: usize,
        head: usize,
        rows: Range<usize>,
    ) {
        let (count, KeySource { k, v, keys: all, images_per_kv }) = (rows.len(), *source);
        let seen = if causal { rows.end } else { all };
        for first in (0..seen).step_by(KEYS) {
            let keys = KEYS.min(seen - first);
            let token = batch / images_per_kv * all + first;
            self.pack_keys(k.from(token, head, self.head_dim), k.stride, keys);
            self.pack_values(v.from(token, head, self.head_dim), v.stride, keys);
            for tile in (0..count).step_by(self.kernel.rows) {
                let tile_rows = self.kernel.rows.min(count - tile);
                // Keys of this block that the tile's first and last query see.
                let last = rows.start + tile + tile_rows - 1;
                let visible = |query: usize| if causal { (query + 1).saturating_sub(first).min(keys) } else { keys };
                if visible(last) == 0 {
                    continue;
                }
                self.score(tile, tile_rows, visible(last));
                if let Some(bias) = bias {
                    for row in 0..tile_rows {
                        let from = &bias[(tile + row) * all + first..][..visible(last)];
                        self.add_bias(row, from);
                    }
                }
                let fresh = fresh && first == 0;
                if visible(rows.start + tile) == keys {
                    self.update(tile, 0..tile_rows, keys, fresh);
                } else {
                    // The diagonal: row by row, so that no row touches a key or a value behind its own.
                    for row in 0..tile_rows {
                        self.update(tile, row..row + 1, visible(rows.start + tile + row), fresh);
                    }
                }
            }
        }
    }

    fn add_bias<T: Element>(&mut self, row: usize, from: &[T]) {
        let bias = &mut self.bias[..from.len()];
        math::load(bias, from);
        let scores = &mut self.scores[row * TILE_STRIDE..][..from.len()];
        scores.iter_mut().zip(bias).for_each(|(score, bias)| *score += *bias);
    }

    /// `scale q` of `count` queries from `token` on.
    fn load_queries<T: Element>(&mut self, q: Tokens<T>, token: usize, head: usize, count: usize, scale: f32) {
        for i in 0..count {
            let row = &q.from(token + i, head, self.head_dim)[..self.head_dim];
            for (part, row) in row.chunks(K_BLOCK).enumerate() {
                let to = &mut self.q[(part * self.queries + i) * TILE_STRIDE..][..row.len()];
                math::load(to, row);
                multiply(to, scale);
            }
        }
    }

    fn pack_keys<T: Element>(&mut self, k: &[T], stride: usize, keys: usize) {
        let columns = self.kernel.columns;
        for (first, panel) in (0..keys).step_by(columns).zip(self.k.chunks_mut(columns * self.head_dim)) {
            let count = columns.min(keys - first);
            for start in (0..self.head_dim).step_by(K_BLOCK) {
                let depth = start..self.head_dim.min(start + K_BLOCK);
                self.kernel.transpose(&k[first * stride..], stride, count, depth, &mut panel[start * columns..]);
            }
        }
    }

    fn pack_values<T: Element>(&mut self, v: &[T], stride: usize, keys: usize) {
        let columns = self.kernel.columns;
        for (first, panel) in (0..self.head_dim).step_by(columns).zip(self.v.chunks_mut(self.keys * columns)) {
            let count = columns.min(self.head_dim - first);
            for (key, to) in panel.chunks_exact_mut(columns).take(keys).enumerate() {
                math::load(&mut to[..count], &v[key * stride + first..][..count]);
            }
        }
    }

    /// `scores = q k^T` for the tile's queries and the block's first `keys` keys.
    fn score(&mut self, tile: usize, rows: usize, keys: usize) {
        let columns = self.kernel.columns;
        for (first, panel) in (0..keys).step_by(columns).zip(self.k.chunks(columns * self.head_dim)) {
            for (part, start) in (0..self.head_dim).step_by(K_BLOCK).enumerate() {
                let depth = K_BLOCK.min(self.head_dim - start);
                let q = &self.q[(part * self.queries + tile) * TILE_STRIDE..];
                let (panel, sums) = (&panel[start * columns..], &mut self.scores[first..]);
                let narrow = keys - first <= columns / 2;
                self.kernel.run(rows, narrow, depth, q, panel, sums, TILE_STRIDE, part > 0);
            }
        }
    }

    /// Softmax of the first `keys` scores of these rows of the tile and their product with the values.
    /// `first`: nothing was added to their sums yet.
    fn update(&mut self, tile: usize, rows: Range<usize>, keys: usize, first: bool) {
        if keys == 0 {
            return;
        }
        let Scratch { width, kernel, .. } = *self;
        let queries = tile + rows.start..tile + rows.end;
        let scores = &mut self.scores[rows.start * TILE_STRIDE..];
        let (max, total) = (&mut self.max[queries.clone()], &mut self.total[queries.clone()]);
        let sums = &mut self.sums[queries.start * width..queries.end * width];
        online_softmax(scores, keys, max, total, if first { &mut [] } else { sums });
        let panels = self.v.chunks(self.keys * kernel.columns);
        for (column, panel) in (0..self.head_dim).step_by(kernel.columns).zip(panels) {
            let narrow = self.head_dim - column <= kernel.columns / 2;
            kernel.run(rows.len(), narrow, keys, scores, panel, &mut sums[column..], width, !first);
        }
    }

    /// `y = sums / total`, row `i` of the block; of a second softmax, what the first gave and this times its weight.
    fn finish<T: Element>(&mut self, i: usize, dims: &Dims, y: &mut [T]) {
        let row = &mut self.sums[i * self.width..][..self.head_dim];
        multiply(row, 1.0 / self.total[i]);
        if let Some(weight) = dims.second.and_then(|second| second.weight) {
            let kept = &self.kept[i * self.width..][..self.head_dim];
            row.iter_mut().zip(kept).for_each(|(value, first)| *value = first + weight * *value);
        }
        math::store(y, row);
    }
}

/// Independent sums and maxima of a row of scores; divides the block of keys.
const LANES: usize = 32;

/// Combines the lanes in halves. The lanes pass through an opaque box: otherwise the compiler merges this tree with the
/// loop before it, whose vectors it then splits into pairs.
#[inline(always)]
fn reduce(lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = std::hint::black_box(lanes);
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = combine(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

simd! {
    fn multiply(values: &mut [f32], factor: f32) {
        values.iter_mut().for_each(|value| *value *= factor);
    }
}

simd! {
    /// One block's step of the running softmax, row by row (rows of `scores` [`TILE_STRIDE`] apart): `scores` become
    /// `exp(score - max)` with the new maximum, and `total` and the row's `sums` (none in the first block) are brought
    /// to that maximum, `total` with the new exponentials added.
    ///
    /// A row that so far saw only -inf keeps sums of 0, as exp(-inf) relative to any finite maximum; NaN passes through.
    fn online_softmax(scores: &mut [f32], keys: usize, max: &mut [f32], total: &mut [f32], sums: &mut [f32]) {
        let width = sums.len() / max.len();
        for (row, (max, total)) in max.iter_mut().zip(total).enumerate() {
            // Whole vectors: what lies behind the keys is no score, or one that this row does not see.
            let scores = &mut scores[row * TILE_STRIDE..][..keys.next_multiple_of(LANES)];
            scores[keys..].fill(f32::NEG_INFINITY);
            let (blocks, _) = scores.as_chunks_mut::<LANES>();
            let mut lanes = [*max; LANES];
            for block in blocks.iter() {
                for (lane, &score) in lanes.iter_mut().zip(block) {
                    *lane = if score > *lane { score } else { *lane };
                }
            }
            let largest = reduce(lanes, |a, b| if b > a { b } else { a });
            let shift = if largest == f32::NEG_INFINITY { 0.0 } else { largest };

            let mut lanes = [0.0f32; LANES];
            for block in blocks {
                for (lane, score) in lanes.iter_mut().zip(block) {
                    *score = exp_nonpositive::<FMA>(*score - shift);
                    *lane += *score;
                }
            }
            let rescale = exp_nonpositive::<FMA>(*max - shift);
            *total = *total * rescale + reduce(lanes, |a, b| a + b);
            *max = largest;
            sums[row * width..][..width].iter_mut().for_each(|sum| *sum *= rescale);
        }
    }
}
