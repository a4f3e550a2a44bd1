//! Answers in JSON of a given shape, held to it byte by byte while they are written.
//!
//! A [`Guide`] stands somewhere in an answer and says which byte may come next; [`masks`] makes of it which tokens may. What it lets
//! through is JSON of the shape and nothing around it: no white space but one space behind a comma or colon, texts in valid UTF-8 whose
//! escapes stand for characters. A guide knows how many bytes an answer needs at least from where it stands, so that an answer can be
//! held to a number of tokens as well: near its end only what closes it is let through.

mod masks;

pub use masks::{Masks, TokenTable};

use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::error::{Error, Result};

/// The shape of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum JsonShape {
    /// A list of texts.
    Texts {
        /// How many.
        count: RangeInclusive<u32>,
        /// The characters of each.
        characters: RangeInclusive<u32>,
    },
    /// An object with these keys in this order.
    Object(Vec<(String, JsonKind)>),
}

/// What stands behind a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum JsonKind {
    /// `true` or `false`.
    Flag,
    /// A text of so many characters.
    Text(RangeInclusive<u32>),
}

/// A shape as a sequence of parts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Grammar {
    nodes: Vec<Node>,
    /// Bytes that the parts from each on need at least; one more entry than parts.
    least: Vec<usize>,
}

#[derive(Debug, PartialEq, Eq)]
enum Node {
    Literal(Vec<u8>),
    /// One space, or none.
    Space,
    Flag,
    Text(Bounds),
    /// Texts and the commas between them, up to the bracket that closes the list.
    Items {
        count: Bounds,
        text: Bounds,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bounds {
    least: u32,
    most: u32,
}

/// A place in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    node: u16,
    at: At,
    /// Of the text so far.
    characters: u32,
    /// Of the list so far, the open one included.
    items: u32,
}

/// A place in a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Start,
    /// So many bytes of a literal, or of `true`, or of `false`, are there.
    Literal(u16),
    True(u8),
    False(u8),
    /// In a text, between characters.
    Inside,
    /// Behind a backslash.
    Escape,
    /// Behind so many digits of `\u`; the first was a `d`, which begins half a character where a larger digit follows than 7.
    Hex {
        digits: u8,
        high: bool,
    },
    /// In a character of several bytes, of which so many are left; the next lies in a range.
    Utf8 {
        left: u8,
        low: u8,
        high: u8,
    },
    /// Behind a text of a list, a comma, and its space.
    After,
    Comma,
    Gap,
}

impl Bounds {
    fn of(range: &RangeInclusive<u32>, what: &str) -> Result<Self> {
        match range.is_empty() {
            true => Err(Error::invalid(format!(
                "a JSON answer: {} to {} {what} are none",
                range.start(),
                range.end()
            ))),
            false => Ok(Bounds {
                least: *range.start(),
                most: *range.end(),
            }),
        }
    }
}

impl Grammar {
    fn new(shape: &JsonShape) -> Result<Self> {
        let nodes = match shape {
            JsonShape::Texts { count, characters } => vec![
                Node::Literal(b"[".to_vec()),
                Node::Items {
                    count: Bounds::of(count, "texts")?,
                    text: Bounds::of(characters, "characters")?,
                },
            ],
            JsonShape::Object(entries) => object(entries)?,
        };
        let mut least = vec![0; nodes.len() + 1];
        for (index, node) in nodes.iter().enumerate().rev() {
            least[index] = least[index + 1] + node.least();
        }
        Ok(Grammar { nodes, least })
    }

    const START: State = State {
        node: 0,
        at: At::Start,
        characters: 0,
        items: 0,
    };

    fn is_done(&self, state: &State) -> bool {
        usize::from(state.node) >= self.nodes.len()
    }

