//! Which pictures are there already, of a command that is given again.

use std::io::ErrorKind;

use l2p_engine::image_io::{self, ImageFormat, read_image, read_settings};
use l2p_engine::{Error, Result};
use rayon::prelude::*;

use super::jobs::Job;

/// Pictures that are looked at between two looks at whether to go on.
const CHUNK: usize = 64;

/// The numbers of the jobs whose pictures are missing or damaged. Every picture is decoded, since the length of a file says nothing of
/// what a crash or a copy left of it. `expected` is what a job's picture says of itself.
///
/// # Errors
/// When a picture cannot be read, or is there but was drawn otherwise; those of `go_on`, which is asked now and then.
pub fn missing(
    jobs: &[Job],
    expected: &(dyn Fn(&Job) -> image_io::Settings + Sync),
    go_on: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<usize>> {
    let mut missing = Vec::new();
    for first in (0..jobs.len()).step_by(CHUNK) {
        go_on()?;
        let numbers = (first..jobs.len().min(first + CHUNK)).into_par_iter();
        let found: Vec<Option<usize>> = numbers
            .map(|number| Ok((!is_there(&jobs[number], expected)?).then_some(number)))
            .collect::<Result<_>>()?;
        missing.extend(found.into_iter().flatten());
    }
    Ok(missing)
}

/// Whether a job's picture is there and whole.
fn is_there(job: &Job, expected: &(dyn Fn(&Job) -> image_io::Settings + Sync)) -> Result<bool> {
    let image = match read_image(&job.out) {
        Ok(image) => image,
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error @ Error::Io { .. }) => return Err(error),
        // Cut off, or no picture at all.
        Err(_) => return Ok(false),
    };
    let expected = expected(job);
    let refused = |reason: String| {
        let reason = format!("{reason}: use another name, or draw without --skip-existing");
        Err(Error::file(&job.out, reason))
    };
    let (width, height) = (image.width(), image.height());
    if (width, height) != (expected.width, expected.height) {
        return refused(format!(
            "is there, but of {width}x{height} pixels instead of {}x{}",
            expected.width, expected.height
        ));
    }
    if ImageFormat::of(&job.out)? != ImageFormat::Png {
        return Ok(true);
    }
    match read_settings(&job.out) {
        Ok(found) => match difference(&found, &expected) {
            None => Ok(true),
            Some(what) => refused(format!("is there, but was drawn with another {what}")),
        },
        Err(_) => refused("is there, but does not say what it was drawn with".into()),
    }
}

/// In what two pictures differ.
fn difference(found: &image_io::Settings, expected: &image_io::Settings) -> Option<&'static str> {
    let equal = [
        ("prompt", found.prompt == expected.prompt),
        ("negative prompt", found.negative == expected.negative),
        ("seed", found.seed == expected.seed),
        ("number of steps", found.steps == expected.steps),
        ("cfg", found.cfg == expected.cfg),
        ("shift", found.shift == expected.shift),
        ("solver", found.solver == expected.solver),
        ("noise generator", found.rng == expected.rng),
        ("model", found.model == expected.model),
        ("precision of weights", found.weights == expected.weights),
        ("picture to begin with, strength or mask", found.start == expected.start),
    ];
    equal.into_iter().find_map(|(what, equal)| (!equal).then_some(what))
}
