//! UNet and VAE as a library: option groups that no small published-style model sets, low precision, batches, wrong
//! arguments, and what a step costs. (`tests/oracle` checks the modules of whole models through the command line.)

#[path = "common/arrays.rs"]
mod arrays;
#[path = "common/drawn.rs"]
mod drawn;

use std::fs;
use std::path::{Path, PathBuf};

use arrays::{Arrays, arrays, channels_last, errors};
use megafuse::models::{
    AddedConditioning, TextConditioning, Unet, UnetConditioning, UnetConfig, UnetOptions, Vae, VaeConfig, WeightFormat,
    WeightStore,
};
use megafuse::ops::{self, StepIndex};
use megafuse::runtime::OpKind;
use megafuse::{DType, Device, Error, Tensor};

fn data(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// f32 tensors of a file, by name: shape and values.
fn load_unet(folder: &Path, device: &Device, dtype: DType) -> Unet {
    load_unet_as(folder, device, dtype, WeightFormat::Plain)
}

fn load_unet_as(folder: &Path, device: &Device, dtype: DType, format: WeightFormat) -> Unet {
    let config = UnetConfig::from_json("config.json", &text(&folder.join("config.json"))).expect("a good config");
    let store = WeightStore::open(folder, "diffusion_pytorch_model", device, dtype).expect("weights");
    Unet::load(store.with_format(format), &config).expect("loads")
}

fn load_vae(folder: &Path, device: &Device, dtype: DType) -> Vae {
    let config = VaeConfig::from_json("config.json", &text(&folder.join("config.json"))).expect("a good config");
    let store = WeightStore::open(folder, "diffusion_pytorch_model", device, dtype).expect("weights");
    Vae::load(store, &config).expect("loads")
}

const OPTIONS: [&str; 6] = [
    "only-cross-attention",
    "no-mid-block",
    "one-resnet-mid-block",
    "transformer-layers-per-resnet",
    "text-time",
    "guidance-embedding",
];

/// `expected.safetensors` of a small model with options.
struct OptionCase {
    unet: Unet,
    expected: Arrays,
    text: Tensor,
    pooled: Option<Tensor>,
    time_ids: Vec<[f32; 6]>,
    guidance: Option<f32>,
}

impl OptionCase {
    fn load(name: &str, dtype: DType) -> OptionCase {
        OptionCase::load_as(name, dtype, WeightFormat::Plain)
    }

    fn load_as(name: &str, dtype: DType, format: WeightFormat) -> OptionCase {
        let device = Device::cpu();
        let folder = drawn::folder(&format!("unet-options/{name}"));
        let expected = arrays(&folder.join("expected.safetensors"));
        let tensor = |(shape, values): &(Vec<usize>, Vec<f32>)| {
            Tensor::from_f32(&device, shape, dtype, values).expect("a tensor")
        };
        OptionCase {
            unet: load_unet_as(&folder, &device, dtype, format),
            text: tensor(&expected["prompt_embeds"]),
            pooled: expected.get("pooled_prompt_embeds").map(tensor),
            time_ids: expected.get("time_ids").map_or(Vec::new(), |(_, ids)| ids.as_chunks().0.to_vec()),
            guidance: expected.get("guidance").map(|(_, guidance)| guidance[0]),
            expected,
        }
    }

    fn added(&self) -> Option<AddedConditioning<'_>> {
        self.pooled.as_ref().map(|pooled| AddedConditioning { pooled, time_ids: &self.time_ids })
    }

    fn text(&self) -> TextConditioning<'_> {
        TextConditioning { text: &self.text, added: self.added(), guidance: self.guidance, noise_level: None }
    }

    fn timestep(&self) -> f32 {
        self.expected["timestep"].1[0]
    }

    fn array(&self, name: &str) -> Tensor {
        channels_last(self.unet.device(), DType::F32, &self.expected[name])
    }

    fn forward(&self, conditioning: &UnetConditioning, step: &StepIndex) -> Tensor {
        let sample = channels_last(self.unet.device(), self.unet.dtype(), &self.expected["sample"]);
        self.unet.forward(&sample, step, conditioning, &UnetOptions::default()).expect("runs")
    }
}