    /// The place behind `byte`, `None` where it may not come.
    fn step(&self, state: State, byte: u8) -> Option<State> {
        let next = State {
            node: state.node + 1,
            at: At::Start,
            ..Self::START
        };
        let stay = |at| Some(State { at, ..state });
        match (self.nodes.get(usize::from(state.node))?, state.at) {
            (Node::Space, _) if byte == b' ' => Some(next),
            (Node::Space, _) => self.step(next, byte),
            (Node::Literal(bytes), at) => {
                let offset = if let At::Literal(offset) = at { offset } else { 0 };
                match bytes.get(usize::from(offset)) == Some(&byte) {
                    true if usize::from(offset) + 1 == bytes.len() => Some(next),
                    true => stay(At::Literal(offset + 1)),
                    false => None,
                }
            }
            (Node::Flag, At::Start) => match byte {
                b't' => stay(At::True(1)),
                b'f' => stay(At::False(1)),
                _ => None,
            },
            (Node::Flag, At::True(offset)) => word(b"true", offset, byte, next, |offset| stay(At::True(offset))),
            (Node::Flag, At::False(offset)) => word(b"false", offset, byte, next, |offset| stay(At::False(offset))),
            (Node::Flag, _) => None,
            (Node::Text(_), At::Start) => (byte == b'"').then_some(State {
                at: At::Inside,
                characters: 0,
                ..state
            }),
            (Node::Text(text), _) => match in_text(state, *text, byte)? {
                InText::Closed => Some(next),
                InText::Open(state) => Some(state),
            },
            (Node::Items { count, text }, at) => items(state, at, *count, *text, byte, next),
        }
    }

    /// Bytes that an answer needs at least from here on.
    fn least_from(&self, state: &State) -> usize {
        let index = usize::from(state.node);
        let Some(node) = self.nodes.get(index) else { return 0 };
        let after = self.least[index + 1];
        let missing = |bounds: &Bounds| bounds.least.saturating_sub(state.characters) as usize;
        let pending = match state.at {
            At::Escape => 1,
            At::Hex { digits, .. } => 4 - usize::from(digits),
            At::Utf8 { left, .. } => usize::from(left),
            _ => 0,
        };
        let here = match (node, state.at) {
            (_, At::Start) => return self.least[index],
            (Node::Literal(bytes), At::Literal(offset)) => bytes.len() - usize::from(offset),
            (_, At::True(offset)) => 4 - usize::from(offset),
            (_, At::False(offset)) => 5 - usize::from(offset),
            (Node::Text(text), _) => pending + missing(text) + 1,
            (Node::Items { count, text }, at) => {
                let one = text.least as usize + 2;
                let left = count.least.saturating_sub(state.items) as usize * (one + 1);
                match at {
                    At::After => left + 1,
                    // The item that the comma announces may be one more than there have to be.
                    At::Comma | At::Gap => (left.max(one + 1) - 1) + 1,
                    _ => pending + missing(text) + 1 + left + 1,
                }
            }
            _ => 0,
        };
        here + after
    }

    /// How many bytes more than before an answer may need after a token with so many quotation marks.
    fn growth(&self, quotes: usize) -> usize {
        /// A backslash before a `u` promises this many; the first byte of a character three.
        const OF_A_CHARACTER: usize = 6;
        let optional = |node: &Node| match node {
            Node::Items { count, text } if count.least < count.most => (quotes / 2 + 2) * (text.least as usize + 3),
            _ => 0,
        };
        OF_A_CHARACTER + self.nodes.iter().map(optional).sum::<usize>()
    }

    /// A place from which the same tokens may follow, as long as none has more bytes than `longest` or more than `quotes` quotation
    /// marks: counts matter only near their bounds.
    fn alike(&self, state: State, longest: usize, quotes: usize) -> State {
        let far = |count: u32, bounds: Bounds, reach: usize| {
            let reach = u32::try_from(reach).unwrap_or(u32::MAX);
            match count.saturating_add(reach) {
                // Any count from here on is below the least one; then none is above the most.
                ahead if ahead < bounds.least => 0,
                ahead if count >= bounds.least && ahead < bounds.most => bounds.least,
                _ => count,
            }
        };
        match self.nodes.get(usize::from(state.node)) {
            Some(Node::Text(text)) => State {
                characters: far(state.characters, *text, longest),
                ..state
            },
            Some(Node::Items { count, text }) => State {
                characters: far(state.characters, *text, longest),
                items: match state.at {
                    At::Start => state.items,
                    // Never as if it were the first: that one is not behind a comma.
                    _ => far(state.items, *count, quotes + 1).max(1),
                },
                ..state
            },
            _ => state,
        }
    }
}

