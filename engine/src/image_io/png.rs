//! A parallel PNG encoder.
//!
//! The picture is cut into bands of rows. Each band is filtered and deflated on its own and ends on a byte boundary (a
//! "sync flush"), so that the bands, put one after another between a zlib header and an empty last block, are one valid
//! stream; its Adler-32 is combined from those of the bands. Only the 32 KiB of history are lost at each cut. Bands have a
//! size of their own, whatever the number of threads: a picture always gives the same bytes. A band is written while others after it
//! are still compressed, so that the disk waits for no more than the last ones.
//!
//! Each band is deflated in one of two ways, whichever makes less of a piece of it: a photograph's filtered bytes hold no repeats but by
//! chance, and to look for them takes most of the time and gives up some of what codes of single bytes save; drawings and text are all
//! repeats.
//!
//! Source: PNG specification (third edition) §5, §9, §10; RFC 1950 and 1951.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};

use zlib_rs::{Deflate, DeflateConfig, DeflateFlush, Status, Strategy};

use super::RgbImage;

/// What every PNG file starts with.
pub(super) const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// Bytes of pixels that a band holds at least: small enough to keep 16 cores busy with a 4K picture, large enough that the
/// lost history costs little.
const BAND_BYTES: usize = 512 << 10;

/// Bytes of a band on which both ways are tried: some rows of a picture of any size, for repeats are in the row above.
const SAMPLE_BYTES: usize = 64 << 10;

/// zlib's level where repeats are looked for: the first of those that find a poster's. Higher ones take longer and save little.
const LEVEL: i32 = 4;

/// A deflate stream without header, with the largest window.
const RAW_WINDOW_BITS: i32 = -15;

const BYTES_PER_PIXEL: usize = 3;

/// Text in the file, as an uncompressed `iTXt` chunk.
pub(super) struct Text<'a> {
    /// 1 to 79 Latin-1 characters.
    pub keyword: &'a str,
    /// Holds no zero byte.
    pub text: &'a str,
}

/// Writes `image` with `texts` in front of the pixels.
pub(super) fn encode(image: &RgbImage, texts: &[Text<'_>], output: &mut impl Write) -> io::Result<()> {
    let mut header = Vec::with_capacity(13);
    header.extend_from_slice(&extent(image.width)?);
    header.extend_from_slice(&extent(image.height)?);
    // Eight bits a channel, truecolour, deflate, adaptive filters, not interlaced.
    header.extend_from_slice(&[8, 2, 0, 0, 0]);
    output.write_all(&SIGNATURE)?;
    write_chunk(output, b"IHDR", &header)?;
    for text in texts {
        write_chunk(output, b"iTXt", &international_text(text))?;
    }
    write_pixels(image, output)?;
    write_chunk(output, b"IEND", &[])
}

fn extent(value: usize) -> io::Result<[u8; 4]> {
    match i32::try_from(value) {
        Ok(value) => Ok(value.to_be_bytes()),
        Err(_) => Err(io::Error::other(
            "PNG pictures are at most 2147483647 pixels wide and high",
        )),
    }
}

/// Keyword, no compression, no language, no translated keyword, text.
fn international_text(text: &Text<'_>) -> Vec<u8> {
    [text.keyword.as_bytes(), b"\0\0\0\0\0", text.text.as_bytes()].concat()
}

fn write_pixels(image: &RgbImage, output: &mut impl Write) -> io::Result<()> {
    let rows_per_band = BAND_BYTES.div_ceil(image.width * BYTES_PER_PIXEL);
    let bands = image.height.div_ceil(rows_per_band);
    let encode = |encoder: &mut Encoder, index: usize| {
        let first = index * rows_per_band;
        encoder.encode(image, first..image.height.min(first + rows_per_band))
    };
    // Deflate with a window of 32 KiB, a fast level; the two bytes are a multiple of 31.
    write_chunk(output, b"IDAT", &[0x78, 0x5e])?;
    let mut checksum = Adler32::EMPTY;
    in_order(bands, &encode, &mut |band| {
        checksum = checksum.join(band.checksum, band.filtered_bytes);
        output.write_all(&band.chunk)
    })?;
    // An empty last block with fixed codes ends the stream.
    let [a, b, c, d] = checksum.value().to_be_bytes();
    write_chunk(output, b"IDAT", &[0x03, 0x00, a, b, c, d])
}

/// Lets all threads encode bands 0 to `bands`, and hands them to `take` on this thread in their order, each as soon as it and those
/// before it are there.
fn in_order(
    bands: usize,
    encode: &(dyn Fn(&mut Encoder, usize) -> io::Result<Band> + Sync),
    take: &mut dyn FnMut(Band) -> io::Result<()>,
) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    let work = |sender: mpsc::Sender<(usize, io::Result<Band>)>| {
        let mut encoder = Encoder::new();
        loop {
            // In their order, so that few have to wait for one that is late.
            let index = next.fetch_add(1, Ordering::Relaxed);
            // Nobody receives any more after an error.
            if index >= bands || sender.send((index, encode(&mut encoder, index))).is_err() {
                return;
            }
        }
    };
    let work = &work;
    // What receives ends with the closure, so that after an error nobody goes on.
    rayon::in_place_scope(move |scope| {
        for _ in 0..rayon::current_num_threads().min(bands) {
            let sender = sender.clone();
            scope.spawn(move |_| work(sender));
        }
        drop(sender);
        let mut early = BTreeMap::new();
        for wanted in 0..bands {
            let band = loop {
                if let Some(band) = early.remove(&wanted) {
                    break band;
                }
                let (index, band) = receive(&receiver)?;
                early.insert(index, band);
            };
            take(band?)?;
        }
        Ok(())
    })
}

