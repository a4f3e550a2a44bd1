//! What the ranks of a run tell each other, and what of it is told to the user.
//!
//! All ranks go through the same run. What could differ between them (the clock, the user's wish to stop, a damaged picture, a disk, a
//! loss) is shared before anything is made of it, so that they never part. The first rank alone writes the log, the samples and most of
//! a checkpoint, and is heard.

use std::rc::Rc;

use super::guard::StepOutcome;
use super::{Event, Observer};
use crate::data::{Damage, DamageLog};
use crate::dist::World;
use crate::error::Result;

/// The observer of a rank: what it is told counts as work that other ranks wait for, and only the first rank's is passed on.
pub(super) struct RankObserver<'a> {
    world: Rc<World>,
    observer: &'a mut dyn Observer,
}

impl<'a> RankObserver<'a> {
    /// For a rank whose user has `observer`.
    pub fn new(world: Rc<World>, observer: &'a mut dyn Observer) -> Self {
        RankObserver { world, observer }
    }
}

impl Observer for RankObserver<'_> {
    fn event(&mut self, event: &Event<'_>) {
        self.world.work();
        if self.world.is_first() {
            self.observer.event(event);
        }
    }

    fn stop_requested(&self) -> bool {
        self.world.work();
        self.observer.stop_requested()
    }
}

/// The outcomes of steps, of those that each rank has found of its own micro-batches: a step's losses in the order of its micro-batches,
/// in which ranks take turns, its norm, and whether it was skipped.
pub(super) fn share_outcomes(world: &World, own: Vec<(Vec<f32>, f32, bool)>) -> Result<Vec<StepOutcome>> {
    let ranks = world.share("losses", own)?;
    let steps = ranks.first().map_or(0, Vec::len);
    let outcomes = (0..steps).map(|step| {
        let (_, norm, skipped) = ranks[0][step];
        let batches = ranks[0][step].0.len();
        let all = batches * ranks.len();
        let losses = (0..batches).flat_map(|batch| ranks.iter().map(move |rank| rank[step].0.get(batch)));
        StepOutcome {
            loss: losses.flatten().fold(0.0, |sum, loss| sum + loss / all as f32),
            norm,
            skipped,
        }
    });
    Ok(outcomes.collect())
}

/// The damages that any rank has noted in `log` since the last call; all ranks know of all afterwards.
pub(super) fn share_damages(world: &World, log: &DamageLog) -> Result<Vec<Damage>> {
    let ranks = world.share("damages", log.take_fresh())?;
    let mut fresh: Vec<Damage> = Vec::new();
    for damage in ranks.into_iter().flatten() {
        if !fresh.iter().any(|known| known.what == damage.what) {
            log.note(damage.clone());
            fresh.push(damage);
        }
    }
    // Those of other ranks are new here, but told now.
    log.take_fresh();
    Ok(fresh)
}
