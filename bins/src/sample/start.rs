//! The flags that say what a picture begins with and what of it is kept.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use l2p_engine::image_io::{Filter, Mask, StartSettings, read_cover, read_header, read_image};
use l2p_engine::limits::Side;
use l2p_engine::pipeline::{Edit, Kept, ModelFiles, Settings, StartImage};
use sha2::{Digest, Sha256};

/// Strength where nobody says, of a picture that is drawn over as a whole; where parts are kept the rest is drawn from nothing.
const STRENGTH: f32 = 0.6;
const STRENGTH_OF_PARTS: f32 = 1.0;

/// What a picture begins with.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct StartFlags {
    /// A picture to begin with, instead of noise alone: a PNG, JPEG or WebP file
    #[arg(long, value_name = "PICTURE")]
    pub init: Option<PathBuf>,
    /// How much of --init may change: above 0, which leaves it as it is, to 1, which leaves nothing of it [default: 0.6; 1 with --mask
    /// or --extend]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub strength: Option<f32>,
    /// What of --init is drawn anew, a picture of its size: white is, black comes back to the bit (as PNG or WebP), grey is mixed; of a
    /// picture with transparent places these are drawn anew
    #[arg(long, value_name = "PICTURE", requires = "init")]
    pub mask: Option<PathBuf>,
    /// Draw --init on beyond its borders: so many pixels at its left, top, right and bottom; the picture itself comes back to the bit
    #[arg(long, value_name = "LEFT,TOP,RIGHT,BOTTOM", requires = "init", value_parser = margins)]
    pub extend: Option<Margins>,
    /// Pixels over which what is drawn fades into what is kept, all of them within what is drawn [default: a 64th of the picture's
    /// shorter side]
    #[arg(long, value_name = "PIXELS", requires = "init", value_parser = feather)]
    pub feather: Option<usize>,
}

/// Columns and rows at the left, top, right and bottom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Margins(pub [usize; 4]);

fn margins(text: &str) -> Result<Margins, String> {
    let numbers: Option<Vec<usize>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    let numbers = numbers.and_then(|numbers| <[usize; 4]>::try_from(numbers).ok());
    let numbers = numbers.ok_or("expected four numbers of pixels, LEFT,TOP,RIGHT,BOTTOM, such as 0,0,256,0")?;
    match numbers.iter().all(|&number| number <= Side::MOST as usize) {
        true if numbers != [0; 4] => Ok(Margins(numbers)),
        true => Err("all four are 0: nothing would be drawn".into()),
        false => Err(format!("a side has at most {} pixels", Side::MOST)),
    }
}

fn feather(text: &str) -> Result<usize, String> {
    let pixels: Option<usize> = text.parse().ok();
    pixels
        .filter(|&pixels| pixels <= Side::MOST as usize)
        .ok_or_else(|| format!("expected 0 to {} pixels", Side::MOST))
}

/// What a picture begins with, read and brought to the size that is drawn.
pub struct Start {
    /// For the worker.
    pub image: StartImage,
    /// What pictures say of it.
    pub settings: StartSettings,
}

impl StartFlags {
    /// Whether parts of the picture are kept, so that its size is that of what is drawn.
    fn keeps(&self) -> bool {
        self.mask.is_some() || self.extend.is_some()
    }

    /// Refuses flags that mean nothing together; `sized` where width or height is given.
    ///
    /// # Errors
    /// Naming the flag.
    pub fn check(&self, sized: bool) -> anyhow::Result<()> {
        if self.init.is_none() && self.strength.is_some() {
            bail!("--strength says how much of a picture may change: name the picture with --init");
        }
        if let Some(strength) = self.strength.filter(|strength| !(*strength > 0.0 && *strength <= 1.0)) {
            bail!(
                "a --strength of {strength} makes no sense: use more than 0, which keeps the picture, to 1, which keeps nothing of it"
            );
        }
        if self.keeps() && sized {
            bail!("with --mask or --extend the size is that of --init: leave --width and --height away");
        }
        if !self.keeps() && self.feather.is_some() {
            bail!("--feather softens the border of --mask or --extend: give one of them");
        }
        Ok(())
    }

