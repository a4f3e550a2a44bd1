//! A chat template's source before it is compiled: bounds on how deep it nests, and a guard around what it keeps in namespaces.

use minijinja::machinery::{Span, Token, Tokenizer};
use minijinja::syntax::SyntaxConfig;

use super::{NAME, PLAIN, describe};
use crate::limits::{Budget, TEMPLATE_BRANCHES, TEMPLATE_OPERATORS};

/// The source with every value that it gives an attribute passed through the filter [`PLAIN`]. Only namespaces have attributes
/// that can be set, and one that came to hold itself would overflow any stack when it is printed.
///
/// The library parses, compiles and drops operators and branches by recursion, and its own bound does not see all of them.
///
/// # Errors
/// When the source is too long or nests too deep, or cannot be split into tokens.
pub(super) fn guarded(source: &str, syntax: &SyntaxConfig) -> Result<String, String> {
    if source.len() as u64 > Budget::CHAT_TEMPLATE.bytes {
        let (length, most) = (source.len(), Budget::CHAT_TEMPLATE.bytes);
        return Err(format!(
            "it has {length} bytes, more than the {most} that a chat template may have"
        ));
    }
    let mut tokens = Tokenizer::new(source, NAME, false, syntax.clone());
    let mut edited = Edited::new(source);
    let mut tag = Tag::default();
    let mut branches = 0;
    while let Some((token, span)) = tokens.next_token().map_err(|error| describe(&error))? {
        if matches!(token, Token::VariableStart | Token::BlockStart) {
            tag = Tag::default();
            continue;
        }
        branches += usize::from(tag.tokens == 0 && matches!(token, Token::Ident("elif")));
        tag.add(&token, &span, &mut edited);
        let line = span.start_line;
        if tag.operators > TEMPLATE_OPERATORS {
            return Err(format!(
                "the expression in line {line} has more than {TEMPLATE_OPERATORS} operators"
            ));
        }
        if branches > TEMPLATE_BRANCHES {
            return Err(format!("it has more than {TEMPLATE_BRANCHES} `elif` branches"));
        }
    }
    Ok(edited.finish())
}

/// A source and what is inserted into it.
struct Edited<'a> {
    source: &'a str,
    text: String,
    copied: usize,
}

impl<'a> Edited<'a> {
    fn new(source: &'a str) -> Self {
        Edited {
            source,
            text: String::with_capacity(source.len() + 64),
            copied: 0,
        }
    }

    /// Inserts `text` before the byte `place`; places only grow.
    fn insert(&mut self, place: u32, text: &str) {
        self.text += self.source.get(self.copied..place as usize).unwrap_or_default();
        self.copied = place as usize;
        self.text += text;
    }

    fn finish(mut self) -> String {
        self.text += self.source.get(self.copied..).unwrap_or_default();
        self.text
    }
}

/// What was seen of one tag.
#[derive(Default)]
struct Tag {
    tokens: usize,
    operators: usize,
    setting: Setting,
}

/// Where in a `set` tag the tokens are.
#[derive(Default, Clone, Copy, PartialEq)]
enum Setting {
    /// In another tag, or one that sets plain variables.
    #[default]
    No,
    /// In the target, which has no attribute so far.
    Target,
    /// In the target, which has one.
    Attribute,
    /// Behind the `=`.
    Assigned,
    /// In the value.
    Value,
    /// In the filters of `{% set name.attribute | filter %}`.
    Filters,
}

impl Tag {
    fn add(&mut self, token: &Token<'_>, span: &Span, edited: &mut Edited<'_>) {
        self.operators += usize::from(can_nest(token));
        self.setting = match (self.setting, token) {
            (Setting::No, Token::Ident("set")) if self.tokens == 0 => Setting::Target,
            (Setting::Target, Token::Dot) => Setting::Attribute,
            (Setting::Target, Token::Assign | Token::Pipe) => Setting::No,
            (Setting::Attribute, Token::Assign) => Setting::Assigned,
            (Setting::Attribute, Token::Pipe) => Setting::Filters,
            (Setting::Value, Token::BlockEnd) => {
                edited.insert(span.start_offset, &format!(")|{PLAIN} "));
                Setting::No
            }
            (Setting::Filters, Token::BlockEnd) => {
                edited.insert(span.start_offset, &format!("|{PLAIN} "));
                Setting::No
            }
            (Setting::Assigned, Token::BlockEnd) => Setting::No,
            (Setting::Assigned, _) => {
                edited.insert(span.start_offset, "(");
                Setting::Value
            }
            (setting, _) => setting,
        };
        self.tokens += 1;
    }
}

/// Whether an expression may nest once more where this token stands.
fn can_nest(token: &Token<'_>) -> bool {
    match token {
        Token::Ident(name) => matches!(*name, "not" | "and" | "or" | "in" | "is" | "if"),
        Token::Plus
        | Token::Minus
        | Token::Mul
        | Token::Div
        | Token::FloorDiv
        | Token::Pow
        | Token::Mod
        | Token::Tilde => true,
        Token::Eq | Token::Ne | Token::Gt | Token::Gte | Token::Lt | Token::Lte => true,
        Token::Dot | Token::Pipe | Token::BracketOpen | Token::ParenOpen | Token::BraceOpen => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_guarded_and_nothing_else() {
        let guarded = |source: &str| guarded(source, &SyntaxConfig::default()).unwrap();
        for source in [
            "{% set a = b.c %}{{ a.b }}{% if a.b == 1 %}{% endif %}",
            "{% set a %}x{% endset %}{# set a.b = 1 #}set a.b = 1",
            "{% raw %}{% set a.b = 1 %}{% endraw %}",
            "{% set a | upper %}{{ '{% set a.b = 1 %}' }}{% endset %}",
            "{% set a.b = %}",
        ] {
            assert_eq!(guarded(source), source);
        }
        assert_eq!(
            guarded("{%- set a.b = [c, '%}'] -%}"),
            format!("{{%- set a.b = ([c, '%}}'] )|{PLAIN} -%}}")
        );
        assert_eq!(
            guarded("{% set a, b.c = 1, d %}x"),
            format!("{{% set a, b.c = (1, d )|{PLAIN} %}}x")
        );
        assert_eq!(
            guarded("{% set a.b | f(1) %}é"),
            format!("{{% set a.b | f(1) |{PLAIN} %}}é")
        );
    }
}
