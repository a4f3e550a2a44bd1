//! How long a tokenizer's steps may make a text, estimated from its file before it runs.
//!
//! A few steps that each double a text make more of a prompt than any memory holds, and the library knows no bound. The estimate
//! here is never too low and, for published tokenizers, low enough.

use base64::Engine;
use serde_json::Value;

/// A text of `n` bytes becomes one of at most `times · n + plus`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Growth {
    times: f64,
    plus: f64,
}

impl Growth {
    const NONE: Growth = Growth { times: 1.0, plus: 0.0 };

    /// A step that makes at most `times` bytes of each byte and puts `begin` bytes before each piece of the text. A text of n bytes
    /// has at most n + 1 pieces.
    fn step(times: usize, begin: usize) -> Self {
        Growth {
            times: times.max(1) as f64 + begin as f64,
            plus: begin as f64,
        }
    }

    fn then(self, next: Growth) -> Self {
        Growth {
            times: self.times * next.times,
            plus: self.plus * next.times + next.plus,
        }
    }

    /// The most bytes that become of `length`.
    pub(super) fn of(&self, length: usize) -> f64 {
        self.times * length as f64 + self.plus
    }

    /// That of a normalizer's entry and then a pre-tokenizer's.
    ///
    /// # Errors
    /// Naming a step that is of no known type.
    pub(super) fn of_steps(normalizer: &Value, pre_tokenizer: &Value) -> Result<Self, String> {
        let first = sequence(normalizer, "normalizers", normalizer_step)?;
        Ok(first.then(sequence(pre_tokenizer, "pretokenizers", pre_tokenizer_step)?))
    }
}

/// The growth by a step, or by one after the other. The file was parsed, so that they are not nested deep.
fn sequence(entry: &Value, list: &str, step: fn(&str, &Value) -> Option<Growth>) -> Result<Growth, String> {
    if entry.is_null() {
        return Ok(Growth::NONE);
    }
    let kind = entry["type"].as_str().unwrap_or_default();
    if kind != "Sequence" {
        return step(kind, entry)
            .ok_or_else(|| format!("has a step of the unknown type `{}`", crate::shown_name(kind)));
    }
    let steps = entry[list].as_array().into_iter().flatten();
    steps
        .map(|entry| sequence(entry, list, step))
        .try_fold(Growth::NONE, |growth, next| Ok(growth.then(next?)))
}

/// Unicode's largest growth in UTF-8 by the canonical forms, by the compatibility forms, and by change of case.
const CANONICAL: usize = 3;
const COMPATIBLE: usize = 11;
const CASE: usize = 2;

fn normalizer_step(kind: &str, entry: &Value) -> Option<Growth> {
    let length = |value: &Value| value.as_str().map_or(0, str::len);
    let (times, begin) = match kind {
        "Strip" | "StripAccents" | "Nmt" => (1, 0),
        "NFC" | "NFD" => (CANONICAL, 0),
        "NFKC" | "NFKD" => (COMPATIBLE, 0),
        "Lowercase" => (CASE, 0),
        // Spaces around ideographs of three bytes, then a canonical form, then lower case.
        "Bert" | "BertNormalizer" => (2 * CANONICAL * CASE, 0),
        "ByteLevel" => (2, 0),
        "Prepend" => (1, length(&entry["prepend"])),
        "Replace" => match &entry["pattern"]["String"] {
            Value::String(pattern) if !pattern.is_empty() => (length(&entry["content"]).div_ceil(pattern.len()), 0),
            // May match between any two characters, and at both ends.
            _ => (1 + length(&entry["content"]), length(&entry["content"])),
        },
        "Precompiled" => (longest_replacement(&entry["precompiled_charsmap"]), 0),
        _ => return None,
    };
    Some(Growth::step(times, begin))
}

fn pre_tokenizer_step(kind: &str, entry: &Value) -> Option<Growth> {
    let (times, begin) = match kind {
        "ByteLevel" => (2, 1),
        "Metaspace" => {
            let replacement = entry["replacement"].as_str().map_or(0, str::len);
            (replacement, replacement)
        }
        "BertPreTokenizer" | "Delimiter" | "CharDelimiterSplit" | "Whitespace" | "WhitespaceSplit" | "Split" => (1, 0),
        "Punctuation" | "Digits" | "UnicodeScripts" | "FixedLength" => (1, 0),
        _ => return None,
    };
    Some(Growth::step(times, begin))
}

/// Bytes of the longest text that SentencePiece's character map puts in the place of one character. The map is the size of a
/// trie, the trie, and the texts, each ended by a zero byte; one that cannot be read is refused by the library.
fn longest_replacement(map: &Value) -> usize {
    let bytes = base64::prelude::BASE64_STANDARD.decode(map.as_str().unwrap_or_default());
    let bytes = bytes.unwrap_or_default();
    let Some((size, rest)) = bytes.split_first_chunk::<4>() else {
        return 1;
    };
    let texts = rest
        .get(u32::from_le_bytes(*size) as usize / 4 * 4..)
        .unwrap_or_default();
    texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn growth(normalizer: Value, pre_tokenizer: Value) -> Growth {
        Growth::of_steps(&normalizer, &pre_tokenizer).unwrap()
    }

    #[test]
    fn steps_multiply() {
        assert_eq!(growth(json!(null), json!(null)).of(100), 100.0);
        // Qwen's.
        let levels = json!({"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]});
        assert_eq!(growth(json!({"type": "NFC"}), levels.clone()).of(1000), 9001.0);
        let doubled = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let nested = json!({"type": "Sequence", "normalizers": [doubled, {"type": "Sequence", "normalizers": [doubled, doubled]}]});
        assert_eq!(growth(nested, json!(null)).of(10), 80.0);
        let shrunk = json!({"type": "Replace", "pattern": {"String": "abc"}, "content": "abcd"});
        assert_eq!(growth(shrunk, json!(null)).of(9), 18.0);
        let anywhere = json!({"type": "Replace", "pattern": {"Regex": "x*"}, "content": "yy"});
        assert!(growth(anywhere, json!(null)).of(1) >= 5.0);
        let prepended = json!({"type": "Prepend", "prepend": "▁"});
        let metaspace = json!({"type": "Metaspace", "replacement": "▁"});
        assert_eq!(growth(prepended, metaspace).of(1), 45.0);
        let many = vec![json!({"type": "ByteLevel"}); 2000];
        assert_eq!(
            growth(json!({"type": "Sequence", "normalizers": many}), levels).of(1),
            f64::INFINITY
        );
        assert!(Growth::of_steps(&json!({"type": "Inflate"}), &json!(null)).is_err());
        assert!(Growth::of_steps(&json!({"content": "aa"}), &json!(null)).is_err());
    }

    #[test]
    fn the_longest_replacement_of_a_character_map_counts() {
        let map = [&8u32.to_le_bytes()[..], &[0; 8], b"ab\0abcdefg\0\0x"].concat();
        let entry =
            json!({"type": "Precompiled", "precompiled_charsmap": base64::prelude::BASE64_STANDARD.encode(map)});
        assert_eq!(growth(entry, json!(null)).of(10), 70.0);
        let broken = json!({"type": "Precompiled", "precompiled_charsmap": "?"});
        assert_eq!(growth(broken, json!(null)).of(10), 10.0);
    }
}
