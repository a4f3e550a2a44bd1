//! Chat templates: the Jinja program that turns messages into the text a language model was trained on.
//!
//! A template comes with a model and is trusted no more than other files: it is compiled and rendered on a thread of its own, with
//! bounds on its length and depth, on the work that it does and on the text that it makes.

mod functions;
mod source;

use std::sync::Arc;
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error as TemplateError, Value, context};

use super::contained::contained;
use crate::limits::{LONGEST_RENDERED, PROMPT_SECONDS, TEMPLATE_FUEL};

/// The name under which the environment holds the one template.
const NAME: &str = "chat_template";

/// The filter through which values go that a template keeps in a namespace.
const PLAIN: &str = "_plain";

const TIME: Duration = Duration::from_secs(PROMPT_SECONDS);

/// What a language model is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// What it is to be and to observe.
    pub system: Option<String>,
    /// The question.
    pub user: String,
}

/// A compiled chat template. Templates are written for Jinja2 in Python; the environment offers them what they use of it:
/// string methods, `raise_exception`, a `tojson` that does not escape HTML, and white space trimmed around blocks.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// Names such as `eos_token` and their text, visible to the template.
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` are variables that the template may use, such as `bos_token`.
    ///
    /// # Errors
    /// The template engine's words on a syntax error, with its line; or which bound the source exceeds.
    pub fn compile(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, String> {
        let source = source.to_owned();
        let environment = contained(TIME, move || compiled(&source)).map_err(|failure| failure.reason())??;
        Ok(ChatTemplate {
            environment: Arc::new(environment),
            special_tokens,
        })
    }

    /// The text for one user message `prompt`, up to the point where the assistant would begin to answer.
    ///
    /// # Errors
    /// The template's own complaint, or the template engine's with its line; or which bound it exceeds.
    pub fn render(&self, prompt: &str) -> Result<String, String> {
        self.render_messages(vec![("user", prompt.to_owned())], true)
    }

    /// The text for a conversation, up to the point where the assistant answers without thinking aloud.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_conversation(&self, conversation: &Conversation) -> Result<String, String> {
        let system = conversation.system.iter().map(|text| ("system", text.clone()));
        let messages = system.chain([("user", conversation.user.clone())]);
        self.render_messages(messages.collect(), false)
    }

    /// The text for messages, each with its role.
    fn render_messages(&self, messages: Vec<(&'static str, String)>, thinking: bool) -> Result<String, String> {
        let (environment, tokens) = (self.environment.clone(), self.special_tokens.clone());
        let text = contained(TIME, move || rendered(&environment, tokens, messages, thinking));
        let text = text.map_err(|failure| failure.reason())??;
        match text.len() > LONGEST_RENDERED {
            true => Err(format!(
                "it makes {} bytes of the prompt, more than the {LONGEST_RENDERED} that are tokenized",
                text.len()
            )),
            false => Ok(text),
        }
    }
}

/// An environment with the one template.
fn compiled(source: &str) -> Result<Environment<'static>, String> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    let syntax = syntax.map_err(|error| describe(&error))?;
    let guarded = source::guarded(source, &syntax)?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_fuel(Some(TEMPLATE_FUEL));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    // The library's own prints everything there is, however often it holds itself.
    environment.add_function("debug", functions::refuse_debug);
    environment.add_function("raise_exception", functions::raise_exception);
    environment.add_filter("tojson", functions::to_json);
    environment.add_filter(PLAIN, functions::plain);
    // First as it stands, so that errors are about that, and only what is valid is edited.
    for source in [source, &guarded] {
        let added = environment.add_template_owned(NAME, source.to_owned());
        added.map_err(|error| describe(&error))?;
    }
    Ok(environment)
}

fn rendered(
    environment: &Environment<'static>,
    special_tokens: Vec<(String, String)>,
    messages: Vec<(&'static str, String)>,
    thinking: bool,
) -> Result<String, String> {
    let message = |(role, content)| context! { role => role, content => content };
    let conversation = context! {
        messages => messages.into_iter().map(message).collect::<Vec<Value>>(),
        tools => Value::from(()),
        documents => Value::from(()),
        add_generation_prompt => true,
        enable_thinking => thinking,
    };
    let tokens = Value::from_pairs(special_tokens);
    environment
        .get_template(NAME)
        .and_then(|template| template.render(context! { ..conversation, ..tokens }))
        .map_err(|error| describe(&error))
}

/// The error with those that caused it, without the excerpt of the source.
fn describe(error: &TemplateError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    crate::shown_name(&text).into_owned()
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
    fn conversations_have_their_roles_and_no_thoughts() {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ enable_thinking }}{{ add_generation_prompt }}";
        let template = ChatTemplate::compile(source, Vec::new()).unwrap();
        let mut conversation = Conversation {
            system: Some("be brief".into()),
            user: "why <b>?".into(),
        };
        let text = template.render_conversation(&conversation).unwrap();
        assert_eq!(text, "<system>be brief<user>why <b>?FalseTrue");
        conversation.system = None;
        assert_eq!(
            template.render_conversation(&conversation).unwrap(),
            "<user>why <b>?FalseTrue"
        );
        assert_eq!(template.render("x").unwrap(), "<user>xTrueTrue");
    }

    #[test]
    fn failures_say_why() {
        let refusal = render("{{ raise_exception('no system role') }}").unwrap_err();
        assert!(refusal.contains("no system role"), "{refusal}");
        let syntax = render("a\n{% if %}").unwrap_err();
        assert!(syntax.contains("line 2") || syntax.contains(":2"), "{syntax}");
    }
}
