use rayon::prelude::*;

use super::attention::images_of_a_row;
use super::{Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// What is known of a call once it is checked.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub n: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// That one row of kv serves.
    pub images: usize,
}

impl Dims {
    /// `q` or the result of attention, `[N, queries, heads, head_dim]`, with `kv: [R, keys, 2, heads, head_dim]` and
    /// `map: [N, queries, keys]`, f32.
    fn check(op: &'static str, arg: &'static str, q: &Tensor, kv: &Tensor, map: &Tensor) -> Result<Dims> {
        let [n, queries, heads, head_dim] = q.dims(op, arg)?;
        let [rows, keys, _, _, _] = kv.dims(op, "kv")?;
        float(op, arg, q)?;
        kv.expect(op, "kv", &[rows, keys, 2, heads, head_dim], q.dtype(), q.device())?;
        map.expect(op, "map", &[n, queries, keys], DType::F32, q.device())?;
        let images = images_of_a_row(op, "rows of kv", rows, n)?;
        if keys == 0 && q.numel() > 0 {
            return Err(Error::argument(op, "keys", keys, "at least one key"));
        }
        Ok(Dims { n, queries, keys, heads, head_dim, images })
    }

    fn products(&self) -> u64 {
        (self.n * self.queries * self.keys * self.heads * self.head_dim) as u64
    }

    /// 1 / sqrt(head_dim), as attention has it.
    pub fn scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }
}

/// What every query attends to, `softmax(q k^T / sqrt(head_dim))`, as the mean over heads; in f32 for every dtype, and added to
/// `map` in place where `adds`, else put there.
///
/// * `q`: `[N, queries, heads, head_dim]`, any float dtype
/// * `kv`: `[R, keys, 2, heads, head_dim]` of its dtype, as [`attention`](super::attention) has it; R divides N
/// * `map`: `[N, queries, keys]`, f32, that nobody else holds
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: queries but no keys, rows of kv
/// that do not divide the images, a map that is shared.
pub fn attention_map(q: &Tensor, kv: &Tensor, map: &mut Tensor, adds: bool) -> Result<()> {
    const OP: &str = "attention_map";
    let dims = Dims::check(OP, "q", q, kv, map)?;
    if !map.is_unshared() {
        return Err(Error::argument(OP, "map", "shared", "a tensor that nobody else holds"));
    }

    let _timed = profile::scope(OP, map.shape());
    match q.device().clone() {
        Device::Meta(meta) => {
            // Of kv the keys alone.
            let bytes = q.bytes() + kv.bytes() / 2 + map.bytes() * if adds { 2 } else { 1 };
            let (macs, scores) = (dims.products(), (map.numel() * dims.heads) as u64);
            let work = Work { macs, flops: 2 * macs + 6 * scores, bytes, launches: 1 };
            meta.record(OP, OpKind::Attention, map.shape(), work);
        }
        Device::Cpu(_) | Device::Cuda(_) if map.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(q.dtype(), T => attention_map_cpu::<T>(q, kv, &dims, map, adds)),
        Device::Cuda(card) => cuda::attention_map::attention_map(&card, q, kv, &dims, map, adds)?,
    }
    Ok(())
}

fn attention_map_cpu<T: Element>(q: &Tensor, kv: &Tensor, dims: &Dims, map: &mut Tensor, adds: bool) {
    let &Dims { queries, keys, heads, head_dim, images, .. } = dims;
    let (channels, scale) = (heads * head_dim, dims.scale());
    let (q, kv) = (q.cpu::<T>(), kv.cpu::<T>());
    map.cpu_mut::<f32>().par_chunks_exact_mut(keys).enumerate().for_each(|(query, map)| {
        let (q, row) = (&q[query * channels..][..channels], query / queries / images);
        let mut sums = vec![0f32; keys];
        for head in 0..heads {
            let q = &q[head * head_dim..][..head_dim];
            let score = |key: usize| {
                let k = &kv[(row * keys + key) * 2 * channels + head * head_dim..][..head_dim];
                scale * q.iter().zip(k).map(|(q, k)| q.to_f32() * k.to_f32()).sum::<f32>()
            };
            let scores: Vec<f32> = (0..keys).map(score).collect();
            let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = scores.iter().map(|score| (score - highest).exp()).sum();
            sums.iter_mut().zip(&scores).for_each(|(sum, score)| *sum += (score - highest).exp() / total);
        }
        for (map, sum) in map.iter_mut().zip(sums) {
            *map = if adds { *map } else { 0.0 } + sum / heads as f32;
        }
    });
}

/// Attention, for its share `weight` in place of its own by a map that is given: `(1 - weight) x + weight map v`, the same map for
/// every head; in f32 and rounded once. Shape and dtype of `x`.
///
/// * `x`: `[N, queries, heads, head_dim]`, any float dtype: the result of [`attention`](super::attention)
/// * `map`: `[N, queries, keys]`, f32
/// * `kv`: as in [`attention_map`], of which it reads the values
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: as [`attention_map`], a weight that is not
/// finite.
pub fn blend_attention_map(x: &Tensor, map: &Tensor, kv: &Tensor, weight: f32) -> Result<Tensor> {
    const OP: &str = "blend_attention_map";
    let dims = Dims::check(OP, "x", x, kv, map)?;
    if !weight.is_finite() {
        return Err(Error::argument(OP, "weight", weight, "a finite number"));
    }

    let mut y = Tensor::uninit(x.device(), x.shape(), x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            let bytes = bytes_of(&[Some(x), Some(map), Some(&y)]) + kv.bytes() / 2;
            let macs = dims.products();
            let work = Work { macs, flops: 2 * macs + 3 * y.numel() as u64, bytes, launches: 1 };
            meta.record(OP, OpKind::Attention, y.shape(), work);
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => blend_cpu::<T>(x, map, kv, &dims, weight, &mut y)),
        Device::Cuda(card) => cuda::attention_map::blend(card, x, map, kv, &dims, weight, &mut y)?,
    }
    Ok(y)
}

fn blend_cpu<T: Element>(x: &Tensor, map: &Tensor, kv: &Tensor, dims: &Dims, weight: f32, y: &mut Tensor) {
    let &Dims { queries, keys, heads, head_dim, images, .. } = dims;
    let channels = heads * head_dim;
    let (x, map) = (x.cpu::<T>(), map.cpu::<f32>());
    // [R, keys, C] in f32: every query reads them.
    let values: Vec<f32> =
        kv.cpu::<T>().chunks_exact(2 * channels).flat_map(|kv| kv[channels..].iter().map(|v| v.to_f32())).collect();
    y.cpu_mut::<T>().par_chunks_exact_mut(channels).enumerate().for_each(|(query, y)| {
        let values = &values[query / queries / images * keys * channels..][..keys * channels];
        let mut sums = vec![0f32; channels];
        for (share, values) in map[query * keys..][..keys].iter().zip(values.chunks_exact(channels)) {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += share * value);
        }
        let x = &x[query * channels..][..channels];
        for ((y, x), sum) in y.iter_mut().zip(x).zip(sums) {
            *y = T::from_f32((1.0 - weight) * x.to_f32() + weight * sum);
        }
    });
}
