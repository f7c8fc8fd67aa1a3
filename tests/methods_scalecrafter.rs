//! ScaleCrafter's schedule: which convolutions are re-dilated in which step, by model, size and options; what is refused.

#[path = "common/asked.rs"]
mod asked;

use std::collections::BTreeMap;

use megafuse::methods::{GenerationMethod, METHODS, Method, Run, SCALECRAFTER, ScaleCrafter, Start};
use megafuse::models::{Redilation, Redilations, Unet, UnetOptions, WeightStore};
use megafuse::ops::{FreeU, StepIndex};
use megafuse::schedulers::{Sampler, SchedulerConfig};
use megafuse::{DType, Device, Tensor};

use asked::{config, run_of};

/// What was asked of the network, call by call.
fn calls(run: &Run) -> Vec<UnetOptions> {
    asked::calls(run).0.into_iter().map(|(_, options)| options).collect()
}

/// Factors by place; those of whole groups in short, `U0` for all seven convolutions of an up block with its sampler.
fn said(options: &UnetOptions) -> String {
    let mut blocks: BTreeMap<String, Vec<(String, f64)>> = BTreeMap::new();
    for (place, redilation) in options.redilations.iter() {
        let factor = if redilation.dispersed { -redilation.factor } else { redilation.factor };
        blocks.entry(place.block.to_string()).or_default().push((place.to_string(), factor));
    }
    let of_block = |(block, convs): (String, Vec<(String, f64)>)| {
        let first = convs[0].1;
        match convs.iter().all(|(_, factor)| *factor == first) {
            true => format!("{block}*{}={first}", convs.len()),
            false => convs.iter().map(|(conv, factor)| format!("{conv}={factor}")).collect::<Vec<_>>().join(" "),
        }
    };
    blocks.into_iter().map(of_block).collect::<Vec<_>>().join(" ")
}

const GUIDED: Option<f32> = Some(7.5);

/// The published configurations of 50 steps: the convolutions of the first step, and from which step on there are none.
#[test]
fn factors_are_the_published_ones() {
    let down_2 = [
        "down_blocks.2.resnets.0.conv1=3",
        "down_blocks.2.resnets.1.conv1=3",
        "down_blocks.2.resnets.0.conv2=3",
        "down_blocks.2.resnets.1.conv2=3",
        "down_blocks.2.downsamplers.0.conv=4",
    ]
    .join(" ");
    let sd_2 = "down_blocks.1*5=2 down_blocks.2*5=2 down_blocks.3*4=2 mid_block*4=2 up_blocks.0*7=2 up_blocks.1*7=2 \
                up_blocks.2*7=2";
    let sd_4 = "down_blocks.1*5=2 down_blocks.2*5=3 down_blocks.3*4=4 mid_block*4=4 up_blocks.0*7=4 up_blocks.1*7=3 \
                up_blocks.2*7=2";
    let sd2_4 = format!(
        "{down_2} down_blocks.3*4=4 mid_block*4=4 up_blocks.0*7=4 up_blocks.1*7=4 up_blocks.2*7=3 up_blocks.3*6=2"
    );
    let sd1_weak = "down_blocks.2*5=3 down_blocks.3*4=4 mid_block*4=4 up_blocks.0*7=4 up_blocks.1*7=3";
    let sd2_weak = format!("{down_2} down_blocks.3*4=4 mid_block*4=4 up_blocks.0*7=4 up_blocks.1*7=4 up_blocks.2*7=3");
    let xl =
        |deepest| format!("down_blocks.2*4={deepest} mid_block*4=4 up_blocks.0*7=4 up_blocks.1*7=3 up_blocks.2*6=2");
    let half = |text: &str| text.replace("=2", "=2.5");
    for (unet, size, strong, tau, weak) in [
        ("sd1", "1024x1024", sd_2.to_string(), 30, ""),
        ("sd1", "1280x1280", half(sd_2), 35, ""),
        ("sd1", "2048x1024", sd_4.into(), 35, sd1_weak),
        ("sd1", "2048x2048", sd_4.into(), 35, sd1_weak),
        ("sd2", "1024x1024", sd_2.into(), 20, ""),
        ("sd2", "1280x1280", half(sd_2), 30, ""),
        ("sd2", "1024x2048", sd_4.into(), 37, ""),
        ("sd2", "2048x2048", sd2_4, 37, &sd2_weak),
        ("sdxl", "2048x2048", "mid_block*4=2 up_blocks.0*7=2".into(), 30, ""),
        ("sdxl", "2560x2560", "mid_block*4=2.5 up_blocks.0*7=2.5".into(), 30, ""),
        ("sdxl", "4096x2048", xl(3), 35, "mid_block*4=2 up_blocks.0*7=2"),
        ("sdxl", "4096x4096", xl(4), 35, "mid_block*4=2 up_blocks.0*7=2"),
    ] {
        let calls = calls(&run_of(unet, size, 50, ScaleCrafter::default(), GUIDED).unwrap());
        let what = format!("{unet} {size}");
        assert_eq!(said(&calls[0]), strong, "{what}");
        // A damped step calls twice.
        let damped = if weak.is_empty() { 0 } else { tau };
        assert_eq!(calls.len(), 50 + damped, "{what}");
        if damped > 0 {
            assert_eq!(said(&calls[1]), weak, "{what}");
        }
        let strong: Vec<&UnetOptions> = (0..50).map(|i| &calls[if i < damped { 2 * i } else { i + damped }]).collect();
        let active = strong.iter().filter(|options| options.redilations != Redilations::default()).count();
        assert_eq!(active, tau, "{what}");
        assert!(strong[tau - 1].redilations != Redilations::default(), "{what}: the first steps");
    }
}

