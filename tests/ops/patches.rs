//! gather_patches and step_patches against plain f64 loops over the cells of the map.

use crate::common::{Expected, Random, assert_close, cards, devices, f64s};
use megafuse::Error;
use megafuse::ops::{
    self, Guidance, GuidanceScale, PatchLayout, Patches, Restandardised, StepCoefficients, StepRow, StepTable,
};
use megafuse::runtime::{DType, Device, MetaDevice, Tensor};

/// Images, channels, map, patch, stride, wraps, and each image's origins, as many for all; some hang over every edge, some
/// cells are in none, more than a block's 256 elements, one element.
struct Case {
    images: usize,
    channels: usize,
    layout: PatchLayout,
    origins: Vec<[i32; 2]>,
}

fn layout(map: [usize; 2], size: [usize; 2], stride: usize, wraps: bool) -> PatchLayout {
    PatchLayout { map, size, stride, wraps }
}

fn cases() -> Vec<Case> {
    let case =
        |images, channels, layout, origins: &[[i32; 2]]| Case { images, channels, layout, origins: origins.into() };
    vec![
        case(1, 1, layout([1, 1], [1, 1], 1, false), &[[0, 0]]),
        case(
            2,
            4,
            layout([9, 7], [5, 4], 1, false),
            // Over the four edges, beyond one, and inside; another image's lie elsewhere.
            &[[-2, -1], [3, 4], [5, -3], [-5, 2], [1, 1], [2, 3], [0, 0], [4, 3], [-1, 5], [6, 2]],
        ),
        case(1, 3, layout([6, 11], [6, 5], 1, true), &[[0, 0], [0, 4], [0, 8], [-2, 10], [1, 7]]),
        case(2, 4, layout([7, 5], [3, 2], 3, false), &{
            let origins = (0..9).map(|i| [i / 3 - 2, i % 3 - 1]);
            origins.clone().chain(origins.rev()).collect::<Vec<_>>()
        }),
        case(1, 5, layout([12, 8], [4, 3], 2, true), &[[0, 1], [1, 7], [3, 4]]),
    ]
}

/// Rows of coefficients, of which the second is taken.
fn steps(device: &Device, clip: Option<f32>) -> StepTable {
    let row = |i: usize| StepRow {
        input_scale: [0.3, 0.7][i],
        coefficients: StepCoefficients {
            x0_from_x: 1.25,
            x0_from_e: -0.75,
            clip,
            next_from_x: [0.1, 0.3][i],
            next_from_e: 0.4,
            next_from_x0: [0.2, 0.9][i],
            ..StepCoefficients::default()
        },
    };
    let mut steps = StepTable::new(device, vec![row(0), row(1)]).unwrap();
    steps.index_mut().set(&[1]).unwrap();
    steps
}

fn patches(device: &Device, case: &Case) -> Patches {
    let total = case.origins.len() / case.images;
    let mut patches = Patches::new(device, case.images, total, case.layout).unwrap();
    patches.place(&case.origins).unwrap();
    patches
}

impl Case {
    fn total(&self) -> usize {
        self.origins.len() / self.images
    }

    /// The map's cell under a patch's: row and column, if it is on the map.
    fn on_map(&self, image: usize, index: usize, i: usize, j: usize) -> Option<[usize; 2]> {
        let PatchLayout { map, stride, wraps, .. } = self.layout;
        let [top, left] = self.origins[image * self.total() + index].map(|at| at as isize);
        let (row, column) = (top + (i * stride) as isize, left + (j * stride) as isize);
        let column = if wraps { column.rem_euclid(map[1] as isize) } else { column };
        let inside = (0..map[0] as isize).contains(&row) && (0..map[1] as isize).contains(&column);
        inside.then_some([row as usize, column as usize])
    }

    /// Of a group, every value of every patch: image, patch within the group, row, column, channel.
    fn values(&self, group: std::ops::Range<usize>) -> Vec<[usize; 5]> {
        let [h, w] = self.layout.size;
        let mut all = Vec::new();
        for image in 0..self.images {
            for index in group.clone() {
                for at in 0..h * w * self.channels {
                    let cell = at / self.channels;
                    all.push([image, index, cell / w, cell % w, at % self.channels]);
                }
            }
        }
        all
    }

