//! Colour profiles: pictures in other colours than sRGB become sRGB, which is what models were trained on and what is drawn.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};

use moxcms::{ColorProfile, DataColorSpace, Layout, Transform8BitExecutor, TransformOptions};

use crate::lock::lock;

/// What a picture's numbers are, colour profile aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    /// One for the brightness.
    Grey,
    /// Red, green and blue.
    Rgb,
    /// Four inks, which the decoder turned into red, green and blue by rule of thumb.
    Inks,
}

/// How a picture's colours become sRGB.
#[derive(Clone, Debug)]
pub(super) enum Profile {
    /// They are.
    Srgb,
    /// By a conversion.
    Convert(ToSrgb),
    /// Not at all: the profile is damaged or of another kind, and the numbers are taken for sRGB.
    Unusable,
}

/// A conversion to sRGB.
#[derive(Clone)]
pub(super) struct ToSrgb {
    transform: Arc<Transform8BitExecutor>,
    /// Whether it takes one number a pixel.
    grey: bool,
}

impl fmt::Debug for ToSrgb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ToSrgb(grey: {})", self.grey)
    }
}

/// Two pictures whose numbers differ by no more than this are the same to the eye, and to rounding: profiles that say sRGB in
/// their own words convert to within it, and leave the picture as it is.
const SAME: u8 = 1;

/// Conversions that were made last, for all pictures of a set tend to have the same profile and making one takes as long as
/// decoding a small picture.
static MADE: Mutex<VecDeque<Made>> = Mutex::new(VecDeque::new());

/// A conversion and what it was made of.
type Made = (Box<[u8]>, Numbers, Profile);

/// Conversions that are kept, and the longest profile of one that is.
const MOST_MADE: usize = 16;
const LONGEST_MADE: usize = 1 << 20;

impl Profile {
    /// The conversion for a picture with this ICC profile, or with none.
    pub fn of(icc: Option<&[u8]>, numbers: Numbers) -> Self {
        match icc {
            None if numbers == Numbers::Inks => Profile::Unusable,
            None => Profile::Srgb,
            Some(icc) => Self::made(icc, numbers),
        }
    }

    fn made(icc: &[u8], numbers: Numbers) -> Self {
        let is_it = |(known, of, _): &&Made| **known == *icc && *of == numbers;
        if let Some((_, _, profile)) = lock(&MADE).iter().find(is_it) {
            return profile.clone();
        }
        let profile = Self::convert(icc, numbers).unwrap_or(Profile::Unusable);
        if icc.len() <= LONGEST_MADE {
            let mut made = lock(&MADE);
            made.truncate(MOST_MADE - 1);
            made.push_front((icc.into(), numbers, profile.clone()));
        }
        profile
    }

    fn convert(icc: &[u8], numbers: Numbers) -> Option<Self> {
        let profile = ColorProfile::new_from_slice(icc).ok()?;
        let grey = match (profile.color_space, numbers) {
            // A picture in grey may well carry the profile of the space that it would have colours in.
            (DataColorSpace::Rgb, Numbers::Rgb | Numbers::Grey) => false,
            (DataColorSpace::Gray, Numbers::Grey) => true,
            _ => return None,
        };
        let source = if grey { Layout::Gray } else { Layout::Rgb };
        let options = TransformOptions::default();
        let transform = profile
            .create_transform_8bit(source, &ColorProfile::new_srgb(), Layout::Rgb, options)
            .ok()?;
        let to_srgb = ToSrgb { transform, grey };
        Some(match to_srgb.changes_something()? {
            true => Profile::Convert(to_srgb),
            false => Profile::Srgb,
        })
    }
}

