//! A writer of prompts by grammar, for where there is no language model: a sentence that brings in the subject, then light, framing and
//! mood, each from a pool, drawn by the request's seed.
//!
//! It understands nothing. What it writes is varied and well-formed and passes the factory's own checks; it judges no prompt and knows
//! no category that is not in the taxonomy.

mod chinese;
mod english;
mod parts;

use self::parts::Parts;
use super::{Answer, Language, LanguageModel, Request, Subject, Take, Task};
use crate::data::dice::Dice;
use crate::stop_requested;

/// How the writer is called; its version changes with what it writes.
const NAME: &str = "grammar 1";

/// Prompts that are drawn for a subject before one of a wrong length is taken.
const DRAWS: usize = 200;

/// What kind of thing a sub-class holds, which decides how it is talked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Thing,
    Dish,
    Plant,
    Place,
    Room,
    View,
    Animal,
    Person,
    Action,
    Figure,
    Artwork,
    Cartoon,
    Design,
    Sheet,
    Screen,
    Sign,
}

/// In what manner it is pictured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Photograph,
    Drawing,
    Layout,
}

impl Kind {
    /// By the name of a sub-class, as `nature/food`; of one that is not known, by whether it shows text.
    fn of(sub_class: &str, renders_text: bool) -> Self {
        match sub_class {
            "nature/food" => Kind::Dish,
            "nature/plants" => Kind::Plant,
            "nature/cityscape" => Kind::Place,
            "nature/indoor" => Kind::Room,
            "nature/landscape" => Kind::View,
            "nature/animals" => Kind::Animal,
            "people/portrait" => Kind::Person,
            "people/sports" | "people/activities" => Kind::Action,
            "people/others" => Kind::Figure,
            "design/arts" => Kind::Artwork,
            "design/cartoon" => Kind::Cartoon,
            "design/others" => Kind::Design,
            "design/posters" | "design/slides" => Kind::Sheet,
            "design/ui" => Kind::Screen,
            _ if renders_text => Kind::Sign,
            _ => Kind::Thing,
        }
    }

    fn look(self) -> Look {
        match self {
            Kind::Artwork | Kind::Cartoon | Kind::Design => Look::Drawing,
            Kind::Sheet | Kind::Screen => Look::Layout,
            _ => Look::Photograph,
        }
    }
}

/// Sentences of a kind to choose from.
struct Pools {
    openings: &'static [&'static str],
    quoted: &'static [&'static str],
    light: &'static [&'static str],
    frame: &'static [&'static str],
    mood: &'static [&'static str],
    /// A further sentence on light or colours.
    parts: &'static Parts,
}

/// The writer.
#[derive(Debug, Default)]
pub struct Writer;

impl LanguageModel for Writer {
    fn name(&self) -> String {
        NAME.into()
    }

    fn judges(&self) -> bool {
        false
    }

    fn is_free(&self) -> bool {
        true
    }

    fn answer(&mut self, requests: &[Request], take: &mut Take<'_>) -> anyhow::Result<()> {
        for (number, request) in requests.iter().enumerate() {
            if stop_requested() {
                return Err(l2p_engine::Error::Interrupted.into());
            }
            take(number, self.text(request))?;
        }
        Ok(())
    }
}

impl Writer {
    fn text(&self, request: &Request) -> Result<Answer, String> {
        let Task::Prompts {
            sub_class,
            renders_text,
            language,
            subjects,
            length,
        } = &request.task
        else {
            return Err("a writer by grammar only writes prompts; name a language model with --llm-url".into());
        };
        let kind = Kind::of(sub_class, *renders_text);
        let shows_chinese = match sub_class.as_str() {
            "synthetic/chinese" => true,
            "synthetic/english" => false,
            _ => *language == Language::Zh,
        };
        let texts: Vec<String> = subjects
            .iter()
            .enumerate()
            .map(|(index, subject)| {
                let purpose = format!("{sub_class} {} {}", language.code(), subject.name);
                let mut dice = Dice::new(request.seed, &purpose, index as u64);
                let quotes = renders_text.then_some(shows_chinese);
                let mut draw = || write(&mut dice, kind, *language, subject, quotes);
                let mut text = draw();
                for _ in 0..DRAWS {
                    if length.contains(&text.chars().count()) {
                        break;
                    }
                    text = draw();
                }
                text
            })
            .collect();
        Ok(Answer {
            text: serde_json::to_string(&texts).map_err(|error| error.to_string())?,
            tokens: 0,
            cut: false,
        })
    }
}

