//! FreCaS: where stages begin and end, guidance by two scales, maps of cross-attention, and what it refuses.

#[path = "common/drawn.rs"]
mod drawn;

use std::path::{Path, PathBuf};

use megafuse::methods::{
    FreCaS, FrequencySplit, GenerationMethod, Geometry, MegaFusion, Method, MultiDiffusion, Plain, Run,
};
use megafuse::methods::{PixelRush, Size, SplitGuidance, Stage};
use megafuse::models::{AttentionMapMemory, AttentionMaps, Unet, UnetCall, UnetConfig, UnetOptions, WeightStore};
use megafuse::ops::StepIndex;
use megafuse::pipeline::{ModelSource, Pipeline, Request, Silent};
use megafuse::schedulers::{Sampler, Scheduler, SchedulerConfig};
use megafuse::{DType, Device, Error, Tensor};
use serde_json::json;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn scheduler(sampler: Sampler, steps: usize) -> Scheduler {
    let json = json!({
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": false, "clip_sample": false,
        "timestep_spacing": "leading",
    });
    let config = SchedulerConfig::from_json("scheduler_config.json", &json.to_string()).unwrap();
    Scheduler::new(&config, sampler, steps, 0.0).unwrap()
}

/// The run of a model trained at `native`.
fn run_by(options: FreCaS, stages: &str, native: usize, sampler: Sampler) -> Result<Run, Error> {
    let stages: Vec<Stage> = stages.split(',').map(|stage| stage.parse().unwrap()).collect();
    let scheduler = scheduler(sampler, stages.iter().map(|stage| stage.steps).sum());
    Run::for_native(options.into(), stages, scheduler, Some(7.5), 8, Some(Size::new(native, native)))
}

fn run(options: FreCaS, stages: &str, native: usize) -> Run {
    run_by(options, stages, native, Sampler::Ddim).unwrap()
}

fn timesteps(run: &Run) -> Vec<Vec<usize>> {
    let all = run.scheduler().timesteps();
    run.ranges().iter().map(|range| all[range.clone()].iter().map(|&t| t as usize).collect()).collect()
}

const SD: &str = "512x512:40,1024x1024:10";
const SD_TWO: &str = "512x512:30,1024x1024:10,2048x2048:10";
const SDXL: &str = "1024x1024:40,2048x2048:10";
const SDXL_TWO: &str = "1024x1024:30,2048x2048:5,4096x4096:15";

/// The published command lines: calculated from the published schedule.
#[test]
fn stages_begin_where_the_published_ones_do() {
    let of = |stages, native| timesteps(&run(FreCaS::default(), stages, native));
    let sd = of(SD, 512);
    assert_eq!(sd[1], [346, 307, 269, 230, 192, 153, 115, 76, 38, 0]);
    assert_eq!((sd[0][0], sd[0][39]), (999, 100));
    let sd = of(SD_TWO, 512);
    assert_eq!(sd.iter().map(|of| (of[0], of[of.len() - 1])).collect::<Vec<_>>(), [(999, 200), (500, 200), (500, 0)]);
    let sdxl = of(SDXL, 1024);
    assert_eq!((&sdxl[0][..4], &sdxl[0][36..]), (&[999, 978, 958, 937][..], &[261, 240, 220, 200][..]));
    assert_eq!(sdxl[1], [343, 304, 266, 228, 190, 152, 114, 76, 38, 0]);
    let sdxl = of(SDXL_TWO, 1024);
    assert_eq!(sdxl[1], [606, 504, 403, 301, 200]);
    assert_eq!(sdxl[2], [395, 366, 338, 310, 282, 253, 225, 197, 169, 141, 112, 84, 56, 28, 0]);
    // One step of a stage is where it begins; a stage of the same size begins where the one before ended.
    let with = |gamma| FreCaS { frecas_gamma: Some(gamma), ..FreCaS::default() };
    assert_eq!(timesteps(&run(with(2.0), "512x512:4,512x512:1", 512))[1], [100]);
    let starts: Vec<usize> =
        [0.5, 1.0, 2.0, 3.0, 4.0].map(|gamma| timesteps(&run(with(gamma), SD, 512))[1][0]).to_vec();
    assert!(starts.is_sorted() && starts[0] > 100, "{starts:?}");
}

