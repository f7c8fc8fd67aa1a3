//! FouriScale's schedule: which convolutions are filtered and dilated in which step, by model, size and options; whom the twins
//! of a batch are; what is refused.

#[path = "common/asked.rs"]
mod asked;
#[path = "common/drawn.rs"]
mod drawn;

use std::path::{Path, PathBuf};

use megafuse::methods::{FOURISCALE, FouriScale, GenerationMethod, Method, Run, ScaleCrafter, Silent, Start};
use megafuse::models::{AddedConditioning, TextConditioning, Unet, UnetCall, UnetConfig, UnetOptions, WeightStore};
use megafuse::ops::StepIndex;
use megafuse::pipeline::{ModelSource, Pipeline, Request};
use megafuse::schedulers::{Sampler, SchedulerConfig};
use megafuse::{DType, Device, Tensor};

use asked::{calls, run_of};

const GUIDED: Option<f32> = Some(7.5);

/// Sums of a call: how many convolutions of each block.
fn blocks(options: &UnetOptions) -> String {
    let Some(fourier) = &options.fourier else { return String::new() };
    let mut counts: Vec<(String, usize)> = Vec::new();
    for place in fourier.places.iter() {
        match counts.last_mut().filter(|(block, _)| *block == place.block.to_string()) {
            Some((_, count)) => *count += 1,
            None => counts.push((place.block.to_string(), 1)),
        }
    }
    counts.iter().map(|(block, count)| format!("{block}*{count}")).collect::<Vec<_>>().join(" ")
}

/// The published configurations of 50 steps: layers, d, base, floor, thresholds.
#[test]
fn schedules_are_the_published_ones() {
    let sd = "down_blocks.2*5 down_blocks.3*4 mid_block*4 up_blocks.0*7 up_blocks.1*7 up_blocks.2*7";
    // Without the upsampler of the last block.
    let xl = "down_blocks.2*4 mid_block*4 up_blocks.0*7 up_blocks.1*6";
    for (unet, size, layers, d, base, floor, [start, stop]) in [
        ("sd1", "1024x1024", sd, 2.0, [64, 64], 0.0, [10, 30]),
        ("sd1", "1280x1280", sd, 3.0, [64, 64], 0.0, [10, 30]),
        ("sd1", "2048x1024", sd, 4.0, [64, 64], 0.0, [20, 35]),
        ("sd1", "2048x2048", sd, 4.0, [64, 64], 0.0, [20, 35]),
        ("sdxl", "2048x2048", xl, 2.0, [128, 128], 0.6, [20, 35]),
        ("sdxl", "4096x2048", xl, 3.0, [88, 176], 0.6, [20, 35]),
        ("sdxl", "4096x4096", xl, 4.0, [128, 128], 0.6, [20, 35]),
    ] {
        let (calls, _) = calls(&run_of(unet, size, 50, FouriScale::default(), GUIDED).unwrap());
        let what = format!("{unet} {size}");
        assert_eq!(blocks(&calls[0].1), layers, "{what}");
        assert_eq!(calls.len(), 50, "{what}");
        for (i, (twins, options)) in calls.iter().enumerate() {
            assert_eq!((*twins, options.fourier.is_some()), (i < stop, i < stop), "{what}, step {i}");
            assert!(options.freeu.is_some());
            let Some(fourier) = &options.fourier else { continue };
            assert_eq!((fourier.base, fourier.floor), (base, floor), "{what}");
            let shrunk = (d - 1.0) * (stop - i) as f64 / (stop - start) as f64 + 1.0;
            let want = if i < start { d } else { shrunk };
            assert!((fourier.factor - want).abs() < 1e-12, "{what}, step {i}: {}", fourier.factor);
            let twin = if unet == "sdxl" { (want / 1.5).max(1.0) } else { want };
            assert!((fourier.twin_factor - twin).abs() < 1e-12, "{what}, step {i}");
        }
    }
}

/// Computed by the published rule over the 40 sizes: the least beyond the picture among those that cover both sides equally often.
#[test]
fn sdxl_is_told_the_base_size() {
    for (size, base) in [
        ("1024x1024", "1024x1024"),
        ("2048x2048", "1024x1024"),
        ("2560x2560", "1088x896"),
        ("4096x2048", "1408x704"),
        ("3072x1536", "1344x704"),
        ("2048x3072", "960x1024"),
        ("1400x1000", "1152x832"),
        ("4096x2304", "1344x704"),
        // Eight times as high as wide: none of them.
        ("1024x8192", "1024x1024"),
    ] {
        let (_, told) = calls(&run_of("sdxl", size, 1, FouriScale::default(), GUIDED).unwrap());
        assert_eq!(told.to_string(), base, "{size}");
    }
    let (_, told) = calls(&run_of("sd1", "1280x768", 1, FouriScale::default(), GUIDED).unwrap());
    assert_eq!(told.to_string(), "512x512");
}

