//! The settings that drew a picture, kept in its PNG file.

use std::io::{BufReader, Read, Seek};
use std::path::Path;

use flate2::read::ZlibDecoder;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use super::png::{SIGNATURE, Text, chunk_crc};
use crate::error::{Error, Result};
use crate::files;
use crate::limits::{self, Side, Steps};

/// The keyword of the text chunk that holds the settings as JSON.
const KEYWORD: &str = "l2p";
/// The keyword under which picture viewers and other generators look for settings in words.
const WORDS: &str = "parameters";
/// No settings are longer than this.
const MAX_TEXT: u64 = 1 << 20;

/// Everything that is needed to draw a picture again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// What to draw.
    pub prompt: String,
    /// What to stay away from.
    pub negative: String,
    /// The seed of the noise.
    pub seed: u64,
    /// Steps from noise to picture.
    #[serde(deserialize_with = "steps")]
    pub steps: usize,
    /// The guidance scale; 1 means none.
    #[serde(deserialize_with = "finite")]
    pub cfg: f32,
    /// The shift of the noise schedule.
    #[serde(deserialize_with = "finite")]
    pub shift: f32,
    /// Pixels in a row.
    #[serde(deserialize_with = "side")]
    pub width: usize,
    /// Rows.
    #[serde(deserialize_with = "side")]
    pub height: usize,
    /// The model: a path as it was named, or a name alone where the path would say how a machine is laid out.
    pub model: String,
    /// The noise generator.
    pub rng: String,
    /// How weights were kept, where not in the compute type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<WeightSettings>,
    /// The picture that it began with, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartSettings>,
    /// The solver, where it is another than euler.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub solver: Option<String>,
}

/// How a model's weights were kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightSettings {
    /// Those of the transformer's main blocks: `bf16`, `int8` or `fp8`.
    pub trunk: String,
    /// Patterns of names of those that stayed in the compute type.
    pub trunk_keep: Vec<String>,
    /// Those of the text encoder's blocks.
    pub text: String,
}

/// What a picture began with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartSettings {
    /// The SHA-256 of the bytes of the picture at the size that was drawn.
    pub picture_sha256: String,
    /// How much of it could change.
    #[serde(deserialize_with = "finite")]
    pub strength: f32,
    /// The SHA-256 of how much each place could change, where some was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_sha256: Option<String>,
}

fn steps<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    Steps::deserialize(deserializer).map(Steps::get)
}

fn side<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    Side::deserialize(deserializer).map(Side::get)
}

/// A number that is finite in f32 too.
fn finite<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f32, D::Error> {
    let value = limits::finite(deserializer)?;
    match (value as f32).is_finite() {
        true => Ok(value as f32),
        false => Err(D::Error::custom(format!(
            "expected a number that fits f32, found {value}"
        ))),
    }
}

impl Settings {
    /// The texts for a PNG file, as keyword and text.
    pub(super) fn texts(&self) -> Result<[(&'static str, String); 2]> {
        let json = serde_json::to_string(self)
            .map_err(|error| Error::invalid(format!("the settings cannot be written: {error}")))?;
        Ok([(KEYWORD, json), (WORDS, self.in_words())])
    }

    /// The layout that picture viewers know from other generators; of the model its name alone. A zero byte would end the chunk's
    /// text early.
    fn in_words(&self) -> String {
        let name = Path::new(&self.model).file_name().and_then(|name| name.to_str());
        let mut words = self.prompt.clone();
        if !self.negative.is_empty() {
            words += &format!("\nNegative prompt: {}", self.negative);
        }
        words += &format!(
            "\nSteps: {}, CFG scale: {}, Seed: {}, Size: {}x{}, Model: {}, Shift: {}, RNG: {}",
            self.steps,
            self.cfg,
            self.seed,
            self.width,
            self.height,
            name.unwrap_or(&self.model),
            self.shift,
            self.rng
        );
        if let Some(weights) = &self.weights {
            words += &format!(", Trunk: {}, Text encoder: {}", weights.trunk, weights.text);
        }
        if let Some(start) = &self.start {
            words += &format!(", Denoising strength: {}", start.strength);
        }
        if let Some(solver) = &self.solver {
            words += &format!(", Sampler: {solver}");
        }
        words.replace('\0', "\u{fffd}")
    }
}

impl<'a> From<&'a (&'static str, String)> for Text<'a> {
    fn from((keyword, text): &'a (&'static str, String)) -> Self {
        Text { keyword, text }
    }
}

/// The settings that a PNG file carries.
///
/// # Errors
/// When the file is no PNG, is damaged, or carries none, or one that makes no sense, which is named.
pub fn read_settings(path: &Path) -> Result<Settings> {
    let file = files::open_regular(path)?;
    let text = find_text(&mut BufReader::new(file)).map_err(|source| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::file(path, "the file ends before the picture does"),
        std::io::ErrorKind::InvalidData => Error::file(path, source.to_string()),
        _ => Error::io(path, source),
    })?;
    let text = text.ok_or_else(|| {
        Error::file(
            path,
            "carries no settings; only PNG files as l2p wrote them do, not copies that an editor saved",
        )
    })?;
    files::from_json(text.as_bytes()).map_err(|reason| Error::file(path, format!("its text of settings {reason}")))
}

/// Walks the chunks up to the one with the settings.
fn find_text(file: &mut (impl Read + Seek)) -> std::io::Result<Option<String>> {
    let mut signature = [0; 8];
    // A file shorter than that is no PNG either.
    if file.read_exact(&mut signature).is_err() || signature != SIGNATURE {
        return Err(invalid("is not a PNG file; settings are kept in PNG files only"));
    }
    loop {
        let mut head = [0; 8];
        file.read_exact(&mut head)?;
        let [a, b, c, d, kind @ ..] = head;
        let length = u64::from(u32::from_be_bytes([a, b, c, d]));
        match &kind {
            b"IEND" => return Ok(None),
            b"iTXt" if length <= MAX_TEXT => {
                let mut data = vec![0; length as usize];
                let mut crc = [0; 4];
                file.read_exact(&mut data)?;
                file.read_exact(&mut crc)?;
                if u32::from_be_bytes(crc) != chunk_crc(&kind, &data) {
                    return Err(invalid("is damaged: the checksum of its text is wrong"));
                }
                if let Some(text) = settings_text(&data)? {
                    return Ok(Some(text));
                }
            }
            _ => {
                file.seek_relative(length as i64 + 4)?;
            }
        }
    }
}

/// The text of an `iTXt` chunk with our keyword: keyword, compression flag and method, language, translated keyword, text.
fn settings_text(data: &[u8]) -> std::io::Result<Option<String>> {
    let Some(rest) = data
        .strip_prefix(KEYWORD.as_bytes())
        .and_then(|rest| rest.strip_prefix(b"\0"))
    else {
        return Ok(None);
    };
    let malformed = || invalid("is damaged: its settings are malformed");
    let [compressed, _method, names @ ..] = rest else {
        return Err(malformed());
    };
    let text = names.splitn(3, |&byte| byte == 0).nth(2).ok_or_else(malformed)?;
    let mut bytes = Vec::new();
    match compressed {
        0 => bytes.extend_from_slice(text),
        // Tools that make PNG files smaller compress text too.
        _ => {
            ZlibDecoder::new(text)
                .take(MAX_TEXT)
                .read_to_end(&mut bytes)
                .map_err(|_| malformed())?;
        }
    }
    String::from_utf8(bytes).map(Some).map_err(|_| malformed())
}

fn invalid(reason: &'static str) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, reason)
}