impl Node {
    fn least(&self) -> usize {
        let text = |bounds: &Bounds| bounds.least as usize + 2;
        match self {
            Node::Literal(bytes) => bytes.len(),
            Node::Space => 0,
            Node::Flag => 4,
            Node::Text(bounds) => text(bounds),
            Node::Items { count, text: of_each } => {
                let count = count.least as usize;
                count * text(of_each) + count.saturating_sub(1) + 1
            }
        }
    }
}

/// The parts of an object.
fn object(entries: &[(String, JsonKind)]) -> Result<Vec<Node>> {
    let mut nodes = Vec::new();
    for (index, (key, kind)) in entries.iter().enumerate() {
        if entries[..index].iter().any(|(other, _)| other == key) {
            return Err(Error::invalid(format!("a JSON answer has the key `{key}` twice")));
        }
        match index {
            0 => nodes.push(Node::Literal(b"{".to_vec())),
            _ => nodes.extend([Node::Literal(b",".to_vec()), Node::Space]),
        }
        let key = serde_json::Value::from(key.as_str()).to_string();
        nodes.extend([Node::Literal(format!("{key}:").into_bytes()), Node::Space]);
        nodes.push(match kind {
            JsonKind::Flag => Node::Flag,
            JsonKind::Text(characters) => Node::Text(Bounds::of(characters, "characters")?),
        });
    }
    match nodes.is_empty() {
        true => nodes.push(Node::Literal(b"{}".to_vec())),
        false => nodes.push(Node::Literal(b"}".to_vec())),
    }
    Ok(nodes)
}

/// A byte of a word.
fn word(word: &[u8], offset: u8, byte: u8, next: State, stay: impl FnOnce(u8) -> Option<State>) -> Option<State> {
    match word.get(usize::from(offset)) == Some(&byte) {
        true if usize::from(offset) + 1 == word.len() => Some(next),
        true => stay(offset + 1),
        false => None,
    }
}

/// Where a byte of a text leads.
enum InText {
    Closed,
    Open(State),
}

fn in_text(state: State, bounds: Bounds, byte: u8) -> Option<InText> {
    let open = |at| Some(InText::Open(State { at, ..state }));
    match state.at {
        At::Inside if byte == b'"' => (state.characters >= bounds.least).then_some(InText::Closed),
        At::Inside => {
            let utf8 = |left, low, high| At::Utf8 { left, low, high };
            let at = match byte {
                b'\\' => At::Escape,
                0x20..=0x7e => At::Inside,
                0xc2..=0xdf => utf8(1, 0x80, 0xbf),
                0xe0 => utf8(2, 0xa0, 0xbf),
                0xed => utf8(2, 0x80, 0x9f),
                0xe1..=0xef => utf8(2, 0x80, 0xbf),
                0xf0 => utf8(3, 0x90, 0xbf),
                0xf1..=0xf3 => utf8(3, 0x80, 0xbf),
                0xf4 => utf8(3, 0x80, 0x8f),
                _ => return None,
            };
            let characters = state.characters + 1;
            (characters <= bounds.most).then_some(InText::Open(State {
                at,
                characters,
                ..state
            }))
        }
        At::Escape => match byte {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => open(At::Inside),
            b'u' => open(At::Hex { digits: 0, high: false }),
            _ => None,
        },
        At::Hex { digits, high } => {
            let half = digits == 1 && high && !(b'0'..=b'7').contains(&byte);
            match byte.is_ascii_hexdigit() && !half {
                true if digits == 3 => open(At::Inside),
                true => open(At::Hex {
                    digits: digits + 1,
                    high: digits == 0 && byte.eq_ignore_ascii_case(&b'd'),
                }),
                false => None,
            }
        }
        At::Utf8 { left, low, high } if (low..=high).contains(&byte) => open(match left {
            1 => At::Inside,
            _ => At::Utf8 {
                left: left - 1,
                low: 0x80,
                high: 0xbf,
            },
        }),
        _ => None,
    }
}

