//! Elements of a file to elements of ours: decoded, rounded and put into the layout that the kernels want.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use safetensors::Dtype as FileDtype;

use super::Entry;
use crate::pickle::places;
use crate::runtime::{DType, Element};

/// How a checkpoint's tensor becomes ours.
#[derive(Clone, Copy, Debug)]
pub(super) enum Layout {
    Same,
    /// Rows `[channels, pixels]` to `[pixels, channels]`.
    ChannelsLast {
        channels: usize,
        pixels: usize,
    },
    /// Row `r` of ours is row `r / 2` of the first `n`, or of the second `n` for odd `r`.
    Interleaved {
        n: usize,
        columns: usize,
    },
}

/// Values that the dtype cannot hold.
pub(super) struct BadValues {
    pub count: usize,
    pub value: f64,
}

/// Elements a thread converts at a time.
const CHUNK: usize = 1 << 15;

/// Converts `bytes` (little-endian elements of `dtype`) into `to`; `Some` when a value is not finite after rounding.
pub(super) fn repack<T: Element>(bytes: &[u8], dtype: FileDtype, to: &mut [T], layout: Layout) -> Option<BadValues> {
    let row = match layout {
        Layout::Same => CHUNK,
        Layout::ChannelsLast { channels, pixels } => channels * pixels,
        Layout::Interleaved { columns, .. } => columns,
    };
    let rows_per_chunk = CHUNK.div_ceil(row.max(1));
    let size = dtype.bitsize() / 8;
    let convert = |(chunk_index, chunk): (usize, &mut [T])| {
        let mut values = vec![0.0; row.min(chunk.len())];
        let mut bad: Option<BadValues> = None;
        for (i, to) in chunk.chunks_mut(row).enumerate() {
            let r = chunk_index * rows_per_chunk + i;
            let source_row = match layout {
                Layout::Interleaved { n, .. } => r / 2 + (r % 2) * n,
                _ => r,
            };
            let values = &mut values[..to.len()];
            let first = source_row * row;
            let source = &bytes[first * size..(first + to.len()) * size];
            decode(source, dtype, values);
            bad = merge(bad, out_of_range(source, dtype, values, T::DTYPE));
            match layout {
                Layout::ChannelsLast { channels, pixels } if pixels > 1 => {
                    for (p, to) in to.chunks_mut(channels).enumerate() {
                        to.iter_mut().enumerate().for_each(|(c, to)| *to = T::from_f32(values[c * pixels + p]));
                    }
                }
                _ => to.iter_mut().zip(&*values).for_each(|(to, &value)| *to = T::from_f32(value)),
            }
        }
        bad
    };
    to.par_chunks_mut(rows_per_chunk * row.max(1)).enumerate().map(convert).reduce(|| None, merge)
}

fn merge(a: Option<BadValues>, b: Option<BadValues>) -> Option<BadValues> {
    match (a, b) {
        (Some(a), Some(b)) => Some(BadValues { count: a.count + b.count, value: a.value }),
        (a, b) => a.or(b),
    }
}

/// Little-endian file elements as f32. A file's data need not be aligned.
fn decode(bytes: &[u8], dtype: FileDtype, to: &mut [f32]) {
    fn each<const SIZE: usize>(to: &mut [f32], bytes: &[u8], value: impl Fn([u8; SIZE]) -> f32) {
        let (elements, _) = bytes.as_chunks::<SIZE>();
        to.iter_mut().zip(elements).for_each(|(to, &element)| *to = value(element));
    }
    match dtype {
        FileDtype::F64 => each(to, bytes, |v| f64::from_le_bytes(v) as f32),
        FileDtype::F32 => each(to, bytes, f32::from_le_bytes),
        FileDtype::BF16 => each(to, bytes, |v| bf16::from_le_bytes(v).to_f32()),
        FileDtype::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
            Ok(values) if cfg!(target_endian = "little") => values.convert_to_f32_slice(to), // vector instructions
            _ => each(to, bytes, |v| f16::from_le_bytes(v).to_f32()),
        },
        FileDtype::F8_E4M3 => each(to, bytes, |[v]: [u8; 1]| f8_to_f32(v, 3)),
        FileDtype::F8_E5M2 => each(to, bytes, |[v]: [u8; 1]| f8_to_f32(v, 2)),
        _ => unreachable!("take() lets only these through"),
    }
}

/// An 8-bit float with `mantissa` bits of fraction: E4M3 without infinities (OCP 8-bit floating point, 2023), or E5M2.
fn f8_to_f32(bits: u8, mantissa: u32) -> f32 {
    let exponent_bits = 7 - mantissa;
    let bias = (1i32 << (exponent_bits - 1)) - 1;
    let fraction = u32::from(bits) & ((1 << mantissa) - 1);
    let exponent = (u32::from(bits) >> mantissa) & ((1 << exponent_bits) - 1);
    let magnitude = match (exponent_bits, exponent, fraction) {
        (4, 15, 7) => f32::NAN,
        (5, 31, 0) => f32::INFINITY,
        (5, 31, _) => f32::NAN,
        (_, 0, fraction) => fraction as f32 * 2f32.powi(1 - bias - mantissa as i32),
        _ => ((1 << mantissa) + fraction) as f32 * 2f32.powi(exponent as i32 - bias - mantissa as i32),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The values of a row that become NaN or infinity in `dtype`: from half a unit above its largest value on.
fn out_of_range(bytes: &[u8], file_dtype: FileDtype, values: &[f32], dtype: DType) -> Option<BadValues> {
    let limit = match dtype {
        DType::F16 => 65520.0,
        DType::BF16 => f32::from_bits(0x7f7f_8000),
        DType::F32 | DType::U32 | DType::F8E4M3 => f32::INFINITY,
    };
    let count = values.iter().filter(|value| value.abs() >= limit || value.is_nan()).count();
    if count == 0 {
        return None;
    }
    let i = values.iter().position(|value| value.abs() >= limit || value.is_nan()).unwrap_or(0);
    let value = match file_dtype {
        FileDtype::F64 => bytemuck::cast_slice::<u8, [u8; 8]>(bytes).get(i).map_or(0.0, |&v| f64::from_le_bytes(v)),
        _ => f64::from(values[i]),
    };
    Some(BadValues { count, value })
}

/// The whole tensor in f32, as a layer's checkpoint shape has it: its scale and its strides are applied.
pub(in crate::models) fn read_f32(entry: &Entry) -> Vec<f32> {
    let values = stored_f32(entry);
    match &entry.strides {
        None => values,
        Some(strides) => places(&entry.shape, strides).map(|place| values[place]).collect(),
    }
}

/// What is between a tensor's first and last element, in f32 and the order of the file: its scale is applied.
pub(super) fn stored_f32(entry: &Entry) -> Vec<f32> {
    let bytes = entry.bytes();
    let size = entry.dtype.bitsize() / 8;
    let mut values = vec![0.0; bytes.len() / size];
    values
        .par_chunks_mut(CHUNK)
        .zip(bytes.par_chunks(CHUNK * size))
        .for_each(|(to, from)| decode(from, entry.dtype, to));
    if let Some(scale) = &entry.scale {
        let scale = read_f32(scale);
        let row = values.len().div_ceil(scale.len()).max(1);
        values.par_chunks_mut(row).zip(&scale).for_each(|(row, scale)| row.iter_mut().for_each(|v| *v *= scale));
    }
    values
}