/// d = 4 and tau = 35: 4 in step 0, 3 in step 9, 2 in step 18 and in the last one. Thresholds are shares of other numbers of steps.
#[test]
fn factors_shrink_with_the_steps() {
    let options = |redilate: &str| ScaleCrafter {
        redilate: Some(redilate.into()),
        redilate_steps: Some(35),
        progressive: Some(true),
        ..ScaleCrafter::default()
    };
    let calls_of = |options| calls(&run_of("sdxl", "1536x1024", 50, options, GUIDED).unwrap());
    let shown: Vec<String> = calls_of(options("M=4,D1=1.5")).iter().map(said).collect();
    for (step, factor) in [(0, 4), (8, 4), (9, 3), (17, 3), (18, 2), (34, 2)] {
        assert_eq!(shown[step], format!("down_blocks.1*5=2 mid_block*4={factor}"), "step {step}");
    }
    assert_eq!(shown[35], "");
    let dispersed = ScaleCrafter { disperse: Some("M,U1".into()), disperse_steps: Some(10), ..options("M=4") };
    let shown: Vec<String> = calls_of(dispersed).iter().map(said).collect();
    // Half the factor that is left; U1 is re-dilated nowhere and stays plain.
    assert_eq!([&*shown[0], &shown[9], &shown[10]], ["mid_block*4=-2", "mid_block*4=-1.5", "mid_block*4=3"]);

    let of_twenty = calls(&run_of("sdxl", "2048x2048", 20, ScaleCrafter::default(), GUIDED).unwrap());
    assert_eq!(of_twenty.iter().filter(|options| !said(options).is_empty()).count(), 12);
    // From a picture: the last 25 of 50 steps begin at step 25 of the schedule, so 5 of them are re-dilated.
    let run = run_of("sdxl", "2048x2048", 50, ScaleCrafter::default(), GUIDED).unwrap();
    let begun = run.starting(Start::new(0.5, 50, false).unwrap()).unwrap();
    assert_eq!(calls(&begun).iter().filter(|options| !said(options).is_empty()).count(), 5);
}

