//! Folders of pictures, and which pictures of two belong together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use l2p_engine::limits::Pictures;

/// Folders within folders that are looked into.
const DEPTH: usize = 8;

/// Missing pictures that a message names.
const NAMED: usize = 5;

/// The pictures below a folder (PNG, JPEG, WebP) by their path within it without extension. Names that begin with a dot are passed over.
///
/// # Errors
/// When it cannot be looked into, holds none, or two of one name.
pub fn pictures(folder: &Path) -> anyhow::Result<BTreeMap<PathBuf, PathBuf>> {
    let mut found = BTreeMap::new();
    add(folder, Path::new(""), DEPTH, &mut found)?;
    match found.is_empty() {
        true => bail!("{}: holds no pictures (.png, .jpg, .jpeg, .webp)", folder.display()),
        false => Ok(found),
    }
}

fn add(root: &Path, within: &Path, depth: usize, found: &mut BTreeMap<PathBuf, PathBuf>) -> anyhow::Result<()> {
    let folder = root.join(within);
    let looked = || format!("cannot look into {}", folder.display());
    for entry in folder.read_dir().with_context(looked)? {
        let entry = entry.with_context(looked)?;
        let name = PathBuf::from(entry.file_name());
        if name.as_os_str().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // A link to a folder is not followed: it may lead back here.
        if entry.file_type().with_context(looked)?.is_dir() {
            if depth == 0 {
                bail!(
                    "{}: holds folders within folders, more than {DEPTH} deep",
                    root.display()
                );
            }
            add(root, &within.join(&name), depth - 1, found)?;
            continue;
        }
        let is_picture = name.extension().is_some_and(|extension| {
            ["png", "jpg", "jpeg", "webp"]
                .iter()
                .any(|known| extension.eq_ignore_ascii_case(known))
        });
        if !is_picture {
            continue;
        }
        let key = within.join(name.with_extension(""));
        if let Some(other) = found.insert(key, entry.path()) {
            bail!("{} and {} have one name", other.display(), entry.path().display());
        }
        if found.len() as u64 > Pictures::MOST {
            bail!("{}: holds more than {} pictures", root.display(), Pictures::MOST);
        }
    }
    Ok(())
}

/// A picture, and the one that it is compared with.
pub type Pair = (PathBuf, PathBuf);

/// The pictures of two folders, matched by name.
///
/// # Errors
/// Naming those that have no counterpart, and as [`pictures`].
pub fn pairs(drawn: &Path, reference: &Path) -> anyhow::Result<Vec<Pair>> {
    let (first, mut second) = (pictures(drawn)?, pictures(reference)?);
    let mut pairs = Vec::with_capacity(first.len());
    let mut alone = Vec::new();
    for (name, path) in first {
        match second.remove(&name) {
            Some(other) => pairs.push((path, other)),
            None => alone.push(path),
        }
    }
    alone.extend(second.into_values());
    if alone.is_empty() {
        return Ok(pairs);
    }
    let names: Vec<String> = alone
        .iter()
        .take(NAMED)
        .map(|path| path.display().to_string())
        .collect();
    let more = alone.len() - names.len();
    bail!(
        "{} of {} and {} have no counterpart of their name in the other folder: {}{}",
        alone.len(),
        drawn.display(),
        reference.display(),
        names.join(", "),
        if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_matched_and_what_is_alone_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "a/1.png",
            "a/x/2.JPG",
            "a/notes.txt",
            "a/.hidden.png",
            "b/1.webp",
            "b/x/2.png",
        ] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        let found = pairs(&a, &b).unwrap();
        assert_eq!(found[1], (a.join("x/2.JPG"), b.join("x/2.png")));
        std::fs::write(b.join("3.png"), "").unwrap();
        let message = pairs(&a, &b).unwrap_err().to_string();
        assert!(message.starts_with("1 of ") && message.contains("b/3.png"), "{message}");
        std::fs::write(b.join("3.jpg"), "").unwrap();
        assert!(pictures(&b).unwrap_err().to_string().contains("have one name"));
        std::fs::create_dir(folder.path().join("c")).unwrap();
        assert!(
            pictures(&folder.path().join("c"))
                .unwrap_err()
                .to_string()
                .contains("holds no pictures")
        );
    }
}
