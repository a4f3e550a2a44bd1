//! Who may ask: keys from a file, compared in a time that does not tell how much of one was right.

use std::path::Path;

use anyhow::bail;
use axum::http::{HeaderMap, header};
use l2p_engine::files;
use l2p_engine::limits::Budget;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Keys shorter than this can be guessed.
const SHORTEST: usize = 16;

/// The keys, as hashes of one length; none where everybody may ask.
#[derive(Clone, Debug, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Reads a file of keys, one a line; empty lines and those that begin with # are passed over.
    ///
    /// # Errors
    /// When it cannot be read, has no key, or one that is too short or no word.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = files::read_text(path, Budget::CONFIG)?;
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let key = line.trim();
            if key.is_empty() || key.starts_with('#') {
                continue;
            }
            if key.len() < SHORTEST || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                bail!(
                    "{}, line {}: expected a key of at least {SHORTEST} letters, digits and marks without spaces",
                    path.display(),
                    index + 1
                );
            }
            keys.push(hash(key));
        }
        match keys.is_empty() {
            true => bail!("{}: holds no key; write one a line", path.display()),
            false => Ok(Keys(keys)),
        }
    }

    /// Whether everybody may ask.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// What a client is called whose headers hold one of the keys; nothing where they hold none.
    pub fn client(&self, headers: &HeaderMap) -> Option<String> {
        let given = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let key = given
            .strip_prefix("Bearer ")
            .or_else(|| given.strip_prefix("bearer "))?;
        let given = hash(key.trim());
        // All of them, so that the time tells nothing of which.
        let found = self
            .0
            .iter()
            .fold(0, |found, key| found | key.ct_eq(&given).unwrap_u8());
        (found == 1).then(|| format!("key {:02x}{:02x}{:02x}", given[0], given[1], given[2]))
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_open_and_others_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "# for tests\n\n0123456789abcdef\n fedcba9876543210 \n").unwrap();
        let keys = Keys::read(&path).unwrap();
        let client = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            keys.client(&headers)
        };
        let names = ["Bearer 0123456789abcdef", "bearer fedcba9876543210"].map(|value| client(value).unwrap());
        assert_ne!(names[0], names[1]);
        for bad in [
            "Bearer 0123456789abcde",
            "0123456789abcdef",
            "Basic 0123456789abcdef",
            "Bearer ",
            "",
        ] {
            assert_eq!(client(bad), None, "{bad}");
        }
        assert_eq!(keys.client(&HeaderMap::new()), None);
        for (text, word) in [
            ("", "holds no key"),
            ("short", "line 1"),
            ("# a\nwith spaces in it all", "line 2"),
        ] {
            std::fs::write(&path, text).unwrap();
            assert!(Keys::read(&path).unwrap_err().to_string().contains(word), "{text}");
        }
    }
}
