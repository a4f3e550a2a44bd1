//! Arrays in NumPy's format (`.npy`, version 1 to 3), read as f64.
//!
//! Source of the format: the documentation of `numpy.lib.format`. The crates that read it bring a parser of Python's literals along, which
//! needs a C compiler; of those literals the format has four kinds.

use std::io::Read;

use l2p_engine::limits::{ARRAY_HEADER, FEATURE_VALUE, FEATURE_VALUES};
use l2p_engine::shown_name;

/// What every file begins with.
pub const MAGIC: &[u8] = b"\x93NUMPY";

/// An array, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// The extents, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub values: Vec<f64>,
}

/// A type of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Element {
    kind: u8,
    bytes: usize,
    big_endian: bool,
}

impl Element {
    fn of(descr: &str) -> Result<Self, String> {
        let refused = || {
            format!(
                "holds elements of type `{}`; floats of 2, 4 and 8 bytes and whole numbers can be read",
                shown_name(descr)
            )
        };
        let (order, rest) = descr.split_at_checked(1).ok_or_else(refused)?;
        let big_endian = match order {
            "<" | "|" | "=" => false,
            ">" => true,
            _ => return Err(refused()),
        };
        let kind = match rest {
            "f2" | "f4" | "f8" => b'f',
            "i1" | "i2" | "i4" | "i8" => b'i',
            "u1" | "u2" | "u4" | "u8" => b'u',
            _ => return Err(refused()),
        };
        let bytes = rest.as_bytes()[1] - b'0';
        Ok(Element {
            kind,
            bytes: bytes.into(),
            big_endian,
        })
    }

    /// One element; whole numbers of 64 bits lose their last digits beyond 2⁵³.
    fn value(self, bytes: &[u8]) -> f64 {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        if self.big_endian {
            word[..bytes.len()].reverse();
        }
        let word = u64::from_le_bytes(word);
        let unused = 64 - 8 * self.bytes as u32;
        match (self.kind, self.bytes) {
            (b'f', 2) => half::f16::from_bits(word as u16).into(),
            (b'f', 4) => f32::from_bits(word as u32).into(),
            (b'f', _) => f64::from_bits(word),
            (b'i', _) => ((word << unused) as i64 >> unused) as f64,
            _ => word as f64,
        }
    }
}

/// What stands before the elements.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    element: Element,
    fortran_order: bool,
    shape: Vec<usize>,
}

/// The array that `reader` gives, of which `bytes` are said to come. Nothing is allocated that has not come.
///
/// # Errors
/// A sentence that begins with its verb: what is wrong, or where a number is that is none.
pub fn read(reader: &mut dyn Read, bytes: u64) -> Result<Array, String> {
    let mut before = 0;
    let header = header(reader, &mut before)?;
    let count = header.shape.iter().try_fold(1usize, |all, side| all.checked_mul(*side));
    let count = count.filter(|count| *count <= FEATURE_VALUES).ok_or_else(|| {
        format!(
            "holds an array of shape {:?}, more than the {FEATURE_VALUES} numbers that are read",
            header.shape
        )
    })?;
    let expected = (count * header.element.bytes) as u64;
    let there = bytes.saturating_sub(before);
    if there != expected {
        return Err(format!(
            "holds {there} bytes of an array of shape {:?}, which has {expected}: it is damaged",
            header.shape
        ));
    }
    let values = elements(reader, &header, count)?;
    Ok(match header.fortran_order {
        true => Array {
            values: transposed(&values, &header.shape),
            shape: header.shape,
        },
        false => Array {
            shape: header.shape,
            values,
        },
    })
}