/// A step goes to the next timestep of its stage, as published to one that is d before.
#[test]
fn steps_go_to_the_next_timestep_and_as_published_nearly() {
    let abar = |run: &Run, step: usize| {
        // The samples of a step are a sum of its clean ones and their noise: sqrt(abar) x0 + ...
        let coefficients = run.scheduler().evaluations(step..step + 1)[0].coefficients;
        f64::from(coefficients.next_from_x0).powi(2)
    };
    let table = scheduler(Sampler::Ddim, 50).alphas_cumprod().to_vec();
    for (compat, steps) in [(false, [978, 304, 0]), (true, [979, 305, 0])] {
        let sdxl = run(FreCaS { reference_compat: compat, ..FreCaS::default() }, SDXL, 1024);
        for (step, to) in [0, 40, 49].into_iter().zip(steps) {
            let got = abar(&sdxl, step);
            assert!((got - table[to]).abs() < 1e-6, "{compat} step {step}: {got}, expected {} of {to}", table[to]);
        }
    }
    let four = run(FreCaS { reference_compat: true, ..FreCaS::default() }, SDXL_TWO, 1024);
    assert!((abar(&four, 30) - table[606 - 111]).abs() < 1e-6 && (abar(&four, 35) - table[395 - 28]).abs() < 1e-6);
}

#[test]
fn the_published_numbers_are_the_defaults() {
    let high = |stages, native| run(FreCaS::default(), stages, native).guidance_high();
    assert_eq!(
        [high(SD, 512), high(SD_TWO, 512), high(SDXL, 1024), high(SDXL_TWO, 1024)],
        [45.0, 35.0, 35.0, 35.0].map(Some)
    );
    assert_eq!(high("64x64:40,128x128:10", 64), Some(6.0));
    assert_eq!(high("512x512:40", 512), None);
    let planned = |size: &str, native: usize, steps: usize| {
        let (size, native) = (size.parse().unwrap(), Size::new(native, native));
        let stages = FreCaS::default().stages(&Geometry {
            size,
            native,
            sides: 8.into(),
            steps,
            relay_growth: 1.0,
            relayed_share: 0.2,
        });
        stages.map(|stages| stages.iter().map(Stage::to_string).collect::<Vec<_>>().join(","))
    };
    for (size, native, want) in [
        ("1024x1024", 512, SD),
        ("2048x2048", 512, SD_TWO),
        ("2048x2048", 1024, SDXL),
        ("4096x4096", 1024, SDXL_TWO),
        ("512x512", 512, "512x512:50"),
        ("2048x1024", 1024, "1448x728:40,2048x1024:10"),
    ] {
        assert_eq!(planned(size, native, 50).unwrap(), want);
    }
    assert_eq!(planned("2048x2048", 512, 3).unwrap(), "512x512:1,1024x1024:1,2048x2048:1");
    assert_eq!(planned("8192x8192", 1024, 20).unwrap(), "1024x1024:12,2048x2048:1,4096x4096:1,8192x8192:6");
    assert!(matches!(planned("2048x2048", 512, 2).unwrap_err(), Error::Request { field: "steps", .. }));
}

/// A model without signal at its last timestep says nothing there by its noise.
#[test]
fn given_timesteps_are_checked() {
    let ddim = scheduler(Sampler::Ddim, 4);
    assert!(matches!(ddim.at_timesteps(&[(1000, 0)]).unwrap_err(), Error::Argument { arg: "timestep", .. }));
    assert!(matches!(ddim.at_timesteps(&[(9, 1000)]).unwrap_err(), Error::Argument { arg: "timestep", .. }));
    let euler = scheduler(Sampler::Euler, 4).at_timesteps(&[(9, 0)]).unwrap_err();
    assert!(matches!(euler, Error::Request { field: "scheduler", .. }), "{euler}");
    let json = r#"{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                   "rescale_betas_zero_snr": true, "timestep_spacing": "leading", "clip_sample": false}"#;
    let config = SchedulerConfig::from_json("scheduler_config.json", json).unwrap();
    let no_signal = Scheduler::new(&config, Sampler::Ddim, 4, 0.0).unwrap();
    assert!(matches!(no_signal.at_timesteps(&[(999, 0)]).unwrap_err(), Error::Config { .. }));
    assert_eq!(no_signal.at_timesteps(&[(998, 5), (7, 7)]).unwrap().timesteps(), [998.0, 7.0]);
}

