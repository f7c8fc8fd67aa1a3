//! The profile of the ops, and the records of the meta device that it is compared with.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::devices;
use megafuse::Result;
use megafuse::ops::{
    self, Activation, Attention, Conv2d, ConvNorm, GroupMoments, GroupNorm, Guidance, GuidanceScale, LayerNorm, Linear,
    LowPass, Modulation, PatchLayout, Patches, Repaint, RmsNorm, SampleState, Source, SpectralFilter, StepCoefficients,
    StepColumns, StepIndex, StepRow, StepRows, StepTable, Thresholding, TimestepEmbedding, Upsampler, cases, profile,
};
use megafuse::runtime::{DType, Device, Tensor};

/// A prime that no other test has for a size, so that the keys of tests that run at the same time are not taken for ours.
const ROWS: usize = 41;

/// Calls every op once.
fn every_op(device: &Device) -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(device, shape, DType::F32);
    let (x, gamma) = (zeros(&[1, ROWS, 3, 4])?, zeros(&[4])?);
    let norm =
        ConvNorm { gamma: &gamma, beta: &gamma, groups: 2, eps: 1e-5, modulation: None, activation: Activation::None };

    ops::activation(&x, Activation::Silu)?;
    ops::add(&x, &x)?;
    ops::add_masked(&x, &x, &zeros(&[ROWS])?, 0.5)?;
    ops::add_noise(&x, &x, 0.6, 0.8)?;
    ops::attention(Attention::Packed { qkv: &zeros(&[1, ROWS, 3, 2, 8])?, causal: false })?;
    let (q, kv) = (zeros(&[1, ROWS, 2, 8])?, zeros(&[1, 3, 2, 2, 8])?);
    let mut map = zeros(&[1, ROWS, 3])?;
    ops::attention_map(&q, &kv, &mut map, false)?;
    ops::blend_attention_map(&q, &map, &kv, 0.5)?;
    ops::clamp(&x, -1.0, 1.0)?;
    ops::concat(&x, &x)?;
    ops::conv2d(Conv2d::new(&x, &zeros(&[5, 3, 3, 4])?))?;
    ops::count_non_finite(&x)?;
    ops::diagonal_gaussian(&x, None)?;
    let ids = Tensor::from_u32(device, &[1, ROWS], &[0; ROWS])?;
    ops::embedding(&ids, &zeros(&[2, 8])?, &zeros(&[ROWS, 8])?)?;
    ops::group_norm(GroupNorm { activation: Activation::Silu, ..norm.of(Source::One(&x)) })?;
    // More than 1024 pixels, so that a card has something to do at the end too.
    let image = zeros(&[1, ROWS, 29, 4])?;
    let mut moments = GroupMoments::new(norm, [1, ROWS, 29, 4])?;
    moments.add(&image)?;
    moments.finish()?;
    ops::layer_norm(LayerNorm { gamma: Some(&gamma), beta: Some(&gamma), ..LayerNorm::new(&x, 1e-5) })?;
    ops::linear(Linear::new(&x, &zeros(&[6, 4])?))?;
    let step = StepIndex::one(device, 0)?;
    let (factors, taps) = (zeros(&[1, 3])?, zeros(&[1, 3])?);
    ops::mix_latents(&mut zeros(&[1, ROWS, 3, 4])?, &x, None, StepRows { table: &factors, step: &step, rows: 1 })?;
    ops::blur_latents(&x, [1, 0], StepRows { table: &taps, step: &step, rows: 1 })?;
    let images = zeros(&[ROWS, 2, 3, 4])?;
    let pooled = ops::pool_latents(&images, 1)?;
    let guidance_factors = StepRows { table: &factors, step: &step, rows: 1 };
    ops::upsample_guidance(&images, &pooled, &pooled, guidance_factors)?;
    let moments = ops::latent_moments(&images, 0)?;
    ops::standardise_latents(&images, &moments, &moments)?;
    ops::exchange_low_band(&x, &x)?;
    ops::resize(&x, [2 * ROWS, 5], Upsampler::Bicubic, None, None)?;
    ops::resize_nearest(&x, [2 * ROWS, 5])?;
    ops::resize_u8(&x, [2 * ROWS, 5], Upsampler::Bilinear)?;
    ops::rms_norm(RmsNorm { x: &x, gamma: &gamma, eps: 1e-5 })?;
    ops::rms_norm_heads(&mut zeros(&[1, ROWS, 2, 2, 4])?, &[&gamma], 1e-5)?;
    ops::scale_cast(&x, 2.0, 1.0, DType::F16, 2)?;
    ops::sharpen(&x, 0.7)?;
    ops::unpatchify(&zeros(&[ROWS, 2, 12])?, [1, 2], 2)?;
    let pass = LowPass { scale: 2.0, floor: 0.0 };
    ops::spectral_filter(SpectralFilter { x: &x, padded: [2 * ROWS, 4], pass, weak: 0 })?;
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
    let (mask, levels) = (zeros(&[1, 2, 3, 1])?, zeros(&[2, 2])?);
    let known = zeros(&samples)?;
    let repaint = Repaint { mask: &mask, known: &known, noise: &known, levels: &levels, step: steps.index() };
    ops::repaint(state.x_mut(), repaint)?;
    steps.index_mut().advance()?;
    let steps = StepTable::new(device, vec![row])?;
    let layout = PatchLayout { map: [ROWS, 3], size: [ROWS, 2], stride: 1, wraps: false };
    let mut patches = Patches::new(device, 1, 2, layout)?;
    patches.place(&[[0, 0], [0, 1]])?;
    let output = ops::gather_patches(&x, &patches, None, &steps, DType::F32, 1)?;
    ops::step_patches(&x, &patches, &output, None, &steps, &mut zeros(x.shape())?)?;
    ops::merge_patches(&output, &patches, &zeros(&[ROWS])?, &zeros(&[2])?)?;
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
    assert_eq!(names.len(), 43, "{names:?}");
    for device in devices() {
        profile::start_on(&device).unwrap();
        every_op(&device).unwrap();
        let spans = profile::stop_spans().unwrap();
        // Tests that run at the same time are timed too, on threads of their own.
        let ours: Vec<_> = spans.iter().filter(|span| span.key.1.contains(&ROWS)).collect();
        for (before, after) in ours.iter().zip(&ours[1..]).filter(|_| matches!(device, Device::Cuda(_))) {
            assert!(before.start + before.time <= after.start + after.time, "{device}: {before:?} {after:?}");
        }
        let timed = profile::sums(&spans);
        let missing: Vec<_> = recorded.iter().filter(|key| !timed.contains_key(key)).collect();
        assert!(missing.is_empty(), "{device}: not timed: {missing:?}");
    }
}

