//! Pictures from files.
//!
//! Nothing is decoded before the header has said that it can be: the file is a regular one within its budget, the picture has no
//! more pixels than [`PICTURE_PIXELS`] and takes no more memory than [`DECODING_BYTES`], and what other threads decode at the time
//! leaves room for it. Of a picture that is to be cut only the part that is wanted is kept, and of a PNG in the usual order no more
//! than that is ever held.

mod colour;
mod jpeg;
mod png;
mod room;
mod rows;
mod webp;

use std::io::{BufRead, BufReader, Cursor, Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageFormat};

use self::colour::Profile;
use self::room::Taken;
use self::rows::{Layout, Part, Reading, Rows};
use super::RgbImage;
use super::resize::{Cover, Filter};
use crate::error::{Error, Result};
use crate::files;
use crate::limits::{Budget, DECODING_BYTES, PICTURE_PIXELS};

/// What the beginning of a picture's file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Pixels in a row of the upright picture.
    pub width: usize,
    /// Its rows.
    pub height: usize,
    /// What its colours are.
    pub colours: Colours,
}

/// What a picture's colours are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// sRGB, or nothing that says otherwise.
    Srgb,
    /// Those of a profile, from which they are converted.
    Profile,
    /// Inks, or those of a profile that cannot be used; taken for sRGB.
    Unknown,
}

/// Reads a PNG, JPEG or WebP file as 8-bit RGB. What the file is, its content says, not its name. Turned pictures (EXIF) are
/// set upright, those with a colour profile converted to sRGB, transparent ones laid on white, deeper ones rounded to 8 bits.
///
/// # Errors
/// Naming the file and what is wrong with it, or that it is larger than [`crate::limits`] allow.
pub fn read_image(path: &Path) -> Result<RgbImage> {
    read_part(path, false, &mut |_| Ok([0; 2])).map(|(image, _)| image)
}

/// Reads a picture as a mask, of each pixel `[lightness, lightness, opacity]`; see [`super::Mask`].
pub(super) fn read_lightness(path: &Path) -> Result<RgbImage> {
    read_part(path, true, &mut |_| Ok([0; 2])).map(|(image, _)| image)
}

/// [`read_image`] and [`super::cover`] in one: the picture resized, keeping its proportions, until it covers `width`x`height`
/// pixels, and cropped around its centre. What is cut away is not kept on the way.
///
/// # Errors
/// Those of [`read_image`], and when an extent is 0 or too large.
pub fn read_cover(path: &Path, width: usize, height: usize, filter: Filter) -> Result<RgbImage> {
    let target = [width, height];
    let mut size = [0; 2];
    let mut margins = [0; 2];
    // The room is held until the large picture is gone.
    let (part, _room) = read_part(path, false, &mut |found| {
        size = found;
        margins = Cover::new(size, target)?.margins(filter);
        Ok(margins)
    })?;
    Cover::new(size, target)?.of_part(&part, margins, filter)
}

/// What the beginning of a file says of the picture that [`read_image`] would give.
///
/// # Errors
/// Naming the file and what is wrong with it, or that it is larger than [`crate::limits`] allow.
pub fn read_header(path: &Path) -> Result<Header> {
    let (stored, _) = stored(path)?;
    let [width, height] = stored.upright();
    Ok(Header {
        width,
        height,
        colours: match stored.profile {
            Profile::Srgb => Colours::Srgb,
            Profile::Convert(_) => Colours::Profile,
            Profile::Unusable => Colours::Unknown,
        },
    })
}

/// The picture without the columns at its left and right and the rows at its top and bottom that `margins` says for its size;
/// upright. With it comes the room that was taken for it.
fn read_part(
    path: &Path,
    as_mask: bool,
    margins: &mut dyn FnMut([usize; 2]) -> Result<[usize; 2]>,
) -> Result<(RgbImage, Taken)> {
    let (mut stored, file) = stored(path)?;
    stored.as_mask = as_mask;
    let mut margins = margins(stored.upright())?;
    if stored.is_turned() {
        margins.reverse();
    }
    let part = Part {
        left: margins[0],
        top: margins[1],
        width: stored.width - 2 * margins[0],
        height: stored.height - 2 * margins[1],
    };
    let room = room::take(file + stored.memory(part));
    let bytes = files::read(path, Budget::PICTURE)?;
    let format = format_of(&mut Cursor::new(&bytes)).map_err(|reason| Error::file(path, reason))?;
    let pixels = guarded(|| format.decode(&bytes, &stored, part)).map_err(|reason| Error::file(path, reason))?;
    drop(bytes);
    let image = turned(pixels, part, stored.orientation).map_err(|reason| Error::file(path, reason))?;
    Ok((image, room))
}

/// What the file's header says, and the file's length.
fn stored(path: &Path) -> Result<(Stored, u64)> {
    let file = files::open_regular(path)?;
    let length = file.metadata().map_err(|error| Error::io(path, error))?.len();
    let header = || {
        if length > Budget::PICTURE.bytes {
            let (most, kind) = (Budget::PICTURE.bytes, Budget::PICTURE.kind);
            return Err(format!("has more than {most} bytes, the most that a {kind} may have"));
        }
        let mut source = BufReader::new(file);
        let stored = format_of(&mut source)?.header(source)?;
        stored.ensure_room(length)?;
        Ok(stored)
    };
    let stored = guarded(header).map_err(|reason| Error::file(path, reason))?;
    Ok((stored, length))
}

/// What `work` says; a decoder that panics at a damaged file has said that it is one.
fn guarded<T>(work: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    let outcome = catch_unwind(AssertUnwindSafe(work));
    outcome.unwrap_or_else(|_| Err("cannot be decoded: it makes the decoder fail".into()))
}

