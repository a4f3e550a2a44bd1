//! `l2p-sample warm`: chooses the algorithms of a model's matrix products ahead of time, thoroughly, so that no drawing has to
//! search for them. One step is run for every size, batch and caption length that is asked for, with captions of that length.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::bail;
use l2p_engine::checkpoint::{ModelPaths, PathOverrides};
use l2p_engine::device::{Effort, Searched, class_rows};
use l2p_engine::dist::World;
use l2p_engine::limits::{Batch, Side};
use l2p_engine::pipeline::{ModelFiles, Settings};
use l2p_engine::serve::{Caption, Item, Request, Worker, WorkerOptions};
use l2p_engine::text::PromptTokenizer;
use l2p_engine::{Device, DeviceChoice, HostTensor};

use crate::precision::PrecisionFlags;

/// The longest captions that a text encoder makes.
const LONGEST: usize = PromptTokenizer::DEFAULT_MAX_TOKENS;

/// What to choose algorithms for.
#[derive(clap::Args, Clone, Debug)]
pub struct Warm {
    /// The model: a diffusers folder, a folder with l2p.json, a transformer's folder, or a safetensors file
    #[arg(long, value_name = "DIR|FILE")]
    model: PathBuf,
    /// Sizes of pictures, such as 1024x1024,1536x1024 [default: the model's]
    #[arg(long, value_name = "WxH,..", value_delimiter = ',')]
    size: Vec<PictureSize>,
    /// Pictures at once
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1")]
    batch: Vec<Batch>,
    /// Caption lengths in tokens, single ones or from-to
    #[arg(long, value_name = "N|FROM-TO,..", value_delimiter = ',', default_value = "1-512")]
    tokens: Vec<Lengths>,
    /// Where to run: auto, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = super::arguments::device_choice)]
    device: DeviceChoice,
    /// How weights are kept.
    #[command(flatten)]
    weights: PrecisionFlags,
    /// Folder of the text encoder, where the model names none; without one its products are left out
    #[arg(long, value_name = "DIR")]
    text_encoder: Option<PathBuf>,
    /// Folder of the tokenizer, where the model names none
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Folder of the VAE, where a latent model names none
    #[arg(long, value_name = "DIR")]
    vae: Option<PathBuf>,
    /// The model that a delta file was trained over
    #[arg(long, value_name = "DIR|FILE")]
    base: Option<PathBuf>,
}

/// Width and height in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PictureSize([usize; 2]);

impl FromStr for PictureSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |text: &str| text.trim().parse::<Side>().map(Side::get);
        match text.split_once(['x', '×']) {
            Some((width, height)) => Ok(PictureSize([side(width)?, side(height)?])),
            None => Err(format!("`{text}` is no size; write for example 1024x1024")),
        }
    }
}

/// Caption lengths, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lengths {
    from: usize,
    to: usize,
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse() {
            Ok(number) if (1..=LONGEST).contains(&number) => Ok(number),
            _ => Err(format!(
                "`{text}` is no length of a caption; write 1 to {LONGEST}, or a range such as 1-{LONGEST}"
            )),
        };
        let (from, to) = match text.split_once('-') {
            Some((from, to)) => (number(from)?, number(to)?),
            None => (number(text)?, number(text)?),
        };
        match from <= to {
            true => Ok(Lengths { from, to }),
            false => Err(format!("`{text}` ends before it begins")),
        }
    }
}

/// The lengths among these that meet products which no other meets, in pictures of so many tokens, so many at once. Captions
/// are encoded one by one and as they are; the transformer takes them padded to a multiple, alone and behind the picture's tokens.
fn distinct(lengths: &[Lengths], batch: usize, picture: usize, multiple: usize) -> Vec<usize> {
    let mut met = BTreeSet::new();
    let mut all: Vec<usize> = lengths.iter().flat_map(|lengths| lengths.from..=lengths.to).collect();
    // The longest of a class stands for it.
    all.sort_unstable_by(|a, b| b.cmp(a));
    let mut kept: Vec<usize> = all
        .into_iter()
        .filter(|&length| {
            let padded = length.next_multiple_of(multiple);
            let picture = picture.next_multiple_of(multiple);
            met.insert([length, batch * padded, batch * (picture + padded)].map(class_rows))
        })
        .collect();
    kept.reverse();
    kept
}

/// Chooses the algorithms.
///
/// # Errors
/// Without a GPU, and whatever keeps the model from being drawn with.
pub fn warm(options: &Warm) -> anyhow::Result<()> {
    let device = Device::open(options.device)?;
    let Device::Cuda(cuda) = device.clone() else {
        bail!("the CPU has no matrix algorithms to choose from: `warm` is for GPUs, see `l2p-sample devices`");
    };
    let overrides = PathOverrides {
        base: options.base.clone(),
        text_encoder: options.text_encoder.clone(),
        tokenizer: options.tokenizer.clone(),
        vae: options.vae.clone(),
    };
    let paths = ModelPaths::resolve(&options.model, &overrides)?;
    let files = Arc::new(options.weights.open(paths, device)?);
    let works = works(options, &files)?;
    cuda.blas()?.set_effort(Effort::Thorough);

    let once = WorkerOptions {
        keep_text_encoder: false,
        recordings: 0,
        ..WorkerOptions::default()
    };
    let worker = Worker::start(files, once)?;
    let lengths: BTreeSet<usize> = works.iter().flat_map(|work| work.lengths.iter().copied()).collect();
    let captions = captions(&worker, &lengths)?;
    super::load(&worker, &World::solo())?;
    for work in &works {
        let before = cuda.searched();
        for length in &work.lengths {
            draw(&worker, work, &captions[lengths.range(..length).count()])?;
        }
        crate::say(format_args!(
            "{}x{}, {} at once, captions of {} lengths: {}",
            work.settings.width,
            work.settings.height,
            work.batch,
            work.lengths.len(),
            searches(before, cuda.searched())
        ));
    }
    let file = cuda.blas()?.choices_file();
    let file = file.map_or("nowhere: there is no folder for it".into(), |file| {
        file.display().to_string()
    });
    crate::say(format_args!(
        "{} in all; kept in {file}",
        searches(Searched::default(), cuda.searched())
    ));
    Ok(())
}

