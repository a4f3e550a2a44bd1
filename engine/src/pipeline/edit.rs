//! Editing a picture: parts of it are drawn anew, or it is drawn on beyond its borders, and the rest comes back to the bit.

use super::{Kept, StartImage};
use crate::error::{Error, Result};
use crate::image_io::{Mask, RgbImage};

/// Of a picture's shorter side, the share that borders between what is kept and what is drawn are softened over where nobody says.
const FEATHER_SHARE: usize = 64;

/// A picture, and which of its places may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    image: RgbImage,
    mask: Mask,
}

impl Edit {
    /// Of `image` the places that `mask` says are drawn anew (without one: none), and so many columns and rows more at its left, top,
    /// right and bottom. What is drawn fades into what is kept over `feather` pixels, all of them within what may change; where nobody
    /// says, over a 64th of the shorter side.
    ///
    /// # Errors
    /// When the mask has another size, or nothing may change.
    pub fn new(image: RgbImage, mask: Option<Mask>, margins: [usize; 4], feather: Option<usize>) -> Result<Self> {
        let size = [image.width(), image.height()];
        let mask = match mask {
            Some(mask) if [mask.width(), mask.height()] != size => {
                return Err(Error::invalid(format!(
                    "the mask has {}x{} places, the picture {}x{} pixels: they must have one size",
                    mask.width(),
                    mask.height(),
                    size[0],
                    size[1]
                )));
            }
            Some(mask) => mask,
            None => Mask::new(size[0], size[1], vec![0; size[0] * size[1]])?,
        };
        let mask = mask.extended(margins, u8::MAX)?;
        if mask.holds_all() {
            return Err(Error::invalid(
                "the mask keeps all of the picture: make white, or transparent, what is to be drawn anew",
            ));
        }
        let feather = feather.unwrap_or(size[0].min(size[1]) / FEATHER_SHARE);
        Ok(Edit {
            image: extended(&image, margins)?,
            mask: mask.feathered(feather),
        })
    }

    /// Width and height of the picture that comes back.
    pub fn size(&self) -> [usize; 2] {
        [self.image.width(), self.image.height()]
    }

    /// What a request begins with, of sides that are multiples of `multiple`: columns and rows that are missing at the right and bottom
    /// are added, and cut off again of what is drawn.
    ///
    /// # Errors
    /// When the picture would be too large.
    pub fn start(self, multiple: usize, strength: f32) -> Result<StartImage> {
        let shown = self.size();
        let [right, bottom] = shown.map(|side| side.next_multiple_of(multiple.max(1)) - side);
        let margins = [0, 0, right, bottom];
        Ok(StartImage {
            image: extended(&self.image, margins)?,
            strength,
            kept: Some(Kept {
                mask: self.mask.extended(margins, 0)?,
                shown,
            }),
        })
    }
}

/// A larger picture with this one in it: so many columns and rows more at its left, top, right and bottom, each like the nearest of its own.
fn extended(image: &RgbImage, margins: [usize; 4]) -> Result<RgbImage> {
    let [left, top, right, bottom] = margins;
    if margins == [0; 4] {
        return Ok(image.clone());
    }
    let (width, height) = (left + image.width() + right, top + image.height() + bottom);
    let mut pixels = Vec::with_capacity(3 * width * height);
    for row in 0..height {
        let source = row.saturating_sub(top).min(image.height() - 1);
        let row = &image.pixels()[3 * source * image.width()..][..3 * image.width()];
        let ends = (&row[..3], &row[row.len() - 3..]);
        (0..left).for_each(|_| pixels.extend_from_slice(ends.0));
        pixels.extend_from_slice(row);
        (0..right).for_each(|_| pixels.extend_from_slice(ends.1));
    }
    RgbImage::new(width, height, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: usize, height: usize) -> RgbImage {
        let bytes = (0..width * height).flat_map(|place| [place as u8; 3]);
        RgbImage::new(width, height, bytes.collect()).unwrap()
    }

    #[test]
    fn pictures_grow_by_their_borders() {
        let grown = extended(&picture(2, 2), [1, 1, 2, 0]).unwrap();
        let expected = [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
            .into_iter()
            .flat_map(|byte| [byte; 3]);
        assert_eq!(grown, RgbImage::new(5, 3, expected.collect()).unwrap());
    }

    #[test]
    fn an_edit_fits_the_model_and_shows_its_own_size() {
        let mask = Mask::new(5, 3, [[0, 0, 255, 255, 255]; 3].concat()).unwrap();
        let edit = Edit::new(picture(5, 3), Some(mask), [0; 4], Some(1)).unwrap();
        assert_eq!(edit.size(), [5, 3]);
        let start = edit.start(4, 0.75).unwrap();
        assert_eq!([start.image.width(), start.image.height()], [8, 4]);
        let kept = start.kept.unwrap();
        assert_eq!(kept.shown, [5, 3]);
        assert_eq!(
            kept.mask.weights(),
            [[0, 0, 128, 255, 255, 0, 0, 0]; 3]
                .concat()
                .into_iter()
                .chain([0; 8])
                .collect::<Vec<_>>()
        );
    }

    #[test]
    fn what_is_beyond_a_picture_is_drawn() {
        let edit = Edit::new(picture(64, 64), None, [2, 0, 0, 0], None).unwrap();
        assert_eq!(edit.size(), [66, 64]);
        // A 64th of the side: one place is softer.
        assert_eq!(edit.mask.weights()[..4], [255, 128, 0, 0]);
    }

    #[test]
    fn edits_that_make_no_sense_are_refused() {
        let message = |mask: Option<Mask>| Edit::new(picture(2, 2), mask, [0; 4], None).unwrap_err().to_string();
        assert!(message(None).contains("keeps all of the picture"));
        let wide = Mask::new(3, 2, vec![255; 6]).unwrap();
        assert!(message(Some(wide)).contains("the mask has 3x2 places, the picture 2x2"));
    }
}