#[test]
fn freeu_is_on_unless_it_is_not() {
    let of = |unet: &str, text: Option<&str>| {
        let options =
            ScaleCrafter { redilate: Some("M=2".into()), freeu: text.map(Into::into), ..ScaleCrafter::default() };
        calls(&run_of(unet, "512x512", 1, options, GUIDED).unwrap())[0].freeu
    };
    let both = |[b1, b2, s1, s2]: [f32; 4]| Some([FreeU { backbone: b1, skip: s1 }, FreeU { backbone: b2, skip: s2 }]);
    assert_eq!(of("sd1", None), both([1.2, 1.4, 0.9, 0.2]));
    assert_eq!(of("sd2", None), both([1.1, 1.2, 0.9, 0.2]));
    assert_eq!(of("sdxl", None), both([1.1, 1.2, 0.6, 0.4]));
    assert_eq!((of("other", None), of("sdxl", Some("none"))), (None, None));
    assert_eq!(of("other", Some("1.5, 1.6,0.9,0.2")), both([1.5, 1.6, 0.9, 0.2]));
}

/// Four times 320 channels three times (two ResNets of the deepest block and the first of the next), two times four; never at
/// the finest level but for its first ResNet.
#[test]
fn freeu_meets_the_wide_backbones_of_sdxl() {
    let device = Device::meta();
    let Device::Meta(meta) = &device else { unreachable!() };
    let config = config("sdxl");
    let unet = Unet::load(WeightStore::meta(&device, DType::BF16), &config).unwrap();
    let text = Tensor::zeros(&device, &[1, 77, config.cross_attention_dim], DType::BF16).unwrap();
    let conditioning = unet.condition(&text, &[1.0]).unwrap();
    let one = FreeU { backbone: 1.0, skip: 1.0 };
    let options = UnetOptions { freeu: Some([one; 2]), ..UnetOptions::default() };
    meta.take_report();
    let x = Tensor::zeros(&device, &[1, 32, 32, 4], DType::BF16).unwrap();
    unet.forward(&x, &StepIndex::one(&device, 0).unwrap(), &conditioning, &options).unwrap();
    let report = meta.take_report();
    let met: Vec<usize> =
        report.ops.iter().filter(|op| op.op == "freeu").map(|op| op.output[op.output.len() - 1]).collect();
    assert_eq!(met, [2560, 2560, 1920, 1920, 1280, 960, 960]);
}

