//! How long a run would take on a card that is not there: a prediction, and said to be one.
//!
//! A call of an op takes `start + floor / efficiency`, where its floor is the larger of its flops over the card's peak and
//! its bytes over the card's bandwidth; both numbers are an op's own, fitted to measured calls. Calls run one after the other.

use std::path::Path;

use megafuse::pipeline::{OpCost, PhaseReport, PlanReport};
use megafuse::runtime::Work;
use megafuse::{DType, Error, Result};
use serde_json::{Value, json};

use super::bench::Results;

/// How an op's time follows from its floor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpModel {
    pub start_us: f64,
    pub efficiency: f64,
}

impl OpModel {
    /// Least squares of the relative errors, over `(floor, time)` in microseconds; of fewer than three calls the start is half
    /// of the shortest time, as nothing tells it apart. `None` without calls.
    pub fn fit(calls: &[(f64, f64)]) -> Option<OpModel> {
        let shortest = calls.iter().map(|&(_, time)| time).fold(f64::INFINITY, f64::min);
        if !shortest.is_finite() || shortest <= 0.0 {
            return None;
        }
        // For a start, the best slope has a closed form.
        let with_start = |start: f64| {
            let (mut dot, mut square) = (0.0, 0.0);
            for &(floor, time) in calls {
                dot += (time - start) * floor / (time * time);
                square += floor * floor / (time * time);
            }
            let slope = if square > 0.0 { (dot / square).max(1e-9) } else { 1e-9 };
            let error: f64 = calls.iter().map(|&(floor, time)| ((start + slope * floor) / time - 1.0).powi(2)).sum();
            (error, OpModel { start_us: start, efficiency: 1.0 / slope })
        };
        if calls.len() < 3 {
            return Some(with_start(shortest / 2.0).1);
        }
        const STARTS: usize = 400;
        let starts = (0..=STARTS).map(|i| with_start(shortest * i as f64 / STARTS as f64));
        starts.min_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, model)| model)
    }

    fn seconds(self, floor: f64) -> f64 {
        self.start_us * 1e-6 + floor / self.efficiency
    }
}

/// A card, as far as a prediction goes.
#[derive(Clone, Debug)]
pub struct Card {
    pub name: String,
    /// What the prediction rests on.
    pub basis: String,
    /// Flops a second in f16 and bf16, and in f32; bytes a second.
    flops: f64,
    f32_flops: f64,
    bytes: f64,
    ops: Vec<(String, OpModel)>,
    /// Of ops that are not among them.
    other: OpModel,
    /// What the VAE computes in, where that is not what the rest does.
    vae_dtype: Option<DType>,
    /// What the table was measured in, where that is one dtype.
    dtype: Option<DType>,
}

/// The kernels of commit f9dc150 on one H200, in bf16, fitted to docs/gpu/h200-f9dc150-bench.jsonl (cold calls, mma.sync).
const PORTABLE: [(&str, OpModel); 5] = [
    ("conv2d", OpModel { start_us: 23.5, efficiency: 0.385 }),
    ("linear", OpModel { start_us: 11.3, efficiency: 0.3695 }),
    ("attention", OpModel { start_us: 7.6, efficiency: 0.312 }),
    ("group_norm", OpModel { start_us: 14.4, efficiency: 0.406 }),
    ("layer_norm", OpModel { start_us: 5.8, efficiency: 0.71 }),
];
/// Of every other op there: small kernels of a few microseconds.
const OTHER: OpModel = OpModel { start_us: 4.0, efficiency: 0.45 };
/// Measured there: 647 TFLOP/s of mma.sync, 4.11 TB/s of a copy.
const PORTABLE_PEAK: f64 = 647e12;
const H200_BYTES: f64 = 4.11e12;

/// Kernels by wgmma and TMA, in bf16; they themselves have not been measured. Linear and attention follow what prototypes of
/// them took on one H200, set by hand; convolutions and norms are rougher estimates from a few prototypes' times.
const HOPPER: [(&str, OpModel); 5] = [
    ("conv2d", OpModel { start_us: 8.0, efficiency: 0.75 }),
    ("linear", OpModel { start_us: 3.0, efficiency: 0.93 }),
    ("attention", OpModel { start_us: 4.0, efficiency: 0.62 }),
    ("group_norm", OpModel { start_us: 6.0, efficiency: 0.6 }),
    ("layer_norm", OpModel { start_us: 3.0, efficiency: 0.71 }),
];
/// What cuBLASLt makes of a large product there.
const HOPPER_PEAK: f64 = 790e12;

/// Of NVIDIA's data sheets: flops per second of dense products of 16 bits with sums in f32, flops per second of fused
/// multiply-adds in f32, bytes per second of memory. docs/performance.md says what is made of them.
const A100_80GB_SXM: [f64; 3] = [312e12, 19.5e12, 2.039e12];
const RTX_4090: [f64; 3] = [165.2e12, 82.6e12, 1.008e12];
const H100_SXM_BYTES: f64 = 3.35e12;
/// What cards are taken to reach of these: of memory what a copy reached of the H200's 4.8 TB/s; of the rest a guess.
const OF_MEMORY: f64 = 0.86;
const OF_FLOPS: f64 = 0.9;

