//! The threads that draw: each has a worker of the engine, takes requests from the queue, and tells whoever waits how far they are.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use l2p_engine::image_io::RgbImage;
use l2p_engine::limits::Batch;
use l2p_engine::serve::{Caption, Event, Item, Request, Worker};
use l2p_engine::{Error, HostTensor, Result};
use lru::LruCache;

use super::failure::Failure;
use super::job::Job;
use super::metrics::Metrics;
use super::queue::{Queue, Waits};

/// Prompts whose features are kept, and the bytes of these at most.
const KEPT_PROMPTS: usize = 256;
const KEPT_BYTES: usize = 512 << 20;

/// A thread's own things.
pub struct Drawer {
    /// What draws.
    pub worker: Worker,
    /// Where requests wait.
    pub queue: Arc<Queue<Job>>,
    /// Pictures drawn at once.
    pub batch: usize,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Features of prompts that came before.
struct Features {
    kept: LruCache<String, Caption>,
    bytes: usize,
}

impl Drawer {
    /// Draws until the queue is closed and empty, or the device has failed for good, which is returned.
    pub fn run(self) -> Result<()> {
        let mut features = Features {
            kept: LruCache::new(NonZeroUsize::new(KEPT_PROMPTS).expect("it is more than none")),
            bytes: 0,
        };
        while let Some(jobs) = self.queue.take(self.batch) {
            let jobs: Vec<Job> = jobs.into_iter().filter(|job| !job.is_given_up()).collect();
            if jobs.is_empty() {
                continue;
            }
            let start = Instant::now();
            match self.draw(&jobs, &mut features) {
                Ok(mut pictures) => {
                    self.metrics.drew(pictures.len(), start.elapsed());
                    for job in jobs {
                        let rest = pictures.split_off(job.pictures().min(pictures.len()));
                        job.answer(Ok(std::mem::replace(&mut pictures, rest)));
                    }
                }
                Err(error @ Error::WorkerEnded { .. }) => {
                    let failure = Failure::of(&error);
                    jobs.into_iter().for_each(|job| job.answer(Err(failure.clone())));
                    return Err(error);
                }
                Err(Error::Interrupted) => {
                    self.metrics.gave_up();
                    let failure = Failure::of(&Error::Interrupted);
                    jobs.into_iter().for_each(|job| job.answer(Err(failure.clone())));
                }
                // What one of them is at fault for is not the others' matter.
                Err(_) if jobs.len() > 1 => jobs
                    .into_iter()
                    .try_for_each(|job| self.draw_alone(job, &mut features))?,
                Err(error) => jobs.into_iter().for_each(|job| job.answer(Err(Failure::of(&error)))),
            }
        }
        Ok(())
    }

    /// Draws a request whose batch has failed, and answers it.
    fn draw_alone(&self, job: Job, features: &mut Features) -> Result<()> {
        let start = Instant::now();
        let outcome = self.draw(std::slice::from_ref(&job), features);
        match outcome {
            Ok(pictures) => {
                self.metrics.drew(pictures.len(), start.elapsed());
                job.answer(Ok(pictures));
                Ok(())
            }
            Err(error) => {
                job.answer(Err(Failure::of(&error)));
                match error {
                    Error::WorkerEnded { .. } => Err(error),
                    _ => Ok(()),
                }
            }
        }
    }

    /// The pictures of requests of one shape, in their order.
    fn draw(&self, jobs: &[Job], features: &mut Features) -> Result<Vec<RgbImage>> {
        self.encode(jobs, features)?;
        let first = &jobs[0].order;
        let guided = first.settings.cfg != 1.0;
        let mut items = Vec::new();
        for Job { order, .. } in jobs {
            let negative = match guided {
                true => features.get(&order.negative),
                false => Caption::Text(String::new()),
            };
            let prompt = features.get(&order.prompt);
            items.extend((0..order.count).map(|number| Item {
                prompt: prompt.clone(),
                negative: negative.clone(),
                seed: order.seed.wrapping_add(number as u64),
            }));
        }
        let request = Request {
            items,
            settings: first.settings,
            rng: first.rng,
            noise: None,
            start: first.start.clone(),
            at_once: Batch::new(self.batch as u64),
            raw: false,
            previews: jobs.iter().any(|job| job.previews),
        };
        let ticket = self.worker.draw(request)?;
        let answer = ticket.wait_with(&mut |event| {
            match event {
                Event::Step { done, total } => jobs.iter().for_each(|job| job.tell_steps(done, total)),
                Event::Preview { index, image } => show(jobs, index, image),
                _ => {}
            }
            self.go_on(jobs)
        })?;
        let batches = jobs
            .iter()
            .map(Job::pictures)
            .sum::<usize>()
            .div_ceil(self.batch.max(1));
        self.metrics.took(&answer.report, batches * first.settings.steps);
        Ok(answer.value.pictures)
    }

    /// Has the texts encoded that are new.
    fn encode(&self, jobs: &[Job], features: &mut Features) -> Result<()> {
        let texts = jobs.iter().flat_map(|job| {
            let guided = job.order.settings.cfg != 1.0;
            [Some(&job.order.prompt), guided.then_some(&job.order.negative)]
        });
        let texts: BTreeSet<&String> = texts
            .flatten()
            .filter(|text| features.kept.get(*text).is_none())
            .collect();
        if texts.is_empty() {
            return Ok(());
        }
        let texts: Vec<String> = texts.into_iter().cloned().collect();
        let answer = self
            .worker
            .encode(texts.clone())?
            .wait_with(&mut |_| self.go_on(jobs))?;
        for (text, caption) in texts.into_iter().zip(answer.value) {
            features.keep(text, caption);
        }
        Ok(())
    }

    /// Whether anybody still waits.
    fn go_on(&self, jobs: &[Job]) -> Result<()> {
        match jobs.iter().all(Job::is_given_up) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }
}

/// Shows a preview to whom the picture belongs.
fn show(jobs: &[Job], index: usize, image: RgbImage) {
    let mut first = 0;
    for job in jobs {
        if (first..first + job.pictures()).contains(&index) {
            if job.previews {
                job.show(index - first, Arc::new(image));
            }
            return;
        }
        first += job.pictures();
    }
}

impl Features {
    /// Those of a text that was encoded; more texts than are kept come with one request only where it is a text for itself.
    fn get(&mut self, text: &str) -> Caption {
        self.kept
            .get(text)
            .cloned()
            .unwrap_or_else(|| Caption::Text(text.to_owned()))
    }

    fn keep(&mut self, text: String, caption: Caption) {
        self.bytes += bytes(&caption);
        if let Some((_, old)) = self.kept.push(text, caption) {
            self.bytes -= bytes(&old);
        }
        while self.bytes > KEPT_BYTES && self.kept.len() > 1 {
            if let Some((_, old)) = self.kept.pop_lru() {
                self.bytes -= bytes(&old);
            }
        }
    }
}

fn bytes(caption: &Caption) -> usize {
    match caption {
        Caption::Text(text) => text.len(),
        Caption::Features(features) => features_bytes(features),
    }
}

fn features_bytes(features: &HostTensor) -> usize {
    features.shape().iter().product::<usize>() * size_of::<f32>()
}
