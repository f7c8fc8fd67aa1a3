//! What a method of one stage asks of the network, step by step: runs of a model that computes nothing.

use std::sync::{Arc, Mutex};

use megafuse::methods::{
    self, Denoiser, DiffusionModel, Method, ModelFacts, NoiseSource, RecordedSteps, Run, Silent, Size, Stage, Watch,
};
use megafuse::models::{UnetConfig, UnetOptions};
use megafuse::ops::StepTable;
use megafuse::schedulers::{Sampler, Scheduler, SchedulerConfig};
use megafuse::{DType, Device, Result, Tensor};

/// Was it a call with twins, and what else did it ask?
type Calls = Arc<Mutex<Vec<(bool, UnetOptions)>>>;

/// A model of one channel and one picture whose output is 0; under guidance it has two rows.
struct Nothing {
    device: Device,
    rows: usize,
    calls: Calls,
    told: Mutex<Option<Size>>,
    recorded: RecordedSteps,
}

struct Network(usize, Calls);

impl Network {
    fn zeros(&self, x: &Tensor, rows: usize) -> Result<Tensor> {
        Tensor::zeros(x.device(), &[&[rows], &x.shape()[1..]].concat(), DType::F32)
    }
}

impl Denoiser for Network {
    fn denoise(&self, x: &Tensor, _: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        self.1.lock().unwrap().push((false, options.clone()));
        self.zeros(x, self.0)
    }
    fn denoise_twins(&self, x: &Tensor, _: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        self.1.lock().unwrap().push((true, options.clone()));
        self.zeros(x, self.0 + 1)
    }
}

impl DiffusionModel for Nothing {
    fn device(&self) -> &Device {
        &self.device
    }
    fn sample_shape(&self, size: Size) -> [usize; 4] {
        [1, size.height / 8, size.width / 8, 1]
    }
    fn begin_stage(&self, size: Size, _: &[f32], _: Option<Box<dyn Denoiser>>) -> Result<Box<dyn Denoiser>> {
        *self.told.lock().unwrap() = Some(size);
        Ok(Box::new(Network(self.rows, self.calls.clone())))
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

struct Zeros(Device);

impl NoiseSource for Zeros {
    fn seeds(&self) -> Vec<u64> {
        vec![0]
    }
    fn normal(&mut self, shape: [usize; 4]) -> Result<Tensor> {
        Tensor::zeros(&self.0, &shape, DType::F32)
    }
    fn normal_into(&mut self, _: &mut Tensor) -> Result<()> {
        unreachable!("an eta of 0 draws nothing")
    }
}

/// SD 1.x's, 2.x's and SDXL's UNets as they are published, one whose downsamplers are padded at one side, and one of two levels.
pub fn config(name: &str) -> UnetConfig {
    let xl = r#""down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true,
        "block_out_channels": [320, 640, 1280], "sample_size": 128, "transformer_layers_per_block": [1, 2, 10]"#;
    let text = match name {
        "sdxl" => xl,
        "sd1" => r#""sample_size": 64"#,
        "sd2" => r#""sample_size": 64, "use_linear_projection": true"#,
        "one-sided" => r#""sample_size": 64, "downsample_padding": 0"#,
        _ => {
            r#""down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "block_out_channels": [32, 64],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]"#
        }
    };
    UnetConfig::from_json("unet/config.json", &format!("{{{text}}}")).unwrap()
}

/// A run of the published schedule by DDIM, in one stage.
pub fn run_of(unet: &str, size: &str, steps: usize, method: impl Into<Method>, guidance: Option<f32>) -> Result<Run> {
    let schedule = r#"{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}"#;
    let schedule = SchedulerConfig::from_json("scheduler_config.json", schedule).unwrap();
    let stages: Vec<Stage> = vec![format!("{size}:{steps}").parse().unwrap()];
    let scheduler = Scheduler::new(&schedule, Sampler::Ddim, steps, 0.0).unwrap();
    let facts = ModelFacts { name: unet.into(), distilled: false, unet: Some(config(unet)) };
    let native = match unet {
        "sdxl" => Some(Size::new(1024, 1024)),
        "other" => None,
        _ => Some(Size::new(512, 512)),
    };
    Run::for_native(method.into(), stages, scheduler, guidance, 8, native)?.of_model(facts)
}

/// Its calls, each with whether it had twins, and the size that the network was told.
pub fn calls(run: &Run) -> (Vec<(bool, UnetOptions)>, Size) {
    let device = Device::cpu();
    let rows = if run.guidance().is_some() { 2 } else { 1 };
    let (calls, told, recorded) = (Calls::default(), Mutex::default(), RecordedSteps::default());
    let model = Nothing { device: device.clone(), rows, calls, told, recorded };
    let mut observer = Silent;
    let watch = Watch { observer: &mut observer, first: 0 };
    methods::generate(&model, run, &mut Zeros(device), watch).unwrap();
    let (calls, told) = (model.calls.lock().unwrap().clone(), model.told.lock().unwrap().unwrap());
    (calls, told)
}
