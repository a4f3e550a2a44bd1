//! What a prompt must be, as far as it can be told without understanding it.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::LazyLock;

use super::language::Language;
use super::near::is_han;

/// How many sentences a prompt has.
const SENTENCES: RangeInclusive<usize> = 3..=5;

/// Parts between commas from which on a prompt may be a list of tags.
const TAGS: usize = 6;

/// Words of such a part, and characters of one in Chinese, that tell a tag from a clause.
const TAG_WORDS: usize = 2;
const TAG_CHARACTERS: usize = 5;

/// The share of letters that must be of the prompt's own script.
const OWN_SCRIPT: f64 = 0.85;

/// Phrases that speak to a model, or of one, and not of a picture.
const ADDRESSED: [&str; 28] = [
    "as an ai",
    "as a language model",
    "disregard all",
    "disregard previous",
    "disregard the above",
    "forget all previous",
    "forget your",
    "here are the prompts",
    "here is the prompt",
    "here is a prompt",
    "i can't assist",
    "i cannot assist",
    "ignore all instructions",
    "ignore all previous",
    "ignore all prior",
    "ignore all rules",
    "ignore previous",
    "ignore the above",
    "ignore the rules",
    "ignore your",
    "is_valid",
    "new instructions",
    "previous instructions",
    "system prompt",
    "you are now",
    "忽略以上",
    "忽略之前",
    "作为语言模型",
];

/// Titles that a person's name follows.
const TITLES: [&str; 14] = [
    "Mr",
    "Mrs",
    "Ms",
    "Miss",
    "Dr",
    "Sir",
    "Lady",
    "Lord",
    "President",
    "Senator",
    "Prince",
    "Princess",
    "King",
    "Queen",
];

/// Lists of terms that come with the program.
struct Lists {
    blocked: Vec<&'static str>,
    trademarks: Vec<&'static str>,
    people: Vec<&'static str>,
    given_names: BTreeSet<&'static str>,
}

static LISTS: LazyLock<Lists> = LazyLock::new(|| Lists {
    blocked: terms(include_str!("lists/blocked.txt")).collect(),
    trademarks: terms(include_str!("lists/trademarks.txt")).collect(),
    people: terms(include_str!("lists/artists.txt")).collect(),
    given_names: terms(include_str!("lists/names.txt")).collect(),
});

/// The terms of a list: one a line, those that begin with `#` being comments.
pub(super) fn terms(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// How many characters prompts may have, by language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// English.
    pub en: RangeInclusive<usize>,
    /// Chinese.
    pub zh: RangeInclusive<usize>,
}

impl Default for Lengths {
    fn default() -> Self {
        Lengths {
            en: 200..=350,
            zh: 60..=160,
        }
    }
}

impl Lengths {
    /// Those of a language.
    pub fn of(&self, language: Language) -> &RangeInclusive<usize> {
        match language {
            Language::En => &self.en,
            Language::Zh => &self.zh,
        }
    }
}

/// A rule that a prompt breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The rule, by its name in reports.
    pub rule: &'static str,
    /// What is wrong, with the words at fault.
    pub reason: String,
}

/// The rules of a set.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// How long prompts may be.
    pub lengths: Lengths,
    /// Terms that the user does not want either, in lower case.
    pub unwanted: Vec<String>,
}

