//! Elementwise f32 math that the compiler vectorises, and dtype conversion of slices.
//!
//! The scalar functions have no branches and no table look-ups, so a plain loop over a slice becomes vector code. Loops
//! are written inside [`simd!`], which compiles the body once per instruction set (AVX-512, AVX2 with FMA, the build's
//! own baseline) and picks at run time; `FMA` is a constant in the body and goes to the functions:
//! ```text
//! simd! {
//!     /// values = exp(values - shift)
//!     pub fn exp_shifted(values: &mut [f32], shift: f32) {
//!         values.iter_mut().for_each(|v| *v = exp::<FMA>(*v - shift));
//!     }
//! }
//! ```
//! Functions of T in a [`simd!`] block: `pub fn name[T: Element](from: &[T]) { .. }`.

use std::sync::{LazyLock, OnceLock};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::ops::Activation;
use crate::runtime::{DType, Element, F8E4M3};

/// Instruction set that the cpu ops use; a larger one can do all that a smaller one can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the build assumes: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL with FMA.
    Avx512,
}

const LEVELS: [(&str, Level); 3] = [("baseline", Level::Baseline), ("avx2", Level::Avx2), ("avx512", Level::Avx512)];

impl Level {
    pub fn name(self) -> &'static str {
        LEVELS.iter().find(|(_, level)| *level == self).map_or("", |(name, _)| name)
    }
}

/// Chosen once; later calls read a cached value.
#[inline]
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| chosen().unwrap_or_else(|_| detected()))
}

/// The largest of this machine, or the smaller one that `MEGAFUSE_CPU` names.
///
/// # Errors
/// [`Error::Config`]: the variable's value is no level, or one that this machine has not.
pub fn chosen() -> Result<Level> {
    let detected = detected();
    let Some(name) = std::env::var_os("MEGAFUSE_CPU") else { return Ok(detected) };
    match LEVELS.iter().find(|(known, _)| name == *known) {
        Some(&(_, level)) if level <= detected => Ok(level),
        _ => {
            let names: Vec<&str> = LEVELS.iter().filter(|(_, l)| *l <= detected).map(|(name, _)| *name).collect();
            let reason = format!("is not an instruction set of this machine; it has {}", names.join(", "));
            Err(Error::config(format!("MEGAFUSE_CPU={}", name.to_string_lossy()), reason))
        }
    }
}

fn detected() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma") && has!("f16c");
        if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
            return Level::Avx512;
        }
        if avx2 {
            return Level::Avx2;
        }
    }
    Level::Baseline
}

/// Defines a function whose body is compiled for every [`Level`]; see the module's documentation.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$T:ident: $Bound:path])? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$T: $Bound>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(unused, clippy::too_many_arguments)]
            fn body<const FMA: bool $(, $T: $Bound)?>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$T: $Bound>)? ($($arg: $ty),*) $(-> $ret)? {
                    body::<true $(, $T)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$T: $Bound>)? ($($arg: $ty),*) $(-> $ret)? {
                    body::<true $(, $T)?>($($arg),*)
                }
                match $crate::ops::cpu::math::level() {
                    // SAFETY: level() found the features.
                    $crate::ops::cpu::math::Level::Avx512 => return unsafe { avx512 $(::<$T>)? ($($arg),*) },
                    // SAFETY: level() found the features.
                    $crate::ops::cpu::math::Level::Avx2 => return unsafe { avx2 $(::<$T>)? ($($arg),*) },
                    $crate::ops::cpu::math::Level::Baseline => {}
                }
            }
            body::<{ cfg!(target_arch = "aarch64") } $(, $T)?>($($arg),*)
        }
    };
}
pub(crate) use simd;

