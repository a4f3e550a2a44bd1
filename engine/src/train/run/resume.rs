//! From where a run goes on.

use std::path::{Path, PathBuf};

use super::checkpoint::{self, Checkpoint, RunState};
use super::setup::Progress;
use crate::data::Position;
use crate::error::{Error, Result};

/// From where a run goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// From its newest checkpoint, if it has one.
    #[default]
    Auto,
    /// From nowhere; the run's folder must hold no checkpoint.
    Fresh,
    /// From this checkpoint's folder.
    From(PathBuf),
}

/// The checkpoint that the run goes on from.
///
/// # Errors
/// When it cannot be used, or the run's folder holds another continuation.
pub(super) fn find_checkpoint(run: &Path, resume: &Resume, progress: &mut Progress<'_>) -> Result<Option<Checkpoint>> {
    checkpoint::remove_leftovers(run);
    match resume {
        Resume::From(folder) => {
            let checkpoint = Checkpoint::open(folder)?;
            expect_newest(run, &checkpoint)?;
            Ok(Some(checkpoint))
        }
        Resume::Auto => {
            let (newest, refused) = Checkpoint::newest(run)?;
            for reason in refused {
                progress.notice(&format!("a checkpoint cannot be used: {reason}"));
            }
            Ok(newest)
        }
        Resume::Fresh => match checkpoint::list(run)?.last() {
            None => Ok(None),
            Some((_, folder)) => Err(Error::file(
                folder,
                "is a checkpoint of an earlier run: continue it (--resume auto), or choose another --out",
            )),
        },
    }
}

/// Refuses to continue from a checkpoint where the run's folder holds newer ones: they belong to another continuation, and
/// the next `auto` would take them for this one's.
fn expect_newest(run: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let newest = checkpoint::list(run)?.pop();
    match newest.filter(|(step, _)| *step > checkpoint.state.step) {
        None => Ok(()),
        Some((_, newer)) => Err(Error::file(
            newer,
            format!(
                "is newer than {}: delete it, or choose another --out for this continuation",
                checkpoint.folder().display()
            ),
        )),
    }
}

/// The state of a checkpoint, made to fit the configuration; `fresh` is that of a run that begins.
///
/// # Errors
/// When it belongs to a run that began from another model.
pub(super) fn continued(resumed: &Checkpoint, fresh: RunState, progress: &mut Progress<'_>) -> Result<RunState> {
    let state = resumed.state.clone();
    if state.model != fresh.model {
        return Err(Error::file(
            resumed.folder(),
            "belongs to a run that began from another model: name that one again, or choose another --out",
        ));
    }
    let position = match state.data == fresh.data {
        true => state.position,
        false => {
            progress.notice("the data, their sizes, the batch or the seed changed: the run goes on with a new epoch");
            Position {
                epoch: state.position.epoch + 1,
                batch: 0,
            }
        }
    };
    Ok(RunState {
        position,
        data: fresh.data,
        config: fresh.config,
        ..state
    })
}
