//! MultiDiffusion, DemoFusion and PixelRush: where views lie, how they are jittered, what a phase does to latents, and which requests are
//! refused. Whole runs are compared with torch's in tests/oracle.

#[path = "common/drawn.rs"]
mod drawn;

use std::collections::HashMap;
use std::sync::OnceLock;

use megafuse::methods::views::window_starts;
use megafuse::methods::{
    self, Denoiser, DiffusionModel, Event, Geometry, JitteredWindows, Method, NoiseSource, Observer, PatchInput,
    RecordedSteps, Run, Size, Watch, cosine_factors, gaussian_taps, phase_sizes,
};
use megafuse::methods::{DemoFusion, MegaFusion, MultiDiffusion, PartOptions, PixelRush, Plain, StageParts};
use megafuse::models::UnetOptions;
use megafuse::ops::{self, PatchLayout, Patches, StepCoefficients, StepIndex, StepRow, StepRows, StepTable};
use megafuse::pipeline::{Choices, HiresFix, InitImage, InputPicture, ModelSource, Pipeline, Request, Silent, Stage};
use megafuse::rng::PythonRandom;
use megafuse::schedulers::{Sampler, Scheduler, SchedulerConfig};
use megafuse::{DType, Device, Error, Result, Tensor};

fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(Device::cpu)
}

/// Section 3 of the paper with the published code's T: each factor of alpha 3, 1, 1, to a millionth.
#[test]
fn cosine_factors_are_those_of_the_published_code() {
    for (t, k, c1) in [
        (981.0, 0.999110, 0.997331),
        (901.0, 0.976011, 0.929747),
        (701.0, 0.795162, 0.502767),
        (501.0, 0.501571, 0.126182),
        (201.0, 0.096417, 0.000896),
        (1.0, 0.000002, 0.0),
    ] {
        let [skip, dilated, blur] = cosine_factors(t, 1000.0, [3.0, 1.0, 1.0]);
        for (got, want) in [(skip, c1), (dilated, k), (blur, 0.99 * k + 0.01)] {
            assert!((got - want).abs() <= 1e-6, "t {t}: {got}, expected {want}");
        }
    }
}