#[test]
fn options_go_before_the_published_values() {
    let options = FouriScale {
        fourier: Some("M,D1,up_blocks.0.upsamplers.0.conv".into()),
        fourier_dilation: Some(2.5),
        fourier_start: Some(1),
        fourier_stop: Some(3),
        fourier_floor: Some(0.2),
        freeu: Some("none".into()),
        ..FouriScale::default()
    };
    let (calls_given, _) = calls(&run_of("sdxl", "1280x1024", 5, options, GUIDED).unwrap());
    assert_eq!(blocks(&calls_given[0].1), "down_blocks.1*5 mid_block*4 up_blocks.0*1");
    let factors: Vec<f64> =
        calls_given.iter().map(|(_, o)| o.fourier.as_ref().map_or(1.0, |fourier| fourier.factor)).collect();
    assert_eq!(factors, [2.5, 2.5, 1.75, 1.0, 1.0]);
    assert!(calls_given.iter().all(|(_, o)| o.freeu.is_none()));
    assert_eq!(calls_given[0].1.fourier.as_ref().unwrap().floor, 0.2);

    // Thresholds are shares of other numbers of steps; a run from a picture begins at its own step of the schedule.
    let changed = |run: &Run| calls(run).0.iter().filter(|(twins, _)| *twins).count();
    let of = |steps| run_of("sdxl", "2048x2048", steps, FouriScale::default(), GUIDED).unwrap();
    assert_eq!([of(20), of(1)].map(|run| changed(&run)), [14, 0]);
    assert_eq!(changed(&of(50).starting(Start::new(0.5, 50, false).unwrap()).unwrap()), 10);

    // Without guidance the samples stand twice all the same; amplified guidance holds where nothing else is changed, too.
    assert_eq!(changed(&run_of("sdxl", "2048x2048", 50, FouriScale::default(), None).unwrap()), 35);
    let amplified = FouriScale { amplified_guidance: true, ..FouriScale::default() };
    assert_eq!(changed(&run_of("sdxl", "1024x1024", 50, amplified, GUIDED).unwrap()), 20);
}

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn pipeline(model: &str, device: &Device) -> Pipeline {
    Pipeline::load(ModelSource::Directory(drawn::folder(model)), device.clone(), DType::F32).unwrap()
}

fn request(method: impl Into<Method>, size: &str) -> Request {
    Request {
        prompt: "a photo of a cat".into(),
        method: method.into(),
        size: Some(size.parse().unwrap()),
        steps: Some(3),
        guidance: 2.0,
        ..Request::default()
    }
}

/// At the size that the model was trained at: FreeU alone, bit for bit what ScaleCrafter makes that re-dilates nothing.
#[test]
fn the_trained_size_is_plain() {
    let pipeline = pipeline("sdxl-turbo", &Device::cpu());
    let none = ScaleCrafter { redilate: Some("M=1".into()), ..ScaleCrafter::default() };
    let [fourier, none, plain_freeu] = [
        request(FouriScale::default(), "16x16"),
        request(none, "16x16"),
        request(FouriScale { freeu: Some("none".into()), ..FouriScale::default() }, "16x16"),
    ]
    .map(|request| pipeline.generate(&request, &mut Silent).unwrap()[0].rgb.clone());
    assert!(fourier == none && fourier != plain_freeu);
}

/// Two pictures of differing prompts in one batch, and each alone; SDXL's rows are those of each picture.
#[test]
fn a_picture_does_not_depend_on_its_batch() {
    let pipeline = pipeline("sdxl-turbo", &Device::cpu());
    let options = FouriScale { fourier_start: Some(0), fourier_stop: Some(3), ..FouriScale::default() };
    for guidance in [2.0, 1.0] {
        let of =
            |prompt: &str, seed| Request { prompt: prompt.into(), seed, guidance, ..request(options.clone(), "28x32") };
        let requests = [of("a photo of a cat", 1), of("two dogs", 2)];
        let together = pipeline.generate_batch(&requests, &mut Silent).unwrap();
        for (request, picture) in requests.iter().zip(together) {
            let alone = pipeline.generate(request, &mut Silent).unwrap();
            assert!(alone[0].rgb == picture.rgb, "{} at guidance {guidance}", request.prompt);
        }
    }
}

