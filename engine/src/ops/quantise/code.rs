//! What a code of eight bits stands for.

use std::fmt;
use std::str::FromStr;

use crate::codes::{Code, E4M3_LARGEST, to_e4m3, to_int8};

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
            Coding::Float8 => E4M3_LARGEST,
        }
    }

    /// Whether values are rotated before they are rounded.
    pub fn rotates(self) -> bool {
        self == Coding::Int8
    }

    /// The code of a value of at most [`Coding::largest`], rounded to nearest even.
    pub(super) fn encode(self, value: f32) -> u8 {
        match self {
            Coding::Int8 => to_int8(value),
            Coding::Float8 => to_e4m3(value),
        }
    }

    /// The values of all codes.
    pub(super) fn numbers(self) -> &'static [f32; 256] {
        match self {
            Coding::Int8 => Code::Int8.numbers(),
            Coding::Float8 => Code::E4m3.numbers(),
        }
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
