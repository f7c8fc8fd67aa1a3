//! Whole runs of the oracle's small models on the card: as the published libraries have them in f32, near the cpu in f16
//! and bf16, and the same bit for bit whether a stage's steps are replayed from a graph or launched one by one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use megafuse::methods::{
    DemoFusion, DiffuseHigh, FouriScale, FreCaS, HiDiffusion, MegaFusion, MultiDiffusion, PartOptions, PixelRush,
    Plain, ScaleCrafter, ScaleDiff, UpsampleGuidance,
};
use megafuse::models::{
    AttentionMapMemory, AttentionMaps, ConvPlace, ConvRole, FourierConvs, Redilation, Unet, UnetBlock, UnetCall,
    UnetConfig, UnetOptions, WeightStore,
};
use megafuse::ops::{self, FreeU, Guidance, SampleState, StepCoefficients, StepRow, StepTable};
use megafuse::pipeline::{Event, ModelSource, Observer, Pipeline, Request, Silent, StepCache};
use megafuse::runtime::cuda::Isa;
use megafuse::runtime::{CudaDevice, CudaOptions, MetaDevice};
use megafuse::schedulers::Sampler;
use megafuse::{DType, Device, Result, Tensor};
use safetensors::{Dtype, SafeTensors};

use crate::common::{cards, drawn};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

/// Every intermediate tensor of a run.
#[derive(Default)]
struct Dump(BTreeMap<String, Vec<f32>>);

impl Observer for Dump {
    fn wants_tensors(&self, _: usize) -> bool {
        true
    }
    fn tensor(&mut self, _: usize, name: &str, _: &[usize], values: Vec<f32>) -> Result<()> {
        self.0.insert(name.into(), values);
        Ok(())
    }
}

fn run(model: &str, device: &Device, dtype: DType, request: &Request) -> Dump {
    let source = ModelSource::Directory(drawn::folder(model));
    let pipeline = Pipeline::load(source, device.clone(), dtype).unwrap();
    let mut dump = Dump::default();
    pipeline.generate(request, &mut dump).unwrap();
    dump
}

/// The requests of four stored runs (tests/data/runs/runs.json); between them: both methods, noise in every step, a sampler
/// that scales its input, guidance and none, self- and cross-attention of all the models' head sizes.
fn stored() -> [(&'static str, &'static str, Request); 4] {
    let plain = Request { prompt: "a photo of a cat".into(), method: Plain {}.into(), ..Request::default() };
    let plus = Request { method: MegaFusion::plus().into(), ..plain.clone() };
    let stages = |stages: [&str; 2]| stages.map(|stage| stage.parse().unwrap()).to_vec();
    let fox = "The quick brown fox, oil on canvas".to_string();
    [
        (
            "mega-plus",
            "sd15",
            Request { stages: stages(["16x16:3", "24x24:2"]), seed: 9, guidance: 2.5, ..plus.clone() },
        ),
        (
            "plain-euler-ancestral",
            "sd15",
            Request {
                size: Some("16x16".parse().unwrap()),
                steps: Some(4),
                seed: 11,
                scheduler: Some(Sampler::EulerAncestral),
                ..plain
            },
        ),
        (
            "mega-plus-four-levels-euler",
            "four-levels",
            Request {
                stages: stages(["24x24:2", "32x40:1"]),
                seed: 4,
                guidance: 1.0,
                scheduler: Some(Sampler::Euler),
                ..plus.clone()
            },
        ),
        (
            "mega-plus-sd21",
            "sd21",
            Request {
                prompt: fox,
                stages: stages(["16x16:2", "24x20:2"]),
                seed: 21,
                guidance: 1.5,
                scheduler: Some(Sampler::Ddim),
                ..plus
            },
        ),
    ]
}

/// Largest error over max(|want|, rms of want).
fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let rms = rms(want.iter().map(|&v| f64::from(v)));
    let one = |(&got, &want): (&f32, &f32)| (f64::from(got) - f64::from(want)).abs() / f64::from(want).abs().max(rms);
    got.iter().zip(want).map(one).fold(0.0, |a, b| if b <= a { a } else { b })
}

fn rms(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    (values.map(|v| v * v).sum::<f64>() / count).sqrt()
}

/// Runs over views: groups of windows, the last one shorter, and dilated samples, crops that SDXL is told, several phases.
fn stored_views() -> [(&'static str, &'static str, Request); 2] {
    let base = Request { prompt: "a photo of a cat".into(), scheduler: Some(Sampler::Euler), ..Request::default() };
    let windows = MultiDiffusion { window: Some(8), stride: Some(4), view_batch: 3, ..MultiDiffusion::default() };
    let phases = DemoFusion { view_batch: 4, ..DemoFusion::default() };
    let size = |size: &str| Some(size.parse().unwrap());
    [
        (
            "multidiffusion-euler",
            "sd21",
            Request {
                method: windows.into(),
                size: size("72x24"),
                steps: Some(2),
                guidance: 2.0,
                seed: 71,
                ..base.clone()
            },
        ),
        (
            "sdxl-demofusion-three",
            "sdxl-turbo",
            Request {
                method: phases.into(),
                size: size("48x32"),
                steps: Some(1),
                guidance: 1.5,
                seed: 72,
                scheduler: None,
                ..base
            },
        ),
    ]
}

