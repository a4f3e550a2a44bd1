//! What models made of captions, kept on disk.

use std::collections::BTreeSet;
use std::path::PathBuf;

use l2p_engine::Device;
use l2p_engine::checkpoint::{ModelPaths, PathOverrides};
use l2p_engine::data::{FeatureStore, Features, encode_captions};
use l2p_engine::device::MemoryTag;
use l2p_engine::pipeline::PromptFiles;
use l2p_tests::{Outcome, Suite, models_folder};

pub fn register(suite: &mut Suite) {
    suite.cpu("data::stores::entries_are_whole_or_missing", whole);
    suite.cpu("data::stores::captions_are_encoded_once", once);
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
    let files = PromptFiles::open(&paths, device, 256)?;
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
