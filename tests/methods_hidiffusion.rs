//! HiDiffusion's schedule: what is asked of the network in which step, by model, size and options; its draws; what is refused.

use std::sync::{Arc, Mutex};

use megafuse::methods::{
    self, Choices, Denoiser, DiffusionModel, HIDIFFUSION, HiDiffusion, Method, ModelFacts, NoiseSource, Observer,
    PatchInput, RecordedSteps, Run, Silent, Size, Stage, Start, Watch,
};
use megafuse::models::{UnetConfig, UnetOptions};
use megafuse::ops::StepTable;
use megafuse::schedulers::{Sampler, Scheduler, SchedulerConfig};
use megafuse::{DType, Device, Result, Tensor};

/// The options of every call, and the shifts that the network would read in it.
type Calls = Arc<Mutex<Vec<(UnetOptions, Vec<u32>)>>>;

/// A model of one channel whose output is 0, for `images` pictures of seeds 0, 1 and so on.
struct Nothing {
    device: Device,
    images: usize,
    calls: Calls,
    recorded: RecordedSteps,
}

struct Network(Calls);

impl Denoiser for Network {
    fn denoise(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        let row = steps.index().get(0);
        let shifts = steps.window_shifts().map_or(Vec::new(), |shifts| {
            let row = shifts.rows(row..row + 1).unwrap();
            row.to_f32_vec().unwrap().iter().map(|&shift| shift as u32).collect()
        });
        self.0.lock().unwrap().push((options.clone(), shifts));
        Tensor::zeros(x.device(), x.shape(), DType::F32)
    }
    fn denoise_patches(&self, _: &PatchInput, _: &StepTable, _: &UnetOptions) -> Result<Tensor> {
        unreachable!("no views")
    }
    fn tell_crops(&mut self, _: usize, _: &[[f32; 2]]) -> Result<()> {
        unreachable!("no views")
    }
}

impl DiffusionModel for Nothing {
    fn device(&self) -> &Device {
        &self.device
    }
    fn sample_shape(&self, size: Size) -> [usize; 4] {
        [self.images, size.height / 8, size.width / 8, 1]
    }
    fn begin_stage(&self, _: Size, _: &[f32], _: Option<Box<dyn Denoiser>>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Network(self.calls.clone())))
    }
    fn conditioning_key(&self) -> Vec<usize> {
        Vec::new()
    }
    fn recorded_steps(&self) -> &RecordedSteps {
        &self.recorded
    }
    fn decode(&self, x0: &Tensor, _: &mut dyn FnMut(&str)) -> Result<Tensor> {
        Ok(x0.clone())
    }
    fn encode(&self, picture: &Tensor, _: Option<&Tensor>, _: &mut dyn FnMut(&str)) -> Result<Tensor> {
        Ok(picture.clone())
    }
}

struct Zeros(Device, usize);

impl NoiseSource for Zeros {
    fn seeds(&self) -> Vec<u64> {
        (0..self.1 as u64).collect()
    }
    fn normal(&mut self, shape: [usize; 4]) -> Result<Tensor> {
        Tensor::zeros(&self.0, &shape, DType::F32)
    }
    fn normal_into(&mut self, _: &mut Tensor) -> Result<()> {
        unreachable!("DDIM draws nothing")
    }
}