/// Patches that are stepped twice and merged, in two groups; a stage whose map is no multiple of the first.
fn stored_pixelrush() -> (&'static str, &'static str, Request) {
    let request = Request {
        prompt: "a photo of a cat".into(),
        method: PixelRush::default().into(),
        stages: ["16x16:2", "32x24:1"].map(|stage| stage.parse().unwrap()).to_vec(),
        scheduler: Some(Sampler::Euler),
        guidance: 0.0,
        seed: 81,
        ..Request::default()
    };
    ("pixelrush-turbo", "sdxl-turbo", request)
}

/// SDXL's run of tests/data/runs/runs.json: two text encoders, size ids of each stage, a negative prompt of zeros.
fn stored_sdxl() -> (&'static str, &'static str, Request) {
    let request = Request {
        prompt: "a photo of a cat".into(),
        method: MegaFusion::plus().into(),
        stages: ["16x16:3", "24x24:2"].map(|stage| stage.parse().unwrap()).to_vec(),
        scheduler: Some(Sampler::Ddim),
        guidance: 1.5,
        seed: 32,
        ..Request::default()
    };
    ("sdxl-mega-plus-v-zero-snr", "sdxl-v-zero-snr", request)
}

/// Two more of them: HiDiffusion on both maps of blocks, on maps of odd sides; three steps of SDXL's have the same options, so
/// that the last one is replayed, with shifts of its own.
fn stored_hidiffusion() -> [(&'static str, &'static str, Request); 2] {
    let of = |size: &str, options, seed| Request {
        prompt: "a photo of a cat".into(),
        method: options,
        size: Some(size.parse().unwrap()),
        steps: Some(4),
        guidance: 2.0,
        seed,
        ..Request::default()
    };
    let xl = HiDiffusion { t2: Some(0.25), aggressive: Some(false), ..HiDiffusion::default() };
    let sd = HiDiffusion { t1: Some(0.75), t2: Some(0.5), ..HiDiffusion::default() };
    let xl = Request { negative_prompt: Some("blurry".into()), ..of("36x28", xl.into(), 71) };
    let sd = Request { scheduler: Some(Sampler::Ddim), ..of("23x17", sd.into(), 71) };
    [("hi-sdxl-odd", "sdxl", xl), ("hi-sd-both", "defaults", sd)]
}

/// Two with a cache of steps: computed, kept and reused steps are three recordings, and predicted steps none.
fn stored_caches() -> [(&'static str, &'static str, Request); 2] {
    let of = |name: &str, options: &str| Request {
        prompt: "a photo of a cat".into(),
        method: Plain {}.into(),
        size: Some("16x16".parse().unwrap()),
        steps: Some(10),
        scheduler: Some(Sampler::Ddim),
        guidance: 2.0,
        seed: 81,
        cache: Some(StepCache::new(name, options).unwrap()),
        ..Request::default()
    };
    [("cache-ucache", "sd15", of("ucache", "threshold=1.5")), ("cache-spectrum", "sd15", of("spectrum", ""))]
}

/// One of ScaleCrafter: damped guidance whose factors shrink, the upsamplers' convolutions among the re-dilated ones.
fn stored_scalecrafter() -> (&'static str, &'static str, Request) {
    let options = ScaleCrafter {
        redilate: Some("D2=4,M=4,U0=4,U1=3".into()),
        damped: Some("M=3,U0=2".into()),
        damped_steps: Some(2),
        progressive: Some(true),
        ..ScaleCrafter::default()
    };
    let request = Request {
        prompt: "a photo of a cat".into(),
        method: options.into(),
        size: Some("24x20".parse().unwrap()),
        steps: Some(3),
        guidance: 2.0,
        eta: Some(0.5),
        seed: 81,
        ..Request::default()
    };
    ("sc-sdxl-damped", "sdxl", request)
}

/// Two of FouriScale: maps of odd sides that are padded, dilations of the twins that are others, amplified guidance; no guidance.
fn stored_fouriscale() -> [(&'static str, &'static str, Request); 2] {
    let of = |options: FouriScale| Request {
        prompt: "a photo of a cat".into(),
        method: options.into(),
        size: Some("36x28".parse().unwrap()),
        steps: Some(3),
        seed: 91,
        ..Request::default()
    };
    let odd = FouriScale {
        fourier_dilation: Some(3.5),
        fourier_start: Some(1),
        fourier_stop: Some(3),
        amplified_guidance: true,
        ..FouriScale::default()
    };
    let odd = Request { guidance: 2.0, eta: Some(0.5), negative_prompt: Some("blurry".into()), ..of(odd) };
    let unguided = FouriScale {
        fourier_dilation: Some(2.0),
        fourier_stop: Some(2),
        fourier_floor: Some(0.25),
        ..FouriScale::default()
    };
    [("fs-sdxl-odd", "sdxl", odd), ("fs-v-unguided", "sd21", Request { guidance: 1.0, ..of(unguided) })]
}

