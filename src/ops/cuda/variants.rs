//! `MEGAFUSE_KERNEL=op=variant,op=variant`: which of its kernels an op takes, in place of its own choice. For research,
//! benches and tests: no choice changes a result by more than the order of its sums.
//!
//! ```text
//! MEGAFUSE_KERNEL=linear=128x64,conv2d=64x64,conv2d.splits=3,attention=d64_long
//! ```
//!
//! A name that is none, and a variant that cannot take an op's operands, is an error of the first op that meets it.

use std::cell::Cell;
use std::str::FromStr;
use std::sync::OnceLock;

use super::{attention, attention_sm90, conv_sm90, linear_fp8, linear_sm90, tiles};
use crate::error::{Error, Result};
use crate::runtime::cuda::{CudaDevice, Isa};
use crate::runtime::{DType, Device};

const VARIABLE: &str = "MEGAFUSE_KERNEL";

/// The ops with a choice. `conv2d.splits` is a number: parts of a sum that different blocks make.
const OPS: [&str; 5] = ["linear", "linear_fp8", "conv2d", "conv2d.splits", "attention"];

/// A kernel that an op can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    pub name: &'static str,
    /// What it is there for.
    pub reason: &'static str,
}

/// What `MEGAFUSE_KERNEL` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variants {
    linear: Option<&'static str>,
    linear_fp8: Option<&'static str>,
    conv2d: Option<&'static str>,
    conv2d_splits: Option<usize>,
    attention: Option<&'static str>,
}

/// The variants of an op for operands of any dtype, each once; nothing for an op without a choice.
pub fn all(op: &str) -> Vec<Variant> {
    let mut found: Vec<Variant> = Vec::new();
    let known = match op {
        "linear" => [tiles::variants(&[DType::BF16, DType::F32]), linear_sm90::LINEAR.all()].concat(),
        "linear_fp8" => [vec![linear_fp8::GENERAL], linear_sm90::LINEAR_FP8.all()].concat(),
        "conv2d" => [tiles::variants(&[DType::BF16, DType::F32]), conv_sm90::all()].concat(),
        "attention" => [attention::variants(&[DType::BF16, DType::F32]), attention_sm90::all()].concat(),
        _ => vec![],
    };
    for variant in known {
        if !found.iter().any(|other| other.name == variant.name) {
            found.push(variant);
        }
    }
    found
}

/// Those that `device` has for whole aligned operands of `dtype`; nothing on a device that is no card. Some take only a part
/// of what the op does: heads up to a width, an activation, a kernel size.
pub fn on_device(op: &str, device: &Device, dtype: DType) -> Vec<Variant> {
    match (op, device) {
        ("linear", Device::Cuda(card)) => {
            [tiles::variants(&[dtype]), on_hopper(card, dtype, linear_sm90::LINEAR.all())].concat()
        }
        ("linear_fp8", Device::Cuda(card)) => {
            [vec![linear_fp8::GENERAL], on_hopper(card, dtype, linear_sm90::LINEAR_FP8.all())].concat()
        }
        ("conv2d", Device::Cuda(card)) => {
            [tiles::variants(&[dtype]), on_hopper(card, dtype, conv_sm90::all())].concat()
        }
        ("attention", Device::Cuda(card)) => {
            [attention::variants(&[dtype]), on_hopper(card, dtype, attention_sm90::all())].concat()
        }
        _ => vec![],
    }
}

impl FromStr for Variants {
    type Err = Error;

    fn from_str(text: &str) -> Result<Variants> {
        let refuse = |reason: String| Error::config(format!("{VARIABLE}={text}"), reason);
        let mut variants = Variants::default();
        for choice in text.split(',').map(str::trim).filter(|choice| !choice.is_empty()) {
            let (op, name) = choice
                .split_once('=')
                .ok_or_else(|| refuse(format!("\"{choice}\" is not op=variant, with an op of {}", OPS.join(", "))))?;
            let find = || {
                let known = all(op);
                let found = known.iter().find(|variant| variant.name == name).map(|variant| Some(variant.name));
                found.ok_or_else(|| refuse(format!("{op} has no variant {name:?}; it has {}", list(&known))))
            };
            match op {
                "linear" => variants.linear = find()?,
                "linear_fp8" => variants.linear_fp8 = find()?,
                "conv2d" => variants.conv2d = find()?,
                "attention" => variants.attention = find()?,
                "conv2d.splits" => {
                    let splits = name.parse().ok().filter(|splits| (1..=MAX_SPLITS).contains(splits));
                    let refused = || refuse(format!("{op} is {name:?}, expected a number from 1 to {MAX_SPLITS}"));
                    variants.conv2d_splits = Some(splits.ok_or_else(refused)?);
                }
                _ => return Err(refuse(format!("no op {op:?} with variants; there are {}", OPS.join(", ")))),
            }
        }
        Ok(variants)
    }
}

/// A grid's second dimension.
const MAX_SPLITS: usize = 65_535;

fn list(variants: &[Variant]) -> String {
    variants.iter().map(|variant| variant.name).collect::<Vec<_>>().join(", ")
}

thread_local! {
    static OVERRIDE: Cell<Option<Variants>> = const { Cell::new(None) };
}

