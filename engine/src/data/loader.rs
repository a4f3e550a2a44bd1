//! Worker threads that decode pictures ahead of the device.
//!
//! Items are numbered in the order of the batches; a worker takes the next number, loads that item and puts it where
//! [`Loader::next_batch`] finds it, which waits only when its items are not there yet and counts how long. Workers stay a
//! bounded number of items ahead. What an item holds depends on its number alone, so the order in which threads finish
//! changes nothing; a picture that turns out to be damaged is replaced by the next one of the same size in the set.
//!
//! Ranks take the batches of the set in turn, so that the pictures of a step are the same however many ranks there are.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::features::{FeatureStore, StoreKey};
use super::kept::{Kept, Room};
use super::order::{BatchOrder, PlannedBatch, Position};
use super::random::{Draws, Purpose};
use super::set::{DataSet, damage_of};
use super::sizing::PictureSize;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::flow::noise_source::NoiseSource;
use crate::image_io::{Filter, read_cover};
use crate::lock::lock;
use crate::tensor::HostTensor as Features;

/// What a picture is to the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Bytes `[height, width, 3]`.
    Rgb {
        /// The bytes.
        bytes: Vec<u8>,
        /// Their extents.
        size: PictureSize,
    },
    /// A latent `[1, rows, columns, channels]`.
    Latent(Features),
}

impl Content {
    fn bytes(&self) -> usize {
        match self {
            Content::Rgb { bytes, .. } => bytes.len(),
            Content::Latent(latent) => latent.bytes().len(),
        }
    }
}

/// The features of a caption, and under which name they are in the store.
#[derive(Clone, Debug)]
pub struct Caption {
    /// The name.
    pub key: StoreKey,
    /// The features.
    pub features: Arc<Features>,
}

/// A picture, ready for a batch.
#[derive(Clone, Debug)]
pub struct Item {
    /// Its index in the set.
    pub picture: usize,
    /// The picture.
    pub content: Arc<Content>,
    /// Its caption, or an empty one.
    pub caption: Caption,
    /// The noise of its seed, of the content's shape, where it is made on the host.
    pub noise: Option<Features>,
}

/// The store of the latents of a set's pictures, and the key of each.
pub type Latents = (FeatureStore, Vec<StoreKey>);

/// Where the items of one set come from; clones share what is kept in memory.
#[derive(Clone, Debug)]
pub struct ItemSource {
    captions: FeatureStore,
    latents: Option<Arc<Latents>>,
    torch_noise: bool,
    kept_contents: Arc<Kept<usize, Content>>,
    kept_captions: Arc<Kept<StoreKey, Features>>,
}

impl ItemSource {
    /// A source of the items of a set. `captions` holds the features of all captions, `latents` the latents of all pictures, for
    /// a latent model. With `torch_noise` it makes PyTorch's noise of each picture's seed. What it loads stays in memory as
    /// far as `room` goes.
    pub fn new(captions: FeatureStore, latents: Option<Latents>, torch_noise: bool, room: &Arc<Room>) -> Self {
        ItemSource {
            captions,
            latents: latents.map(Arc::new),
            torch_noise,
            kept_contents: Arc::new(Kept::new(room.clone())),
            kept_captions: Arc::new(Kept::new(room.clone())),
        }
    }

    /// A picture of `set` with the features of `caption`.
    ///
    /// # Errors
    /// When the picture, or what the stores hold of it, is damaged.
    pub fn load(&self, set: &DataSet, picture: usize, caption: &str) -> Result<Item> {
        let content = self
            .kept_contents
            .get(&picture, Content::bytes, || self.content(set, picture))?;
        let shape = match &*content {
            Content::Rgb { size, .. } => [size.height, size.width, 3],
            Content::Latent(latent) => [latent.shape()[1], latent.shape()[2], latent.shape()[3]],
        };
        let noise = match (self.torch_noise, set.records()[picture].seed) {
            (true, Some(seed)) => Some(NoiseSource::Torch.noise(&Device::Cpu, &[seed], shape)?),
            _ => None,
        };
        Ok(Item {
            picture,
            content,
            caption: self.caption(caption)?,
            noise: noise.as_ref().map(Features::from_tensor).transpose()?,
        })
    }

