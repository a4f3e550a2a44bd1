//! Numbers with a fraction from outside.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

/// What a number may be.
pub trait Range {
    /// The least.
    const LEAST: f64;
    /// The most.
    const MOST: f64;
}

/// A finite number within `R`, both ends included. Reading one from JSON or TOML fails with the range when it lies outside.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Real<R>(f64, PhantomData<R>);

impl<R: Range> Real<R> {
    /// The number.
    pub const fn get(self) -> f64 {
        self.0
    }

    /// The number in single precision.
    pub const fn single(self) -> f32 {
        self.0 as f32
    }

    /// The number if it lies in the range; otherwise a sentence that says so.
    ///
    /// # Errors
    /// `expected a number from LEAST to MOST, found VALUE`.
    pub fn checked(value: f64) -> Result<Self, String> {
        // NaN is in no range.
        match (R::LEAST..=R::MOST).contains(&value) {
            true => Ok(Real(value, PhantomData)),
            false => Err(format!(
                "expected a number from {} to {}, found {}",
                Shown(R::LEAST),
                Shown(R::MOST),
                Shown(value)
            )),
        }
    }
}

impl<R: Range> Real<R> {
    /// [`Real::checked`] for a number in single precision, in which the ends are rounded as it is.
    ///
    /// # Errors
    /// As [`Real::checked`].
    pub fn checked_single(value: f32) -> Result<Self, String> {
        match (R::LEAST as f32..=R::MOST as f32).contains(&value) {
            true => Ok(Real(value.into(), PhantomData)),
            false => Self::checked(value.into()),
        }
    }
}

impl<'de, R: Range> Deserialize<'de> for Real<R> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Real::checked(f64::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// A number without dozens of zeros.
struct Shown(f64);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shown(value) = *self;
        match value == 0.0 || (1e-3..1e6).contains(&value.abs()) {
            true => write!(f, "{value}"),
            false => write!(f, "{value:e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Small;

    impl Range for Small {
        const LEAST: f64 = 1e-12;
        const MOST: f64 = 0.5;
    }

    #[test]
    fn numbers_outside_are_refused_with_the_range() {
        let read = |text: &str| serde_json::from_str::<Real<Small>>(text).map(Real::get);
        assert_eq!(read("0.5").unwrap(), 0.5);
        assert_eq!(read("1e-12").unwrap(), 1e-12);
        for (text, found) in [
            ("0", "0"),
            ("1e-38", "1e-38"),
            ("3e38", "3e38"),
            ("-0.1", "-0.1"),
            ("1", "1"),
        ] {
            let message = read(text).unwrap_err().to_string();
            let expected = format!("expected a number from 1e-12 to 0.5, found {found}");
            assert!(message.starts_with(&expected), "{message}");
        }
        assert!(Real::<Small>::checked(f64::NAN).unwrap_err().ends_with("found NaN"));
        assert!(
            Real::<Small>::checked(f64::INFINITY)
                .unwrap_err()
                .ends_with("found inf")
        );
        assert_eq!(Real::<Small>::checked_single(1e-12).unwrap().single(), 1e-12);
        assert!(Real::<Small>::checked_single(0.500_001).is_err());
        assert!(read("null").is_err() && read("\"0.1\"").is_err());
    }
}
