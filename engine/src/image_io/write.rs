//! Finished pictures as the bytes of a file, and to files.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use image::ExtendedColorType;
use image::codecs::webp::WebPEncoder;
use jpeg_encoder::ColorType;
use tempfile::NamedTempFile;

use super::settings::Settings;
use super::{RgbImage, png};
use crate::error::{Error, Result};

/// A file format for pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// Lossless; carries the settings.
    Png,
    /// Lossy, of the quality asked for.
    Jpeg,
    /// Lossless: the lossy kind has no encoder in Rust that is kept up, and JPEG serves where size matters.
    WebP,
}

impl ImageFormat {
    /// The format that a path's extension asks for.
    ///
    /// # Errors
    /// Naming the extensions there are.
    pub fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        match extension.to_str() {
            Some("png") => Ok(ImageFormat::Png),
            Some("jpg" | "jpeg") => Ok(ImageFormat::Jpeg),
            Some("webp") => Ok(ImageFormat::WebP),
            _ => Err(Error::file(path, "pictures are written as .png, .jpg, .jpeg or .webp")),
        }
    }

    /// The longest side that the format can express.
    fn max_side(self) -> usize {
        match self {
            ImageFormat::Png => i32::MAX as usize,
            ImageFormat::Jpeg => 65535,
            ImageFormat::WebP => 16384,
        }
    }

    /// Whether the format can express a picture of this size; otherwise a sentence that says so.
    fn check(self, width: usize, height: usize) -> std::result::Result<(), String> {
        let longest = self.max_side();
        match width.max(height) > longest {
            true => Err(format!(
                "{self} pictures are at most {longest} pixels wide and high, this one would be {width}x{height}"
            )),
            false => Ok(()),
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageFormat::Png => "PNG",
            ImageFormat::Jpeg => "JPEG",
            ImageFormat::WebP => "WebP",
        })
    }
}

/// How to encode a picture, and how to write it.
#[derive(Clone, Copy, Debug)]
pub struct WriteOptions<'a> {
    /// 1 to 100. From 90 on, colour has the resolution of brightness.
    pub jpeg_quality: u8,
    /// Kept in the file where it is a PNG.
    pub settings: Option<&'a Settings>,
    /// Whether a file that is there is replaced, rather than that an error.
    pub replace: bool,
    /// Whether to wait until the picture is on the disk, for whoever keeps account of it.
    pub durable: bool,
}

impl Default for WriteOptions<'_> {
    fn default() -> Self {
        WriteOptions {
            jpeg_quality: 92,
            settings: None,
            replace: true,
            durable: false,
        }
    }
}

/// Checks, before the work begins, that a picture of this size can be written to `path`.
///
/// # Errors
/// When the extension names no format, the format has no room for the size, or the folder does not take a file.
pub fn ensure_writable(path: &Path, width: usize, height: usize) -> Result<()> {
    let format = ImageFormat::of(path)?;
    format
        .check(width, height)
        .map_err(|reason| Error::file(path, reason))?;
    if path.is_dir() {
        return Err(Error::file(path, "is a folder"));
    }
    new_beside(path).map(|_| ())
}

/// The bytes of a picture's file; the same for the same picture and options.
///
/// # Errors
/// When the format has no room for the size, the quality is none, or settings cannot be written down.
pub fn encode_image(image: &RgbImage, format: ImageFormat, options: &WriteOptions<'_>) -> Result<Vec<u8>> {
    format.check(image.width, image.height).map_err(Error::invalid)?;
    let mut bytes = Vec::new();
    match format {
        ImageFormat::Png => encode_png(image, options, &mut bytes)?.map_err(refused)?,
        ImageFormat::Jpeg => encode_jpeg(image, options.jpeg_quality, &mut bytes)?,
        ImageFormat::WebP => encode_webp(image, &mut bytes)?,
    }
    Ok(bytes)
}

/// Writes `image` to `path` in the format of its extension: the bytes of [`encode_image`]. The file is written beside and renamed into place, so that
/// there is a whole picture or, on an error, whatever was there before.
///
/// # Errors
/// Those of [`ensure_writable`], and when the disk is full, or there is a file that is not to be replaced (an [`Error::Io`] of
/// kind `AlreadyExists`).
pub fn write_image(path: &Path, image: &RgbImage, options: &WriteOptions<'_>) -> Result<()> {
    ensure_writable(path, image.width, image.height)?;
    let format = ImageFormat::of(path)?;
    let file = new_beside(path)?;
    let written = match format {
        // Straight to the disk, which takes what is ready while the rest is compressed.
        ImageFormat::Png => encode_png(image, options, &mut file.as_file())?,
        _ => file.as_file().write_all(&encode_image(image, format, options)?),
    };
    written.map_err(|source| Error::io(path, source))?;
    if options.durable {
        // Before the rename: a name that outlives a crash must not be that of a file that does not.
        file.as_file().sync_all().map_err(|source| Error::io(path, source))?;
    }
    let kept = match options.replace {
        true => file.persist(path),
        false => file.persist_noclobber(path),
    };
    kept.map_err(|error| Error::io(path, error.error))?;
    Ok(())
}

/// A new file in the folder of `path`, removed when dropped.
fn new_beside(path: &Path) -> Result<NamedTempFile> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".l2p-").suffix(".tmp");
    // As any new file; the default for temporary ones is readable by their owner alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder).map_err(|source| {
        // Without the temporary file's name, which means nothing to the user.
        let source = source.to_string();
        let reason = source.split(" at path ").next().unwrap_or_default();
        Error::file(path, format!("cannot write into {}: {reason}", folder.display()))
    })
}

/// What an encoder says that writes to memory, which takes everything: the picture is at fault.
fn refused(reason: impl fmt::Display) -> Error {
    Error::invalid(format!("the picture cannot be encoded: {reason}"))
}

/// Writes a PNG with the settings in it; the inner error is that of `output`.
fn encode_png(image: &RgbImage, options: &WriteOptions<'_>, output: &mut impl Write) -> Result<io::Result<()>> {
    let texts = options.settings.map(Settings::texts).transpose()?;
    let texts: Vec<png::Text<'_>> = texts.iter().flatten().map(png::Text::from).collect();
    Ok(png::encode(image, &texts, output))
}

fn encode_jpeg(image: &RgbImage, quality: u8, output: &mut Vec<u8>) -> Result<()> {
    if !(1..=100).contains(&quality) {
        return Err(Error::invalid(format!(
            "a JPEG quality of {quality} is not in 1 to 100"
        )));
    }
    // Both fit 16 bits, as `encode_image` has checked.
    let (width, height) = (image.width as u16, image.height as u16);
    jpeg_encoder::Encoder::new(output, quality)
        .encode(&image.pixels, width, height, ColorType::Rgb)
        .map_err(refused)
}

fn encode_webp(image: &RgbImage, output: &mut Vec<u8>) -> Result<()> {
    let (width, height) = (image.width as u32, image.height as u32);
    WebPEncoder::new_lossless(output)
        .encode(&image.pixels, width, height, ExtendedColorType::Rgb8)
        .map_err(refused)
}