/// Pictures of one size, so many at once.
struct Work {
    settings: Settings,
    batch: usize,
    lengths: Vec<usize>,
}

/// All combinations, checked before the first of them begins.
fn works(options: &Warm, files: &ModelFiles) -> anyhow::Result<Vec<Work>> {
    let defaults = files.defaults()?;
    let sizes = match options.size.is_empty() {
        true => vec![PictureSize([defaults.width, defaults.height])],
        false => options.size.clone(),
    };
    let mut works = Vec::new();
    for PictureSize([width, height]) in sizes {
        // Without guidance, so that a negative prompt is not asked for.
        let (settings, _) = files.rounded(Settings {
            width,
            height,
            steps: 1,
            cfg: 1.0,
            ..defaults
        });
        for batch in options.batch.iter().map(|batch| batch.get()) {
            files.ensure_room(&settings, batch)?;
            works.push(Work {
                lengths: distinct(
                    &options.tokens,
                    batch,
                    files.image_tokens(&settings),
                    files.spec().token_multiple(),
                ),
                settings,
                batch,
            });
        }
    }
    Ok(works)
}

/// A caption of each length. With a text encoder, prompts about as long are encoded too, which meets the encoder's products; what
/// captions say does not matter.
fn captions(worker: &Worker, lengths: &BTreeSet<usize>) -> anyhow::Result<Vec<Caption>> {
    if worker.files().ensure_text_encoder().is_ok() {
        let spinner = super::display::spinner("encoding prompts of all lengths", &World::solo());
        // What stands around a prompt's words.
        let around = encode(worker, &[1])?.saturating_sub(1);
        let words: Vec<usize> = lengths
            .iter()
            .map(|length| length.saturating_sub(around).max(1))
            .collect();
        encode(worker, &words)?;
        spinner.finish_and_clear();
    }
    let width = worker.files().spec().caption_width();
    let zeros = |tokens: &usize| {
        let features = HostTensor::from_f32(&vec![0.0; tokens * width], &[1, *tokens, width]);
        Caption::Features(Arc::new(features))
    };
    Ok(lengths.iter().map(zeros).collect())
}

/// Encodes prompts of so many words each; returns the tokens of the first.
fn encode(worker: &Worker, words: &[usize]) -> anyhow::Result<usize> {
    let prompts = words.iter().map(|&words| vec!["word"; words].join(" ")).collect();
    let encoded = worker
        .encode(prompts)?
        .wait_with(&mut |event| super::go_on(&World::solo(), &event))?;
    Ok(match encoded.value.first() {
        Some(Caption::Features(features)) => features.shape()[1],
        _ => 0,
    })
}

/// One step and what follows it.
fn draw(worker: &Worker, work: &Work, caption: &Caption) -> anyhow::Result<()> {
    let items = (0..work.batch as u64).map(|seed| Item {
        prompt: caption.clone(),
        negative: caption.clone(),
        seed,
    });
    let request = Request {
        items: items.collect(),
        ..Request::of("", work.settings, 0)
    };
    worker
        .draw(request)?
        .wait_with(&mut |event| super::go_on(&World::solo(), &event))?;
    Ok(())
}

fn searches(before: Searched, after: Searched) -> String {
    format!(
        "{} searched in {:.1} s",
        super::count(after.products - before.products, "product"),
        (after.time - before.time).as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(text: &str) -> Result<Vec<Lengths>, String> {
        text.split(',').map(str::parse).collect()
    }

    #[test]
    fn sizes_and_lengths_are_read() {
        assert_eq!("1024x768".parse(), Ok(PictureSize([1024, 768])));
        for bad in ["1024", "x", "0x64", "64x", "99999999x64", "64x64x64"] {
            assert!(bad.parse::<PictureSize>().is_err(), "{bad}");
        }
        assert_eq!(lengths("77"), Ok(vec![Lengths { from: 77, to: 77 }]));
        assert_eq!(lengths("1-512"), Ok(vec![Lengths { from: 1, to: 512 }]));
        for bad in ["0", "513", "8-4", "-4", "4-", "a"] {
            assert!(lengths(bad).is_err(), "{bad}");
        }
    }

    /// A picture of 1024² has 4096 tokens: one class with any caption. What differs is the caption alone.
    #[test]
    fn one_length_stands_for_a_class() {
        let all = [Lengths { from: 1, to: 512 }];
        assert_eq!(distinct(&all, 1, 4096, 32), [64, 128, 192, 256, 320, 384, 448, 512]);
        // Four captions together fall into narrower classes.
        let four = distinct(&all, 4, 4096, 32);
        assert!(
            four.contains(&32) && four.contains(&512) && four.len() <= 16,
            "{four:?}"
        );
        assert_eq!(distinct(&lengths("70,80,90").unwrap(), 1, 4096, 32), [90]);
        assert_eq!(distinct(&lengths("64,65").unwrap(), 1, 4096, 32), [64, 65]);
    }
}