/// f32 sums of at most a few hundred products in each of some fifty layers; 3e-6 is what comes out.
const F32_TOLERANCE: f64 = 1e-5;

#[test]
fn rare_options_agree_with_the_published_class() {
    for name in OPTIONS {
        let case = OptionCase::load(name, DType::F32);
        let conditioning = case.unet.condition(case.text(), &[case.timestep()]).expect("conditions");
        let got = case.forward(&conditioning, &at(case.unet.device(), 0));
        let (worst, _) = errors(&got, &case.array("out"));
        assert!(worst < F32_TOLERANCE, "{name}: off by {worst:.1e}");
    }
}

/// With the same layers in 8 bits, and no others: that changes the result by several percent. Sums that differ in their last
/// bits may be rounded to neighbouring codes, an eighth apart: in the last of the models that happens, and is seen.
#[test]
fn weights_in_8_bits_agree_with_the_published_class_rounded_so() {
    for (name, allowed) in [("only-cross-attention", 1e-5), ("guidance-embedding", 1e-5), ("text-time", 0.08)] {
        let case = OptionCase::load_as(name, DType::F32, WeightFormat::Fp8);
        let conditioning = case.unet.condition(case.text(), &[case.timestep()]).expect("conditions");
        let got = case.forward(&conditioning, &at(case.unet.device(), 0));
        let (_, from_rounded) = errors(&got, &case.array("out_fp8"));
        let (_, from_exact) = errors(&got, &case.array("out"));
        println!("{name}: {from_rounded:.1e} from what is rounded so, {from_exact:.1e} from what is not");
        assert!(from_rounded < allowed && from_exact > 0.04, "{name}: {from_rounded:.1e}, {from_exact:.1e}");
    }
}

/// SDXL's rows are of a step and of a prompt; with other sizes or timesteps only they are made again.
#[test]
fn added_conditioning_is_of_each_row_and_can_change() {
    let case = OptionCase::load("text-time", DType::F32);
    let (unet, device, [first, second]) = (&case.unet, case.unet.device(), [case.time_ids[0], case.time_ids[1]]);
    let timesteps = [3.0, case.timestep(), 999.0];
    let got = case.forward(&unet.condition(case.text(), &timesteps).expect("conditions"), &at(device, 1));
    assert!(errors(&got, &case.array("out")).0 < F32_TOLERANCE);

    // Each image at a step of its own: the other image at a step leaves an image's bits.
    let conditioning = unet.condition(case.text(), &timesteps).expect("conditions");
    let mixed = case.forward(&conditioning, &StepIndex::new(device, &[1, 2]).expect("steps"));
    let half = |x: &Tensor| x.rows(0..1).expect("a row").to_f32_vec().expect("cpu");
    assert_eq!(half(&mixed), half(&got));
    assert!(mixed.to_f32_vec().expect("cpu") != got.to_f32_vec().expect("cpu"), "the second image is at another step");

    // The wrong sizes for all, then the right ones.
    let pooled = case.pooled.as_ref().expect("pooled");
    let wrong = TextConditioning { added: Some(AddedConditioning { pooled, time_ids: &[second] }), ..case.text() };
    let wrong = unet.condition(wrong, &[7.0]).expect("conditions");
    let right = unet.recondition(&wrong, case.added(), &timesteps).expect("conditions");
    assert_eq!((right.text_rows(), right.steps()), (2, 3));
    let again = case.forward(&right, &at(device, 1));
    assert_eq!(again.to_f32_vec().expect("cpu"), got.to_f32_vec().expect("cpu"));
    let sizes = AddedConditioning { pooled, time_ids: &[first, first] };
    let other = case.forward(&unet.recondition(&wrong, Some(sizes), &timesteps).expect("conditions"), &at(device, 1));
    assert_eq!(half(&other), half(&got), "the first row's sizes are the same");
    assert!(errors(&other, &got).0 > 1e-3, "the second row's are others");
}

