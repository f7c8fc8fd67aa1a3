//! Whether what is timed computes the right thing: on fresh inputs, before and after, against the same call in f32.

use megafuse::ops::cases::{Case, Inputs};
use megafuse::runtime::Work;
use megafuse::{DType, Device, Error, Result, ops};

/// How far a result is from the reference's, element by element.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// Root mean square of the differences over that of the reference.
    pub rms: f64,
    /// The largest difference over the root mean square of the reference.
    pub worst: f64,
}

impl Errors {
    /// NaN where either has one.
    pub fn of(got: &[f32], want: &[f32]) -> Errors {
        let square = |x: f64| x * x;
        let mean = |sum: f64| (sum / want.len().max(1) as f64).sqrt();
        let scale = mean(want.iter().map(|&want| square(f64::from(want))).sum());
        let differences = || got.iter().zip(want).map(|(&got, &want)| (f64::from(got) - f64::from(want)).abs());
        let worst = differences().fold(
            0.0,
            |worst: f64, difference| {
                if difference.is_nan() || difference > worst { difference } else { worst }
            },
        );
        let over = |error: f64| if error == 0.0 { 0.0 } else { error / scale };
        Errors { rms: over(mean(differences().map(square).sum())), worst: over(worst) }
    }

    /// The larger of each.
    pub fn or_worse(self, other: Errors) -> Errors {
        let larger = |a: f64, b: f64| if a.is_nan() || a > b { a } else { b };
        Errors { rms: larger(self.rms, other.rms), worst: larger(self.worst, other.worst) }
    }

    /// What a right result may have for `rms`: a few roundings to the dtype, or of a long sum in f32. One wrong element in
    /// a thousand is well beyond.
    pub fn allowed(dtype: DType) -> f64 {
        (2.0 * dtype.ulp()).max(1e-4)
    }

    pub fn right(&self, dtype: DType) -> bool {
        self.rms <= Errors::allowed(dtype)
    }
}

/// Who computes what results are compared with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reference {
    /// In f32.
    Cpu,
    /// In f32, by the kernels that take anything, which tests compare with the cpu: for what would take the cpu long.
    SameCard,
}

impl Reference {
    pub fn name(self) -> &'static str {
        match self {
            Reference::Cpu => "the cpu in f32",
            Reference::SameCard => "the same card in f32, portable kernels",
        }
    }

    /// About a second of a cpu of two cores.
    const MOST_FLOPS: u64 = 40_000_000_000;

    /// `None`: the cpu's own f32 is the reference.
    pub fn of(device: &Device, dtype: DType, work: Work) -> Option<Reference> {
        match device {
            Device::Cuda(_) if work.flops > Reference::MOST_FLOPS && dtype != DType::F32 => Some(Reference::SameCard),
            Device::Cuda(_) => Some(Reference::Cpu),
            _ => (dtype != DType::F32).then_some(Reference::Cpu),
        }
    }

    /// The result that the case should have with the inputs of `seed`, in f32.
    pub fn result(self, case: &Case, device: &Device, dtype: DType, seed: u64) -> Result<Vec<f32>> {
        let cpu = Device::cpu();
        let (device, kernel) = match self {
            Reference::Cpu => (&cpu, String::new()),
            Reference::SameCard => {
                let variants = ops::variants_on(case.op, device, DType::F32);
                let general = variants.iter().find(|variant| variant.name == "general");
                (device, general.map_or(String::new(), |general| format!("{}={}", case.op, general.name)))
            }
        };
        let call = (case.prepare)(&Inputs::in_f32(device, dtype, seed))?;
        ops::with_variants(&kernel, || call()?.to_f32_vec())
    }
}

/// Errors of one kernel with the inputs of `seed`; `want` is the reference's result. `None`: the kernel does not take them.
pub fn errors(
    case: &Case,
    device: &Device,
    dtype: DType,
    kernel: &str,
    seed: u64,
    want: &[f32],
) -> Result<Option<Errors>> {
    let call = (case.prepare)(&Inputs::new(device, dtype, seed))?;
    match ops::with_variants(kernel, || call()?.to_f32_vec()) {
        Err(Error::Argument { arg: "MEGAFUSE_KERNEL", .. }) => Ok(None),
        got => {
            let got = got?;
            if got.len() != want.len() {
                let reason = format!("{} values, the reference has {}", got.len(), want.len());
                return Err(Error::Kernel { kernel: case.name.clone(), reason });
            }
            Ok(Some(Errors::of(&got, want)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_reference() {
        let errors = Errors::of(&[3.0, 4.5], &[3.0, 4.0]);
        assert!((errors.worst - 0.5 / 12.5f64.sqrt()).abs() < 1e-12, "{errors:?}");
        assert!((errors.rms - 0.5 / 5.0).abs() < 1e-12, "{errors:?}");
        assert_eq!(Errors::of(&[0.0; 2], &[0.0; 2]), Errors::default());
        assert_eq!(Errors::of(&[], &[]), Errors::default());
        assert!(!Errors::of(&[1.0, 0.0], &[0.0; 2]).right(DType::BF16));
    }

    #[test]
    fn what_is_no_number_is_wrong() {
        for got in [f32::NAN, f32::INFINITY] {
            let errors = Errors::of(&[1.0, got, 1.0], &[1.0; 3]);
            assert!(!errors.right(DType::BF16), "{errors:?}");
            assert!(!errors.or_worse(Errors::default()).right(DType::BF16));
            assert!(!Errors::default().or_worse(errors).right(DType::BF16));
        }
    }

    #[test]
    fn one_wrong_element_in_a_thousand_is_found() {
        let want: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut got = want.clone();
        got[17] = 0.0;
        assert!(!Errors::of(&got, &want).right(DType::BF16));
        let rounded: Vec<f32> = want.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        assert!(Errors::of(&rounded, &want).right(DType::BF16));
    }
}
