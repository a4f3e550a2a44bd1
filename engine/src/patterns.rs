//! Patterns of tensor names: any characters, of which `*` stands for any number of any and `?` for any one; several are separated by
//! commas.

/// The patterns in a list with commas between them.
pub fn split(text: &str) -> Vec<String> {
    let patterns = text.split(',').map(str::trim).filter(|pattern| !pattern.is_empty());
    patterns.map(String::from).collect()
}

/// The patterns that fit none of `names`.
pub fn unused<'a>(patterns: &'a [String], names: &[&str]) -> Vec<&'a str> {
    let unused = patterns
        .iter()
        .filter(|pattern| !names.iter().any(|name| fits(pattern, name)));
    unused.map(String::as_str).collect()
}

/// Whether `name` fits a pattern of literal characters, `*` and `?`.
pub fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut at, mut here) = (0, 0);
    // The last star met, and where in the name what it stands for ends so far.
    let mut star: Option<(usize, usize)> = None;
    while here < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, here));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[here] => {
                at += 1;
                here += 1;
            }
            _ => {
                let Some((back, taken)) = star else { return false };
                star = Some((back, taken + 1));
                (at, here) = (back + 1, taken + 1);
            }
        }
    }
    pattern[at..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_and_question_marks_stand_for_others() {
        let patterns = split(" layers.?.*norm*,, cap_* ");
        assert_eq!(patterns, ["layers.?.*norm*", "cap_*"]);
        let fit = |name: &str| patterns.iter().any(|pattern| fits(pattern, name));
        assert!(fit("layers.3.ffn_norm1.weight") && fit("cap_pad_token"));
        assert!(!fit("layers.13.ffn_norm1.weight") && !fit("layers.3.feed_forward.w1.weight"));
        assert_eq!(unused(&patterns, &["layers.0.norm"]), ["cap_*"]);
    }
}