#[test]
fn guidance_embedding_may_be_left_out_and_recondition_keeps_it() {
    let case = OptionCase::load("guidance-embedding", DType::F32);
    let (unet, step) = (&case.unet, at(case.unet.device(), 0));
    let with = unet.condition(case.text(), &[1.0]).expect("conditions");
    let with = case.forward(&unet.recondition(&with, None, &[case.timestep()]).expect("conditions"), &step);
    assert!(errors(&with, &case.array("out")).0 < F32_TOLERANCE);
    let without = case.forward(&unet.condition(&case.text, &[case.timestep()]).expect("conditions"), &step);
    assert!(errors(&without, &with).0 > 1e-3);
}

#[test]
fn added_conditioning_that_does_not_fit_is_named() {
    let case = OptionCase::load("text-time", DType::F32);
    let pooled = case.pooled.as_ref().expect("pooled");
    let fails = |text: TextConditioning, want: &str| {
        let error = case.unet.condition(text, &[1.0]).map(drop).expect_err("wrong").to_string();
        assert!(error.contains(want), "{error} does not contain {want}");
    };
    fails((&case.text).into(), "added conditioning is missing");
    fails(TextConditioning { guidance: Some(1.0), ..case.text() }, "guidance is 1, expected none");
    let narrow = Tensor::zeros(case.unet.device(), &[2, 9], DType::F32).expect("a tensor");
    let added = |pooled, time_ids| TextConditioning {
        added: Some(AddedConditioning { pooled, time_ids }),
        ..TextConditioning::from(&case.text)
    };
    fails(added(&narrow, &case.time_ids), "pooled has shape [2, 9], expected [2, 10]");
    fails(added(pooled, &[]), "number of time_ids is 0, expected 1 for all rows of the text, or 2");
    let plain = OptionCase::load("guidance-embedding", DType::F32);
    let text = TextConditioning { text: &plain.text, ..case.text() };
    let error = plain.unet.condition(text, &[1.0]).map(drop).expect_err("wrong").to_string();
    assert!(error.contains("added conditioning is given, expected none"), "{error}");
}

fn at(device: &Device, step: usize) -> StepIndex {
    StepIndex::one(device, step).expect("a step")
}

/// One of the small models with an input.
struct Case {
    unet: Unet,
    sample: Tensor,
    context: Tensor,
    want: Tensor,
    timestep: f32,
}

impl Case {
    fn load(model: &str, case: &str, dtype: DType) -> Case {
        let device = Device::cpu();
        let unet = load_unet(&drawn::folder(model).join("unet"), &device, dtype);
        let all = arrays(&data(model).join("oracle.safetensors"));
        let get = |name: &str| &all[&format!("{case}.{name}")];
        let (shape, embeds) = get("prompt_embeds");
        Case {
            sample: channels_last(&device, dtype, get("sample")),
            context: Tensor::from_f32(&device, shape, dtype, embeds).expect("a tensor"),
            want: channels_last(&device, DType::F32, get("out")),
            timestep: get("timestep").1[0],
            unet,
        }
    }

    fn condition(&self, timesteps: &[f32]) -> UnetConditioning {
        self.unet.condition(&self.context, timesteps).expect("conditions")
    }

    fn forward(&self, sample: &Tensor, conditioning: &UnetConditioning, step: usize) -> Tensor {
        self.unet.forward(sample, &at(sample.device(), step), conditioning, &UnetOptions::default()).expect("runs")
    }
}

