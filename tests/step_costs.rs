//! What a guided step and a decoding of the published models cost, as the planner counts them: launches, multiply-accumulates,
//! flops, bytes, and the memory beside the weights. tests/data/step_costs.tsv holds the figures, and they must be these to the
//! last digit, so that a change which doubles one of them is seen where it is made.
//!
//! The figures are checked against others' where there are any: tests/models_unet.rs has torch's count of SD 1.5's step, and
//! tests/ops compare what the meta device counts with what a card launches, op by op.

use std::fs;

use megafuse::models::single_file::{Family, published_config};
use megafuse::models::{
    AddedConditioning, DeepFloydModel, PublishedModel, TextConditioning, Unet, UnetConfig, UnetOptions, Vae, VaeConfig,
    WeightStore,
};
use megafuse::ops::StepIndex;
use megafuse::pipeline::{
    InputPicture, Lowres, LowresPicture, Method, ModelSource, PhaseReport, Planner, RandomShapes, Request, Size, Stage,
};
use megafuse::runtime::{MetaDevice, OpKind, Report};
use megafuse::{DType, Device, Tensor};

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/step_costs.tsv");
const UPDATE: &str = "MEGAFUSE_UPDATE_STEP_COSTS";
const HOW: &str = "MEGAFUSE_UPDATE_STEP_COSTS=1 cargo test --test step_costs";

/// Model, family, and the sizes of pictures that are looked at.
const MODELS: [(&str, Family, &[usize]); 3] =
    [("sd15", Family::Sd1, &[512, 1024]), ("sd21", Family::Sd2, &[768]), ("sdxl", Family::Sdxl, &[1024, 2048])];

fn config(family: Family, part: &str) -> (String, String) {
    let name = format!("{part}/config.json");
    let text = published_config(family, &name).unwrap_or_else(|| panic!("{family:?} has no {name}"));
    (name, text)
}

/// A meta device, and where it records.
fn meta() -> (Device, MetaDevice) {
    let device = Device::meta();
    let Device::Meta(recorder) = &device else { unreachable!("just made") };
    let recorder = recorder.clone();
    (device, recorder)
}

/// Runs `call` and returns what it recorded, with the bytes that were alive at most beside those alive before.
fn recorded(recorder: &MetaDevice, call: impl FnOnce() -> Tensor) -> (Report, u64) {
    recorder.take_report();
    let before = recorder.live_bytes();
    call();
    let report = recorder.take_report();
    let beside = report.peak_bytes - before;
    (report, beside)
}

/// One step with guidance: two samples in bf16. Text and timestep are embedded before, as in a picture.
fn step(family: Family, size: usize) -> (Report, u64) {
    let (device, recorder) = meta();
    let (name, json) = config(family, "unet");
    let config = UnetConfig::from_json(&name, &json).expect("a published configuration");
    let unet = Unet::load(WeightStore::meta(&device, DType::BF16), &config).expect("loads");
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).expect("a tensor");
    let latents = zeros(&[2, size / 8, size / 8, config.in_channels]);
    let text = zeros(&[2, 77, config.cross_attention_dim]);
    let pooled = config.added.map(|added| zeros(&[2, added.pooled_dim]));
    let time_ids = [[0.0; 6]; 2];
    let added = pooled.as_ref().map(|pooled| AddedConditioning { pooled, time_ids: &time_ids });
    let conditioning = TextConditioning { text: &text, added, guidance: None, noise_level: None };
    let conditioning = unet.condition(conditioning, &[981.0]).expect("conditions");
    let at = StepIndex::one(&device, 0).expect("a step");
    recorded(&recorder, || unet.forward(&latents, &at, &conditioning, &UnetOptions::default()).expect("runs"))
}

