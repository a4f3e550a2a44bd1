//! Changes to files of lines: CSV, JSON lines, TOML.

use crate::bytes;
use crate::json::{NUMBERS, Node, text_like};
use crate::random::Random;

/// What is put in the place of fields and lines.
const FIELDS: [&str; 16] = [
    "\"", "\"\"", ",", "a,b", "\"a\nb\"", "\"a", "a\"b", "'", "#", "=", "[", "]", "{}", "[[", "\0", "é",
];

/// Changes a file line by line. Lines that are JSON change as that.
pub fn mutate(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    match random.below(8) {
        0 => return bytes::mutate(file, other, random),
        1 => return bytes::encode(file, random),
        _ => {}
    }
    let text = String::from_utf8_lossy(file).into_owned();
    let mut lines: Vec<String> = text.split('\n').map(str::to_owned).collect();
    for _ in 0..1 + random.length(4) {
        let place = random.below(lines.len());
        match random.below(8) {
            0 => {
                let line = lines[place].clone();
                lines.insert(random.below(lines.len()), line);
            }
            1 if lines.len() > 1 => {
                lines.remove(place);
            }
            2 => lines.swap(0, place),
            3 => {
                let line = lines[place].clone();
                (0..random.length(3000)).for_each(|_| lines.push(line.clone()));
            }
            _ => change_line(&mut lines[place], random),
        }
    }
    *file = lines.join("\n").into_bytes();
}

fn change_line(line: &mut String, random: &mut Random) {
    if let Some(mut tree) = Node::parse(line.as_bytes()) {
        tree.mutate(random);
        *line = String::from_utf8_lossy(&tree.to_bytes()).into_owned();
        return;
    }
    let separator = if line.contains(" = ") { " = " } else { "," };
    let mut fields: Vec<String> = line.split(separator).map(str::to_owned).collect();
    let place = random.below(fields.len());
    match random.below(7) {
        0 => fields[place] = random.pick(&FIELDS).into(),
        1 => fields[place] = random.pick(&NUMBERS).into(),
        2 => fields[place] = text_like(&fields[place], random),
        3 => fields[place] = format!("\"{}\"", text_like(&fields[place], random)),
        4 => fields.insert(place, random.pick(&FIELDS).into()),
        5 => fields[place] = format!("[{}]", vec![fields[place].as_str(); random.length(100)].join(", ")),
        _ => {
            fields.remove(place);
        }
    }
    *line = fields.join(separator);
}