    fn map_index(&self, image: usize, [row, column]: [usize; 2], channel: usize) -> usize {
        let [height, width] = self.layout.map;
        ((image * height + row) * width + column) * self.channels + channel
    }

    fn shape(&self) -> [usize; 4] {
        let [height, width] = self.layout.map;
        [self.images, height, width, self.channels]
    }
}

/// The groups of at most `most` patches.
fn groups(total: usize, most: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..total).step_by(most).map(move |first| first..total.min(first + most))
}

#[test]
fn gathers_scaled_cells_and_zeros_outside() {
    for device in devices() {
        for (number, case) in cases().iter().enumerate() {
            let mut random = Random::new(1);
            let x = random.randn(&device, &case.shape(), DType::F32);
            let [from, to] = [0, 1].map(|_| random.tensor(&device, &[case.images, 2], DType::F32, 1.0, 0.1));
            let (x_values, from_values, to_values) = (f64s(&x), f64s(&from), f64s(&to));
            let (steps, mut patches) = (steps(&device, None), patches(&device, case));
            for (dtype, restandardised) in DType::FLOATS.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
                for (repeats, group) in [1, 2].into_iter().zip(groups(case.total(), 3).chain(groups(case.total(), 1))) {
                    patches.begin_group(group.clone()).unwrap();
                    let moments = restandardised.then_some(Restandardised { from: &from, to: &to });
                    let got = ops::gather_patches(&x, &patches, moments, &steps, dtype, repeats).unwrap();
                    let value = |&[image, index, i, j, channel]: &[usize; 5]| {
                        let Some(at) = case.on_map(image, index, i, j) else { return (0.0, 0.0) };
                        let value = x_values[case.map_index(image, at, channel)];
                        let of = |moments: &[f64]| [moments[2 * image], moments[2 * image + 1]];
                        let ([mean, std], [new_mean, new_std]) = (of(&from_values), of(&to_values));
                        let (value, size) = match restandardised {
                            true => (
                                (value - mean) * (new_std / std) + new_mean,
                                (value.abs() + mean.abs()) * (new_std / std) + new_mean.abs(),
                            ),
                            false => (value, value.abs()),
                        };
                        (f64::from(0.7f32) * value, size)
                    };
                    let of_one: Vec<(f64, f64)> = case.values(group.clone()).iter().map(value).collect();
                    let (values, magnitudes) = of_one.repeat(repeats).into_iter().unzip();
                    let [h, w] = case.layout.size;
                    let shape = vec![repeats * case.images * group.len(), h, w, case.channels];
                    // Three roundings and the scale's.
                    assert_close(
                        &got,
                        &Expected { shape, values, magnitudes },
                        4.0,
                        format!("{device} case {number} group {group:?} restandardised {restandardised}"),
                    );
                }
            }
        }
    }
}

/// The weighed mean over the patches that hold a cell, of all images at once; where none does, 0.
#[test]
fn merges_patches_by_the_weights_of_their_rows_and_columns() {
    for device in devices() {
        for (number, case) in cases().iter().enumerate() {
            let (mut random, [h, w]) = (Random::new(3), case.layout.size);
            let values = random.randn(&device, &[case.images * case.total(), h, w, case.channels], DType::F32);
            let weights = [h, w].map(|n| (0..n).map(|_| 0.05 + random.uniform() as f32).collect::<Vec<_>>());
            let [rows, columns] =
                weights.clone().map(|of| Tensor::from_f32(&device, &[of.len()], DType::F32, &of).unwrap());
            let patches = patches(&device, case);
            let got = ops::merge_patches(&values, &patches, &rows, &columns).unwrap();

            let (x, cells) = (f64s(&values), case.shape().iter().product());
            let (mut sums, mut sizes, mut held) = (vec![0.0; cells], vec![0.0; cells], vec![0.0; cells]);
            for ([image, index, i, j, channel], value) in case.values(0..case.total()).into_iter().zip(x) {
                let Some(at) = case.on_map(image, index, i, j) else { continue };
                let (cell, weight) = (case.map_index(image, at, channel), f64::from(weights[0][i] * weights[1][j]));
                sums[cell] += weight * value;
                sizes[cell] += weight * value.abs();
                held[cell] += weight;
            }
            let mean = |(sum, held): (&f64, &f64)| if *held == 0.0 { 0.0 } else { sum / held };
            let values = sums.iter().zip(&held).map(mean).collect();
            let magnitudes = sizes.iter().zip(&held).map(mean).collect();
            let expected = Expected { shape: case.shape().into(), values, magnitudes };
            // A rounding per patch and of the quotient.
            assert_close(&got, &expected, 4.0 + case.total() as f64, format!("{device} case {number}"));
        }
    }
}