fn items(state: State, at: At, count: Bounds, text: Bounds, byte: u8, next: State) -> Option<State> {
    let begun = State {
        at: At::Inside,
        characters: 0,
        items: state.items + 1,
        ..state
    };
    let stay = |at| Some(State { at, ..state });
    match (at, byte) {
        (At::Start, b'"') => (count.most > 0).then_some(begun),
        (At::Start, b']') => (count.least == 0).then_some(next),
        (At::After, b',') if state.items < count.most => stay(At::Comma),
        (At::After, b']') => (state.items >= count.least).then_some(next),
        (At::Comma, b' ') => stay(At::Gap),
        (At::Comma | At::Gap, b'"') => Some(begun),
        (At::Start | At::After | At::Comma | At::Gap, _) => None,
        _ => match in_text(state, text, byte)? {
            InText::Closed => Some(State {
                at: At::After,
                characters: 0,
                ..state
            }),
            InText::Open(state) => Some(state),
        },
    }
}

/// A place in an answer of some shape.
#[derive(Clone, Debug)]
pub struct Guide {
    grammar: Arc<Grammar>,
    state: State,
}

impl Guide {
    /// The beginning of an answer.
    ///
    /// # Errors
    /// When no answer has the shape.
    pub fn new(shape: &JsonShape) -> Result<Self> {
        Ok(Guide {
            grammar: Arc::new(Grammar::new(shape)?),
            state: Grammar::START,
        })
    }

    /// Goes on behind these bytes; stays and gives false where they may not come.
    pub fn advance(&mut self, bytes: &[u8]) -> bool {
        let end = bytes
            .iter()
            .try_fold(self.state, |state, &byte| self.grammar.step(state, byte));
        if let Some(state) = end {
            self.state = state;
        }
        end.is_some()
    }

    /// Whether the answer is complete.
    pub fn is_done(&self) -> bool {
        self.grammar.is_done(&self.state)
    }

