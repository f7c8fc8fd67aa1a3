//! `megafuse check`: every kernel on this machine's card against the cpu.

use std::collections::BTreeSet;

use megafuse::runtime::{CudaDevice, cuda};
use megafuse::{DType, Device, Error, Result};
use serde_json::json;

use super::args::CheckArgs;
use super::cases::{self, Allowed, Case, Inputs};
use super::output::print_line;
use super::values::DeviceChoice;

/// f32 ulps that the arithmetic of a card and of the cpu may err by together, relative to the terms. A sum of k rounded
/// terms errs by about sqrt(k) ulps of a sum that is about sqrt(k) times smaller than the terms together; tensor cores cut
/// off where others round.
const ARITHMETIC_ULPS: f64 = 16.0;

pub fn run(args: &CheckArgs) -> Result<()> {
    let device = open(args.device)?;
    let Device::Cuda(card) = &device else {
        let reason = "check compares a card with the cpu: choose cuda, cuda:N or emu";
        return Err(Error::Request { field: "--device", value: args.device.to_string(), reason: reason.into() });
    };
    let selected: Vec<Case> =
        cases::all().into_iter().filter(|case| format!("{} {}", case.op, case.name).contains(&args.filter)).collect();
    if selected.is_empty() {
        return Err(no_case(&args.filter));
    }
    if !args.json {
        print_line(format!("{}, compared with the cpu", describe(card)));
        print_line(format!("{:17} {:38} {:5} {:>9} {:>9}", "op", "case", "dtype", "error", "allowed"));
    }
    let (mut checked, mut wrong) = (0, BTreeSet::new());
    for case in &selected {
        for &dtype in args.dtypes.list().iter().filter(|&&dtype| dtype == DType::F32 || !case.only_f32) {
            let worst = check(case, &device, dtype);
            report(args, card, case, dtype, &worst);
            checked += 1;
            if !worst.is_ok_and(|worst| worst.ok()) {
                wrong.insert(case.op);
            }
        }
    }
    if checked == 0 {
        return Err(no_case(&args.filter));
    }
    if wrong.is_empty() {
        if !args.json {
            print_line(format!("{checked} checked, all ok"));
        }
        return Ok(());
    }
    let ops = wrong.into_iter().collect::<Vec<_>>().join(", ");
    let reason = format!(
        "wrong or no results of {ops}: do not trust pictures made on it. Please report this output together with \
         the card and the driver ({}, megafuse {}); --device cpu gives right pictures meanwhile",
        describe(card),
        env!("CARGO_PKG_VERSION")
    );
    Err(Error::DeviceUnavailable { device: card.to_string(), reason })
}

/// `auto` is the card, or an error that says why there is none: a check of anything else would reassure for nothing.
fn open(choice: DeviceChoice) -> Result<Device> {
    let card = if choice == DeviceChoice::Auto { DeviceChoice::Cuda { index: 0 } } else { choice };
    card.open().map_err(|error| match (choice, error) {
        (DeviceChoice::Auto, Error::DeviceUnavailable { device, reason }) => {
            let reason = format!("{reason}\n(megafuse check --device emu checks the kernels on the emulated card)");
            Error::DeviceUnavailable { device, reason }
        }
        (_, error) => error,
    })
}

pub fn no_case(filter: &str) -> Error {
    let reason = "no case has this in its name".into();
    Error::Request { field: "--filter", value: format!("{filter:?}"), reason }
}

/// Card, compute capability and driver.
pub fn describe(card: &CudaDevice) -> String {
    let (major, minor) = card.compute_capability();
    format!("{} ({card}, compute capability {major}.{minor}, {})", card.card(), driver())
}

/// `driver 580.65.06, CUDA 13.0`.
pub fn driver() -> String {
    let cuda = cuda::driver_version()
        .map_or("no driver".into(), |version| format!("CUDA {}.{}", version / 1000, version % 1000 / 10));
    if cuda::is_emulated() {
        return cuda;
    }
    // NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ...
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    match text.split_whitespace().find(is_version) {
        Some(version) => format!("driver {version}, {cuda}"),
        None => cuda,
    }
}

/// The element of a case that is furthest off, measured by what is allowed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Worst {
    error: f64,
    allowed: f64,
}

impl Worst {
    const NONE: Worst = Worst { error: 0.0, allowed: 1.0 };

    /// NaN is wrong.
    fn ok(self) -> bool {
        self.error <= self.allowed
    }

    fn or_worse(self, other: Worst) -> Worst {
        let ratio = |worst: Worst| {
            let ratio = worst.error / worst.allowed;
            if ratio.is_nan() { f64::INFINITY } else { ratio }
        };
        if ratio(other) >= ratio(self) { other } else { self }
    }
}

fn check(case: &Case, device: &Device, dtype: DType) -> Result<Worst> {
    let cpu = Device::cpu();
    let got = (case.run)(&mut Inputs::new(device, dtype))?;
    let want = (case.run)(&mut Inputs::new(&cpu, dtype).in_f32())?;
    let mut worst = Worst::NONE;
    for (got, want) in got.iter().zip(&want) {
        want.expect(case.op, "result", got.shape(), DType::F32, &cpu)?;
        let result = compare(&got.to_f32_vec()?, &want.to_f32_vec()?, got.dtype(), dtype, case.allowed);
        worst = worst.or_worse(result);
    }
    Ok(worst)
}