/// Patches of every size of group: the mean over the patches that hold a cell, to the last bit the same.
#[test]
fn steps_patches_and_averages_them_whatever_the_groups() {
    for device in devices() {
        for (number, case) in cases().iter().enumerate() {
            for (dtype, guidance) in
                [(DType::F32, None), (DType::F32, Some(3.5)), (DType::BF16, Some(2.0)), (DType::F16, None)]
            {
                let clip = (number % 2 == 0).then_some(0.8);
                let mut random = Random::new(2);
                let x = random.randn(&device, &case.shape(), DType::F32);
                let [h, w] = case.layout.size;
                let per_patch = h * w * case.channels;
                // [halves][image][patch][...], as one group has them.
                let halves = if guidance.is_some() { 2 } else { 1 };
                let shape = [halves * case.images * case.total(), h, w, case.channels];
                let output = random.randn(&device, &shape, dtype);
                let (steps, mut patches) = (steps(&device, clip), patches(&device, case));
                let mut means = Vec::new();
                for most in [case.total(), 1, 2] {
                    let mut sums = Tensor::uninit(&device, &case.shape(), DType::F32).unwrap();
                    for group in groups(case.total(), most) {
                        let part = |patch: usize| {
                            let first = patch * case.total() + group.start;
                            output.rows(first..first + group.len()).unwrap()
                        };
                        let parts: Vec<Tensor> = (0..halves * case.images).map(part).collect();
                        let part = Tensor::concat(&parts).unwrap();
                        let guided =
                            guidance.map(|scale| Guidance::uniform(&device, case.images * group.len(), scale).unwrap());
                        patches.begin_group(group).unwrap();
                        ops::step_patches(&x, &patches, &part, guided.as_ref(), &steps, &mut sums).unwrap();
                    }
                    means.push(sums);
                }
                let what = format!("{device} case {number} {dtype} guidance {guidance:?}");
                let bits = |x: &Tensor| x.to_f32_vec().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(means.iter().all(|mean| bits(mean) == bits(&means[0])), "{what}: other bits in other groups");

                let (x, e, scale) = (f64s(&x), f64s(&output), guidance.map(f64::from));
                let mut sums = vec![(0.0, 0.0, 0); x.len()];
                for [image, index, i, j, channel] in case.values(0..case.total()) {
                    let Some(at) = case.on_map(image, index, i, j) else { continue };
                    let at = case.map_index(image, at, channel);
                    let patch = image * case.total() + index;
                    let of_half = |half: usize| {
                        e[(half * case.images * case.total() + patch) * per_patch
                            + (i * w + j) * case.channels
                            + channel]
                    };
                    let (e, e_size) = match scale {
                        None => (of_half(0), of_half(0).abs()),
                        Some(scale) => {
                            let (u, c) = (of_half(0), of_half(1));
                            (u + scale * (c - u), u.abs() + scale * (c.abs() + u.abs()))
                        }
                    };
                    let clean = 1.25 * x[at] - 0.75 * e;
                    let clipped = clip.map_or(clean, |clip: f32| clean.clamp(-f64::from(clip), f64::from(clip)));
                    let [from_x, from_e, from_x0] = [0.3f32, 0.4, 0.9].map(f64::from);
                    let (sum, size, holders) = &mut sums[at];
                    *sum += from_x * x[at] + from_e * e + from_x0 * clipped;
                    *size += 2.0 * (x[at].abs() + e_size);
                    *holders += 1;
                }
                let mean = |(at, &(sum, size, holders)): (usize, &(f64, f64, usize))| match holders {
                    0 => (x[at], 0.0),
                    n => (sum / n as f64, size / n as f64),
                };
                let (values, magnitudes) = sums.iter().enumerate().map(mean).unzip();
                let want = Expected { shape: case.shape().to_vec(), values, magnitudes };
                // Roundings of a step, then of the sum over at most nine patches.
                assert_close(&means[0], &want, 6.0, what);
            }
        }
    }
}

