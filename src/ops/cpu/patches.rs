//! Patches on the host: whole patches at a time, where a card goes by the map's cells.

use rayon::prelude::*;

use crate::ops::step::{CpuOutput, Output};
use crate::ops::{PatchLayout, Patches, Restandardised, StepTable, by_dtype};
use crate::runtime::{Element, Tensor};

/// Row and column of the first cell of patch `index` of an image.
fn origin(patches: &Patches, image: usize, index: usize) -> [i64; 2] {
    let (origins, _) = patches.tensors();
    let at = 2 * (image * patches.total() + index);
    [0, 1].map(|axis| i64::from(origins.cpu::<u32>()[at + axis] as i32))
}

/// The map's row of each of the patch's, or column; `None` outside of the map.
fn positions(layout: PatchLayout, axis: usize, from: i64) -> Vec<Option<usize>> {
    let length = layout.map[axis] as i64;
    let position = |i: usize| {
        let at = from + (i * layout.stride) as i64;
        let at = if layout.wraps && axis == 1 { at.rem_euclid(length) } else { at };
        (0..length).contains(&at).then_some(at as usize)
    };
    (0..layout.size[axis]).map(position).collect()
}

pub fn gather(
    x: &Tensor,
    patches: &Patches,
    restandardised: Option<Restandardised>,
    steps: &StepTable,
    repeats: usize,
    y: &mut Tensor,
) {
    by_dtype!(y.dtype(), T => gather_as::<T>(x, patches, restandardised, steps, repeats, y));
}

fn gather_as<T: Element>(
    x: &Tensor,
    patches: &Patches,
    restandardised: Option<Restandardised>,
    steps: &StepTable,
    repeats: usize,
    y: &mut Tensor,
) {
    let (layout, group) = (patches.layout(), patches.group());
    let ([height, width], [h, w], c) = (layout.map, layout.size, x.shape()[3]);
    let scale = steps.row(0).input_scale;
    let (per_patch, x) = (h * w * c, x.cpu::<f32>());
    let half = y.numel() / repeats;
    let (first, others) = y.cpu_mut::<T>().split_at_mut(half);
    first.par_chunks_exact_mut(per_patch).enumerate().for_each(|(patch, y)| {
        let (image, index) = (patch / group.len(), group.start + patch % group.len());
        let [top, left] = origin(patches, image, index);
        let (rows, columns) = (positions(layout, 0, top), positions(layout, 1, left));
        let moments = restandardised.map(|Restandardised { from, to }| {
            let of = |moments: &Tensor| [moments.cpu::<f32>()[2 * image], moments.cpu::<f32>()[2 * image + 1]];
            (of(from), of(to))
        });
        let cells = rows.iter().flat_map(|row| columns.iter().map(move |column| row.zip(*column)));
        for (cell, y) in cells.zip(y.chunks_exact_mut(c)) {
            let Some((row, column)) = cell else {
                y.fill(T::from_f32(scale * 0.0));
                continue;
            };
            let from = &x[((image * height + row) * width + column) * c..][..c];
            for (y, &value) in y.iter_mut().zip(from) {
                let value = match moments {
                    Some(([mean, std], [new_mean, new_std])) => (value - mean) * (new_std / std) + new_mean,
                    None => value,
                };
                *y = T::from_f32(scale * value);
            }
        }
    });
    others.chunks_exact_mut(half).for_each(|other| other.copy_from_slice(first));
}

pub fn merge(values: &Tensor, patches: &Patches, [rows, columns]: [&Tensor; 2], y: &mut Tensor) {
    let (layout, total) = (patches.layout(), patches.total());
    let ([height, width], [h, w], c) = (layout.map, layout.size, y.shape()[3]);
    let [row_weights, column_weights] = [rows, columns].map(|weights| weights.cpu::<f32>());
    let of_images = y.cpu_mut::<f32>().par_chunks_exact_mut(height * width * c);
    of_images.zip(values.cpu::<f32>().par_chunks_exact(total * h * w * c)).enumerate().for_each(
        |(image, (y, values))| {
            y.fill(0.0);
            let mut sums = vec![0.0f32; height * width];
            for (index, patch) in values.chunks_exact(h * w * c).enumerate() {
                let [top, left] = origin(patches, image, index);
                let (rows, columns) = (positions(layout, 0, top), positions(layout, 1, left));
                for (i, row) in rows.iter().enumerate() {
                    for (j, column) in columns.iter().enumerate() {
                        let (&Some(row), &Some(column)) = (row, column) else { continue };
                        let (weight, cell) = (row_weights[i] * column_weights[j], row * width + column);
                        sums[cell] += weight;
                        let values = &patch[(i * w + j) * c..][..c];
                        y[cell * c..][..c].iter_mut().zip(values).for_each(|(y, value)| *y += weight * value);
                    }
                }
            }
            for (y, &sum) in y.chunks_exact_mut(c).zip(&sums).filter(|(_, sum)| **sum != 0.0) {
                y.iter_mut().for_each(|y| *y /= sum);
            }
        },
    );
}

pub fn step(x: &Tensor, patches: &Patches, output: &Output, steps: &StepTable, sums: &mut Tensor) {
    by_dtype!(output.values.dtype(), T => step_as::<T>(x, patches, output, steps, sums));
}

fn step_as<T: Element>(x: &Tensor, patches: &Patches, output: &Output, steps: &StepTable, sums: &mut Tensor) {
    let (layout, group, total) = (patches.layout(), patches.group(), patches.total());
    let ([height, width], [h, w], c) = (layout.map, layout.size, x.shape()[3]);
    let k = steps.row(0).coefficients;
    let clip = k.clip.unwrap_or(f32::INFINITY);
    let (per_image, per_patch) = (height * width * c, h * w * c);
    let (output, x) = (CpuOutput::<T>::new(output), x.cpu::<f32>());
    let of_images = sums.cpu_mut::<f32>().par_chunks_exact_mut(per_image).zip(x.par_chunks_exact(per_image));
    of_images.enumerate().for_each(|(image, (sums, x))| {
        if group.start == 0 {
            sums.fill(0.0);
        }
        // Every cell of the patch that is on the map: its place there and in the patch.
        let each_cell = |index: usize, visit: &mut dyn FnMut(usize, usize)| {
            let [top, left] = origin(patches, image, index);
            let columns = positions(layout, 1, left);
            for (i, row) in positions(layout, 0, top).into_iter().enumerate() {
                for (j, column) in columns.iter().enumerate() {
                    if let (Some(row), Some(column)) = (row, column) {
                        visit(row * width + column, i * w + j);
                    }
                }
            }
        };
        for index in group.clone() {
            let patch = image * group.len() + index - group.start;
            each_cell(index, &mut |on_map, in_patch| {
                for channel in 0..c {
                    let e = output.at(patch * per_patch + in_patch * c + channel, patch);
                    let now = x[on_map * c + channel];
                    let clean = (k.x0_from_x * now + k.x0_from_e * e).clamp(-clip, clip);
                    sums[on_map * c + channel] += k.next_from_x * now + k.next_from_e * e + k.next_from_x0 * clean;
                }
            });
        }
        if group.end == total {
            let mut holders = vec![0u32; height * width];
            (0..total).for_each(|index| each_cell(index, &mut |on_map, _| holders[on_map] += 1));
            for ((sums, x), holders) in sums.chunks_exact_mut(c).zip(x.chunks_exact(c)).zip(holders) {
                match holders {
                    0 => sums.copy_from_slice(x),
                    _ => sums.iter_mut().for_each(|sum| *sum /= holders as f32),
                }
            }
        }
    });
}
