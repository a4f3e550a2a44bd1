//! What a code of eight bits stands for.

use std::fmt;
use std::str::FromStr;

/// How numbers are kept in eight bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coding {
    /// Integers from −127 to 127, of values that are rotated in groups.
    Int8,
    /// Floating point with four bits of exponent and three of mantissa (e4m3).
    Float8,
}

impl Coding {
    /// The largest code.
    pub fn largest(self) -> f32 {
        match self {
            Coding::Int8 => 127.0,
            Coding::Float8 => 448.0,
        }
    }

    /// Whether values are rotated before they are rounded.
    pub fn rotates(self) -> bool {
        self == Coding::Int8
    }

    /// The code of a value of at most [`Coding::largest`], rounded to nearest even.
    pub fn encode(self, value: f32) -> u8 {
        match self {
            Coding::Int8 => (value.round_ties_even() as i8).max(-127) as u8,
            Coding::Float8 => encode_e4m3(value),
        }
    }

    /// The value of a code.
    pub fn decode(self, code: u8) -> f32 {
        match self {
            Coding::Int8 => f32::from(code as i8),
            Coding::Float8 => decode_e4m3(code),
        }
    }

    /// The values of all codes.
    pub(super) fn table(self) -> [f32; 256] {
        std::array::from_fn(|code| self.decode(code as u8))
    }

    /// Of an operation's kernels, integers first, the one for this coding.
    pub(in crate::ops) fn of_kernels(self, [int8, float8]: [&'static str; 2]) -> &'static str {
        match self {
            Coding::Int8 => int8,
            Coding::Float8 => float8,
        }
    }
}

impl fmt::Display for Coding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Coding::Int8 => "int8",
            Coding::Float8 => "fp8",
        })
    }
}

impl FromStr for Coding {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "int8" => Ok(Coding::Int8),
            "fp8" => Ok(Coding::Float8),
            _ => Err("expected int8 or fp8".into()),
        }
    }
}

const SIGN: u8 = 0x80;
const NAN: u8 = 0x7f;
const MANTISSA_BITS: i32 = 3;
const BIAS: i32 = 7;
/// The exponent of the smallest normal number, 2⁻⁶, and of those below it.
const SMALLEST_EXPONENT: i32 = 1 - BIAS;

/// Rounded to nearest even, magnitudes above 448 to 448.
fn encode_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { SIGN } else { 0 };
    if value.is_nan() {
        return sign | NAN;
    }
    let magnitude = value.abs().min(Coding::Float8.largest());
    let exponent = (magnitude.to_bits() >> 23) as i32 - 127;
    let exponent = exponent.max(SMALLEST_EXPONENT);
    let step = f32::exp2((exponent - MANTISSA_BITS) as f32);
    // 8 to 16 steps of a normal number; those of 16 carry into the exponent by themselves, as those of 8 do from below it.
    let steps = (magnitude / step).round_ties_even() as i32;
    let code = (exponent - SMALLEST_EXPONENT) * (1 << MANTISSA_BITS) + steps;
    sign | code as u8
}

fn decode_e4m3(code: u8) -> f32 {
    let magnitude = code & !SIGN;
    let value = if magnitude == NAN {
        f32::NAN
    } else {
        let (exponent, mantissa) = (i32::from(magnitude >> MANTISSA_BITS), i32::from(magnitude & 7));
        let (steps, exponent) = match exponent {
            0 => (mantissa, SMALLEST_EXPONENT),
            _ => (mantissa + (1 << MANTISSA_BITS), exponent - BIAS),
        };
        steps as f32 * f32::exp2((exponent - MANTISSA_BITS) as f32)
    };
    if code & SIGN == 0 { value } else { -value }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format's own numbers: Micikevicius et al., table 1.
    #[test]
    fn e4m3_is_as_published() {
        for (code, value) in [
            (0x7e, 448.0),
            (0x08, 0.015625),
            (0x07, 0.013671875),
            (0x01, 0.001953125),
            (0x38, 1.0),
            (0xb8, -1.0),
        ] {
            assert_eq!((decode_e4m3(code), encode_e4m3(value)), (value, code));
        }
        assert!(decode_e4m3(0x7f).is_nan() && encode_e4m3(f32::NAN) == 0x7f);
        assert_eq!([encode_e4m3(1e9), encode_e4m3(-1e9)], [0x7e, 0xfe]);
    }

    #[test]
    fn every_code_is_its_value_s_code() {
        for code in 0..=255 {
            let value = decode_e4m3(code);
            assert!(value.is_nan() || encode_e4m3(value) == code, "{code:#x}");
        }
        for code in -127..=127_i8 {
            assert_eq!(Coding::Int8.encode(Coding::Int8.decode(code as u8)), code as u8);
        }
    }

    /// Between two neighbours a value takes the nearer one, in the middle the even one.
    #[test]
    fn values_are_rounded_to_nearest_even() {
        for code in 0..0x7e_u8 {
            let (low, high) = (decode_e4m3(code), decode_e4m3(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(encode_e4m3(middle), even, "{code:#x}");
            assert_eq!(
                [
                    encode_e4m3(middle - (high - low) / 16.0),
                    encode_e4m3(middle + (high - low) / 16.0)
                ],
                [code, code + 1]
            );
        }
    }
}