/// One prompt, of three to five sentences; `quotes` says whether it shows text, and whether in Chinese.
fn write(dice: &mut Dice, kind: Kind, language: Language, subject: &Subject, quotes: Option<bool>) -> String {
    let (pools, shown, gap) = match language {
        Language::En => (english::pools(kind), english::with_article(&subject.shown), " "),
        Language::Zh => (chinese::pools(kind), subject.shown.clone(), ""),
    };
    let mut sentences = vec![dice.pick(pools.openings).replace("{a}", &shown)];
    if let Some(in_chinese) = quotes {
        let quoted = match (language, quoted_text(dice, in_chinese)) {
            (Language::En, text) => format!("\"{text}\""),
            (Language::Zh, text) => format!("“{text}”"),
        };
        sentences.push(dice.pick(pools.quoted).replace("{q}", &quoted));
    }
    // One sentence in two is put together, so that many thousand prompts do not become alike.
    let light = match dice.below(2) {
        0 => pools.parts.draw(dice),
        _ => dice.pick(pools.light).to_owned(),
    };
    let mut rest = vec![light, dice.pick(pools.frame).to_owned()];
    dice.shuffle(&mut rest);
    if dice.uniform() < 0.7 {
        rest.push(dice.pick(pools.mood).to_owned());
    }
    // Now and then a shorter prompt, and room for what is quoted.
    if dice.uniform() < if quotes.is_some() { 0.5 } else { 0.15 } {
        rest.remove(0);
    }
    if rest.len() < 2 && quotes.is_none() {
        rest.push(dice.pick(pools.mood).to_owned());
    }
    sentences.extend(rest);
    sentences.join(gap)
}

/// A short text for a picture to show.
fn quoted_text(dice: &mut Dice, in_chinese: bool) -> String {
    match in_chinese {
        true => format!(
            "{}{}",
            dice.pick(&chinese::FIRST_WORDS),
            dice.pick(&chinese::SECOND_WORDS)
        ),
        false => {
            let (first, second) = (dice.pick(&english::FIRST_WORDS), dice.pick(&english::SECOND_WORDS));
            match dice.below(4) {
                0 => format!("{first} {second} {}", 2 + dice.below(97)),
                1 => format!("The {first} {second}"),
                _ => format!("{first} {second}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_get_the_article_they_need() {
        for (name, expected) in [
            ("fox", "a fox"),
            ("apple strudel", "an apple strudel"),
            ("eucalyptus branch", "a eucalyptus branch"),
            ("hourglass", "an hourglass"),
            ("unicorn postman", "a unicorn postman"),
            ("umbrella bat", "an umbrella bat"),
            ("children building a sandcastle", "children building a sandcastle"),
            ("children's playroom", "a children's playroom"),
            ("tofu workshop sign", "a tofu workshop sign"),
        ] {
            assert_eq!(english::with_article(name), expected);
        }
    }

    #[test]
    fn every_sentence_of_every_pool_ends_and_names_what_it_must() {
        for kind in [
            Kind::Thing,
            Kind::Dish,
            Kind::Plant,
            Kind::Place,
            Kind::Room,
            Kind::View,
            Kind::Animal,
            Kind::Person,
            Kind::Action,
            Kind::Figure,
            Kind::Artwork,
            Kind::Cartoon,
            Kind::Design,
            Kind::Sheet,
            Kind::Screen,
            Kind::Sign,
        ] {
            for (pools, end) in [(english::pools(kind), '.'), (chinese::pools(kind), '。')] {
                assert!(
                    pools.openings.iter().all(|text| text.matches("{a}").count() == 1),
                    "{kind:?}"
                );
                assert!(
                    pools.quoted.iter().all(|text| text.matches("{q}").count() == 1),
                    "{kind:?}"
                );
                let drawn = pools.parts.draw(&mut Dice::new(1, "parts", 0));
                assert!(
                    drawn.matches(end).count() == 1 && !drawn.contains(['{', '}']),
                    "{drawn}"
                );
                for list in [pools.openings, pools.quoted, pools.light, pools.frame, pools.mood] {
                    for text in list {
                        let ends = text.matches(end).count();
                        let quote_at_end = text.ends_with("{q}.") || text.ends_with("{a}.");
                        assert!(ends == 1 && (text.ends_with(end) || quote_at_end), "{text}");
                    }
                }
            }
        }
    }
}