/// A variance that the network predicts is left alone, whatever it is: the same bits as without.
#[test]
fn a_predicted_variance_is_not_read() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        let case = &cases()[1];
        let mut random = Random::new(6);
        let (x, table) = (random.randn(&device, &case.shape(), DType::F32), steps(&device, Some(1.0)));
        let mut patches = patches(&device, case);
        patches.begin_group(0..case.total()).unwrap();
        for guided in [false, true] {
            let images = case.images * case.total();
            let [h, w] = case.layout.size;
            let rows = if guided { 2 * images } else { images };
            let output = random.randn(&device, &[rows, h, w, case.channels], dtype);
            let values = output.to_f32_vec().unwrap();
            let pixels = values.chunks(case.channels).map(|pixel| [pixel, &vec![f32::NAN; case.channels]].concat());
            let wide: Vec<f32> = pixels.flatten().collect();
            let wide = Tensor::from_f32(&device, &[rows, h, w, 2 * case.channels], dtype, &wide).unwrap();
            let scale = GuidanceScale { scale: 4.0, rescale: 0.7 };
            let guidance = guided.then(|| Guidance::new(&device, &vec![scale; images]).unwrap());
            let [narrow, wide] = [&output, &wide].map(|output| {
                let mut sums = Tensor::uninit(&device, x.shape(), DType::F32).unwrap();
                ops::step_patches(&x, &patches, output, guidance.as_ref(), &table, &mut sums).unwrap();
                sums.to_f32_vec().unwrap()
            });
            assert!(narrow == wide && narrow.iter().all(|v| v.is_finite()), "{device} {dtype} guided {guided}");
        }
    }
}

/// Of guidance that rescales, the deviations are those of each patch.
#[test]
fn guidance_is_rescaled_patch_by_patch() {
    for device in devices() {
        let mut random = Random::new(3);
        let layout = layout([4, 6], [4, 3], 1, false);
        let mut both = Patches::new(&device, 1, 2, layout).unwrap();
        both.place(&[[0, 0], [0, 3]]).unwrap();
        let (x, output) =
            (random.randn(&device, &[1, 4, 6, 4], DType::F32), random.randn(&device, &[4, 4, 3, 4], DType::F32));
        let scale = GuidanceScale { scale: 4.0, rescale: 0.7 };
        let (steps, mut sums) = (steps(&device, None), Tensor::uninit(&device, &[1, 4, 6, 4], DType::F32).unwrap());
        both.begin_group(0..2).unwrap();
        let guidance = Guidance::new(&device, &[scale; 2]).unwrap();
        ops::step_patches(&x, &both, &output, Some(&guidance), &steps, &mut sums).unwrap();
        // The same patches as whole samples.
        let halves = |half: usize| {
            let rows = f64s(&x);
            let columns = (0..4 * 3).flat_map(|cell| {
                let first = (cell / 3 * 6 + half * 3 + cell % 3) * 4;
                rows[first..first + 4].to_vec()
            });
            columns.map(|v| v as f32).collect::<Vec<f32>>()
        };
        let samples = Tensor::from_f32(&device, &[2, 4, 3, 4], DType::F32, &[halves(0), halves(1)].concat()).unwrap();
        let mut state = ops::SampleState::new(samples).unwrap();
        ops::sampler_step(&mut state, &output, Some(&guidance), &steps, None).unwrap();
        let (want, got) = (state.x().to_f32_vec().unwrap(), sums.to_f32_vec().unwrap());
        for (i, want) in want.iter().enumerate() {
            let (half, cell, channel) = (i / 48, i % 48 / 4, i % 4);
            assert_eq!(got[(cell / 3 * 6 + half * 3 + cell % 3) * 4 + channel], *want, "{device} element {i}");
        }
    }
}

