//! A device's worker: the pipeline on a thread of its own.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::owner::{Owned, Owner};
use super::preview::Progress;
use super::request::{Caption, Drawn, RawImages, Request};
use super::ticket::{Asker, Event, Ticket};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::image_io::RgbImage;
use crate::lock::lock;
use crate::pipeline::{Captions, ModelFiles, Pipeline, Report};
use crate::profile::Profile;
use crate::tensor::{HostTensor, Tensor};

/// How a worker works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerOptions {
    /// Keep the text encoder on the device beside the transformer, for prompts that come later. Otherwise it is freed after each
    /// request that has any.
    pub keep_text_encoder: bool,
    /// Shapes of pictures whose recorded steps are kept, as far as the device has room.
    pub recordings: usize,
    /// Requests that may wait or be served at a time.
    pub most_open: usize,
}

impl Default for WorkerOptions {
    /// For whoever serves many: the text encoder stays, eight shapes are kept, and 64 requests may be open.
    fn default() -> Self {
        WorkerOptions {
            keep_text_encoder: true,
            recordings: 8,
            most_open: 64,
        }
    }
}

/// A model on a device, and the thread that draws with it; see the module's head comment.
pub struct Worker {
    files: Arc<ModelFiles>,
    owner: Owner<Drawer>,
}

/// What the thread owns.
struct Drawer {
    pipeline: Pipeline,
    // Last, so that the device is free only when nothing of the pipeline is left.
    _claim: Option<Claim>,
}

/// The GPUs that have a worker.
static CLAIMED: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

/// Holds a GPU for one worker.
struct Claim(usize);

impl Claim {
    /// Claims the device; `None` for the CPU, which any number of threads may use.
    fn of(device: &Device) -> Result<Option<Self>> {
        let Device::Cuda(cuda) = device else {
            return Ok(None);
        };
        match lock(&CLAIMED).insert(cuda.index()) {
            true => Ok(Some(Claim(cuda.index()))),
            false => Err(Error::invalid(format!(
                "{device} has a worker already; one GPU has one worker"
            ))),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&CLAIMED).remove(&self.0);
    }
}

impl Owned for Drawer {
    fn take_report(&mut self) -> Report {
        self.pipeline.take_report()
    }

    /// An error of the driver stays in its context: if so, whatever is asked next fails too.
    fn fault(&mut self, error: &Error) -> Option<String> {
        match error {
            Error::Cuda { .. } => {
                let lasting = self.pipeline.device().synchronize().err()?;
                Some(format!("the GPU cannot be used any more after an error ({lasting})"))
            }
            _ => None,
        }
    }
}

impl Worker {
    /// Starts a worker for a model on its device. Nothing is loaded before it is asked for.
    ///
    /// # Errors
    /// When the device has a worker already, or the system gives no thread.
    pub fn start(files: Arc<ModelFiles>, options: WorkerOptions) -> Result<Self> {
        let claim = Claim::of(files.device())?;
        let theirs = files.clone();
        let make = move || {
            let mut pipeline = Pipeline::of(theirs, options.keep_text_encoder);
            pipeline.keep_steps(options.recordings);
            Ok(Drawer {
                pipeline,
                _claim: claim,
            })
        };
        let owner = Owner::start(&files.device().to_string(), options.most_open, make)?;
        Ok(Worker { files, owner })
    }

    /// What is known of the model without its weights: settings, sizes, estimates.
    pub fn files(&self) -> &Arc<ModelFiles> {
        &self.files
    }

    /// Requests that wait or are served.
    pub fn open(&self) -> usize {
        self.owner.open()
    }

    /// Draws the pictures of a request.
    ///
    /// # Errors
    /// At once when the request makes no sense for this model, too many wait, or the worker has ended. Its ticket: when the device has
    /// no room, a part of the model is missing or damaged, or a picture is not finite.
    pub fn draw(&self, request: Request) -> Result<Ticket<Drawn>> {
        request.check(&self.files)?;
        self.owner
            .ask(move |drawer, asker| draw(&mut drawer.pipeline, &request, asker))
    }

    /// Times the operations of one step of a request's first batch; see [`Pipeline::profile_step`].
    ///
    /// # Errors
    /// As [`Worker::draw`].
    pub fn profile(&self, request: Request) -> Result<Ticket<Profile>> {
        request.check(&self.files)?;
        self.owner.ask(move |drawer, asker| {
            let pipeline = &mut drawer.pipeline;
            let features = features(pipeline, &request, asker)?;
            load(pipeline, asker)?;
            let first = 0..request.batch();
            let captions = captions(pipeline, &request, &features, first.clone())?;
            pipeline.profile_step(&captions, noise(pipeline, &request, first)?, &request.settings)
        })
    }

    /// Encodes texts, to be used in any number of requests as [`Caption::Features`].
    ///
    /// # Errors
    /// At once when too many requests wait or the worker has ended; its ticket, those of [`Pipeline::encode`].
    pub fn encode(&self, texts: Vec<String>) -> Result<Ticket<Vec<Caption>>> {
        self.owner.ask(move |drawer, asker| {
            let features = encode(&mut drawer.pipeline, &texts, asker)?;
            Ok(features.into_iter().map(Caption::Features).collect())
        })
    }

    /// Brings the model onto the device, so that the first picture need not wait for it; nothing where it is there.
    ///
    /// # Errors
    /// At once when too many requests wait or the worker has ended; its ticket, those of [`Pipeline::load`].
    pub fn load(&self) -> Result<Ticket<()>> {
        self.owner.ask(move |drawer, asker| load(&mut drawer.pipeline, asker))
    }

