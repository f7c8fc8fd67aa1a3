//! Plain sampling and MegaFusion over a model that is a formula: what is relayed, at which level, in which order noise is
//! drawn, and which stage gets which options.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use megafuse::methods::{
    self, Denoiser, DiffusionModel, Event, GenerationMethod, Geometry, MEGAFUSION, MEGAFUSION_PLUS, MegaFusion, Method,
    MethodSpec, NoiseSource, Observer, PartOptions, PatchInput, Plain, Prediction, RecordedSteps, RelayClamp, Run,
    Sampling, Size, Stage, Watch,
};
use megafuse::models::UnetOptions;
use megafuse::ops::StepTable;
use megafuse::schedulers::{Sampler, Scheduler, SchedulerConfig};
use megafuse::{DType, Device, Error, Result, Tensor};

/// A pixel model: 3 channels, decode and encode are the identity (encode adds the posterior's noise times 0.1).
struct Formula {
    guided: bool,
    /// Multiplies the decoded picture.
    contrast: f32,
    calls: Calls,
    recorded: RecordedSteps,
}

/// Step, size, input scale and options of every call.
type Calls = Arc<Mutex<Vec<(usize, Size, f32, UnetOptions)>>>;

/// The formula as the network of a stage.
struct FormulaNetwork {
    guided: bool,
    calls: Calls,
}

/// The one device of all tensors.
fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(Device::cpu)
}

fn formula() -> Formula {
    Formula { guided: false, contrast: 1.0, calls: Calls::default(), recorded: RecordedSteps::default() }
}

/// The output for element j at a step; `row` 1 is the conditional one under guidance.
fn output(x: f32, step: usize, j: usize, row: usize) -> f32 {
    0.8 * (1.3 * x).tanh() + 0.2 * ((step * 37 + j) as f32).sin() + 0.05 * row as f32
}

impl Denoiser for FormulaNetwork {
    fn denoise(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        let (step, input_scale) = (steps.index().get(0), steps.next_row(0).unwrap().input_scale);
        let [_, h, w, _] = x.dims("denoise", "x")?;
        self.calls.lock().unwrap().push((step, Size::new(w, h), input_scale, options.clone()));
        let (values, rows) = (x.to_f32_vec()?, if self.guided { 2 } else { 1 });
        let out: Vec<f32> = (0..rows)
            .flat_map(|row| values.iter().enumerate().map(move |(j, x)| output(input_scale * x, step, j, row)))
            .collect();
        Tensor::from_f32(device(), &[rows, h, w, 3], DType::F32, &out)
    }

    fn denoise_patches(&self, _: &PatchInput, _: &StepTable, _: &UnetOptions) -> Result<Tensor> {
        Err(Error::config("the formula", "no method here has views"))
    }
}

impl DiffusionModel for Formula {
    fn device(&self) -> &Device {
        device()
    }

    fn sample_shape(&self, size: Size) -> [usize; 4] {
        [1, size.height, size.width, 3]
    }

    fn begin_stage(&self, _: Size, _: &[f32], _: Option<Box<dyn Denoiser>>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(FormulaNetwork { guided: self.guided, calls: self.calls.clone() }))
    }

    fn conditioning_key(&self) -> Vec<usize> {
        Vec::new()
    }

    fn recorded_steps(&self) -> &RecordedSteps {
        &self.recorded
    }

    fn decode(&self, x0: &Tensor, _: &mut dyn FnMut(&str)) -> Result<Tensor> {
        let values: Vec<f32> = x0.to_f32_vec()?.iter().map(|v| v * self.contrast).collect();
        Tensor::from_f32(device(), x0.shape(), DType::F32, &values)
    }

    fn encode(&self, picture: &Tensor, noise: Option<&Tensor>, _: &mut dyn FnMut(&str)) -> Result<Tensor> {
        let mut values = picture.to_f32_vec()?;
        if let Some(noise) = noise {
            values.iter_mut().zip(noise.to_f32_vec()?).for_each(|(v, n)| *v += 0.1 * n);
        }
        Tensor::from_f32(device(), picture.shape(), DType::F32, &values)
    }
}

/// Uniform numbers of variance 1 that differ by draw; a prepared draw where there is one.
#[derive(Default)]
struct Draws {
    shapes: Vec<[usize; 4]>,
    prepared: HashMap<usize, Vec<f32>>,
}

impl NoiseSource for Draws {
    fn seeds(&self) -> Vec<u64> {
        vec![0]
    }

