//! Metadata in JSON, entry by entry: what an entry says beside the columns that are read is passed over and never held.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{CAPTION, IMAGE, Reader, Row, SEED};
use crate::error::{Error, Result};
use crate::files;

/// Lines of one object each.
pub(super) fn read_lines(reader: &mut Reader<'_>, bytes: &[u8]) -> Result<()> {
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let number = index + 1;
        let place = || format!("line {number}");
        let entry = files::text_of(line, number)
            .and_then(|line| serde_json::from_str(line).map_err(|error| format!("is not JSON: {error}")));
        match entry {
            Ok(entry) => add(reader, place, &entry)?,
            Err(reason) => reader.add_damaged(place(), reason, None)?,
        }
    }
    Ok(())
}

/// One list of objects.
pub(super) fn read_list(reader: &mut Reader<'_>, bytes: &[u8]) -> Result<()> {
    let path = reader.path;
    let text = files::text_of(bytes, 1).map_err(|reason| Error::file(path, reason))?;
    let mut json = serde_json::Deserializer::from_str(text);
    let mut refused = None;
    let list = List {
        reader,
        refused: &mut refused,
    };
    let read = json.deserialize_seq(list).and_then(|()| json.end());
    match (refused, read) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(Error::file(path, format!("is not a list of JSON objects: {error}"))),
        (None, Ok(())) => Ok(()),
    }
}

fn add(reader: &mut Reader<'_>, place: impl Fn() -> String, entry: &Entry) -> Result<()> {
    match entry.row() {
        Ok(row) => reader.add_row(place, row),
        Err(reason) => reader.add_damaged(place(), reason, entry.image()),
    }
}

/// Reads a list into a reader.
struct List<'a, 'b> {
    reader: &'a mut Reader<'b>,
    /// Why the reader takes no more.
    refused: &'a mut Option<Error>,
}

impl<'de> Visitor<'de> for List<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<(), A::Error> {
        let mut number = 0;
        while let Some(entry) = list.next_element::<Entry>()? {
            number += 1;
            if let Err(error) = add(self.reader, || format!("entry {number}"), &entry) {
                *self.refused = Some(error);
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

/// The columns of an entry.
#[derive(Default)]
struct Entry {
    image: [Option<Field>; 2],
    caption: [Option<Field>; 2],
    seed: Option<Field>,
}

/// What stands in a column.
enum Field {
    Text(String),
    /// Something else, as a message shows it.
    Other(String),
}

impl Entry {
    fn row(&self) -> std::result::Result<Row<'_>, String> {
        Ok(Row {
            image: text(&self.image, IMAGE)?,
            caption: text(&self.caption, CAPTION)?,
            seed: self
                .seed
                .as_ref()
                .map(|(Field::Text(text) | Field::Other(text))| text.as_str()),
        })
    }

    fn image(&self) -> Option<&str> {
        text(&self.image, IMAGE).ok().flatten()
    }

    fn column(&mut self, name: &str) -> Option<&mut Option<Field>> {
        let of = |names: [&str; 2]| names.iter().position(|known| *known == name);
        match (of(IMAGE), of(CAPTION)) {
            (Some(index), _) => Some(&mut self.image[index]),
            (_, Some(index)) => Some(&mut self.caption[index]),
            _ if name == SEED => Some(&mut self.seed),
            _ => None,
        }
    }
}

/// The text of the first column that is there.
fn text<'a>(columns: &'a [Option<Field>; 2], names: [&str; 2]) -> std::result::Result<Option<&'a str>, String> {
    match columns.iter().flatten().next() {
        None => Ok(None),
        Some(Field::Text(text)) => Ok(Some(text)),
        Some(Field::Other(other)) => Err(format!("says {} = {other}, expected a text", names.join(" or "))),
    }
}

impl<'de> Deserialize<'de> for Entry {
    /// Whatever is no object is an entry that says nothing.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Columns;
        impl<'de> Visitor<'de> for Columns {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entry, A::Error> {
                let mut entry = Entry::default();
                while let Some(name) = map.next_key::<Cow<'de, str>>()? {
                    match entry.column(&name) {
                        Some(column) => *column = map.next_value::<Shown>()?.0,
                        None => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(entry)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> std::result::Result<Entry, A::Error> {
                IgnoredAny.visit_seq(list).map(|_| Entry::default())
            }

            fn visit_str<E>(self, _: &str) -> std::result::Result<Entry, E> {
                Ok(Entry::default())
            }

            fn visit_bool<E>(self, _: bool) -> std::result::Result<Entry, E> {
                Ok(Entry::default())
            }

            fn visit_u64<E>(self, _: u64) -> std::result::Result<Entry, E> {
                Ok(Entry::default())
            }

            fn visit_i64<E>(self, _: i64) -> std::result::Result<Entry, E> {
                Ok(Entry::default())
            }

            fn visit_f64<E>(self, _: f64) -> std::result::Result<Entry, E> {
                Ok(Entry::default())
            }

            fn visit_unit<E>(self) -> std::result::Result<Entry, E> {
                Ok(Entry::default())
            }
        }
        deserializer.deserialize_any(Columns)
    }
}

/// A field, or `None` for null.
struct Shown(Option<Field>);

impl<'de> Deserialize<'de> for Shown {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Value;

        fn other<E>(shown: impl Into<String>) -> std::result::Result<Shown, E> {
            Ok(Shown(Some(Field::Other(shown.into()))))
        }

        impl<'de> Visitor<'de> for Value {
            type Value = Shown;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<Shown, E> {
                Ok(Shown(Some(Field::Text(text.into()))))
            }

            fn visit_string<E>(self, text: String) -> std::result::Result<Shown, E> {
                Ok(Shown(Some(Field::Text(text))))
            }

            fn visit_unit<E>(self) -> std::result::Result<Shown, E> {
                Ok(Shown(None))
            }

            fn visit_bool<E>(self, value: bool) -> std::result::Result<Shown, E> {
                other(value.to_string())
            }

            fn visit_u64<E>(self, value: u64) -> std::result::Result<Shown, E> {
                other(value.to_string())
            }

            fn visit_i64<E>(self, value: i64) -> std::result::Result<Shown, E> {
                other(value.to_string())
            }

            fn visit_f64<E>(self, value: f64) -> std::result::Result<Shown, E> {
                // `7.0` keeps its point and `1e17` its exponent.
                other(format!("{value:?}"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> std::result::Result<Shown, A::Error> {
                IgnoredAny.visit_seq(list)?;
                other("a list")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Shown, A::Error> {
                IgnoredAny.visit_map(map)?;
                other("an object")
            }
        }
        deserializer.deserialize_any(Value)
    }
}