/// Runs `f` with the variants that `text` names, on this thread, as if `MEGAFUSE_KERNEL` said so; "" leaves all choices to
/// the ops.
///
/// # Errors
/// [`Error::Config`]: `text` names an op or a variant that there is not; those of `f`.
pub fn with_variants<R>(text: &str, f: impl FnOnce() -> Result<R>) -> Result<R> {
    struct Restore(Option<Variants>);
    impl Drop for Restore {
        fn drop(&mut self) {
            OVERRIDE.set(self.0);
        }
    }
    let variants = text.parse()?;
    let _restore = Restore(OVERRIDE.replace(Some(variants)));
    f()
}

/// Of [`with_variants`], else of the environment.
fn current() -> Result<Variants> {
    static ENVIRONMENT: OnceLock<String> = OnceLock::new();
    static PARSED: OnceLock<Option<Variants>> = OnceLock::new();
    if let Some(variants) = OVERRIDE.get() {
        return Ok(variants);
    }
    let text = ENVIRONMENT.get_or_init(|| std::env::var(VARIABLE).unwrap_or_default());
    match PARSED.get_or_init(|| text.parse().ok()) {
        Some(variants) => Ok(*variants),
        None => text.parse(),
    }
}

/// The variant that is asked of an op by name.
///
/// # Errors
/// [`Error::Config`]: the environment names an op or a variant that there is not.
pub fn asked(op: &str) -> Result<Option<&'static str>> {
    let variants = current()?;
    Ok(match op {
        "linear" => variants.linear,
        "linear_fp8" => variants.linear_fp8,
        "conv2d" => variants.conv2d,
        "attention" => variants.attention,
        _ => None,
    })
}

/// Parts of a convolution's sums that are asked for. A mistake elsewhere in the variable is [`asked`]'s to report, which
/// every convolution on a card calls.
pub fn asked_splits() -> Option<usize> {
    current().ok().and_then(|variants| variants.conv2d_splits)
}

/// Those of Hopper's kernels, `all` of an op, that a card has for operands of a dtype: of 16 bits, where it runs sm_90a.
pub fn on_hopper(device: &CudaDevice, dtype: DType, all: Vec<Variant>) -> Vec<Variant> {
    if device.has(Isa::Sm90a) && dtype != DType::F32 { all } else { vec![] }
}

/// One kernel of a table: the one that is asked for by name, else that with the shortest predicted duration. `fit`: those that
/// take the operands, which `what` describes.
///
/// # Errors
/// [`Error::Argument`]: the one that is asked for does not fit, or none does.
pub fn pick<'a, T>(
    op: &'static str,
    asked: Option<&str>,
    fit: impl Iterator<Item = &'a T> + Clone,
    variant: impl Fn(&T) -> Variant,
    what: impl FnOnce() -> String,
    nanoseconds: impl Fn(&T) -> usize,
) -> Result<&'a T> {
    let found = match asked {
        Some(name) => fit.clone().find(|tile| variant(tile).name == name),
        None => fit.clone().min_by_key(|tile| nanoseconds(tile)),
    };
    found.ok_or_else(|| refused(op, asked.unwrap_or("none"), &what(), &fit.map(variant).collect::<Vec<_>>()))
}

/// A variant that was asked for by name cannot take the operands that `what` describes; `others` can.
pub fn refused(op: &'static str, name: &str, what: &str, others: &[Variant]) -> Error {
    Error::argument(op, VARIABLE, format!("{op}={name}"), format!("a variant that takes {what}: {}", list(others)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_mistakes_are_named() {
        let variants: Variants = "linear=128x64, conv2d=general,conv2d.splits=3,attention=d64_long".parse().unwrap();
        assert_eq!((variants.linear, variants.conv2d), (Some("128x64"), Some("general")));
        assert_eq!((variants.conv2d_splits, variants.attention), (Some(3), Some("d64_long")));
        assert_eq!("".parse::<Variants>().unwrap(), Variants::default());
        for (text, expected) in [
            (
                "linear",
                "MEGAFUSE_KERNEL=linear: \"linear\" is not op=variant, with an op of linear, linear_fp8, conv2d",
            ),
            (
                "gemm=64x64",
                "no op \"gemm\" with variants; there are linear, linear_fp8, conv2d, conv2d.splits, attention",
            ),
            (
                "conv2d=64x65",
                "conv2d has no variant \"64x65\"; it has 128x256, 128x128, 128x64, 64x128, 64x64, general",
            ),
            ("attention=", "attention has no variant \"\"; it has d32"),
            ("conv2d.splits=0", "conv2d.splits is \"0\", expected a number from 1 to 65535"),
            ("linear=64x64,conv2d.splits=x", "conv2d.splits is \"x\""),
        ] {
            let error = text.parse::<Variants>().unwrap_err().to_string();
            assert!(error.contains(expected), "{error} does not contain {expected}");
        }
    }

    #[test]
    fn a_choice_holds_on_its_thread_and_while_it_lasts() {
        let inside = with_variants("conv2d=64x128,conv2d.splits=3", || {
            let elsewhere = std::thread::spawn(asked_splits).join().unwrap();
            Ok((asked("conv2d")?, asked("linear")?, asked_splits(), elsewhere))
        });
        assert_eq!(inside.unwrap(), (Some("64x128"), None, Some(3), None));
        assert_eq!((asked("conv2d").unwrap(), asked_splits()), (None, None));
    }

    #[test]
    fn every_variant_has_a_reason() {
        for variant in OPS.iter().flat_map(|op| all(op)) {
            assert!(variant.reason.len() > 10, "{variant:?}");
        }
    }
}
