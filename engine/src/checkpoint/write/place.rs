//! Putting what was written in its place: beside the target until it is whole, on the disk and looked over, then in one step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::{Builder, NamedTempFile, TempDir};

use super::super::shards::INDEX_SUFFIX;
use super::{OutputFile, WriteObserver};
use crate::error::{Error, Result};
use crate::files::sync_folder;

/// What was written.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Written {
    /// The file or folder.
    pub path: PathBuf,
    /// Safetensors files in it.
    pub files: usize,
    /// Tensors in these.
    pub tensors: usize,
    /// Bytes of these.
    pub bytes: u64,
}

/// Writes one file; see the module's head comment.
///
/// # Errors
/// When the target exists and may not be replaced, cannot be written, or the observer stops; then nothing has changed.
pub fn write_file(
    path: &Path,
    output: &OutputFile<'_>,
    replace: bool,
    observer: &mut dyn WriteObserver,
) -> Result<Written> {
    ensure_free(path, replace)?;
    let failed = |error| Error::io(path, error);
    let (folder, prefix) = beside(path);
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    let mut temporary: NamedTempFile = for_all(&mut builder, 0o666)
        .tempfile_in(folder)
        .map_err(|error| not_created(path, &error))?;
    observer.begin(output.header().len() as u64 + output.data_bytes());
    let bytes = output.write(temporary.as_file_mut(), path, observer)?;
    observer
        .written(temporary.path())
        .map_err(|error| of_target(error, temporary.path(), path))?;
    let renamed = if replace {
        temporary.persist(path)
    } else {
        temporary.persist_noclobber(path)
    };
    renamed.map_err(|error| failed(error.error))?;
    sync_folder(folder);
    Ok(Written {
        path: path.into(),
        files: 1,
        tensors: output.tensor_count(),
        bytes,
    })
}

/// Writes a folder of shards with their index, or of one file without, and a `config.json` if given; see the module's head
/// comment.
///
/// # Errors
/// As [`write_file`]; an existing folder is replaced only if it holds nothing but a transformer's files.
pub fn write_folder(
    path: &Path,
    shards: &[OutputFile<'_>],
    config: Option<&Value>,
    replace: bool,
    observer: &mut dyn WriteObserver,
) -> Result<Written> {
    const STEM: &str = "diffusion_pytorch_model";
    ensure_replaceable_folder(path, replace)?;
    let failed = |error| Error::io(path, error);
    let (parent, prefix) = beside(path);
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    let temporary = for_all(&mut builder, 0o777)
        .tempdir_in(parent)
        .map_err(|error| not_created(path, &error))?;
    observer.begin(
        shards
            .iter()
            .map(|shard| shard.header().len() as u64 + shard.data_bytes())
            .sum(),
    );
    let mut bytes = 0;
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => format!("{STEM}.safetensors"),
            count => format!("{STEM}-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut file = File::create(temporary.path().join(&name)).map_err(failed)?;
        bytes += shard.write(&mut file, path, observer)?;
        weight_map.extend(shard.tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())));
    }
    if shards.len() > 1 {
        let total: u64 = shards.iter().map(OutputFile::data_bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_json(&temporary.path().join(format!("{STEM}{INDEX_SUFFIX}")), &index).map_err(failed)?;
    }
    if let Some(config) = config {
        write_json(&temporary.path().join("config.json"), config).map_err(failed)?;
    }
    sync_folder(temporary.path());
    observer
        .written(temporary.path())
        .map_err(|error| of_target(error, temporary.path(), path))?;
    put_in_place(temporary, path).map_err(failed)?;
    sync_folder(parent);
    Ok(Written {
        path: path.into(),
        files: shards.len(),
        tensors: weight_map.len(),
        bytes,
    })
}

/// Moves the finished folder to `path`; what was there is deleted last. At no moment is there nothing at `path`.
fn put_in_place(temporary: TempDir, path: &Path) -> std::io::Result<()> {
    if path.symlink_metadata().is_err() {
        std::fs::rename(temporary.path(), path)?;
    } else if exchange(temporary.path(), path)? {
        // What was at `path` has the temporary name now, and is deleted with it.
        return Ok(());
    } else {
        replace_in_two_steps(temporary.path(), path)?;
    }
    // It has another name now, so there is nothing left to delete.
    let _ = temporary.keep();
    Ok(())
}

/// Lets two folders change their names in one step; `false` where the system or the file system cannot.
#[cfg(target_os = "linux")]
fn exchange(new: &Path, old: &Path) -> std::io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Lets two folders change their names in one step; `false` where the system or the file system cannot.
#[cfg(not(target_os = "linux"))]
fn exchange(_new: &Path, _old: &Path) -> std::io::Result<bool> {
    Ok(false)
}

