//! Element types of eight bits, and the numbers that they stand for.
//!
//! | type | sign, exponent, mantissa | bias | largest | not a number |
//! | --- | --- | --- | --- | --- |
//! | F8_E4M3 | 1, 4, 3 | 7 | 448 | exponent and mantissa of ones alone; no infinities |
//! | F8_E5M2 | 1, 5, 2 | 15 | 57344 | as in IEEE 754, with infinities: the upper half of an f16 |
//! | I8 | two's complement | | 127 | |
//!
//! Source: Micikevicius et al., "FP8 formats for deep learning" (2022), table 1; the formats e4m3fn and e5m2 of ONNX.

use safetensors::Dtype;

/// An element type of eight bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// F8_E4M3.
    E4m3,
    /// F8_E5M2.
    E5m2,
    /// I8.
    Int8,
}

/// What each code of F8_E4M3 stands for.
static E4M3: [f32; 256] = floats(3);

/// What each code of F8_E5M2 stands for.
static E5M2: [f32; 256] = floats(2);

/// What each code of I8 stands for.
static INT8: [f32; 256] = integers();

impl Code {
    /// The type by its name in files, `None` for those of more or fewer bits.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F8_E4M3 => Some(Code::E4m3),
            Dtype::F8_E5M2 => Some(Code::E5m2),
            Dtype::I8 => Some(Code::Int8),
            _ => None,
        }
    }

    /// The name in files.
    pub fn dtype(self) -> Dtype {
        match self {
            Code::E4m3 => Dtype::F8_E4M3,
            Code::E5m2 => Dtype::F8_E5M2,
            Code::Int8 => Dtype::I8,
        }
    }

    /// The number that each byte stands for.
    pub fn numbers(self) -> &'static [f32; 256] {
        match self {
            Code::E4m3 => &E4M3,
            Code::E5m2 => &E5M2,
            Code::Int8 => &INT8,
        }
    }
}

/// All numbers of eight bits with so many bits of mantissa.
const fn floats(mantissa_bits: u32) -> [f32; 256] {
    let mut numbers = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        numbers[code as usize] = float(code, mantissa_bits);
        code += 1;
    }
    numbers
}

/// The number of a code with so many bits of mantissa; the exponent has the others but for the sign.
const fn float(code: u32, mantissa_bits: u32) -> f32 {
    let exponent_bits = 7 - mantissa_bits;
    let bias = (1 << (exponent_bits - 1)) - 1;
    let exponent = (code & 0x7f) >> mantissa_bits;
    let mantissa = code & ((1 << mantissa_bits) - 1);
    let ones = (1 << mantissa_bits) - 1;
    let is_last = exponent == (1 << exponent_bits) - 1;
    let sign = if code < 128 { 1.0 } else { -1.0 };
    if is_last && mantissa_bits == 3 && mantissa == ones || is_last && mantissa_bits == 2 && mantissa != 0 {
        return f32::NAN;
    }
    if is_last && mantissa_bits == 2 {
        return sign * f32::INFINITY;
    }
    if exponent == 0 {
        // The smallest step: the mantissa's last bit at the smallest exponent.
        let step = f32::from_bits((127 + 1 - bias - mantissa_bits) << 23);
        return sign * mantissa as f32 * step;
    }
    sign * f32::from_bits((exponent + 127 - bias) << 23 | mantissa << (23 - mantissa_bits))
}

const fn integers() -> [f32; 256] {
    let mut numbers = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        numbers[code] = code as u8 as i8 as f32;
        code += 1;
    }
    numbers
}

/// The largest number of F8_E4M3.
pub const E4M3_LARGEST: f32 = 448.0;

/// The code of F8_E4M3 nearest to a finite number, ties to even; what is beyond the largest becomes that.
pub fn to_e4m3(value: f32) -> u8 {
    /// The exponent of the smallest normal number.
    const LEAST_EXPONENT: i32 = -6;
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(E4M3_LARGEST);
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(LEAST_EXPONENT);
    // How many of the steps between numbers with this exponent; a power of two, so that the product is exact.
    let steps = (magnitude * power_of_two(3 - exponent)).round_ties_even() as u32;
    // Steps from 8 to 15 are a normal number; 16 is the next exponent's first, fewer than 8 are subnormal: both come out of the sum.
    sign | (((exponent - LEAST_EXPONENT) as u32 * 8 + steps) as u8)
}

/// 2 to a power within f32's range of normal numbers.
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

/// The code of I8 nearest to a finite number, ties to even, from -127 to 127.
pub fn to_int8(value: f32) -> u8 {
    value.round_ties_even().clamp(-127.0, 127.0) as i8 as u8
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn known_codes_stand_for_known_numbers() {
        for (code, number) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xfe, -448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(Code::E4m3.numbers()[code], number, "{code:x}");
        }
        assert!(Code::E4m3.numbers()[0x7f].is_nan() && Code::E4m3.numbers()[0xff].is_nan());
        for code in 0..=255u8 {
            let half = f16::from_bits(u16::from(code) << 8).to_f32();
            let found = Code::E5m2.numbers()[usize::from(code)];
            assert!(found == half || found.is_nan() && half.is_nan(), "{code:x}");
            assert_eq!(Code::Int8.numbers()[usize::from(code)], f32::from(code as i8));
        }
    }

    #[test]
    fn the_nearest_code_is_taken() {
        let numbers = Code::E4m3.numbers();
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(numbers[usize::from(code)]), code, "{code:x}");
        }
        for code in 0..0x7eu8 {
            let (low, high) = (numbers[usize::from(code)], numbers[usize::from(code) + 1]);
            let middle = (low + high) / 2.0;
            let even = code + code % 2;
            assert_eq!(to_e4m3(middle), even, "the middle after {code:x}");
            assert_eq!(to_e4m3(-middle), even | 0x80);
            assert_eq!(to_e4m3(f32::from_bits(middle.to_bits() - 1)), code);
            assert_eq!(to_e4m3(f32::from_bits(middle.to_bits() + 1)), code + 1);
        }
        assert_eq!((to_e4m3(1e30), to_e4m3(-1e30)), (0x7e, 0xfe));
        assert_eq!((to_e4m3(1e-30), to_e4m3(f32::MIN_POSITIVE)), (0, 0));
        for (value, code) in [(0.5, 0), (1.5, 2), (-0.5, 0), (-1.5, -2), (127.6, 127), (-300.0, -127)] {
            assert_eq!(to_int8(value) as i8, code, "{value}");
        }
    }
}