#[test]
fn the_gaussian_has_2s_minus_1_taps_of_sum_1() {
    for (got, want) in gaussian_taps(2, 1.0).into_iter().zip([0.274069, 0.451863, 0.274069]) {
        assert!((got - want).abs() < 1e-6, "{got}, expected {want}");
    }
    for scale in 1..6 {
        for sigma in [0.008, 0.8, 5.0] {
            let taps = gaussian_taps(scale, sigma);
            assert_eq!(taps.len(), 2 * scale - 1);
            assert!((taps.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{taps:?}");
        }
    }
}

#[test]
fn windows_begin_every_stride_and_end_with_the_axis() {
    for (n, window, stride, want) in [
        (256, 128, 64, vec![0, 64, 128]),
        (257, 128, 64, vec![0, 64, 128, 129]),
        (128, 128, 64, vec![0]),
        (100, 128, 64, vec![0]),
        (66, 64, 8, vec![0, 2]),
        (80, 64, 8, vec![0, 8, 16]),
    ] {
        assert_eq!(window_starts(n, window, stride), want, "{n} {window} {stride}");
    }
    for ([height, width], count) in
        [([256, 256], 9), ([384, 384], 25), ([512, 512], 49), ([135, 240], 6), ([64, 256], 3), ([128, 128], 1)]
    {
        assert_eq!(JitteredWindows::new([height, width], 128, 64).count(), count, "{height}x{width}");
    }
}

/// The published code with random.seed(0) on latents of 256x256: row and column of each window in the map padded by 16.
#[test]
fn jitter_is_that_of_the_published_code() {
    let windows = JitteredWindows::new([256, 256], 128, 64);
    let mut python = PythonRandom::new(0);
    let origins = windows.origins(&windows.draw(&mut |low, high| python.randint(low, high)));
    let padded: Vec<[i32; 2]> = origins.iter().map(|origin| origin.map(|at| at + 16)).collect();
    let want = [[13, 12], [8, 66], [15, 160], [83, 12], [86, 94], [96, 150], [153, 4], [147, 72], [148, 152]];
    assert_eq!(padded, want);
}

/// Any jitter leaves windows within the padding, cells covered, and nothing drawn along an axis that a window spans.
#[test]
fn jittered_windows_cover_every_cell() {
    let mut python = PythonRandom::new(3);
    for map in [[128, 128], [129, 520], [200, 333], [135, 240], [144, 256], [64, 256], [320, 130], [520, 128]] {
        let windows = JitteredWindows::new(map, 128, 64);
        let reach = windows.reach as i32;
        assert_eq!(reach, 16);
        for extreme in 0..4 {
            let mut draws = 0;
            let offsets = windows.draw(&mut |low, high| {
                draws += 1;
                [low, high, 0, python.randint(low, high)][extreme]
            });
            let spans = map.map(|n| n <= 128);
            let drawn = windows.count() * spans.iter().filter(|&&spans| !spans).count();
            assert_eq!(draws, drawn, "{map:?}");
            assert_eq!(windows.misplaced(&offsets), None);
            let mut covered = [vec![false; map[0]], vec![false; map[1]]];
            let origins = windows.origins(&offsets);
            for origin in &origins {
                for axis in 0..2 {
                    let [start, end] = [origin[axis], origin[axis] + windows.size[axis] as i32];
                    assert!(-reach <= start && end <= map[axis] as i32 + reach, "{map:?}: {origin:?}");
                    assert!(!spans[axis] || start == 0);
                }
            }
            for row in 0..map[0] as i32 {
                for column in 0..map[1] as i32 {
                    let holds = |origin: &&[i32; 2]| {
                        (origin[0]..origin[0] + windows.size[0] as i32).contains(&row)
                            && (origin[1]..origin[1] + windows.size[1] as i32).contains(&column)
                    };
                    // Every seventh cell, and the borders.
                    let looked_at = (row + column) % 7 == 0 || row == 0 || column == 0;
                    if looked_at && origins.iter().any(|origin| holds(&origin)) {
                        covered[0][row as usize] = true;
                        covered[1][column as usize] = true;
                    } else {
                        assert!(!looked_at, "{map:?} extreme {extreme}: ({row}, {column}) is in no window");
                    }
                }
            }
            assert!(covered.iter().flatten().all(|&covered| covered), "{map:?}");
        }
        let mut offsets = vec![0; 2 * windows.count()];
        offsets[0] = 1;
        assert_eq!(windows.misplaced(&offsets).map(|(place, _)| place), Some(0), "{map:?}: column 0 moves inward");
    }
}

#[test]
fn phases_are_multiples_of_the_first() {
    let sizes = |size: &str, phases| -> Vec<String> {
        phase_sizes(size.parse().unwrap(), phases, 8).iter().map(Size::to_string).collect()
    };
    assert_eq!(sizes("4096x4096", 4), ["1024x1024", "2048x2048", "3072x3072", "4096x4096"]);
    assert_eq!(sizes("2048x1152", 2), ["1024x576", "2048x1152"]);
    // 1024 * 1080 / 1920 is no multiple of 8.
    assert_eq!(sizes("1080x3072", 3), ["360x1024", "720x2048", "1080x3072"]);
    assert_eq!(sizes("2048x1160", 2), ["1024x576", "2048x1160"]);
    let geometry = |size: &str| Geometry {
        size: size.parse().unwrap(),
        native: Size::new(1024, 1024),
        sides: 8.into(),
        steps: 50,
        relay_growth: 1.0,
        relayed_share: 0.2,
    };
    use megafuse::methods::GenerationMethod;
    let stages = |size: &str| DemoFusion::default().stages(&geometry(size));
    assert_eq!(
        stages("2048x1152").unwrap().iter().map(Stage::to_string).collect::<Vec<_>>(),
        ["1024x576:50", "2048x1152:50"]
    );
    for (size, reason) in [
        ("1536x1536", "a multiple of 1024, which the model was trained at, like 1024 or 2048"),
        ("512x512", "like 1024 or 2048"),
        ("3072x16", "at least 24, a cell in each of 3 phases"),
        ("2044x1024", "multiples of 8"),
    ] {
        let error = stages(size).unwrap_err().to_string();
        assert!(error.contains(reason), "{size}: {error}");
    }
}

/// Dilated samples are every cell of the padded map once: what is gathered comes back where it was.
#[test]
fn dilated_samples_are_a_bijection() {
    for scale in [2, 3, 4] {
        for [h, w] in [[12, 12], [7, 11], [scale, 2 * scale + 1]] {
            let padding = [h, w].map(|n: usize| n.next_multiple_of(scale) - n);
            let padded = [h + padding[0], w + padding[1]];
            let size = padded.map(|n| n / scale);
            let layout = PatchLayout { map: [h, w], size, stride: scale, wraps: false };
            let mut patches = Patches::new(device(), 1, scale * scale, layout).unwrap();
            let origins: Vec<[i32; 2]> = (0..scale * scale)
                .map(|i| [(i / scale) as i32 - padding[0] as i32, (i % scale) as i32 - padding[1] as i32])
                .collect();
            patches.place(&origins).unwrap();
            let values: Vec<f32> = (0..h * w).map(|i| i as f32 + 1.0).collect();
            let x = Tensor::from_f32(device(), &[1, h, w, 1], DType::F32, &values).unwrap();
            // The step is the output.
            let coefficients = StepCoefficients { next_from_e: 1.0, ..StepCoefficients::default() };
            let steps = StepTable::new(device(), vec![StepRow { input_scale: 1.0, coefficients }]).unwrap();
            let samples = ops::gather_patches(&x, &patches, None, &steps, DType::F32, 1).unwrap();
            let gathered: f32 = samples.to_f32_vec().unwrap().iter().filter(|&&value| value != 0.0).count() as f32;
            assert_eq!(gathered as usize, h * w, "each cell once, zeros in the padding");
            let mut sums = Tensor::uninit(device(), &[1, h, w, 1], DType::F32).unwrap();
            ops::step_patches(&x, &patches, &samples, None, &steps, &mut sums).unwrap();
            assert_eq!(sums.to_f32_vec().unwrap(), values, "{scale}: {h}x{w}");
        }
    }
}

/// What the network reads of the dilated samples has the mean and the deviation of the padded map.
#[test]
fn blurred_latents_get_the_moments_back() {
    let (scale, [h, w, c]) = (3, [10, 11, 4]);
    let padding = [2, 1];
    let values: Vec<f32> = (0..h * w * c).map(|i| ((i * 7919) % 1013) as f32 / 250.0 - 1.0).collect();
    let x = Tensor::from_f32(device(), &[1, h, w, c], DType::F32, &values).unwrap();
    let taps: Vec<f32> = gaussian_taps(scale, 0.8).iter().map(|&tap| tap as f32).collect();
    let taps = Tensor::from_f32(device(), &[1, 5], DType::F32, &taps).unwrap();
    let step = StepIndex::one(device(), 0).unwrap();
    let blurred = ops::blur_latents(&x, padding, StepRows { table: &taps, step: &step, rows: 1 }).unwrap();
    let zeros = ((h + 2) * (w + 1) - h * w) * c;
    let (from, to) = (ops::latent_moments(&blurred, 0).unwrap(), ops::latent_moments(&x, zeros).unwrap());
    let back = ops::latent_moments(&ops::standardise_latents(&blurred, &from, &to).unwrap(), 0).unwrap();
    for (got, want) in back.to_f32_vec().unwrap().iter().zip(to.to_f32_vec().unwrap()) {
        assert!((got - want).abs() <= 1e-5, "{got}, expected {want}");
    }
    assert_ne!(from.to_f32_vec().unwrap(), to.to_f32_vec().unwrap());
}

/// A latent model of one channel whose network answers by a formula.
struct Formula {
    /// What the network answers that leads every step to this sample; `None`: no noise, ever.
    goal: Option<fn(usize, usize) -> f32>,
    sigmas: Vec<f64>,
    recorded: RecordedSteps,
}

struct FormulaNetwork {
    goal: Option<fn(usize, usize) -> f32>,
    sigmas: Vec<f64>,
}

impl FormulaNetwork {
    /// (x - goal) / sigma, of unscaled x.
    fn output(&self, x: &Tensor, goal: &Tensor, evaluation: usize, scale: f32) -> Result<Tensor> {
        let sigma = self.sigmas[evaluation % self.sigmas.len()] as f32;
        let of = |(x, goal): (&f32, &f32)| match self.goal {
            Some(_) => (x / scale - goal) / sigma,
            None => 0.0,
        };
        let values: Vec<f32> = x.to_f32_vec()?.iter().zip(&goal.to_f32_vec()?).map(of).collect();
        Tensor::from_f32(device(), x.shape(), DType::F32, &values)
    }

    fn goal(&self, [n, h, w, c]: [usize; 4]) -> Result<Tensor> {
        let goal = self.goal.unwrap_or(|_, _| 0.0);
        let values: Vec<f32> = (0..n * h * w * c).map(|i| goal(i / c / w % h, i / c % w)).collect();
        Tensor::from_f32(device(), &[n, h, w, c], DType::F32, &values)
    }
}

impl Denoiser for FormulaNetwork {
    fn denoise(&self, x: &Tensor, steps: &StepTable, _: &UnetOptions) -> Result<Tensor> {
        let goal = self.goal(x.dims("x", "x")?)?;
        self.output(x, &goal, steps.index().get(0), 1.0)
    }

    fn denoise_patches(&self, input: &PatchInput, steps: &StepTable, _: &UnetOptions) -> Result<Tensor> {
        let as_it_is = StepRow { input_scale: 1.0, coefficients: StepCoefficients::default() };
        let one = StepTable::new(device(), vec![as_it_is])?;
        let scale = input.scales.next_row(0).unwrap().input_scale;
        let of = |x: &Tensor, steps| ops::gather_patches(x, input.patches, None, steps, DType::F32, 1);
        let goal = self.goal(input.x.dims("x", "x")?)?;
        self.output(&of(input.x, input.scales)?, &of(&goal, &one)?, steps.index().get(0), scale)
    }
}

impl DiffusionModel for Formula {
    fn device(&self) -> &Device {
        device()
    }
    fn sample_shape(&self, size: Size) -> [usize; 4] {
        [1, size.height, size.width, 1]
    }
    fn begin_stage(&self, _: Size, _: &[f32], _: Option<Box<dyn Denoiser>>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(FormulaNetwork { goal: self.goal, sigmas: self.sigmas.clone() }))
    }
    fn conditioning_key(&self) -> Vec<usize> {
        Vec::new()
    }
    fn recorded_steps(&self) -> &RecordedSteps {
        &self.recorded
    }
    fn decode(&self, x0: &Tensor, _: &mut dyn FnMut(&str)) -> Result<Tensor> {
        x0.duplicate()
    }
    fn encode(&self, picture: &Tensor, _: Option<&Tensor>, _: &mut dyn FnMut(&str)) -> Result<Tensor> {
        picture.duplicate()
    }
}

/// Noise of variance 1 that differs by draw.
#[derive(Default)]
struct Draws(usize);

impl NoiseSource for Draws {
    fn seeds(&self) -> Vec<u64> {
        vec![0]
    }
    fn normal(&mut self, shape: [usize; 4]) -> Result<Tensor> {
        self.0 += 1;
        let hash = |i: usize| ((i + 1000 * self.0) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let uniform = |i: usize| (hash(i) as f32 / (1u64 << 24) as f32 - 0.5) * 12f32.sqrt();
        let values: Vec<f32> = (0..shape.iter().product()).map(uniform).collect();
        Tensor::from_f32(device(), &shape, DType::F32, &values)
    }
    fn normal_into(&mut self, to: &mut Tensor) -> Result<()> {
        let shape = to.dims("draw", "to")?;
        to.write_f32(&self.normal(shape)?.to_f32_vec()?)
    }
}

#[derive(Default)]
struct Recorded(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Observer for Recorded {
    fn wants_tensors(&self, _: usize) -> bool {
        true
    }
    fn tensor(&mut self, _: usize, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        self.0.insert(name.into(), (shape.to_vec(), values));
        Ok(())
    }
}

/// A run of 12x12 to 24x24 pixels, which are cells, in four steps.
fn progressive(method: DemoFusion, sampler: Sampler, goal: Option<fn(usize, usize) -> f32>) -> (Recorded, Scheduler) {
    let config = SchedulerConfig::from_json("test", "{}").unwrap().for_latents();
    let scheduler = Scheduler::new(&config, sampler, 4, 0.0).unwrap();
    let stages = ["12x12:4", "24x24:4"].map(|stage| stage.parse().unwrap()).to_vec();
    let run = Run::new(method.into(), stages, scheduler.clone(), None, 1).unwrap();
    let sigmas = (0..4).map(|step| scheduler.noise_level(step).1).collect();
    let model = Formula { goal, sigmas, recorded: RecordedSteps::default() };
    let mut recorded = Recorded::default();
    methods::generate(&model, &run, &mut Draws::default(), Watch { observer: &mut recorded, first: 0 }).unwrap();
    (recorded, scheduler)
}

/// A network that knows where to go gets there through windows alone, whatever their jitter.
#[test]
fn windows_of_a_perfect_network_reach_its_sample() {
    let method = DemoFusion { cosine: [3.0, 1e6, 1.0], view_batch: 2, ..DemoFusion::default() };
    let goal: fn(usize, usize) -> f32 = |row, column| ((row * 5 + column * 3) % 11) as f32 / 5.0 - 1.0;
    let (recorded, _) = progressive(method, Sampler::Euler, Some(goal));
    for (phase, side) in [(1, 12), (2, 24)] {
        let (shape, got) = &recorded.0[&format!("phase{phase}.step4")];
        assert_eq!(shape, &[1, 1, side, side]);
        for (i, got) in got.iter().enumerate() {
            let want = goal(i / side, i % side);
            assert!((got - want).abs() <= 1e-4, "phase {phase} cell {i}: {got}, expected {want}");
        }
    }
    // Then the mean and the deviation of phase 1.
    let moments = |values: &[f32]| {
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        (mean, (values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt())
    };
    let (first, last) = (moments(&recorded.0["phase1.latent"].1), moments(&recorded.0["phase2.latent"].1));
    assert!((first.0 - last.0).abs() < 1e-5 && (first.1 - last.1).abs() < 1e-5, "{first:?} {last:?}");
}

/// Without noise every path takes the same step: so windows, dilated samples and any mixture of them are one.
#[test]
fn all_paths_agree_where_there_is_no_noise() {
    for cosine in [[3.0, 1.0, 1.0], [3.0, 0.0, 1.0], [3.0, 1e6, 1.0]] {
        let method = DemoFusion { cosine, view_batch: 3, ..DemoFusion::default() };
        let (recorded, scheduler) = progressive(method, Sampler::Ddim, None);
        let evaluations = scheduler.evaluations(0..4);
        // z_s = k z_t, of the mixture with the noised start at every step.
        let noise = &recorded.0["noise1"].1;
        let start = &recorded.0["phase1.latent"].1;
        let start = Tensor::from_f32(device(), &[1, 12, 12, 1], DType::F32, start).unwrap();
        let base =
            ops::resize(&start, [24, 24], ops::Upsampler::BicubicTorch, None, None).unwrap().to_f32_vec().unwrap();
        let noised = |i: usize, step: usize| {
            let (signal, sigma) = scheduler.noise_level(step);
            signal * f64::from(base[i]) + sigma * f64::from(noise[i])
        };
        let mut z: Vec<f64> = (0..24 * 24).map(|i| noised(i, 0)).collect();
        for (step, evaluation) in evaluations.iter().enumerate() {
            let [c1, _, _] = cosine_factors(f64::from(evaluation.timestep), 1000.0, cosine);
            let k = &evaluation.coefficients;
            let factor = f64::from(k.next_from_x) + f64::from(k.next_from_x0) * f64::from(k.x0_from_x);
            for (i, z) in z.iter_mut().enumerate() {
                *z = factor * ((1.0 - c1) * *z + c1 * noised(i, step));
            }
            let got = &recorded.0[&format!("phase2.step{}", step + 1)].1;
            for (i, (got, want)) in got.iter().zip(&z).enumerate() {
                assert!((f64::from(*got) - want).abs() <= 1e-4 * (1.0 + want.abs()), "{cosine:?} step {step} cell {i}");
            }
        }
    }
}

fn small(model: &str) -> Pipeline {
    Pipeline::load(ModelSource::Directory(drawn::folder(model)), device().clone(), DType::F32).unwrap()
}

fn request(method: impl Into<Method>, size: &str) -> Request {
    Request {
        prompt: "a cat".into(),
        method: method.into(),
        size: Some(size.parse().unwrap()),
        steps: Some(2),
        guidance: 2.0,
        scheduler: Some(Sampler::Ddim),
        ..Request::default()
    }
}

/// One window as large as the map, one phase: plain sampling, bit for bit.
#[test]
fn one_window_is_plain_sampling() {
    let pipeline = small("sd15");
    let of = |method: Method| pipeline.generate(&request(method, "32x24"), &mut Silent).unwrap()[0].rgb.clone();
    let plain = of(Plain {}.into());
    let window = MultiDiffusion { window: Some(16), stride: Some(4), ..MultiDiffusion::default() };
    assert_eq!(of(MultiDiffusion::default().into()), plain);
    assert_eq!(of(MultiDiffusion { circular: true, ..window.clone() }.into()).len(), plain.len());
    assert_eq!(of(window.into()), plain);
    assert_eq!(of(DemoFusion::default().into()), plain);
}

/// Neither how many views the network sees at once nor who else is in the batch makes a difference.
#[test]
fn views_and_pictures_come_in_any_batch() {
    let pipeline = small("sdxl-turbo");
    let windows = MultiDiffusion { window: Some(6), stride: Some(3), circular: true, ..MultiDiffusion::default() };
    let phases = DemoFusion { stride: Some(3), ..DemoFusion::default() };
    let refined = PixelRush { stride: Some(3), ..PixelRush::default() };
    let of = |view_batch| -> [Method; 3] {
        [
            MultiDiffusion { view_batch, ..windows.clone() }.into(),
            DemoFusion { view_batch, ..phases.clone() }.into(),
            PixelRush { view_batch, ..refined }.into(),
        ]
    };
    for (at, alone) in of(1).into_iter().enumerate() {
        let make = |method: &Method, count, batch| {
            let request = Request { count, batch, seed: 3, ..request(method.clone(), "32x20") };
            pipeline.generate(&request, &mut Silent).unwrap().into_iter().map(|picture| picture.rgb).collect::<Vec<_>>()
        };
        let want = make(&alone, 2, 1);
        assert_ne!(want[0], want[1]);
        for view_batch in [2, 16] {
            assert_eq!(make(&of(view_batch)[at], 2, 1), want, "{alone}, {view_batch} views");
        }
        assert_eq!(make(&alone, 2, 2), want, "{alone}, two pictures");
    }
}

/// The seam of a circular picture is inside of views: moved around, it is the same picture but for rounding.
#[test]
fn a_circular_picture_is_decoded_around() {
    let pipeline = small("sd15");
    let windows = MultiDiffusion { window: Some(8), stride: Some(4), circular: true, ..MultiDiffusion::default() };
    let around = pipeline.generate(&request(windows.clone(), "48x16"), &mut Silent).unwrap().remove(0);
    let cut = MultiDiffusion { circular: false, ..windows };
    let cut = pipeline.generate(&request(cut, "48x16"), &mut Silent).unwrap().remove(0);
    let seam = |rgb: &[u8]| -> i64 {
        let at = |row: usize, column: usize, channel: usize| i64::from(rgb[(row * 48 + column) * 3 + channel]);
        (0..16)
            .flat_map(|row| (0..3).map(move |channel| (row, channel)))
            .map(|(r, c)| (at(r, 0, c) - at(r, 47, c)).abs())
            .sum()
    };
    assert!(seam(&around.rgb) < seam(&cut.rgb), "{} and {}", seam(&around.rgb), seam(&cut.rgb));
}

/// The dump of a run's jitter is the choice of another; others are refused.
#[test]
fn jitter_can_be_given() {
    let pipeline = small("sdxl-turbo");
    let base = request(DemoFusion { stride: Some(4), ..DemoFusion::default() }, "32x32");
    let make = |choices: Choices| pipeline.generate(&Request { choices, ..base.clone() }, &mut Silent);
    let drawn = make(Choices::default()).unwrap()[0].rgb.clone();
    let windows = JitteredWindows::new([16, 16], 8, 4);
    let mut python = PythonRandom::new(0);
    let mut jitter: Vec<i64> = Vec::new();
    (0..2).for_each(|_| jitter.extend(windows.draw(&mut |low, high| python.randint(low, high))));
    let shape = [2, windows.count(), 2];
    assert_eq!(make(Choices::default().with("jitter2", &shape, jitter.clone())).unwrap()[0].rgb, drawn);
    assert_ne!(make(Choices::default().with("jitter2", &shape, vec![0; jitter.len()])).unwrap()[0].rgb, drawn);
    // The first window may move to the left only.
    jitter[0] = 1;
    let error = make(Choices::default().with("jitter2", &shape, jitter)).unwrap_err().to_string();
    assert!(
        error.contains("jitter2") && error.contains("the column of window 0 in step 1 is 1, expected -1 to 0"),
        "{error}"
    );
}

/// Each phase's picture, as it is done.
#[test]
fn phases_are_shown() {
    #[derive(Default)]
    struct Shown(Vec<(usize, [usize; 2])>, Vec<Event>);
    impl Observer for Shown {
        fn event(&mut self, event: &Event) {
            self.1.push(event.clone());
        }
        fn phase(&mut self, index: usize, phase: usize, size: [usize; 2], values: Vec<f32>) -> Result<()> {
            assert_eq!((index, values.len()), (0, 3 * size[0] * size[1]));
            let begun = self.1.iter().filter(|event| matches!(event, Event::StageBegins { .. })).count();
            assert_eq!(begun, phase, "before the next phase begins");
            self.0.push((phase, size));
            Ok(())
        }
    }
    let pipeline = small("sdxl-turbo");
    let mut shown = Shown::default();
    let method = DemoFusion { phases: true, ..DemoFusion::default() };
    pipeline.generate(&Request { steps: Some(1), ..request(method, "48x32") }, &mut shown).unwrap();
    assert_eq!(shown.0, [(1, [10, 16]), (2, [20, 32])]);
}

#[test]
fn pixelrush_doubles_up_to_the_size_of_the_request() {
    let pipeline = small("sd15");
    for (size, want) in [
        ("32x32", "32x32:2"),
        ("24x24", "24x24:2"),
        ("64x64", "32x32:2,64x64:1"),
        ("72x64", "34x30:2,72x64:1"),
        ("96x96", "32x32:2,64x64:1,96x96:1"),
        ("128x128", "32x32:2,64x64:1,128x128:1"),
        ("160x40", "64x16:2,128x32:1,160x40:1"),
    ] {
        let run = pipeline.resolve(&request(PixelRush::default(), size)).unwrap();
        assert_eq!(run.stages_text(), want);
    }
}

/// A sample that is mixed of a clean one and noise: the noise as the output gives the clean one back.
#[test]
fn a_readout_undoes_the_mixture() {
    let scheduler =
        Scheduler::new(&SchedulerConfig::from_json("scheduler_config.json", "{}").unwrap(), Sampler::Ddim, 4, 0.0)
            .unwrap();
    for timestep in [0, 249, 999] {
        let readout = scheduler.readout(timestep).unwrap();
        let [[signal, sigma], [x0_from_x, x0_from_e]] = [readout.level, readout.x0];
        let (y, e) = (0.7, -1.3);
        assert!((x0_from_x * (signal * y + sigma * e) + x0_from_e * e - y).abs() < 1e-12, "{timestep}");
        assert!((signal * signal + sigma * sigma - 1.0).abs() < 1e-12);
    }
    assert_eq!(scheduler.readout(1000), None);
}

#[test]
fn requests_that_cannot_be_met_name_the_field() {
    let pipeline = small("sd15");
    let refused = |request: Request, field: &str, says: &str| match pipeline.resolve(&request) {
        Err(error @ Error::Request { field: got, .. }) => {
            assert_eq!(got, field, "{error}");
            assert!(error.to_string().contains(says), "{error}");
        }
        Err(other) => panic!("{field}: {other}"),
        Ok(_) => panic!("{field}: accepted"),
    };
    let windows = MultiDiffusion { window: Some(8), ..MultiDiffusion::default() };
    let phases = DemoFusion::default();
    let with = |method: Method, size: &str, sampler, eta| Request {
        scheduler: Some(sampler),
        eta: Some(eta),
        ..request(method, size)
    };
    for method in [Method::from(windows.clone()), phases.clone().into()] {
        let (ddim, ddpm, heun) = (Sampler::Ddim, Sampler::Ddpm, Sampler::Heun);
        refused(with(method.clone(), "64x64", ddpm, 0.0), "scheduler", "expected ddim or euler");
        refused(with(method.clone(), "64x64", heun, 0.0), "scheduler", "expected ddim or euler");
        refused(with(method.clone(), "64x64", Sampler::Dpm2M, 0.0), "scheduler", "expected ddim or euler");
        refused(with(method, "64x64", ddim, 0.5), "eta", "draw no noise");
    }
    let wide = MultiDiffusion { stride: Some(9), ..windows.clone() };
    refused(request(wide, "64x64"), "stride", "a stride of 1 to 8");
    let gap = MultiDiffusion { stride: Some(8), circular: true, ..windows.clone() };
    refused(request(gap, "60x32"), "stride", "a stride that divides 30 leaves no gap");
    refused(request(MultiDiffusion { view_batch: 0, ..windows }, "64x64"), "view_batch", "at least 1");
    refused(request(phases.clone(), "48x48"), "size", "like 32 or 64");
    refused(request(DemoFusion { stride: Some(17), ..phases.clone() }, "64x64"), "stride", "a stride of 1 to 16");
    let compat = DemoFusion { reference_compat: true, ..phases.clone() };
    refused(request(compat, "64x64"), "reference_compat", "samples with euler");
    let refined = PixelRush::default();
    refused(request(PixelRush { stride: Some(0), ..refined }, "64x64"), "stride", "a stride of 1 to 16");
    refused(request(PixelRush { stride: Some(17), ..refined }, "64x64"), "stride", "a stride of 1 to 16");
    refused(request(PixelRush { refine_timestep: 1000, ..refined }, "64x64"), "refine_timestep", "the 1000 timesteps");
    let stages = ["32x32:2", "64x64:2"].map(|stage| stage.parse().unwrap()).to_vec();
    let explicit = Request { stages, size: None, steps: None, ..request(refined, "48x48") };
    refused(explicit, "stages", "refines in one step");
    let stages = ["32x32:2", "48x48:2"].map(|stage| stage.parse().unwrap()).to_vec();
    let explicit = Request { stages, size: None, steps: None, ..request(phases.clone(), "48x48") };
    refused(explicit, "stages", "like 24x24:2,48x48:2");
    let stages = ["32x32:2", "64x64:2"].map(|stage| stage.parse().unwrap()).to_vec();
    let explicit = Request { stages, size: None, steps: Some(2), ..request(phases, "48x48") };
    assert_eq!(pipeline.resolve(&explicit).unwrap().steps(), 4);
}

/// Stages as they are written.
fn stages(text: &str) -> Vec<Stage> {
    text.split(',').map(|stage| stage.parse().unwrap()).collect()
}

fn relay(method: impl Into<Method>, text: &str) -> Request {
    Request { size: None, steps: None, stages: stages(text), ..request(method, "8x8") }
}

#[test]
fn stages_with_parts_are_read_and_written() {
    for (text, written) in [
        ("24x16:5", "24x16:5"),
        ("24x16:5+crops", "24x16:5+crops"),
        ("24x16:5+windows+raunet", "24x16:5+hidiffusion"),
        ("24x16:5+hidiffusion+windows", "24x16:5+hidiffusion"),
        ("24x16:5+demofusion+dilation", "24x16:5+dilation+demofusion"),
    ] {
        let stage: Stage = text.parse().unwrap();
        assert_eq!((stage.to_string().as_str(), stage.size, stage.steps), (written, Size::new(24, 16), 5));
        assert_eq!(written.parse::<Stage>().unwrap(), stage);
    }
    assert_eq!(stages("8x8:1")[0], Stage::new(Size::new(8, 8), 1));
    for (text, part) in [
        ("24x16:5+", "+ is no part of a stage"),
        ("24x16:5+Crops", "+Crops is no part of a stage; expected hidiffusion, raunet"),
        ("24x16:5crops", "expected WIDTHxHEIGHT:STEPS"),
        ("24x16+crops:5", "expected WIDTHxHEIGHT:STEPS"),
        ("24x16:0+crops", "at least 1 step"),
    ] {
        let error = text.parse::<Stage>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    let both = StageParts::RAUNET.and(StageParts::WINDOWS);
    assert!(
        both == StageParts::HIDIFFUSION && both.contains(StageParts::WINDOWS) && !both.intersects(StageParts::CROPS)
    );
}

/// A part that its options switch off, or that has nothing to do, leaves the bits of the run without it; switched on it does not.
#[test]
fn parts_that_are_off_leave_the_bits() {
    let pipeline = small("sdxl-turbo");
    let of = |method: &Method, parts: &str| {
        let request = relay(method.clone(), &format!("16x16:2,24x20:2{parts}"));
        pipeline.generate(&request, &mut Silent).unwrap().remove(0).rgb
    };
    let with = |parts: PartOptions| Method::from(MegaFusion { parts, ..MegaFusion::default() });
    let plain = of(&MegaFusion::default().into(), "");
    let off = PartOptions { raunet: Some(false), windows: Some(false), ..PartOptions::default() };
    assert_eq!(of(&with(off), "+hidiffusion"), plain);
    let never = PartOptions { t1: Some(0.0), t2: Some(0.0), aggressive: Some(false), ..PartOptions::default() };
    assert_eq!(of(&with(never), "+raunet"), plain);
    let whole = PartOptions { window: Some(12), ..PartOptions::default() };
    assert_eq!(of(&with(whole), "+crops"), plain);
    let plus: Method = MegaFusion::plus().into();
    assert_eq!(of(&plus, "+dilation"), of(&plus, ""));
    // HiDiffusion's and MegaFusion's parts in the first stage as well.
    let all = PartOptions { t1: Some(1.0), aggressive: Some(false), ..PartOptions::default() };
    let crops = PartOptions { window: Some(8), stride: Some(4), ..PartOptions::default() };
    let none = PartOptions::default();
    let mut made = vec![plain];
    for (parts, options) in
        [("+raunet", &all), ("+windows", &none), ("+hidiffusion", &all), ("+crops", &crops), ("+demofusion", &crops)]
    {
        let picture = of(&with(options.clone()), parts);
        assert!(!made.contains(&picture), "{parts}");
        made.push(picture);
    }
    let dilated = MegaFusion { dilation: 2, ..MegaFusion::default() };
    assert!(!made.contains(&of(&dilated.into(), "+dilation")));
    // Hires fix takes them too.
    let second = |parts: &str, options| {
        let method = HiresFix { parts: options, ..HiresFix::default() };
        let request = relay(method, &format!("16x16:3,24x20:2{parts}"));
        pipeline.generate(&request, &mut Silent).unwrap().remove(0).rgb
    };
    assert_eq!(second("+crops", PartOptions { window: Some(12), ..crops.clone() }), second("", PartOptions::default()));
    assert_ne!(second("+crops", crops.clone()), second("", PartOptions::default()));
}

/// Neither the batch nor the groups of views make a difference; shifts and offsets are each picture's own.
#[test]
fn stages_with_parts_come_in_any_batch() {
    let pipeline = small("sdxl-turbo");
    let text = "12x12:1+windows,20x24:2+demofusion,24x26:1+crops";
    let make = |view_batch, batch| {
        let parts = PartOptions { view_batch: Some(view_batch), stride: Some(4), ..PartOptions::default() };
        let method = MegaFusion { parts, ..MegaFusion::default() };
        let request = Request { count: 2, batch, seed: 3, ..relay(method, text) };
        pipeline.generate(&request, &mut Silent).unwrap().into_iter().map(|picture| picture.rgb).collect::<Vec<_>>()
    };
    let want = make(1, 1);
    assert_ne!(want[0], want[1]);
    assert_eq!(make(16, 1), want);
    assert_eq!(make(3, 2), want);
}

#[test]
fn parts_that_make_no_sense_are_refused() {
    let pipeline = small("sd15");
    let refused = |request: &Request, field: &str, says: &str| match pipeline.resolve(request) {
        Err(error @ Error::Request { field: got, .. }) => {
            assert_eq!(got, field, "{error}");
            assert!(error.to_string().contains(says), "{error}");
        }
        Err(other) => panic!("{field}: {other}"),
        Ok(_) => panic!("{field}: accepted"),
    };
    let mega = |text: &str| relay(MegaFusion::default(), text);
    let hires = |text: &str| relay(HiresFix::default(), text);
    refused(&relay(Plain {}, "32x32:2+crops"), "stages", "plain has no stages with +crops; choose megafusion");
    refused(&relay(DemoFusion::default(), "32x32:2,64x64:2+raunet"), "stages", "demofusion has no stages with +raunet");
    refused(&hires("32x32:2,48x48:1+dilation"), "stages", "hires-fix has no stages with +dilation; choose megafusion");
    refused(&mega("32x32:2,48x48:2+crops+demofusion"), "stages", "both lay windows over the map");
    refused(&mega("32x32:2,48x48:2+crops+windows"), "stages", "+windows is for maps larger than the trained size");
    refused(&mega("32x32:2,48x48:2+demofusion+hidiffusion"), "stages", "with +demofusion the network sees none");
    refused(&mega("32x32:2,48x48:2+dilation"), "stages", "which is 1 (none); name request.dilation 2");
    let compat = MegaFusion { reference_compat: true, ..MegaFusion::default() };
    refused(&relay(compat, "32x32:2,48x48:2+crops"), "reference_compat", "has no stages with parts");
    let parts = |parts: PartOptions| MegaFusion { parts, ..MegaFusion::default() };
    let wide = parts(PartOptions { stride: Some(17), ..PartOptions::default() });
    refused(&relay(wide.clone(), "32x32:2,48x48:2+crops"), "stride", "a stride of 1 to 16");
    refused(&relay(wide, "32x32:2,48x48:2+demofusion"), "stride", "a stride of 1 to 16");
    let none = parts(PartOptions { view_batch: Some(0), ..PartOptions::default() });
    refused(&relay(none, "32x32:2,48x48:2+crops"), "view_batch", "at least 1");
    let ancestral = Request { scheduler: Some(Sampler::EulerAncestral), ..mega("32x32:2,48x48:2+crops") };
    refused(&ancestral, "scheduler", "expected ddim or euler");
    refused(&Request { eta: Some(0.5), ..mega("32x32:2,48x48:2+demofusion") }, "eta", "draw no noise");
    let choices = Choices::default().with("shifts2", &[1, 1], vec![0]);
    refused(&Request { choices, ..mega("32x32:2,48x48:2+crops") }, "choices", "no stage has +windows or +demofusion");

    // From a picture, with a mask.
    let grey = InputPicture::new("grey.png", Size::new(4, 4), vec![99; 48]).unwrap();
    let masked = InitImage { mask: Some(grey.clone()), ..InitImage::new(grey.clone()) };
    let from = |init: &InitImage, request: Request| Request { init_image: Some(init.clone()), ..request };
    refused(&from(&masked, mega("32x32:2,48x48:2+crops")), "mask", "keeps no part of a picture");
    let multi = MultiDiffusion { window: Some(8), ..MultiDiffusion::default() };
    refused(&from(&masked, request(multi, "32x32")), "mask", "leave request.mask out");
    refused(&from(&masked, request(DemoFusion::default(), "64x64")), "mask", "leave request.mask out");
    let part = InitImage { strength: Some(0.6), ..InitImage::new(grey.clone()) };
    refused(
        &from(&part, request(DemoFusion::default(), "64x64")),
        "strength",
        "takes the place of phase 1's; expected 1",
    );
    assert_eq!(
        pipeline.resolve(&from(&InitImage::new(grey), request(DemoFusion::default(), "64x64"))).unwrap().steps(),
        4
    );
    assert!(pipeline.resolve(&from(&part, mega("32x32:2,48x48:4+crops"))).unwrap().steps() == 3);
    // The network of sd15 is none that RAU-Net and windows know.
    let error = pipeline.resolve(&mega("32x32:2,48x48:2+raunet")).unwrap_err().to_string();
    assert!(error.contains("hidiffusion knows the blocks of SD"), "{error}");
}
