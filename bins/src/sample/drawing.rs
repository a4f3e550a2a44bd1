//! Drawing, batch by batch, and where the pictures go.
//!
//! Ranks draw batches in turn. After each of its own a rank tells the others how that went, so that all end together: when one has an
//! error, or when the user wants to stop.

use std::collections::VecDeque;
use std::sync::Arc;

use indicatif::ProgressBar;
use l2p_engine::dist::World;
use l2p_engine::pipeline::{self, StartImage};
use l2p_engine::serve::{Caption, Drawn, Event, Item, Request, Ticket, Worker};
use l2p_engine::{HostTensor, Result};

use super::arguments::Arguments;
use super::inputs::{Captions, RawImages};
use super::jobs::{self, Job};
use super::plan::Plan;
use super::writer::{Finished, Writer};
use super::{display, go_on};

/// Batches that the worker has at a time: while one's pictures are written, the next one is drawn.
pub const BATCHES_AHEAD: usize = 2;

/// The numbers of the jobs that a rank of so many draws, of those that all draw: whole batches of these, in turn.
pub fn own(missing: &[usize], batch: usize, rank: usize, ranks: usize) -> Vec<usize> {
    let batches = missing.chunks(batch).skip(rank).step_by(ranks);
    batches.flatten().copied().collect()
}

/// What a rank draws, all of it known before the first step.
pub struct Work<'a> {
    /// What all ranks draw.
    pub plan: &'a Plan,
    /// The rank's own jobs.
    pub jobs: Vec<&'a Job>,
    /// For every picture, instead of that of its seed.
    pub noise: Option<Arc<HostTensor>>,
    /// What every picture begins with, instead of noise alone.
    pub start: Option<StartImage>,
    /// The numbers behind the pictures too.
    pub raw: bool,
}

impl Work<'_> {
    /// The request for some of the rank's pictures, all at once; `captions` are those of all of them.
    pub fn request(&self, captions: &Captions, range: std::ops::Range<usize>) -> Request {
        let nothing = Caption::Text(String::new());
        let items = range.map(|index| Item {
            prompt: captions.prompts[index].clone(),
            negative: captions.negatives.get(index).unwrap_or(&nothing).clone(),
            seed: self.jobs[index].seed,
        });
        Request {
            items: items.collect(),
            settings: self.plan.settings,
            rng: self.plan.rng,
            noise: self.noise.clone(),
            start: self.start.clone(),
            at_once: None,
            raw: self.raw,
            previews: false,
        }
    }
}

/// What a rank has drawn.
pub struct Written {
    /// For each of its jobs, which copy of its name the picture has, see [`copy_of`](super::writer::copy_of).
    pub copies: Vec<usize>,
    /// What that took.
    pub taken: pipeline::Report,
}

/// Draws this rank's pictures and has them written; without a worker, which a rank with nothing to draw needs not, it only waits for the
/// others.
///
/// # Errors
/// On all ranks, when something fails on one, the disk does not take a picture, or the user wants to stop.
pub fn draw(
    arguments: &Arguments,
    worker: Option<&Worker>,
    work: &Work<'_>,
    captions: &Captions,
    raw: Option<RawImages>,
    world: &World,
) -> Result<Written> {
    let (batch, batches) = (work.plan.batch, work.plan.batches());
    let bar = display::bar("{msg} [{bar:32}] step {pos}/{len}  {per_step}  {eta} left", world);
    bar.set_length((batches * work.plan.settings.steps) as u64);
    let mut takes = Takes {
        work,
        world,
        bar,
        writer: Writer::start(arguments.quality.get() as u8),
        raw,
        taken: pipeline::Report::default(),
    };
    let mut asked = VecDeque::new();
    let mut firsts = (0..work.jobs.len()).step_by(batch);
    let mut take_next = |takes: &mut Takes<'_>, round: usize| -> Result<()> {
        while let Some(worker) = worker.filter(|_| asked.len() < BATCHES_AHEAD)
            && let Some(first) = firsts.next()
        {
            let last = (first + batch).min(work.jobs.len());
            asked.push_back((first, worker.draw(work.request(captions, first..last))?));
        }
        match asked.pop_front() {
            Some((first, ticket)) => takes.take(round, first, ticket),
            None => Ok(()),
        }
    };
    for round in 0..batches.div_ceil(world.size()) {
        let taken = take_next(&mut takes, round);
        world.together("drawing", taken)?;
    }
    takes.finish()
}

/// Takes pictures as they come, and has them written.
struct Takes<'a> {
    work: &'a Work<'a>,
    world: &'a World,
    bar: ProgressBar,
    writer: Writer,
    raw: Option<RawImages>,
    taken: pipeline::Report,
}

impl Takes<'_> {
    /// Waits for the batch that begins with the rank's picture `first`, one of a round in which each rank draws one.
    fn take(&mut self, round: usize, first: usize, ticket: Ticket<Drawn>) -> Result<()> {
        let Work { jobs, plan, .. } = self.work;
        let settings = &plan.settings;
        self.bar.set_message(jobs::title(&jobs[first].prompt));
        let before = round * self.world.size();
        let at_once = self.world.size().min(plan.batches() - before);
        let answer = ticket.wait_with(&mut |event| {
            if let Event::Step { done, .. } = event {
                // The others are about as far.
                self.bar.set_position((before * settings.steps + at_once * done) as u64);
            }
            go_on(self.world, &event)
        })?;
        self.taken.merge(answer.report);
        if let Some(all) = &mut self.raw {
            answer.value.raw.iter().for_each(|raw| all.add(raw));
        }
        for (job, image) in jobs[first..].iter().zip(answer.value.pictures) {
            self.writer.write(Finished {
                path: job.out.clone(),
                keep_others: job.numbered,
                image,
                settings: plan.described(job),
            })?;
            self.world.work();
        }
        Ok(())
    }

    /// Waits until everything is written, by all ranks.
    fn finish(mut self) -> Result<Written> {
        self.bar.finish_and_clear();
        let written = self.writer.finish().and_then(|copies| {
            if let Some(raw) = self.raw.take() {
                raw.finish()?;
            }
            Ok(copies)
        });
        Ok(Written {
            copies: self.world.together("pictures", written)?,
            taken: self.taken,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::own;

    #[test]
    fn whole_batches_go_round() {
        let missing = [2, 3, 5, 7, 11, 13, 17];
        assert_eq!(own(&missing, 2, 0, 1), missing);
        assert_eq!(own(&missing, 2, 0, 3), [2, 3, 17]);
        assert_eq!(own(&missing, 2, 1, 3), [5, 7]);
        assert!(own(&missing, 4, 2, 3).is_empty());
    }
}
