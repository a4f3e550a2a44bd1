//! Cache keys of compiled images, and removal of those that are out of date.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::Error;

/// The key of one image: everything that can change its bytes. `files` are the source and the headers it reaches.
pub fn key(files: &[PathBuf], flags: &[&str], compiler: &str) -> Result<u64, Error> {
    let mut hasher = DefaultHasher::new();
    (flags, compiler).hash(&mut hasher);
    for file in files {
        file.hash(&mut hasher);
        read(file)?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// Removes the files in `dir` whose name starts with `prefix`: earlier images of the same source and target.
pub fn remove_stale(dir: &Path, prefix: &str) -> Result<(), Error> {
    let entries = std::fs::read_dir(dir).map_err(|error| Error::Io(dir.to_path_buf(), error))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        {
            std::fs::remove_file(&path).map_err(|error| Error::Io(path.clone(), error))?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| Error::Io(path.to_path_buf(), error))
}
