//! Reading what a language model answered.
//!
//! An answer should be JSON and nothing else. What can be mended without guessing is: thoughts and words around the JSON, fences, an
//! object around the list, objects around the texts, a comma behind the last item. Whatever leaves room for a guess (two lists, a list
//! that is cut, texts that are no texts) is refused, and the request is made again.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

/// The most bytes of an answer that are read.
const LONGEST: usize = 1 << 20;

/// Beginnings of JSON that are tried in an answer.
const MOST_TRIED: usize = 64;

/// The most texts that a list may hold; what has more is out of control.
const MOST_TEXTS: usize = 4096;

/// Texts of an answer, with what had to be mended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    /// In their order, without line breaks and spaces at their ends.
    pub texts: Vec<String>,
    /// What was mended, in words.
    pub mended: BTreeSet<&'static str>,
}

/// An auditor's word.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Verdict {
    /// Whether the prompt may be used.
    pub is_valid: bool,
    /// Why not, or what is good about it.
    #[serde(default)]
    pub reason: String,
}

/// The list of texts that an answer holds.
///
/// # Errors
/// What is wrong with the answer, in a few words that do not quote it.
pub fn texts(answer: &str) -> Result<Texts, String> {
    let mut mended = BTreeSet::new();
    let found = values(answer, &mut mended, &|value| list_of(value).is_some())?;
    let (list, in_object) = list_of(&found).ok_or("holds no list")?;
    if in_object {
        mended.insert("an object around the list");
    }
    if list.len() > MOST_TEXTS {
        return Err(format!("holds a list of {} texts", list.len()));
    }
    let mut texts = Vec::with_capacity(list.len());
    for item in list {
        let (text, in_object) = text_of(item).ok_or("holds a list of something else than texts")?;
        if in_object {
            mended.insert("objects around the texts");
        }
        texts.push(on_one_line(text));
    }
    Ok(Texts { texts, mended })
}

/// The verdict that an answer holds.
///
/// # Errors
/// As [`texts`].
pub fn verdict(answer: &str) -> Result<Verdict, String> {
    let found = values(answer, &mut BTreeSet::new(), &|value| value.get("is_valid").is_some())?;
    let verdict: Verdict = serde_json::from_value(found)
        .map_err(|_| "holds a verdict that is not {\"is_valid\": true or false, \"reason\": text}")?;
    Ok(Verdict {
        reason: on_one_line(&verdict.reason),
        ..verdict
    })
}

/// The one value in an answer that is `wanted`.
fn values(answer: &str, mended: &mut BTreeSet<&'static str>, wanted: &dyn Fn(&Value) -> bool) -> Result<Value, String> {
    if answer.len() > LONGEST {
        return Err(format!("has more than {LONGEST} bytes"));
    }
    let text = without_thoughts(answer);
    if text.trim().is_empty() {
        return Err("is empty".into());
    }
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        return match wanted(&value) {
            true => Ok(value),
            false => Err("is JSON of another kind than was asked for".into()),
        };
    }
    let (mut found, mut cut, mut at, mut tried) = (None, false, 0, 0);
    while let Some(start) = text[at..].find(['[', '{']).map(|offset| at + offset) {
        tried += 1;
        if tried > MOST_TRIED {
            return Err("holds too many brackets to tell what is meant".into());
        }
        at = start + 1;
        let Some(end) = end_of(&text[start..]) else {
            cut = true;
            continue;
        };
        let part = &text[start..start + end];
        let strict = serde_json::from_str::<Value>(part).ok();
        let had_comma = strict.is_none();
        let Some(value) = strict.or_else(|| serde_json::from_str(&without_last_commas(part)).ok()) else {
            continue;
        };
        at = start + end;
        if !wanted(&value) {
            continue;
        }
        if found.replace(value).is_some() {
            return Err("holds more than one answer".into());
        }
        if had_comma {
            mended.insert("a comma behind the last item");
        }
        if text.trim().len() > part.len() {
            mended.insert("words around the JSON");
        }
    }
    match (found, cut) {
        (Some(value), false) => Ok(value),
        // What was found may be a part of what was meant.
        (_, true) => Err("is cut in the middle of its JSON".into()),
        (None, false) => Err("holds no JSON of the kind that was asked for".into()),
    }
}

/// What follows the thoughts of a model that thinks aloud.
fn without_thoughts(answer: &str) -> &str {
    const END: &str = "</think>";
    match (answer.trim_start().starts_with("<think>"), answer.find(END)) {
        (true, Some(end)) => &answer[end + END.len()..],
        // It has never come to the answer.
        (true, None) => "",
        _ => answer,
    }
}