/// Rounding to the dtype adds in quadrature over the layers: with some four hundred roundings of half an ulp (at most) each
/// in the deepest of these, the root mean square error stays within ten ulp; weights and inputs are rounded too, hence
/// twice that. 1 to 10 ulp is what comes out.
#[test]
fn low_precision_stays_within_its_rounding() {
    for model in ["sd15", "sd21", "four-levels"] {
        for dtype in [DType::F16, DType::BF16] {
            let case = Case::load(model, "unet-batch", dtype);
            let got = case.forward(&case.sample, &case.condition(&[case.timestep]), 0);
            assert_eq!(got.dtype(), dtype);
            let (_, rms) = errors(&got, &case.want);
            assert!(rms < 20.0 * dtype.ulp(), "{model} {dtype}: off by {rms:.1e}, an ulp is {:.1e}", dtype.ulp());
            assert!(rms > 0.01 * dtype.ulp(), "{model} {dtype}: off by {rms:.1e}, so nothing was rounded");
        }
    }
}

#[test]
fn low_precision_vae_stays_within_its_rounding() {
    let all = arrays(&data("sd21/oracle.safetensors"));
    for dtype in [DType::F16, DType::BF16] {
        let device = Device::cpu();
        let vae = load_vae(&drawn::folder("sd21/vae"), &device, dtype);
        let got = vae.decode(&channels_last(&device, dtype, &all["decode-odd.latent"])).expect("decodes");
        let (_, rms) = errors(&got, &channels_last(&device, DType::F32, &all["decode-odd.decoded"]));
        assert!(rms < 10.0 * dtype.ulp(), "{dtype}: off by {rms:.1e}, an ulp is {:.1e}", dtype.ulp());
    }
}

/// Images of one batch at steps of their own, with prompts of their own or one prompt for all: the bits of each image alone.
#[test]
fn images_have_their_own_steps_and_prompts() {
    let case = Case::load("sd21", "unet-batch", DType::F32);
    let timesteps = [999.0, case.timestep, 3.5];
    let steps = [2, 0];
    let index = StepIndex::new(case.unet.device(), &steps).expect("steps");
    let sample = ops::scale_cast(&case.sample, 1.0, 0.0, DType::F32, 2).expect("four samples");
    for text_rows in [1, 2] {
        let context = case.context.rows(0..text_rows).expect("rows");
        let conditioning = case.unet.condition(&context, &timesteps).expect("conditions");
        let all = case.unet.forward(&sample, &index, &conditioning, &UnetOptions::default()).expect("runs");
        for i in 0..4 {
            let context = case.context.rows(i * text_rows / 4..i * text_rows / 4 + 1).expect("a row");
            let conditioning = case.unet.condition(&context, &[timesteps[steps[i % 2]]]).expect("conditions");
            let alone = case.forward(&sample.rows(i..i + 1).expect("a row"), &conditioning, 0);
            let same = all.rows(i..i + 1).expect("a row");
            assert_eq!(
                alone.to_f32_vec().expect("cpu"),
                same.to_f32_vec().expect("cpu"),
                "{text_rows} texts, image {i}"
            );
        }
    }
}

/// Neither the other rows of a batch nor the other timesteps of a run change a result, bit for bit.
#[test]
fn a_sample_depends_on_itself_alone() {
    let case = Case::load("sd21", "unet-batch", DType::F32);
    let both = case.forward(&case.sample, &case.condition(&[999.0, case.timestep, 3.5]), 1);
    for row in 0..2 {
        let context = case.context.rows(row..row + 1).expect("a row");
        let conditioning = case.unet.condition(&context, &[case.timestep]).expect("conditions");
        let alone = case.forward(&case.sample.rows(row..row + 1).expect("a row"), &conditioning, 0);
        let same = both.rows(row..row + 1).expect("a row");
        assert_eq!(alone.to_f32_vec().expect("cpu"), same.to_f32_vec().expect("cpu"), "row {row}");
    }
}

