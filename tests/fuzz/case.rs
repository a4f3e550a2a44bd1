//! A case: some files of the base, one or two of them changed, in a folder of its own.

use std::path::{Path, PathBuf};

use crate::base::Base;
use crate::json::Node;
use crate::random::Random;
use crate::readers::{PLANTED, READERS, Reader};
use crate::{bytes, lines, pictures, templates, tensors};

/// What decides all cases.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    /// The seed.
    pub seed: u64,
    /// Whether every case goes to [`PLANTED`], to see that each kind of fault is found.
    pub planted: bool,
}

/// A case, ready to be run in its folder.
pub struct Case {
    /// Who reads it.
    pub reader: &'static Reader,
    /// Where its files are.
    pub folder: PathBuf,
    /// The files that were changed, within the folder.
    pub changed: Vec<String>,
    /// For choices that the reader makes.
    pub random: Random,
}

impl Case {
    /// Makes case `index` of the campaign in the empty folder.
    ///
    /// # Errors
    /// When the disk does not take its files.
    pub fn make(base: &Base, campaign: Campaign, index: u64, folder: &Path) -> std::io::Result<Self> {
        let mut random = Random::new(campaign.seed, index);
        let reader = choose(&mut random, campaign.planted);
        let mut files: Vec<(&str, Vec<u8>)> = Vec::new();
        for part in reader.files {
            files.extend(base.under(part).into_iter().map(|name| (name, base.0[name].clone())));
        }
        let is_target = |name: &str| reader.changes.iter().any(|part| name.contains(part));
        let targets: Vec<usize> = (0..files.len()).filter(|&file| is_target(files[file].0)).collect();
        let mut changed = Vec::new();
        for _ in 0..1 + usize::from(random.one_in(10)) {
            let Some(&target) = targets.get(random.below(targets.len())) else {
                break;
            };
            let other = files[targets[random.below(targets.len())]].1.clone();
            let (name, content) = &mut files[target];
            change(name, content, &other, &mut random);
            changed.push((*name).to_owned());
        }
        for (name, content) in &files {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap_or(folder))?;
            std::fs::write(path, content)?;
        }
        Ok(Case {
            reader,
            folder: folder.into(),
            changed,
            random,
        })
    }

    /// A path within the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// The reader of a case.
pub fn reader_of(campaign: Campaign, index: u64) -> &'static Reader {
    choose(&mut Random::new(campaign.seed, index), campaign.planted)
}

fn choose(random: &mut Random, planted: bool) -> &'static Reader {
    if planted {
        return &PLANTED;
    }
    let total: usize = READERS.iter().map(|reader| reader.weight).sum();
    let mut left = random.below(total);
    for reader in &READERS {
        match left.checked_sub(reader.weight) {
            Some(rest) => left = rest,
            None => return reader,
        }
    }
    &READERS[0]
}

/// Changes a file as its kind allows.
fn change(name: &str, content: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    match Path::new(name).extension().and_then(|extension| extension.to_str()) {
        Some("json") => change_json(content, other, random),
        Some("safetensors") => tensors::mutate(content, other, random),
        Some("png" | "jpg" | "webp") => pictures::mutate(content, other, random),
        Some("jinja") => templates::mutate(content, other, random),
        Some("toml" | "csv" | "jsonl") => lines::mutate(content, other, random),
        _ => bytes::mutate(content, other, random),
    }
}

fn change_json(content: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    match (random.below(10), Node::parse(content)) {
        (0..=6, Some(mut tree)) => {
            tree.mutate(random);
            *content = tree.to_bytes();
        }
        (7, _) => bytes::encode(content, random),
        _ => bytes::mutate(content, other, random),
    }
}
