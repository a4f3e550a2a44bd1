//! Pictures as they come and go: files, base64, formats.

use std::io::Write;
use std::path::Path;

use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use l2p_engine::image_io::{ImageFormat, RgbImage, Settings as PictureSettings, WriteOptions, encode_image};

use super::failure::Failure;

/// A picture that was sent. It goes through a file, so that one reader with one set of limits reads all pictures.
pub fn read<T>(name: &str, bytes: &[u8], reader: impl Fn(&Path) -> l2p_engine::Result<T>) -> Result<T, Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!(%error, "a picture that was sent cannot be put into a file");
        Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the server has no room for the picture",
        )
    };
    let mut file = tempfile::NamedTempFile::new().map_err(|error| failed(&error))?;
    file.write_all(bytes).map_err(|error| failed(&error))?;
    reader(file.path()).map_err(|error| match error {
        l2p_engine::Error::File { reason, .. } => Failure::field(name, reason),
        error => Failure::field(name, error),
    })
}

/// The settings that a PNG carries that was sent.
pub fn read_settings(bytes: &[u8]) -> Result<PictureSettings, Failure> {
    read("picture", bytes, l2p_engine::image_io::read_settings)
}

/// The bytes of a picture that was sent as text: base64, with or without `data:…,` before it.
pub fn from_base64(name: &str, text: &str) -> Result<Vec<u8>, Failure> {
    let data = match text.strip_prefix("data:") {
        Some(rest) => rest.split_once(',').map_or("", |(_, data)| data),
        None => text,
    };
    BASE64
        .decode(data.trim())
        .map_err(|_| Failure::field(name, "expected a picture in base64"))
}

/// Bytes as base64.
pub fn to_base64(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

/// A format by the name that clients give it.
pub fn format_of(name: &str, text: Option<&str>) -> Result<ImageFormat, Failure> {
    match text {
        None | Some("png") => Ok(ImageFormat::Png),
        Some("jpeg" | "jpg") => Ok(ImageFormat::Jpeg),
        Some("webp") => Ok(ImageFormat::WebP),
        Some(other) => Err(Failure::field(
            name,
            format!("expected png, jpeg or webp, found `{}`", l2p_engine::shown_name(other)),
        )),
    }
}

/// A format's media type.
pub fn media_type(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Png => "image/png",
        ImageFormat::Jpeg => "image/jpeg",
        ImageFormat::WebP => "image/webp",
    }
}

/// A format's name.
pub fn format_name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Png => "png",
        ImageFormat::Jpeg => "jpeg",
        ImageFormat::WebP => "webp",
    }
}

/// The bytes of a picture's file.
///
/// # Errors
/// When the format has no room for the picture.
pub fn encode(
    image: &RgbImage,
    format: ImageFormat,
    settings: &PictureSettings,
    quality: u8,
) -> Result<Vec<u8>, Failure> {
    let options = WriteOptions {
        jpeg_quality: quality,
        settings: Some(settings),
        ..WriteOptions::default()
    };
    encode_image(image, format, &options).map_err(|error| Failure::of(&error))
}

/// A preview as a data URL.
pub fn preview_url(image: &RgbImage) -> Option<String> {
    preview(image).map(|bytes| format!("data:image/jpeg;base64,{}", to_base64(&bytes)))
}

/// A preview's file.
pub fn preview(image: &RgbImage) -> Option<Vec<u8>> {
    let options = WriteOptions {
        jpeg_quality: 80,
        ..WriteOptions::default()
    };
    encode_image(image, ImageFormat::Jpeg, &options).ok()
}
