//! JSON as a tree that can also hold what is no JSON, and changes to it.

use serde_json::Value;

use crate::random::Random;

/// A value, or any text in its place.
#[derive(Clone, Debug)]
pub enum Node {
    /// A number, `true`, `null`, or something that is none of these.
    Raw(String),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Node>),
    /// An object, whose keys may repeat.
    Map(Vec<(String, Node)>),
}

/// Numbers around the bounds of types and of sense, and words that some parsers take for numbers.
pub const NUMBERS: [&str; 40] = [
    "0",
    "-0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "8",
    "16",
    "64",
    "127",
    "255",
    "256",
    "1000",
    "4096",
    "65535",
    "65536",
    "1000000",
    "2147483647",
    "2147483648",
    "4294967296",
    "1099511627776",
    "9007199254740993",
    "4611686018427387904",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "0.5",
    "-0.5",
    "1e-45",
    "1e-38",
    "3e38",
    "3.5e38",
    "1e308",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
];

/// Texts that name something else, or nothing that can be named.
const TEXTS: [&str; 24] = [
    "",
    ".",
    "..",
    "../x",
    "/",
    "a/b",
    "\0",
    "\u{1b}[2J",
    "\u{202e}",
    "\u{feff}",
    "é",
    "💥",
    "null",
    "NaN",
    "-1",
    "true",
    "gelu",
    "x.safetensors",
    "/proc/version",
    "C:\\x",
    "%s%n",
    "{{ x }}",
    "a b",
    "auto",
];

impl Node {
    /// The tree of some JSON; `None` when it is none.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok().map(|value| Node::of(&value))
    }

    /// The tree of a value.
    pub fn of(value: &Value) -> Self {
        match value {
            Value::String(text) => Node::Text(text.clone()),
            Value::Array(items) => Node::List(items.iter().map(Node::of).collect()),
            Value::Object(entries) => Node::Map(
                entries
                    .iter()
                    .map(|(key, value)| (key.clone(), Node::of(value)))
                    .collect(),
            ),
            other => Node::Raw(other.to_string()),
        }
    }

    /// Appends the tree as text.
    pub fn write(&self, out: &mut String) {
        match self {
            Node::Raw(text) => out.push_str(text),
            Node::Text(text) => out.push_str(&Value::from(text.as_str()).to_string()),
            Node::List(items) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    item.write(out);
                }
                out.push(']');
            }
            Node::Map(entries) => {
                out.push('{');
                for (index, (key, value)) in entries.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    out.push_str(&Value::from(key.as_str()).to_string());
                    out.push(':');
                    value.write(out);
                }
                out.push('}');
            }
        }
    }

    /// The tree as the bytes of a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = String::new();
        self.write(&mut out);
        out.into_bytes()
    }

    fn count(&self) -> usize {
        1 + match self {
            Node::List(items) => items.iter().map(Node::count).sum(),
            Node::Map(entries) => entries.iter().map(|(_, value)| value.count()).sum::<usize>(),
            _ => 0,
        }
    }

    /// The node of this number in the order of the text.
    fn nth(&mut self, number: usize) -> &mut Node {
        if number == 0 {
            return self;
        }
        let mut left = number - 1;
        let children: Vec<&mut Node> = match self {
            Node::List(items) => items.iter_mut().collect(),
            Node::Map(entries) => entries.iter_mut().map(|(_, value)| value).collect(),
            _ => Vec::new(),
        };
        for child in children {
            let count = child.count();
            if left < count {
                return child.nth(left);
            }
            left -= count;
        }
        unreachable!("the number is below the count")
    }

    /// Changes the tree at a few places.
    pub fn mutate(&mut self, random: &mut Random) {
        for _ in 0..1 + random.length(6) {
            let count = self.count();
            let donor = self.nth(random.below(count)).clone();
            // Small lists and numbers are where the sense is; large tables are hit often enough.
            let place = self.nth(random.below(count));
            change(place, donor, random);
        }
    }
}