#[test]
fn malformed_runs_are_refused() {
    let ends = |text: &str| FreCaS { frecas_ends: Some(text.into()), ..FreCaS::default() };
    for (options, stages, sampler, field, says) in [
        (ends("200,100"), SD, Sampler::Ddim, "frecas_ends", "expected one timestep per stage but the last, so 1"),
        (ends("999"), SD, Sampler::Ddim, "frecas_ends", "begins at timestep 999; expected an end below it"),
        (ends("x"), SD, Sampler::Ddim, "frecas_ends", "commas between them"),
        (ends("200,800"), SD_TWO, Sampler::Ddim, "frecas_ends", "stage 2 begins at timestep 500"),
        (FreCaS::default(), SD, Sampler::Euler, "scheduler", "by ddim"),
        (FreCaS::default(), "512x512:4,512x256:2", Sampler::Ddim, "stages", "smaller than the one before"),
        (ends("5"), "512x512:4,512x512:9", Sampler::Ddim, "stages", "has room for 6 steps"),
        (FreCaS { frecas_gamma: Some(-1.0), ..FreCaS::default() }, SD, Sampler::Ddim, "frecas_gamma", "from 0"),
        (FreCaS { map_reuse: Some(1.5), ..FreCaS::default() }, SD, Sampler::Ddim, "map_reuse", "from 0 to 1"),
    ] {
        match run_by(options.clone(), stages, 512, sampler) {
            Err(Error::Request { field: got, reason, .. }) => {
                assert!(got == field && reason.contains(says), "{options:?} {stages}: {got}: {reason}");
            }
            other => panic!("{options:?} {stages}: {:?}", other.map(|_| "a run")),
        }
    }
}

/// `e = u + w (c' - u)` of one channel with these differences, the low band on a map of this size.
fn guided(difference: &[f32], [h, w]: [usize; 2], grid: [usize; 2], high: f32, low: f32) -> Vec<f32> {
    let device = Device::cpu();
    let u: Vec<f32> = (0..difference.len()).map(|i| 0.25 * i as f32).collect();
    let c: Vec<f32> = u.iter().zip(difference).map(|(u, d)| u + d).collect();
    let output = Tensor::from_f32(&device, &[2, h, w, 1], DType::F32, &[&u[..], &c].concat()).unwrap();
    let split = SplitGuidance::new(&device, &FrequencySplit { grid, factors: vec![high / low] }).unwrap();
    let rows = split.rows(&output).unwrap().to_f32_vec().unwrap();
    let (got_u, c) = rows.split_at(u.len());
    assert_eq!(got_u, u);
    u.iter().zip(c).map(|(u, c)| low * (c - u)).collect()
}

#[test]
fn guidance_is_split_by_frequency() {
    let close = |got: Vec<f32>, want: &[f32]| {
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-4), "{got:?}, expected {want:?}");
    };
    close(guided(&[0.5; 16], [4, 4], [2, 2], 35.0, 7.5), &[3.75; 16]);
    let checkerboard: Vec<f32> = (0..16).map(|i| if (i / 4 + i % 4) % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let want: Vec<f32> = checkerboard.iter().map(|d| 35.0 * d).collect();
    close(guided(&checkerboard, [4, 4], [2, 2], 35.0, 7.5), &want);
    let profile: Vec<f32> = [[0.0; 4], [0.0; 4], [1.0; 4], [1.0; 4]].concat();
    let want = [[0.0; 4], [-6.875; 4], [14.375; 4], [7.5; 4]].concat();
    close(guided(&profile, [4, 4], [2, 2], 35.0, 7.5), &want);
    // The same scale twice is plain guidance.
    let odd: Vec<f32> = (0..15).map(|i| ((i * 7 % 5) as f32 - 2.0) / 3.0).collect();
    let want: Vec<f32> = odd.iter().map(|d| 3.0 * d).collect();
    close(guided(&odd, [5, 3], [3, 2], 3.0, 3.0), &want);
}