/// One picture in bf16.
fn decode(family: Family, size: usize) -> (Report, u64) {
    let (device, recorder) = meta();
    let (name, json) = config(family, "vae");
    let config = VaeConfig::from_json(&name, &json).expect("a published configuration");
    let vae = Vae::load(WeightStore::meta(&device, DType::BF16), &config).expect("loads");
    let side = size / config.factor();
    let latents = Tensor::zeros(&device, &[1, side, side, config.latent_channels], DType::BF16).expect("a tensor");
    recorded(&recorder, || vae.decode(&latents).expect("decodes"))
}

fn table() -> String {
    let mut lines = vec![
        format!("# What the meta device counts, in bf16; {HOW} writes this"),
        "# unet: a step with guidance, two samples; vae: one picture decoded. memory: bytes beside weights and inputs"
            .into(),
        "model\tpart\tsize\tlaunches\tmacs\tflops\tbytes\tmemory".into(),
    ];
    for (model, family, sizes) in MODELS {
        for &size in sizes {
            for (part, (report, memory)) in [("unet", step(family, size)), ("vae", decode(family, size))] {
                let work = report.total();
                let figures =
                    [work.launches, work.macs, work.flops, work.bytes, memory].map(|figure| figure.to_string());
                lines.push(format!("{model}\t{part}\t{size}\t{}", figures.join("\t")));
            }
        }
    }
    lines.join("\n") + "\n"
}

/// Lines of one text that the other has not, with what they are in the other.
fn differences(stored: &str, fresh: &str) -> Vec<String> {
    let rows = |text: &str| -> Vec<(String, Vec<String>)> {
        let rows = text.lines().filter(|line| !line.starts_with('#'));
        rows.map(|line| {
            let fields: Vec<String> = line.split('\t').map(String::from).collect();
            (fields.iter().take(3).cloned().collect::<Vec<_>>().join(" "), fields)
        })
        .collect()
    };
    let (stored, fresh) = (rows(stored), rows(fresh));
    let names: Vec<&String> = fresh.first().map(|(_, names)| names.iter().collect()).unwrap_or_default();
    let mut found = Vec::new();
    for (key, now) in &fresh {
        let Some((_, was)) = stored.iter().find(|(other, _)| other == key) else {
            found.push(format!("{key}: not in the table"));
            continue;
        };
        for (at, now) in now.iter().enumerate() {
            let was = was.get(at).map_or("nothing", String::as_str);
            if was != now {
                let ratio = match (was.parse::<f64>(), now.parse::<f64>()) {
                    (Ok(was), Ok(now)) if was > 0.0 => format!(" ({:+.2} %)", 100.0 * (now / was - 1.0)),
                    _ => String::new(),
                };
                found.push(format!("{key}: {} was {was}, is {now}{ratio}", names[at]));
            }
        }
    }
    let gone = stored.iter().filter(|(key, _)| fresh.iter().all(|(other, _)| other != key));
    found.extend(gone.map(|(key, _)| format!("{key}: in the table, no longer counted")));
    found
}

#[test]
fn a_step_costs_what_the_table_says() {
    let fresh = table();
    if std::env::var_os(UPDATE).is_some() {
        fs::write(TABLE, &fresh).expect("tests/data is writable");
        return;
    }
    let stored = fs::read_to_string(TABLE).expect("tests/data/step_costs.tsv");
    let found = differences(&stored, &fresh);
    assert!(
        found.is_empty() && stored == fresh,
        "steps do not cost what tests/data/step_costs.tsv says:\n  {}\nIf this is meant, {HOW} writes the table; commit it \
         with the change, and say why it costs more.",
        found.join("\n  ")
    );
}

#[test]
fn a_difference_is_named_with_what_it_was() {
    let stored = "# x\nmodel\tpart\tsize\tlaunches\nsd15\tunet\t512\t300\nsd15\tvae\t512\t80\n";
    let fresh = "# y\nmodel\tpart\tsize\tlaunches\nsd15\tunet\t512\t600\nsd21\tunet\t768\t300\n";
    let expected = [
        "sd15 unet 512: launches was 300, is 600 (+100.00 %)",
        "sd21 unet 768: not in the table",
        "sd15 vae 512: in the table, no longer counted",
    ];
    assert_eq!(differences(stored, fresh), expected);
    assert_eq!(differences(stored, stored), [""; 0]);
}

