//! The transformer of Stable Diffusion 3 as a library, against the published class: tests/data/mmdit, tools/oracle/mmdit.py.

#[path = "common/arrays.rs"]
mod arrays;
#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::path::PathBuf;

use arrays::{Arrays, arrays, channels_last, errors};
use megafuse::models::{Mmdit, MmditConditioning, MmditConfig, WeightFormat, WeightStore};
use megafuse::ops::StepIndex;
use megafuse::runtime::{OpKind, Repeated};
use megafuse::{DType, Device, Tensor};

const MODELS: [&str; 4] = ["plain", "dual", "odd", "single"];
/// Sums of at most a few hundred products in each of some twenty layers: torch's own f32 errs by 1.2e-6. At t = 981 the frequencies
/// of the timestep's sinusoid, which torch's exp rounds otherwise (tools/oracle/mmdit.py), are most of what is left.
const F32_TOLERANCE: f64 = 1e-5;

struct Case {
    mmdit: Mmdit,
    expected: Arrays,
    sample: Tensor,
    text: Tensor,
    pooled: Tensor,
    /// Of each sample.
    timesteps: Vec<f32>,
}

impl Case {
    fn load(name: &str, device: &Device, dtype: DType) -> Case {
        Case::load_as(name, device, dtype, WeightFormat::Plain)
    }

    fn load_as(name: &str, device: &Device, dtype: DType, format: WeightFormat) -> Case {
        let folder: PathBuf = common::drawn::folder(&format!("mmdit/{name}"));
        let config = fs::read_to_string(folder.join("config.json")).expect("config.json");
        let config = MmditConfig::from_json("config.json", &config).expect("a good config");
        let store = WeightStore::open(&folder, "diffusion_pytorch_model", device, dtype).expect("weights");
        let expected = arrays(&folder.join("expected.safetensors"));
        let tensor = |name: &str| {
            let (shape, values) = &expected[name];
            Tensor::from_f32(device, shape, dtype, values).expect("a tensor")
        };
        Case {
            mmdit: Mmdit::load(store.with_format(format), &config).expect("loads"),
            sample: channels_last(device, dtype, &expected["sample"]),
            text: tensor("prompt_embeds"),
            pooled: tensor("pooled_prompt_embeds"),
            timesteps: expected["timestep"].1.clone(),
            expected,
        }
    }

    fn device(&self) -> &Device {
        self.mmdit.device()
    }

    /// Of all samples' timesteps, between others.
    fn condition(&self) -> MmditConditioning {
        let timesteps = [&[17.0], &self.timesteps[..], &[500.0]].concat();
        self.mmdit.condition(&self.text, &self.pooled, &timesteps).expect("conditions")
    }

    /// Every sample at its own.
    fn step(&self) -> StepIndex {
        let steps: Vec<usize> = (1..=self.timesteps.len()).collect();
        StepIndex::new(self.device(), &steps).expect("steps")
    }

    fn run(&self) -> Tensor {
        self.mmdit.forward(&self.sample, &self.step(), &self.condition()).expect("runs")
    }

    fn array(&self, name: &str) -> Tensor {
        channels_last(&Device::cpu(), DType::F32, &self.expected[name])
    }
}

#[test]
fn the_published_class_agrees() {
    for device in common::devices() {
        for name in MODELS {
            let case = Case::load(name, &device, DType::F32);
            let (worst, _) = errors(&case.run(), &case.array("out"));
            println!("{device} {name}: {worst:.1e}");
            assert!(worst < F32_TOLERANCE, "{device} {name}: off by {worst:.1e}");
        }
    }
}

/// Weights and activations are rounded to 16 bits: some forty roundings, each of half an ulp at most, add up like noise.
#[test]
fn sixteen_bits_are_close() {
    for device in common::devices() {
        for (name, dtype) in [("plain", DType::BF16), ("plain", DType::F16), ("dual", DType::F16), ("odd", DType::BF16)]
        {
            let case = Case::load(name, &device, dtype);
            let (_, rms) = errors(&case.run(), &case.array("out"));
            println!("{device} {name} {dtype}: {rms:.1e}, an ulp is {:.1e}", dtype.ulp());
            assert!(rms < 8.0 * dtype.ulp(), "{device} {name} {dtype}: off by {rms:.1e}");
        }
    }
}

/// With the same layers in 8 bits, and no others. Sums that differ in their last bits may be rounded to neighbouring codes, an eighth
/// apart.
#[test]
fn weights_in_8_bits_agree_with_the_published_class_rounded_so() {
    for device in common::devices() {
        let case = Case::load_as("dual", &device, DType::F32, WeightFormat::Fp8);
        let got = case.run();
        let ((_, from_rounded), (_, from_exact)) =
            (errors(&got, &case.array("out_fp8")), errors(&got, &case.array("out")));
        println!("{device}: {from_rounded:.1e} from what is rounded so, {from_exact:.1e} from what is not");
        assert!(from_rounded < 0.01 && from_exact > 0.02, "{device}: {from_rounded:.1e}, {from_exact:.1e}");
    }
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.to_f32_vec().expect("values").into_iter().map(f32::to_bits).collect()
}