/// A format that is read.
#[derive(Clone, Copy)]
enum Format {
    Png,
    Jpeg,
    WebP,
}

impl Format {
    fn header(self, source: impl BufRead + Seek) -> std::result::Result<Stored, String> {
        match self {
            Format::Png => png::header(source),
            Format::Jpeg => jpeg::header(source),
            Format::WebP => webp::header(source),
        }
    }

    fn decode(self, bytes: &[u8], stored: &Stored, part: Part) -> std::result::Result<Vec<u8>, String> {
        match self {
            Format::Png => png::decode(bytes, stored, part),
            Format::Jpeg => jpeg::decode(bytes, stored, part),
            Format::WebP => webp::decode(bytes, stored, part),
        }
    }
}

/// Bytes that tell every known format.
const LONGEST_SIGNATURE: u64 = 16;

/// The format of a file, which is read from its beginning again.
fn format_of(source: &mut (impl BufRead + Seek)) -> std::result::Result<Format, String> {
    let mut start = Vec::new();
    let read = source.by_ref().take(LONGEST_SIGNATURE).read_to_end(&mut start);
    read.and_then(|_| source.rewind()).map_err(|error| error.to_string())?;
    match image::guess_format(&start) {
        Ok(ImageFormat::Png) => Ok(Format::Png),
        Ok(ImageFormat::Jpeg) => Ok(Format::Jpeg),
        Ok(ImageFormat::WebP) => Ok(Format::WebP),
        _ => Err("is not a PNG, JPEG or WebP picture".into()),
    }
}

/// A picture as its file holds it.
struct Stored {
    /// Pixels in a row, and rows, before it is set upright.
    width: usize,
    height: usize,
    orientation: Orientation,
    profile: Profile,
    /// What its decoder gives.
    layout: Layout,
    /// Bytes of the whole picture as its decoder gives it; 0 where it gives row after row.
    whole: u64,
    /// Bytes that the decoder takes beside.
    decoder: u64,
    /// Whether the decoder is still at work while pixels are kept.
    streams: bool,
    /// Whether it is read as a mask.
    as_mask: bool,
}

impl Stored {
    fn reading(&self) -> Reading<'_> {
        match &self.profile {
            _ if self.as_mask => Reading::Mask,
            Profile::Convert(to_srgb) => Reading::Colours(Some(to_srgb)),
            Profile::Srgb | Profile::Unusable => Reading::Colours(None),
        }
    }

    /// Whether the upright picture is as wide as this is high.
    fn is_turned(&self) -> bool {
        use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
        matches!(self.orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
    }

    /// Width and height when it is upright.
    fn upright(&self) -> [usize; 2] {
        match self.is_turned() {
            true => [self.height, self.width],
            false => [self.width, self.height],
        }
    }

    /// Whether the decoder's bytes are what is wanted.
    fn is_plain(&self) -> bool {
        self.layout.bytes() == 3 && self.reading().is_plain()
    }

    /// Bytes that decoding a part takes beside the file.
    fn memory(&self, part: Part) -> u64 {
        let kept = (part.width * part.height * 3) as u64;
        let copied = match self.is_plain() && self.whole == kept {
            true => 0,
            false => kept,
        };
        let turning = if self.is_turned() { kept } else { 0 };
        let decoding = match self.streams {
            true => self.decoder + copied,
            false => self.decoder.max(copied),
        };
        self.whole + decoding.max(turning)
    }

    /// Refuses a picture that would take more memory than there is for all.
    fn ensure_room(&self, file: u64) -> std::result::Result<(), String> {
        let (width, height) = (self.width, self.height);
        let whole = Part {
            left: 0,
            top: 0,
            width,
            height,
        };
        let needed = file + self.memory(whole);
        match needed <= DECODING_BYTES {
            true => Ok(()),
            false => Err(format!(
                "has {width}x{height} pixels, which take {needed} bytes to decode, more than the {DECODING_BYTES} that there are \
                 for it"
            )),
        }
    }
}

/// Refuses a picture with no pixels or too many.
fn ensure_few_pixels(width: u32, height: u32) -> std::result::Result<(), String> {
    match u64::from(width) * u64::from(height) {
        0 => Err(format!("cannot be decoded: its header says {width}x{height} pixels")),
        pixels if pixels > PICTURE_PIXELS => Err(format!(
            "has {width}x{height} pixels, more than the {PICTURE_PIXELS} that a picture may have"
        )),
        _ => Ok(()),
    }
}

/// A part of a picture that was decoded whole.
fn part_of(whole: Vec<u8>, stored: &Stored, part: Part) -> std::result::Result<Vec<u8>, String> {
    if stored.is_plain() && (part.width, part.height) == (stored.width, stored.height) {
        return Ok(whole);
    }
    let mut rows = Rows::new(stored.width, stored.layout, part, stored.reading())?;
    whole
        .chunks_exact(stored.width * stored.layout.bytes())
        .try_for_each(|row| rows.push(row))?;
    rows.finish()
}

/// The pixels of a part set upright.
fn turned(pixels: Vec<u8>, part: Part, orientation: Orientation) -> std::result::Result<RgbImage, String> {
    let picture = |width: usize, height: usize, pixels| {
        RgbImage::new(width, height, pixels).map_err(|error| format!("cannot be decoded: {error}"))
    };
    if orientation == Orientation::NoTransforms {
        return picture(part.width, part.height, pixels);
    }
    let buffer = image::RgbImage::from_raw(part.width as u32, part.height as u32, pixels);
    let mut image = DynamicImage::ImageRgb8(buffer.ok_or("cannot be decoded: rows are missing")?);
    image.apply_orientation(orientation);
    picture(image.width() as usize, image.height() as usize, image.into_bytes())
}
