//! Chat templates: the Jinja program that turns messages into the text a language model was trained on.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error as TemplateError, ErrorKind, Value, context};
use serde::Serialize;
use serde_json::ser::Formatter;

/// The name under which the environment holds the one template.
const NAME: &str = "chat_template";

/// A compiled chat template. Templates are written for Jinja2 in Python; the environment offers them what they use of it:
/// string methods, `raise_exception`, a `tojson` that does not escape HTML, and white space trimmed around blocks.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Names such as `eos_token` and their text, visible to the template.
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` are variables that the template may use, such as `bos_token`.
    ///
    /// # Errors
    /// The template engine's words on a syntax error, with its line.
    pub fn compile(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, String> {
        let mut environment = Environment::new();
        let whitespace = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(whitespace.map_err(|error| describe(&error))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| describe(&error))?;
        Ok(ChatTemplate {
            environment,
            special_tokens,
        })
    }

    /// The text for one user message `prompt`, up to the point where the assistant would begin to answer.
    ///
    /// # Errors
    /// The template's own complaint, or the template engine's with its line.
    pub fn render(&self, prompt: &str) -> Result<String, String> {
        let message = context! { role => "user", content => prompt };
        let conversation = context! {
            messages => vec![message],
            tools => Value::from(()),
            documents => Value::from(()),
            add_generation_prompt => true,
            enable_thinking => true,
        };
        let tokens = Value::from_pairs(self.special_tokens.iter().cloned());
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context! { ..conversation, ..tokens }))
            .map_err(|error| describe(&error))
    }
}

/// The error with those that caused it, without the excerpt of the source.
fn describe(error: &TemplateError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// How a template refuses a conversation.
fn raise_exception(message: String) -> Result<Value, TemplateError> {
    Err(TemplateError::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` writes it; the engine's own filter escapes for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<String, TemplateError> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut text = Vec::new();
    let outcome = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, SpacedFormatter)),
    };
    outcome.map_err(|error| TemplateError::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(text).map_err(|error| TemplateError::new(ErrorKind::BadSerialization, error.to_string()))
}

/// One line of JSON with a space after every comma and colon.
struct SpacedFormatter;

impl Formatter for SpacedFormatter {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, String> {
        let tokens = vec![("eos_token".to_owned(), "<|end|>".to_owned())];
        ChatTemplate::compile(source, tokens)?.render("  Hi, \"you\" & <me>\n")
    }

    #[test]
    fn blocks_are_trimmed_as_in_jinja2() {
        let text = render("{% if true %}\n  a\n  {% set b = 1 %}\nc\n{% endif %}\n{{ eos_token }}\n").unwrap();
        assert_eq!(text, "  a\nc\n<|end|>");
    }

    #[test]
    fn templates_have_what_they_use_of_python() {
        for (source, expected) in [
            ("{{ messages[0].content.strip() }}", "Hi, \"you\" & <me>"),
            ("{{ messages[0]['content'] | trim }}", "Hi, \"you\" & <me>"),
            (
                "{{ messages[0].content.startswith('  H') and not messages[0].content.endswith('x') }}",
                "True",
            ),
            ("{{ 'a</think>\n\nb'.split('</think>')[-1].lstrip('\n') }}", "b"),
            (
                "{{ {'b': [1, 'é<'], 'a': none} | tojson }}",
                "{\"b\": [1, \"é<\"], \"a\": null}",
            ),
            ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
            (
                "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
                "1",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "1",
            ),
            ("{% if tools %}tools{% endif %}{{ missing }}{{ tools is none }}", "True"),
            ("{{ enable_thinking is defined and enable_thinking is false }}", "False"),
            ("{{ messages | length }}{{ messages[0].name is defined }}", "1False"),
        ] {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn failures_say_why() {
        let refusal = render("{{ raise_exception('no system role') }}").unwrap_err();
        assert!(refusal.contains("no system role"), "{refusal}");
        let syntax = render("a\n{% if %}").unwrap_err();
        assert!(syntax.contains("line 2") || syntax.contains(":2"), "{syntax}");
    }
}
