//! The profile of the ops, and the records of the meta device that it is compared with.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::devices;
use megafuse::Result;
use megafuse::ops::{
    self, Activation, Attention, Conv2d, ConvNorm, GroupMoments, GroupNorm, Guidance, GuidanceScale, LayerNorm, Linear,
    RmsNorm, SampleState, Source, StepCoefficients, StepIndex, StepRow, StepTable, Thresholding, TimestepEmbedding,
    Upsampler, profile,
};
use megafuse::runtime::{DType, Device, Tensor};

/// A prime that no other test has for a size, so that the keys of tests that run at the same time are not taken for ours.
const ROWS: usize = 41;

/// Calls every op once.
fn every_op(device: &Device) -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(device, shape, DType::F32);
    let (x, gamma) = (zeros(&[1, ROWS, 3, 4])?, zeros(&[4])?);
    let norm = ConvNorm { gamma: &gamma, beta: &gamma, groups: 2, eps: 1e-5, silu: false };

    ops::activation(&x, Activation::Silu)?;
    ops::add(&x, &x)?;
    ops::add_noise(&x, &x, 0.6, 0.8)?;
    ops::attention(Attention::Packed { qkv: &zeros(&[1, ROWS, 3, 2, 8])?, causal: false })?;
    ops::clamp(&x, -1.0, 1.0)?;
    ops::conv2d(Conv2d::new(&x, &zeros(&[5, 3, 3, 4])?))?;
    ops::count_non_finite(&x)?;
    ops::diagonal_gaussian(&x, None)?;
    let ids = Tensor::from_u32(device, &[1, ROWS], &[0; ROWS])?;
    ops::embedding(&ids, &zeros(&[2, 8])?, &zeros(&[ROWS, 8])?)?;
    ops::group_norm(GroupNorm { silu: true, ..norm.of(Source::One(&x)) })?;
    // More than 1024 pixels, so that a card has something to do at the end too.
    let image = zeros(&[1, ROWS, 29, 4])?;
    let mut moments = GroupMoments::new(norm, [1, ROWS, 29, 4])?;
    moments.add(&image)?;
    moments.finish()?;
    ops::layer_norm(LayerNorm { x: &x, gamma: &gamma, beta: &gamma, eps: 1e-5 })?;
    ops::linear(Linear::new(&x, &zeros(&[6, 4])?))?;
    ops::resize(&x, [2 * ROWS, 5], Upsampler::Bicubic, None, None)?;
    ops::resize_nearest(&x, [2 * ROWS, 5])?;
    ops::resize_u8(&x, [2 * ROWS, 5], Upsampler::Bilinear)?;
    ops::rms_norm(RmsNorm { x: &x, gamma: &gamma, eps: 1e-5 })?;
    ops::scale_cast(&x, 2.0, 1.0, DType::F16, 2)?;
    let e = TimestepEmbedding { dim: 8, flip_sin_to_cos: true, freq_shift: 0.0 };
    ops::timestep_embedding(&[7.0; ROWS], e, device, DType::F32)?;

    // The passes before the step have a result per image.
    let samples = [ROWS, 2, 3, 4];
    let row = StepRow { input_scale: 1.0, coefficients: StepCoefficients::default() };
    let steps = StepTable::new(device, vec![row; 2])?;
    let mut steps = steps.with_images(ROWS)?.with_thresholding(Some(Thresholding { ratio: 0.9, max: 1.0 }))?;
    ops::scale_input(&zeros(&samples)?, &steps, DType::F16, 2)?;
    let guidance = Guidance::new(device, &[GuidanceScale { scale: 7.5, rescale: 0.7 }; ROWS])?;
    let mut state = SampleState::new(zeros(&samples)?)?;
    ops::sampler_step(&mut state, &zeros(&[2 * ROWS, 2, 3, 4])?, Some(&guidance), &steps, None)?;
    steps.index_mut().advance()?;
    StepIndex::new(device, &[0; ROWS])?.advance()
}

/// benches/models.rs looks the work of a time up by this key.
#[test]
fn every_op_is_timed_by_the_name_and_shape_that_meta_records() {
    let meta = Device::meta();
    every_op(&meta).unwrap();
    let Device::Meta(recorder) = &meta else { unreachable!() };
    let recorded: BTreeSet<_> =
        recorder.take_report().ops.into_iter().map(|record| (record.op, record.output)).collect();
    let names: BTreeSet<_> = recorded.iter().map(|(op, _)| *op).collect();
    assert_eq!(names.len(), 24, "{names:?}");
    for device in devices() {
        profile::start();
        every_op(&device).unwrap();
        let timed = profile::stop();
        let missing: Vec<_> = recorded.iter().filter(|key| !timed.contains_key(key)).collect();
        assert!(missing.is_empty(), "{device}: not timed: {missing:?}");
    }
}

/// An op that the test above does not call.
#[test]
fn what_is_recorded_is_timed() {
    let ops = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
    for file in rust_files(&ops) {
        let source = fs::read_to_string(&file).unwrap();
        let [records, scopes] = ["meta.record(", "profile::scope("].map(|call| source.matches(call).count());
        assert_eq!(records, scopes, "{}: meta.record and profile::scope come together", file.display());
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] });
    files.filter(|file| file.extension().is_some_and(|extension| extension == "rs")).collect()
}
