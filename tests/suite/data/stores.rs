//! What models made of captions, kept on disk.

use std::collections::BTreeSet;
use std::path::PathBuf;

use l2p_engine::Device;
use l2p_engine::checkpoint::{ModelPaths, PathOverrides};
use l2p_engine::data::{FeatureStore, Features, encode_captions, encode_captions_among};
use l2p_engine::device::MemoryTag;
use l2p_engine::model::text::Readout;
use l2p_engine::pipeline::PromptFiles;
use l2p_tests::{Outcome, Suite, models_folder};

use crate::dist::all_ranks;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::stores::entries_are_whole_or_missing", whole);
    suite.cpu("data::stores::captions_are_encoded_once", once);
    suite.cpu("data::stores::ranks_encode_shares", shares);
    suite.cuda("data::stores::captions_on_cuda_are_kept_apart", on_cuda);
}

fn files(folder: &std::path::Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in folder.read_dir()? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    found.sort();
    Ok(found)
}

fn whole() -> Outcome {
    let folder = tempfile::tempdir()?;
    let store = FeatureStore::open(folder.path(), b"encoder")?;
    let features = Features::from_f32(&[1.0, -2.0, f32::MIN_POSITIVE, 0.5], &[1, 2, 2]);
    let key = store.key(&[b"a fox"]);
    assert!(store.read(&key).is_none());
    store.write(&key, &features)?;
    assert_eq!(store.read(&key).as_ref(), Some(&features));
    // Another text, the same bytes cut otherwise, and another encoder are other entries.
    for other in [store.key(&[b"a fix"]), store.key(&[b"a", b" fox"])] {
        assert!(store.read(&other).is_none());
    }
    let stranger = FeatureStore::open(folder.path(), b"another encoder")?;
    assert!(stranger.read(&stranger.key(&[b"a fox"])).is_none());
    // Whatever byte is damaged, and wherever the file ends, the entry is missing rather than wrong.
    let path = files(folder.path())?.pop().ok_or("no entry")?;
    let bytes = std::fs::read(&path)?;
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        std::fs::write(&path, &damaged)?;
        assert!(store.read(&key).is_none_or(|found| found == features), "byte {at}");
        std::fs::write(&path, &bytes[..at])?;
        assert!(store.read(&key).is_none(), "cut at {at}");
    }
    store.write(&key, &features)?;
    assert_eq!(store.read(&key), Some(features));
    Ok(())
}

/// Encodes texts into the store in `folder`; returns how many were found there and how many were encoded.
fn encode(device: &Device, folder: &std::path::Path, texts: &[&str]) -> Result<[usize; 2], libtest_mimic::Failed> {
    let paths = ModelPaths::resolve(&models_folder().join("demo/source"), &PathOverrides::default())?;
    let files = PromptFiles::open(&paths, device, 256, Readout::default())?;
    let store = FeatureStore::open(folder, &files.identity(device)?)?;
    let texts: BTreeSet<&str> = texts.iter().copied().collect();
    let mut told = Vec::new();
    let report = encode_captions(&store, &files, device, &texts, &mut |done, total| {
        told.push((done, total));
        Ok(())
    })?;
    assert_eq!(told.len(), report.encoded);
    let expected = files.load(device)?;
    for text in texts {
        let kept = store
            .read(&store.key(&[text.as_bytes()]))
            .ok_or("an entry is missing")?;
        let fresh = Features::from_tensor(&expected.encode(text)?.features)?;
        assert_eq!(kept, fresh);
        assert!(report.longest >= kept.shape()[1]);
    }
    Ok([report.found, report.encoded])
}

fn once() -> Outcome {
    let folder = tempfile::tempdir()?;
    let device = Device::Cpu;
    assert_eq!(encode(&device, folder.path(), &["fox", "red apple", ""])?, [0, 3]);
    assert_eq!(encode(&device, folder.path(), &["fox", "red apple", "house"])?, [2, 1]);
    let path = files(folder.path())?.pop().ok_or("no entry")?;
    std::fs::write(path, b"damaged")?;
    assert_eq!(
        encode(&device, folder.path(), &["fox", "red apple", "house", ""])?,
        [3, 1]
    );
    Ok(())
}

/// Each of three ranks encodes a share into the folder of its own or of all, and finds everything there. Returns how many texts each of
/// them encoded.
fn encode_among(folders: [&std::path::Path; 3], texts: &[&str]) -> Result<Vec<usize>, libtest_mimic::Failed> {
    let paths = ModelPaths::resolve(&models_folder().join("demo/source"), &PathOverrides::default())?;
    let told = all_ranks(3, |world| {
        let files = PromptFiles::open(&paths, &Device::Cpu, 256, Readout::default())?;
        let store = FeatureStore::open(folders[world.rank()], &files.identity(&Device::Cpu)?)?;
        let texts: BTreeSet<&str> = texts.iter().copied().collect();
        let mut told = 0;
        let mut progress = |_: usize, _: usize| {
            told += 1;
            Ok(())
        };
        let report = encode_captions_among(&world, &store, &files, &Device::Cpu, &texts, &mut progress)?;
        assert_eq!(report.found + report.encoded, texts.len());
        let tokens = texts.iter().map(|text| store.read(&store.key(&[text.as_bytes()])));
        let tokens = tokens.map(|features| features.map(|features| features.shape()[1]));
        assert_eq!(
            tokens.collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().max()),
            Some(report.longest)
        );
        world.leave()?;
        Ok(told)
    })?;
    Ok(told)
}

fn shares() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let (alone, shared) = (at("alone"), at("shared"));
    let texts = ["", "fox", "frog", "house", "red apple"];
    encode(&Device::Cpu, &alone, &texts)?;
    let entries = |place: &std::path::Path| -> Result<Vec<(PathBuf, Vec<u8>)>, libtest_mimic::Failed> {
        let entry = |path: PathBuf| Ok((path.strip_prefix(place)?.to_owned(), std::fs::read(&path)?));
        files(place)?.into_iter().map(entry).collect()
    };
    assert_eq!(encode_among([&shared; 3], &texts)?, [2, 2, 1]);
    let whole = entries(&alone)?;
    assert_eq!(whole.len(), 5);
    assert!(entries(&shared)? == whole);
    // What is gone or damaged is encoded by the rank whose it is, and nothing else.
    let all = files(&shared)?;
    std::fs::remove_file(&all[1])?;
    std::fs::write(&all[3], b"damaged")?;
    assert_eq!(encode_among([&shared; 3], &texts)?.iter().sum::<usize>(), 2);
    assert!(entries(&shared)? == whole);
    assert_eq!(encode_among([&shared; 3], &texts)?, [0, 0, 0]);
    // Ranks that share no folder encode all.
    let own = [at("0"), at("1"), at("2")];
    assert_eq!(encode_among([&own[0], &own[1], &own[2]], &texts)?, [5, 5, 5]);
    for own in own {
        assert!(entries(&own)? == whole);
    }
    Ok(())
}

fn on_cuda(device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    assert_eq!(encode(&Device::Cpu, folder.path(), &["fox"])?, [0, 1]);
    device.synchronize()?;
    let before = device.memory_report().tag(MemoryTag::Weights).current;
    assert_eq!(encode(device, folder.path(), &["fox", "house"])?, [0, 2]);
    assert_eq!(encode(device, folder.path(), &["fox", "house"])?, [2, 0]);
    // The encoder is gone from the device.
    assert_eq!(device.memory_report().tag(MemoryTag::Weights).current, before);
    Ok(())
}
