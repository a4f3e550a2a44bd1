//! The rows of a picture on their way from its decoder: cut to the part that is wanted, in 8-bit RGB, in sRGB, on white.

use super::colour::ToSrgb;
use super::room::with_room;

/// How a decoder stores a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// 1: grey; 2: grey and opacity; 3: red, green, blue; 4: these and opacity.
    pub channels: usize,
    /// Two bytes a channel, the more significant first, instead of one.
    pub deep: bool,
}

impl Layout {
    /// Bytes of a pixel.
    pub fn bytes(self) -> usize {
        self.channels << usize::from(self.deep)
    }

    fn has_opacity(self) -> bool {
        self.channels.is_multiple_of(2)
    }
}

/// A part of a picture, as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The first column and row.
    pub left: usize,
    /// See `left`.
    pub top: usize,
    /// Columns and rows.
    pub width: usize,
    /// See `width`.
    pub height: usize,
}

/// What pixels are read as.
#[derive(Clone, Copy)]
pub(super) enum Reading<'a> {
    /// Colours, converted where that is needed.
    Colours(Option<&'a ToSrgb>),
    /// A mask: of each pixel its lightness twice, and its opacity.
    Mask,
}

impl Reading<'_> {
    /// Whether three bytes are taken as they are.
    pub fn is_plain(self) -> bool {
        matches!(self, Reading::Colours(None))
    }
}

/// Collects the pixels of a part.
pub(super) struct Rows<'a> {
    /// Bytes of a whole row.
    row_bytes: usize,
    layout: Layout,
    part: Part,
    reading: Reading<'a>,
    /// Rows that have come.
    seen: usize,
    pixels: Vec<u8>,
    /// What a row needs on the way.
    shallow: Vec<u8>,
    rgb: Vec<u8>,
    scratch: Vec<u8>,
}

