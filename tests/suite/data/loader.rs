//! Pictures in their order, whoever decodes them.

use std::path::Path;
use std::sync::Arc;

use l2p_engine::data::{
    Content, DataSet, FeatureStore, Features, Item, ItemSource, Loader, LoaderOptions, Position, Room, Sizing, Turn,
};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;

use super::write_grey;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::loader::threads_do_not_change_the_order", order);
    suite.cpu("data::loader::a_position_is_where_loading_goes_on", positions);
    suite.cpu("data::loader::ranks_take_turns", turns);
    suite.cpu("data::loader::damaged_pictures_are_replaced", damaged);
    suite.cpu("data::loader::what_was_decoded_stays_in_memory", memory);
}

const COUNT: usize = 23;
const BATCH: usize = 4;

/// A set of grey pictures in two sizes, and a source of its items. The features of each caption are its number.
fn set(folder: &Path, room: usize) -> Result<(Arc<DataSet>, ItemSource), Failed> {
    let store = FeatureStore::open(&folder.join("captions"), b"numbers")?;
    let mut lines = String::new();
    for index in 0..COUNT {
        let (width, height) = if index % 3 == 0 { (32, 16) } else { (16, 16) };
        write_grey(&folder.join(format!("{index}.png")), width, height, index as u8)?;
        lines += &format!("{{\"image\":\"{index}.png\",\"prompt\":\"{index}\",\"seed\":{index}}}\n");
        let features = Features::from_f32(&[index as f32], &[1, 1, 1]);
        store.write(&store.key(&[index.to_string().as_bytes()]), &features)?;
    }
    store.write(&store.key(&[b""]), &Features::from_f32(&[-1.0], &[1, 1, 1]))?;
    std::fs::write(folder.join("metadata.jsonl"), lines)?;
    let set = DataSet::open(folder, &Sizing::MaxPixels(1 << 20), 16, 0.1, &mut |_, _| Ok(()))?;
    Ok((Arc::new(set), ItemSource::new(store, None, true, &Room::new(room))))
}

fn options(source: &ItemSource, workers: usize, memory: usize) -> LoaderOptions {
    LoaderOptions {
        workers,
        memory,
        batch: BATCH,
        seed: 5,
        caption_dropout: 0.25,
        source: source.clone(),
        turn: Turn::default(),
    }
}

/// What an item is: its picture's grey, its caption's number, its noise.
fn contents(items: &[Item]) -> Vec<(u8, Vec<u8>, Vec<u8>)> {
    let of = |item: &Item| {
        let Content::Rgb { bytes, .. } = &*item.content else {
            panic!("a latent where there are none");
        };
        let noise = item.noise.as_ref().map(|noise| noise.bytes()[..16].to_vec());
        (
            bytes[0],
            item.caption.features.bytes().to_vec(),
            noise.unwrap_or_default(),
        )
    };
    items.iter().map(of).collect()
}

type Contents = Vec<(u8, Vec<u8>, Vec<u8>)>;

fn batches(loader: &mut Loader, count: usize) -> Result<Vec<Contents>, Failed> {
    (0..count).map(|_| Ok(contents(&loader.next_batch()?))).collect()
}

/// Batches of an epoch: 8 wide pictures and 15 square ones.
const EPOCH: usize = 2 + 4;

fn order() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (set, source) = set(folder.path(), 0)?;
    let mut alone = Loader::start(set.clone(), options(&source, 1, 0), Position::default());
    let expected = batches(&mut alone, 3 * EPOCH)?;
    assert!(alone.take_waited().as_nanos() > 0);
    for (workers, memory) in [(4, 0), (3, 1 << 20)] {
        let mut many = Loader::start(set.clone(), options(&source, workers, memory), Position::default());
        assert_eq!(batches(&mut many, 3 * EPOCH)?, expected);
    }
    for epoch in expected.chunks(EPOCH) {
        let mut greys: Vec<u8> = epoch.iter().flatten().map(|item| item.0).collect();
        greys.sort_unstable();
        greys.dedup();
        assert_eq!(greys, (0..COUNT as u8).collect::<Vec<_>>());
    }
    assert_ne!(expected[..EPOCH], expected[EPOCH..2 * EPOCH]);
    // A quarter of the captions is left out; each other one is its picture's.
    let items: Vec<_> = expected.iter().flatten().collect();
    let empty = items.iter().filter(|item| item.1 == (-1f32).to_le_bytes()).count();
    assert!((5..=30).contains(&empty), "{empty} of {}", items.len());
    for item in items.iter().filter(|item| item.1 != (-1f32).to_le_bytes()) {
        assert_eq!(item.1, f32::from(item.0).to_le_bytes());
    }
    Ok(())
}

