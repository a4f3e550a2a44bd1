//! What the routes share: models, limits, and the way from what somebody asks to a request in the queue.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use axum::http::StatusCode;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::image_io::{Filter, Mask, RgbImage, Settings as PictureSettings, cover, read_image};
use l2p_engine::limits::LONGEST_PROMPT;
use l2p_engine::lock::lock;
use l2p_engine::model::config::ModelKind;
use l2p_engine::pipeline::{Asked, Edit, ModelFiles, Settings, StartImage};
use tokio::sync::{Semaphore, watch};

use super::arguments::Arguments;
use super::failure::Failure;
use super::files::Files;
use super::job::{Job, Order, Progress, Waiting, job};
use super::keys::Keys;
use super::metrics::Metrics;
use super::pictures::read;
use super::queue::{Queue, Refused};
use super::rate::Rate;

/// Strength where nobody says: of a picture that is drawn over as a whole, and of one of which parts are kept.
const STRENGTH: f32 = 0.6;
const STRENGTH_OF_PARTS: f32 = 1.0;

/// So many of the largest bodies may be there at a time.
const BODIES: u64 = 16;

fn body_kilobytes(arguments: &Arguments) -> u32 {
    let all = (arguments.max_body.0 / 1024 * BODIES).max(1);
    u32::try_from(all).unwrap_or(u32::MAX)
}

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
    /// What all bodies may take together, in kilobytes.
    pub bodies: Arc<Semaphore>,
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
            metrics,
            files: Files::default(),
            bodies: Arc::new(Semaphore::new(body_kilobytes(&arguments) as usize)),
            ready: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            started: now.map_or(0, |time| time.as_secs()),
            arguments,
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

    /// The most that one body takes of what all may take, in kilobytes.
    pub fn body_kilobytes(&self) -> u32 {
        body_kilobytes(&self.arguments)
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
        let full = |waiting: usize| {
            let message = format!("{waiting} requests wait already: come again in a moment");
            Failure::later(StatusCode::SERVICE_UNAVAILABLE, message, 5)
        };
        // Before anything is decoded or counted for what will not be drawn.
        let waiting = model.queue.waiting();
        if waiting >= self.arguments.queue.get() {
            return Err(full(waiting));
        }
        let order = self.order(&model, ask)?;
        self.rate.spend(client, order.count as f64)?;
        let id = self.number();
        let (job, waiting) = job(id, order.clone(), previews, &model.queue);
        model.queue.push(client, job).map_err(|refused| match refused {
            Refused::Full(waiting) => full(waiting),
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
        for (name, text) in [("prompt", Some(&ask.prompt)), ("negative", ask.negative.as_ref())] {
            if let Some(text) = text.filter(|text| text.len() > LONGEST_PROMPT) {
                return Err(Failure::field(
                    name,
                    format!("{} bytes are more than {LONGEST_PROMPT}", text.len()),
                ));
            }
        }
        let count = within("count", ask.count, self.arguments.max_count.get())?.unwrap_or(1);
        let rng = ask.rng.as_deref().map(str::parse::<NoiseSource>).transpose();
        let rng = rng.map_err(|error| Failure::field("rng", error))?.unwrap_or_default();
        let begun = self.begun(&ask)?;
        let settings = self.settings(model, &ask, begun.as_ref())?;
        Ok(Order {
            start: begun
                .map(|begun| begun.start(model, &settings, ask.strength))
                .transpose()?,
            prompt: ask.prompt,
            negative: ask.negative.unwrap_or_default(),
            seed: ask.seed.unwrap_or_else(random_seed),
            count,
            settings,
            rng,
        })
    }

    /// The picture to begin with, if there is one.
    fn begun(&self, ask: &Ask) -> Result<Option<Begun>, Failure> {
        let kept = ask.mask.is_some() || ask.extend.is_some();
        if kept && (ask.width.is_some() || ask.height.is_some()) {
            let message = "is that of the picture where a mask says what is drawn anew: leave it away";
            return Err(Failure::field("size", message));
        }
        match ask
            .image
            .as_deref()
            .map(|bytes| read("image", bytes, read_image))
            .transpose()?
        {
            None if kept || ask.strength.is_some() => {
                let message = "is missing: strength, mask and extend are about a picture to begin with";
                Err(Failure::field("image", message))
            }
            None => Ok(None),
            Some(image) if kept => Ok(Some(Begun::Parts(self.edit(image, ask)?))),
            Some(image) => Ok(Some(Begun::Whole(image))),
        }
    }

    /// Size, steps, shift and guidance: what is asked for, then the picture to begin with, then the model.
    fn settings(&self, model: &Model, ask: &Ask, begun: Option<&Begun>) -> Result<Settings, Failure> {
        let side = self.arguments.max_side.get();
        let own = begun.map(Begun::size);
        let asked = |name, value, axis: usize| -> Result<Option<usize>, Failure> {
            Ok(within(name, value, side)?.or(own.map(|size| size[axis])))
        };
        let settings = model.files.settings(&Asked {
            width: asked("width", ask.width, 0)?,
            height: asked("height", ask.height, 1)?,
            steps: within("steps", ask.steps, self.arguments.max_steps.get())?,
            shift: ask.shift,
            cfg: ask.cfg,
            solver: None,
        });
        let (settings, _) = model.files.rounded(settings.map_err(|error| Failure::of(&error))?);
        if settings.width.max(settings.height) > side.next_multiple_of(model.files.size_multiple()) {
            let size = format!(
                "{}x{} pixels: a side has at most {side}",
                settings.width, settings.height
            );
            return Err(Failure::field("size", size));
        }
        model
            .files
            .ensure_drawable(&settings)
            .map_err(|error| Failure::of(&error))?;
        model
            .files
            .ensure_room(&settings, 1)
            .map_err(|error| Failure::of(&error))?;
        Ok(settings)
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

/// A picture to begin with.
enum Begun {
    /// It is drawn over as a whole.
    Whole(RgbImage),
    /// Parts of it are kept.
    Parts(Edit),
}

impl Begun {
    /// Its width and height.
    fn size(&self) -> [usize; 2] {
        match self {
            Begun::Whole(image) => [image.width(), image.height()],
            Begun::Parts(edit) => edit.size(),
        }
    }

    /// Brought to the size that is drawn.
    fn start(self, model: &Model, settings: &Settings, strength: Option<f32>) -> Result<StartImage, Failure> {
        let start = match self {
            Begun::Parts(edit) => edit.start(model.files.size_multiple(), strength.unwrap_or(STRENGTH_OF_PARTS)),
            Begun::Whole(image) => {
                cover(&image, settings.width, settings.height, Filter::default()).map(|image| StartImage {
                    image,
                    strength: strength.unwrap_or(STRENGTH),
                    kept: None,
                })
            }
        };
        let start = start.map_err(|error| Failure::of(&error))?;
        start.check(settings).map_err(|error| Failure::of(&error))?;
        Ok(start)
    }
}

/// A number from 1 to `most`, if it is given.
fn within(name: &str, value: Option<u64>, most: usize) -> Result<Option<usize>, Failure> {
    match value {
        Some(value) if value == 0 || value > most as u64 => {
            Err(Failure::field(name, format!("expected 1 to {most}, found {value}")))
        }
        value => Ok(value.map(|value| value as usize)),
    }
}

/// The mask that keeps what this one changes.
fn inverted(mask: &Mask) -> Result<Mask, Failure> {
    let weights = mask.weights().iter().map(|weight| u8::MAX - weight).collect();
    Mask::new(mask.width(), mask.height(), weights).map_err(|error| Failure::of(&error))
}

/// Some seed, below 2⁵³ so that every client can hold it.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() >> 11
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

/// The name that pictures publish of a model at this path.
pub fn published(path: &Path) -> String {
    crate::sample::published(&PathBuf::from(path))
}