impl<'a> Rows<'a> {
    /// Nothing yet of this part of a picture `width` pixels wide.
    pub fn new(width: usize, layout: Layout, part: Part, reading: Reading<'a>) -> Result<Self, String> {
        Ok(Rows {
            row_bytes: width * layout.bytes(),
            layout,
            part,
            reading,
            seen: 0,
            pixels: with_room(part.width * part.height * 3)?,
            shallow: Vec::new(),
            rgb: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// Takes the next row of the picture.
    pub fn push(&mut self, row: &[u8]) -> Result<(), String> {
        let number = self.seen;
        self.seen += 1;
        if row.len() != self.row_bytes {
            return Err("cannot be decoded: it holds rows of another length than its header says".into());
        }
        if !(self.part.top..self.part.top + self.part.height).contains(&number) {
            return Ok(());
        }
        let bytes = self.layout.bytes();
        let row = &row[self.part.left * bytes..(self.part.left + self.part.width) * bytes];
        if self.layout.bytes() == 3 && self.reading.is_plain() {
            self.pixels.extend_from_slice(row);
            return Ok(());
        }
        let row = match self.layout.deep {
            false => row,
            true => {
                self.shallow.clear();
                let (channels, _) = row.as_chunks::<2>();
                self.shallow
                    .extend(channels.iter().map(|bytes| rounded(u16::from_be_bytes(*bytes))));
                &self.shallow
            }
        };
        self.rgb.clear();
        let channels = self.layout.channels;
        let pixels = row.chunks_exact(channels);
        match channels {
            1 | 2 => self.rgb.extend(pixels.flat_map(|pixel| [pixel[0]; 3])),
            _ => self.rgb.extend(pixels.flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])),
        }
        if let Reading::Colours(Some(to_srgb)) = self.reading {
            to_srgb.apply(&mut self.rgb, &mut self.scratch)?;
        }
        let pixels = self.rgb.as_chunks_mut::<3>().0.iter_mut();
        let opacities = row.iter().skip(channels - 1).step_by(channels);
        match (self.reading, self.layout.has_opacity()) {
            (Reading::Mask, true) => pixels.zip(opacities).for_each(|(pixel, &opacity)| {
                let lightness = lightness(*pixel);
                *pixel = [lightness, lightness, opacity];
            }),
            (Reading::Mask, false) => pixels.for_each(|pixel| {
                let lightness = lightness(*pixel);
                *pixel = [lightness, lightness, u8::MAX];
            }),
            (Reading::Colours(_), true) => pixels.zip(opacities).for_each(|(pixel, opacity)| {
                *pixel = pixel.map(|channel| on_white(channel, *opacity));
            }),
            (Reading::Colours(_), false) => {}
        }
        self.pixels.extend_from_slice(&self.rgb);
        Ok(())
    }

    /// The part, when all of its rows have come.
    pub fn finish(self) -> Result<Vec<u8>, String> {
        match self.pixels.len() == self.part.width * self.part.height * 3 {
            true => Ok(self.pixels),
            false => Err("cannot be decoded: the file ends before the picture does".into()),
        }
    }
}

/// How light a colour is, as it is stored: Rec. 709's weights, rounded; of a grey its own value.
fn lightness([red, green, blue]: [u8; 3]) -> u8 {
    let sum = 2126 * u32::from(red) + 7152 * u32::from(green) + 722 * u32::from(blue);
    ((sum + 5000) / 10_000) as u8
}

/// A channel of 16 bits as the nearest of 8.
fn rounded(channel: u16) -> u8 {
    ((u32::from(channel) + 128) / 257) as u8
}

/// Divided by 255 to the nearest.
fn on_white(channel: u8, opacity: u8) -> u8 {
    let (channel, opacity) = (u32::from(channel), u32::from(opacity));
    ((channel * opacity + 255 * (255 - opacity) + 127) / 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(layout: Layout, rows: &[&[u8]], part: Part) -> Result<Vec<u8>, String> {
        let mut collected = Rows::new(rows[0].len() / layout.bytes(), layout, part, Reading::Colours(None))?;
        rows.iter().try_for_each(|row| collected.push(row))?;
        collected.finish()
    }

    const fn layout(channels: usize, deep: bool) -> Layout {
        Layout { channels, deep }
    }

    #[test]
    fn every_layout_becomes_rgb() {
        let part = |width| Part {
            left: 0,
            top: 0,
            width,
            height: 1,
        };
        let row = |channels, deep, row: &[u8]| {
            let layout = layout(channels, deep);
            rows(layout, &[row], part(row.len() / layout.bytes())).unwrap()
        };
        assert_eq!(row(1, false, &[7, 200]), [7, 7, 7, 200, 200, 200]);
        assert_eq!(
            row(2, false, &[7, 255, 7, 0, 0, 51]),
            [7, 7, 7, 255, 255, 255, 204, 204, 204]
        );
        assert_eq!(row(3, false, &[1, 2, 3]), [1, 2, 3]);
        assert_eq!(row(4, false, &[0, 100, 255, 51]), [204, 224, 255]);
        assert_eq!(row(1, true, &[0, 129]), [1, 1, 1]);
        assert_eq!(row(2, true, &[100, 100, 255, 255]), [100, 100, 100]);
        assert_eq!(row(3, true, &[0, 0, 100, 100, 255, 255]), [0, 100, 255]);
        assert_eq!(row(4, true, &[1, 1, 2, 2, 3, 3, 0, 0]), [255, 255, 255]);
    }

    #[test]
    fn only_the_part_is_kept() {
        let part = Part {
            left: 1,
            top: 1,
            width: 1,
            height: 2,
        };
        let picture: [&[u8]; 3] = [&[1, 2], &[3, 4], &[5, 6]];
        assert_eq!(rows(layout(1, false), &picture, part).unwrap(), [4, 4, 4, 6, 6, 6]);
        assert!(
            rows(layout(1, false), &picture[..2], part)
                .unwrap_err()
                .contains("ends before")
        );
        let ragged: [&[u8]; 2] = [&[1, 2], &[3]];
        assert!(
            rows(layout(1, false), &ragged, part)
                .unwrap_err()
                .contains("another length")
        );
    }
}