    fn normal(&mut self, shape: [usize; 4]) -> Result<Tensor> {
        let draw = self.shapes.len();
        self.shapes.push(shape);
        let count = shape.iter().product::<usize>() as u64;
        let hash = |i: u64| (i + 1000 * draw as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let uniform = |i: u64| (hash(i) as f32 / (1u64 << 24) as f32 - 0.5) * 12f32.sqrt();
        let values = self.prepared.get(&draw).cloned().unwrap_or_else(|| (0..count).map(uniform).collect());
        Tensor::from_f32(device(), &shape, DType::F32, &values)
    }

    fn normal_into(&mut self, to: &mut Tensor) -> Result<()> {
        let shape = to.dims("draw", "to")?;
        to.write_f32(&self.normal(shape)?.to_f32_vec()?)
    }
}

#[derive(Default)]
struct Recorded {
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    events: Vec<Event>,
    /// Cancel after this many events.
    patience: Option<usize>,
}

impl Observer for Recorded {
    fn event(&mut self, event: &Event) {
        self.events.push(event.clone());
    }
    fn cancelled(&self) -> bool {
        self.patience.is_some_and(|patience| self.events.len() >= patience)
    }
    fn wants_tensors(&self, _: usize) -> bool {
        true
    }
    fn tensor(&mut self, _: usize, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        let before = self.tensors.insert(name.to_string(), (shape.to_vec(), values));
        assert!(before.is_none(), "{name} twice");
        Ok(())
    }
}

impl Recorded {
    fn values(&self, name: &str) -> &[f32] {
        &self.tensors.get(name).unwrap_or_else(|| panic!("no {name}")).1
    }
}

fn config(spacing: &str) -> SchedulerConfig {
    let json = serde_json::json!({
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "set_alpha_to_one": false, "clip_sample": false, "timestep_spacing": spacing
    });
    SchedulerConfig::from_json("scheduler_config.json", &json.to_string()).unwrap()
}

/// MegaFusion as in these tests: without clamping.
fn mega() -> MegaFusion {
    MegaFusion { relay_clamp: RelayClamp::None, ..MegaFusion::default() }
}

fn plus() -> MegaFusion {
    MegaFusion { relay_clamp: RelayClamp::None, ..MegaFusion::plus() }
}

fn plan(method: impl Into<Method>, stages: &[&str]) -> Run {
    with_sampler(method, stages, Sampler::Ddim, 0.0)
}

fn with_sampler(method: impl Into<Method>, stages: &[&str], sampler: Sampler, eta: f64) -> Run {
    checked(method, stages, sampler, eta, None, 1).unwrap()
}

fn checked(
    method: impl Into<Method>,
    stages: &[&str],
    sampler: Sampler,
    eta: f64,
    guidance: Option<f32>,
    factor: usize,
) -> Result<Run> {
    let stages: Vec<Stage> = stages.iter().map(|stage| stage.parse().unwrap()).collect();
    let steps = stages.iter().map(|stage| stage.steps).sum::<usize>().max(1);
    let scheduler = Scheduler::new(&config("leading"), sampler, steps, eta).unwrap();
    Run::new(method.into(), stages, scheduler, guidance, factor)
}

fn run_with(model: &Formula, plan: &Run, draws: &mut Draws) -> (Vec<f32>, Recorded) {
    let mut recorded = Recorded::default();
    let images = methods::generate(model, plan, draws, Watch { observer: &mut recorded, first: 0 }).unwrap();
    (images[0].to_f32_vec().unwrap(), recorded)
}

fn run(plan: &Run) -> (Vec<f32>, Recorded) {
    run_with(&formula(), plan, &mut Draws::default())
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "element {i}: {got} is not {want}");
    }
}

#[test]
fn one_stage_is_plain_sampling_bit_for_bit_and_ends_with_x0() {
    let (plain, a) = run(&plan(Plain {}, &["6x5:8"]));
    let (mega, b) = run(&plan(plus(), &["6x5:8"]));
    for n in 1..=8 {
        assert_eq!(a.values(&format!("step{n}")), b.values(&format!("step{n}")));
    }
    assert_eq!(a.values("latent"), a.values("step8"));
    assert_eq!(a.values("image"), a.values("latent"));
    assert_ne!(plain, mega);
    // x_final = sqrt(abar_0) x0 + sqrt(1 - abar_0) eps: they differ by up to 0.0292 times the output.
    assert_close(&plain, &mega, 0.04);
}

