//! The cache of the Hugging Face hub: a model's folder there, `models--ORGANISATION--NAME`, holds `refs/` and `snapshots/`, and the
//! model itself is one of the snapshots.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;
use crate::printable::shown_name;

/// A name of a snapshot in a file.
const REFERENCE: Budget = Budget::new("reference to a snapshot", 1024);

/// The snapshot in use where `path` is a model's folder in the cache; `path` itself where it is anything else.
///
/// # Errors
/// When there is no snapshot, or several and none of them is said to be in use.
pub(super) fn snapshot(path: &Path) -> Result<PathBuf> {
    let snapshots = path.join("snapshots");
    let is_cache = snapshots.is_dir() && (path.join("refs").is_dir() || path.join("blobs").is_dir());
    if !is_cache {
        return Ok(path.into());
    }
    let reference = path.join("refs/main");
    if reference.is_file() {
        let name = files::read_text(&reference, REFERENCE)?;
        let name = name.trim();
        let is_plain = Path::new(name).file_name().is_some_and(|last| last == name);
        if is_plain && snapshots.join(name).is_dir() {
            return Ok(snapshots.join(name));
        }
        let reason = format!(
            "names the snapshot {}, which is not there: the download is incomplete",
            shown_name(name)
        );
        return Err(Error::file(reference, reason));
    }
    let failed = |error| Error::io(&snapshots, error);
    let mut found = Vec::new();
    for entry in snapshots.read_dir().map_err(failed)? {
        let entry = entry.map_err(failed)?.path();
        found.extend(entry.is_dir().then_some(entry));
    }
    found.sort();
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => Err(Error::file(snapshots, "holds no snapshot: the download is incomplete")),
        [first, second, ..] => Err(Error::file(
            &snapshots,
            format!(
                "holds several snapshots; name one of them, such as {} or {}",
                first.display(),
                second.display()
            ),
        )),
    }
}

/// The folder or file of a part that somebody names: itself, its snapshot in the cache, or the folder `part` in a whole model.
///
/// # Errors
/// As [`snapshot`].
pub(super) fn part(path: &Path, part: &str) -> Result<PathBuf> {
    let found = snapshot(path)?;
    let within = found.join(part);
    Ok(match found.join("model_index.json").is_file() && within.is_dir() {
        true => within,
        false => found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshot_in_use_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("models--org--name");
        let make = |path: &str| std::fs::create_dir_all(root.join(path)).unwrap();
        make("blobs");
        assert_eq!(snapshot(&root).unwrap(), root);
        make("snapshots");
        assert!(snapshot(&root).unwrap_err().to_string().contains("holds no snapshot"));
        make("snapshots/aa");
        assert_eq!(snapshot(&root).unwrap(), root.join("snapshots/aa"));
        make("snapshots/bb");
        let message = snapshot(&root).unwrap_err().to_string();
        assert!(
            message.contains("several snapshots") && message.contains("snapshots/aa"),
            "{message}"
        );
        make("refs");
        std::fs::write(root.join("refs/main"), "bb\n").unwrap();
        assert_eq!(snapshot(&root).unwrap(), root.join("snapshots/bb"));
        for name in ["cc", "..", "../snapshots/aa", ""] {
            std::fs::write(root.join("refs/main"), name).unwrap();
            let message = snapshot(&root).unwrap_err().to_string();
            assert!(message.contains("incomplete"), "{message}");
        }
    }
}
