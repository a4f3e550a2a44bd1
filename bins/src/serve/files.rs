//! Pictures that are fetched by their address: kept in memory, as many as fit, for a while.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use l2p_engine::lock::lock;

/// Pictures, their bytes, and how long they are kept.
const MOST: usize = 256;
const MOST_BYTES: usize = 256 << 20;
const KEPT: Duration = Duration::from_secs(3600);

/// The pictures, oldest first.
#[derive(Default)]
pub struct Files(Mutex<VecDeque<File>>);

struct File {
    name: String,
    media_type: &'static str,
    bytes: Bytes,
    since: Instant,
}

impl Files {
    /// Keeps a picture under a name that nobody guesses, and returns the name; the oldest ones go for it.
    pub fn keep(&self, extension: &str, media_type: &'static str, bytes: Vec<u8>) -> String {
        let name = format!("{:016x}{:016x}.{extension}", random(), random());
        let mut files = lock(&self.0);
        files.push_back(File {
            name: name.clone(),
            media_type,
            bytes: bytes.into(),
            since: Instant::now(),
        });
        let mut bytes: usize = files.iter().map(|file| file.bytes.len()).sum();
        while files.len() > MOST || (bytes > MOST_BYTES && files.len() > 1) {
            bytes -= files.pop_front().map_or(0, |file| file.bytes.len());
        }
        name
    }

    /// A picture's type and bytes, while it is kept.
    pub fn get(&self, name: &str) -> Option<(&'static str, Bytes)> {
        let mut files = lock(&self.0);
        files.retain(|file| file.since.elapsed() < KEPT);
        let file = files.iter().find(|file| file.name == name)?;
        Some((file.media_type, file.bytes.clone()))
    }
}

/// A number from the system's keys for hash tables.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_first() {
        let files = Files::default();
        let first = files.keep("png", "image/png", vec![1]);
        assert_eq!(files.get(&first), Some(("image/png", Bytes::from_static(&[1]))));
        assert_eq!(files.get("x.png"), None);
        let names: Vec<String> = (0..MOST).map(|_| files.keep("png", "image/png", vec![2])).collect();
        assert_eq!(files.get(&first), None);
        assert!(files.get(&names[0]).is_some());
        files.keep("png", "image/png", vec![0; MOST_BYTES - 1]);
        assert!(files.get(&names[MOST - 2]).is_none() && files.get(&names[MOST - 1]).is_some());
    }
}