/// `a * b + c`: one rounding where the instruction exists, two elsewhere (never a call into libm).
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` within 2 ulp over all of f32, subnormal results included; NaN stays NaN.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    // x = n ln 2 + r, |r| <= ln(2) / 2; e^r by a polynomial fitted to (e^r - 1 - r) / r^2 (relative error 5e-9).
    const C: [f32; 5] = [0.5, 0.166_665_15, 0.041_666_26, 0.008_369_223, 0.001_394_656_1];
    const LN2_HI: f32 = 0.693_359_4; // 355 / 512: n * LN2_HI is exact
    const LN2_LO: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    // Comparisons written so that NaN passes; beyond these the result is 0 or infinity already.
    let x = if x < -105.0 { -105.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_LO, fma::<FMA>(n, -LN2_HI, x));
    let mut p = C[4];
    p = fma::<FMA>(p, r, C[3]);
    p = fma::<FMA>(p, r, C[2]);
    p = fma::<FMA>(p, r, C[1]);
    p = fma::<FMA>(p, r, C[0]);
    p = fma::<FMA>(p * r, r, r) + 1.0;
    // 2^n in two factors, so that neither leaves the exponent's range.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `e^x` within 2 ulp for `x <= 0`; results below 2^-126 become 0 (a softmax's or a Gaussian's tail). NaN stays NaN.
#[inline(always)]
pub fn exp_nonpositive<const FMA: bool>(x: f32) -> f32 {
    const C: [f32; 5] = [0.5, 0.166_665_15, 0.041_666_26, 0.008_369_223, 0.001_394_656_1];
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0;
    let shifted = fma::<FMA>(if x < -87.0 { -87.0 } else { x }, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_LO, fma::<FMA>(n, -LN2_HI, x));
    let mut p = C[4];
    p = fma::<FMA>(p, r, C[3]);
    p = fma::<FMA>(p, r, C[2]);
    p = fma::<FMA>(p, r, C[1]);
    p = fma::<FMA>(p, r, C[0]);
    p = fma::<FMA>(p * r, r, r) + 1.0;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let y = p * power_of_two(n);
    if x < -87.0 { 0.0 } else { y }
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `x / (1 + e^-x)`
#[inline(always)]
pub fn silu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-x))
}

/// `x / (1 + e^(-1.702 x))`
#[inline(always)]
pub fn quick_gelu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-1.702 * x))
}

/// `x/2 (1 + erf(x / sqrt 2))`; the normal distribution's tail keeps its relative precision.
#[inline(always)]
pub fn gelu<const FMA: bool>(x: f32) -> f32 {
    let tail = 0.5 * erfc_nonnegative::<FMA>(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

/// `x/2 (1 + tanh u)`, u = sqrt(2 / pi) (x + 0.044715 x^3), as `x / (1 + e^(-2 u))`.
#[inline(always)]
pub fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    const SQRT_2_PI: f32 = 0.797_884_6;
    let u = SQRT_2_PI * fma::<FMA>(0.044_715 * x * x, x, x);
    x / (1.0 + exp::<FMA>(-2.0 * u))
}

/// `1 - erf(z)` for `z >= 0`, relative error 4e-7 plus that of `z^2` in f32.
#[inline(always)]
fn erfc_nonnegative<const FMA: bool>(z: f32) -> f32 {
    // e^(z^2) erfc(z) = t P(2t - 1) with t = 1 / (1 + z/2): fitted for relative error (4e-8).
    const P: [f32; 9] = [
        0.510_791_36,
        0.343_580_48,
        0.139_734_79,
        0.018_217_68,
        -0.010_741_645,
        -0.003_219_163_3,
        0.001_489_473_9,
        0.000_378_177_9,
        -0.000_231_214_74,
    ];
    let t = 1.0 / fma::<FMA>(z, 0.5, 1.0);
    let s = fma::<FMA>(2.0, t, -1.0);
    let mut p = P[8];
    p = fma::<FMA>(p, s, P[7]);
    p = fma::<FMA>(p, s, P[6]);
    p = fma::<FMA>(p, s, P[5]);
    p = fma::<FMA>(p, s, P[4]);
    p = fma::<FMA>(p, s, P[3]);
    p = fma::<FMA>(p, s, P[2]);
    p = fma::<FMA>(p, s, P[1]);
    p = fma::<FMA>(p, s, P[0]);
    t * p * exp_nonpositive::<FMA>(-(z * z))
}

simd! {
    pub fn silu_slice(values: &mut [f32]) {
        values.iter_mut().for_each(|v| *v = silu::<FMA>(*v));
    }
}

simd! {
    pub fn gelu_slice(values: &mut [f32]) {
        values.iter_mut().for_each(|v| *v = gelu::<FMA>(*v));
    }
}

simd! {
    pub fn quick_gelu_slice(values: &mut [f32]) {
        values.iter_mut().for_each(|v| *v = quick_gelu::<FMA>(*v));
    }
}

simd! {
    pub fn gelu_tanh_slice(values: &mut [f32]) {
        values.iter_mut().for_each(|v| *v = gelu_tanh::<FMA>(*v));
    }
}

/// `values[j] = gated(values[2j], values[2j + 1])`, into the first half of `values`.
#[inline(always)]
fn gate_pairs(values: &mut [f32], gated: impl Fn(f32, f32) -> f32) {
    // Blocks through the stack: a loop that reads ahead of what it writes in one slice is not vectorised.
    let mut block = [0.0f32; 64];
    let pairs = values.len() / 2;
    for start in (0..pairs).step_by(64) {
        let count = 64.min(pairs - start);
        let pairs = &values[2 * start..2 * (start + count)];
        for (out, pair) in block.iter_mut().zip(pairs.chunks_exact(2)) {
            *out = gated(pair[0], pair[1]);
        }
        values[start..start + count].copy_from_slice(&block[..count]);
    }
}

simd! {
    /// `values[j] = values[2j] * gelu(values[2j + 1])`, into the first half of `values`.
    pub fn geglu_slice(values: &mut [f32]) {
        gate_pairs(values, |value, gate| value * gelu::<FMA>(gate));
    }
}

simd! {
    /// The same by [`gelu_tanh`].
    pub fn geglu_tanh_slice(values: &mut [f32]) {
        gate_pairs(values, |value, gate| value * gelu_tanh::<FMA>(gate));
    }
}

/// The activation in place; GEGLU leaves its result in the first half of `values`.
pub fn activate(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::None => {}
        Activation::Silu => silu_slice(values),
        Activation::Gelu => gelu_slice(values),
        Activation::QuickGelu => quick_gelu_slice(values),
        Activation::Geglu => geglu_slice(values),
        Activation::GeluTanh => gelu_tanh_slice(values),
        Activation::GegluTanh => geglu_tanh_slice(values),
    }
}

/// Converts to f32; the slices have one length, `T` is a float type.
pub fn load<T: Element>(to: &mut [f32], from: &[T]) {
    match T::DTYPE {
        DType::F32 => to.copy_from_slice(bytemuck::cast_slice(from)),
        DType::F16 => bytemuck::cast_slice::<T, f16>(from).convert_to_f32_slice(to),
        DType::BF16 => load_bf16(to, bytemuck::cast_slice(from)),
        DType::F8E4M3 => load_f8(to, bytemuck::cast_slice(from)),
        DType::U32 => unreachable!("a float dtype"),
    }
}

/// Rounds f32 to `T`, to nearest even; the slices have one length, `T` is a float type.
pub fn store<T: Element>(to: &mut [T], from: &[f32]) {
    match T::DTYPE {
        DType::F32 => bytemuck::cast_slice_mut(to).copy_from_slice(from),
        DType::F16 => bytemuck::cast_slice_mut::<T, f16>(to).convert_from_f32_slice(from),
        DType::BF16 => store_bf16(bytemuck::cast_slice_mut(to), from),
        DType::F8E4M3 => to.iter_mut().zip(from).for_each(|(to, &from)| *to = T::from_f32(from)),
        DType::U32 => unreachable!("a float dtype"),
    }
}

/// All 256 values in a table: it stays in L1.
fn load_f8(to: &mut [f32], from: &[F8E4M3]) {
    static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|code| F8E4M3(code as u8).to_f32()));
    let values = &*VALUES;
    to.iter_mut().zip(from).for_each(|(to, from)| *to = values[usize::from(from.0)]);
}

/// `values += terms`; the slices have one length, `T` is a float type.
pub fn add<T: Element>(values: &mut [f32], terms: &[T]) {
    if T::DTYPE == DType::F32 {
        return add_f32(values, bytemuck::cast_slice(terms));
    }
    assert_eq!(values.len(), terms.len());
    let mut block = [0.0; 128];
    for (values, terms) in values.chunks_mut(128).zip(terms.chunks(128)) {
        let block = &mut block[..terms.len()];
        load(block, terms);
        add_f32(values, block);
    }
}

simd! {
    fn add_f32(values: &mut [f32], terms: &[f32]) {
        assert_eq!(values.len(), terms.len());
        values.iter_mut().zip(terms).for_each(|(value, term)| *value += term);
    }
}

simd! {
    /// `values *= factor`
    pub fn scale(values: &mut [f32], factor: f32) {
        values.iter_mut().for_each(|v| *v *= factor);
    }
}

simd! {
    /// `values *= slope` where they are negative
    pub fn leaky_relu(values: &mut [f32], slope: f32) {
        values.iter_mut().for_each(|v| *v *= if *v < 0.0 { slope } else { 1.0 });
    }
}

simd! {
    fn load_bf16(to: &mut [f32], from: &[bf16]) {
        assert_eq!(to.len(), from.len());
        to.iter_mut().zip(from).for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
    }
}

simd! {
    fn store_bf16(to: &mut [bf16], from: &[f32]) {
        assert_eq!(to.len(), from.len());
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            let quiet = (bits >> 16) | 0x40;
            *to = bf16::from_bits(if from.is_nan() { quiet } else { rounded } as u16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    simd! {
        fn exp_slice(values: &mut [f32]) {
            values.iter_mut().for_each(|v| *v = exp::<FMA>(*v));
        }
    }
    simd! {
        fn exp_nonpositive_slice(values: &mut [f32]) {
            values.iter_mut().for_each(|v| *v = exp_nonpositive::<FMA>(*v));
        }
    }

    fn sweep(low: f32, high: f32) -> Vec<f32> {
        (0..=40_001).map(|i| low + (high - low) * i as f32 / 40_001.0).collect()
    }

    /// `1 - erf` in f64 by a continued fraction or the Maclaurin series.
    fn erfc(z: f64) -> f64 {
        if z < 0.0 {
            return 2.0 - erfc(-z);
        }
        if z < 2.0 {
            let (mut sum, mut term) = (z, z);
            for n in 1..80 {
                term *= -z * z / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            return 1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum;
        }
        let fraction = (1..200).rev().fold(z, |f, n| z + f64::from(n) / 2.0 / f);
        (-z * z).exp() / (std::f64::consts::PI.sqrt() * fraction)
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let x = sweep(-103.0, 88.5);
        let mut got = x.clone();
        exp_slice(&mut got);
        for (&x, &got) in x.iter().zip(&got) {
            let want = f64::from(x).exp();
            let ulp = want * f64::from(f32::EPSILON) + f64::from(f32::from_bits(1));
            assert!((f64::from(got) - want).abs() <= 2.0 * ulp, "exp({x}) = {got}, not {want}");
        }
        let mut limits = [f32::NEG_INFINITY, -200.0, 0.0, 200.0, f32::INFINITY, f32::NAN];
        exp_slice(&mut limits);
        assert_eq!(limits[..5], [0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY]);
        assert!(limits[5].is_nan());
    }

    #[test]
    fn exp_nonpositive_is_within_two_ulp_and_ends_in_zero() {
        let x = sweep(-86.9, 0.0);
        let mut got = x.clone();
        exp_nonpositive_slice(&mut got);
        for (&x, &got) in x.iter().zip(&got) {
            let want = f64::from(x).exp();
            assert!((f64::from(got) / want - 1.0).abs() <= 2.0 * f64::from(f32::EPSILON), "exp({x}) = {got}");
        }
        let mut limits = [f32::NEG_INFINITY, -1e30, -88.0, 0.0, f32::NAN];
        exp_nonpositive_slice(&mut limits);
        assert_eq!(limits[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(limits[4].is_nan());
    }

    #[test]
    fn activations_match_f64() {
        let x = sweep(-12.0, 12.0);
        let eps = f64::from(f32::EPSILON);
        let check = |name: &str, activation, f: &dyn Fn(f64) -> f64, rel: f64| {
            let mut got = x.clone();
            activate(activation, &mut got);
            for (&x, &got) in x.iter().zip(&got) {
                let want = f(f64::from(x));
                assert!((f64::from(got) - want).abs() <= rel * want.abs() + 1e-30, "{name}({x}) = {got}, not {want}");
            }
        };
        check("silu", Activation::Silu, &|x| x / (1.0 + (-x).exp()), 4.0 * eps);
        // -1.702 x is rounded before the exponential: its absolute error, x eps / 2, is a relative one afterwards.
        check("quick_gelu", Activation::QuickGelu, &|x| x / (1.0 + (-1.702 * x).exp()), (4.0 + 12.0 * 1.702) * eps);
        // The same for 2 u, at most 143: four roundings of it.
        let tanh = |x: f64| x / (1.0 + (-2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).exp());
        check("gelu_tanh", Activation::GeluTanh, &tanh, (8.0 + 4.0 * 143.0) * eps);
        // The same for z^2 = x^2 / 2: three roundings of 72 at most.
        check("gelu", Activation::Gelu, &|x| x * 0.5 * erfc(-x * 0.5f64.sqrt()), (8.0 + 1.5 * 72.0) * eps);
    }

    #[test]
    fn geglu_multiplies_value_and_gate_of_a_pair() {
        for (gated, alone) in [(Activation::Geglu, Activation::Gelu), (Activation::GegluTanh, Activation::GeluTanh)] {
            for pairs in [0, 1, 63, 64, 65, 200] {
                let mut values: Vec<f32> = (0..2 * pairs).map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0).collect();
                let pairs_in = values.clone();
                activate(gated, &mut values);
                for j in 0..pairs {
                    let mut gate = [pairs_in[2 * j + 1]];
                    activate(alone, &mut gate);
                    assert_eq!(values[j], pairs_in[2 * j] * gate[0], "{gated:?}: pair {j} of {pairs}");
                }
            }
        }
    }

    #[test]
    fn conversions_round_to_nearest_even() {
        // Ties, overflow, subnormals, NaN: as the half crate has them, element by element.
        let specials =
            [0.0, -0.0, 1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 65519.9, 65520.0, 3.4e38, 1e-8, 6e-8, f32::INFINITY];
        let values: Vec<f32> = specials.into_iter().chain(sweep(-3.0, 3.0)).collect();
        let (mut to_f16, mut to_bf16) = (vec![f16::ZERO; values.len()], vec![bf16::ZERO; values.len()]);
        store(&mut to_f16, &values);
        store(&mut to_bf16, &values);
        for (i, &value) in values.iter().enumerate() {
            assert_eq!(to_f16[i].to_bits(), f16::from_f32(value).to_bits(), "{value}");
            assert_eq!(to_bf16[i].to_bits(), bf16::from_f32(value).to_bits(), "{value}");
        }
        let mut back = vec![0.0; values.len()];
        load(&mut back, &to_bf16);
        assert!(back.iter().zip(&to_bf16).all(|(a, b)| *a == b.to_f32()));
        store(&mut to_bf16[..1], &[f32::NAN]);
        assert!(to_bf16[0].is_nan());
    }
}
