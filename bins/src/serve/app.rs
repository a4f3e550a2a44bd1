//! What the routes share: models, limits, and the way from what somebody asks to a request in the queue.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::image_io::{
    Filter, ImageFormat, Mask, RgbImage, Settings as PictureSettings, WriteOptions, cover, encode_image, read_image,
};
use l2p_engine::limits::LONGEST_PROMPT;
use l2p_engine::lock::lock;
use l2p_engine::model::config::ModelKind;
use l2p_engine::pipeline::{Asked, Edit, ModelFiles, StartImage};
use tokio::sync::watch;

use super::arguments::Arguments;
use super::failure::Failure;
use super::files::Files;
use super::job::{Job, Order, Progress, Waiting, job};
use super::keys::Keys;
use super::metrics::Metrics;
use super::queue::{Queue, Refused};
use super::rate::Rate;

/// Strength where nobody says: of a picture that is drawn over as a whole, and of one of which parts are kept.
const STRENGTH: f32 = 0.6;
const STRENGTH_OF_PARTS: f32 = 1.0;

/// A model that is drawn with.
pub struct Model {
    /// What clients call it.
    pub name: String,
    /// What pictures say of it.
    pub published: String,
    /// What is known of it.
    pub files: Arc<ModelFiles>,
    /// Where requests for it wait.
    pub queue: Arc<Queue<Job>>,
}

/// What the routes share.
pub struct App {
    /// The models, the default one first.
    pub models: Vec<Arc<Model>>,
    /// The limits and addresses.
    pub arguments: Arguments,
    /// Who may ask.
    pub keys: Keys,
    /// How often.
    pub rate: Rate,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Pictures to be fetched.
    pub files: Files,
    /// Whether models are loaded, and nothing has failed for good.
    pub ready: AtomicBool,
    /// Whether the server is about to end.
    stopping: AtomicBool,
    /// Seconds since 1970 at the start.
    pub started: u64,
    next: AtomicU64,
    under_way: Mutex<BTreeMap<u64, UnderWay>>,
}

/// A request that is not answered yet, for whoever asks how things stand.
#[derive(Clone)]
pub struct UnderWay {
    /// Whose it is.
    pub client: String,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
    gone: Weak<AtomicBool>,
}

impl UnderWay {
    /// Gives it up.
    pub fn give_up(&self) {
        if let Some(gone) = self.gone.upgrade() {
            gone.store(true, Ordering::Relaxed);
        }
    }
}

/// What somebody asks for; the model says the rest.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// The model's name.
    pub model: Option<String>,
    /// What to draw.
    pub prompt: String,
    /// What to move away from.
    pub negative: Option<String>,
    /// Pixels.
    pub width: Option<u64>,
    /// Pixels.
    pub height: Option<u64>,
    /// Denoising steps.
    pub steps: Option<u64>,
    /// Guidance; 1 is none.
    pub cfg: Option<f32>,
    /// How far the schedule is shifted towards noise.
    pub shift: Option<f32>,
    /// Seed of the first picture's noise.
    pub seed: Option<u64>,
    /// Pictures.
    pub count: Option<u64>,
    /// The noise generator's name.
    pub rng: Option<String>,
    /// A picture file to begin with.
    pub image: Option<Vec<u8>>,
    /// How much of it may change.
    pub strength: Option<f32>,
    /// A picture file that says what of it is drawn anew.
    pub mask: Option<Vec<u8>>,
    /// Whether the mask is meant the other way.
    pub invert_mask: bool,
    /// Pixels over which borders are softened.
    pub feather: Option<u64>,
    /// Columns and rows to draw beyond the picture: left, top, right, bottom.
    pub extend: Option<[u64; 4]>,
}

/// A request that waits or is drawn.
pub struct Drawing {
    /// The model that draws.
    pub model: Arc<Model>,
    /// What is drawn.
    pub order: Order,
    /// What to wait for.
    pub waiting: Waiting,
}