/// SD's and SDXL's UNets as they are published, and one of neither map.
fn config(name: &str) -> UnetConfig {
    let (blocks, more) = match name {
        "sdxl" | "inpainting" => {
            let input = if name == "sdxl" { 4 } else { 9 };
            let down = r#"["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]"#;
            let up = r#"["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]"#;
            let more = format!(
                r#""block_out_channels": [320, 640, 1280], "sample_size": 128, "attention_head_dim": [5, 10, 20],
                   "transformer_layers_per_block": [1, 2, 10], "in_channels": {input}"#
            );
            (format!(r#""down_block_types": {down}, "up_block_types": {up}"#), more)
        }
        "sd" => (r#""center_input_sample": false"#.into(), r#""sample_size": 64"#.into()),
        _ => {
            let down = r#"["DownBlock2D", "CrossAttnDownBlock2D"]"#;
            let up = r#"["CrossAttnUpBlock2D", "UpBlock2D"]"#;
            (
                format!(r#""down_block_types": {down}, "up_block_types": {up}"#),
                r#""block_out_channels": [32, 64]"#.into(),
            )
        }
    };
    UnetConfig::from_json("unet/config.json", &format!("{{{blocks}, {more}}}")).unwrap()
}

struct Case {
    unet: &'static str,
    name: &'static str,
    distilled: bool,
    size: &'static str,
    steps: usize,
}

/// One of SDXL at 2048x2048 in 50 steps.
const SDXL: Case = Case { unet: "sdxl", name: "stable-diffusion-xl", distilled: false, size: "2048x2048", steps: 50 };

fn run_of(case: &Case, options: HiDiffusion, sampler: Sampler) -> Result<Run> {
    let schedule = r#"{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}"#;
    let schedule = SchedulerConfig::from_json("scheduler_config.json", schedule).unwrap();
    let stages: Vec<Stage> = vec![format!("{}:{}", case.size, case.steps).parse().unwrap()];
    let scheduler = Scheduler::new(&schedule, sampler, case.steps, 0.0).unwrap();
    let facts = ModelFacts { name: case.name.into(), distilled: case.distilled, unet: Some(config(case.unet)) };
    Run::new(options.into(), stages, scheduler, None, 8)?.of_model(facts)
}

fn calls(run: &Run, images: usize, observer: &mut dyn Observer) -> Vec<(UnetOptions, Vec<u32>)> {
    let device = Device::cpu();
    let model = Nothing { device: device.clone(), images, calls: Calls::default(), recorded: RecordedSteps::default() };
    methods::generate(&model, run, &mut Zeros(device, images), Watch { observer, first: 0 }).unwrap();
    model.calls.lock().unwrap().clone()
}

/// Level and steps of the wide downsampler and of the pooled block: `Some((level, first, end))`, `None` where never.
type Parts = [Option<(usize, usize, usize)>; 2];

fn parts(case: &Case, options: HiDiffusion) -> Parts {
    parts_of(&run_of(case, options, Sampler::Ddim).unwrap())
}

fn parts_of(run: &Run) -> Parts {
    let calls = calls(run, 1, &mut Silent);
    assert_eq!(calls.len(), run.steps());
    let of = |pick: &dyn Fn(&UnetOptions) -> Option<usize>| {
        let on: Vec<usize> = (0..calls.len()).filter(|&step| pick(&calls[step].0).is_some()).collect();
        let (&first, &last) = (on.first()?, on.last()?);
        assert_eq!(on.len(), last + 1 - first, "one range of steps");
        Some((pick(&calls[first].0).unwrap(), first, last + 1))
    };
    [of(&|options| options.wide_downsampler), of(&|options| options.pooled_level)]
}

/// The table of the published thresholds: D and P by model, size and steps.
#[test]
fn thresholds_are_the_published_ones() {
    let none = HiDiffusion::default;
    let sd = |size, steps| Case { unet: "sd", name: "sd", distilled: false, size, steps };
    let sdxl = |size, steps| Case { size, steps, ..SDXL };
    for (case, want) in [
        (sdxl("2048x2048", 50), [Some((1, 0, 8)), Some((1, 8, 20))]),
        (sdxl("2048x4096", 50), [Some((1, 0, 8)), Some((1, 8, 20))]),
        (sdxl("1024x1024", 30), [Some((1, 0, 4)), Some((1, 4, 12))]),
        (sdxl("1024x1024", 42), [Some((1, 0, 6)), Some((1, 6, 16))]),
        (sdxl("1024x1024", 28), [Some((1, 0, 4)), Some((1, 4, 11))]),
        (sdxl("1024x1024", 25), [Some((1, 0, 4)), Some((1, 4, 10))]),
        (sdxl("1024x1024", 20), [Some((1, 0, 3)), Some((1, 3, 8))]),
        (sdxl("1024x1024", 4), [None, Some((1, 0, 1))]),
        (sdxl("4096x4096", 40), [Some((1, 0, 12)), Some((1, 0, 28))]),
        (sdxl("4096x4096", 25), [Some((1, 0, 7)), Some((1, 0, 17))]),
        (Case { distilled: true, ..sdxl("1024x1024", 4) }, [None, Some((1, 0, 2))]),
        (Case { unet: "inpainting", ..sdxl("1024x1024", 50) }, [None, Some((1, 0, 20))]),
        (Case { name: "playground-v2", ..sdxl("1024x1024", 50) }, [None, Some((1, 0, 20))]),
        (sd("1024x1024", 50), [Some((0, 0, 20)), None]),
        (sd("2048x2048", 50), [Some((0, 0, 35)), Some((1, 0, 15))]),
        (sd("2048x2040", 30), [Some((0, 0, 12)), None]),
        (Case { distilled: true, ..sd("1024x1024", 4) }, [Some((0, 0, 1)), None]),
    ] {
        assert_eq!(parts(&case, none()), want, "{} {} {} {}", case.unet, case.name, case.size, case.steps);
    }
    let case = sdxl("1024x1024", 50);
    let own = HiDiffusion { t1: Some(0.5), t2: Some(0.1), aggressive: Some(false), ..none() };
    assert_eq!(parts(&case, own), [Some((1, 0, 5)), Some((1, 0, 25))]);
    assert_eq!(parts(&case, HiDiffusion { raunet: false, ..none() }), [None, None]);
    // From a picture: of the 42 steps that are made.
    let start = Start::new(0.85, 50, false).unwrap();
    let begun = run_of(&case, none(), Sampler::Ddim).unwrap().starting(start).unwrap();
    assert_eq!((begun.steps(), parts_of(&begun)), (42, [Some((1, 0, 6)), Some((1, 6, 16))]));
}

/// Ten a step of SDXL, of which the first ten for seed 0 are torch's 0.4963, 0.7682, 0.0885, ... by quarters; each picture has its
/// own; the halves of guidance share them.
#[test]
fn shifts_are_torchs_draws_in_the_order_of_execution() {
    let case = Case { size: "1024x1024", steps: 3, ..SDXL };
    let run = run_of(&case, HiDiffusion::default(), Sampler::Ddim).unwrap();
    let both = calls(&run, 2, &mut Silent);
    assert!(both.iter().all(|(options, _)| options.windowed_level == Some(1)));
    assert_eq!(both[0].1[..10], [1, 3, 0, 0, 1, 2, 1, 3, 1, 2]);
    let alone = calls(&run, 1, &mut Silent);
    for (both, alone) in both.iter().zip(&alone) {
        assert_eq!((both.1.len(), &both.1[..10]), (20, &alone.1[..]));
    }
    assert_ne!(both[0].1[..10], both[0].1[10..]);
    assert_ne!(both[0].1[..10], both[1].1[..10]);

    // Five a step of SD; none without windows.
    let sd = Case { unet: "sd", ..case };
    let of = |options| calls(&run_of(&sd, options, Sampler::Ddim).unwrap(), 1, &mut Silent);
    assert_eq!(of(HiDiffusion::default())[0].1, [1, 3, 0, 0, 1]);
    let without = of(HiDiffusion { windows: false, ..HiDiffusion::default() });
    assert!(without.iter().all(|(options, shifts)| options.windowed_level.is_none() && shifts.is_empty()));
}

/// Both evaluations of a step have the step's options and shifts.
#[test]
fn a_sampler_with_two_evaluations_counts_steps() {
    let case = Case { size: "512x512", steps: 10, ..SDXL };
    let choices = Choices::default().with("shifts", &[10, 10], (0..100).map(|i| i / 10 % 4).collect());
    let run = run_of(&case, HiDiffusion::default(), Sampler::Heun).unwrap().with_choices(choices).unwrap();
    let calls = calls(&run, 1, &mut Silent);
    assert_eq!(calls.len(), 19, "the last step has one");
    for (i, (options, shifts)) in calls.iter().enumerate() {
        let step = i / 2;
        assert_eq!(shifts[..], [step as u32 % 4; 10], "{i}");
        assert_eq!(
            (options.wide_downsampler.is_some(), options.pooled_level.is_some()),
            (step < 1, (1..4).contains(&step))
        );
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |case: &Case, options| run_of(case, options, Sampler::Ddim).unwrap_err().to_string();
    let error = refused(&Case { unet: "neither", ..SDXL }, HiDiffusion::default());
    assert!(error.starts_with("unet/config.json: hidiffusion knows the blocks of SD"), "{error}");
    assert!(error.ends_with("this UNet has none, attention"), "{error}");
    for (options, part) in [
        (HiDiffusion { t1: Some(1.5), ..HiDiffusion::default() }, "t1 1.5: expected a share of the steps, 0 to 1"),
        (
            HiDiffusion { raunet: false, t2: Some(0.1), ..HiDiffusion::default() },
            "t2 0.1: has no effect with request.raunet",
        ),
        (
            HiDiffusion { raunet: false, aggressive: Some(true), ..HiDiffusion::default() },
            "aggressive true: has no effect with request.raunet",
        ),
    ] {
        let error = refused(&SDXL, options);
        assert!(error.contains(part), "{error}");
    }
    let share = |text: &str| HIDIFFUSION.option("t1").unwrap().kind.parse(text);
    assert_eq!((share("0"), share("1")), (Ok(0.0.into()), Ok(1.0.into())));
    assert!(share("-0.1").is_err() && share("1.01").is_err() && share("NaN").is_err());
    let method: Method = HiDiffusion::default().into();
    assert_eq!(method.options().keys().collect::<Vec<_>>(), ["raunet", "windows"]);
}
