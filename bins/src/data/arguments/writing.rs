//! Who writes and judges prompts, and how.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::limits::{Batch, Patience, Threads};
use l2p_engine::{Device, DeviceChoice, Error, files};

use crate::data::ask::Drawing;
use crate::data::language::endpoint::{Endpoint, EndpointOptions, is_this_machine};
use crate::data::language::own::OwnEncoder;
use crate::data::language::writer::Writer;
use crate::data::language::{Kept, Language, LanguageModel};
use crate::data::rules::{self, Lengths, Rules};
use crate::parts::PartFlags;
use crate::progress::PhaseBar;

use super::drawing::device_choice;

/// The most characters that a prompt may be asked to have.
const LONGEST: usize = 4000;

/// How often something is tried.
type Tries = l2p_engine::limits::Bounded<0, 100>;

/// How prompts are written.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Prompts")]
pub struct PromptFlags {
    /// A taxonomy of your own, as l2p-data taxonomy --format json writes one [default: the program's]
    #[arg(long, value_name = "FILE")]
    pub taxonomy: Option<PathBuf>,
    /// Languages, each with the same share
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST", default_value = "en")]
    pub languages: Vec<Language>,
    /// Characters of an English prompt
    #[arg(long, value_name = "LEAST-MOST", default_value = "200-350", value_parser = length)]
    pub length: RangeInclusive<usize>,
    /// Characters of a Chinese prompt
    #[arg(long, value_name = "LEAST-MOST", default_value = "60-160", value_parser = length)]
    pub length_zh: RangeInclusive<usize>,
    /// A prompt is dropped that shares so much of its word triples with another: 1 drops only copies
    #[arg(long, value_name = "SHARE", default_value = "0.5", value_parser = share)]
    pub near: f64,
    /// Subjects of a request
    #[arg(long, value_name = "N", default_value = "8")]
    pub prompts_per_request: Batch,
    /// How often a request is made whose answer makes no sense
    #[arg(long, value_name = "N", default_value = "3")]
    pub attempts: Tries,
    /// How freely a language model writes: 0 always takes the likeliest word
    #[arg(long, value_name = "T", default_value = "0.9", value_parser = temperature)]
    pub temperature: f32,
    /// It draws from the likeliest words that have this share of the probability
    #[arg(long, value_name = "SHARE", default_value = "0.95", value_parser = top_p)]
    pub top_p: f32,
}

impl PromptFlags {
    /// How long prompts may be.
    pub fn lengths(&self) -> Lengths {
        Lengths {
            en: self.length.clone(),
            zh: self.length_zh.clone(),
        }
    }

    /// The languages, each once.
    pub fn languages(&self) -> Vec<Language> {
        let mut languages = self.languages.clone();
        languages.sort_unstable();
        languages.dedup();
        languages
    }

    /// How a model draws its words.
    pub fn drawing(&self) -> Drawing {
        Drawing {
            temperature: self.temperature,
            top_p: self.top_p,
        }
    }
}

/// How prompts are checked.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Check")]
pub struct CheckFlags {
    /// Further terms that no prompt may hold, one a line
    #[arg(long, value_name = "FILE")]
    pub blocked: Option<PathBuf>,
    /// How often the auditor is asked whose answer is no verdict
    #[arg(long, value_name = "N", default_value = "3")]
    pub audit_attempts: Tries,
    /// Let the rules alone decide, also where there is a language model
    #[arg(long)]
    pub rules_only: bool,
}

impl CheckFlags {
    /// The rules.
    ///
    /// # Errors
    /// When the file of terms cannot be read.
    pub fn rules(&self, lengths: Lengths) -> anyhow::Result<Rules> {
        let unwanted = match &self.blocked {
            None => Vec::new(),
            Some(path) => {
                let text = files::read_text(path, l2p_engine::limits::Budget::CONFIG)?;
                rules::terms(&text).map(str::to_lowercase).collect()
            }
        };
        Ok(Rules { lengths, unwanted })
    }
}

/// Who is asked.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Language model")]
pub struct LanguageFlags {
    /// A server that speaks the chat/completions protocol, such as http://localhost:8000 [default: the text encoder of --model, where
    /// that is a language model, else a writer by grammar]
    #[arg(long, value_name = "URL", requires = "llm_model")]
    pub llm_url: Option<String>,
    /// The model's name there
    #[arg(long, value_name = "NAME", requires = "llm_url")]
    pub llm_model: Option<String>,
    /// The environment variable that holds the key, if the server wants one
    #[arg(long, value_name = "NAME", default_value = "L2P_LLM_KEY")]
    pub llm_key_env: String,
    /// Requests under way at one time
    #[arg(long, value_name = "N", default_value = "8")]
    pub llm_concurrency: Threads,
    /// The most requests a minute [default: any number]
    #[arg(long, value_name = "N")]
    pub llm_rate: Option<Batch>,
    /// The longest that one request may take
    #[arg(long, value_name = "SECONDS", default_value = "300")]
    pub llm_timeout: Patience,
    /// How often a request is sent again that failed and may yet succeed
    #[arg(long, value_name = "N", default_value = "6")]
    pub llm_retries: Tries,
    /// Send the answer's JSON schema too, for servers that hold a model to it
    #[arg(long)]
    pub llm_schema: bool,
    /// Where answers are kept [default: answers in the folder of the data set]
    #[arg(long, value_name = "DIR")]
    pub llm_cache: Option<PathBuf>,
    /// Ask no language model, also where the text encoder of --model is one
    #[arg(long, conflicts_with = "llm_url")]
    pub by_grammar: bool,
}

