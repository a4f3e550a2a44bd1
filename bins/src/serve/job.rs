//! A request for pictures on its way: what the drawing thread is given, and what whoever waits holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::image_io::RgbImage;
use l2p_engine::pipeline::{Settings, StartImage};
use tokio::sync::{oneshot, watch};

use super::failure::Failure;
use super::queue::{Queue, Waits};

/// What is drawn: pictures of one prompt, whose seeds follow each other.
#[derive(Clone, Debug)]
pub struct Order {
    /// What to draw.
    pub prompt: String,
    /// What to move away from.
    pub negative: String,
    /// Seed of the first picture's noise.
    pub seed: u64,
    /// Pictures.
    pub count: usize,
    /// Size, steps, shift and guidance.
    pub settings: Settings,
    /// Where noise comes from.
    pub rng: NoiseSource,
    /// A picture to begin with.
    pub start: Option<StartImage>,
}

/// How far a request is.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Steps done and steps in all; nothing while it waits.
    pub steps: Option<(usize, usize)>,
    /// What pictures are about to show, by their number, and how often that was told.
    pub previews: Vec<(usize, Arc<RgbImage>)>,
}

/// What the drawing thread is given.
pub struct Job {
    /// Its number.
    pub id: u64,
    /// What to draw.
    pub order: Order,
    /// Whether somebody looks at previews.
    pub previews: bool,
    progress: watch::Sender<Progress>,
    answer: oneshot::Sender<Result<Vec<RgbImage>, Failure>>,
    gone: Arc<AtomicBool>,
}

/// What whoever waits holds. Dropping it gives the request up, wherever it is.
pub struct Waiting {
    /// Its number.
    pub id: u64,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
    /// What comes of it.
    pub answer: oneshot::Receiver<Result<Vec<RgbImage>, Failure>>,
    gone: Arc<AtomicBool>,
    queue: Arc<Queue<Job>>,
}

/// Both ends of a request.
pub fn job(id: u64, order: Order, previews: bool, queue: &Arc<Queue<Job>>) -> (Job, Waiting) {
    let (progress, told) = watch::channel(Progress::default());
    let (answer, answered) = oneshot::channel();
    let gone = Arc::new(AtomicBool::new(false));
    let job = Job {
        id,
        order,
        previews,
        progress,
        answer,
        gone: gone.clone(),
    };
    let waiting = Waiting {
        id,
        progress: told,
        answer: answered,
        gone,
        queue: queue.clone(),
    };
    (job, waiting)
}

impl Job {
    /// Whether nobody waits for it any more.
    pub fn is_given_up(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Tells how many of its steps are done.
    pub fn tell_steps(&self, done: usize, total: usize) {
        self.progress
            .send_modify(|progress| progress.steps = Some((done, total)));
    }

    /// Shows what one of its pictures is about to show.
    pub fn show(&self, index: usize, image: Arc<RgbImage>) {
        self.progress.send_modify(|progress| {
            progress.previews.retain(|(other, _)| *other != index);
            progress.previews.push((index, image));
        });
    }

    /// Answers it. That nobody listens any more is nobody's loss.
    pub fn answer(self, outcome: Result<Vec<RgbImage>, Failure>) {
        let _ = self.answer.send(outcome);
    }
}

impl Waits for Job {
    fn id(&self) -> u64 {
        self.id
    }

    fn pictures(&self) -> usize {
        self.order.count
    }

    /// Everything but words and seeds must be the same; a picture to begin with is one for all.
    fn joins(&self, other: &Self) -> bool {
        let (a, b) = (&self.order, &other.order);
        a.settings == b.settings && a.rng == b.rng && a.start.is_none() && b.start.is_none()
    }
}

impl Waiting {
    /// A way to give the request up from elsewhere.
    pub fn gone(&self) -> Arc<AtomicBool> {
        self.gone.clone()
    }

    /// Requests that are drawn before this one; nothing while it is drawn.
    pub fn ahead(&self) -> Option<usize> {
        self.queue.ahead(self.id)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
        self.queue.remove(self.id);
    }
}