/// Where the bracket that a text begins with is closed; `None` when it never is.
fn end_of(text: &str) -> Option<usize> {
    let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match (quoted, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (true, b'"') => quoted = false,
            (true, _) => {}
            (false, b'"') => quoted = true,
            (false, b'[' | b'{') => depth += 1,
            (false, b']' | b'}') => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// JSON without commas that nothing follows.
fn without_last_commas(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let (mut quoted, mut escaped) = (false, false);
    for (at, character) in text.char_indices() {
        if !quoted && character == ',' && text[at + 1..].trim_start().starts_with([']', '}']) {
            continue;
        }
        kept.push(character);
        match character {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ => {}
        }
    }
    kept
}

/// The list that a value is, or the only one in it; and whether it was in an object.
fn list_of(value: &Value) -> Option<(&Vec<Value>, bool)> {
    match value {
        Value::Array(list) => Some((list, false)),
        Value::Object(entries) => {
            let mut lists = entries.values().filter_map(Value::as_array);
            let list = lists.next()?;
            lists.next().is_none().then_some((list, true))
        }
        _ => None,
    }
}

/// The text that a value is, or the only one in it.
fn text_of(value: &Value) -> Option<(&str, bool)> {
    match value {
        Value::String(text) => Some((text, false)),
        Value::Object(entries) => {
            let mut texts = entries.values().filter_map(Value::as_str);
            let text = texts.next()?;
            texts.next().is_none().then_some((text, true))
        }
        _ => None,
    }
}

/// A text with one space for each run of spaces and line breaks.
fn on_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(answer: &str) -> Result<Vec<String>, String> {
        texts(answer).map(|texts| texts.texts)
    }

    #[test]
    fn what_is_safe_is_mended() {
        let expected = vec!["a \"b\" [c]".to_owned(), "d".to_owned()];
        for answer in [
            r#"["a \"b\" [c]", "d"]"#,
            "Here you are:\n```json\n[\"a \\\"b\\\" [c]\", \"d\"]\n```\nEnjoy!",
            r#"{"prompts": ["a \"b\" [c]", "d"]}"#,
            r#"["a \"b\" [c]", "d",]"#,
            r#"[{"prompt": "a \"b\" [c]"}, {"prompt": "d"}]"#,
            "<think>maybe [\"x\"]?</think>[\"a \\\"b\\\" [c]\", \" d\\n\"]",
            r#"{"count": 2, "prompts": ["a \"b\" [c]", "d", ], }"#,
        ] {
            assert_eq!(of(answer), Ok(expected.clone()), "{answer}");
        }
        let mended = texts("Sure: [\"a\",]").unwrap().mended;
        assert_eq!(mended.len(), 2, "{mended:?}");
        assert_eq!(of("[]"), Ok(vec![]));
        assert_eq!(of("[\"a,]\", \"b\\\\\",]"), Ok(vec!["a,]".into(), "b\\".into()]));
    }

    #[test]
    fn what_leaves_room_for_a_guess_is_refused() {
        for (answer, word) in [
            ("", "empty"),
            ("  \n", "empty"),
            ("<think>on and on", "empty"),
            ("I cannot do that.", "no JSON"),
            ("[\"a\", \"b", "cut"),
            ("[\"a\", \"b\"", "cut"),
            ("[\"a\"] or rather [\"b\"]", "more than one"),
            ("\"a\"", "another kind"),
            ("[1, 2]", "something else than texts"),
            ("[[\"a\"]]", "something else than texts"),
            ("{\"a\": [\"x\"], \"b\": [\"y\"]}", "another kind"),
            ("[{\"a\": \"x\", \"b\": \"y\"}]", "something else"),
        ] {
            let found = of(answer).unwrap_err();
            assert!(found.contains(word), "{answer}: {found}");
        }
        assert!(of(&"[".repeat(1000)).is_err());
        assert!(
            of(&format!("[{}\"\"]", "\"\",".repeat(5000)))
                .unwrap_err()
                .contains("5001")
        );
    }

    #[test]
    fn verdicts_are_read_to_the_letter() {
        let valid = verdict("{\"is_valid\": true, \"reason\": \"fine\\nand good\"}").unwrap();
        assert_eq!((valid.is_valid, valid.reason.as_str()), (true, "fine and good"));
        assert!(!verdict("Verdict: {\"is_valid\": false}").unwrap().is_valid);
        for bad in [
            "{\"is_valid\": \"true\", \"reason\": \"\"}",
            "{\"is_valid\": 1}",
            "true",
            "{\"valid\": true}",
            "{\"is_valid\": true",
            "{\"is_valid\": true} {\"is_valid\": false}",
        ] {
            assert!(verdict(bad).is_err(), "{bad}");
        }
    }
}