/// The source whose text encoder may write, of stages that draw nothing.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Language model")]
pub struct EncoderFlags {
    /// A source whose text encoder is a language model, as Z-Image's is: it writes and judges where no --llm-url is given
    #[arg(long, value_name = "DIR|FILE")]
    pub model: Option<PathBuf>,
    /// Where it runs: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_choice)]
    pub device: DeviceChoice,
    /// Where parts are that the source does not bring along.
    #[command(flatten)]
    pub parts: PartFlags,
}

impl EncoderFlags {
    /// The source, if one is named.
    pub fn source(&self) -> Option<Source<'_>> {
        Some(Source {
            model: self.model.as_deref()?,
            parts: &self.parts,
            device: self.device,
        })
    }
}

/// A source whose text encoder may write.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its folder or file.
    pub model: &'a Path,
    /// Where parts are that it does not bring along.
    pub parts: &'a PartFlags,
    /// Where it runs.
    pub device: DeviceChoice,
}

/// Who answers, and why that is no language model, if it is none.
pub struct Opened {
    /// Who answers.
    pub model: Box<dyn LanguageModel>,
    /// Why a writer by grammar stands in for a language model.
    pub why_none: Option<String>,
}

impl LanguageFlags {
    /// The language model: the server's, or the text encoder of `source`; its answers are kept in `folder` unless a flag says where.
    /// Where there is neither, a writer by grammar.
    ///
    /// # Errors
    /// When the address or the key makes no sense, a file of the source is missing or damaged, or its device has no room.
    pub fn open(&self, folder: PathBuf, source: Option<Source<'_>>, bar: &mut PhaseBar) -> anyhow::Result<Opened> {
        let folder = self.llm_cache.clone().unwrap_or(folder);
        let kept = |model: Box<dyn LanguageModel>| Opened {
            model: Box::new(Kept::new(model, folder)),
            why_none: None,
        };
        let none = |reason: &str| Opened {
            model: Box::new(Writer),
            why_none: Some(reason.to_owned()),
        };
        if let (Some(url), Some(model)) = (&self.llm_url, &self.llm_model) {
            return Ok(kept(Box::new(self.endpoint(url, model)?)));
        }
        if self.by_grammar {
            return Ok(none("no language model is to be asked (--by-grammar)"));
        }
        let Some(source) = source else {
            return Ok(none(
                "no language model was named (--llm-url, or --model for a source's text encoder)",
            ));
        };
        let device = Device::open(source.device)?;
        let paths = ModelPaths::resolve(source.model, &source.parts.overrides())?;
        let opened = OwnEncoder::open(&paths, &device, &mut |done, total| {
            bar.show("loading the text encoder", done as u64, total as u64);
            match crate::stop_requested() {
                true => Err(Error::Interrupted),
                false => Ok(()),
            }
        });
        bar.clear();
        Ok(match opened? {
            Ok(encoder) => kept(Box::new(encoder)),
            Err(reason) => none(&reason),
        })
    }

    fn endpoint(&self, url: &str, model: &str) -> anyhow::Result<Endpoint> {
        let key = self.key()?;
        if key.is_some() && url.starts_with("http://") && !is_this_machine(url) {
            crate::say("note: the key goes to another machine without encryption; use https where the server has it");
        }
        Endpoint::new(EndpointOptions {
            url: url.to_owned(),
            model: model.to_owned(),
            key,
            concurrency: self.llm_concurrency.get(),
            per_minute: self.llm_rate.map(Batch::get),
            timeout: Duration::from_secs(self.llm_timeout.into()),
            retries: self.llm_retries.get(),
            schema: self.llm_schema,
        })
    }

    fn key(&self) -> anyhow::Result<Option<String>> {
        let name = &self.llm_key_env;
        let Some(key) = std::env::var_os(name).filter(|key| !key.is_empty()) else {
            return Ok(None);
        };
        let fault = || {
            Error::invalid(format!(
                "{name}: is no key: expected letters, digits and marks without spaces"
            ))
        };
        let key = key
            .into_string()
            .ok()
            .filter(|key| key.bytes().all(|byte| byte.is_ascii_graphic()));
        Ok(Some(key.ok_or_else(fault).context("--llm-key-env")?))
    }
}

fn length(text: &str) -> Result<RangeInclusive<usize>, String> {
    let expected =
        || format!("expected two numbers of characters such as 200-350, from 1 to {LONGEST}, found `{text}`");
    let (least, most) = text.split_once('-').ok_or_else(expected)?;
    let number = |text: &str| {
        text.trim()
            .parse::<usize>()
            .ok()
            .filter(|number| (1..=LONGEST).contains(number))
    };
    match (number(least), number(most)) {
        (Some(least), Some(most)) if least <= most => Ok(least..=most),
        _ => Err(expected()),
    }
}

/// A number between two others, both included.
fn between(text: &str, least: f64, most: f64) -> Result<f64, String> {
    let number = text
        .parse::<f64>()
        .ok()
        .filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("expected a number from {least} to {most}, found `{text}`"))
}

fn share(text: &str) -> Result<f64, String> {
    between(text, 0.05, 1.0)
}

fn temperature(text: &str) -> Result<f32, String> {
    between(text, 0.0, 2.0).map(|number| number as f32)
}

fn top_p(text: &str) -> Result<f32, String> {
    between(text, 0.01, 1.0).map(|number| number as f32)
}