/// Waits for the next band. Where this thread is one of those that encode, it does so instead of only waiting.
fn receive<T>(receiver: &Receiver<T>) -> io::Result<T> {
    loop {
        match receiver.try_recv() {
            Ok(received) => return Ok(received),
            Err(TryRecvError::Disconnected) => return Err(io::Error::other("the encoding threads ended early")),
            Err(TryRecvError::Empty) => {}
        }
        if rayon::yield_now().is_none() {
            return receiver.recv().map_err(io::Error::other);
        }
    }
}

fn write_chunk(output: &mut impl Write, kind: &[u8; 4], data: &[u8]) -> io::Result<()> {
    output.write_all(&chunk(kind, data)?)
}

/// A whole chunk: length, type, data, checksum.
fn chunk(kind: &[u8; 4], data: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    let crc = chunk_crc(kind, data);
    Ok([&length.to_be_bytes()[..], kind, data, &crc.to_be_bytes()].concat())
}

/// The checksum of a chunk's type and data.
pub(super) fn chunk_crc(kind: &[u8; 4], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(kind);
    hasher.update(data);
    hasher.finalize()
}

/// Some rows, compressed.
struct Band {
    /// The `IDAT` chunk that holds them.
    chunk: Vec<u8>,
    /// Of the filtered bytes.
    checksum: Adler32,
    filtered_bytes: usize,
}

/// What one thread needs to compress bands.
struct Encoder {
    /// Looks for repeats of any kind.
    repeats: Deflate,
    /// Codes of single bytes, and of runs of one.
    runs: Deflate,
    filtered: Vec<u8>,
    deflated: Vec<u8>,
    candidates: [Vec<u8>; 5],
}

impl Encoder {
    fn new() -> Self {
        let deflate = |strategy| {
            Deflate::new_with_config(DeflateConfig {
                level: LEVEL,
                window_bits: RAW_WINDOW_BITS,
                strategy,
                ..DeflateConfig::default()
            })
        };
        Encoder {
            repeats: deflate(Strategy::Default),
            runs: deflate(Strategy::Rle),
            filtered: Vec::new(),
            deflated: Vec::new(),
            candidates: Default::default(),
        }
    }

