//! Metadata in CSV.
//!
//! The format forgives everything: a caption's comma cuts it where nobody quoted it, and a quote that never closes swallows rows
//! until the next one. Neither is an error to a reader of CSV, and both teach a model wrong captions. So a row is damaged when it
//! has another number of fields than the header, when a field in quotes goes on behind them, or when one spans what must be other
//! rows; reading then goes on with the next line of the file, so that no sound row is lost with a damaged one.

use std::io::{Read, Result as IoResult, Seek, SeekFrom};

use csv::{ByteRecord, Position, ReaderBuilder};

use super::{CAPTION, IMAGE, Reader, Row, SEED};
use crate::error::{Error, Result};
use crate::files;

/// Lines that a row may span, and its bytes; captions of more are no captions.
const MOST_LINES: usize = 64;
const LONGEST_ROW: usize = 256 << 10;

/// How often, on average, a byte may be read again behind damaged rows; a file that asks for more is no table.
const MOST_REREAD: usize = 16;

/// What names of pictures end with.
const EXTENSIONS: [&str; 4] = [".png", ".jpg", ".jpeg", ".webp"];

/// Where the columns are.
struct Columns {
    image: usize,
    caption: usize,
    seed: Option<usize>,
    /// Of the header.
    count: usize,
}

/// Rows behind a header.
pub(super) fn read(reader: &mut Reader<'_>, bytes: &[u8]) -> Result<()> {
    let path = reader.path;
    let refuse = |error: csv::Error| Error::file(path, format!("is not CSV: {error}"));
    let mut table = ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .from_reader(Source { bytes, at: 0, end: 0 });
    table.get_mut().end = LONGEST_ROW;
    let mut row = ByteRecord::new();
    if !table.read_byte_record(&mut row).map_err(refuse)? {
        return Ok(());
    }
    let columns = Columns::find(&row).map_err(|reason| Error::file(path, reason))?;
    let mut lines = Lines { at: 0, number: 1 };
    let mut reread = 0;
    loop {
        table.get_mut().end = table.position().byte() as usize + LONGEST_ROW;
        if !table.read_byte_record(&mut row).map_err(refuse)? {
            return Ok(());
        }
        let end = (table.position().byte() as usize).min(bytes.len());
        let mut start = (row.position().map_or(0, Position::byte) as usize).min(end);
        // The second byte of a line's end, and lines without anything.
        start += bytes[start..end]
            .iter()
            .take_while(|byte| b"\r\n".contains(byte))
            .count();
        let raw = &bytes[start..end];
        let line = lines.number_at(bytes, start);
        let place = || format!("line {line}");
        let Some(fault) = columns.fault(&row, raw) else {
            match files::text_of(raw, line) {
                Ok(_) => reader.add_row(place, columns.row(&row))?,
                Err(reason) => reader.add_damaged(place(), reason, None)?,
            }
            continue;
        };
        reader.add_damaged(place(), fault, columns.row(&row).image)?;
        let rest = &bytes[start..];
        let next = start
            + rest
                .iter()
                .position(|byte| *byte == b'\n')
                .map_or(rest.len(), |at| at + 1);
        if next != end {
            reread += end.saturating_sub(next);
            if reread > MOST_REREAD * bytes.len() {
                return Err(Error::file(path, "is not CSV: quotes are left open all over it"));
            }
            let mut position = Position::new();
            position.set_byte(next as u64);
            table.seek(position).map_err(refuse)?;
        }
    }
}

/// The file, of which no more is read at a time than a row may be long.
struct Source<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where reading stops.
    end: usize,
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> IoResult<usize> {
        let end = self.end.min(self.bytes.len());
        let mut rest = self.bytes.get(self.at..end).unwrap_or_default();
        let count = rest.read(buffer)?;
        self.at += count;
        Ok(count)
    }
}

impl Seek for Source<'_> {
    fn seek(&mut self, to: SeekFrom) -> IoResult<u64> {
        let mut cursor = std::io::Cursor::new(self.bytes);
        cursor.set_position(self.at as u64);
        let at = cursor.seek(to)?;
        self.at = at as usize;
        Ok(at)
    }
}

/// Counts lines on the way through a file.
struct Lines {
    at: usize,
    number: usize,
}

impl Lines {
    /// The line that byte `at` is on; later calls ask for later ones.
    fn number_at(&mut self, bytes: &[u8], at: usize) -> usize {
        self.number += bytes[self.at..at].iter().filter(|byte| **byte == b'\n').count();
        self.at = at;
        self.number
    }
}

