//! Event files that TensorBoard reads.
//!
//! A file is a sequence of records: length (u64), masked CRC-32C of the length, data, masked CRC-32C of the data, all
//! little-endian; the mask turns a checksum by 15 bits and adds a constant, so that checksums of checksums stay useful. Each
//! record is one protocol buffer `Event`. Of it and of what is in it these fields are written:
//!
//! ```text
//! Event      1 wall_time double   2 step int64   3 file_version string   5 summary Summary   7 session_log SessionLog
//! Summary    1 value Value (repeated)
//! Value      1 tag string   2 simple_value float   4 image Image
//! Image      1 height int32   2 width int32   3 colorspace int32 (3 is RGB)   4 encoded_image_string bytes
//! SessionLog 1 status enum (1 is START: what was logged for this step and later ones is void)
//! ```
//!
//! Sources: TensorFlow's record and event formats (`tfrecord`, `event.proto`, `summary.proto`), RFC 3720 for CRC-32C.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// A file of events that grows.
pub struct EventFile {
    path: PathBuf,
    file: BufWriter<File>,
}

/// One thing to be shown.
#[derive(Clone, Copy, Debug)]
pub enum Shown<'a> {
    /// A point of a curve.
    Scalar(f64),
    /// A picture, as a PNG file's bytes.
    Picture {
        /// The file's content.
        png: &'a [u8],
        /// Pixels in a row.
        width: usize,
        /// Rows.
        height: usize,
    },
}

impl EventFile {
    /// A new file in `folder`, which TensorBoard reads together with those of earlier parts of the run. What they hold from
    /// `first_step` on is void.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard recognises the files by this part of their names and reads them in the names' order.
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.l2p",
            now.as_secs(),
            now.subsec_nanos()
        );
        let path = folder.join(name);
        let failed = |error| Error::io(&path, error);
        std::fs::create_dir_all(folder).map_err(failed)?;
        let file = BufWriter::new(File::create(&path).map_err(failed)?);
        let mut events = EventFile { path, file };
        let mut version = Message::default();
        version.double(1, wall_time());
        version.bytes(3, b"brain.Event:2");
        events.write(&version)?;
        let mut start = Message::default();
        start.double(1, wall_time());
        start.integer(2, first_step);
        let mut session = Message::default();
        session.integer(1, 1);
        start.message(7, &session);
        events.write(&start)?;
        events.flush()?;
        Ok(events)
    }

    /// Adds what is to be shown at `step` under each tag.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&mut self, step: u64, shown: &[(&str, Shown<'_>)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, shown) in shown {
            let mut value = Message::default();
            value.bytes(1, tag.as_bytes());
            match shown {
                Shown::Scalar(number) => value.float(2, *number as f32),
                Shown::Picture { png, width, height } => {
                    let mut image = Message::default();
                    image.integer(1, *height as u64);
                    image.integer(2, *width as u64);
                    image.integer(3, 3);
                    image.bytes(4, png);
                    value.message(4, &image);
                }
            }
            summary.message(1, &value);
        }
        let mut event = Message::default();
        event.double(1, wall_time());
        event.integer(2, step);
        event.message(5, &summary);
        self.write(&event)?;
        self.flush()
    }

    fn write(&mut self, event: &Message) -> Result<()> {
        let data = &event.0;
        let length = (data.len() as u64).to_le_bytes();
        let parts: [&[u8]; 4] = [
            &length,
            &masked_crc32c(&length).to_le_bytes(),
            data,
            &masked_crc32c(data).to_le_bytes(),
        ];
        let written = parts.iter().try_for_each(|part| self.file.write_all(part));
        written.map_err(|error| Error::io(&self.path, error))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|error| Error::io(&self.path, error))
    }
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// A protocol buffer message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// Wire types: how a field's value is laid out.
    const VARINT: u64 = 0;
    const EIGHT_BYTES: u64 = 1;
    const LENGTH_AND_BYTES: u64 = 2;
    const FOUR_BYTES: u64 = 5;

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn field(&mut self, number: u64, wire_type: u64) {
        self.varint(number << 3 | wire_type);
    }

    fn integer(&mut self, number: u64, value: u64) {
        self.field(number, Self::VARINT);
        self.varint(value);
    }

    fn double(&mut self, number: u64, value: f64) {
        self.field(number, Self::EIGHT_BYTES);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, number: u64, value: f32) {
        self.field(number, Self::FOUR_BYTES);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, number: u64, value: &[u8]) {
        self.field(number, Self::LENGTH_AND_BYTES);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn message(&mut self, number: u64, value: &Message) {
        self.bytes(number, &value.0);
    }
}

fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with Castagnoli's polynomial.
fn crc32c(bytes: &[u8]) -> u32 {
    /// The polynomial, lowest power at the highest bit.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut value = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                value = value >> 1 ^ if value & 1 == 1 { POLYNOMIAL } else { 0 };
                bit += 1;
            }
            table[byte] = value;
            byte += 1;
        }
        table
    };
    let update = |crc: u32, byte: &u8| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)];
    !bytes.iter().fold(!0, update)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let rising: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&rising), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// Fields of a message: number and raw value.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let (&byte, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            value
        }
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let value = match key & 7 {
                0 => varint(&mut bytes).to_le_bytes().to_vec(),
                kind => {
                    let length = match kind {
                        1 => 8,
                        5 => 4,
                        _ => varint(&mut bytes) as usize,
                    };
                    let (value, rest) = bytes.split_at(length);
                    bytes = rest;
                    value.to_vec()
                }
            };
            found.push((key >> 3, value));
        }
        found
    }

    #[test]
    fn events_are_framed_and_say_what_was_added() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path(), 40).unwrap();
        let picture = Shown::Picture {
            png: b"png",
            width: 300,
            height: 2,
        };
        events
            .add(40, &[("loss", Shown::Scalar(0.5)), ("samples", picture)])
            .unwrap();
        let bytes = std::fs::read(&events.path).unwrap();
        let mut rest = &bytes[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc32c(&rest[..8]).to_le_bytes());
            let data = &rest[12..12 + length];
            assert_eq!(rest[12 + length..16 + length], masked_crc32c(data).to_le_bytes());
            records.push(fields(data));
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 3);
        assert_eq!(records[0][1], (3, b"brain.Event:2".to_vec()));
        assert_eq!(records[1][1], (2, 40u64.to_le_bytes().to_vec()));
        assert_eq!(fields(&records[1][2].1), [(1, 1u64.to_le_bytes().to_vec())]);
        let values: Vec<_> = fields(&records[2][2].1)
            .iter()
            .map(|(_, value)| fields(value))
            .collect();
        assert_eq!(values[0], [(1, b"loss".to_vec()), (2, 0.5f32.to_le_bytes().to_vec())]);
        let image = fields(&values[1][1].1);
        assert_eq!(
            (image[1].1[0], image[1].1[1], &image[3].1[..]),
            (300u16.to_le_bytes()[0], 1, &b"png"[..])
        );
    }
}