/// Origins, group and step are read at the replay.
#[test]
fn a_replay_reads_the_group_and_the_origins_of_its_time() {
    for device in cards() {
        let Device::Cuda(card) = &device else { unreachable!() };
        let case = &cases()[1];
        let mut random = Random::new(4);
        let x = random.randn(&device, &case.shape(), DType::F32);
        let table = steps(&device, None);
        let moved: Vec<[i32; 2]> = case.origins.iter().rev().copied().collect();
        let outcome = |recorded: bool| {
            let mut sums = Tensor::zeros(&device, &case.shape(), DType::F32).unwrap();
            let mut patches = patches(&device, case);
            // One patch of five: what a group's is, is not known before.
            patches.begin_group(0..1).unwrap();
            let step = |patches: &Patches, sums: &mut Tensor| {
                let output = ops::gather_patches(&x, patches, None, &table, DType::F32, 2)?;
                let guidance = None;
                let first = output.rows(0..case.images)?;
                ops::step_patches(&x, patches, &first, guidance, &table, sums)
            };
            let graph = recorded.then(|| card.capture(0, || step(&patches, &mut sums)).unwrap());
            for origins in [&case.origins, &moved] {
                patches.place(origins).unwrap();
                for group in groups(case.total(), 1) {
                    patches.begin_group(group).unwrap();
                    match &graph {
                        Some(graph) => graph.replay().unwrap(),
                        None => step(&patches, &mut sums).unwrap(),
                    }
                }
            }
            if let Some(graph) = &graph {
                assert_eq!(graph.kernels(), ["gather_patches_f32", "step_patches_f32"]);
            }
            sums.to_f32_vec().unwrap()
        };
        assert_eq!(outcome(true), outcome(false), "{device}: bit for bit");
    }
}

/// An image's patches do not depend on those of the others.
#[test]
fn an_image_does_not_depend_on_its_batch() {
    for device in devices() {
        let case = &cases()[1];
        let mut random = Random::new(5);
        let x = random.randn(&device, &case.shape(), DType::F32);
        let table = steps(&device, None);
        let outcome = |images: std::ops::Range<usize>| {
            let x = x.rows(images.clone()).unwrap();
            let origins = &case.origins[images.start * case.total()..images.end * case.total()];
            let mut patches = Patches::new(&device, images.len(), case.total(), case.layout).unwrap();
            patches.place(origins).unwrap();
            let output = ops::gather_patches(&x, &patches, None, &table, DType::BF16, 1).unwrap();
            let mut sums = Tensor::uninit(&device, x.shape(), DType::F32).unwrap();
            ops::step_patches(&x, &patches, &output, None, &table, &mut sums).unwrap();
            sums.to_f32_vec().unwrap()
        };
        assert_eq!(outcome(0..2), [outcome(0..1), outcome(1..2)].concat(), "{device}");
    }
}

/// NaN of the output goes where the patch is, NaN of the map where the cell is.
#[test]
fn values_that_are_not_finite_are_seen() {
    for device in devices() {
        let layout = layout([3, 3], [2, 3], 1, false);
        let mut patches = Patches::new(&device, 1, 2, layout).unwrap();
        patches.place(&[[0, 0], [1, 0]]).unwrap();
        let x = Tensor::zeros(&device, &[1, 3, 3, 1], DType::F32).unwrap();
        let values: Vec<f32> = (0..12).map(|i| if i == 8 { f32::NAN } else { 0.0 }).collect();
        let output = Tensor::from_f32(&device, &[2, 2, 3, 1], DType::F32, &values).unwrap();
        let mut sums = Tensor::uninit(&device, &[1, 3, 3, 1], DType::F32).unwrap();
        ops::step_patches(&x, &patches, &output, None, &steps(&device, Some(1.0)), &mut sums).unwrap();
        let nan: Vec<bool> = sums.to_f32_vec().unwrap().iter().map(|x| x.is_nan()).collect();
        assert_eq!(nan, [false, false, false, false, false, true, false, false, false], "{device}");
    }
}