impl App {
    /// For these models, none of them loaded.
    pub fn new(arguments: Arguments, models: Vec<Arc<Model>>, keys: Keys, metrics: Arc<Metrics>) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        App {
            models,
            keys,
            rate: Rate::new(arguments.rate.map(|rate| rate.get() as f64)),
            arguments,
            metrics,
            files: Files::default(),
            ready: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            started: now.map_or(0, |time| time.as_secs()),
            next: AtomicU64::new(1),
            under_way: Mutex::default(),
        }
    }

    /// Takes no more requests, and lets the server end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for model in &self.models {
            // What waits is still drawn.
            model.queue.close(false);
        }
    }

    /// Whether the server is about to end.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// A number that no other request has.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// The model of this name, or the first one.
    ///
    /// # Errors
    /// When there is none of the name.
    pub fn model(&self, name: Option<&str>) -> Result<&Arc<Model>, Failure> {
        let Some(name) = name else {
            return Ok(&self.models[0]);
        };
        let found = self.models.iter().find(|model| model.name == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = self.models.iter().map(|model| model.name.as_str()).collect();
            Failure {
                field: Some("model".into()),
                ..Failure::new(
                    StatusCode::NOT_FOUND,
                    format!(
                        "model: there is none named `{}`; there is {}",
                        l2p_engine::shown_name(name),
                        names.join(", ")
                    ),
                )
            }
        })
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.models.iter().map(|model| model.queue.waiting()).sum()
    }

    /// Requests that are not answered yet, by their number.
    pub fn under_way(&self) -> BTreeMap<u64, UnderWay> {
        let mut all = lock(&self.under_way);
        all.retain(|_, one| one.gone.strong_count() > 0);
        all.clone()
    }

    /// Puts what `client` asks for into the queue.
    ///
    /// # Errors
    /// When it cannot be drawn, is more than a request may ask for, too much waits, or the server is about to end.
    pub fn ask(&self, client: &str, ask: Ask, previews: bool) -> Result<Drawing, Failure> {
        let model = self.model(ask.model.as_deref())?.clone();
        let order = self.order(&model, ask)?;
        self.rate.spend(client, order.count as f64)?;
        let id = self.number();
        let (job, waiting) = job(id, order.clone(), previews, &model.queue);
        model.queue.push(client, job).map_err(|refused| match refused {
            Refused::Full(waiting) => Failure::later(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{waiting} requests wait already: come again in a moment"),
                5,
            ),
            Refused::Closed => Failure::later(StatusCode::SERVICE_UNAVAILABLE, "the server is about to end", 30),
        })?;
        let one = UnderWay {
            client: client.to_owned(),
            progress: waiting.progress.clone(),
            gone: Arc::downgrade(&waiting.gone()),
        };
        let mut all = lock(&self.under_way);
        all.retain(|_, one| one.gone.strong_count() > 0);
        all.insert(id, one);
        Ok(Drawing { model, order, waiting })
    }

    /// What is drawn for what is asked.
    fn order(&self, model: &Model, ask: Ask) -> Result<Order, Failure> {
        let limits = &self.arguments;
        for (name, text) in [("prompt", Some(&ask.prompt)), ("negative", ask.negative.as_ref())] {
            if let Some(text) = text.filter(|text| text.len() > LONGEST_PROMPT) {
                return Err(Failure::field(
                    name,
                    format!("{} bytes are more than {LONGEST_PROMPT}", text.len()),
                ));
            }
        }
        let within = |name: &str, value: Option<u64>, most: usize| match value {
            Some(value) if value == 0 || value > most as u64 => {
                Err(Failure::field(name, format!("expected 1 to {most}, found {value}")))
            }
            value => Ok(value.map(|value| value as usize)),
        };
        let count = within("count", ask.count, limits.max_count.get())?.unwrap_or(1);
        let side = limits.max_side.get();
        let kept = ask.mask.is_some() || ask.extend.is_some();
        let image = ask
            .image
            .as_deref()
            .map(|bytes| read("image", bytes, read_image))
            .transpose()?;
        if image.is_none() && (kept || ask.strength.is_some()) {
            return Err(Failure::field(
                "image",
                "is missing: strength, mask and extend are about a picture to begin with",
            ));
        }
        if kept && (ask.width.is_some() || ask.height.is_some()) {
            return Err(Failure::field(
                "size",
                "is that of the picture where a mask says what is drawn anew: leave it away",
            ));
        }
        let edit = match image.as_ref().filter(|_| kept) {
            Some(image) => Some(self.edit(image.clone(), &ask)?),
            None => None,
        };
        let own = edit
            .as_ref()
            .map(Edit::size)
            .or(image.as_ref().map(|image| [image.width(), image.height()]));
        let asked = |name, value, axis: usize| -> Result<Option<usize>, Failure> {
            Ok(within(name, value, side)?.or(own.map(|size| size[axis])))
        };
        let settings = model.files.settings(&Asked {
            width: asked("width", ask.width, 0)?,
            height: asked("height", ask.height, 1)?,
            steps: within("steps", ask.steps, limits.max_steps.get())?,
            shift: ask.shift,
            cfg: ask.cfg,
            solver: None,
        });
        let (settings, _) = model.files.rounded(settings.map_err(|error| Failure::of(&error))?);
        if settings.width.max(settings.height) > side.next_multiple_of(model.files.size_multiple()) {
            return Err(Failure::field(
                "size",
                format!(
                    "{}x{} pixels: a side has at most {side}",
                    settings.width, settings.height
                ),
            ));
        }
        let start = match (edit, image) {
            (Some(edit), _) => {
                let start = edit.start(model.files.size_multiple(), ask.strength.unwrap_or(STRENGTH_OF_PARTS));
                Some(start.map_err(|error| Failure::of(&error))?)
            }
            (None, Some(image)) => Some(StartImage {
                image: cover(&image, settings.width, settings.height, Filter::default())
                    .map_err(|error| Failure::of(&error))?,
                strength: ask.strength.unwrap_or(STRENGTH),
                kept: None,
            }),
            (None, None) => None,
        };
        if let Some(start) = &start {
            start.check(&settings).map_err(|error| Failure::of(&error))?;
        }
        model
            .files
            .ensure_drawable(&settings)
            .map_err(|error| Failure::of(&error))?;
        model
            .files
            .ensure_room(&settings, 1)
            .map_err(|error| Failure::of(&error))?;
        let rng = ask.rng.as_deref().map(str::parse::<NoiseSource>).transpose();
        Ok(Order {
            prompt: ask.prompt,
            negative: ask.negative.unwrap_or_default(),
            seed: ask.seed.unwrap_or_else(random_seed),
            count,
            settings,
            rng: rng.map_err(|error| Failure::field("rng", error))?.unwrap_or_default(),
            start,
        })
    }

    fn edit(&self, image: RgbImage, ask: &Ask) -> Result<Edit, Failure> {
        let mut mask = ask
            .mask
            .as_deref()
            .map(|bytes| read("mask", bytes, Mask::read))
            .transpose()?;
        if ask.invert_mask {
            mask = mask.as_ref().map(inverted).transpose()?;
        }
        let most = self.arguments.max_side.get() as u64;
        let margins = ask.extend.unwrap_or_default();
        if let Some(margin) = margins.into_iter().chain(ask.feather).find(|&pixels| pixels > most) {
            return Err(Failure::field(
                "extend",
                format!("{margin} pixels are more than {most}"),
            ));
        }
        let margins = margins.map(|pixels| pixels as usize);
        Edit::new(image, mask, margins, ask.feather.map(|pixels| pixels as usize)).map_err(|error| Failure::of(&error))
    }
}

