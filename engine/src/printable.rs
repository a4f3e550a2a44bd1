//! Text from files on its way to a terminal.

use std::borrow::Cow;

/// Characters of a name that are shown before it is cut.
const LONGEST_NAME: usize = 200;

/// Characters of a reason: room for a list of names.
const LONGEST_REASON: usize = 2000;

/// `text` without control characters (they are written `\u{1b}`, as in Rust), so that a name in a file cannot move the cursor,
/// colour or forge what a program prints. Line breaks become spaces.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unprintable) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            '\n' | '\r' | '\t' => out.push(' '),
            character if is_unprintable(character) => out.extend(character.escape_unicode()),
            character => out.push(character),
        }
    }
    Cow::Owned(out)
}

/// A name from a file, printable and no longer than a message can hold.
pub fn shown_name(name: &str) -> Cow<'_, str> {
    shown(name, LONGEST_NAME)
}

/// What a library says of a file, which may repeat parts of it: printable and no longer than a message can hold.
pub fn shown_reason(reason: &str) -> Cow<'_, str> {
    shown(reason, LONGEST_REASON)
}

fn shown(text: &str, longest: usize) -> Cow<'_, str> {
    match text.char_indices().nth(longest) {
        None => printable(text),
        Some((end, _)) => Cow::Owned(format!("{}… ({} bytes)", printable(&text[..end]), text.len())),
    }
}

/// Control characters, and those that turn the direction of what follows.
fn is_unprintable(character: char) -> bool {
    character.is_control() || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_codes_are_written_out_and_long_names_cut() {
        assert_eq!(printable("plain, déjà vu"), "plain, déjà vu");
        assert_eq!(printable("a\x1b[2Jb\nc"), "a\\u{1b}[2Jb c");
        assert_eq!(printable("\u{202e}txt.exe"), "\\u{202e}txt.exe");
        let long = shown_name(&"é".repeat(1000)).into_owned();
        assert!(long.ends_with("… (2000 bytes)") && long.chars().count() < 230, "{long}");
    }
}