impl Rules {
    /// The first rule that a prompt breaks.
    pub fn fault(&self, prompt: &str, language: Language, renders_text: bool) -> Option<Fault> {
        let fault = |rule, reason: String| Some(Fault { rule, reason });
        if let Some(reason) = odd_characters(prompt) {
            return fault("format", reason);
        }
        let (count, length) = (prompt.chars().count(), self.lengths.of(language));
        if !length.contains(&count) {
            return fault(
                "length",
                format!(
                    "has {count} characters, expected {} to {}",
                    length.start(),
                    length.end()
                ),
            );
        }
        let quoted = match quoted(prompt) {
            Ok(quoted) => quoted,
            Err(reason) => return fault("quoting", reason.into()),
        };
        if renders_text && quoted.iter().all(|text| text.trim().is_empty()) {
            return fault(
                "quoting",
                "names no text in quotes, which a picture of this kind has to show".into(),
            );
        }
        let plain = without(prompt, &quoted);
        if let Some(phrase) = ADDRESSED.iter().find(|phrase| holds(&prompt.to_lowercase(), phrase)) {
            return fault("addressed", format!("speaks to a model: \"{phrase}\""));
        }
        if is_tag_list(&plain, language) {
            return fault("tag list", "is a list of tags, not sentences".into());
        }
        let sentences = sentences(prompt);
        if !SENTENCES.contains(&sentences) {
            return fault(
                "sentences",
                format!(
                    "has {sentences} sentences, expected {} to {}",
                    SENTENCES.start(),
                    SENTENCES.end()
                ),
            );
        }
        if let Some(reason) = wrong_language(&plain, language) {
            return fault("language", reason);
        }
        self.term(prompt)
    }

    /// The first term of a list that a text holds.
    pub fn term(&self, text: &str) -> Option<Fault> {
        let lower = text.to_lowercase();
        let own = self.unwanted.iter().map(String::as_str);
        let lists = [
            (
                "blocked term",
                LISTS
                    .blocked
                    .iter()
                    .copied()
                    .chain(own)
                    .find(|term| holds(&lower, term)),
            ),
            (
                "trademark",
                LISTS.trademarks.iter().copied().find(|term| holds(&lower, term)),
            ),
            ("person", LISTS.people.iter().copied().find(|term| holds(&lower, term))),
        ];
        for (rule, found) in lists {
            if let Some(term) = found {
                return Some(Fault {
                    rule,
                    reason: format!("holds \"{term}\""),
                });
            }
        }
        person(text).map(|name| Fault {
            rule: "person",
            reason: format!("holds \"{name}\", which seems to be a person's name"),
        })
    }
}

/// Whether a text speaks to a model.
pub(super) fn speaks_to_a_model(text: &str) -> bool {
    let lower = text.to_lowercase();
    ADDRESSED.iter().any(|phrase| holds(&lower, phrase))
}

/// Whether a term is in a text, both in lower case: as whole words, or anywhere where it is Chinese.
fn holds(lower: &str, term: &str) -> bool {
    let whole = !term.chars().any(is_han);
    let is_word =
        |character: Option<char>| character.is_some_and(|character| character.is_alphanumeric() && !is_han(character));
    lower.match_indices(term).any(|(at, _)| {
        !whole || !is_word(lower[..at].chars().next_back()) && !is_word(lower[at + term.len()..].chars().next())
    })
}

/// Characters and marks that no prompt has.
fn odd_characters(prompt: &str) -> Option<String> {
    if let Some(character) = prompt
        .chars()
        .find(|character| character.is_control() || is_invisible(*character))
    {
        return Some(format!("holds the character {}", character.escape_unicode()));
    }
    let marks = [
        "```", "**", "##", "\\\"", "\\n", "http://", "https://", "<|", "|>", "</", "{\"", "--ar", "((",
    ];
    let found = marks.iter().find(|mark| prompt.contains(**mark))?;
    Some(format!("holds \"{found}\", which is no part of a sentence"))
}

fn is_invisible(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fffd}'
        | '\u{e0000}'..='\u{e007f}')
}

/// The texts in quotes.
fn quoted(prompt: &str) -> Result<Vec<&str>, &'static str> {
    let mut found = Vec::new();
    let mut open: Option<(char, usize)> = None;
    for (at, character) in prompt.char_indices() {
        let closes = |opened: char| {
            matches!(
                (opened, character),
                ('"', '"') | ('“', '”') | ('「', '」') | ('『', '』')
            )
        };
        match open {
            Some((opened, start)) if closes(opened) => {
                found.push(&prompt[start..at]);
                open = None;
            }
            Some(_) => {}
            None => match character {
                '"' | '“' | '「' | '『' => open = Some((character, at + character.len_utf8())),
                '”' | '」' | '』' => return Err("closes a quote that was not opened"),
                _ => {}
            },
        }
    }
    match open {
        Some(_) => Err("opens a quote that never closes"),
        None => Ok(found),
    }
}