fn elements(reader: &mut dyn Read, header: &Header, count: usize) -> Result<Vec<f64>, String> {
    const PIECE: usize = 1 << 14;
    let element = header.element;
    let mut values = Vec::new();
    let mut piece = vec![0; PIECE * element.bytes];
    while values.len() < count {
        let elements = PIECE.min(count - values.len());
        let piece = &mut piece[..elements * element.bytes];
        reader
            .read_exact(piece)
            .map_err(|error| format!("ends early: {error}"))?;
        for bytes in piece.chunks_exact(element.bytes) {
            let value = element.value(bytes);
            if !value.is_finite() || value.abs() > FEATURE_VALUE {
                return Err(format!(
                    "holds {value:e} at element {}: no number to compute with",
                    values.len()
                ));
            }
            values.push(value);
        }
    }
    Ok(values)
}

/// Column-major values as row-major ones.
fn transposed(values: &[f64], shape: &[usize]) -> Vec<f64> {
    // Where an element that comes next in row-major order lies.
    let mut index = vec![0; shape.len()];
    let mut strides = Vec::with_capacity(shape.len());
    let mut stride = 1;
    for side in shape {
        strides.push(stride);
        stride *= side;
    }
    let mut ordered = Vec::with_capacity(values.len());
    for _ in 0..values.len() {
        let place: usize = index.iter().zip(&strides).map(|(index, stride)| index * stride).sum();
        ordered.push(values[place]);
        for (index, side) in index.iter_mut().zip(shape).rev() {
            *index += 1;
            if *index < *side {
                break;
            }
            *index = 0;
        }
    }
    ordered
}

fn header(reader: &mut dyn Read, before: &mut u64) -> Result<Header, String> {
    let mut fill = |target: &mut [u8]| {
        *before += target.len() as u64;
        reader
            .read_exact(target)
            .map_err(|_| "ends within its header".to_owned())
    };
    let mut start = [0; 8];
    fill(&mut start)?;
    if !start.starts_with(MAGIC) {
        return Err("is no array in NumPy's format".into());
    }
    let length = match start[6] {
        1 => {
            let mut length = [0; 2];
            fill(&mut length)?;
            u16::from_le_bytes(length).into()
        }
        2 | 3 => {
            let mut length = [0; 4];
            fill(&mut length)?;
            u32::from_le_bytes(length) as usize
        }
        version => {
            return Err(format!(
                "is of version {version} of NumPy's format; versions 1 to 3 can be read"
            ));
        }
    };
    if length > ARRAY_HEADER {
        return Err(format!(
            "has a header of {length} bytes; at most {ARRAY_HEADER} make sense"
        ));
    }
    let mut text = vec![0; length];
    fill(&mut text)?;
    let text = String::from_utf8(text).map_err(|_| "has a header that is not UTF-8".to_owned())?;
    described(&text).ok_or_else(|| format!("has a header that cannot be read: `{}`", shown_name(text.trim())))?
}

/// What `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }` says: `None` where it is no such thing.
fn described(text: &str) -> Option<Result<Header, String>> {
    let mut rest = Words(text.trim());
    let (mut element, mut fortran_order, mut shape) = (None, None, None);
    rest.takes('{')?;
    while rest.takes('}').is_none() {
        let key = rest.quoted()?;
        rest.takes(':')?;
        match key {
            "descr" => element = Some(rest.quoted()?),
            "fortran_order" => fortran_order = Some(rest.truth()?),
            "shape" => shape = Some(rest.numbers()?),
            _ => return None,
        }
        if rest.takes(',').is_none() {
            rest.takes('}')?;
            break;
        }
    }
    if !rest.0.is_empty() {
        return None;
    }
    let (fortran_order, shape) = (fortran_order?, shape?);
    Some(Element::of(element?).map(|element| Header {
        element,
        fortran_order,
        shape,
    }))
}