/// A UNet of two levels with cross-attention, two heads each.
fn unet() -> Unet {
    let config = UnetConfig::from_json("config.json", &std::fs::read_to_string(data("sd15/unet/config.json")).unwrap());
    let store = WeightStore::open(&data("sd15/unet"), "diffusion_pytorch_model", &Device::cpu(), DType::F32).unwrap();
    Unet::load(store, &config.unwrap()).unwrap()
}

#[test]
fn maps_are_collected_and_reused() {
    let unet = unet();
    let device = unet.device().clone();
    let wave = |shape: &[usize], step: f32| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| (step * i as f32).sin()).collect();
        Tensor::from_f32(&device, shape, DType::F32, &values).unwrap()
    };
    // More tokens of text than a context has.
    let text = wave(&[2, 93, unet.config().cross_attention_dim], 0.37);
    let conditioning = unet.condition(&text, &[500.0]).unwrap();
    let step = StepIndex::one(&device, 0).unwrap();
    let forward = |x: &Tensor, maps: Option<&AttentionMapMemory>, asked: AttentionMaps| {
        let options = UnetOptions { attention_maps: asked, ..UnetOptions::default() };
        let call = UnetCall { attention_maps: maps, ..UnetCall::from(&options) };
        unet.forward(x, &step, &conditioning, call).map(|y| y.to_f32_vec().unwrap())
    };
    let (small, large) = (wave(&[2, 5, 6, 4], 0.51), wave(&[2, 9, 13, 4], 0.29));
    let none = AttentionMaps::default();
    let collect = AttentionMaps { collect: true, ..none };
    let mut memory = AttentionMapMemory::default();
    let plain = forward(&small, None, none).unwrap();
    assert_eq!(forward(&small, Some(&memory), collect).unwrap(), plain);
    let maps = memory.collected().unwrap();
    assert_eq!(maps.shape(), [2, 5, 6, 93]);
    let sums: Vec<f32> = maps.to_f32_vec().unwrap().chunks(93).map(|row| row.iter().sum()).collect();
    assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-5), "{sums:?}");

    // On the levels of the larger map: 9x13, and 5x7 below it.
    assert_eq!(unet.attention_levels([9, 13]), [[9, 13], [5, 7]]);
    assert!(forward(&large, Some(&memory), AttentionMaps { reuse: 0.5, ..none }).is_err(), "there is nothing to reuse");
    memory.reuse(&maps, &unet.attention_levels([9, 13]), false).unwrap();
    let plain = forward(&large, None, none).unwrap();
    assert_eq!(forward(&large, Some(&memory), AttentionMaps { reuse: 0.0, ..none }).unwrap(), plain);
    let reused = forward(&large, Some(&memory), AttentionMaps { reuse: 0.5, ..none }).unwrap();
    assert_ne!(reused, plain);
    // A stage in the middle collects what its attention is by itself.
    let both = AttentionMaps { reuse: 0.5, ..collect };
    assert_eq!(forward(&large, Some(&memory), both).unwrap(), reused);
    let sums: Vec<f32> =
        memory.collected().unwrap().to_f32_vec().unwrap().chunks(93).map(|row| row.iter().sum()).collect();
    assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-5), "{sums:?}");
    for asked in [AttentionMaps { reuse: 1.5, ..none }, collect] {
        assert!(forward(&small, None, asked).is_err(), "{asked:?}");
    }
}

/// 2-D, and as published along the line of tokens.
#[test]
fn maps_are_resized_by_rows_and_columns_or_along_their_tokens() {
    let device = Device::cpu();
    let maps = Tensor::from_f32(&device, &[1, 2, 2, 1], DType::F32, &[0.0, 1.0, 2.0, 3.0]).unwrap();
    let resized = |flat| {
        let mut memory = AttentionMapMemory::default();
        memory.reuse(&maps, &[[4, 4]], flat).unwrap();
        memory.shares([4, 4]).unwrap().to_f32_vec().unwrap()
    };
    let flat: Vec<f32> = (0..16).map(|i| (0.25 * i as f32 - 0.375).clamp(0.0, 3.0)).collect();
    assert_eq!(resized(true), flat);
    let square = resized(false);
    assert_eq!(square[..4], [0.0, 0.25, 0.75, 1.0]);
    assert_eq!([0, 4, 8, 12].map(|at| square[at]), [0.0, 0.5, 1.5, 2.0]);
}