/// A text row serves as many samples as the batch has for it, and a sample's bits do not depend on the others.
#[test]
fn a_sample_depends_on_itself_alone() {
    for device in common::devices() {
        let case = Case::load("dual", &device, DType::F32);
        // Each of the two samples twice, in the order of the text's rows.
        let twice = |row: usize| {
            let row = case.sample.rows(row..row + 1).expect("a row");
            [row.clone(), row]
        };
        let four = Tensor::concat(&[twice(0), twice(1)].concat()).expect("four samples");
        let both = case.run();
        let step = StepIndex::new(&device, &[1, 1, 2, 2]).expect("steps");
        let got = case.mmdit.forward(&four, &step, &case.condition()).expect("runs");
        for (i, row) in [0, 0, 1, 1].into_iter().enumerate() {
            let of = |x: &Tensor, row: usize| bits(&x.rows(row..row + 1).expect("a row"));
            assert!(of(&got, i) == of(&both, row), "{device}: sample {i} of four is another than {row} of two");
        }
        for row in 0..2 {
            let part = |x: &Tensor| x.rows(row..row + 1).expect("a row");
            let timesteps = &case.timesteps[row..row + 1];
            let conditioning = case.mmdit.condition(&part(&case.text), &part(&case.pooled), timesteps);
            let step = StepIndex::one(&device, 0).expect("a step");
            let alone = case.mmdit.forward(&part(&case.sample), &step, &conditioning.expect("conditions"));
            assert!(bits(&alone.expect("runs")) == bits(&part(&both)), "{device}: row {row} alone");
        }
    }
}

/// A step that was recorded reads the conditioning and the step where they lie.
#[test]
fn a_recorded_step_has_the_bits_of_each_launched_one() {
    for device in common::cards() {
        let case = Case::load("dual", &device, DType::BF16);
        let mut step = StepIndex::one(&device, 0).expect("a step");
        let mut conditioning = case.condition().duplicate().expect("a copy");
        let mut y = case.run().duplicate().expect("a place for the result");
        let mut repeated = Repeated::new(&device);
        let launched = |step: usize, conditioning: &MmditConditioning| {
            let step = StepIndex::one(&device, step).expect("a step");
            bits(&case.mmdit.forward(&case.sample, &step, conditioning).expect("runs"))
        };
        let other = case.mmdit.condition(&case.text, &case.pooled, &[1.0, 2.0, 3.0, 4.0]).expect("conditions");
        for (round, at) in [0usize, 1, 2, 3, 1].into_iter().enumerate() {
            step.set(&[at]).expect("a step");
            if round == 4 {
                conditioning.copy_from(&other).expect("the same shapes");
            }
            let replayed =
                repeated.run(|| y.copy_from(&case.mmdit.forward(&case.sample, &step, &conditioning)?)).expect("runs");
            assert_eq!(replayed, round >= 2, "{device} round {round}");
            assert!(bits(&y) == launched(at, &conditioning), "{device} {dtype}: round {round}", dtype = DType::BF16);
        }
    }
}

/// One norm, product, attention of each kind: what depends on no step was done before.
#[test]
fn a_step_has_attention_norms_and_products_alone() {
    let device = Device::meta();
    let config = MmditConfig::from_json("config.json", &published("", 192)).expect("a good config");
    let mmdit = Mmdit::load(WeightStore::meta(&device, DType::BF16), &config).expect("loads");
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).expect("a tensor");
    let conditioning = mmdit.condition(&zeros(&[2, 333, 4096]), &zeros(&[2, 2048]), &[1000.0; 28]).expect("conditions");
    let (x, step) = (zeros(&[2, 128, 128, 16]), StepIndex::one(&device, 0).expect("a step"));
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    assert_eq!(mmdit.forward(&x, &step, &conditioning).expect("runs").shape(), [2, 128, 128, 16]);
    let report = meta.take_report();
    let count = |op: &str| report.ops.iter().filter(|record| record.op == op).count();
    // Of 24 blocks, the last of which does nothing to the text but find its keys.
    assert_eq!(["attention", "layer_norm", "linear"].map(count), [2 * 24 - 1, 4 * 24 - 1 + 1, 8 * 24 - 3 + 1]);
    assert_eq!(["conv2d", "unpatchify"].map(count), [1, 1]);
    assert_eq!(report.ops.len(), 47 + 96 + 190 + 2, "nothing else");
    let macs = report.of(OpKind::Linear).macs;
    let (image, text, c) = (2 * 4096, 2 * 333, 1536u64 * 1536);
    assert_eq!(macs, image * (24 * 12 * c + 1536 * 64) + text * (23 * 12 + 2) * c);
}