/// Filters and twins in steps that are launched, recorded and replayed, with the next prompt's conditioning in the same memory.
#[test]
fn replayed_twins_are_launched_twins_bit_for_bit() {
    cards(); // the driver is chosen
    let options = FouriScale {
        fourier_dilation: Some(3.5),
        fourier_start: Some(2),
        fourier_stop: Some(2),
        ..FouriScale::default()
    };
    let request = Request {
        method: options.into(),
        size: Some("18x18".parse().unwrap()),
        steps: Some(2),
        guidance: 2.0,
        ..Request::default()
    };
    let generate = |eager, prompts: &[&str]| -> Vec<Vec<u8>> {
        let device = CudaDevice::open(CudaOptions { eager, ..CudaOptions::default() }).unwrap();
        let source = ModelSource::Directory(drawn::folder("sdxl-turbo"));
        let pipeline = Pipeline::load(source, Device::Cuda(device), DType::BF16).unwrap();
        let of = |prompt: &&str| Request { prompt: prompt.to_string(), ..request.clone() };
        prompts.iter().map(|prompt| pipeline.generate(&of(prompt), &mut Silent).unwrap()[0].rgb.clone()).collect()
    };
    let (launched, replayed) = (generate(true, &["two dogs"]), generate(false, &["a cat", "two dogs"]));
    assert!(launched[0] == replayed[1] && replayed[0] != replayed[1]);
}

/// A recorded step with 5x5 kernels, which the step before it has made: launched and replayed, bit for bit.
#[test]
fn dispersed_kernels_are_there_before_a_step_is_recorded() {
    cards(); // the driver is chosen
    let options =
        ScaleCrafter { redilate: Some("D1=3,M=2".into()), disperse: Some("D1,M".into()), ..ScaleCrafter::default() };
    let request = Request {
        method: options.into(),
        size: Some("16x12".parse().unwrap()),
        steps: Some(3),
        guidance: 2.0,
        ..Request::default()
    };
    let [launched, replayed] = [true, false].map(|eager| {
        let device = CudaDevice::open(CudaOptions { eager, ..CudaOptions::default() }).unwrap();
        run("sdxl-turbo", &Device::Cuda(device), DType::BF16, &request)
    });
    assert_eq!(launched.0, replayed.0);
}

/// ScaleDiff on maps with short windows: the second of two steps in neighbourhoods is replayed with another strength.
fn stored_scalediff() -> (&'static str, &'static str, Request) {
    let request = Request {
        prompt: "a photo of a cat".into(),
        method: ScaleDiff { low_pass: 0.25, ..ScaleDiff::default() }.into(),
        stages: ["16x16:3", "28x20:2"].map(|stage| stage.parse().unwrap()).to_vec(),
        guidance: 2.0,
        seed: 81,
        ..Request::default()
    };
    ("scalediff-sdxl", "sdxl", request)
}

/// FreCaS in two stages and in three, of which the middle one collects maps and reuses others.
fn stored_frecas() -> [(&'static str, &'static str, Request); 2] {
    let of = |method: FreCaS, stages: &[&str]| Request {
        prompt: "a photo of a cat".into(),
        method: method.into(),
        stages: stages.iter().map(|stage| stage.parse().unwrap()).collect(),
        guidance: 2.0,
        guidance_high: Some(5.0),
        seed: 91,
        ..Request::default()
    };
    let three = FreCaS { frecas_ends: Some("400,150".into()), ..FreCaS::default() };
    let three = of(three, &["8x8:2", "16x16:2", "22x18:1"]);
    [
        ("frecas", "sd15", of(FreCaS::default(), &["12x12:2", "20x20:2"])),
        ("frecas-three", "sd15", Request { negative_prompt: Some("blurry".into()), ..three }),
    ]
}

/// DiffuseHigh with a step that is held and two that are not; upsample guidance with squares of three cells, all steps corrected.
fn stored_refined() -> [(&'static str, &'static str, Request); 2] {
    let base = Request {
        prompt: "a photo of a cat".into(),
        scheduler: Some(Sampler::Euler),
        guidance: 2.0,
        ..Request::default()
    };
    let high = DiffuseHigh { refine_guidance: 3.0, ..DiffuseHigh::default() };
    let stages = ["16x16:4", "24x24:3"].map(|stage| stage.parse().unwrap()).to_vec();
    let up = UpsampleGuidance { up_scale: Some(3), up_theta: 0.7, up_share: 1.0 };
    let up = Request {
        method: up.into(),
        size: Some("24x36".parse().unwrap()),
        steps: Some(3),
        negative_prompt: Some("blurry".into()),
        seed: 91,
        ..base.clone()
    };
    [
        ("diffusehigh", "sd15", Request { method: high.into(), stages, seed: 81, ..base }),
        ("upsample-guidance-euler", "sd15", up),
    ]
}