/// Twins that nothing treats otherwise are the samples before them, bit for bit: with sizes of its own for each row, and with one
/// row or two of the text.
#[test]
fn twins_are_the_samples_before_them() {
    let device = Device::cpu();
    let config = std::fs::read_to_string(data("sdxl/unet/config.json")).unwrap();
    let config = UnetConfig::from_json("config.json", &config).unwrap();
    let store = WeightStore::open(&drawn::folder("sdxl/unet"), "diffusion_pytorch_model", &device, DType::F32).unwrap();
    let unet = Unet::load(store, &config).unwrap();
    let varied = |shape: &[usize], of: f32| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| ((i as f32 + 1.0) * of).sin()).collect();
        Tensor::from_f32(&device, shape, DType::F32, &values).unwrap()
    };
    let added = config.added.unwrap();
    for (rows, first) in [(4, 2), (2, 1), (1, 0), (3, 0)] {
        let text = varied(&[rows, 7, config.cross_attention_dim], 0.37);
        let pooled = varied(&[rows, added.pooled_dim], 0.61);
        let time_ids = [[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]];
        let added = Some(AddedConditioning { pooled: &pooled, time_ids: &time_ids });
        let conditioning = unet
            .condition(TextConditioning { text: &text, added, guidance: None, noise_level: None }, &[981.0, 1.0])
            .unwrap();
        let (twins, options) = (rows - first, UnetOptions::default());
        let x = varied(&[rows, 6, 5, 4], 0.83);
        let step = StepIndex::one(&device, 1).unwrap();
        let plain = unet.forward(&x, &step, &conditioning, &options).unwrap().to_f32_vec().unwrap();
        let both = Tensor::concat(&[x.clone(), x.rows(first..rows).unwrap()]).unwrap();
        let call = UnetCall { twins, ..UnetCall::from(&options) };
        let got = unet.forward(&both, &step, &conditioning.with_twins(first).unwrap(), call).unwrap();
        let want = [&plain[..], &plain[first * 6 * 5 * 4..]].concat();
        assert_eq!(got.to_f32_vec().unwrap(), want, "{rows} rows, from {first} on");

        let error = |twins| {
            let call = UnetCall { twins, ..UnetCall::from(&options) };
            unet.forward(&both, &step, &conditioning.with_twins(first).unwrap(), call).unwrap_err().to_string()
        };
        assert!(error(rows + twins).contains("twins"), "{}", error(rows + twins));
        assert!(conditioning.with_twins(rows).is_err());
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let of =
        |unet: &str, size: &str, guidance, options| run_of(unet, size, 50, options, guidance).unwrap_err().to_string();
    let (xl, none) = (|options| of("sdxl", "2048x2048", GUIDED, options), FouriScale::default);
    let list = |list: &str| FouriScale { fourier: Some(list.into()), ..none() };
    for (error, part) in [
        (of("other", "512x512", GUIDED, none()), "SD's four levels and SDXL's three, and this network has others"),
        (of("other", "512x512", GUIDED, list("M")), "no sample_size to compare 512x512 with"),
        (
            xl(list("D3")),
            "fourier D3: this network has no such convolution; expected D0, D1, D2, M, U0, U1, U2 or a name like up_blocks.2.resnets.2.conv2",
        ),
        (xl(list("M,conv_in")), "fourier conv_in: this network has no such convolution"),
        (xl(list("M=2")), "fourier M=2: expected NAME,..."),
        (xl(list("M,,U0")), "expected NAME,..."),
        (
            of("one-sided", "1024x1024", GUIDED, none()),
            "fourier is down_blocks.2.downsamplers.0.conv, expected no downsampler",
        ),
        (xl(FouriScale { fourier_dilation: Some(0.0), ..none() }), "fourier_dilation 0: expected a number above 0"),
        (
            xl(FouriScale { fourier_dilation: Some(f64::NAN), ..none() }),
            "fourier_dilation NaN: expected a number above 0",
        ),
        (xl(FouriScale { fourier_dilation: Some(33.0), ..none() }), "fourier_dilation 33: expected a number above 0"),
        (
            xl(FouriScale { fourier_start: Some(9), fourier_stop: Some(8), ..none() }),
            "fourier_start 9: is behind request.fourier_stop 8",
        ),
        (xl(FouriScale { fourier_floor: Some(1.5), ..none() }), "fourier_floor 1.5: expected a number from 0 to 1"),
        (xl(FouriScale { freeu: Some("1,2,3".into()), ..none() }), "freeu 1,2,3: expected none, or B1,B2,S1,S2"),
        (
            of("sdxl", "2048x2048", None, FouriScale { amplified_guidance: true, ..none() }),
            "amplified_guidance true: has no effect with a request.guidance up to 1",
        ),
    ] {
        assert!(error.contains(part), "{error}\ndoes not have\n{part}");
    }
    let kind = |name: &str| FOURISCALE.option(name).unwrap().kind;
    assert_eq!(kind("fourier").parse("D2,M"), Ok("D2,M".into()));
    assert!(kind("fourier").parse("D2=2").is_err() && kind("fourier_dilation").parse("0").is_err());
    assert!(kind("fourier_floor").parse("1.1").is_err() && kind("fourier_stop").parse("-1").is_err());
}

/// DDIM with an eta of 1, as published.
#[test]
fn its_sampler_is_the_published_one() {
    let options = FouriScale::default();
    let config = SchedulerConfig::from_json("scheduler_config.json", r#"{"_class_name": "EulerDiscreteScheduler"}"#);
    assert_eq!((options.sampler(&config.unwrap()), options.eta()), (Sampler::Ddim, 1.0));
}