    /// Bytes that the rest of the answer has at least.
    pub fn least_bytes(&self) -> usize {
        self.grammar.least_from(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(count: RangeInclusive<u32>, characters: RangeInclusive<u32>) -> JsonShape {
        JsonShape::Texts { count, characters }
    }

    fn verdict() -> JsonShape {
        let text = JsonKind::Text(0..=20);
        JsonShape::Object(vec![("is_valid".into(), JsonKind::Flag), ("reason".into(), text)])
    }

    /// Whether a whole text is an answer of the shape.
    fn is_answer(shape: &JsonShape, text: &str) -> bool {
        let mut guide = Guide::new(shape).unwrap();
        guide.advance(text.as_bytes()) && guide.is_done()
    }

    #[test]
    fn answers_of_the_shape_pass_and_no_others() {
        for (shape, text, expected) in [
            (texts(2..=2, 1..=5), r#"["a", "bcdef"]"#, true),
            (texts(2..=2, 1..=5), r#"["a","b"]"#, true),
            (texts(2..=2, 1..=5), r#"["a"]"#, false),
            (texts(2..=2, 1..=5), r#"["a","b","c"]"#, false),
            (texts(2..=2, 1..=5), r#"["","b"]"#, false),
            (texts(2..=2, 1..=5), r#"["a","bcdefg"]"#, false),
            (texts(2..=2, 1..=5), r#"["a",  "b"]"#, false),
            (texts(2..=2, 1..=5), r#"["a" ,"b"]"#, false),
            (texts(2..=2, 1..=5), r#"["a","b"] "#, false),
            (texts(0..=1, 0..=5), "[]", true),
            (texts(0..=0, 0..=5), r#"[""]"#, false),
            (texts(1..=3, 0..=5), r#"["",""]"#, true),
            (texts(1..=1, 5..=5), r#"["é日🎈\n\u00e9"]"#, true),
            (texts(1..=1, 4..=4), r#"["é日🎈\n\u00e9"]"#, false),
            (texts(1..=1, 1..=1), r#"["\ud7ff"]"#, true),
            (texts(1..=1, 1..=1), r#"["\ud800"]"#, false),
            (texts(1..=1, 1..=1), r#"["\x41"]"#, false),
            (texts(1..=1, 1..=1), "[\"\n\"]", false),
            (verdict(), r#"{"is_valid": true, "reason": "fine"}"#, true),
            (verdict(), r#"{"is_valid":false,"reason":""}"#, true),
            (verdict(), r#"{"is_valid":maybe,"reason":""}"#, false),
            (verdict(), r#"{"reason":"","is_valid":true}"#, false),
            (verdict(), r#"{"is_valid":true}"#, false),
            (JsonShape::Object(Vec::new()), "{}", true),
        ] {
            assert_eq!(is_answer(&shape, text), expected, "{shape:?}: {text}");
            if expected {
                serde_json::from_str::<serde_json::Value>(text).unwrap();
            }
        }
        let mut cut = Guide::new(&texts(1..=1, 1..=9)).unwrap();
        assert!(cut.advance(b"[\"\xe6\x97") && !cut.advance(b"\"") && cut.advance(b"\xa5\"]") && cut.is_done());
        for bytes in [
            &b"[\"\xc0\x80"[..],
            b"[\"\xed\xa0\x80",
            b"[\"\xf4\x90",
            b"[\"\xff",
            b"[\"\x80",
        ] {
            assert!(!Guide::new(&texts(1..=1, 1..=9)).unwrap().advance(bytes), "{bytes:?}");
        }
    }

    /// From every place the least number of bytes is that of a shortest way to the end, found by trying.
    #[test]
    fn the_least_bytes_are_those_of_the_shortest_end() {
        let alphabet = br#"[]{},: "\u0dtruefalsisv_don"#;
        for shape in [texts(0..=3, 1..=2), texts(2..=2, 0..=1), texts(1..=2, 3..=3), verdict()] {
            let start = Guide::new(&shape).unwrap();
            let mut seen = std::collections::HashMap::from([(start.state, ())]);
            let mut places = vec![start.state];
            let mut ways = Vec::new();
            while let Some(state) = places.pop() {
                for byte in alphabet.iter().copied().chain([0xc3, 0xa9, 0xe6, 0x97, 0xf0, 0x9f]) {
                    let Some(next) = start.grammar.step(state, byte) else {
                        continue;
                    };
                    ways.push((state, next));
                    if seen.insert(next, ()).is_none() {
                        places.push(next);
                    }
                }
            }
            // Lengths of the shortest ways back from the end.
            let mut lengths = std::collections::HashMap::new();
            for state in seen.keys().filter(|state| start.grammar.is_done(state)) {
                lengths.insert(*state, 0usize);
            }
            for length in 1..200 {
                for (from, to) in &ways {
                    if lengths.get(to) == Some(&(length - 1)) {
                        lengths.entry(*from).or_insert(length);
                    }
                }
            }
            for state in seen.keys() {
                let least = start.grammar.least_from(state);
                assert_eq!(lengths.get(state), Some(&least), "{shape:?}: {state:?}");
            }
            assert!(seen.len() > 10);
        }
    }

    #[test]
    fn shapes_without_answers_are_refused() {
        let none = texts(RangeInclusive::new(3, 2), 0..=1);
        let message = Guide::new(&none).unwrap_err().to_string();
        assert_eq!(message, "a JSON answer: 3 to 2 texts are none");
        let twice = JsonShape::Object(vec![("a".into(), JsonKind::Flag), ("a".into(), JsonKind::Flag)]);
        assert!(Guide::new(&twice).unwrap_err().to_string().contains("`a` twice"));
    }
}