/// Stages with parts: shifts that go on from stage to stage, a stage of views that a relay leaves.
fn stored_parts() -> [(&'static str, &'static str, Request); 2] {
    let of = |stages: [&str; 3], method: MegaFusion| Request {
        prompt: "a photo of a cat".into(),
        method: method.into(),
        stages: stages.map(|stage| stage.parse().unwrap()).to_vec(),
        guidance: 1.5,
        seed: 81,
        ..Request::default()
    };
    let parts = PartOptions { t1: Some(0.7), ..PartOptions::default() };
    let sd = MegaFusion { dilation: 2, parts, ..MegaFusion::default() };
    let sd = of(["8x8:1", "12x10:3+hidiffusion", "14x12:1+windows+dilation"], sd);
    let parts = PartOptions { window: Some(8), stride: Some(4), view_batch: Some(3), ..PartOptions::default() };
    let crops = MegaFusion { parts, ..MegaFusion::plus() };
    let crops = of(["16x16:2", "24x20:2+crops", "32x24:1+crops+dilation"], crops);
    let crops = Request { scheduler: Some(Sampler::Euler), ..crops };
    [("compose-sd", "defaults", sd), ("compose-crops", "sd21", crops)]
}

/// Each tensor of these runs on every card.
fn f32_runs(runs: impl Iterator<Item = (&'static str, &'static str, Request)> + Clone) {
    for device in cards() {
        for (name, model, request) in runs.clone() {
            let got = run(model, &device, DType::F32, &request);
            let bytes = std::fs::read(data(&format!("runs/{name}.safetensors"))).unwrap();
            let want = SafeTensors::deserialize(&bytes).unwrap();
            for (tensor, view) in want.tensors().into_iter().filter(|(_, view)| view.dtype() == Dtype::F32) {
                let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                let off = error(&got.0[&tensor], &values.collect::<Vec<_>>());
                // As on the cpu: torch's own f32 is up to 4e-5 from f64 in these runs.
                assert!(off <= 1e-4, "{device} {name}: {tensor} is off by {off:.1e}");
            }
        }
    }
}

#[test]
fn f32_runs_are_those_of_the_published_libraries() {
    f32_runs(stored().into_iter().chain([stored_sdxl()]).chain(stored_views()).chain(stored_hidiffusion()));
}

#[test]
fn f32_runs_of_further_methods_are_those_of_torch() {
    let single = [stored_pixelrush(), stored_scalediff(), stored_scalecrafter()].into_iter();
    f32_runs(single.chain(stored_refined()).chain(stored_frecas()).chain(stored_fouriscale()));
}

/// Kernels and orders of launches that other runs have too.
#[test]
fn f32_runs_of_caches_and_parts_are_those_of_torch() {
    f32_runs(stored_caches().into_iter().chain(stored_parts()));
}

/// At most twice the error that the cpu commits in the same dtype, against f32.
#[test]
fn low_precision_runs_err_no_more_than_the_cpu_does() {
    for device in cards() {
        for (name, model, request) in stored() {
            let exact = run(model, &Device::cpu(), DType::F32, &request);
            for dtype in [DType::F16, DType::BF16] {
                let [card, cpu] = [&device, &Device::cpu()].map(|device| run(model, device, dtype, &request));
                for tensor in ["latent", "image"] {
                    let want = &exact.0[tensor];
                    let off = |got: &Dump| {
                        let differences = got.0[tensor].iter().zip(want).map(|(a, b)| f64::from(a - b));
                        rms(differences) / rms(want.iter().map(|&v| f64::from(v)))
                    };
                    let (card, cpu) = (off(&card), off(&cpu));
                    assert!(
                        card <= 2.0 * cpu,
                        "{device} {name} {dtype}: {tensor} is off by {card:.1e}, the cpu by {cpu:.1e}"
                    );
                }
            }
        }
    }
}