    fn encode(&mut self, image: &RgbImage, rows: Range<usize>) -> io::Result<Band> {
        let stride = image.width * BYTES_PER_PIXEL;
        self.filtered.clear();
        let zeros = vec![0; if rows.start == 0 { stride } else { 0 }];
        for row in rows {
            let start = row * stride;
            let above = match row {
                0 => &zeros,
                _ => &image.pixels[start - stride..start],
            };
            self.filter_row(&image.pixels[start..start + stride], above);
        }
        self.deflate()?;
        Ok(Band {
            chunk: chunk(b"IDAT", &self.deflated)?,
            checksum: Adler32::of(&self.filtered),
            filtered_bytes: self.filtered.len(),
        })
    }

    /// Appends the filter type and the filtered bytes of one row: of the five filters the one whose bytes, taken as signed,
    /// have the smallest sum of magnitudes.
    fn filter_row(&mut self, row: &[u8], above: &[u8]) {
        let mut best = (u64::MAX, 0);
        for (kind, candidate) in self.candidates.iter_mut().enumerate() {
            candidate.resize(row.len(), 0);
            apply_filter(kind, row, above, candidate);
            best = best.min((sum_of_magnitudes(candidate), kind));
        }
        self.filtered.push(best.1 as u8);
        self.filtered.extend_from_slice(&self.candidates[best.1]);
    }

    /// Deflates the filtered bytes up to a byte boundary, in the way that makes less of a piece from their middle.
    fn deflate(&mut self) -> io::Result<()> {
        let middle = self.filtered.len().saturating_sub(SAMPLE_BYTES) / 2;
        let sample = &self.filtered[middle..self.filtered.len().min(middle + SAMPLE_BYTES)];
        let output = &mut self.deflated;
        let runs = deflate(&mut self.runs, sample, output)?;
        let repeats = deflate(&mut self.repeats, sample, output)?;
        let better = if repeats < runs {
            &mut self.repeats
        } else {
            &mut self.runs
        };
        deflate(better, &self.filtered, output).map(drop)
    }
}

/// Puts the deflated bytes, up to a byte boundary, in `output`'s place; gives back how many they are.
fn deflate(stream: &mut Deflate, bytes: &[u8], output: &mut Vec<u8>) -> io::Result<usize> {
    stream.reset();
    // Room for everything: what does not get smaller is stored in blocks, each of some bytes more.
    output.resize(bytes.len() + bytes.len() / 8 + 1024, 0);
    let status = stream.compress(bytes, output, DeflateFlush::SyncFlush);
    let (taken, length) = (stream.total_in() as usize, stream.total_out() as usize);
    match status {
        // Room that is left over says that nothing more is to come.
        Ok(Status::Ok) if taken == bytes.len() && length < output.len() => {}
        other => return Err(io::Error::other(format!("deflate ended early: {other:?}"))),
    }
    output.truncate(length);
    Ok(length)
}

/// Filter type `kind` of PNG: none, left, above, mean of both, Paeth's choice.
fn apply_filter(kind: usize, row: &[u8], above: &[u8], output: &mut [u8]) {
    const N: usize = BYTES_PER_PIXEL;
    // The first pixel has nothing to its left.
    let (head, tail) = output.split_at_mut(N);
    for (i, output) in head.iter_mut().enumerate() {
        let predicted = match kind {
            0 | 1 => 0,
            2 | 4 => above[i],
            _ => above[i] / 2,
        };
        *output = row[i].wrapping_sub(predicted);
    }
    let length = tail.len();
    let (here, left) = (&row[N..], &row[..length]);
    let (above, above_left) = (&above[N..], &above[..length]);
    let pixels = tail.iter_mut().zip(here).zip(left).zip(above).zip(above_left);
    match kind {
        0 => tail.copy_from_slice(here),
        1 => pixels.for_each(|((((output, here), left), _), _)| *output = here.wrapping_sub(*left)),
        2 => pixels.for_each(|((((output, here), _), above), _)| *output = here.wrapping_sub(*above)),
        3 => pixels.for_each(|((((output, here), left), above), _)| {
            *output = here.wrapping_sub(((u16::from(*left) + u16::from(*above)) / 2) as u8);
        }),
        _ => pixels.for_each(|((((output, here), left), above), above_left)| {
            *output = here.wrapping_sub(paeth(*left, *above, *above_left));
        }),
    }
}