fn positions() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (set, source) = set(folder.path(), 1 << 20)?;
    let mut loader = Loader::start(set.clone(), options(&source, 2, 1 << 20), Position::default());
    for skipped in 0..2 * EPOCH {
        let position = loader.position();
        assert_eq!(
            (position.epoch as usize, position.batch),
            (skipped / EPOCH, skipped % EPOCH)
        );
        let mut later = Loader::start(set.clone(), options(&source, 2, 0), position);
        let next = contents(&loader.next_batch()?);
        assert_eq!(contents(&later.next_batch()?), next);
        assert_eq!(later.position(), loader.position());
    }
    Ok(())
}

/// Ranks together load what one alone does, and each knows where all of them are.
fn turns() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (set, source) = set(folder.path(), 1 << 20)?;
    let mut alone = Loader::start(set.clone(), options(&source, 1, 0), Position::default());
    let expected = batches(&mut alone, 12)?;
    for (ranks, skipped) in [(2, 0), (3, 0), (4, 4)] {
        let start = Loader::start(set.clone(), options(&source, 1, 0), Position::default());
        let mut start = start;
        batches(&mut start, skipped)?;
        let position = start.position();
        let mut loaders: Vec<Loader> = (0..ranks)
            .map(|rank| {
                let turn = Turn { rank, ranks };
                let options = LoaderOptions {
                    turn,
                    ..options(&source, 2, 0)
                };
                Loader::start(set.clone(), options, position)
            })
            .collect();
        let mut after = start;
        for round in (skipped..12).step_by(ranks) {
            for (rank, loader) in loaders.iter_mut().enumerate().filter(|(rank, _)| round + rank < 12) {
                assert_eq!(contents(&loader.next_batch()?), expected[round + rank]);
            }
            batches(&mut after, ranks)?;
            let all_came = round + ranks <= 12;
            let positions = loaders.iter().map(Loader::position);
            assert!(!all_came || positions.into_iter().all(|position| position == after.position()));
        }
    }
    Ok(())
}

fn damaged() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (set, source) = set(folder.path(), 0)?;
    let path = folder.path().join("4.png");
    let bytes = std::fs::read(&path)?;
    std::fs::write(&path, &bytes[..bytes.len() - 20])?;
    let mut loader = Loader::start(set.clone(), options(&source, 3, 1 << 20), Position::default());
    let loaded = batches(&mut loader, 2 * EPOCH)?;
    assert!(loaded.iter().flatten().all(|item| item.0 != 4));
    let fresh = set.damages().take_fresh();
    assert_eq!((fresh.len(), fresh[0].what.as_str()), (1, "4.png"));
    // Three of 23 are more than a tenth.
    for index in [5, 7] {
        std::fs::write(folder.path().join(format!("{index}.png")), b"text")?;
    }
    let mut loader = Loader::start(set.clone(), options(&source, 3, 1 << 20), Position::default());
    let error = batches(&mut loader, 2 * EPOCH).unwrap_err();
    let message = error.message().unwrap_or_default().to_owned();
    assert!(message.contains("3 of 23 entries"), "{message}");
    for name in ["4.png: ", "5.png: ", "7.png: "] {
        assert!(message.contains(name), "{name} is missing from {message}");
    }
    Ok(())
}

fn memory() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (set, source) = set(folder.path(), 1 << 20)?;
    let mut loader = Loader::start(set.clone(), options(&source, 2, 1 << 20), Position::default());
    let expected = batches(&mut loader, 2 * EPOCH)?;
    drop(loader);
    for index in 0..COUNT {
        std::fs::remove_file(folder.path().join(format!("{index}.png")))?;
    }
    let mut again = Loader::start(set, options(&source, 2, 1 << 20), Position::default());
    assert_eq!(batches(&mut again, 2 * EPOCH)?, expected);
    Ok(())
}