#[test]
fn dilation_changes_the_mid_block_alone_and_only_when_asked() {
    let case = Case::load("sd15", "unet-square", DType::F32);
    let conditioning = case.condition(&[case.timestep]);
    let run = |mid_dilation| {
        case.unet
            .forward(
                &case.sample,
                &at(case.unet.device(), 0),
                &conditioning,
                &UnetOptions { mid_dilation, ..UnetOptions::default() },
            )
            .expect("runs")
    };
    assert!(errors(&run(1), &case.want).0 < F32_TOLERANCE);
    assert!(errors(&run(2), &case.want).0 > 1e-3, "dilation 2 changes the result");
}

/// A neighbourhood that spans the map is no neighbourhood, bit for bit.
#[test]
fn a_neighbourhood_changes_larger_maps_alone() {
    let case = Case::load("sd15", "unet-square", DType::F32);
    let conditioning = case.condition(&[case.timestep]);
    let [_, h, w, _] = case.sample.dims("case", "sample").expect("a sample");
    let run = |neighbourhood| {
        let options = UnetOptions { neighbourhood, ..UnetOptions::default() };
        case.unet.forward(&case.sample, &at(case.unet.device(), 0), &conditioning, &options).expect("runs")
    };
    let plain = run(None).to_f32_vec().expect("cpu");
    assert_eq!(run(Some([h, w])).to_f32_vec().expect("cpu"), plain);
    assert!(errors(&run(Some([h, w - 1])), &case.want).0 > 1e-5);
}

#[test]
fn wrong_arguments_are_errors() {
    let case = Case::load("sd15", "unet-square", DType::F32);
    let conditioning = case.condition(&[case.timestep]);
    let options = UnetOptions::default();
    let tensor = |shape: &[usize], dtype| Tensor::zeros(case.unet.device(), shape, dtype).expect("a tensor");
    let forward = |x: &Tensor, step: usize, options: &UnetOptions| {
        case.unet.forward(x, &at(case.unet.device(), step), &conditioning, options).expect_err("wrong").to_string()
    };
    let x = tensor(&[1, 8, 8, 4], DType::F32);
    assert_eq!(
        forward(&x, 1, &options),
        "unet: step is 1, expected below 1, the number of timesteps of the conditioning"
    );
    assert_eq!(
        forward(&x, 0, &UnetOptions { mid_dilation: 0, ..UnetOptions::default() }),
        "unet: mid_dilation is 0, expected 1 or more"
    );
    // The model has two levels.
    let wide = UnetOptions { wide_downsampler: Some(1), ..UnetOptions::default() };
    assert_eq!(forward(&x, 0, &wide), "unet: wide_downsampler is 1, expected a level below 1, of 2");
    let pooled = UnetOptions { pooled_level: Some(2), ..UnetOptions::default() };
    assert_eq!(forward(&x, 0, &pooled), "unet: pooled_level is 2, expected a level below 2, of 2");
    let windowed = UnetOptions { windowed_level: Some(2), ..UnetOptions::default() };
    assert_eq!(forward(&x, 0, &windowed), "unet: windowed_level is 2, expected a level below 2, of 2");
    let flat = UnetOptions { neighbourhood: Some([0, 4]), ..UnetOptions::default() };
    assert_eq!(forward(&x, 0, &flat), "unet: neighbourhood is [0, 4], expected sides of at least 1");
    let both = UnetOptions { neighbourhood: Some([4, 4]), windowed_level: Some(0), ..UnetOptions::default() };
    assert_eq!(forward(&x, 0, &both), "unet: windowed_level is given, expected none beside a neighbourhood");
    for shape in [[0, 8, 8, 4], [1, 8, 8, 3], [1, 0, 8, 4]] {
        let error = forward(&tensor(&shape, DType::F32), 0, &options);
        assert!(error.starts_with(&format!("unet: x has shape {shape:?}")), "{error}");
    }
    let three = StepIndex::new(case.unet.device(), &[0; 3]).expect("steps");
    let error = case.unet.forward(&tensor(&[2, 8, 8, 4], DType::F32), &three, &conditioning, &options);
    let error = error.map(drop).expect_err("wrong").to_string();
    assert!(error.contains("a multiple of the 3 images with a step of their own"), "{error}");
    assert!(forward(&tensor(&[1, 8, 8, 4], DType::F16), 0, &options).starts_with("unet: x is f16, expected f32"));
    let elsewhere = Tensor::zeros(&Device::meta(), &[1, 8, 8, 4], DType::F32).expect("a tensor");
    assert!(forward(&elsewhere, 0, &options).starts_with("unet: x is on meta"));
    let context = tensor(&[1, 77, 17], DType::F32);
    let error = case.unet.condition(&context, &[1.0]).map(drop).expect_err("wrong").to_string();
    assert!(error.starts_with("unet: text has shape [1, 77, 17], expected [1, 77, 16]"), "{error}");

    let vae = load_vae(&drawn::folder("sd21/vae"), case.unet.device(), DType::F32);
    for shape in [[1, 9, 8, 3], [1, 8, 10, 3], [1, 0, 4, 3], [1, 8, 8, 4]] {
        let error = vae.encode(&tensor(&shape, DType::F32)).expect_err("wrong");
        assert!(matches!(error, Error::Shape { op: "vae_encode", arg: "image", .. }), "{error}");
    }
    for shape in [[1, 4, 4, 3], [1, 4, 0, 4]] {
        let error = vae.decode(&tensor(&shape, DType::F32)).expect_err("wrong");
        assert!(matches!(error, Error::Shape { op: "vae_decode", arg: "latent", .. }), "{error}");
    }
}