/// Moves `old` aside, `new` to its place, and deletes the former. Should the process be killed between, `old` stands beside its
/// place under a name that says so.
fn replace_in_two_steps(new: &Path, old: &Path) -> std::io::Result<()> {
    let (folder, _) = beside(old);
    let name = old.file_name().unwrap_or_default().to_string_lossy();
    let aside = folder.join(format!("{name}.replaced-{}", std::process::id()));
    std::fs::rename(old, &aside)?;
    if let Err(error) = std::fs::rename(new, old) {
        std::fs::rename(&aside, old)?;
        return Err(error);
    }
    // The new one is in its place, whatever becomes of this.
    let _ = std::fs::remove_dir_all(aside);
    Ok(())
}

/// The error with the name that the user knows instead of the temporary one.
fn of_target(error: Error, temporary: &Path, path: &Path) -> Error {
    match error {
        Error::File { path: at, reason } if at.starts_with(temporary) => {
            let at = at.strip_prefix(temporary).map(|rest| path.join(rest)).unwrap_or(at);
            // A file joined with nothing would get a slash at its end.
            Error::file(at.components().collect::<PathBuf>(), reason)
        }
        error => error,
    }
}

fn write_json(path: &Path, value: &Value) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(format!("{value:#}\n").as_bytes())?;
    file.sync_all()
}

/// The folder of a target, and a hidden name's beginning for the temporary file in it.
fn beside(path: &Path) -> (&Path, String) {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    (folder.unwrap_or(Path::new(".")), format!(".{name}."))
}

/// The permissions of any new file, instead of a temporary file's owner-only ones.
fn for_all<'a, 'b, 'c>(builder: &'a mut Builder<'b, 'c>, mode: u32) -> &'a mut Builder<'b, 'c> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// The reason why no temporary file could be made, without its name, which means nothing to the user.
fn not_created(path: &Path, error: &std::io::Error) -> Error {
    let text = error.to_string();
    Error::file(path, text.split(" at path ").next().unwrap_or_default())
}

/// Checks before any work that the target can be a new file.
///
/// # Errors
/// When it is there and may not be replaced, or is no plain file.
pub fn ensure_free(path: &Path, replace: bool) -> Result<()> {
    match path.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(found) if found.is_dir() => Err(Error::file(path, "is a folder, expected the name of a file to write")),
        Ok(found) if !found.is_file() && !found.is_symlink() => {
            Err(Error::file(path, "is no plain file; choose another"))
        }
        Ok(_) if replace => Ok(()),
        Ok(_) => Err(Error::file(path, "is already there; replace it with --force")),
    }
}

/// Checks before any work that a file can be written to `path`, replacing what is there.
///
/// # Errors
/// When it is no plain file, or its folder does not take a file.
pub fn ensure_writable(path: &Path) -> Result<()> {
    ensure_free(path, true)?;
    let (folder, prefix) = beside(path);
    Builder::new()
        .prefix(&prefix)
        .suffix(".tmp")
        .tempfile_in(folder)
        .map(|_| ())
        .map_err(|error| not_created(path, &error))
}

fn ensure_replaceable_folder(path: &Path, replace: bool) -> Result<()> {
    let Ok(found) = path.symlink_metadata() else {
        return Ok(());
    };
    if !found.is_dir() {
        return Err(Error::file(path, "is already there and no folder; choose another"));
    }
    let mut is_empty = true;
    for entry in path.read_dir().map_err(|error| Error::io(path, error))? {
        is_empty = false;
        let name = entry.map_err(|error| Error::io(path, error))?.file_name();
        let name = name.to_string_lossy();
        let replaceable = name.ends_with(".safetensors") || name.ends_with(INDEX_SUFFIX) || name == "config.json";
        if !replaceable {
            let reason = format!("holds `{name}`, which is no part of a transformer; choose another folder");
            return Err(Error::file(path, reason));
        }
    }
    if is_empty || replace {
        return Ok(());
    }
    Err(Error::file(path, "is already there; replace it with --force"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// A folder with one file of this content.
    fn folder_of(text: &str, within: &Path) -> TempDir {
        let folder = Builder::new().tempdir_in(within).unwrap();
        std::fs::write(folder.path().join("file"), text).unwrap();
        folder
    }

    #[test]
    fn a_folder_is_replaced_without_a_moment_of_none() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("target");
        put_in_place(folder_of("0", parent.path()), &target).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut looks = 0;
                while !done.load(Ordering::Relaxed) {
                    assert!(target.is_dir(), "nothing was there at look {looks}");
                    looks += 1;
                }
                looks
            });
            for round in 1..=2000 {
                put_in_place(folder_of(&round.to_string(), parent.path()), &target).unwrap();
            }
            done.store(true, Ordering::Relaxed);
            assert!(watcher.join().unwrap() > 1000);
        });
        assert_eq!(std::fs::read_to_string(target.join("file")).unwrap(), "2000");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn where_names_cannot_be_exchanged_nothing_is_left_either() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("target");
        put_in_place(folder_of("old", parent.path()), &target).unwrap();
        let new = folder_of("new", parent.path()).keep();
        replace_in_two_steps(&new, &target).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("file")).unwrap(), "new");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
    }
}