fn request(method: impl Into<Method>, stages: &str) -> Request {
    let stages = stages.split(',').map(|stage| stage.parse().unwrap()).collect();
    Request { prompt: "a cat".into(), method: method.into(), stages, guidance: 2.5, ..Request::default() }
}

/// Of a batch each picture has its own maps and its own ratio of scales.
#[test]
fn pictures_depend_on_their_own_requests_alone() {
    let pipeline = Pipeline::load(ModelSource::Directory(drawn::folder("sdxl")), Device::cpu(), DType::F32).unwrap();
    let base = request(FreCaS::default(), "8x8:2,16x12:2,20x24:1");
    let requests = [
        base.clone(),
        Request { prompt: "two dogs, red".into(), guidance: 4.0, seed: 3, ..base.clone() },
        Request { negative_prompt: Some("blurry".into()), seed: 7, ..base.clone() },
    ];
    let together = pipeline.generate_batch(&requests, &mut Silent).unwrap();
    for (request, picture) in requests.iter().zip(&together) {
        assert_eq!(pipeline.generate(request, &mut Silent).unwrap()[0], *picture, "{}", request.prompt);
    }
    let json = &together[0].parameters.json;
    assert_eq!((json["guidance_high"].as_f64(), json["steps"].as_u64()), (Some(6.0), Some(5)));
    assert!(together[0].parameters.text.contains("CFG scale high: 6"), "{}", together[0].parameters.text);
    // Without guidance there is nothing to split; the maps are handed on all the same.
    let alone = |reuse| {
        let method = FreCaS { map_reuse: Some(reuse), ..FreCaS::default() };
        let request = Request { guidance: 1.0, method: method.into(), ..base.clone() };
        pipeline.generate(&request, &mut Silent).unwrap().remove(0)
    };
    assert_eq!(alone(0.6).parameters.json.get("guidance_high"), None);
    assert_ne!(alone(0.6).rgb, alone(0.0).rgb);
}

/// Of any method that sees whole maps; not given, nothing is another.
#[test]
fn guidance_can_be_split_in_other_methods() {
    let pipeline = Pipeline::load(ModelSource::Directory(data("sd15")), Device::cpu(), DType::F32).unwrap();
    let rgb = |request: &Request| pipeline.generate(request, &mut Silent).unwrap().remove(0);
    let base = request(Plain {}, "40x36:2");
    let plain = rgb(&base);
    assert_eq!(plain.parameters.json.get("guidance_high"), None);
    let with = |high| Request { guidance_high: Some(high), ..base.clone() };
    let same = rgb(&with(2.5)).rgb;
    let off = same.iter().zip(&plain.rgb).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(off <= 1, "the same scale twice is off by {off} levels");
    assert_ne!(rgb(&with(9.0)).rgb, plain.rgb);

    // The model is trained at 32x32.
    for (bad, says) in [
        (with(-1.0), "from 0"),
        (with(f32::NAN), "from 0"),
        (Request { guidance: 1.0, ..with(9.0) }, "without guidance"),
        (Request { guidance_high: Some(9.0), ..request(Plain {}, "32x32:2") }, "no stage of 32x32:2 is larger"),
        (Request { guidance_high: Some(9.0), ..request(MultiDiffusion::default(), "64x64:2") }, "whole maps"),
        (Request { guidance_high: Some(9.0), ..request(PixelRush::default(), "32x32:2,64x64:1") }, "whole maps"),
        (Request { guidance_high: Some(9.0), ..request(MegaFusion::default(), "32x32:2,64x64:1+crops") }, "whole maps"),
        (Request { guidance_rescale: 0.7, ..with(9.0) }, "leave one of the two out"),
    ] {
        let error = pipeline.resolve(&bad).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