    /// Runs `work` on the worker's thread, in its turn, for tools that need the pipeline itself.
    ///
    /// # Errors
    /// At once when too many requests wait or the worker has ended; its ticket, those of `work`.
    pub fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Pipeline) -> Result<T> + Send + 'static,
    ) -> Result<Ticket<T>> {
        self.owner.ask(move |drawer, _: &Asker<T>| work(&mut drawer.pipeline))
    }
}

fn encode<T>(pipeline: &mut Pipeline, texts: &[String], asker: &Asker<T>) -> Result<Vec<Arc<HostTensor>>> {
    pipeline.encode(texts, &mut |report| {
        asker.tell(Event::Encoded {
            text: report.text.to_owned(),
            dropped_tokens: report.dropped_tokens,
        });
        asker.go_on()
    })
}

fn load<T>(pipeline: &mut Pipeline, asker: &Asker<T>) -> Result<()> {
    pipeline.load(&mut |done, total| {
        asker.tell(Event::Loaded { done, total });
        asker.go_on()
    })
}

/// The features of a request's captions, in the order of [`Request::captions`].
fn features<T>(pipeline: &mut Pipeline, request: &Request, asker: &Asker<T>) -> Result<Vec<Arc<HostTensor>>> {
    let texts: BTreeSet<&str> = request.captions().filter_map(Caption::text).collect();
    let texts: Vec<String> = texts.into_iter().map(str::to_owned).collect();
    let encoded = match texts.is_empty() {
        true => Vec::new(),
        false => encode(pipeline, &texts, asker)?,
    };
    let known: HashMap<&str, Arc<HostTensor>> = texts.iter().map(String::as_str).zip(encoded).collect();
    let all = request.captions().map(|caption| match caption {
        Caption::Text(text) => known[text.as_str()].clone(),
        Caption::Features(features) => features.clone(),
    });
    Ok(all.collect())
}

/// Some of a request's captions on the device, from the features of all.
fn captions(
    pipeline: &Pipeline,
    request: &Request,
    features: &[Arc<HostTensor>],
    range: Range<usize>,
) -> Result<Captions> {
    let (prompts, negatives) = features.split_at(request.items.len());
    let upload = |all: &[Arc<HostTensor>]| -> Result<Vec<Tensor>> {
        let some = all.get(range.clone()).unwrap_or_default().iter();
        some.map(|features| features.to_compute(pipeline.device())).collect()
    };
    Ok(Captions {
        prompts: upload(prompts)?,
        negatives: upload(negatives)?,
    })
}

fn draw(pipeline: &mut Pipeline, request: &Request, asker: &Asker<Drawn>) -> Result<Drawn> {
    let features = features(pipeline, request, asker)?;
    load(pipeline, asker)?;
    let batch = request.batch();
    pipeline.make_room(&request.settings, batch, request.start.as_ref())?;
    let mut drawn = Drawn {
        pictures: Vec::with_capacity(request.items.len()),
        raw: Vec::new(),
    };
    for first in (0..request.items.len()).step_by(batch) {
        let range = first..(first + batch).min(request.items.len());
        let captions = captions(pipeline, request, &features, range.clone())?;
        draw_batch(pipeline, request, range, &captions, asker, &mut drawn)?;
    }
    Ok(drawn)
}

/// Draws some of a request's pictures at once.
fn draw_batch(
    pipeline: &mut Pipeline,
    request: &Request,
    range: Range<usize>,
    captions: &Captions,
    asker: &Asker<Drawn>,
    drawn: &mut Drawn,
) -> Result<()> {
    let settings = &request.settings;
    let noise = noise(pipeline, request, range.clone())?;
    // Batches before this one, each of all steps.
    let before = range.start.div_ceil(request.batch());
    let batches = request.items.len().div_ceil(request.batch());
    let latent = pipeline.model()?.is_latent();
    let steps = match &request.start {
        Some(start) => start.steps(settings)?,
        None => settings.steps,
    };
    let counts = [before * steps, batches * steps];
    let mut progress = Progress::new(asker, request.previews, latent, range.start, counts);
    let result = pipeline.denoise_from(request.start.as_ref(), captions, noise, settings, &mut progress)?;
    let images = pipeline.decode(&result)?;
    if request.raw {
        let latent = result.shape() != images.shape();
        drawn.raw.push(RawImages {
            images: HostTensor::from_tensor(&images)?,
            latents: latent.then(|| HostTensor::from_tensor(&result)).transpose()?,
        });
    }
    for pixels in pipeline.model()?.to_bytes(&images)? {
        let picture = RgbImage::new(settings.width, settings.height, pixels)?;
        drawn.pictures.push(match &request.start {
            Some(start) => start.restore(picture, latent)?,
            None => picture,
        });
    }
    Ok(())
}

/// The noise that some of a request's pictures begin with.
fn noise(pipeline: &Pipeline, request: &Request, range: Range<usize>) -> Result<Tensor> {
    let items = &request.items[range];
    match &request.noise {
        Some(noise) => {
            let mut shape = noise.shape().to_vec();
            shape[0] = items.len();
            Tensor::from_slice(pipeline.device(), &noise.to_f32().repeat(items.len()), shape.as_slice())
        }
        None => {
            let seeds: Vec<u64> = items.iter().map(|item| item.seed).collect();
            pipeline.noise(request.rng, &seeds, &request.settings)
        }
    }
}
