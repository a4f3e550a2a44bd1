//! What runs that were killed left half-written in a folder. Only whoever holds the folder's lock may clear it up: to anybody
//! else such a file may be somebody's work in progress.

use std::path::Path;

/// What files under construction begin with where [`replace`](super::replace) or a picture is written.
const ANY: &str = ".l2p-";

/// What they end with.
const END: &str = ".tmp";

/// Deletes files under construction in `folder`: of anything, and those of the file `name`.
pub(crate) fn remove_leftovers(folder: &Path, name: Option<&str>) {
    let own = name.map(|name| format!(".{name}."));
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let begun = file.starts_with(ANY) || own.as_ref().is_some_and(|own| file.starts_with(own));
        if begun && file.ends_with(END) {
            // What cannot be deleted does no harm.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