/// One change of a node; `donor` is another one of the same tree.
fn change(node: &mut Node, donor: Node, random: &mut Random) {
    match random.below(8) {
        0 => *node = donor,
        1 => *node = Node::Raw(random.pick(&NUMBERS).into()),
        2 => *node = any(random),
        3 if random.one_in(40) => *node = Node::Raw(nested(random)),
        _ => match node {
            Node::Raw(text) => *text = number(text, random),
            Node::Text(text) => *text = text_like(text, random),
            Node::List(items) => change_list(items, donor, random),
            Node::Map(entries) => change_map(entries, donor, random),
        },
    }
}

/// A value of any kind.
fn any(random: &mut Random) -> Node {
    match random.below(7) {
        0 => Node::Raw("null".into()),
        1 => Node::Raw("true".into()),
        2 => Node::Raw("false".into()),
        3 => Node::Text(random.pick(&TEXTS).into()),
        4 => Node::List(Vec::new()),
        5 => Node::Map(Vec::new()),
        _ => Node::Raw(random.pick(&NUMBERS).into()),
    }
}

/// Lists or maps within each other, deep.
fn nested(random: &mut Random) -> String {
    let depth = random.length(100_000);
    match random.below(3) {
        0 => "[".repeat(depth) + &"]".repeat(depth),
        1 => "{\"a\":".repeat(depth) + "1" + &"}".repeat(depth),
        _ => "[".repeat(depth),
    }
}

/// A number near the one that was there.
fn number(text: &str, random: &mut Random) -> String {
    let Ok(value) = text.parse::<i128>() else {
        return match text.parse::<f64>() {
            Ok(value) => format!("{:e}", value * [-1.0, 2.0, 0.5, 1e10, 1e-10, 1e38][random.below(6)]),
            Err(_) => random.pick(&NUMBERS).into(),
        };
    };
    let changed = match random.below(6) {
        0 => value + 1,
        1 => value - 1,
        2 => value.saturating_mul(2),
        3 => -value,
        4 => value / 2,
        _ => value ^ (1 << random.below(64)),
    };
    match random.one_in(8) {
        true => format!("{changed}.0"),
        false => changed.to_string(),
    }
}

/// A text near the one that was there.
pub fn text_like(text: &str, random: &mut Random) -> String {
    let mut characters: Vec<char> = text.chars().collect();
    let place = random.below(characters.len() + 1);
    match random.below(6) {
        0 => return random.pick(&TEXTS).into(),
        1 => characters.truncate(place),
        2 => characters.insert(
            place,
            random.pick(&['0', 'a', '.', '/', '\0', '\u{1b}', 'é', ' ', '-', '"', '\n', '💥']),
        ),
        3 => return text.repeat(1 + random.length(1000)),
        4 if place < characters.len() => {
            characters.remove(place);
        }
        _ if place < characters.len() => characters[place] = char::from(32 + random.below(95) as u8),
        _ => characters.push('x'),
    }
    characters.into_iter().collect()
}

fn change_list(items: &mut Vec<Node>, donor: Node, random: &mut Random) {
    let place = random.below(items.len());
    match random.below(6) {
        0 => items.push(donor),
        1 => items.insert(place, donor),
        2 if !items.is_empty() => {
            items.remove(place);
        }
        3 if !items.is_empty() => {
            let times = random.length(2000) / items.len().max(1);
            let copy = items.clone();
            for _ in 0..times {
                items.extend(copy.iter().cloned());
            }
        }
        4 if items.len() > 1 => items.swap(0, place),
        _ => items.truncate(place),
    }
}

fn change_map(entries: &mut Vec<(String, Node)>, donor: Node, random: &mut Random) {
    let place = random.below(entries.len());
    match random.below(6) {
        0 if !entries.is_empty() => {
            entries.remove(place);
        }
        1 if !entries.is_empty() => {
            let entry = entries[place].clone();
            entries.push(entry);
        }
        2 if !entries.is_empty() => {
            let key = entries[place].0.clone();
            entries.push((key, donor));
        }
        3 if !entries.is_empty() => entries[place].0 = text_like(&entries[place].0, random),
        4 if entries.len() > 1 => {
            let key = entries[0].0.clone();
            entries[0].0 = std::mem::replace(&mut entries[place].0, key);
        }
        _ => entries.push((random.pick(&TEXTS).into(), donor)),
    }
}
