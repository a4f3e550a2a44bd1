//! Files of prompts: a JSON object a line.

use std::path::Path;

use anyhow::{Context, bail};
use l2p_engine::flow::solver::Solver;
use l2p_engine::limits::{Budget, Pictures};
use l2p_engine::{Error, files};
use serde::de::DeserializeOwned;

/// A line of a prompt file that is not empty.
pub struct Line<T> {
    /// Its number, from 1.
    pub number: usize,
    /// What it says.
    pub content: T,
}

/// The lines of a prompt file.
///
/// # Errors
/// When it cannot be read or is not UTF-8, naming the line at fault; when it holds no prompt, or too many.
pub fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Vec<Line<T>>> {
    read_lines(path, "prompts", "{\"prompt\": \"...\"}")
}

/// The lines of a file with a JSON object a line, each such as `expected` shows one; `what` are they in words.
///
/// # Errors
/// As [`read`].
pub fn read_lines<T: DeserializeOwned>(path: &Path, what: &str, expected: &str) -> anyhow::Result<Vec<Line<T>>> {
    let text = files::read_text(path, Budget::METADATA)?;
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let number = index + 1;
        let expected = || format!("{}, line {number}: expected {expected}", path.display());
        // Serde quotes names and values of the file.
        let content = serde_json::from_str(line)
            .map_err(|error| Error::invalid(error.to_string()))
            .with_context(expected)?;
        lines.push(Line { number, content });
        if lines.len() as u64 > Pictures::MOST {
            bail!("{}: holds more than {} {what}", path.display(), Pictures::MOST);
        }
    }
    if lines.is_empty() {
        bail!(
            "{}: holds no {what}; write one JSON object per line, {expected}",
            path.display()
        );
    }
    Ok(lines)
}

/// A seed from the command line.
///
/// # Errors
/// When it is no whole number of 64 bits; of a negative one, that it means nothing here.
pub fn seed(text: &str) -> Result<u64, String> {
    let range = format!("expected a whole number from 0 to {}", u64::MAX);
    match text.strip_prefix('-') {
        Some(digits) if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => Err(format!(
            "{range}; there is no random seed (-1 in other programs): the same seed always draws the same picture, so give one"
        )),
        _ => text.parse().map_err(|_| format!("{range}, found `{text}`")),
    }
}

/// A solver from the command line.
///
/// # Errors
/// When it names none.
pub fn solver(text: &str) -> Result<Solver, String> {
    text.parse().map_err(|error: Error| error.to_string())
}

/// A word about a guidance scale below 1, which few mean.
pub fn word_on_guidance(cfg: f32) -> Option<String> {
    let effect = match cfg {
        0.0 => "ignores the prompt and draws the negative one",
        _ if cfg < 1.0 => "draws between the negative prompt and the prompt",
        _ => return None,
    };
    Some(format!(
        "cfg {cfg} {effect}; no guidance is --cfg 1 here (a guidance_scale g of diffusers' Z-Image pipeline is cfg 1 + g: its 0 is 1)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_whole_numbers_of_64_bits() {
        assert_eq!(seed("0"), Ok(0));
        assert_eq!(seed("18446744073709551615"), Ok(u64::MAX));
        assert!(seed("-1").unwrap_err().contains("no random seed"));
        for bad in ["", "-", "1.5", "18446744073709551616", "x"] {
            let message = seed(bad).unwrap_err();
            assert!(message.contains("from 0 to 18446744073709551615"), "{message}");
        }
    }

    #[test]
    fn scales_below_one_get_a_word() {
        assert!(word_on_guidance(0.0).unwrap().contains("ignores the prompt"));
        assert!(word_on_guidance(0.5).unwrap().contains("between"));
        assert_eq!((word_on_guidance(1.0), word_on_guidance(4.0)), (None, None));
    }
}
