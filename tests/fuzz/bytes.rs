//! Changes that know nothing of a file but its bytes.

use crate::random::Random;

/// Bytes that mean something to one parser or another.
const WORDS: [&[u8]; 32] = [
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\xff\xff\xff\x7f",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\"",
    b"\\",
    b"\n",
    b"\r\n",
    b",",
    b"[",
    b"]",
    b"{",
    b"}",
    b":",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"18446744073709551616",
    b"'",
    b"#",
    b"%",
    b"\x1b[31m",
    b"\\u0000",
    b"\\ud800",
    b"\xe2\x80\xae",
    b"\xc3",
    b"\t",
    b"\x7f",
];

/// No file grows beyond this by changes.
const LONGEST: usize = 1 << 20;

/// Changes the bytes at a few places; `other` is a file to take pieces from.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..1 + random.length(8) {
        change(bytes, other, random);
        bytes.truncate(LONGEST);
    }
}

fn change(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    // Headers decide more than bodies.
    let end = match random.below(3) {
        0 => bytes.len().min(64),
        1 => bytes.len().min(2048),
        _ => bytes.len(),
    };
    let place = random.below(end);
    match random.below(10) {
        _ if bytes.is_empty() => bytes.extend_from_slice(random.pick(&WORDS)),
        0 | 1 => bytes[place] ^= 1 << random.below(8),
        2 => bytes[place] = random.pick(&[0, 1, 0x7f, 0x80, 0xff, b'0', b'-', b'"']),
        3 => insert(bytes, place, random.pick(&WORDS)),
        4 => bytes.truncate(place),
        5 => {
            let length = random.length(bytes.len() - place);
            bytes.drain(place..place + length);
        }
        6 => {
            let length = random.length((bytes.len() - place).min(4096));
            let piece = bytes[place..place + length].repeat(1 + random.length(64));
            insert(bytes, place, &piece);
        }
        7 => {
            let from = random.below(other.len());
            let length = random.length((other.len() - from).min(65536));
            insert(bytes, place, &other[from..from + length]);
        }
        8 => {
            let value = random.next() >> random.below(64);
            let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - place);
            let mut number = value.to_le_bytes();
            if random.one_in(2) {
                number[..width].reverse();
            }
            bytes[place..place + width].copy_from_slice(&number[..width]);
        }
        _ => {
            let length = random.length(bytes.len() - place);
            let value = random.pick(&[0, 0xff, b' ', b'[']);
            bytes[place..place + length].fill(value);
        }
    }
}

fn insert(bytes: &mut Vec<u8>, place: usize, piece: &[u8]) {
    let tail = bytes.split_off(place);
    bytes.extend_from_slice(piece);
    bytes.extend_from_slice(&tail);
}

/// Text in another encoding, or with marks of one.
pub fn encode(bytes: &mut Vec<u8>, random: &mut Random) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    *bytes = match random.below(5) {
        0 => [b"\xef\xbb\xbf", &bytes[..]].concat(),
        1 => text.encode_utf16().flat_map(u16::to_le_bytes).collect(),
        2 => [
            vec![0xff, 0xfe],
            text.encode_utf16().flat_map(u16::to_le_bytes).collect(),
        ]
        .concat(),
        3 => text.chars().map(|character| character as u8).collect(),
        _ => text.replace('\n', "\r\n").into_bytes(),
    };
}