#[test]
fn replayed_steps_are_launched_steps_bit_for_bit() {
    cards(); // the driver is chosen
    let [odd, _] = stored_hidiffusion();
    let [reused, predicted] = stored_caches();
    // Steps with a second call; DiffuseHigh's are those of plain sampling.
    let [_, second] = stored_refined();
    for (name, model, request) in stored().into_iter().chain([odd, reused, predicted, second]) {
        let one = ["hi-sdxl-odd", "upsample-guidance-euler"].contains(&name) || request.cache.is_some();
        let dtypes = if one { &DType::FLOATS[..1] } else { &DType::FLOATS[..] };
        for &dtype in dtypes {
            let [launched, replayed] = [true, false].map(|eager| {
                let device = CudaDevice::open(CudaOptions { eager, ..CudaOptions::default() }).unwrap();
                run(model, &Device::Cuda(device), dtype, &request)
            });
            assert_eq!(launched.0, replayed.0, "{name} {dtype}");
        }
    }
}

/// Every group of views is a recording, replayed for other views, in later steps and in the next picture.
#[test]
fn replayed_views_are_launched_views_bit_for_bit() {
    cards(); // the driver is chosen
    let [_, (name, model, request)] = stored_views();
    let request = Request { size: Some("32x16".parse().unwrap()), steps: Some(2), ..request };
    let pictures = [true, false].map(|eager| {
        let device = CudaDevice::open(CudaOptions { eager, ..CudaOptions::default() }).unwrap();
        let source = ModelSource::Directory(drawn::folder(model));
        let pipeline = Pipeline::load(source, Device::Cuda(device), DType::BF16).unwrap();
        let of = |prompt: &str| Request { prompt: prompt.into(), ..request.clone() };
        ["a cat", "two dogs"].map(|prompt| pipeline.generate(&of(prompt), &mut Silent).unwrap())
    });
    assert_eq!(pictures[0], pictures[1], "{name}");
}

/// What the driver had given at the run's first event, and at each later one.
struct Reserved<'a>(&'a CudaDevice, Vec<u64>);

impl Observer for Reserved<'_> {
    fn event(&mut self, _: &Event) {
        self.1.push(self.0.memory().unwrap().reserved_bytes);
    }
}

/// Launched, recorded and replayed steps, a relay and the decoder: all in what was reserved as planned.
#[test]
fn a_run_asks_the_driver_for_memory_once() {
    cards(); // the driver is chosen
    let card = CudaDevice::open(CudaOptions::default()).unwrap();
    let source = ModelSource::Directory(drawn::folder("four-levels"));
    let pipeline = Pipeline::load(source, Device::Cuda(card.clone()), DType::F32).unwrap();
    // Another request before: what was planned for it is not what the next one gets.
    let small =
        Request { method: Plain {}.into(), size: Some("32x32".parse().unwrap()), steps: Some(1), ..Request::default() };
    pipeline.generate(&small, &mut Silent).unwrap();
    let memory = card.memory().unwrap();
    let (loaded, free) = (memory.reserved_bytes, memory.reserved_bytes - memory.in_use_bytes);
    let _filled = Tensor::uninit(&Device::Cuda(card.clone()), &[(free as usize - (1 << 20)) / 4], DType::U32).unwrap();
    let stages = ["64x64:3", "192x192:1"].map(|stage| stage.parse().unwrap()).to_vec();
    let request = Request { method: MegaFusion::plus().into(), stages, guidance: 1.0, ..Request::default() };
    let mut reserved = Reserved(&card, Vec::new());
    pipeline.generate(&request, &mut reserved).unwrap();
    let Reserved(_, reserved) = reserved;
    assert!(reserved[0] > loaded, "a run that fits into what is there shows nothing");
    assert!(reserved.iter().all(|&bytes| bytes == reserved[0]), "{loaded} bytes loaded, then {reserved:?}");
}

type Step<'a> = dyn FnMut() -> Result<()> + 'a;

