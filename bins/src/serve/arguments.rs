//! The command line of `l2p-serve`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use clap::{Parser, ValueEnum};
use l2p_engine::DeviceChoice;
use l2p_engine::limits::{Batch, Bounded, Patience, Side, Steps, Threads};

use crate::parts::PartFlags;
use crate::precision::{PrecisionFlags, VramFlag};
use crate::size::ByteSize;

const EXAMPLES: &str = "\
Examples:
  l2p-serve --model models/demo/pixel
  l2p-serve --model 4k=l2p_4k_sft.safetensors --text-encoder Z-Image/text_encoder --tokenizer Z-Image/tokenizer --trunk int8
  l2p-serve --model Z-Image-Turbo --device cuda:0 --device cuda:1 --api-key-file keys --host 0.0.0.0

  curl -s localhost:7860/v1/images/generations -H 'content-type: application/json' \\
       -d '{\"prompt\": \"slice of pizza\", \"seed\": 3}' | jq -r '.data[0].b64_json' | base64 -d > pizza.png

A page to draw with is at http://localhost:7860/. Programs for OpenAI's images or for AUTOMATIC1111's /sdapi/v1 take the same
address (docs/serving.md). Pictures have the bits that l2p-sample gives them with the same settings.";

/// Draws pictures for others, over HTTP: a page, OpenAI's images and AUTOMATIC1111's interface.
#[derive(Parser, Clone, Debug)]
#[command(name = "l2p-serve", version, long_version = crate::long_version(), after_help = EXAMPLES)]
pub struct Arguments {
    /// A model, and the name that clients know it by: a diffusers folder, a folder with l2p.json, a transformer's folder, or a
    /// safetensors file. Several are possible on the CPU; the first is drawn with where nobody says
    #[arg(long, value_name = "[NAME=]DIR|FILE", required = true, value_parser = named_model)]
    pub model: Vec<NamedModel>,
    /// Where to run: auto, cpu, cuda or cuda:N; several GPUs draw from one queue
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = crate::sample::device_choice)]
    pub device: Vec<DeviceChoice>,
    /// The address to listen at. Others than this machine's own are open to whoever reaches them: give --api-key-file too
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// The port; 0 takes a free one, which is said
    #[arg(long, value_name = "PORT", default_value_t = 7860)]
    pub port: u16,
    /// A file of keys, one a line: whoever has none is refused
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Requests that may wait; more are told to come again
    #[arg(long, value_name = "N", default_value = "64")]
    pub queue: Threads,
    /// Pictures drawn at once, of requests of one shape [default: as many as fill the device; 1 on the CPU]
    #[arg(long, value_name = "N")]
    pub max_batch: Option<Batch>,
    /// The most pictures of a request
    #[arg(long, value_name = "N", default_value = "10")]
    pub max_count: Bounded<1, 1024>,
    /// The longer side of a picture at most
    #[arg(long, value_name = "PIXELS", default_value = "4096")]
    pub max_side: Side,
    /// The most steps of a picture
    #[arg(long, value_name = "N", default_value = "100")]
    pub max_steps: Steps,
    /// The most pictures that a client may ask for in a minute [default: any number]
    #[arg(long, value_name = "N")]
    pub rate: Option<Batch>,
    /// The most bytes of a request
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    pub max_body: ByteSize,
    /// Connections at a time
    #[arg(long, value_name = "N", default_value = "512")]
    pub connections: Threads,
    /// The longest that a client may take to send what it asks
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    pub patience: Patience,
    /// How long what is under way may take when the server is asked to stop
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    pub drain: Patience,
    /// A site whose pages may use this server from a browser, or * for all
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Option<String>,
    /// How the log is written, to standard error; RUST_LOG chooses what (info)
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log: LogFormat,
    /// Load models when the first picture is asked for, not before
    #[arg(long)]
    pub lazy: bool,
    /// How weights are kept.
    #[command(flatten)]
    pub weights: PrecisionFlags,
    /// Where they are kept.
    #[command(flatten)]
    pub memory: VramFlag,
    /// Where parts are that the model does not bring along.
    #[command(flatten)]
    pub parts: PartFlags,
}