/// The mask that keeps what this one changes.
fn inverted(mask: &Mask) -> Result<Mask, Failure> {
    let weights = mask.weights().iter().map(|weight| u8::MAX - weight).collect();
    Mask::new(mask.width(), mask.height(), weights).map_err(|error| Failure::of(&error))
}

/// A picture that was sent. It goes through a file, so that one reader with one set of limits reads all pictures.
fn read<T>(name: &str, bytes: &[u8], reader: impl Fn(&Path) -> l2p_engine::Result<T>) -> Result<T, Failure> {
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

/// Some seed, below 2⁵³ so that every client can hold it.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() >> 11
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

impl Model {
    /// Whether it draws pixels or latents.
    pub fn kind(&self) -> &'static str {
        match self.files.spec().geometry().kind {
            ModelKind::Latent => "latent",
            ModelKind::Pixel => "pixel",
        }
    }

    /// What the picture of this number says of how it was drawn; the same as l2p-sample's.
    pub fn described(&self, order: &Order, number: usize, arguments: &Arguments) -> PictureSettings {
        let settings = &order.settings;
        let shown = order
            .start
            .as_ref()
            .and_then(|start| start.kept.as_ref())
            .map(|kept| kept.shown);
        let [width, height] = shown.unwrap_or([settings.width, settings.height]);
        PictureSettings {
            prompt: order.prompt.clone(),
            negative: order.negative.clone(),
            seed: order.seed.wrapping_add(number as u64),
            steps: settings.steps,
            cfg: settings.cfg,
            shift: settings.shift,
            width,
            height,
            model: self.published.clone(),
            rng: order.rng.to_string(),
            solver: settings.solver.noted(),
            weights: arguments.weights.settings(),
            start: order.start.as_ref().map(crate::sample::start_settings),
        }
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

/// The name that pictures publish of a model at this path.
pub fn published(path: &Path) -> String {
    crate::sample::published(&PathBuf::from(path))
}