/// The same size, no filter, and as noise what the truncated step would have kept: the relay must be invisible.
#[test]
fn an_identity_relay_with_the_steps_own_noise_is_the_untruncated_run() {
    for sampler in [Sampler::Ddim, Sampler::Euler] {
        let whole = with_sampler(Plain {}, &["7x4:10"], sampler, 0.0);
        let (_, want) = run(&whole);
        // Recover the noise that step 6 keeps: x7 = signal x0 + sigma noise at the level of step 7.
        let model = formula();
        let relayed = with_sampler(mega(), &["7x4:6", "7x4:4"], sampler, 0.0);
        let (_, first) = run_with(&model, &relayed, &mut Draws::default());
        let (signal, sigma) = relayed.scheduler().noise_level(6);
        let noise: Vec<f32> = (first.values("relay1.x0").iter().zip(want.values("step6")))
            .map(|(x0, x)| ((f64::from(*x) - signal * f64::from(*x0)) / sigma) as f32)
            .collect();
        let mut draws = Draws { prepared: HashMap::from([(1, to_nhwc(&noise, 3, 28))]), ..Draws::default() };
        let (_, got) = run_with(&model, &relayed, &mut draws);
        assert_close(got.values("relay1.noised"), want.values("step6"), 1e-6);
        for n in 7..=10 {
            assert_close(got.values(&format!("step{n}")), want.values(&format!("step{n}")), 3e-6);
        }
    }
}

fn to_nhwc(planar: &[f32], channels: usize, plane: usize) -> Vec<f32> {
    (0..plane).flat_map(|i| (0..channels).map(move |c| planar[c * plane + i])).collect()
}

#[test]
fn a_relay_noises_to_the_level_of_the_next_timestep() {
    for offset in [-6, -1, 0, 2] {
        let plan = plan(MegaFusion { relay_noise_offset: offset, ..mega() }, &["6x4:6", "6x4:4"]);
        let (_, r) = run(&plan);
        let level = plan.scheduler().timesteps()[(6 + offset) as usize] as usize;
        let abar = plan.scheduler().alphas_cumprod()[level];
        let (signal, sigma) = (abar.sqrt() as f32, (1.0 - abar).sqrt() as f32);
        let want: Vec<f32> =
            (r.values("relay1.encoded").iter().zip(r.values("noise1"))).map(|(y, n)| signal * y + sigma * n).collect();
        assert_close(r.values("relay1.noised"), &want, 2e-7);
        // Identity upsampler at the same size, identity VAE.
        assert_eq!(r.values("relay1.x0"), r.values("relay1.encoded"));
    }
}

#[test]
fn the_relayed_x0_is_that_of_the_last_evaluation() {
    let plan = plan(mega(), &["6x4:6", "12x8:4"]);
    let (_, r) = run(&plan);
    // Equation (2) from x and eps of step 6 (x: the latents after step 5).
    let abar = plan.scheduler().alphas_cumprod()[plan.scheduler().timesteps()[5] as usize];
    let x = to_nhwc(r.values("step5"), 3, 24);
    let x0 = to_nhwc(r.values("relay1.x0"), 3, 24);
    let want: Vec<f32> = (x.iter().enumerate())
        .map(|(j, x)| ((f64::from(*x) - (1.0 - abar).sqrt() * f64::from(output(*x, 5, j, 0))) / abar.sqrt()) as f32)
        .collect();
    assert_close(&x0, &want, 1e-6);
    let shapes: Vec<_> = ["x0", "decoded", "upsampled", "encoded", "noised"]
        .iter()
        .map(|name| r.tensors[&format!("relay1.{name}")].0.clone())
        .collect();
    assert_eq!(shapes[..2], [vec![1, 3, 4, 6], vec![1, 3, 4, 6]]);
    assert_eq!(shapes[2..], [vec![1, 3, 8, 12], vec![1, 3, 8, 12], vec![1, 3, 8, 12]]);
}

#[test]
fn every_stage_gets_its_steps_sizes_dilation_and_gamma() {
    let stages = ["8x6:3", "12x9:2", "16x10:2"];
    for (method, compat, dilations, gammas) in [
        (mega(), false, [1, 1, 1], [1.0, 1.0, 1.0]),
        (plus(), false, [1, 2, 2], [1.0, 2.25, 160.0 / 48.0]),
        // The published code: dilated from the start, and its base schedule re-scheduled with 2.25.
        (mega(), true, [1, 1, 1], [2.25, 2.25, 2.25]),
        (plus(), true, [2, 2, 2], [2.25, 2.25, 160.0 / 48.0]),
    ] {
        let plan = plan(MegaFusion { reference_compat: compat, ..method.clone() }, &stages);
        let model = formula();
        let (_, r) = run_with(&model, &plan, &mut Draws::default());
        let calls = model.calls.lock().unwrap();
        let steps: Vec<usize> = calls.iter().map(|call| call.0).collect();
        assert_eq!(steps, [0, 1, 2, 3, 4, 5, 6]);
        for (call, stage) in calls.iter().zip([0, 0, 0, 1, 1, 2, 2]) {
            assert_eq!(call.1, plan.stages()[stage].size);
            assert_eq!(call.3.mid_dilation, dilations[stage], "{method:?} compat {compat} stage {stage}");
        }
        let (shape, tables) = &r.tensors["alpha_bar"];
        assert_eq!(shape, &[3, 1000]);
        for (table, gamma) in tables.chunks(1000).zip(gammas) {
            for (got, a) in table.iter().zip(plan.scheduler().alphas_cumprod()) {
                let want = a / (gamma - (gamma - 1.0) * a);
                assert!((f64::from(*got) / want - 1.0).abs() < 1e-6, "{method:?} compat {compat} gamma {gamma}");
            }
        }
        assert_eq!(r.values("timesteps"), plan.scheduler().timesteps());
    }
}