/// The prompt without its quoted texts, which may be in any language; each is a part of `prompt`.
fn without(prompt: &str, quoted: &[&str]) -> String {
    let (mut plain, mut at) = (String::with_capacity(prompt.len()), 0);
    for text in quoted {
        let start = text.as_ptr() as usize - prompt.as_ptr() as usize;
        plain.push_str(&prompt[at..start]);
        at = start + text.len();
    }
    plain.push_str(&prompt[at..]);
    plain
}

/// How many sentences there are: marks that end one, behind which a new one begins or nothing follows.
fn sentences(prompt: &str) -> usize {
    let characters: Vec<char> = prompt.chars().collect();
    let mut count = 0;
    for (at, &character) in characters.iter().enumerate() {
        let next = characters.get(at + 1).copied();
        match character {
            '。' | '！' | '？' => count += usize::from(!matches!(next, Some('。' | '！' | '？'))),
            '.' | '!' | '?' => {
                let mut rest = characters[at + 1..]
                    .iter()
                    .skip_while(|next| matches!(next, '"' | '”' | '\'' | ')'));
                let ends = match rest.next() {
                    None => true,
                    Some(' ') => !rest.next().is_some_and(|next| next.is_lowercase()),
                    Some(_) => false,
                };
                count += usize::from(ends);
            }
            _ => {}
        }
    }
    count
}

fn is_tag_list(plain: &str, language: Language) -> bool {
    let parts: Vec<&str> = plain.split([',', ';', '，', '；', '、', '|']).map(str::trim).collect();
    if parts.len() < TAGS {
        return false;
    }
    let is_tag = |part: &&&str| match language {
        Language::En => part.split_whitespace().count() <= TAG_WORDS,
        Language::Zh => part.chars().count() <= TAG_CHARACTERS,
    };
    parts.iter().filter(is_tag).count() * 2 > parts.len()
}

fn wrong_language(plain: &str, language: Language) -> Option<String> {
    let letters = || plain.chars().filter(|character| character.is_alphabetic());
    let own = letters().filter(|character| match language {
        Language::En => character.is_ascii() || matches!(character, '\u{c0}'..='\u{24f}'),
        Language::Zh => is_han(*character),
    });
    let (own, all) = (own.count(), letters().count());
    let share = own as f64 / all.max(1) as f64;
    (share < OWN_SCRIPT).then(|| format!("is not in {}: {own} of {all} letters are", language.name()))
}

/// What seems to be a person's name.
fn person(text: &str) -> Option<String> {
    // Names from other languages, as Chinese writes them.
    let dotted = text.char_indices().find(|(at, character)| {
        let is_name = |character: Option<char>| character.is_some_and(is_han);
        *character == '·'
            && is_name(text[..*at].chars().next_back())
            && is_name(text[at + '·'.len_utf8()..].chars().next())
    });
    if let Some((at, _)) = dotted {
        let before: String = text[..at]
            .chars()
            .rev()
            .take_while(|character| is_han(*character))
            .take(4)
            .collect();
        let before: String = before.chars().rev().collect();
        let after: String = text[at..]
            .chars()
            .skip(1)
            .take_while(|character| is_han(*character))
            .take(4)
            .collect();
        return Some(format!("{before}·{after}"));
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    words.windows(2).find_map(|pair| {
        let bare = |word: &str| -> String { word.trim_matches(|character: char| !character.is_alphanumeric()).into() };
        let (first, second) = (bare(pair[0]), bare(pair[1]));
        // A mark behind the first word but a full stop, as of "Mr.", parts them.
        let together = pair[0].ends_with(|character: char| character.is_alphanumeric())
            || pair[0].ends_with('.') && first.len() < 4;
        let capital = second.chars().next().is_some_and(char::is_uppercase);
        let named = LISTS.given_names.contains(first.as_str()) || TITLES.contains(&first.as_str());
        (together && capital && named).then(|| format!("{first} {second}"))
    })
}