/// What is left of a header.
struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    fn takes(&mut self, mark: char) -> Option<()> {
        self.0 = self.0.strip_prefix(mark)?.trim_start();
        Some(())
    }

    fn quoted(&mut self) -> Option<&'a str> {
        let quote = self.0.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
        let (word, rest) = self.0[1..].split_once(quote)?;
        self.0 = rest.trim_start();
        Some(word)
    }

    fn truth(&mut self) -> Option<bool> {
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.0.strip_prefix(word) {
                self.0 = rest.trim_start();
                return Some(value);
            }
        }
        None
    }

    fn numbers(&mut self) -> Option<Vec<usize>> {
        self.takes('(')?;
        let (inside, rest) = self.0.split_once(')')?;
        self.0 = rest.trim_start();
        let inside = inside.trim().trim_end_matches(',').trim();
        if inside.is_empty() {
            return Some(Vec::new());
        }
        // A shape has few extents, whatever a header has room for.
        const MOST: usize = 8;
        let numbers: Option<Vec<usize>> = inside
            .split(',')
            .take(MOST + 1)
            .map(|side| side.trim().parse().ok())
            .collect();
        numbers.filter(|numbers| numbers.len() <= MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, values: &[u8]) -> Vec<u8> {
        let mut bytes = [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes()].concat();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(values);
        bytes
    }

    fn read_of(header: &str, values: &[u8]) -> Result<Array, String> {
        let bytes = file(header, values);
        read(&mut &bytes[..], bytes.len() as u64)
    }

    #[test]
    fn every_type_and_order_is_read() {
        let of = |descr: &str, values: &[u8]| {
            let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (2,), }}\n");
            read_of(&header, values).unwrap().values
        };
        assert_eq!(
            of("<f4", &[1.5f32.to_le_bytes(), (-2f32).to_le_bytes()].concat()),
            [1.5, -2.0]
        );
        assert_eq!(
            of(">f8", &[1.5f64.to_be_bytes(), (-2f64).to_be_bytes()].concat()),
            [1.5, -2.0]
        );
        assert_eq!(
            of("<f2", &[0x3e, 0x00, 0x01, 0xc0]),
            [62.0 * 2f64.powi(-24), -2.001953125]
        );
        assert_eq!(of("|i1", &[255, 3]), [-1.0, 3.0]);
        assert_eq!(of("<u2", &[255, 255, 1, 0]), [65535.0, 1.0]);
        assert_eq!(
            of("<i8", &[(-7i64).to_le_bytes(), 9i64.to_le_bytes()].concat()),
            [-7.0, 9.0]
        );
        let turned = read_of(
            "{'shape': (2, 3), 'fortran_order': True, 'descr': \"|u1\"}",
            &[1, 4, 2, 5, 3, 6],
        )
        .unwrap();
        assert_eq!(
            (turned.shape, turned.values),
            (vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        );
    }

    #[test]
    fn what_is_no_array_is_named() {
        let header =
            |descr: &str, shape: &str| format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}");
        for (header, values, words) in [
            (
                header("'<f4'", "(2,)"),
                &[0; 7][..],
                "holds 7 bytes of an array of shape [2]",
            ),
            (header("'<c8'", "(1,)"), &[0; 8], "type `<c8`"),
            (
                header("[('a', '<f4')]", "(1,)"),
                &[0; 4],
                "a header that cannot be read",
            ),
            (header("'<f4'", "(-1,)"), &[], "a header that cannot be read"),
            (
                header("'<f4'", "(1,1,1,1,1,1,1,1,1)"),
                &[0; 4],
                "a header that cannot be read",
            ),
            (header("'|u1'", "(99999999999, 99999999999)"), &[], "more than the"),
            (header("'|u1'", "(200000000,)"), &[0; 9], "more than the"),
            (header("'<f4'", "(1,)"), &[0, 0, 0xc0, 0x7f], "holds NaN at element 0"),
            (header("'<f4'", "(1,)"), &[0, 0, 0x80, 0x7f], "holds inf at element 0"),
            ("{".repeat(60_000), &[], "a header that cannot be read"),
        ] {
            let message = read_of(&header, values).unwrap_err();
            assert!(message.contains(words) && message.len() < 400, "{message}");
        }
        for bytes in [
            &b""[..],
            b"\x93NUMPY\x01",
            b"\x93NUMPY\x09\0\0\0",
            b"\x93NUMPY\x02\0\xff\xff\xff\xff",
            b"PK\x03\x04....",
        ] {
            assert!(read(&mut &*bytes, bytes.len() as u64).is_err());
        }
    }
}