    /// The features of a caption.
    ///
    /// # Errors
    /// When the store does not hold them.
    pub fn caption(&self, text: &str) -> Result<Caption> {
        let key = self.captions.key(&[text.as_bytes()]);
        let read = || {
            let features = self.captions.read(&key).filter(|features| features.shape().len() == 3);
            features.ok_or_else(|| Error::invalid("the features of its caption in the cache are damaged"))
        };
        let features = self.kept_captions.get(&key, |features| features.bytes().len(), read)?;
        Ok(Caption { key, features })
    }

    fn content(&self, set: &DataSet, picture: usize) -> Result<Content> {
        if let Some((store, keys)) = self.latents.as_deref() {
            let latent = store.read(&keys[picture]).filter(|latent| latent.shape().len() == 4);
            let latent = latent.ok_or_else(|| Error::invalid("its latent in the cache is damaged"))?;
            return Ok(Content::Latent(latent));
        }
        let (record, size) = (&set.records()[picture], set.sizes()[picture]);
        let image = read_cover(&record.path, size.width, size.height, Filter::default())?;
        let bytes = image.into_pixels();
        Ok(Content::Rgb { bytes, size })
    }
}

/// How to load.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Threads.
    pub workers: usize,
    /// Bytes of decoded pictures that may wait, but at least one batch does.
    pub memory: usize,
    /// Pictures in a batch.
    pub batch: usize,
    /// Seed of the order and of the captions that are left out.
    pub seed: u64,
    /// The share of captions that are replaced by an empty one, for guidance.
    pub caption_dropout: f64,
    /// Where items come from.
    pub source: ItemSource,
    /// Which of the batches are loaded here.
    pub turn: Turn,
}

/// Every so many batches of a set: those of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The rank, from 0.
    pub rank: usize,
    /// The number of ranks.
    pub ranks: usize,
}

impl Default for Turn {
    /// All of them.
    fn default() -> Self {
        Turn { rank: 0, ranks: 1 }
    }
}

/// Loads batches in the order of a set; see the module's head comment.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    waited: Duration,
}

struct Shared {
    set: Arc<DataSet>,
    order: BatchOrder,
    options: LoaderOptions,
    /// Items that may be taken by workers beyond those that were delivered.
    ahead: u64,
    /// Where item 0 of this loader stands.
    start: Position,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The next item that no worker has taken.
    next: u64,
    delivered: u64,
    ready: BTreeMap<u64, Result<Item>>,
    /// The epochs that workers are in.
    epochs: BTreeMap<u32, Arc<Vec<PlannedBatch>>>,
    stop: bool,
}