/// Names of `--card`.
pub const CARDS: [&str; 5] = ["h200", "h200-portable", "h100", "a100", "4090"];

impl Card {
    /// A name of [`CARDS`], or a file that `bench kernels --json` wrote.
    ///
    /// # Errors
    /// [`Error::Request`]: neither; as [`Results::read`].
    pub fn named(text: &str) -> Result<Card> {
        let hopper = "predicted from prototypes of its Hopper kernels measured on one H200, for convolutions and norms a \
                      rough estimate; the kernels themselves are not measured";
        let portable = "the portable kernels of commit f9dc150, measured on one H200";
        let table = |table: &[(&str, OpModel)]| table.iter().map(|&(op, model)| (op.to_string(), model)).collect();
        let card = |name: &str, basis: String, [flops, f32_flops, bytes]: [f64; 3], ops: &[(&str, OpModel)]| Card {
            name: name.into(),
            basis,
            flops,
            f32_flops,
            bytes,
            ops: table(ops),
            other: OTHER,
            vae_dtype: None,
            dtype: None,
        };
        let reached = |[flops, f32_flops, bytes]: [f64; 3]| [OF_FLOPS * flops, OF_FLOPS * f32_flops, OF_MEMORY * bytes];
        let scaled = |basis: &str| format!("{basis}; scaled by peak and bandwidth of the data sheet");
        Ok(match text {
            "h200" => card("NVIDIA H200", hopper.into(), [HOPPER_PEAK, 60e12, H200_BYTES], &HOPPER),
            "h200-portable" => {
                card("NVIDIA H200, portable kernels", portable.into(), [PORTABLE_PEAK, 60e12, H200_BYTES], &PORTABLE)
            }
            "h100" => {
                card("NVIDIA H100 SXM", scaled(hopper), [HOPPER_PEAK, 60e12, OF_MEMORY * H100_SXM_BYTES], &HOPPER)
            }
            "a100" => card("NVIDIA A100 80GB SXM", scaled(portable), reached(A100_80GB_SXM), &PORTABLE),
            "4090" => card("NVIDIA GeForce RTX 4090", scaled(portable), reached(RTX_4090), &PORTABLE),
            file if Path::new(file).is_file() => Card::measured(Path::new(file))?,
            _ => {
                let reason = format!("expected {}, or a file of bench kernels --json", CARDS.join(", "));
                return Err(Error::Request { field: "--card", value: text.into(), reason });
            }
        })
    }

    fn measured(path: &Path) -> Result<Card> {
        let results = Results::read(path)?;
        let number = |name: &str| {
            let value = results.run[name].as_f64().filter(|value| *value > 0.0);
            value.ok_or_else(|| Error::file(path, format!("the line of the run has no {name}")))
        };
        let (flops, bytes) = (number("peak_tflops")? * 1e12, number("peak_gbytes_per_s")? * 1e9);
        let mut calls: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
        // An op's own choice, not every variant.
        for case in results.cases.iter().filter(|case| !case.is_variant()) {
            let call = (case.floor_us(), case.samples.median() * 1e6);
            match calls.iter_mut().find(|(op, _)| *op == case.op) {
                Some((_, calls)) => calls.push(call),
                None => calls.push((case.op.clone(), vec![call])),
            }
        }
        let all: Vec<(f64, f64)> = calls.iter().flat_map(|(_, calls)| calls.iter().copied()).collect();
        let Some(other) = OpModel::fit(&all) else { return Err(Error::file(path, "it holds no times")) };
        let ops = calls.iter().filter_map(|(op, calls)| Some((op.clone(), OpModel::fit(calls)?))).collect();
        let dtype = results.run["dtype"].as_str().and_then(|name| name.parse().ok());
        let basis = format!("fitted to {}; ops that it lacks as all of it together", path.display());
        let vae_dtype = None;
        Ok(Card { name: results.device().into(), basis, flops, f32_flops: flops, bytes, ops, other, vae_dtype, dtype })
    }

    /// For a run whose VAE has a dtype of its own.
    pub fn with_vae_dtype(self, vae_dtype: Option<DType>) -> Card {
        Card { vae_dtype, ..self }
    }

    /// A sentence where the table was measured in another dtype.
    pub fn warning(&self, dtype: DType) -> Option<String> {
        let measured = self.dtype.filter(|&measured| (measured == DType::F32) != (dtype == DType::F32))?;
        Some(format!(
            "--card was measured in {measured}, the plan is for {dtype}: the prediction is no more than a guess"
        ))
    }