#[test]
fn meta_records_a_launch_for_each() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let mut patches = Patches::new(&device, 2, 3, layout([8, 9], [4, 5], 1, false)).unwrap();
    let table = steps(&device, None);
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let (x, mut sums) = (zeros(&[2, 8, 9, 4], DType::F32), zeros(&[2, 8, 9, 4], DType::F32));
    patches.begin_group(0..2).unwrap();
    let y = ops::gather_patches(&x, &patches, None, &table, DType::F16, 2).unwrap();
    assert_eq!((y.shape(), y.dtype()), (&[8, 4, 5, 4][..], DType::F16));
    let guidance = Guidance::uniform(&device, 4, 2.0).unwrap();
    ops::step_patches(&x, &patches, &y, Some(&guidance), &table, &mut sums).unwrap();
    let records: Vec<_> = meta.take_report().ops.iter().map(|op| (op.op, op.work.launches, op.work.bytes)).collect();
    // 320 values are read in f32 and written twice in f16; the map is read twice and written, the output read.
    let want = [("gather_patches", 1, 4 * 320 + 2 * 640), ("step_patches", 1, 3 * 4 * 576 + 2 * 640)];
    assert_eq!(records, want);
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let good = layout([8, 9], [4, 5], 1, false);
    let argument = |result: megafuse::Result<Patches>| match result.map(drop).unwrap_err() {
        Error::Argument { arg, .. } => arg,
        other => panic!("{other}"),
    };
    assert_eq!(argument(Patches::new(&device, 1, 0, good)), "layout");
    assert_eq!(argument(Patches::new(&device, 1, 1, PatchLayout { stride: 0, ..good })), "layout");
    assert_eq!(argument(Patches::new(&device, 1, 1, PatchLayout { size: [1 << 19, 5], stride: 4, ..good })), "layout");
    let mut patches = Patches::new(&device, 1, 2, PatchLayout { wraps: true, ..good }).unwrap();
    for origins in [&[[0, 0]][..], &[[0, 0], [0, 9]], &[[0, 0], [0, -1]], &[[0, 0], [1 << 21, 0]]] {
        assert!(matches!(patches.place(origins).unwrap_err(), Error::Argument { arg: "origins", .. }), "{origins:?}");
    }
    for group in [0..0, 1..3] {
        assert!(matches!(patches.begin_group(group).unwrap_err(), Error::Argument { arg: "group", .. }));
    }
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let (x, table) = (zeros(&[1, 8, 9, 4], DType::F32), steps(&device, None));
    let gather = |x: &Tensor, steps: &StepTable, dtype, repeats| {
        ops::gather_patches(x, &patches, None, steps, dtype, repeats).unwrap_err()
    };
    assert!(matches!(gather(&zeros(&[1, 9, 8, 4], DType::F32), &table, DType::F32, 1), Error::Shape { arg: "x", .. }));
    assert!(matches!(gather(&zeros(&[1, 8, 9, 4], DType::F16), &table, DType::F32, 1), Error::Dtype { arg: "x", .. }));
    assert!(matches!(gather(&x, &table, DType::U32, 1), Error::Dtype { arg: "dtype", .. }));
    assert!(matches!(gather(&x, &table, DType::F32, 0), Error::Argument { arg: "repeats", .. }));
    let two = StepTable::new(&device, table.rows().to_vec()).unwrap().with_images(2).unwrap();
    assert!(matches!(gather(&x, &two, DType::F32, 1), Error::Argument { .. }));
    let mut sums = zeros(&[1, 8, 9, 4], DType::F32);
    let mut step = |output: &Tensor, table: &StepTable| {
        ops::step_patches(&x, &patches, output, None, table, &mut sums).unwrap_err()
    };
    assert!(matches!(step(&zeros(&[1, 4, 5, 4], DType::F32), &table), Error::Shape { arg: "model_output", .. }));
    let wide = Patches::new(&device, 1, 1, PatchLayout { size: [4, 10], wraps: true, ..good }).unwrap();
    let output = zeros(&[1, 4, 10, 4], DType::F32);
    let error = ops::step_patches(&x, &wide, &output, None, &table, &mut x.duplicate().unwrap()).unwrap_err();
    assert!(matches!(error, Error::Argument { arg: "columns of a patch", .. }), "{error}");
    let noisy = StepCoefficients { next_from_noise: 1.0, ..StepCoefficients::default() };
    let noisy = StepTable::new(&device, vec![StepRow { input_scale: 1.0, coefficients: noisy }]).unwrap();
    assert!(matches!(step(&zeros(&[2, 4, 5, 4], DType::F32), &noisy), Error::Argument { arg: "steps", .. }));
}