/// Of the three neighbours the one nearest to `left + above - above_left`; ties go to the first of them in this order.
fn paeth(left: u8, above: u8, above_left: u8) -> u8 {
    let (a, b, c) = (i16::from(left), i16::from(above), i16::from(above_left));
    // Distances of left, above and above_left from the estimate.
    let (to_left, to_above, to_both) = ((b - c).abs(), (a - c).abs(), (a + b - 2 * c).abs());
    let upper = if to_above <= to_both { b } else { c };
    let nearest = if to_left <= to_above && to_left <= to_both {
        a
    } else {
        upper
    };
    nearest as u8
}

fn sum_of_magnitudes(bytes: &[u8]) -> u64 {
    // Blocks whose sum fits 16 bits let the compiler use wide vectors.
    let blocks = bytes.chunks(256);
    blocks
        .map(|block| {
            let sum: u16 = block.iter().map(|&byte| u16::from((byte as i8).unsigned_abs())).sum();
            u64::from(sum)
        })
        .sum()
}

/// The two sums of RFC 1950's checksum.
#[derive(Clone, Copy)]
struct Adler32 {
    low: u32,
    high: u32,
}

impl Adler32 {
    const MODULUS: u32 = 65521;
    const EMPTY: Adler32 = Adler32 { low: 1, high: 0 };

    fn of(bytes: &[u8]) -> Self {
        let value = simd_adler32::adler32(&bytes);
        Adler32 {
            low: value & 0xffff,
            high: value >> 16,
        }
    }

    /// The checksum of these bytes followed by `length` bytes whose own is `next`. The low sum starts at 1 and adds every
    /// byte; the high sum adds every value the low one takes.
    fn join(self, next: Adler32, length: usize) -> Self {
        let length = (length % Self::MODULUS as usize) as u32;
        let before = self.low + Self::MODULUS - 1;
        let gained = u64::from(length) * u64::from(before) % u64::from(Self::MODULUS);
        Adler32 {
            low: (before + next.low) % Self::MODULUS,
            high: (self.high + next.high + gained as u32) % Self::MODULUS,
        }
    }

    fn value(self) -> u32 {
        self.high << 16 | self.low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_join() {
        let bytes: Vec<u8> = (0..200_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        for cut in [0, 1, 65_520, 65_521, 131_042, 200_000] {
            let joined = Adler32::of(&bytes[..cut]).join(Adler32::of(&bytes[cut..]), bytes.len() - cut);
            assert_eq!(joined.value(), simd_adler32::adler32(&bytes.as_slice()), "{cut}");
        }
        assert_eq!(
            Adler32::EMPTY.join(Adler32::of(&bytes), bytes.len()).value(),
            Adler32::of(&bytes).value()
        );
    }

    #[test]
    fn paeth_follows_the_specification() {
        for left in (0..=255).step_by(5) {
            for above in (0..=255).step_by(3) {
                for above_left in 0..=255u8 {
                    let (a, b, c) = (i32::from(left), i32::from(above), i32::from(above_left));
                    let estimate = a + b - c;
                    let distance = |value: i32| (estimate - value).abs();
                    // `min_by_key` takes the first of equals.
                    let nearest = [a, b, c].into_iter().min_by_key(|&value| distance(value));
                    assert_eq!(Some(i32::from(paeth(left, above, above_left))), nearest);
                }
            }
        }
    }
}
