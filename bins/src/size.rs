//! Sizes in bytes as people write them.

use std::str::FromStr;

/// A number of bytes: `4GB`, `512MiB`, `1000000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kb" => 1000,
            "m" | "mb" => 1_000_000,
            "g" | "gb" => 1_000_000_000,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            _ => return Err(format!("`{unit}` is no unit; use kB, MB, GB, KiB, MiB or GiB")),
        };
        let number: f64 = number
            .parse()
            .map_err(|_| format!("`{text}` is no size; write for example 4GB"))?;
        let bytes = number * factor as f64;
        if (1.0..1e18).contains(&bytes) {
            return Ok(ByteSize(bytes as u64));
        }
        Err(format!("`{text}` is no sensible size; write for example 4GB"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [("4GB", 4_000_000_000), ("1.5 kb", 1500), ("2MiB", 2 << 20), ("17", 17)] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
        for bad in ["", "GB", "4XB", "0", "1e9", "-1"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }
}
