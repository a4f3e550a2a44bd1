//! What templates are offered beyond the library's own, with bounds.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error as TemplateError, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::limits::{LONGEST_RENDERED, TEMPLATE_DEPTH, TEMPLATE_INDENT};

/// Bytes of JSON for one unit of fuel, as the library counts its own.
const JSON_BYTES: u64 = 4;

/// Values copied for one unit of fuel.
const COPIED_VALUES: usize = 4;

fn refuse(reason: impl Into<String>) -> TemplateError {
    TemplateError::new(ErrorKind::InvalidOperation, reason.into())
}

/// How a template refuses a conversation.
pub(super) fn raise_exception(message: String) -> Result<Value, TemplateError> {
    Err(refuse(message))
}

/// What templates get instead of the library's `debug`.
pub(super) fn refuse_debug() -> Result<Value, TemplateError> {
    Err(refuse("debug() is not offered"))
}

/// A copy of a value in which lists and maps are plain ones: no object of the library is in it that changes later, so none can
/// come to hold itself.
pub(super) fn plain(state: &State<'_, '_>, value: Value) -> Result<Value, TemplateError> {
    let mut copied = 0;
    let copy = copy(&value, 0, &mut |values| {
        copied += values;
        let fuel = copied / COPIED_VALUES;
        copied %= COPIED_VALUES;
        state.consume_fuel(fuel as u64)
    })?;
    Ok(copy)
}

fn copy(
    value: &Value,
    depth: usize,
    charge: &mut dyn FnMut(usize) -> Result<(), TemplateError>,
) -> Result<Value, TemplateError> {
    charge(1)?;
    let Some(object) = value.as_object() else {
        return Ok(value.clone());
    };
    if object.type_name().ends_with("::Namespace") {
        return Err(refuse("a namespace cannot hold a namespace here"));
    }
    if depth >= TEMPLATE_DEPTH {
        return Err(refuse(format!(
            "a namespace holds values nested more than {TEMPLATE_DEPTH} deep"
        )));
    }
    match value.kind() {
        ValueKind::Map => {
            let mut pairs = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                pairs.push((copy(&key, depth + 1, charge)?, copy(&item, depth + 1, charge)?));
            }
            Ok(Value::from_pairs(pairs))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| copy(&item, depth + 1, charge));
            Ok(Value::from(items.collect::<Result<Vec<Value>, _>>()?))
        }
        // Macros and functions, which nothing looks into.
        _ => Ok(value.clone()),
    }
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` writes it; the library's own filter escapes for HTML.
pub(super) fn to_json(state: &State<'_, '_>, value: &Value, options: Kwargs) -> Result<String, TemplateError> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let fuel = state.fuel_levels().map_or(u64::MAX, |(_, left)| left);
    let room = fuel.saturating_mul(JSON_BYTES).min(LONGEST_RENDERED as u64);
    let mut text = Bounded {
        bytes: Vec::new(),
        room: room as usize,
    };
    let outcome = match indent {
        Some(indent) if indent > TEMPLATE_INDENT => {
            return Err(refuse(format!(
                "tojson(indent={indent}): expected at most {TEMPLATE_INDENT}"
            )));
        }
        Some(indent) => {
            let indent = " ".repeat(indent);
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut text, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut text, SpacedFormatter)),
    };
    outcome.map_err(|error| TemplateError::new(ErrorKind::BadSerialization, error.to_string()))?;
    state.consume_fuel(text.bytes.len() as u64 / JSON_BYTES)?;
    String::from_utf8(text.bytes).map_err(|error| TemplateError::new(ErrorKind::BadSerialization, error.to_string()))
}

/// Bytes up to a largest number.
struct Bounded {
    bytes: Vec<u8>,
    room: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > self.room - self.bytes.len() {
            return Err(std::io::Error::other("the JSON is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One line of JSON with a space after every comma and colon.
struct SpacedFormatter;

impl Formatter for SpacedFormatter {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