#[test]
fn the_published_gamma_table_is_that_of_its_sizes() {
    // 768 first: by area 1024x1024 would get 1.78, the published table says 4.
    let compat = MegaFusion { reference_compat: true, ..plus() };
    let plan = plan(compat.clone(), &["768x768:2", "1024x1024:1"]);
    let base = plan.scheduler();
    let got = &compat.schedulers(&plan)[1];
    assert_eq!(got.alphas_cumprod(), base.rescheduled(4.0).alphas_cumprod());
}

#[test]
fn a_chosen_gamma_is_that_of_every_stage_but_the_first() {
    let chosen = MegaFusion { gamma: Some(6.0), ..plus() };
    let plan = plan(chosen.clone(), &["64x64:2", "96x96:1", "128x128:1"]);
    let gammas = [1.0, 6.0, 6.0].map(|gamma| plan.scheduler().rescheduled(gamma).alphas_cumprod().to_vec());
    let got: Vec<_> = chosen.schedulers(&plan).iter().map(|scheduler| scheduler.alphas_cumprod().to_vec()).collect();
    assert_eq!(got, gammas);
}

#[test]
fn draws_come_in_the_documented_order() {
    let small = [1, 4, 6, 3];
    let large = [1, 8, 12, 3];
    let shapes = |method: MegaFusion, sampler, eta| {
        let mut draws = Draws::default();
        run_with(&formula(), &with_sampler(method, &["6x4:2", "12x8:2"], sampler, eta), &mut draws);
        draws.shapes
    };
    assert_eq!(shapes(mega(), Sampler::Ddim, 0.0), [small, large]);
    assert_eq!(shapes(mega(), Sampler::Ddim, 0.5), [small, small, small, large, large, large]);
    let compat = MegaFusion { reference_compat: true, ..mega() };
    assert_eq!(shapes(compat, Sampler::Ddim, 0.0), [small, large, large]);
    // An ancestral step draws even where the noise then has no weight: at the end.
    assert_eq!(shapes(mega(), Sampler::EulerAncestral, 0.0), [small, small, small, large, large, large]);
    assert_eq!(shapes(mega(), Sampler::Euler, 0.0), [small, large]);
}

#[test]
fn every_draw_is_dumped_as_drawn() {
    let plan = with_sampler(mega(), &["6x4:2", "12x8:2"], Sampler::Euler, 0.0);
    let (_, r) = run(&plan);
    let mut draws = Draws::default();
    let first = draws.normal([1, 4, 6, 3]).unwrap().to_f32_vec().unwrap();
    assert_eq!(to_nhwc(r.values("noise0"), 3, 24), first); // before init_noise_sigma
}

/// --reference-compat: x0' = a x0 + b eps with a = sqrt(abar_s / abar_t), b = (sqrt(1 - abar_s) - sqrt(1 - abar_t)) /
/// sqrt(abar_t).
#[test]
fn the_published_x0_comes_from_the_updated_latents() {
    let method = MegaFusion { reference_compat: true, ..mega() };
    let compat = plan(method.clone(), &["6x4:40", "6x4:10"]);
    let (_, r) = run(&compat);
    let table = method.schedulers(&compat)[0].alphas_cumprod().to_vec();
    let (abar_t, abar_s) = (table[201], table[181]);
    let x = to_nhwc(r.values("step39"), 3, 24);
    let got = to_nhwc(r.values("relay1.x0"), 3, 24);
    let a = (abar_s / abar_t).sqrt();
    let b = ((1.0 - abar_s).sqrt() - (1.0 - abar_t).sqrt()) / abar_t.sqrt();
    let want: Vec<f32> = (x.iter().enumerate())
        .map(|(j, x)| {
            let eps = f64::from(output(*x, 39, j, 0));
            let x0 = (f64::from(*x) - (1.0 - abar_t).sqrt() * eps) / abar_t.sqrt();
            (a * x0 + b * eps) as f32
        })
        .collect();
    assert_close(&got, &want, 1e-6);
    // On the base schedule, the values of the paper's analysis.
    let base = compat.scheduler().alphas_cumprod();
    assert!(((base[181] / base[201]).sqrt() - 1.02008).abs() < 1e-5);
}

