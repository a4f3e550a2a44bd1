//! Finished pictures to files.

use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use image::ExtendedColorType;
use image::codecs::webp::WebPEncoder;
use jpeg_encoder::{ColorType, EncodingError};
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

/// How to write a picture.
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
pub fn expect_writable(path: &Path, width: usize, height: usize) -> Result<()> {
    let format = ImageFormat::of(path)?;
    let longest = format.max_side();
    if width.max(height) > longest {
        return Err(Error::file(
            path,
            format!("{format} pictures are at most {longest} pixels wide and high, this one would be {width}x{height}"),
        ));
    }
    if path.is_dir() {
        return Err(Error::file(path, "is a folder"));
    }
    new_beside(path).map(|_| ())
}

/// Writes `image` to `path` in the format of its extension. The file is written beside and renamed into place, so that
/// there is a whole picture or, on an error, whatever was there before.
///
/// # Errors
/// Those of [`expect_writable`], and when the disk is full, or there is a file that is not to be replaced (an [`Error::Io`] of
/// kind `AlreadyExists`).
pub fn write_image(path: &Path, image: &RgbImage, options: &WriteOptions<'_>) -> Result<()> {
    expect_writable(path, image.width, image.height)?;
    let file = new_beside(path)?;
    let mut output = BufWriter::with_capacity(1 << 20, file.as_file());
    match ImageFormat::of(path)? {
        ImageFormat::Png => write_png(path, image, options, &mut output)?,
        ImageFormat::Jpeg => write_jpeg(path, image, options.jpeg_quality, &mut output)?,
        ImageFormat::WebP => write_webp(path, image, &mut output)?,
    }
    output.flush().map_err(|source| Error::io(path, source))?;
    drop(output);
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

fn write_png(path: &Path, image: &RgbImage, options: &WriteOptions<'_>, output: &mut BufWriter<&File>) -> Result<()> {
    let texts = options.settings.map(Settings::texts).transpose()?;
    let texts: Vec<png::Text<'_>> = texts.iter().flatten().map(png::Text::from).collect();
    png::encode(image, &texts, output).map_err(|source| Error::io(path, source))
}

fn write_jpeg(path: &Path, image: &RgbImage, quality: u8, output: &mut BufWriter<&File>) -> Result<()> {
    if !(1..=100).contains(&quality) {
        return Err(Error::invalid(format!(
            "a JPEG quality of {quality} is not in 1 to 100"
        )));
    }
    // Both fit 16 bits, as `expect_writable` has checked.
    let (width, height) = (image.width as u16, image.height as u16);
    jpeg_encoder::Encoder::new(output, quality)
        .encode(&image.pixels, width, height, ColorType::Rgb)
        .map_err(|error| match error {
            EncodingError::IoError(source) => Error::io(path, source),
            other => Error::file(path, other.to_string()),
        })
}

fn write_webp(path: &Path, image: &RgbImage, output: &mut BufWriter<&File>) -> Result<()> {
    let (width, height) = (image.width as u32, image.height as u32);
    WebPEncoder::new_lossless(output)
        .encode(&image.pixels, width, height, ExtendedColorType::Rgb8)
        .map_err(|error| match error {
            image::ImageError::IoError(source) => Error::io(path, source),
            other => Error::file(path, other.to_string()),
        })
}
