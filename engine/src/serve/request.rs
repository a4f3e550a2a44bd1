//! What is asked of a worker, in host memory alone, and what comes back.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::flow::noise_source::NoiseSource;
use crate::image_io::RgbImage;
use crate::limits::{Batch, CaptionTokens, LONGEST_PROMPT};
use crate::pipeline::{ModelFiles, Settings, StartImage};
use crate::tensor::HostTensor;

/// What a picture is to show or to stay away from.
#[derive(Clone, Debug, PartialEq)]
pub enum Caption {
    /// Words, which the text encoder reads.
    Text(String),
    /// What a text encoder has made of words: `[1, tokens, caption_width]`, real tokens only.
    Features(Arc<HostTensor>),
}

/// One picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// What to draw.
    pub prompt: Caption,
    /// What to move away from; without effect where cfg is 1.
    pub negative: Caption,
    /// Seed of the noise.
    pub seed: u64,
}

/// Pictures of one size and settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The pictures.
    pub items: Vec<Item>,
    /// Size, steps, shift and guidance; the sides are multiples of what the model draws, see [`ModelFiles::rounded`].
    pub settings: Settings,
    /// Where noise comes from.
    pub rng: NoiseSource,
    /// Noise f32 `[1, height, width, channels]` (latent model: of the latent) for every picture, instead of that of its seed.
    pub noise: Option<Arc<HostTensor>>,
    /// A picture to begin with, the same for all.
    pub start: Option<StartImage>,
    /// Pictures drawn at once; all where nothing is said.
    pub at_once: Option<Batch>,
    /// Give the numbers behind the pictures too.
    pub raw: bool,
    /// Tell now and then what the pictures are about to show. It costs a copy to the host each time, and changes nothing of them.
    pub previews: bool,
}

/// The pictures of a request, in the order of its items.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The pictures.
    pub pictures: Vec<RgbImage>,
    /// The numbers behind them, where they were asked for; one for each batch.
    pub raw: Vec<RawImages>,
}

/// The numbers behind a batch of pictures.
#[derive(Clone, Debug, PartialEq)]
pub struct RawImages {
    /// f32 `[batch, height, width, 3]`, about −1 to 1.
    pub images: HostTensor,
    /// What the transformer drew, of a latent model.
    pub latents: Option<HostTensor>,
}

impl Caption {
    /// The words, if it is words.
    pub fn text(&self) -> Option<&str> {
        match self {
            Caption::Text(text) => Some(text),
            Caption::Features(_) => None,
        }
    }

    fn check(&self, files: &ModelFiles) -> Result<()> {
        let width = files.spec().caption_width();
        match self {
            Caption::Text(text) if text.len() > LONGEST_PROMPT => Err(Error::invalid(format!(
                "a prompt of {} bytes is longer than the {LONGEST_PROMPT} that one may have",
                text.len()
            ))),
            Caption::Text(_) => Ok(()),
            Caption::Features(features) => match *features.shape() {
                [1, tokens, found] if found == width => {
                    CaptionTokens::checked(tokens)
                        .map_err(|reason| Error::invalid(format!("a caption has {tokens} tokens: {reason}")))?;
                    match features.is_finite() {
                        true => Ok(()),
                        false => Err(Error::not_finite("the features of a caption")),
                    }
                }
                _ => Err(Error::invalid(format!(
                    "the features of a caption have shape {:?}, expected [1, tokens, {width}]",
                    features.shape()
                ))),
            },
        }
    }
}

impl Request {
    /// One picture of these words, with noise of this seed.
    pub fn of(prompt: impl Into<String>, settings: Settings, seed: u64) -> Self {
        Request {
            items: vec![Item {
                prompt: Caption::Text(prompt.into()),
                negative: Caption::Text(String::new()),
                seed,
            }],
            settings,
            rng: NoiseSource::default(),
            noise: None,
            start: None,
            at_once: None,
            raw: false,
            previews: false,
        }
    }

    /// Whether negative prompts count.
    pub fn is_guided(&self) -> bool {
        self.settings.cfg != 1.0
    }

    /// The captions that count: prompts, then with guidance what to move away from.
    pub(super) fn captions(&self) -> impl Iterator<Item = &Caption> {
        let guided = self.is_guided();
        let negatives = self.items.iter().filter(move |_| guided).map(|item| &item.negative);
        self.items.iter().map(|item| &item.prompt).chain(negatives)
    }

    /// Pictures drawn at once.
    pub(super) fn batch(&self) -> usize {
        let all = self.items.len();
        self.at_once.map_or(all, |batch| batch.get().min(all))
    }

    /// Refuses what this model cannot draw, before anything of it is begun.
    ///
    /// # Errors
    /// Naming what is wrong.
    pub fn check(&self, files: &ModelFiles) -> Result<()> {
        if Batch::new(self.items.len() as u64).is_none() {
            return Err(Error::invalid(format!(
                "a request asks for {} to {} pictures, not for {}",
                Batch::LEAST,
                Batch::MOST,
                self.items.len()
            )));
        }
        files.ensure_drawable(&self.settings)?;
        self.captions().try_for_each(|caption| caption.check(files))?;
        if self.captions().any(|caption| caption.text().is_some()) {
            files.ensure_text_encoder()?;
        }
        if let Some(noise) = &self.noise {
            let [height, width, channels] = files.canvas(&self.settings);
            if noise.shape() != [1, height, width, channels] {
                return Err(Error::invalid(format!(
                    "the noise has shape {:?}, expected [1, {height}, {width}, {channels}]",
                    noise.shape()
                )));
            }
            if !noise.is_finite() {
                return Err(Error::not_finite("the noise"));
            }
        }
        match &self.start {
            Some(start) => start.check(&self.settings),
            None => Ok(()),
        }
    }
}