#[test]
fn relays_clamp_where_asked() {
    let model = Formula { contrast: 3.0, ..formula() };
    let largest = |clamp, compat| {
        let method = MegaFusion { relay_clamp: clamp, reference_compat: compat, ..mega() };
        let plan = plan(method, &["6x4:6", "12x8:4"]);
        let (_, r) = run_with(&model, &plan, &mut Draws::default());
        let max = |name: &str| r.values(name).iter().fold(0f32, |m, v| m.max(v.abs()));
        (max("relay1.decoded"), max("relay1.upsampled"))
    };
    let (decoded, none) = largest(RelayClamp::None, false);
    assert!(decoded > 1.2 && none > 1.2, "the test needs values beyond the range: {decoded} {none}");
    let (unclamped, decode) = largest(RelayClamp::Decode, false);
    assert_eq!(unclamped, decoded); // dumped before any clamp
    assert!(decode > 1.0 && decode < none, "bicubic overshoots the clamped picture a little: {decode}");
    assert_eq!(largest(RelayClamp::Both, false).1, 1.0);
    assert_eq!(largest(RelayClamp::None, true).1, 1.0); // 8 bits
}

#[test]
fn the_published_relay_passes_through_8_bits() {
    let plan = plan(MegaFusion { reference_compat: true, ..mega() }, &["6x4:6", "12x8:4"]);
    let (_, r) = run(&plan);
    for value in r.values("relay1.upsampled") {
        let level = (value / 2.0 + 0.5) * 255.0;
        assert!((level - level.round()).abs() < 1e-4, "{value} is not a level of 8 bits");
    }
    // The posterior's noise is the draw before the relay's own.
    let want: Vec<f32> =
        (r.values("relay1.upsampled").iter().zip(r.values("noise1"))).map(|(v, n)| v + 0.1 * n).collect();
    assert_close(r.values("relay1.encoded"), &want, 1e-6);
}

#[test]
fn guidance_extrapolates_from_the_unconditional_row() {
    let model = Formula { guided: true, ..formula() };
    let plan = checked(Plain {}, &["6x4:1"], Sampler::Ddim, 0.0, Some(7.0), 1).unwrap();
    let (_, r) = run_with(&model, &plan, &mut Draws::default());
    let x = to_nhwc(r.values("noise0"), 3, 24);
    let c = plan.scheduler().evaluations(0..1)[0].coefficients;
    let want: Vec<f32> = (x.iter().enumerate())
        .map(|(j, x)| {
            let (u, p) = (output(*x, 0, j, 0), output(*x, 0, j, 1));
            let e = u + 7.0 * (p - u);
            c.next_from_e * e + c.next_from_x0 * (c.x0_from_x * x + c.x0_from_e * e)
        })
        .collect();
    // x0 divides by sqrt(abar) and is far from 1 when noise is all there is.
    assert_close(&to_nhwc(r.values("step1"), 3, 24), &want, 1e-5);
}

#[test]
fn euler_stages_start_at_their_own_sigma() {
    let plan = with_sampler(plus(), &["8x8:6", "16x16:4"], Sampler::Euler, 0.0);
    let model = formula();
    let (_, r) = run_with(&model, &plan, &mut Draws::default());
    let sigma = 2.0 * plan.scheduler().noise_level(6).1; // gamma 4
    let want: Vec<f32> =
        (r.values("relay1.encoded").iter().zip(r.values("noise1"))).map(|(y, n)| y + sigma as f32 * n).collect();
    assert_close(r.values("relay1.noised"), &want, 1e-6);
    let scale = model.calls.lock().unwrap()[6].2;
    assert!((f64::from(scale) * (sigma * sigma + 1.0).sqrt() - 1.0).abs() < 1e-6);
}

#[test]
fn a_run_ends_where_it_is_cancelled() {
    let plan = plan(mega(), &["6x4:2", "12x8:2"]);
    let (_, whole) = run(&plan);
    for patience in 0..whole.events.len() {
        let model = formula();
        let mut observer = Recorded { patience: Some(patience), ..Recorded::default() };
        let watch = Watch { observer: &mut observer, first: 0 };
        let error = methods::generate(&model, &plan, &mut Draws::default(), watch).unwrap_err();
        assert!(matches!(error, Error::Interrupted));
        assert!(observer.events.len() <= patience + 1, "went on after {patience} events");
    }
}