/// The denoiser's share in a relay of what all steps at the final size take, for the paper's stages, counted in two ways: with attention's
/// products, and of convolutions and linears alone. MegaFusion's table of costs (Wu et al. 2024, arXiv:2408.11001) is nearest to the
/// second; docs/methods.md has the figures.
#[test]
fn the_relays_share_is_the_papers() {
    let floyd = PublishedModel::DeepFloyd;
    let models = [
        ("SD 1.5", PublishedModel::from(Family::Sd1), "512x512:40,768x768:5,1024x1024:5", [0.277, 0.349], Some(0.36)),
        ("SDXL", Family::Sdxl.into(), "1024x1024:40,2048x2048:10", [0.350, 0.400], Some(0.40)),
        ("SD 3", Family::Sd3.into(), "1024x1024:20,2048x2048:8", [0.385, 0.475], Some(0.46)),
        ("IF-I-XL", floyd(DeepFloydModel::IXl), "64x64:80,128x128:20", [0.391, 0.400], Some(0.40)),
        ("IF-I-L", floyd(DeepFloydModel::IL), "64x64:80,128x128:20", [0.381, 0.400], None),
        ("IF-I-M", floyd(DeepFloydModel::IM), "64x64:80,128x128:20", [0.371, 0.400], None),
        ("IF-II-L", floyd(DeepFloydModel::IiL), "256x256:40,512x512:10", [0.391, 0.400], None),
    ];
    let small = InputPicture::new("small", Size::new(64, 64), vec![0; 3 * 64 * 64]).expect("a picture");
    for (name, model, stages, want, paper) in models {
        let source = ModelSource::Random(RandomShapes::Published(model));
        let planner = Planner::new(&source, DType::BF16).expect("a planner");
        let stages: Vec<Stage> = stages.split(',').map(|stage| stage.parse().expect("a stage")).collect();
        let (last, steps) = (stages[stages.len() - 1].size, stages.iter().map(|stage| stage.steps).sum());
        let lowres =
            (name == "IF-II-L").then(|| Lowres { picture: LowresPicture::File(small.clone()), noise_level: 250 });
        let request = Request { prompt: "a cat".into(), lowres, ..Request::suited_to(&source) };
        let method = |name| Method::named(name).expect("a method");
        let relay = Request { method: method("megafusion"), stages, ..request.clone() };
        let whole = Request { method: method("plain"), size: Some(last), steps: Some(steps), ..request };
        // All of the denoiser, and what of it is attention.
        let macs = |request: &Request| -> [u64; 2] {
            let report = planner.plan(request).expect("a plan");
            let steps: Vec<&PhaseReport> = report.phases.iter().filter(|phase| phase.name == "denoise").collect();
            let attention = |phase: &&PhaseReport| {
                let of = phase.by_kind.iter().filter(|(kind, _)| *kind == OpKind::Attention);
                of.map(|(_, work)| work.macs).sum::<u64>() * phase.repeats as u64
            };
            [steps.iter().map(|phase| phase.once.macs * phase.repeats as u64).sum(), steps.iter().map(attention).sum()]
        };
        let ([all, attention], [of_all, of_attention]) = (macs(&relay), macs(&whole));
        let got = [all as f64 / of_all as f64, (all - attention) as f64 / (of_all - of_attention) as f64];
        println!(
            "{name}: {:.1} TMAC, {:.3} with attention, {:.3} of layers alone, paper {paper:?}",
            all as f64 / 1e12,
            got[0],
            got[1]
        );
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 6e-4), "{name}: {got:?}, not {want:?}");
        // The paper gives two digits, and counts with other tools.
        assert!(paper.is_none_or(|paper: f64| (got[1] - paper).abs() < 0.02), "{name}: {got:?}, paper {paper:?}");
    }
}