/// A guided step: what the graph holds is what the planner counts, and nothing only moves data.
#[test]
fn a_recorded_step_is_what_the_planner_counts() {
    for device in cards() {
        let meta = MetaDevice::default();
        let config =
            UnetConfig::from_json("config.json", &std::fs::read_to_string(data("sd15/unet/config.json")).unwrap());
        let config = config.unwrap();
        let hi = UnetOptions {
            wide_downsampler: Some(0),
            pooled_level: Some(1),
            windowed_level: Some(0),
            ..UnetOptions::default()
        };
        // The convolution of the down- and of the upsampler, and the first one of the mid block's.
        let redilated = |place: &ConvPlace| {
            let first = (place.block, place.role) == (UnetBlock::Mid, ConvRole::Conv1(0));
            first || place.role == ConvRole::Sampler
        };
        let places = config.convolutions().into_iter().filter(redilated);
        let freeu = FreeU { backbone: 1.2, skip: 0.4 };
        let scale = UnetOptions {
            redilations: places.map(|place| (place, Redilation::by(1.5))).collect(),
            freeu: Some([freeu; 2]),
            ..UnetOptions::default()
        };
        let maps = UnetOptions {
            attention_maps: AttentionMaps { reuse: 0.5, ..AttentionMaps::default() },
            ..UnetOptions::default()
        };
        // Of a down block, its sampler and an upsampler; both dilations.
        let fourier = FourierConvs {
            places: Arc::new(config.convolutions().into_iter().filter(redilated).collect()),
            factor: 2.5,
            twin_factor: 1.5,
            floor: 0.0,
            base: [8, 8],
        };
        let fourier = UnetOptions { fourier: Some(fourier), ..UnetOptions::default() };
        for (options, height) in [(UnetOptions::default(), 16), (hi, 15), (scale, 15), (maps, 15), (fourier, 15)] {
            let step = |device: &Device, work: &mut dyn FnMut(&mut Step)| {
                let store = match device {
                    Device::Meta(_) => WeightStore::meta(device, DType::BF16),
                    _ => WeightStore::open(&data("sd15/unet"), "diffusion_pytorch_model", device, DType::BF16).unwrap(),
                };
                let unet = Unet::load(store, &config).unwrap();
                let text = Tensor::zeros(device, &[2, 77, config.cross_attention_dim], DType::BF16).unwrap();
                let conditioning = unet.condition(&text, &[981.0, 1.0]).unwrap();
                let conditioning = match options.fourier {
                    None => conditioning,
                    Some(_) => conditioning.with_twins(1).unwrap(),
                };
                let coefficients = StepCoefficients {
                    x0_from_x: 1.0,
                    x0_from_e: -0.5,
                    clip: None,
                    next_from_x: 0.0,
                    next_from_e: 0.5,
                    next_from_x0: 0.5,
                    ..StepCoefficients::default()
                };
                let maps = Tensor::zeros(device, &[2, 4, 6, 77], DType::F32).unwrap();
                let mut memory = AttentionMapMemory::default();
                memory.reuse(&maps, &unet.attention_levels([height, 16]), false).unwrap();
                let guidance = Guidance::uniform(device, 1, 7.0).unwrap();
                let mut steps = StepTable::new(device, vec![StepRow { input_scale: 1.0, coefficients }; 2]).unwrap();
                let mut state =
                    SampleState::new(Tensor::zeros(device, &[1, height, 16, config.in_channels], DType::F32).unwrap())
                        .unwrap();
                work(&mut || {
                    // With twins: the rows that guidance reads are the first and the last.
                    let twins = usize::from(options.fourier.is_some());
                    let input = ops::scale_input(state.x(), &steps, DType::BF16, 2 + twins)?;
                    let call = UnetCall { attention_maps: Some(&memory), twins, ..UnetCall::from(&options) };
                    let output = unet.forward(&input, steps.index(), &conditioning, call)?;
                    let output = match twins {
                        0 => output,
                        _ => ops::stack(&output.rows(0..1)?, &output.rows(2..3)?)?,
                    };
                    ops::sampler_step(&mut state, &output, Some(&guidance), &steps, None)?;
                    steps.index_mut().advance()
                });
            };
            let Device::Cuda(card) = &device else { unreachable!() };
            let mut kernels = Vec::new();
            step(&device, &mut |work| kernels = card.capture(0, work).unwrap().kernels().to_vec());
            let mut planned = 0;
            step(&Device::Meta(meta.clone()), &mut |work| {
                meta.take_report();
                work().unwrap();
                planned = meta.take_report().total().launches;
            });
            // Planned as Hopper's kernels do it; the others need no sums of weights to enlarge.
            let count = kernels.len() as u64;
            assert!(count == planned || count < planned && !card.has(Isa::Sm90a), "{device} {planned}: {kernels:?}");
            let families = [
                "scale_input_",
                "conv2d_",
                "linear_",
                "attention_",
                "blend_attention_map_",
                "group_norm_",
                "layer_norm_",
                "resize_",
                "avg_pool_",
                "add_",
                "freeu_",
                "spectral_",
                "concat_",
                "sampler_step_",
                "advance_step",
            ];
            let foreign: Vec<&String> =
                kernels.iter().filter(|kernel| !families.iter().any(|family| kernel.starts_with(family))).collect();
            assert!(foreign.is_empty(), "{device}: {foreign:?}");
        }
    }
}

