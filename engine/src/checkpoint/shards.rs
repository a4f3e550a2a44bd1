//! Which files a path stands for: one safetensors file, or the shards of a folder, checked against their index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::file::SafetensorsFile;
use super::header::FewStrings;
use crate::error::{Error, Result};
use crate::files;
use crate::limits::{self, Budget};
use crate::printable::shown_name;

/// The end of an index's file name.
pub(super) const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// Opens the file, the shards that an index names, or those in a folder.
pub(super) fn open(path: &Path) -> Result<Vec<Arc<SafetensorsFile>>> {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    if name.ends_with(INDEX_SUFFIX) {
        return open_index(path);
    }
    if !path.is_dir() {
        return Ok(vec![Arc::new(SafetensorsFile::open(path)?)]);
    }
    let listed = list(path)?;
    let indices: Vec<_> = listed.iter().filter(|name| name.ends_with(INDEX_SUFFIX)).collect();
    match indices[..] {
        [] => open_folder(
            path,
            listed.iter().filter(|name| name.ends_with(".safetensors")).collect(),
        ),
        [index] => open_index(&path.join(index)),
        [first, second, ..] => Err(Error::file(
            path,
            format!("holds several models ({first}, {second}); name one of these files instead of the folder"),
        )),
    }
}

/// The names in a folder, sorted; those that are not text are none of ours.
fn list(folder: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::io(folder, error);
    let mut names = Vec::new();
    for entry in folder.read_dir().map_err(failed)? {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The part of an index that is used.
#[derive(Deserialize)]
struct Index {
    weight_map: FewStrings<{ limits::header::TENSORS }>,
}

fn open_index(path: &Path) -> Result<Vec<Arc<SafetensorsFile>>> {
    let index: Index = files::read_json(path, Budget::SHARD_INDEX)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, shard) in &index.weight_map.0 {
        shards.entry(shard).or_default().insert(tensor);
    }
    if shards.is_empty() {
        return Err(Error::file(path, "names no shard"));
    }
    shards
        .into_iter()
        .map(|(shard, expected)| open_shard(path, &folder.join(plain_name(path, shard)?), &expected))
        .collect()
}

/// A shard's name, which may not lead out of the index's folder.
fn plain_name<'a>(index: &Path, shard: &'a str) -> Result<&'a str> {
    if Path::new(shard).file_name().is_some_and(|name| name == shard) {
        return Ok(shard);
    }
    Err(Error::file(
        index,
        format!("names the shard `{}`, which is no plain file name", shown_name(shard)),
    ))
}

fn open_shard(index: &Path, path: &Path, expected: &BTreeSet<&str>) -> Result<Arc<SafetensorsFile>> {
    let shard = path.file_name().unwrap_or_default().to_string_lossy();
    if !path.exists() {
        let count = expected.len();
        let reason = format!(
            "names the shard {} ({count} tensors), which is not there: the download is incomplete",
            shown_name(&shard)
        );
        return Err(Error::file(index, reason));
    }
    let file = SafetensorsFile::open(path)?;
    let index = index.file_name().unwrap_or_default().to_string_lossy();
    if let Some(missing) = expected.iter().find(|name| !file.tensors().contains_key(**name)) {
        let reason = format!(
            "lacks tensor `{}`, which {index} places here: shards of two models are mixed",
            shown_name(missing)
        );
        return Err(Error::file(path, reason));
    }
    if let Some(extra) = file.tensors().keys().find(|name| !expected.contains(name.as_str())) {
        let reason = format!(
            "holds tensor `{}`, which {index} does not place here: shards of two models are mixed",
            shown_name(extra)
        );
        return Err(Error::file(path, reason));
    }
    Ok(Arc::new(file))
}

fn open_folder(folder: &Path, names: Vec<&String>) -> Result<Vec<Arc<SafetensorsFile>>> {
    if names.is_empty() {
        return Err(Error::file(folder, "holds no safetensors file"));
    }
    let names = without_variants(names);
    check_numbering(folder, &names)?;
    let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
    open_files(&paths)
}

/// Opens files that together are one model: no tensor may be in two of them.
pub(super) fn open_files(paths: &[PathBuf]) -> Result<Vec<Arc<SafetensorsFile>>> {
    let files: Vec<_> = paths
        .iter()
        .map(|path| SafetensorsFile::open(path).map(Arc::new))
        .collect::<Result<_>>()?;
    let mut owners: BTreeMap<&str, &Path> = BTreeMap::new();
    for file in &files {
        for name in file.tensors().keys() {
            if let Some(other) = owners.insert(name, file.path()) {
                let other = other.file_name().unwrap_or_default().to_string_lossy();
                let reason = format!(
                    "holds tensor `{}`, and so does {other}: these are two models; name one file",
                    shown_name(name)
                );
                return Err(Error::file(file.path(), reason));
            }
        }
    }
    Ok(files)
}

/// The files without those of which there is a plainer one: beside `model.safetensors`, `model.fp16.safetensors` holds the same model
/// in another type, and so do its shards.
fn without_variants(names: Vec<&String>) -> Vec<&String> {
    let stem = |name: &'_ str| -> String {
        let shard = shard_number(name).map(|(stem, _, _)| stem);
        shard.or(name.strip_suffix(".safetensors")).unwrap_or(name).to_owned()
    };
    let stems: BTreeSet<String> = names.iter().map(|name| stem(name)).collect();
    let is_variant = |name: &String| {
        let stem = stem(name);
        let plain = stem.rsplit_once('.').filter(|(_, variant)| is_variant_word(variant));
        plain.is_some_and(|(plain, _)| stems.contains(plain))
    };
    names.into_iter().filter(|name| !is_variant(name)).collect()
}

/// Whether the word tells an element type or a copy of the weights, as in `model.fp16.safetensors`.
fn is_variant_word(word: &str) -> bool {
    let types = ["fp", "bf", "int", "float", "f16", "f32", "q4", "q8"];
    types.iter().any(|start| word.starts_with(start)) || ["ema", "non_ema", "8bit", "4bit"].contains(&word)
}

/// `model-00002-of-00003.safetensors` → (`model`, 2, 3).
fn shard_number(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    Some((stem, number.parse().ok()?, count.parse().ok()?))
}

/// Where files are numbered as shards, all of one set must be there.
fn check_numbering(folder: &Path, names: &[&String]) -> Result<()> {
    let numbered: Vec<_> = names.iter().filter_map(|name| shard_number(name)).collect();
    let Some(&(stem, _, count)) = numbered.first() else {
        return Ok(());
    };
    if let Some((other, number, of)) = numbered.iter().find(|(other, _, of)| (*other, *of) != (stem, count)) {
        return Err(Error::file(
            folder,
            format!("mixes shards of two models: {stem}-…-of-{count:05} and {other}-{number:05}-of-{of:05}"),
        ));
    }
    match (1..=count).find(|wanted| numbered.iter().all(|(_, number, _)| number != wanted)) {
        None => Ok(()),
        Some(missing) => Err(Error::file(
            folder,
            format!("lacks the shard {stem}-{missing:05}-of-{count:05}.safetensors: the download is incomplete"),
        )),
    }
}