#[test]
fn a_sample_that_is_not_finite_names_its_stage() {
    let plan = plan(mega(), &["6x4:2", "12x8:2"]);
    for (prepared, word) in [(0, "stage 1 (6x4)"), (1, "stage 2 (12x8)")] {
        let count = if prepared == 0 { 72 } else { 288 };
        let mut draws = Draws { prepared: HashMap::from([(prepared, vec![f32::NAN; count])]), ..Draws::default() };
        let mut observer = Recorded::default();
        let watch = Watch { observer: &mut observer, first: 0 };
        let error = methods::generate(&formula(), &plan, &mut draws, watch).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::NonFinite { .. }) && text.contains(word), "{text}");
    }
}

#[test]
fn plans_that_cannot_run_name_the_field() {
    let two = ["64x64:6", "128x128:4"];
    let of = |method: Method, stages: &[&str], sampler| checked(method, stages, sampler, 0.0, None, 8);
    let refused = |method: Method, stages: &[&str], sampler, field: &str| match of(method, stages, sampler) {
        Err(Error::Request { field: got, .. }) => assert_eq!(got, field),
        other => panic!("{field}: {other:?}"),
    };
    let ddim = Sampler::Ddim;
    of(mega().into(), &two, ddim).unwrap();
    refused(mega().into(), &[], ddim, "stages");
    refused(Plain {}.into(), &two, ddim, "stages");
    refused(mega().into(), &["60x64:6", "128x128:4"], ddim, "stages");
    refused(MegaFusion { dilation: 0, ..mega() }.into(), &two, ddim, "dilation");
    for (offset, beyond) in [(3, 4), (-6, -7)] {
        of(MegaFusion { relay_noise_offset: offset, ..mega() }.into(), &two, ddim).unwrap();
        refused(MegaFusion { relay_noise_offset: beyond, ..mega() }.into(), &two, ddim, "relay_noise_offset");
    }
    refused(MegaFusion { gamma: Some(4.0), ..mega() }.into(), &two, ddim, "gamma");
    for gamma in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let method = MegaFusion { gamma: Some(gamma), reschedule: true, ..mega() };
        refused(Method::of(&MEGAFUSION, method), &two, ddim, "gamma");
    }
    of(MegaFusion { gamma: Some(4.0), reschedule: true, ..mega() }.into(), &two, ddim).unwrap();
    let compat = MegaFusion { reference_compat: true, ..mega() };
    refused(compat.into(), &two, Sampler::Euler, "reference_compat");
    let scheduler = Scheduler::new(&config("leading"), ddim, 9, 0.0).unwrap();
    let stages = two.map(|stage| stage.parse().unwrap()).to_vec();
    let error = Run::new(mega().into(), stages, scheduler, None, 8).unwrap_err().to_string();
    assert!(error.contains("10 steps") && error.contains("the scheduler has 9"), "{error}");
}

/// Two stages, of which the second does the last steps of the first one's schedule again.
#[derive(Debug, serde::Serialize)]
struct Again;

static AGAIN: MethodSpec = MethodSpec {
    name: "again",
    summary: "",
    relays: true,
    choices: &[],
    options: &[],
    parse: |_| unreachable!("it is made by name"),
};

impl GenerationMethod for Again {
    fn stages(&self, _: &Geometry) -> Result<Vec<Stage>> {
        unreachable!("its stages are given")
    }

    fn ranges(&self, stages: &[Stage]) -> Vec<Range<usize>> {
        stages.iter().map(|stage| stages[0].steps - stage.steps..stages[0].steps).collect()
    }

    fn check(&self, _: &Run) -> Result<()> {
        Ok(())
    }

    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        sampling.prepare(vec![sampling.run().scheduler().clone(); 2], |coefficients| coefficients)?;
        let x = sampling.initial_noise(sampling.run().stages()[0].size)?;
        let (x, _) = sampling.stage(0, x, &|_| Prediction::default())?;
        Ok(sampling.stage(1, x, &|_| Prediction::default())?.0)
    }
}