/// Recorded steps live on between pictures. Whatever changes from one picture to the next (words, seed, guidance, options,
/// sampler, and back), the picture is that of a pipeline that has made none before.
#[test]
fn a_picture_does_not_depend_on_those_made_before() {
    for device in cards() {
        let load = || Pipeline::load(ModelSource::Directory(data("sd15")), device.clone(), DType::F32).unwrap();
        let stages = ["8x8:3", "12x12:3"].map(|stage| stage.parse().unwrap()).to_vec();
        let base = Request { stages, prompt: "a cat".into(), guidance: 2.5, ..Request::default() };
        let plus = Request { method: MegaFusion::plus().into(), ..base.clone() };
        // Steps with a second call and without one; other factors and timesteps in the same tables.
        let guided = |up_theta, up_share| {
            let method = UpsampleGuidance { up_scale: Some(2), up_theta, up_share };
            let (size, steps) = (Some("12x16".parse().unwrap()), Some(3));
            Request { method: method.into(), stages: Vec::new(), size, steps, ..base.clone() }
        };
        // Maps of cross-attention and a ratio of scales that recorded steps read.
        let [_, (_, _, maps)] = stored_frecas();
        let maps = Request {
            stages: ["8x8:3", "12x12:3"].map(|stage| stage.parse().unwrap()).to_vec(),
            method: FreCaS::default().into(),
            ..maps
        };
        let requests = [
            base.clone(),
            maps.clone(),
            Request { seed: 5, prompt: "two dogs".into(), guidance_high: Some(9.0), ..maps.clone() },
            maps,
            Request { seed: 5, prompt: "two dogs".into(), negative_prompt: Some("red".into()), ..base.clone() },
            plus.clone(),
            Request { guidance: 6.0, ..base.clone() },
            Request { method: MegaFusion { dilation: 3, ..MegaFusion::plus() }.into(), ..base.clone() },
            Request { scheduler: Some(Sampler::EulerAncestral), ..plus },
            guided(1.2, 1.0),
            guided(0.4, 0.5),
            base,
        ];
        let used = load();
        for (i, request) in requests.iter().enumerate() {
            let fresh = load().generate(request, &mut Silent).unwrap();
            assert!(used.generate(request, &mut Silent).unwrap() == fresh, "{device}: request {i}");
        }
    }
}

/// The shifts of windows are each picture's own: alone, in a batch, and where the steps of another picture are replayed.
#[test]
fn shifts_of_windows_are_those_of_the_pictures_seed() {
    for device in cards() {
        let load =
            || Pipeline::load(ModelSource::Directory(drawn::folder("sdxl")), device.clone(), DType::F32).unwrap();
        let of = |seed| Request {
            prompt: "a cat".into(),
            method: HiDiffusion { raunet: false, ..HiDiffusion::default() }.into(),
            size: Some("32x32".parse().unwrap()),
            steps: Some(3),
            guidance: 1.0,
            seed,
            ..Request::default()
        };
        let used = load();
        let replayed = [1, 2].map(|seed| used.generate(&of(seed), &mut Silent).unwrap().remove(0));
        assert!(load().generate(&of(2), &mut Silent).unwrap()[0] == replayed[1], "{device}");
        let together = used.generate(&Request { count: 2, batch: 2, ..of(1) }, &mut Silent).unwrap();
        assert!(together[..] == replayed[..], "{device}");
    }
}

/// The same bytes alone and in a batch, recorded and replayed.
#[test]
fn a_batch_makes_the_pictures_that_its_requests_make_alone() {
    for device in cards() {
        for dtype in [DType::F32, DType::BF16] {
            let pipeline = Pipeline::load(ModelSource::Directory(data("sd15")), device.clone(), dtype).unwrap();
            let stages = ["8x8:3", "12x8:2"].map(|stage| stage.parse().unwrap()).to_vec();
            let base = Request { stages, guidance: 2.5, method: MegaFusion::plus().into(), ..Request::default() };
            let of = |prompt: &str, seed, guidance| Request { prompt: prompt.into(), seed, guidance, ..base.clone() };
            let requests = [of("a cat", 1, 2.5), of("two dogs", 7, 6.0), of("a cat", 2, 1.25)];
            let together = pipeline.generate_batch(&requests, &mut Silent).unwrap();
            for (request, picture) in requests.iter().zip(&together) {
                assert!(
                    pipeline.generate(request, &mut Silent).unwrap()[0] == *picture,
                    "{device} {dtype} {request:?}"
                );
            }
        }
    }
}

/// Every sampler's recorded steps, history and double evaluations included, across a relay, against the cpu's. Of those with a
/// history a second picture replays the first one's steps, whose history then still holds what the first one left.
#[test]
fn every_sampler_makes_the_cpus_pictures() {
    for device in cards() {
        let load =
            |device: &Device| Pipeline::load(ModelSource::Directory(data("sd15")), device.clone(), DType::F32).unwrap();
        let (card, cpu) = (load(&device), load(&Device::cpu()));
        let stages = ["8x8:5", "12x8:4"].map(|stage| stage.parse().unwrap()).to_vec();
        // A flow's sampler is for other models.
        for &sampler in Sampler::ALL.iter().filter(|&&sampler| sampler != Sampler::FlowEuler) {
            let (scheduler, prompt) = (Some(sampler), "a photo of a cat".to_string());
            let request = Request { stages: stages.clone(), scheduler, prompt, guidance: 2.0, ..Request::default() };
            let keeps = !matches!(
                sampler,
                Sampler::Ddim | Sampler::Ddpm | Sampler::Euler | Sampler::EulerAncestral | Sampler::Lcm
            );
            for seed in if keeps { 0..2 } else { 0..1 } {
                let request = Request { seed, ..request.clone() };
                let [mut got, mut want] = [Dump::default(), Dump::default()];
                card.generate(&request, &mut got).unwrap();
                cpu.generate(&request, &mut want).unwrap();
                for step in ["step4", "step5", "step8", "step9", "latent"] {
                    let off = error(&got.0[step], &want.0[step]);
                    // Two f32 programs, each up to 4e-5 from f64 in runs like these.
                    assert!(off <= 1e-4, "{device} {sampler} {seed}: {step} is off by {off:.1e}");
                }
            }
        }
    }
}