    /// Width and height that --init asks for, where the arguments and the model's own size do not count.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn size(&self) -> anyhow::Result<Option<[usize; 2]>> {
        let Some(path) = &self.init else { return Ok(None) };
        let header = read_header(path)?;
        let [left, top, right, bottom] = self.extend.map_or([0; 4], |margins| margins.0);
        Ok(Some([left + header.width + right, top + header.height + bottom]))
    }

    /// Reads the pictures that are named; `settings` has the size that is drawn.
    ///
    /// # Errors
    /// When one cannot be read, their sizes differ, or nothing may change.
    pub fn read(&self, files: &ModelFiles, settings: &Settings) -> anyhow::Result<Option<Start>> {
        let Some(path) = &self.init else { return Ok(None) };
        let image = match self.keeps() {
            false => StartImage {
                image: read_cover(path, settings.width, settings.height, Filter::default())?,
                strength: self.strength.unwrap_or(STRENGTH),
                kept: None,
            },
            true => {
                let mask = self.mask.as_deref().map(Mask::read).transpose()?;
                let margins = self.extend.map_or([0; 4], |margins| margins.0);
                let named = || match &self.mask {
                    Some(mask) => format!("{} on {}", mask.display(), path.display()),
                    None => path.display().to_string(),
                };
                let edit = Edit::new(read_image(path)?, mask, margins, self.feather).with_context(named)?;
                edit.start(files.size_multiple(), self.strength.unwrap_or(STRENGTH_OF_PARTS))?
            }
        };
        image.check(settings)?;
        Ok(Some(Start {
            settings: start_settings(&image),
            image,
        }))
    }
}

impl Start {
    /// Width and height of what comes back.
    pub fn shown(&self) -> [usize; 2] {
        match &self.image.kept {
            Some(Kept { shown, .. }) => *shown,
            None => [self.image.image.width(), self.image.image.height()],
        }
    }
}

/// What a picture says of the one that it began with.
pub fn start_settings(start: &StartImage) -> StartSettings {
    StartSettings {
        picture_sha256: hash(start.image.pixels()),
        strength: start.strength,
        mask_sha256: start.kept.as_ref().map(|kept| hash(kept.mask.weights())),
    }
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_are_read() {
        assert_eq!(margins("0, 1,2,3"), Ok(Margins([0, 1, 2, 3])));
        for bad in [
            "",
            "1",
            "1,2,3",
            "1,2,3,4,5",
            "-1,0,0,0",
            "a,0,0,0",
            "0,0,0,0",
            "99999999,0,0,0",
        ] {
            assert!(margins(bad).is_err(), "{bad}");
        }
        assert_eq!(feather("0"), Ok(0));
        assert!(feather("-1").is_err() && feather("99999999").is_err());
    }

    #[test]
    fn flags_that_mean_nothing_are_named() {
        let init = StartFlags {
            init: Some("fox.png".into()),
            ..StartFlags::default()
        };
        init.check(true).unwrap();
        let masked = StartFlags {
            mask: Some("mask.png".into()),
            ..init.clone()
        };
        masked.check(false).unwrap();
        assert!(masked.check(true).unwrap_err().to_string().contains("leave --width"));
        for (flags, word) in [
            (
                StartFlags {
                    strength: Some(0.5),
                    ..StartFlags::default()
                },
                "name the picture with --init",
            ),
            (
                StartFlags {
                    strength: Some(0.0),
                    ..init.clone()
                },
                "a --strength of 0",
            ),
            (
                StartFlags {
                    strength: Some(f32::NAN),
                    ..init.clone()
                },
                "a --strength of NaN",
            ),
            (
                StartFlags {
                    feather: Some(3),
                    ..init
                },
                "--feather softens",
            ),
        ] {
            let message = flags.check(false).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