/// A guided step of SD 1.5 at 512x512 on the meta device: published multiply-accumulates, one op a layer, and no op that
/// only moves data.
#[test]
fn a_step_of_sd15_costs_what_it_must() {
    let device = Device::meta();
    let config = UnetConfig::from_json("config.json", &text(&data("manifest/sd15-unet.json"))).expect("a good config");
    let unet = Unet::load(WeightStore::meta(&device, DType::BF16), &config).expect("loads");
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).expect("a tensor");
    let conditioning = unet.condition(&zeros(&[2, 77, 768]), &[0.0; 50]).expect("conditions");
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let weights_bytes = meta.live_bytes();
    let out =
        unet.forward(&zeros(&[2, 64, 64, 4]), &at(&device, 0), &conditioning, &UnetOptions::default()).expect("runs");
    assert_eq!(out.shape(), [2, 64, 64, 4]);
    let report = meta.take_report();

    let count = |op: &str| report.ops.iter().filter(|record| record.op == op).count();
    let (resnets, transformers) = (22, 16);
    // Two convs a ResNet, 14 shortcuts, 3 down, 3 up, in and out.
    assert_eq!(count("conv2d"), 2 * resnets + 14 + 3 + 3 + 2);
    // proj_in, QKV, out, Q, out, two of the feed-forward, proj_out; K and V of the text are not here.
    assert_eq!(count("linear"), 8 * transformers);
    assert_eq!((count("attention"), count("layer_norm"), count("group_norm")), (2 * 16, 3 * 16, 16));
    assert_eq!(report.ops.len(), 66 + 8 * 16 + 2 * 16 + 3 * 16 + 16, "nothing else: no copy, no resize");

    // torch's flop counter on the published class with the same input; its convs are ours and the 1x1 projections, and
    // K and V of the text and all that depends on the timestep alone are done once a run.
    let (convs, linears, attention) = (443_946_106_880, 179_152_486_400 + 54_122_577_920, 126_052_270_080);
    let (text, time) = (2_952_069_120, 55_705_600);
    let got = [OpKind::Conv, OpKind::Linear, OpKind::Attention].map(|kind| report.of(kind).macs);
    assert_eq!(got[0] + got[1], convs + linears - text - time);
    assert_eq!(got[2], attention);

    // The skip connections are 28 MiB in bf16, the finest level's feed-forward the largest tensors beside them.
    let transient = report.peak_bytes - weights_bytes;
    assert!(transient < 200 << 20, "{transient} bytes beside weights and conditioning");
}
