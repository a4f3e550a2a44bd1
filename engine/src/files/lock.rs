//! One run at a time in a folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The file whose lock is the folder's.
const NAME: &str = ".l2p-lock";

/// A folder that is held against other runs until this is dropped. The lock is the operating system's: it ends with the process
/// that holds it, however that ends, so no dead holder is ever waited for.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    /// `None` where the file system knows no locks.
    file: Option<File>,
}

impl FolderLock {
    /// Holds `folder`, which must exist. `holder` says for what, to whoever is refused meanwhile.
    ///
    /// # Errors
    /// When another run holds it, naming that run; when the folder cannot be written.
    pub fn acquire(folder: &Path, holder: &str) -> Result<Self> {
        let path = folder.join(NAME);
        let failed = |error| Error::io(&path, error);
        loop {
            let mut options = OpenOptions::new();
            let mut file = options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut found = String::new();
                    // Said for information only; the lock itself is what counts.
                    let _ = (&mut file).take(512).read_to_string(&mut found);
                    let found = found.lines().next().filter(|line| !line.is_empty());
                    let reason = format!(
                        "is in use by {}: wait for it, or choose another folder",
                        found.unwrap_or("another run")
                    );
                    return Err(Error::file(folder, reason));
                }
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                    return Ok(FolderLock { path, file: None });
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            if !is_the_file_at(&file, &path) {
                // A holder that ended meanwhile took its file away: nobody else would see this lock.
                continue;
            }
            let text = format!("{holder}, process {}{}\n", std::process::id(), on_host());
            let written = file
                .set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(text.as_bytes()));
            // A full disk keeps no one from holding the folder; the message to others then says less.
            let _ = written;
            return Ok(FolderLock { path, file: Some(file) });
        }
    }

    /// Whether the folder is really held; not so where the file system knows no locks, which is worth a notice.
    pub fn is_held(&self) -> bool {
        self.file.is_some()
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        if self.file.is_some() {
            // Before the lock ends, so that whoever gets it next sees that the file is gone.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(unix)]
fn is_the_file_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |found: std::io::Result<std::fs::Metadata>| found.ok().map(|found| (found.dev(), found.ino()));
    let own = identity(file.metadata());
    own.is_some() && own == identity(path.metadata())
}

#[cfg(not(unix))]
fn is_the_file_at(_file: &File, path: &Path) -> bool {
    path.is_file()
}

fn on_host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => String::new(),
        name => format!(" on {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_held_once_until_its_holder_ends() {
        let folder = tempfile::tempdir().unwrap();
        let first = FolderLock::acquire(folder.path(), "l2p-train").unwrap();
        assert!(first.is_held());
        let message = FolderLock::acquire(folder.path(), "l2p-data").unwrap_err().to_string();
        let process = std::process::id().to_string();
        assert!(
            message.contains("in use by l2p-train") && message.contains(&process),
            "{message}"
        );
        drop(first);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        FolderLock::acquire(folder.path(), "l2p-data").unwrap();
    }

    #[test]
    fn what_a_killed_holder_left_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(NAME), "l2p-train, process 1\n").unwrap();
        FolderLock::acquire(folder.path(), "l2p-data").unwrap();
    }

    #[test]
    fn many_that_come_and_go_never_hold_it_together() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let folder = tempfile::tempdir().unwrap();
        let (inside, held) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        if let Ok(lock) = FolderLock::acquire(folder.path(), "test") {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            held.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(lock);
                        }
                    }
                });
            }
        });
        assert!(held.load(Ordering::SeqCst) > 0);
    }
}