/// `bench kernels --workload` makes a call from what is recorded of it: the same one, of the same work.
#[test]
fn a_recorded_call_is_made_again_from_its_shape() {
    let meta = Device::meta();
    let Device::Meta(recorder) = &meta else { unreachable!() };
    let zeros = |shape: &[usize]| Tensor::zeros(&meta, shape, DType::BF16).unwrap();
    let (x, skip, gamma) = (zeros(&[2, 6, 8, 64]), zeros(&[2, 6, 8, 32]), zeros(&[96]));
    let norm =
        ConvNorm { gamma: &gamma, beta: &gamma, groups: 32, eps: 1e-5, modulation: None, activation: Activation::Silu };
    let step = StepIndex::one(&meta, 0).unwrap();
    let table = zeros(&[2, 16]);
    let row = StepRows { table: &table, step: &step, rows: 2 };
    let (recorded, calls) = profile::record_calls(|| -> Result<()> {
        let (bias, residual, weight) = (zeros(&[16]), zeros(&[2, 6, 8, 16]), zeros(&[16, 3, 3, 96]));
        let source = Source::Two(&x, &skip);
        let plain = Conv2d::new(source, &weight);
        ops::conv2d(Conv2d {
            norm: Some(norm),
            bias: Some(&bias),
            row: Some(row),
            residual: Some(&residual),
            ..plain
        })?;
        let down = zeros(&[16, 3, 3, 64]);
        ops::conv2d(Conv2d { stride: 2, padding: [0, 1, 0, 1], ..Conv2d::new(&x, &down) })?;
        ops::conv2d(Conv2d { dilation: 2, padding: [2; 4], ..Conv2d::new(&x, &down) })?;
        ops::conv2d(Conv2d { resize_to: Some([12, 16]), ..Conv2d::new(&x, &down) })?;
        ops::group_norm(GroupNorm { activation: Activation::None, ..norm.of(source) })?;
        // One row for both images, and one for each.
        for rows in [1, 2] {
            let table = zeros(&[rows, 192]);
            let rows = StepRows { table: &table, step: &step, rows };
            let modulation = Some(Modulation { rows, scale: 0, shift: 96 });
            let norm = ConvNorm { modulation, activation: Activation::Gelu, ..norm };
            ops::group_norm(norm.of(source))?;
            ops::conv2d(Conv2d { norm: Some(norm), ..plain })?;
        }
        ops::layer_norm(LayerNorm {
            gamma: Some(&zeros(&[64])),
            beta: Some(&zeros(&[64])),
            ..LayerNorm::new(&x, 1e-5)
        })?;
        ops::rms_norm(RmsNorm { x: &x, gamma: &zeros(&[64]), eps: 1e-5 })?;
        let wide = zeros(&[32, 64]);
        let geglu = Linear { activation: Activation::Geglu, bias: Some(&zeros(&[32])), ..Linear::new(&x, &wide) };
        ops::linear(Linear { residual: Some(&zeros(&[2, 6, 8, 16])), ..geglu })?;
        ops::linear(Linear::new(&x, &wide))?;
        ops::linear(Linear::new(&x, &wide))?;
        let rows = StepRows { table: &zeros(&[2, 64]), step: &step, rows: 2 };
        let gate = Some(StepColumns { rows, first: 32 });
        ops::linear(Linear { gate, ..Linear::new(&x, &wide) })?;
        let rows = StepRows { table: &zeros(&[1, 192]), ..rows };
        let modulation = Some(Modulation { rows: StepRows { rows: 1, ..rows }, scale: 64, shift: 0 });
        ops::layer_norm(LayerNorm { modulation, ..LayerNorm::new(&x, 1e-6) })?;
        ops::attention(Attention::Packed { qkv: &zeros(&[2, 48, 3, 2, 32]), causal: true })?;
        ops::attention(Attention::Cross { q: &zeros(&[4, 48, 2, 32]), kv: &zeros(&[2, 7, 2, 2, 32]) })?;
        Ok(())
    });
    recorded.unwrap();
    let works: Vec<_> = recorder.take_report().ops.into_iter().map(|op| (op.op, op.work, op.output)).collect();
    assert_eq!(calls.iter().map(|call| call.count).sum::<u64>(), works.len() as u64);
    assert_eq!(calls.iter().filter(|call| call.count == 2).count(), 1, "{calls:?}");
    let mut again = Vec::new();
    for call in &calls {
        let case = cases::of_shape(call.op, &call.shape).unwrap().unwrap_or_else(|| panic!("{call:?}"));
        assert_eq!((case.op, &case.shape), (call.op, &call.shape));
        let made = (case.prepare)(&cases::Inputs::new(&meta, DType::BF16, 0)).unwrap();
        recorder.take_report();
        let (result, same) = profile::record_calls(made);
        let output = result.unwrap();
        assert_eq!(same, [profile::RecordedCall { count: 1, ..call.clone() }]);
        let op = recorder.take_report().ops.remove(0);
        // A norm of rows and a linear layer are made with one dimension of rows.
        again.extend((0..call.count).map(|_| (op.op, op.work, output.numel())));
    }
    let mut works: Vec<_> = works.into_iter().map(|(op, work, output)| (op, work, output.iter().product())).collect();
    works.sort_by_key(|(op, work, values): &(_, _, usize)| (*op, work.flops, *values));
    again.sort_by_key(|(op, work, values)| (*op, work.flops, *values));
    assert_eq!(works, again);
    for (op, shape, part) in [
        ("linear", serde_json::json!({"m": 1, "n": 2}), "activation"),
        ("conv2d", serde_json::json!({"second_source": "x"}), "second_source"),
        ("layer_norm", serde_json::json!({"rows": -1, "c": 2}), "rows"),
    ] {
        let error = cases::of_shape(op, &shape).err().expect(op).to_string();
        assert!(error.contains(part) && error.contains(op), "{error}");
    }
    assert!(cases::of_shape("resize", &serde_json::json!({})).unwrap().is_none());
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