    fn seconds_of(&self, cost: &OpCost, dtype: DType) -> f64 {
        let Work { flops, bytes, launches, .. } = cost.work;
        if launches == 0 {
            return 0.0;
        }
        let peak = if dtype == DType::F32 { self.f32_flops } else { self.flops };
        let floor = (flops as f64 / peak).max(bytes as f64 / self.bytes);
        let model = self.ops.iter().find(|(op, _)| op == cost.op).map_or(self.other, |(_, model)| *model);
        cost.calls as f64 * model.seconds(floor)
    }

    /// One run of a phase.
    pub fn seconds(&self, phase: &PhaseReport, dtype: DType) -> f64 {
        let by_vae = ["decode", "relay decode", "relay encode"].contains(&phase.name);
        let dtype = self.vae_dtype.filter(|_| by_vae).unwrap_or(dtype);
        phase.ops.iter().map(|cost| self.seconds_of(cost, dtype)).sum()
    }

    /// All phases, as often as they run.
    pub fn total_seconds(&self, report: &PlanReport) -> f64 {
        report.phases.iter().map(|phase| phase.repeats as f64 * self.seconds(phase, report.dtype)).sum()
    }

    pub fn to_json(&self, report: &PlanReport) -> Value {
        let phases: Vec<Value> = report
            .phases
            .iter()
            .map(|phase| {
                let once = self.seconds(phase, report.dtype);
                json!({
                    "name": phase.name, "stage": phase.stage, "repeats": phase.repeats, "once_seconds": once,
                    "seconds": once * phase.repeats as f64,
                })
            })
            .collect();
        let seconds = self.total_seconds(report);
        json!({ "predicted": true, "card": self.name, "basis": self.basis, "phases": phases, "seconds": seconds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_again() {
        let calls: Vec<(f64, f64)> = [1.0, 10.0, 100.0, 700.0].map(|floor| (floor, 7.0 + floor / 0.4)).to_vec();
        let model = OpModel::fit(&calls).unwrap();
        assert!((model.start_us - 7.0).abs() < 0.05 && (model.efficiency - 0.4).abs() < 0.002, "{model:?}");
        assert_eq!(OpModel::fit(&[]), None);
        let one = OpModel::fit(&[(2.0, 8.0)]).unwrap();
        assert!((one.start_us - 4.0).abs() < 1e-9 && (one.efficiency - 0.5).abs() < 1e-9, "{one:?}");
    }

    /// The table of the portable kernels is what the committed measurements say.
    #[test]
    fn the_table_is_fitted_to_the_measurements() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/gpu/h200-f9dc150-bench.jsonl");
        let text = std::fs::read_to_string(path).expect("the committed measurements");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        for (op, model) in PORTABLE {
            let calls: Vec<(f64, f64)> = lines
                .iter()
                .filter(|line| line["op"] == op)
                .map(|line| (line["floor_us"].as_f64().unwrap(), line["median_us"].as_f64().unwrap()))
                .collect();
            let fitted = OpModel::fit(&calls).expect("calls");
            assert!(calls.len() >= 3, "{op}");
            assert!((fitted.start_us - model.start_us).abs() < 0.2, "{op}: {fitted:?}");
            assert!((fitted.efficiency / model.efficiency - 1.0).abs() < 0.02, "{op}: {fitted:?}");
        }
    }

    /// A VAE in f32 multiplies at f32's peak, and nothing else does.
    #[test]
    fn a_vae_of_another_dtype_has_the_peak_of_it() {
        let work = Work { macs: 5_000_000_000_000, flops: 10_000_000_000_000, bytes: 1, launches: 1 };
        let phase = |name: &'static str| PhaseReport {
            name,
            stage: None,
            size: None,
            repeats: 1,
            by_kind: vec![],
            once: work,
            ops: vec![OpCost { op: "conv2d", calls: 1, work }],
            peak_bytes: 0,
            weight_bytes: 0,
        };
        let card = Card::named("h200-portable").unwrap();
        let f32_vae = card.clone().with_vae_dtype(Some(DType::F32));
        let seconds = |card: &Card, name| card.seconds(&phase(name), DType::F16);
        assert_eq!(seconds(&card, "denoise"), seconds(&f32_vae, "denoise"));
        for name in ["decode", "relay decode", "relay encode"] {
            let ratio = seconds(&f32_vae, name) / seconds(&card, name);
            assert!((ratio - 647.0 / 60.0).abs() < 0.1, "{name}: {ratio}");
        }
        assert_eq!(seconds(&f32_vae, "decode"), card.seconds(&phase("decode"), DType::F32));
    }

    #[test]
    fn every_name_is_a_card() {
        for name in CARDS {
            assert!(Card::named(name).unwrap().basis.contains("measured"), "{name}");
        }
        let error = Card::named("voodoo2").unwrap_err().to_string();
        assert!(error.contains("h200-portable") && error.contains("voodoo2"), "{error}");
    }
}
