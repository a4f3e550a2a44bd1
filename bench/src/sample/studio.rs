//! Drawing one picture, part by part.

use std::path::PathBuf;
use std::time::Instant;

use l2p_engine::flow::sampler::{Conditioning, Walk, sample};
use l2p_engine::flow::schedule::Schedule;
use l2p_engine::image_io::{RgbImage, WriteOptions, read_image, write_image};
use l2p_engine::model::Denoiser;
use l2p_engine::model::config::VaeConfig;
use l2p_engine::model::text::TextEncoder;
use l2p_engine::model::vae::VaeDecoder;
use l2p_engine::ops::noise::normal_noise;
use l2p_engine::ops::to_rgb8::to_rgb8;
use l2p_engine::profile::{Work, measure};
use l2p_engine::text::PromptTokenizer;
use l2p_engine::{Device, Result, Tensor};

use super::source::Source;
use crate::check::relative_error;

/// The shift of the schedule; it changes no time.
pub(super) const SHIFT: f64 = 4.0;

/// The parts of a picture in their order.
pub(super) const PARTS: [&str; 6] = ["text", "noise", "steps", "decode", "rgb", "png"];

/// Everything that is resident while pictures are drawn.
pub(super) struct Studio<'a> {
    pub device: Device,
    pub source: &'a Source,
    pub tokenizer: PromptTokenizer,
    pub text: Option<TextEncoder>,
    pub dit: Option<Box<dyn Denoiser>>,
    pub decoder: Option<VaeDecoder>,
    pub prompt: &'a str,
    pub schedule: Schedule,
    /// Pixels.
    pub side: usize,
    pub seed: u64,
    pub out: PathBuf,
}

/// Milliseconds of each of [`PARTS`].
pub(super) type Parts = [f64; PARTS.len()];

/// A picture as it was drawn.
pub(super) struct Drawn {
    pub parts: Parts,
    /// f32
    pub image: Tensor,
    pub caption_tokens: usize,
}

impl Studio<'_> {
    /// The prompt's features.
    pub fn encode(&self) -> anyhow::Result<Tensor> {
        let ids = self.source.fit(self.tokenizer.encode(self.prompt)?.ids);
        let encoder = self.text.as_ref().expect("the text encoder is loaded");
        Ok(encoder.encode(&ids)?)
    }

    pub fn dit(&self) -> &dyn Denoiser {
        self.dit.as_deref().expect("the transformer is loaded")
    }

    pub fn conditioning(&self, caption: &Tensor) -> Result<Conditioning> {
        let [height, width, _] = self.canvas();
        Ok(Conditioning {
            prompt: self.dit().prepare(&[caption], [height, width])?,
            negative: None,
        })
    }

    /// Height, width and channels of what the transformer draws.
    fn canvas(&self) -> [usize; 3] {
        let side = self.side / self.source.vae.as_ref().map_or(1, VaeConfig::downsampling);
        [side, side, self.source.spec.geometry().channels]
    }

    pub fn noise(&self) -> Result<Tensor> {
        let [height, width, channels] = self.canvas();
        normal_noise(&self.device, [1, height, width, channels], self.seed, 0)
    }

    pub fn decode(&self, drawn: Tensor) -> Result<Tensor> {
        match &self.decoder {
            Some(decoder) => decoder.decode(&drawn),
            None => Ok(drawn),
        }
    }

    /// Draws a picture; `caption` where the text encoder is no longer there.
    pub fn draw(&self, caption: Option<Tensor>) -> anyhow::Result<Drawn> {
        self.device.synchronize()?;
        let mut watch = Watch::start(&self.device);
        let caption = match caption {
            Some(caption) => caption,
            None => self.encode()?,
        };
        watch.part(0)?;
        let noise = self.noise()?;
        watch.part(1)?;
        let conditioning = self.conditioning(&caption)?;
        let drawn = sample(self.dit(), &conditioning, &self.schedule, noise, &mut |_| Ok(()))?;
        watch.part(2)?;
        let image = self.decode(drawn)?;
        watch.part(3)?;
        let pixels = to_rgb8(&image)?.into_pictures(0, 1)?.swap_remove(0);
        watch.part(4)?;
        let picture = RgbImage::new(self.side, self.side, pixels)?;
        write_image(&self.out, &picture, &WriteOptions::default())?;
        watch.part(5)?;
        Ok(Drawn {
            parts: watch.parts,
            image,
            caption_tokens: caption.dim(1),
        })
    }

    /// What drawing a picture comes to: that of a step for each of them, and the decoder's.
    pub fn work(&self, caption: &Tensor) -> Result<Work> {
        let conditioning = self.conditioning(caption)?;
        let mut walk = Walk::new(self.dit(), &conditioning, &Schedule::new(1, SHIFT)?, self.noise()?)?.unrecorded();
        let ((), step) = measure(&self.device, || walk.advance())?;
        let drawn = walk.finish();
        let (image, decode) = measure(&self.device, || self.decode(drawn))?;
        drop(image);
        let (step, steps) = (step.work(), self.schedule.steps() as u64);
        Ok(Work {
            flops: steps * step.flops,
            bytes: steps * step.bytes,
        }
        .plus(decode.work()))
    }

    /// How far the written picture is from what the CPU makes of the image.
    pub fn file_error(&self, image: &Tensor) -> anyhow::Result<f64> {
        let on_cpu = Tensor::from_slice(&Device::Cpu, &image.to_vec::<f32>()?, image.shape())?;
        let expected: Vec<f32> = to_rgb8(&on_cpu)?
            .bytes
            .to_vec::<u8>()?
            .into_iter()
            .map(f32::from)
            .collect();
        let found: Vec<f32> = read_image(&self.out)?.pixels().iter().copied().map(f32::from).collect();
        Ok(match image.to_vec::<f32>()?.iter().all(|value| value.is_finite()) {
            true => relative_error(&found, &expected),
            false => f64::INFINITY,
        })
    }
}

/// Takes the time of one part after the other.
struct Watch<'a> {
    device: &'a Device,
    last: Instant,
    parts: Parts,
}

impl<'a> Watch<'a> {
    fn start(device: &'a Device) -> Self {
        Watch {
            device,
            last: Instant::now(),
            parts: Parts::default(),
        }
    }

    /// Ends the part of this index.
    fn part(&mut self, index: usize) -> Result<()> {
        self.device.synchronize()?;
        let now = Instant::now();
        self.parts[index] = now.duration_since(self.last).as_secs_f64() * 1e3;
        self.last = now;
        Ok(())
    }
}