impl ToSrgb {
    /// Whether any colour of a coarse lattice changes by more than [`SAME`].
    fn changes_something(&self) -> Option<bool> {
        const STEPS: [u8; 9] = [0, 16, 48, 80, 112, 144, 176, 224, 255];
        let greys = STEPS.iter().map(|&level| [level; 3]);
        let colours = STEPS.iter().flat_map(|&red| {
            STEPS
                .iter()
                .flat_map(move |&green| STEPS.iter().map(move |&blue| [red, green, blue]))
        });
        let lattice: Vec<u8> = match self.grey {
            true => greys.flatten().collect(),
            false => colours.flatten().collect(),
        };
        let mut converted = lattice.clone();
        self.apply(&mut converted, &mut Vec::new()).ok()?;
        Some(lattice.iter().zip(&converted).any(|(a, b)| a.abs_diff(*b) > SAME))
    }

    /// Converts pixels of three bytes; those of a grey picture hold its number three times.
    pub fn apply(&self, pixels: &mut Vec<u8>, scratch: &mut Vec<u8>) -> Result<(), String> {
        scratch.clear();
        scratch.resize(pixels.len(), 0);
        let outcome = match self.grey {
            true => {
                let levels: Vec<u8> = pixels.iter().step_by(3).copied().collect();
                self.transform.transform(&levels, scratch)
            }
            false => self.transform.transform(pixels, scratch),
        };
        outcome.map_err(|error| format!("cannot be brought to sRGB by its colour profile: {error}"))?;
        std::mem::swap(pixels, scratch);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(profile: &ColorProfile, numbers: Numbers) -> Profile {
        Profile::of(Some(&profile.encode().unwrap()), numbers)
    }

    #[test]
    fn srgb_by_any_name_is_left_alone() {
        assert!(matches!(Profile::of(None, Numbers::Rgb), Profile::Srgb));
        for numbers in [Numbers::Rgb, Numbers::Grey] {
            // The second time from what was kept.
            for _ in 0..2 {
                assert!(matches!(profile(&ColorProfile::new_srgb(), numbers), Profile::Srgb));
            }
        }
        for step in 0..2 * MOST_MADE {
            let gamma = 1.0 + step as f32 / 10.0;
            profile(&ColorProfile::new_gray_with_gamma(gamma), Numbers::Grey);
        }
        assert!(MADE.lock().unwrap().len() <= MOST_MADE);
    }

    #[test]
    fn other_spaces_are_converted() {
        let Profile::Convert(to_srgb) = profile(&ColorProfile::new_display_p3(), Numbers::Rgb) else {
            panic!("Display P3 is not sRGB");
        };
        // Display P3's (0.5, 0.5, 0.5) is the same grey, and its (0.8, 0.2, 0.2) a stronger red in sRGB, by the primaries
        // of both (computed in f64).
        let mut pixels = vec![128, 128, 128, 204, 51, 51];
        to_srgb.apply(&mut pixels, &mut Vec::new()).unwrap();
        let expected: [u8; 6] = [128, 128, 128, 222, 24, 41];
        let far = pixels
            .iter()
            .zip(expected)
            .any(|(found, expected)| found.abs_diff(expected) > 1);
        assert!(!far, "{pixels:?}");
        let Profile::Convert(to_srgb) = profile(&ColorProfile::new_gray_with_gamma(1.0), Numbers::Grey) else {
            panic!("linear grey is not sRGB");
        };
        // Half of the light is 188 in sRGB.
        let mut pixels = vec![128, 128, 128];
        to_srgb.apply(&mut pixels, &mut Vec::new()).unwrap();
        assert!(pixels.iter().all(|value| value.abs_diff(188) <= 1), "{pixels:?}");
    }

    #[test]
    fn profiles_of_other_kinds_and_damaged_ones_are_unusable() {
        assert!(matches!(Profile::of(None, Numbers::Inks), Profile::Unusable));
        let p3 = ColorProfile::new_display_p3();
        assert!(matches!(profile(&p3, Numbers::Inks), Profile::Unusable));
        let grey = ColorProfile::new_gray_with_gamma(1.0);
        assert!(matches!(profile(&grey, Numbers::Rgb), Profile::Unusable));
        let whole = p3.encode().unwrap();
        for damaged in [&whole[..100], &whole[..whole.len() / 2], b"", b"no profile"] {
            assert!(matches!(Profile::of(Some(damaged), Numbers::Rgb), Profile::Unusable));
        }
    }
}
