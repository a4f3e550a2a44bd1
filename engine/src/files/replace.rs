//! Files that are either whole or not there, and what is needed to name them.

use std::fs::File;
use std::io::Write;
use std::path::{Component, Path, PathBuf};

use tempfile::Builder;

use crate::error::{Error, Result};

/// Writes `bytes` to `path`: beside it, onto the disk, and renamed into place. What was there is replaced, or stays when
/// anything goes wrong.
///
/// # Errors
/// When the disk does not take it.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = folder_of(path);
    let failed = |error: std::io::Error| {
        // Without the temporary file's name, which means nothing to the user.
        let text = error.to_string();
        Error::file(path, text.split(" at path ").next().unwrap_or_default())
    };
    let mut builder = Builder::new();
    builder.prefix(".l2p-").suffix(".tmp");
    // As any new file; the default for temporary ones is readable by their owner alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(&folder).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    sync_folder(&folder);
    Ok(())
}

/// A rename is on the disk when its folder is; a system that cannot tell does it in its own time.
pub(crate) fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

/// The folder that a path is in.
pub(crate) fn folder_of(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new(".")).into()
}

/// `path` as seen from `folder`; both are whole, canonical paths.
pub(crate) fn relative(path: &Path, folder: &Path) -> PathBuf {
    let shared = path.components().zip(folder.components());
    let shared = shared.take_while(|(a, b)| a == b).count();
    let up = folder.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(path.components().skip(shared)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_seen_from_folders() {
        let seen = |path: &str, folder: &str| relative(Path::new(path), Path::new(folder));
        assert_eq!(seen("/a/source", "/a/pixel"), Path::new("../source"));
        assert_eq!(seen("/a/b/c.safetensors", "/a/b"), Path::new("c.safetensors"));
        assert_eq!(seen("/x", "/a/b"), Path::new("../../x"));
    }
}