fn published(more: &str, positions: usize) -> String {
    format!(
        r#"{{"_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24, "sample_size": 128,
        "caption_projection_dim": 1536, "pos_embed_max_size": {positions}{more}}}"#
    )
}

/// Parameters as published, and the table of positions, which counts as none; what tools/oracle/mmdit.py --published prints.
#[test]
fn published_models_have_the_published_size() {
    let dual: Vec<String> = (0..13).map(|layer| layer.to_string()).collect();
    let medium_3_5 = format!(r#", "qk_norm": "rms_norm", "dual_attention_layers": [{}]"#, dual.join(", "));
    for (json, parameters, positions, tensors) in
        [(published("", 192), 2_028_328_000, 192, 683), (published(&medium_3_5, 384), 2_243_171_520, 384, 909)]
    {
        let store = WeightStore::meta(&Device::meta(), DType::BF16);
        let config = MmditConfig::from_json("config.json", &json).expect("a good config");
        Mmdit::from_weights(&store.root(), &config).expect("loads");
        let asked = store.manifest();
        let total: usize = asked.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!((total, asked.len()), (parameters + positions * positions * 1536, tensors));
    }
}

#[test]
fn configurations_that_are_not_supported_name_key_and_value() {
    for (json, expected) in [
        (r#"{"qk_norm": "layer_norm"}"#, r#"qk_norm is "layer_norm": not supported, only null or "rms_norm" is"#),
        (r#"{"pos_embed_max_size": null}"#, "pos_embed_max_size is null: expected a number"),
        (
            r#"{"caption_projection_dim": 1536}"#,
            "caption_projection_dim is 1536: expected 1152, num_attention_heads times",
        ),
        (
            r#"{"dual_attention_layers": [0, 18]}"#,
            "dual_attention_layers is [0,18]: expected a list of numbers of blocks, from 0 to 17",
        ),
        (r#"{"dual_attention_layers": 3}"#, "dual_attention_layers is 3"),
        (r#"{"num_attention_heads": 60000}"#, "num_attention_heads is 60000: with attention_head_dim 64"),
        (r#"{"num_layers": 0}"#, "num_layers is 0: expected a number from 1"),
        (r#"{"_class_name": "FluxTransformer2DModel"}"#, r#"expected "SD3Transformer2DModel""#),
    ] {
        let error = MmditConfig::from_json("transformer/config.json", json).expect_err(json).to_string();
        assert!(error.contains(expected) && error.contains("transformer/config.json"), "{json}: {error}");
    }
    assert!(MmditConfig::from_json("config.json", "{}").is_ok(), "the class's defaults");
}

#[test]
fn wrong_arguments_are_errors() {
    let device = Device::cpu();
    let case = Case::load("plain", &device, DType::F32);
    let (conditioning, zeros) =
        (case.condition(), |shape: &[usize]| Tensor::zeros(&device, shape, DType::F32).unwrap());
    let step = |step: usize| StepIndex::one(&device, step).expect("a step");
    let fails = |x: &Tensor, at: usize, expected: &str| {
        let error = case.mmdit.forward(x, &step(at), &conditioning).map(drop).expect_err("wrong").to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    };
    fails(&case.sample, 4, "mmdit: step is 4, expected below 4, the number of timesteps of the conditioning");
    fails(
        &zeros(&[3, 8, 12, 16]),
        0,
        "mmdit: x has shape [3, 8, 12, 16], expected N as a multiple of the text's 2 rows",
    );
    fails(&zeros(&[2, 8, 13, 16]), 0, "expected a height and width of multiples of 2, the side of a patch");
    fails(&zeros(&[2, 0, 12, 16]), 0, "expected a height and width of multiples of 2");
    fails(&zeros(&[2, 8, 12, 15]), 0, "mmdit: x has shape [2, 8, 12, 15], expected [2, 8, 12, 16]");
    fails(
        &zeros(&[2, 8, 26, 16]),
        0,
        "mmdit: width in patches is 13, expected at most 12, the model's pos_embed_max_size",
    );
    fails(&zeros(&[2, 26, 8, 16]), 0, "mmdit: height in patches is 13");
    let condition = |text: &[usize], pooled: &[usize]| {
        case.mmdit.condition(&zeros(text), &zeros(pooled), &[1.0]).map(drop).expect_err("wrong").to_string()
    };
    assert_eq!(condition(&[2, 9, 47], &[2, 40]), "mmdit: text has shape [2, 9, 47], expected [2, 9, 48]");
    assert_eq!(condition(&[2, 9, 48], &[1, 40]), "mmdit: pooled has shape [1, 40], expected [2, 40]");
    let none = case.mmdit.condition(&case.text, &case.pooled, &[]).expect("no steps");
    assert!(case.mmdit.forward(&case.sample, &step(0), &none).is_err());
}