/// A model and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedModel {
    /// What clients call it.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// How the log is written.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// A line for people
    Text,
    /// A JSON object a line
    Json,
}

/// The longest name of a model.
const LONGEST_NAME: usize = 64;

fn named_model(text: &str) -> Result<NamedModel, String> {
    let sound = |name: &str| {
        let letters = |character: char| character.is_ascii_alphanumeric() || "._-".contains(character);
        !name.is_empty() && name.len() <= LONGEST_NAME && name.chars().all(letters)
    };
    // A path may have the sign too, after a folder's name.
    if let Some((name, path)) = text.split_once('=').filter(|(name, _)| sound(name)) {
        return match path.is_empty() {
            true => Err("expected a folder or file behind the name".into()),
            false => Ok(NamedModel {
                name: name.into(),
                path: path.into(),
            }),
        };
    }
    let path = PathBuf::from(text);
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    match stem.filter(|stem| sound(stem)) {
        Some(name) => Ok(NamedModel { name, path }),
        None => Err(format!(
            "give it a name of up to {LONGEST_NAME} letters, digits, dots and dashes: NAME={text}"
        )),
    }
}

impl Arguments {
    /// How long a client may take to send what it asks.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.patience.get() as u64)
    }

    /// How long what is under way may take at the end.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain.get() as u64)
    }

    /// Refuses what cannot be together.
    ///
    /// # Errors
    /// Naming the flags.
    pub fn check(&self) -> anyhow::Result<()> {
        for (index, model) in self.model.iter().enumerate() {
            if self.model[..index].iter().any(|other| other.name == model.name) {
                bail!(
                    "two models are named {}: give each a name of its own, NAME=PATH",
                    model.name
                );
            }
        }
        if let Some(origin) = self.cors_origin.as_deref().filter(|origin| *origin != "*") {
            let sound = origin.starts_with("http://") || origin.starts_with("https://");
            if !sound || origin.parse::<axum::http::HeaderValue>().is_err() || origin.ends_with('/') {
                bail!("--cors-origin: expected an origin such as https://example.org, without a path, or *");
            }
        }
        if self.model.len() > 1 && self.device.iter().any(|device| *device != DeviceChoice::Cpu) {
            bail!("several models are for the CPU (--device cpu): a GPU has room for one, so start a server for each");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn models_have_names() {
        let named = |text: &str| named_model(text).map(|model| (model.name, model.path.display().to_string()));
        assert_eq!(
            named("models/demo/pixel"),
            Ok(("pixel".into(), "models/demo/pixel".into()))
        );
        assert_eq!(named("a.b=x/y=z"), Ok(("a.b".into(), "x/y=z".into())));
        assert_eq!(
            named("dir/l2p_4k.safetensors"),
            Ok(("l2p_4k".into(), "dir/l2p_4k.safetensors".into()))
        );
        for bad in ["", "=", "a=", "/", "x y", "né"] {
            assert!(named(bad).is_err(), "{bad}");
        }
        let twice = Arguments::parse_from(["l2p-serve", "--model", "a", "--model", "b/a", "--device", "cpu"]);
        assert!(
            twice
                .check()
                .unwrap_err()
                .to_string()
                .contains("two models are named a")
        );
        for bad in ["https://good.example\n", "good.example", "https://good.example/"] {
            let cors = Arguments::parse_from(["l2p-serve", "--model", "a", "--device", "cpu", "--cors-origin", bad]);
            assert!(
                cors.check().unwrap_err().to_string().contains("--cors-origin"),
                "{bad:?}"
            );
        }
        let on_gpu = Arguments::parse_from(["l2p-serve", "--model", "a", "--model", "b", "--device", "cuda"]);
        assert!(
            on_gpu
                .check()
                .unwrap_err()
                .to_string()
                .contains("several models are for the CPU")
        );
    }
}