#[test]
fn a_stage_takes_the_steps_that_its_method_says() {
    let method = Method::of(&AGAIN, Again);
    let stages: Vec<Stage> = ["16x16:6", "16x16:2"].iter().map(|stage| stage.parse().unwrap()).collect();
    assert_eq!(method.scheduled_steps(&stages), 6);
    let scheduler = Scheduler::new(&config("leading"), Sampler::Euler, 6, 0.0).unwrap();
    let (own, all) = (scheduler.evaluations(4..6), scheduler.timesteps().to_vec());
    let plan = Run::new(method, stages, scheduler, None, 8).unwrap();
    assert_eq!((plan.ranges(), plan.steps()), (&[0..6, 4..6][..], 8));
    assert_eq!(plan.timesteps(), [&all[..], &all[4..]].concat());
    let model = formula();
    run_with(&model, &plan, &mut Draws::default());
    let calls = model.calls.lock().unwrap();
    let scales: Vec<f32> = calls.iter().map(|call| call.2).collect();
    assert_eq!(calls.iter().map(|call| call.0).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    assert_eq!(scales[6..], [own[0].input_scale, own[1].input_scale]);
    assert_eq!(scales[6..], scales[4..6]);
}

#[test]
fn options_have_one_definition() {
    let plus = Method::named("megafusion++").unwrap();
    let listed: Vec<&str> = plus.spec().options.iter().map(|option| option.name).collect();
    let with_gamma = plus.with("gamma", 2.0).unwrap();
    let own: Vec<&String> = with_gamma.options().keys().collect();
    assert_eq!(own, listed[..own.len()], "in the order of the struct's fields, those of parts left out");
    let parts = PartOptions {
        raunet: Some(true),
        windows: Some(true),
        t1: Some(0.5),
        t2: Some(0.5),
        aggressive: Some(true),
        window: Some(8),
        stride: Some(4),
        view_batch: Some(1),
        cosine: Some([1.0; 3]),
        sigma: Some(1.0),
    };
    let all = Method::from(MegaFusion { parts, gamma: Some(2.0), ..MegaFusion::plus() });
    assert_eq!(all.options().keys().collect::<Vec<_>>(), listed, "in the order of the struct's fields");
    // Options of parts go with the method where they are its own or parts' as well, and not from a method's own to parts.
    assert_eq!(all.replaced_by(&MEGAFUSION).unwrap().option("t1"), Some(&0.5.into()));
    let shares = Method::named("hidiffusion").unwrap().with("t1", 0.5).unwrap();
    assert_eq!(shares.replaced_by(&MEGAFUSION).unwrap(), Method::default());
    let stages = ["64x64:2".parse().unwrap(), "96x96:2+raunet".parse().unwrap()];
    assert!(
        MEGAFUSION.reads("t1", &stages) && !MEGAFUSION.reads("t1", &stages[..1]) && !MEGAFUSION.reads("sigma", &stages)
    );
    assert!(shares.spec().reads("t1", &[]) && MEGAFUSION.reads("dilation", &[]));
    assert_eq!(plus, MegaFusion::plus().into());
    assert_eq!(plus.replaced_by(&MEGAFUSION).unwrap(), Method::default());
    assert_eq!(with_gamma.replaced_by(&MEGAFUSION).unwrap().option("gamma"), Some(&2.0.into()));
    assert_ne!(plus, plus.with("dilation", 3).unwrap());
    let error = |result: Result<Method>| result.unwrap_err().to_string();
    let unknown = error(Method::named("plain").unwrap().with("dilation", 2));
    assert!(unknown.contains("dilation 2") && unknown.contains("megafusion or megafusion++ has it"), "{unknown}");
    let wrong = error(plus.with("upsampler", "cubic"));
    assert!(wrong.contains("upsampler cubic") && wrong.contains("bicubic-edge"), "{wrong}");
    assert!(error(Method::named("magic")).contains("plain, megafusion, megafusion++, "));
    assert_eq!(Method::of(&MEGAFUSION_PLUS, MegaFusion::default()).name(), "megafusion++");
}

fn listed(stages: &[Stage]) -> Vec<String> {
    stages.iter().map(Stage::to_string).collect()
}

#[test]
fn default_stages_are_the_papers() {
    let stages = |method: &dyn GenerationMethod, size: &str, native: usize, factor: usize, steps| {
        let (size, native, sides) = (size.parse().unwrap(), Size::new(native, native), factor.into());
        listed(&method.stages(&Geometry { size, native, sides, steps, relay_growth: 0.5, relayed_share: 0.2 }).unwrap())
    };
    let mega = &mega();
    assert_eq!(stages(mega, "1024x1024", 512, 8, 50), ["512x512:40", "768x768:5", "1024x1024:5"]);
    assert_eq!(stages(mega, "768x768", 512, 8, 50), ["512x512:40", "768x768:10"]);
    assert_eq!(stages(mega, "512x512", 512, 8, 50), ["512x512:50"]);
    assert_eq!(stages(mega, "384x512", 512, 8, 50), ["384x512:50"]);
    assert_eq!(stages(&Plain {}, "1024x1024", 512, 8, 50), ["1024x1024:50"]);
    assert_eq!(stages(mega, "256x256", 64, 4, 50), ["64x64:40", "128x128:4", "192x192:3", "256x256:3"]);
    assert_eq!(stages(mega, "2048x2048", 512, 8, 50), ["512x512:40", "1024x1024:4", "1536x1536:3", "2048x2048:3"]);
    assert_eq!(stages(mega, "1024x1024", 512, 8, 3), ["512x512:1", "768x768:1", "1024x1024:1"]);
    assert_eq!(stages(mega, "1024x1024", 512, 8, 2), ["512x512:1", "1024x1024:1"]);
    assert_eq!(stages(mega, "1024x1024", 512, 8, 1), ["1024x1024:1"]);
    let odd = methods::relay_stages(&sd(Size::new(1000, 1001), 512, 50)).unwrap_err();
    assert!(odd.to_string().contains("1000x1000"), "{odd}");
}

#[test]
fn sdxl_relays_once_to_twice_its_sides() {
    let stages = |size: &str, steps| {
        let geometry = Geometry { relay_growth: 1.0, ..sd(size.parse().unwrap(), 1024, steps) };
        listed(&methods::relay_stages(&geometry).unwrap())
    };
    assert_eq!(stages("2048x2048", 50), ["1024x1024:40", "2048x2048:10"]);
    assert_eq!(stages("3072x3072", 50), ["1024x1024:40", "2048x2048:5", "3072x3072:5"]);
    assert_eq!(stages("1024x1024", 50), ["1024x1024:50"]);
}

/// Of an SD 1.x model with this native side.
fn sd(size: Size, native: usize, steps: usize) -> Geometry {
    Geometry { size, native: Size::new(native, native), sides: 8.into(), steps, relay_growth: 0.5, relayed_share: 0.2 }
}

/// The sizes of the paper's appendix on SDXL's and SD 1.5's native areas.
#[test]
fn the_ten_aspect_ratios_start_from_the_native_area() {
    let sizes = [
        ("2048x2048", "1024x1024"),
        ("1920x1080", "1368x768"),
        ("1536x2048", "888x1184"),
        ("2048x1536", "1184x888"),
        ("640x2560", "512x2048"),
        ("2560x640", "2048x512"),
        ("1024x2048", "728x1448"),
        ("2048x1024", "1448x728"),
        ("2016x864", "1568x672"),
        ("864x2016", "672x1568"),
    ];
    for (size, base) in sizes {
        let size: Size = size.parse().unwrap();
        assert_eq!(methods::base_size(size, Size::new(1024, 1024), 8).to_string(), base);
        for native in [512, 768, 1024] {
            for steps in [10, 28, 50] {
                let stages = methods::relay_stages(&sd(size, native, steps)).unwrap();
                assert_eq!(stages.iter().map(|stage| stage.steps).sum::<usize>(), steps);
                assert_eq!(stages[stages.len() - 1].size, size);
                let listed = listed(&stages);
                for pair in stages.windows(2) {
                    assert!(pair[0].size.area() < pair[1].size.area(), "{listed:?}");
                    assert!(pair[0].steps >= pair[1].steps, "{listed:?}");
                }
                for stage in &stages {
                    assert!(stage.size.width % 8 == 0 && stage.size.height % 8 == 0, "{listed:?}");
                    let ratio = |size: Size| size.width as f64 / size.height as f64;
                    let stretch = ratio(stage.size) / ratio(size);
                    assert!((stretch - 1.0).abs() < 0.02, "{listed:?}: stretched by {stretch}");
                }
            }
        }
    }
}

#[test]
fn sizes_and_stages_are_read_as_they_are_written() {
    for text in ["1x1", "1920x1080"] {
        assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
    }
    assert_eq!("512X256".parse::<Size>().unwrap(), Size::new(512, 256));
    for text in ["", "512", "512x", "x512", "0x512", "-1x5", "5x5x5", "70000x8", "512x512:0", "512 x 512"] {
        assert!(matches!(text.parse::<Size>(), Err(Error::Request { field: "size", .. })), "{text}");
    }
    assert_eq!("512x256:40".parse::<Stage>().unwrap().to_string(), "512x256:40");
    for text in ["512x512", "512x512:", "512x512:0", "512x512:-1", ":5", "512x512:5:5"] {
        assert!(matches!(text.parse::<Stage>(), Err(Error::Request { field: "stages", .. })), "{text}");
    }
}
