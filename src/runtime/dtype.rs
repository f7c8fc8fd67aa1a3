use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::error::Error;

/// Element type of a [`Tensor`](super::Tensor). Activations and weights are `F32`, `F16` or `BF16`; `U32` is for token
/// ids, `F8E4M3` for the operands of [`linear_fp8`](crate::ops::linear_fp8). Accumulation and statistics are f32 whatever
/// the dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
    U32,
    /// [`F8E4M3`]
    F8E4M3,
}

impl DType {
    pub const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    pub fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::F8E4M3 => 1,
        }
    }

    /// What ops compute with: the types of activations and weights.
    pub fn is_float(self) -> bool {
        DType::FLOATS.contains(&self)
    }

    /// Distance from 1 to the next larger value: 2^-23, 2^-10, 2^-7, 2^-3. Storing rounds by at most half of it, relatively.
    pub fn ulp(self) -> f64 {
        match self {
            DType::F32 => f64::from(f32::EPSILON),
            DType::F16 => f64::from(f16::EPSILON.to_f32()),
            DType::BF16 => f64::from(bf16::EPSILON.to_f32()),
            DType::U32 => 0.0,
            DType::F8E4M3 => 0.125,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::U32 => "u32",
            DType::F8E4M3 => "f8_e4m3",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;
    fn from_str(s: &str) -> Result<DType, Error> {
        match s {
            "f32" => Ok(DType::F32),
            "f16" => Ok(DType::F16),
            "bf16" => Ok(DType::BF16),
            _ => Err(Error::argument("DType", "the name", format!("{s:?}"), "f32, f16 or bf16")),
        }
    }
}

/// A Rust type that a tensor can hold.
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug {
    const DTYPE: DType;
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> f32 {
        value
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> f16 {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
}

impl Element for u32 {
    const DTYPE: DType = DType::U32;
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn from_f32(value: f32) -> u32 {
        value as u32
    }
}

/// An 8-bit float of 4 bits of exponent and 3 of fraction: up to 448, no infinities, subnormals in units of 2^-9. OCP 8-bit
/// Floating Point Specification, 2023, E4M3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct F8E4M3(pub u8);

// SAFETY: a byte, of which every value is one of the type.
unsafe impl bytemuck::Zeroable for F8E4M3 {}
// SAFETY: as above; transparent.
unsafe impl bytemuck::Pod for F8E4M3 {}

impl F8E4M3 {
    /// The largest finite value.
    pub const MAX: f32 = 448.0;
}

impl Element for F8E4M3 {
    const DTYPE: DType = DType::F8E4M3;

    fn to_f32(self) -> f32 {
        let (exponent, fraction) = (i32::from(self.0 >> 3 & 15), f32::from(self.0 & 7));
        let magnitude = match (exponent, self.0 & 7) {
            (15, 7) => f32::NAN,
            (0, _) => fraction / 512.0,
            _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
        };
        if self.0 & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// Rounds to nearest, ties to even; what is larger than 448, infinities too, becomes 448.
    fn from_f32(value: f32) -> F8E4M3 {
        let magnitude = value.abs();
        let code = if value.is_nan() {
            0x7f
        } else if magnitude >= F8E4M3::MAX {
            0x7e
        } else if magnitude < 2f32.powi(-6) {
            // Units of 2^-9: beside 2^14 nothing smaller has a place in f32.
            (magnitude + 16384.0).to_bits() - 16384f32.to_bits()
        } else {
            let bits = magnitude.to_bits();
            // To 3 bits of fraction; the exponents' biases are 127 and 7.
            ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)
        };
        F8E4M3(code as u8 | if value.is_sign_negative() { 0x80 } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code is its own value; what lies between two goes to the nearer, and to the even one from the middle.
    #[test]
    fn eight_bit_floats_round_to_nearest_even() {
        let value = |code: u8| F8E4M3(code).to_f32();
        assert_eq!([0, 1, 7, 8, 0x38, 0x7e].map(value), [0.0, 2f32.powi(-9), 7.0 / 512.0, 1.0 / 64.0, 1.0, 448.0]);
        for code in 0..0x7e {
            let (low, high) = (value(code), value(code + 1));
            let middle = (low + high) / 2.0;
            for (x, want) in [
                (low, code),
                (middle.next_down(), code),
                (middle, code + code % 2),
                (middle.next_up(), code + 1),
                (high, code + 1),
            ] {
                assert_eq!(F8E4M3::from_f32(x).0, want, "{x}");
                assert_eq!(F8E4M3::from_f32(-x).0, want | 0x80, "-{x}");
            }
        }
        for (x, want) in [(449.0, 0x7e), (f32::INFINITY, 0x7e), (-1e30, 0xfe), (1e-30, 0), (-0.0, 0x80)] {
            assert_eq!(F8E4M3::from_f32(x).0, want, "{x}");
        }
        assert!(F8E4M3::from_f32(f32::NAN).to_f32().is_nan());
    }
}