impl Loader {
    /// Starts to load from `position` on.
    pub fn start(set: Arc<DataSet>, options: LoaderOptions, position: Position) -> Self {
        let largest = set.sizes().iter().map(|size| size.pixels() * 3).max().unwrap_or(1);
        let batch = options.batch.max(1);
        let most = 2 * batch + 2 * options.workers;
        let workers = options.workers.max(1);
        let shared = Arc::new(Shared {
            order: BatchOrder::new(set.sizes(), batch, options.seed),
            ahead: (options.memory / largest.max(1)).clamp(batch, most) as u64,
            set,
            options,
            start: position,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let threads = (0..workers)
            .map(|_| {
                let shared = shared.clone();
                std::thread::spawn(move || shared.work())
            })
            .collect();
        Loader {
            shared,
            threads,
            waited: Duration::ZERO,
        }
    }

    /// The items of the next batch, all of one size.
    ///
    /// # Errors
    /// When too much of the set is damaged, or no picture of a size can be loaded.
    pub fn next_batch(&mut self) -> Result<Vec<Item>> {
        let batch = self.shared.options.batch.max(1) as u64;
        let started = Instant::now();
        let mut state = self.shared.lock();
        let numbers = state.delivered..state.delivered + batch;
        while !numbers.clone().all(|number| state.ready.contains_key(&number)) {
            let wait = self.shared.changed.wait(state);
            state = wait.unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        let items: Result<Vec<Item>> = numbers
            .map(|number| state.ready.remove(&number).expect("waited for"))
            .collect();
        state.delivered += batch;
        drop(state);
        self.shared.changed.notify_all();
        self.waited += started.elapsed();
        self.shared.set.damages().check()?;
        items
    }

    /// The position after the batches that were delivered, here and, where all take turns, to the other ranks.
    pub fn position(&self) -> Position {
        let batches = self.shared.lock().delivered / self.shared.options.batch.max(1) as u64;
        self.shared.place(batches * self.shared.options.turn.ranks as u64)
    }

    /// The time spent waiting for items since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// The set that is loaded.
    pub fn set(&self) -> &DataSet {
        &self.shared.set
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic there has been reported as the error of an item.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Where the batch stands that comes `batches` after the start.
    fn place(&self, batches: u64) -> Position {
        let per_epoch = self.order.batches_per_epoch() as u64;
        let batch = (self.start.batch as u64).saturating_add(batches);
        Position {
            epoch: self.start.epoch.saturating_add((batch / per_epoch) as u32),
            batch: (batch % per_epoch) as usize,
        }
    }

    fn work(&self) {
        while let Some(number) = self.take() {
            let item = catch_unwind(AssertUnwindSafe(|| self.load(number)))
                .unwrap_or_else(|_| Err(Error::invalid("a thread that loads pictures stopped unexpectedly")));
            self.lock().ready.insert(number, item);
            self.changed.notify_all();
        }
    }

    /// The number of the next item, once it is within reach; `None` at the end.
    fn take(&self) -> Option<u64> {
        let mut state = self.lock();
        loop {
            if state.stop {
                return None;
            }
            if state.next < state.delivered + self.ahead {
                state.next += 1;
                return Some(state.next - 1);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    fn load(&self, number: u64) -> Result<Item> {
        let batch = self.options.batch.max(1) as u64;
        let Turn { rank, ranks } = self.options.turn;
        let place = self.place(number / batch * ranks as u64 + rank as u64);
        let planned = self.epoch(place.epoch);
        let first = planned[place.batch].pictures[(number % batch) as usize];
        let total = self.set.records().len();
        let size = self.set.sizes()[first];
        let candidates = (0..total).map(|offset| (first + offset) % total);
        for picture in candidates.filter(|&picture| self.set.sizes()[picture] == size) {
            let record = &self.set.records()[picture];
            match self.item(picture, place, number % batch) {
                Ok(item) => return Ok(item),
                Err(error) => {
                    self.set.damages().note(damage_of(record, &error));
                    // The consumer is about to stop: trying all others would only delay it.
                    self.set.damages().check()?;
                }
            }
        }
        Err(Error::invalid(format!(
            "none of the pictures of {size} pixels can be loaded"
        )))
    }

    /// The batches of an epoch, kept while workers may need them.
    fn epoch(&self, epoch: u32) -> Arc<Vec<PlannedBatch>> {
        let mut state = self.lock();
        if let Some(planned) = state.epochs.get(&epoch) {
            return planned.clone();
        }
        let planned = Arc::new(self.order.epoch(epoch));
        state.epochs.retain(|&old, _| old + 2 > epoch);
        state.epochs.insert(epoch, planned.clone());
        planned
    }

    fn item(&self, picture: usize, place: Position, slot: u64) -> Result<Item> {
        let draws = Draws::part(self.options.seed, Purpose::Dropout, place.epoch);
        let index = place.batch as u64 * self.options.batch.max(1) as u64 + slot;
        let caption = match draws.uniform(index) < self.options.caption_dropout {
            true => "",
            false => &self.set.records()[picture].caption,
        };
        self.options.source.load(&self.set, picture, caption)
    }
}