/// Element by element: half an ulp of the stored dtype, the arithmetic, and what was rounded to `dtype` on the way.
fn compare(got: &[f32], want: &[f32], stored: DType, dtype: DType, allowed: Allowed) -> Worst {
    // Below the normal numbers f16 rounds to multiples of 2^-24.
    let floor = if stored == DType::F16 { 2f64.powi(-25) } else { 1e-37 };
    let rounding = if dtype == DType::F32 { 0.0 } else { dtype.ulp() / 2.0 * allowed.intermediate };
    let elements = got.iter().zip(want).map(|(&got, &want)| {
        let (got, want) = (f64::from(got), f64::from(want));
        let computed = ARITHMETIC_ULPS * f64::from(f32::EPSILON) * (allowed.terms + want.abs());
        let before = computed + rounding + allowed.absolute;
        let allowed = stored.ulp() / 2.0 * (want.abs() + before) + before + floor;
        Worst { error: (got - want).abs(), allowed }
    });
    elements.fold(Worst::NONE, Worst::or_worse)
}

fn report(args: &CheckArgs, card: &CudaDevice, case: &Case, dtype: DType, result: &Result<Worst>) {
    let verdict = match result {
        Ok(worst) if worst.ok() => "ok".to_string(),
        Ok(_) => "WRONG".to_string(),
        Err(error) => format!("FAILED: {error}"),
    };
    let worst = result.as_ref().ok();
    if args.json {
        let line = json!({
            "op": case.op, "case": case.name, "dtype": dtype.name(), "error": worst.map(|worst| worst.error),
            "allowed": worst.map(|worst| worst.allowed), "verdict": verdict, "card": card.card(), "driver": driver(),
            "emulated": cuda::is_emulated(),
        });
        return print_line(line);
    }
    let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2e}"));
    let (error, allowed) = (number(worst.map(|worst| worst.error)), number(worst.map(|worst| worst.allowed)));
    print_line(format!("{:17} {:38} {:5} {error:>9} {allowed:>9}  {verdict}", case.op, case.name, dtype.name()));
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: Allowed = Allowed { terms: 2.0, intermediate: 0.0, absolute: 0.0 };

    fn is_ok(got: f32, want: f32, dtype: DType) -> bool {
        compare(&[0.5, got, 0.5], &[0.5, want, 0.5], dtype, dtype, ALLOWED).ok()
    }

    #[test]
    fn an_error_is_found_just_beyond_what_is_allowed() {
        // For 1.0 in f32: 16 ulps of 3, and half an ulp of 1.
        let eps = f32::EPSILON;
        assert!(is_ok(1.0 + 48.0 * eps, 1.0, DType::F32) && is_ok(1.0 - 48.0 * eps, 1.0, DType::F32));
        assert!(!is_ok(1.0 + 50.0 * eps, 1.0, DType::F32) && !is_ok(1.0 - 50.0 * eps, 1.0, DType::F32));
        // In bf16 half of 2^-7, in f16 half of 2^-10.
        for (dtype, half_ulp) in [(DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)] {
            assert!(is_ok(1.0 + half_ulp, 1.0, dtype) && !is_ok(1.0 + 1.1 * half_ulp, 1.0, dtype), "{dtype}");
        }
    }

    #[test]
    fn what_is_no_number_is_wrong() {
        for got in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for dtype in DType::FLOATS {
                assert!(!is_ok(got, 1.0, dtype), "{got} {dtype}");
                assert!(!is_ok(got, got, dtype), "{got} {dtype}");
            }
        }
        // And stays the worst, whatever else is wrong.
        let worst = compare(&[f32::NAN, 9.0], &[0.0, 0.0], DType::F32, DType::F32, ALLOWED);
        assert!(worst.error.is_nan() && !worst.ok());
    }

    #[test]
    fn roundings_on_the_way_count_in_their_dtype() {
        let allowed = Allowed { intermediate: 4.0, ..ALLOWED };
        let ok = |dtype| compare(&[1.0 + 5.0 / 256.0], &[1.0], dtype, dtype, allowed).ok();
        assert!(ok(DType::BF16) && !ok(DType::F16) && !ok(DType::F32));
        let allowed = Allowed { absolute: 0.5, ..ALLOWED };
        assert!(compare(&[1.5], &[1.0], DType::F32, DType::F32, allowed).ok());
    }

    #[test]
    fn every_op_has_cases() {
        let ops: BTreeSet<&str> = cases::all().iter().map(|case| case.op).collect();
        let timed: BTreeSet<&str> = megafuse::ops::cases::small().iter().map(|case| case.op).collect();
        let without_kernel = BTreeSet::from(["timestep_embedding"]);
        assert_eq!(timed.difference(&ops).copied().collect::<BTreeSet<_>>(), without_kernel);
        assert!(ops.is_subset(&timed), "{ops:?} {timed:?}");
    }
}