/// Kernels of 5x5 are made once and then count as memory; a plain call asks for none.
#[test]
fn dispersed_kernels_are_made_once() {
    let device = Device::meta();
    let Device::Meta(meta) = &device else { unreachable!() };
    let config = config("other");
    let unet = Unet::load(WeightStore::meta(&device, DType::F32), &config).unwrap();
    let text = Tensor::zeros(&device, &[1, 77, config.cross_attention_dim], DType::F32).unwrap();
    let conditioning = unet.condition(&text, &[1.0]).unwrap();
    let x = Tensor::zeros(&device, &[1, 8, 8, 4], DType::F32).unwrap();
    let step = StepIndex::one(&device, 0).unwrap();
    let dispersed = Redilation { factor: 1.5, dispersed: true };
    let places = config.convolutions();
    let mid = places.iter().filter(|place| place.to_string().starts_with("mid_block")).copied();
    let redilations: Redilations = mid.map(|place| (place, dispersed)).collect();
    let options = UnetOptions { redilations, ..UnetOptions::default() };
    let made = |options: &UnetOptions| {
        meta.take_report();
        unet.forward(&x, &step, &conditioning, options).unwrap();
        meta.take_report().ops.iter().filter(|op| op.op == "disperse").count()
    };
    let before = meta.live_bytes();
    assert_eq!((made(&UnetOptions::default()), made(&options), made(&options)), (0, 4, 0));
    assert_eq!(meta.live_bytes() - before, 4 * 4 * 25 * 64 * 64);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let of =
        |unet: &str, size: &str, guidance, options| run_of(unet, size, 50, options, guidance).unwrap_err().to_string();
    let list = |redilate: &str| ScaleCrafter { redilate: Some(redilate.into()), ..ScaleCrafter::default() };
    let (xl, none) = (|options| of("sdxl", "2048x2048", GUIDED, options), ScaleCrafter::default);
    for (error, part) in [
        (
            of("sdxl", "1536x1536", GUIDED, none()),
            "redilate (none): the published factors are for 2, 2.5, 4x2 and 4 times the trained 1024x1024, and 1536x1536 is none",
        ),
        (of("other", "512x512", GUIDED, none()), "SD's four levels and SDXL's three, and this network has others"),
        (
            xl(list("D3=2")),
            "redilate D3: this network has no such convolution; expected D0, D1, D2, M, U0, U1, U2 or a name like up_blocks.2.resnets.2.conv2",
        ),
        (xl(list("M=2,conv_in=2")), "redilate conv_in: this network has no such convolution"),
        (xl(list("mid_block.resnets.0.conv_shortcut=2")), "this network has no such convolution"),
        (
            xl(list("M=0.5")),
            "redilate M=0.5: expected NAME=FACTOR,..., a group (D2, M, U0) or a convolution and a factor from 1 to 32",
        ),
        (xl(list("M")), "expected NAME=FACTOR"),
        (xl(list("M=2,,U0=2")), "expected NAME=FACTOR"),
        (xl(list("M=NaN")), "expected NAME=FACTOR"),
        (xl(ScaleCrafter { damped: Some("U7=2".into()), ..none() }), "damped U7: this network has no such convolution"),
        (xl(ScaleCrafter { damped_steps: Some(3), ..none() }), "damped_steps 3: has no effect without request.damped"),
        (xl(ScaleCrafter { disperse: Some("M=2".into()), ..none() }), "disperse M=2: expected NAME,..."),
        (
            xl(ScaleCrafter { disperse: Some("U3".into()), ..none() }),
            "disperse U3: this network has no such convolution",
        ),
        (
            xl(ScaleCrafter { disperse_steps: Some(3), ..none() }),
            "disperse_steps 3: has no effect without request.disperse",
        ),
        (xl(ScaleCrafter { freeu: Some("1,2,3".into()), ..none() }), "freeu 1,2,3: expected none, or B1,B2,S1,S2"),
        (xl(ScaleCrafter { freeu: Some("1,2,3,-1".into()), ..none() }), "freeu 1,2,3,-1: expected none"),
        (
            of("sdxl", "2048x2048", None, ScaleCrafter { damped: Some("M=2".into()), ..none() }),
            "damped M=2: has no effect with a request.guidance up to 1",
        ),
    ] {
        assert!(error.contains(part), "{error}\ndoes not have\n{part}");
    }
    let kind = |name: &str| SCALECRAFTER.option(name).unwrap().kind;
    assert_eq!(kind("redilate").parse("D2=2,M=2.5"), Ok("D2=2,M=2.5".into()));
    assert!(kind("redilate").parse("D2").is_err() && kind("disperse").parse("D2,").is_err());
    assert!(kind("freeu").parse("none").is_ok() && kind("freeu").parse("1").is_err());
    assert!(kind("redilate_steps").parse("-1").is_err());
}

/// DDIM with an eta of 1, as published; every other method has 0.
#[test]
fn its_sampler_is_the_published_one() {
    let options = ScaleCrafter::default();
    let config = SchedulerConfig::from_json("scheduler_config.json", r#"{"_class_name": "EulerDiscreteScheduler"}"#);
    assert_eq!((options.sampler(&config.unwrap()), options.eta()), (Sampler::Ddim, 1.0));
    let method: Method = options.into();
    assert!(method.options().is_empty() && METHODS.iter().any(|spec| spec.name == "scalecrafter"));
}
