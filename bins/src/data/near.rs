//! Prompts that say nearly the same.
//!
//! Two texts are as alike as the sets of their shingles (three words, or three Chinese characters, that follow each other): the size of
//! the intersection over that of the union. A new text is compared with those that share a band of MinHash values with it, and with these
//! exactly, so that a text is never taken for a copy that is none. Source: Broder, "On the resemblance and containment of documents",
//! 1997; bands: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", § 3.4.

use std::collections::{HashMap, HashSet};

use super::dice::{hash, mixed};

/// Words or characters of a shingle.
const SHINGLE: usize = 3;

/// Bands, and the values of each. Texts that are half alike share one with a probability of 1 − (1 − 0.5³)⁶⁴ = 0.9998.
const BANDS: usize = 64;
const ROWS: usize = 3;

/// The texts so far.
#[derive(Clone, Debug)]
pub struct Near {
    /// From which likeness on one is a copy.
    threshold: f64,
    /// The shingles of each, sorted.
    shingles: Vec<Vec<u64>>,
    /// Who has these values in this band.
    bands: HashMap<(u8, u64), Vec<u32>>,
}

impl Near {
    /// None; a text is a copy of one that is at least so alike, from 0 to 1.
    pub fn new(threshold: f64) -> Self {
        Near {
            threshold,
            shingles: Vec::new(),
            bands: HashMap::new(),
        }
    }

    /// The number of a text that this one is a copy of, counted in the order in which they were added.
    pub fn copy_of(&self, text: &str) -> Option<usize> {
        let own = shingles(text);
        let mut seen = HashSet::new();
        for key in band_keys(&own) {
            for &number in self.bands.get(&key).into_iter().flatten() {
                if seen.insert(number) && likeness(&own, &self.shingles[number as usize]) >= self.threshold {
                    return Some(number as usize);
                }
            }
        }
        None
    }

    /// Adds a text.
    pub fn add(&mut self, text: &str) {
        let own = shingles(text);
        let number = self.shingles.len() as u32;
        for key in band_keys(&own) {
            self.bands.entry(key).or_default().push(number);
        }
        self.shingles.push(own);
    }
}

/// How alike two sets of shingles are, from 0 to 1.
fn likeness(a: &[u64], b: &[u64]) -> f64 {
    let (mut shared, mut at) = (0usize, 0);
    for value in a {
        while at < b.len() && b[at] < *value {
            at += 1;
        }
        shared += usize::from(b.get(at) == Some(value));
    }
    match a.len() + b.len() - shared {
        0 => 1.0,
        all => shared as f64 / all as f64,
    }
}

/// The hashes of a text's shingles, sorted, each once. Case and marks between words do not count.
fn shingles(text: &str) -> Vec<u64> {
    let lower = text.to_lowercase();
    let mut words: Vec<&str> = Vec::new();
    for word in lower.split(|character: char| !character.is_alphanumeric()) {
        // A run of Chinese has no spaces: each character is a word.
        let mut start = 0;
        for (at, character) in word.char_indices() {
            if is_han(character) {
                words.extend([&word[start..at], &word[at..at + character.len_utf8()]]);
                start = at + character.len_utf8();
            }
        }
        words.push(&word[start..]);
    }
    words.retain(|word| !word.is_empty());
    let join = |part: &[&str]| hash(0, part.join(" ").as_bytes());
    let mut found: Vec<u64> = match words.len() {
        0 => Vec::new(),
        1..SHINGLE => vec![join(&words)],
        _ => words.windows(SHINGLE).map(join).collect(),
    };
    found.sort_unstable();
    found.dedup();
    found
}

/// Whether a character is one of Chinese script.
pub(super) fn is_han(character: char) -> bool {
    matches!(character, '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{323af}')
}

fn band_keys(shingles: &[u64]) -> impl Iterator<Item = (u8, u64)> {
    (0..BANDS).map(move |band| {
        let rows = (0..ROWS).map(|row| {
            let seed = mixed((band * ROWS + row) as u64 + 1);
            shingles.iter().map(|shingle| mixed(shingle ^ seed)).min().unwrap_or(0)
        });
        (band as u8, rows.fold(0, |key, least| mixed(key ^ least)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::dice::Dice;

    fn alike(a: &str, b: &str) -> f64 {
        likeness(&shingles(a), &shingles(b))
    }

    /// The likeness by sets of strings, as the definition has it.
    fn exact(a: &str, b: &str) -> f64 {
        let set = |text: &str| -> HashSet<Vec<String>> {
            let words: Vec<String> = text.to_lowercase().split_whitespace().map(String::from).collect();
            words.windows(SHINGLE).map(<[String]>::to_vec).collect()
        };
        let (a, b) = (set(a), set(b));
        a.intersection(&b).count() as f64 / a.union(&b).count() as f64
    }

    #[test]
    fn copies_are_those_of_the_exact_measure() {
        let mut dice = Dice::new(3, "near", 0);
        let vocabulary: Vec<String> = (0..400).map(|index| format!("w{index}")).collect();
        let (mut near, mut texts, mut copies, mut missed) = (Near::new(0.5), Vec::<String>::new(), 0, 0);
        for _ in 0..600 {
            let mut words: Vec<String> = match texts.len() {
                0 => Vec::new(),
                count => texts[dice.below(count)].split(' ').map(String::from).collect(),
            };
            words.resize_with(50, String::new);
            // From nearly the same to nothing in common.
            for _ in 0..dice.below(40) {
                words[dice.below(50)] = vocabulary[dice.below(400)].clone();
            }
            words
                .iter_mut()
                .filter(|word| word.is_empty())
                .for_each(|word| *word = vocabulary[dice.below(400)].clone());
            let text = words.join(" ");
            let expected = texts.iter().any(|other| exact(&text, other) >= 0.5);
            let found = near.copy_of(&text);
            if let Some(number) = found {
                assert!((alike(&text, &texts[number]) - exact(&text, &texts[number])).abs() < 1e-12);
                assert!(exact(&text, &texts[number]) >= 0.5);
            }
            copies += usize::from(expected);
            missed += usize::from(expected && found.is_none());
            near.add(&text);
            texts.push(text);
        }
        assert!(copies > 100 && copies < 500, "{copies}");
        assert!(missed * 500 <= copies, "{missed} of {copies}");
    }

    #[test]
    fn case_marks_and_scripts() {
        let mut near = Near::new(0.5);
        near.add("A red fox stands in the snow, at dawn.");
        near.add("一只狐狸站在雪地里，天色刚亮。");
        assert_eq!(near.copy_of("a red FOX stands in the snow at dawn"), Some(0));
        assert_eq!(near.copy_of("一只狐狸站在雪地里！天色刚亮"), Some(1));
        assert_eq!(near.copy_of("A blue boat lies on the sand at noon."), None);
        assert_eq!(alike("", ""), 1.0);
        assert_eq!(alike("fox", "fox"), 1.0);
        assert_eq!(alike("fox", ""), 0.0);
    }
}
