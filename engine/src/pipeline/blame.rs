//! What to blame for a result that is not finite: the first weight that is none, of the parts that had to do with it.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Said where every weight is a number.
const NO_WEIGHT: &str =
    "all weights are finite, so some are too large, or a setting such as the shift or cfg drives it too far";

/// Puts behind the result that an [`Error::NotFinite`] is about what is wrong with the weights of these parts; other errors pass as
/// they are. Reads all weights.
pub(super) fn blame<'a>(error: Error, parts: impl IntoIterator<Item = &'a Checkpoint>) -> Error {
    let Error::NotFinite { what } = error else {
        return error;
    };
    let mut found = parts.into_iter().map(|part| part.first_not_finite(&mut ()));
    let because = match found.find_map(Result::transpose) {
        Some(Ok(bad)) => format!("{}: {bad}", bad.path.display()),
        Some(Err(error)) => format!("its weights cannot be looked at: {error}"),
        None => NO_WEIGHT.into(),
    };
    Error::not_finite(format!("{what} ({because})"))
}

/// The error with the file that it is about.
pub(super) fn of_file(checkpoint: &Checkpoint, error: Error) -> Error {
    match error {
        Error::Invalid(reason) => Error::file(checkpoint.path(), reason),
        error => error,
    }
}

/// Refuses features of a text encoder that are not finite, naming the weight to blame.
///
/// # Errors
/// When they are not, or the copy from the device fails.
pub(super) fn ensure_finite_features(features: &Tensor, encoder: &Checkpoint) -> Result<()> {
    let values = features.to_vec_f32()?;
    match values.iter().filter(|value| !value.is_finite()).count() {
        0 => Ok(()),
        bad => {
            let what = format!("the text encoder's features: {bad} of {} values", values.len());
            Err(blame(Error::not_finite(what), [encoder]))
        }
    }
}
