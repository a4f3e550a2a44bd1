//! What is worth a word about a data set, and stops nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::metadata::Metadata;
use super::sizing::PictureSize;
use crate::image_io::{Colours, ImageFormat};

/// A picture that is enlarged by more than this has little of what the model is to learn at its size.
const FAR_SMALLER: f64 = 2.0;

/// Counts over the pictures of a set, with the first of each kind.
#[derive(Default)]
pub(super) struct Notes {
    small: Option<(usize, String)>,
    odd_colours: Option<(usize, String)>,
}

impl Notes {
    /// Looks at a picture of size `found` that is used at `size`.
    pub fn add(&mut self, name: &str, colours: Colours, found: PictureSize, size: PictureSize) {
        let count = |note: &mut Option<(usize, String)>, first: String| note.get_or_insert((0, first)).0 += 1;
        if size.enlargement(found) > FAR_SMALLER {
            count(&mut self.small, format!("{name}, {found} for {size}"));
        }
        if colours == Colours::Unknown {
            count(&mut self.odd_colours, name.to_owned());
        }
    }

    /// A sentence for each kind, of a set with so many pictures.
    pub fn told(self, total: usize) -> impl Iterator<Item = String> {
        let small = self.small.map(|(count, first)| {
            format!(
                "{count} of {total} pictures are less than half as wide or high as the size that they are enlarged to (the first: \
                 {first})"
            )
        });
        let odd_colours = self.odd_colours.map(|(count, first)| {
            format!(
                "{count} of {total} pictures are in inks or have a colour profile that cannot be used (the first: {first}); they \
                 are taken for sRGB"
            )
        });
        small.into_iter().chain(odd_colours)
    }
}

/// A sentence about pictures that lie beside those of a set, in the same folders, and that its metadata does not name.
pub(super) fn unnamed_pictures(metadata: &Metadata) -> Option<String> {
    let paths = metadata.records.iter().map(|record| &record.path);
    let mut named: BTreeMap<&Path, BTreeSet<OsString>> = BTreeMap::new();
    for path in paths.chain(&metadata.named_by_damaged) {
        if let (Some(folder), Some(name)) = (path.parent(), path.file_name()) {
            named.entry(folder).or_default().insert(name.into());
        }
    }
    // Folders may go by several names.
    let mut folders: BTreeMap<PathBuf, BTreeSet<OsString>> = BTreeMap::new();
    for (folder, names) in named {
        if let Ok(folder) = in_place_of_empty(folder).canonicalize() {
            folders.entry(folder).or_default().extend(names);
        }
    }
    let mut unnamed: (usize, Option<PathBuf>) = (0, None);
    for (folder, names) in &folders {
        // A folder that cannot be read has no pictures that could be named either.
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            let is_picture = ImageFormat::of(&path).is_ok() && !name.as_encoded_bytes().starts_with(b".");
            if is_picture && !names.contains(&name) && path.is_file() {
                unnamed.0 += 1;
                let first = unnamed.1.get_or_insert_with(|| path.clone());
                // The order of a folder is nobody's.
                *first = path.min(first.clone());
            }
        }
    }
    let (count, first) = unnamed;
    let first = first?;
    Some(format!(
        "{count} pictures beside those of {} are named by none of its entries and are not used (the first: {})",
        metadata.path.display(),
        first.file_name().unwrap_or_default().display()
    ))
}

/// The working directory, where a path says nothing.
fn in_place_of_empty(folder: &Path) -> &Path {
    match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    }
}