impl Columns {
    fn find(header: &ByteRecord) -> std::result::Result<Self, String> {
        let names = header.iter().map(|name| files::text_of(name, 1).map(str::trim));
        let names: Vec<&str> = names.collect::<std::result::Result<_, String>>()?;
        let column = |name: &str| names.iter().position(|found| *found == name);
        let one_of = |known: [&str; 2]| {
            known.iter().find_map(|name| column(name)).ok_or_else(|| {
                let names = names.join(", ");
                format!(
                    "has no column `{}`; its columns are {}",
                    known.join("` or `"),
                    crate::shown_name(&names)
                )
            })
        };
        Ok(Columns {
            image: one_of(IMAGE)?,
            caption: one_of(CAPTION)?,
            seed: column(SEED),
            count: names.len(),
        })
    }

    /// The columns of a row; `None` where the row has none, or it is no text.
    fn row<'a>(&self, row: &'a ByteRecord) -> Row<'a> {
        let text = |column: usize| row.get(column).and_then(|bytes| std::str::from_utf8(bytes).ok());
        Row {
            image: text(self.image),
            caption: text(self.caption),
            seed: self.seed.and_then(text),
        }
    }

    /// Why a row, and the bytes of the file that it was made of, cannot be what was meant.
    fn fault(&self, row: &ByteRecord, raw: &[u8]) -> Option<String> {
        if raw.len() >= LONGEST_ROW {
            return Some(format!(
                "has more than {LONGEST_ROW} bytes, the most that a row may have"
            ));
        }
        let raw = raw.trim_ascii_end();
        if raw.contains(&b'"')
            && let Some(fault) = quotes_fault(raw)
        {
            return Some(fault.into());
        }
        let more = raw.iter().filter(|byte| **byte == b'\n').count();
        if row.len() != self.count {
            return Some(format!(
                "has {} fields, the header {}: a text with a comma in it must stand in double quotes",
                row.len(),
                self.count
            ));
        }
        let mut inner = raw.split(|byte| *byte == b'\n').skip(1);
        if more > MOST_LINES || inner.any(|line| self.looks_like_a_row(line)) {
            return Some(format!(
                "opens a quote that closes {more} lines later, behind what looks like other rows"
            ));
        }
        None
    }

    /// Whether a line within a field would be a row by itself, with the name of a picture where the others have one.
    fn looks_like_a_row(&self, line: &[u8]) -> bool {
        let commas = line.iter().filter(|byte| **byte == b',').count();
        if commas + 1 < self.count {
            return false;
        }
        let mut row = ByteRecord::new();
        let mut reader = ReaderBuilder::new().has_headers(false).flexible(true).from_reader(line);
        let read = reader.read_byte_record(&mut row).is_ok_and(|read| read);
        let name = row
            .get(self.image)
            .unwrap_or_default()
            .trim_ascii()
            .to_ascii_lowercase();
        read && EXTENSIONS.iter().any(|extension| name.ends_with(extension.as_bytes()))
    }
}

/// What is wrong with the quotes of a row. Source: RFC 4180 § 2; a quote within a field that does not begin with one is a letter
/// like any other, as readers of CSV have it.
fn quotes_fault(raw: &[u8]) -> Option<&'static str> {
    let mut at = 0;
    loop {
        if raw.get(at) == Some(&b'"') {
            at += 1;
            // To the quote that no other follows.
            loop {
                match raw[at..].iter().position(|byte| *byte == b'"') {
                    None => return Some("opens a quote that never closes"),
                    Some(to) if raw.get(at + to + 1) == Some(&b'"') => at += to + 2,
                    Some(to) => {
                        at += to + 1;
                        break;
                    }
                }
            }
            if !matches!(raw.get(at), None | Some(b',')) {
                return Some(
                    "goes on behind a closing quote: a text that begins with one must stand in quotes as a whole, with \"\" for \
                     each one in it",
                );
            }
        }
        match raw[at..].iter().position(|byte| *byte == b',') {
            None => return None,
            Some(comma) => at += comma + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_close_with_their_field() {
        for sound in ["a,b", "\"a, \"\"b\"\"\",\"\"", "a \"b\",c", "\"a\nb\",c", ""] {
            assert_eq!(quotes_fault(sound.as_bytes()), None, "{sound}");
        }
        for open in ["\"a", "a,\"b,c", "\"a\"\"", "a,\""] {
            assert!(
                quotes_fault(open.as_bytes()).unwrap().contains("never closes"),
                "{open}"
            );
        }
        for behind in ["\"a\"b,c", "a,\"b\" c", "\"a\n\"b\""] {
            assert!(quotes_fault(behind.as_bytes()).unwrap().contains("goes on"), "{behind}");
        }
    }
}
