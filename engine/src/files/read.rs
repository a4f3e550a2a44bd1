//! Reading files that others wrote.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::limits::Budget;
use crate::printable::{shown_name, shown_reason};

/// Opens a regular file for reading. A pipe or a device, which might never end or never begin, is refused without waiting.
///
/// # Errors
/// When it cannot be opened, or is something else.
pub fn open_regular(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // A pipe without a writer would wait for one.
        options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    }
    let file = options.open(path).map_err(|error| Error::io(path, error))?;
    let kind = file.metadata().map_err(|error| Error::io(path, error))?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let found = if kind.is_dir() { "a folder" } else { "a pipe or device" };
    Err(Error::file(path, format!("is {found}, expected a file")))
}

/// Fills `target` with the bytes of `file` from `offset` on, wherever its cursor is; several threads may read at once.
///
/// # Errors
/// When it cannot be read, or ends before.
pub(crate) fn read_exact_at(file: &File, target: &mut [u8], offset: u64) -> std::io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, target, offset);
    #[cfg(windows)]
    {
        let mut done = 0;
        while done < target.len() {
            let read = std::os::windows::fs::FileExt::seek_read(file, &mut target[done..], offset + done as u64)?;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            done += read;
        }
        Ok(())
    }
}

/// The bytes of a regular file of at most `budget`.
///
/// # Errors
/// When it cannot be read, is no regular file, or is larger.
pub fn read(path: &Path, budget: Budget) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let length = file.metadata().map_err(|error| Error::io(path, error))?.len();
    let too_large = || {
        let reason = format!(
            "has more than {} bytes, the most that a {} may have",
            budget.bytes, budget.kind
        );
        Error::file(path, reason)
    };
    if length > budget.bytes {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(length as usize);
    // The length of a file in /proc, or of one that still grows, says nothing.
    file.take(budget.bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io(path, error))?;
    match bytes.len() as u64 > budget.bytes {
        true => Err(too_large()),
        false => Ok(bytes),
    }
}

/// [`read`]; `None` when there is no such file.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_if_there(path: &Path, budget: Budget) -> Result<Option<Vec<u8>>> {
    match read(path, budget) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The text of a regular file, which must be UTF-8; a byte order mark is left out.
///
/// # Errors
/// As [`read`], and naming line and likely encoding when it is not UTF-8.
pub fn read_text(path: &Path, budget: Budget) -> Result<String> {
    decode_text(read(path, budget)?).map_err(|reason| Error::file(path, reason))
}

/// `bytes` as text, without a byte order mark; otherwise where they are not UTF-8, and what they seem to be.
///
/// # Errors
/// A sentence that begins with its verb, for [`Error::file`].
pub fn decode_text(bytes: Vec<u8>) -> std::result::Result<String, String> {
    String::from_utf8(without_mark(bytes)?).map_err(|error| not_utf8(error.as_bytes(), error.utf8_error(), 1))
}

/// `bytes` without a byte order mark, to be read as text by parts.
///
/// # Errors
/// A sentence that begins with its verb, for [`Error::file`], when they are UTF-16.
pub(crate) fn without_mark(mut bytes: Vec<u8>) -> std::result::Result<Vec<u8>, String> {
    const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") || bytes.iter().take(2).any(|byte| *byte == 0) {
        return Err("is UTF-16 text or no text at all; save it as UTF-8".into());
    }
    if bytes.starts_with(UTF8_MARK) {
        bytes.drain(..UTF8_MARK.len());
    }
    Ok(bytes)
}

/// A part of a file as text, its first line being the file's line `first`.
///
/// # Errors
/// As [`decode_text`], when it is not UTF-8.
pub(crate) fn text_of(part: &[u8], first: usize) -> std::result::Result<&str, String> {
    std::str::from_utf8(part).map_err(|error| not_utf8(part, error, first))
}

fn not_utf8(bytes: &[u8], error: std::str::Utf8Error, first: usize) -> String {
    let valid = error.valid_up_to();
    let line = bytes[..valid].iter().filter(|byte| **byte == b'\n').count() + first;
    let byte = bytes[valid];
    format!(
        "is not UTF-8: line {line} has the byte {byte:#04x} (an older Windows or Latin encoding?); save it as UTF-8"
    )
}

/// A JSON file as `T`.
///
/// # Errors
/// As [`read`], and naming the entry at fault when it is no JSON or not what was expected.
pub fn read_json<T: DeserializeOwned>(path: &Path, budget: Budget) -> Result<T> {
    from_json(&read(path, budget)?).map_err(|reason| Error::file(path, reason))
}

/// JSON as `T`; otherwise what is wrong with it, the entry at fault named.
///
/// # Errors
/// A sentence that begins with its verb, for [`Error::file`].
pub fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, String> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let (entry, reason) = (error.path().to_string(), error.inner().to_string());
        let reason = shown_reason(&reason);
        match entry.as_str() {
            "." | "?" => format!("is not what was expected: {reason}"),
            entry => format!("is not what was expected: entry `{}`: {reason}", shown_name(entry)),
        }
    })?;
    json.end()
        .map_err(|error| format!("is not what was expected: {error}"))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_within_their_budget_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, Budget::new("thing", 5)).unwrap(), b"12345");
        let message = read(&path, Budget::new("thing", 4)).unwrap_err().to_string();
        assert!(
            message.contains("more than 4 bytes") && message.contains("thing"),
            "{message}"
        );
        let message = read(folder.path(), Budget::CONFIG).unwrap_err().to_string();
        assert!(message.contains("is a folder"), "{message}");
        #[cfg(target_os = "linux")]
        {
            let message = read(Path::new("/dev/zero"), Budget::CONFIG).unwrap_err().to_string();
            assert!(message.contains("pipe or device"), "{message}");
            let pipe = folder.path().join("pipe");
            let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
            assert!(made.success());
            let message = read(&pipe, Budget::CONFIG).unwrap_err().to_string();
            assert!(message.contains("pipe or device"), "{message}");
        }
    }

    #[test]
    fn other_encodings_are_named_with_their_line() {
        assert_eq!(decode_text(b"\xef\xbb\xbfa\nb".to_vec()).unwrap(), "a\nb");
        let message = decode_text(b"a\nb\ncaf\xe9".to_vec()).unwrap_err();
        assert!(message.contains("line 3") && message.contains("0xe9"), "{message}");
        for text in [&b"\xff\xfea\0"[..], b"\xfe\xff\0a", b"a\0b\0"] {
            assert!(decode_text(text.to_vec()).unwrap_err().contains("UTF-16"));
        }
    }

    #[test]
    fn json_errors_name_the_entry() {
        #[derive(Debug, serde::Deserialize)]
        struct Sizes {
            #[allow(dead_code)]
            widths: Vec<u32>,
        }
        let message = from_json::<Sizes>(br#"{"widths": [1, "two"]}"#).unwrap_err();
        assert!(message.contains("`widths[1]`"), "{message}");
        assert!(from_json::<Sizes>(br#"{"widths": []} x"#).is_err());
        // A name without end is cut, wherever the message repeats it.
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Strict {}
        let message = from_json::<Strict>(format!(r#"{{"{}": 1}}"#, "name".repeat(5000)).as_bytes()).unwrap_err();
        assert!(message.contains("unknown field") && message.len() < 3000, "{message}");
        for text in [&b"{"[..], b"", b"7"] {
            let message = from_json::<Sizes>(text).unwrap_err();
            assert!(
                message.starts_with("is not what was expected: ") && !message.contains("entry"),
                "{message}"
            );
        }
    }
}