/// A copy of the model `zero-snr` with another scheduler's file, and where named another UNet.
fn varied(scheduler: &str, unet: Option<&str>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for part in ["tokenizer", "text_encoder", "unet", "vae"] {
        let from = match unet {
            Some(unet) if part == "unet" => data(unet),
            _ => drawn::folder("zero-snr").join(part),
        };
        std::fs::create_dir(dir.path().join(part)).unwrap();
        let files = std::fs::read_dir(from).unwrap().map(|file| file.unwrap().path());
        for file in files.filter(|file| !file.ends_with("expected.safetensors")) {
            std::fs::copy(&file, dir.path().join(part).join(file.file_name().unwrap())).unwrap();
        }
    }
    std::fs::create_dir(dir.path().join("scheduler")).unwrap();
    std::fs::write(dir.path().join("scheduler/scheduler_config.json"), scheduler).unwrap();
    dir
}

/// What a step does beside the affine rows: a threshold of every image's own quantile, guidance rescaled by every image's own
/// deviations, a guidance scale that the network reads. Replayed as launched bit for bit, also by the steps that an earlier
/// picture with other numbers has recorded, and near the cpu's.
#[test]
fn thresholds_rescaled_and_embedded_guidance_are_replayed() {
    const THRESHOLDING: &str = r#"{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "thresholding": true, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2.0}"#;
    const LCM: &str = r#"{"_class_name": "LCMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear"}"#;
    let thresholded = varied(THRESHOLDING, None);
    let unthresholded = varied(&THRESHOLDING.replace("true", "false"), None);
    let told = varied(LCM, Some("unet-options/guidance-embedding"));
    let stages = ["8x8:4", "12x8:3"].map(|stage| stage.parse().unwrap()).to_vec();
    let base = Request { prompt: "a cat".into(), stages, count: 2, batch: 2, seed: 3, ..Request::default() };
    let plus = Request { method: MegaFusion::plus().into(), guidance: 2.0, ..base.clone() };
    let multistep = Request { scheduler: Some(Sampler::UniPc), ..plus.clone() };
    let rescaled = Request { guidance_rescale: 0.7, ..plus.clone() };
    let runs = [(&thresholded, plus), (&thresholded, multistep), (&thresholded, rescaled), (&told, base)];
    let other = |request: &Request| Request { guidance: request.guidance + 1.0, seed: 8, ..request.clone() };
    for device in cards() {
        for (dir, request) in &runs {
            let load =
                |device: Device| Pipeline::load(ModelSource::Directory(dir.path().into()), device, DType::F32).unwrap();
            let made = |pipeline: &Pipeline, request: &Request| {
                let mut dump = Dump::default();
                pipeline.generate(request, &mut dump).unwrap();
                dump
            };
            let what = format!("{device} {:?} {} {}", request.scheduler, request.guidance, request.guidance_rescale);
            let Device::Cuda(card) = &device else { unreachable!() };
            let eager = CudaOptions { eager: true, ..CudaOptions::default() };
            let launched = load(Device::Cuda(CudaDevice::open(eager).unwrap()));
            let (replayed, cpu) = (load(Device::Cuda(card.clone())), load(Device::cpu()));
            for request in [request.clone(), other(request)] {
                let (got, want) = (made(&replayed, &request), made(&cpu, &request));
                assert_eq!(made(&launched, &request).0, got.0, "{what}");
                for step in ["step3", "step4", "step7", "latent"] {
                    let off = error(&got.0[step], &want.0[step]);
                    assert!(off <= 1e-4, "{what}: {step} is off by {off:.1e}");
                }
            }
            // The threshold and the scales are in the numbers: without them the run is another.
            let without = match (request.guidance_rescale > 0.0, dir.path() == told.path()) {
                (true, _) => made(&cpu, &Request { guidance_rescale: 0.0, ..request.clone() }),
                (false, true) => made(&cpu, &Request { guidance: 1.0, ..request.clone() }),
                (false, false) => {
                    let source = ModelSource::Directory(unthresholded.path().into());
                    made(&Pipeline::load(source, Device::cpu(), DType::F32).unwrap(), request)
                }
            };
            assert!(error(&without.0["step3"], &made(&cpu, request).0["step3"]) > 1e-3, "{what}");
        }
    }
}
