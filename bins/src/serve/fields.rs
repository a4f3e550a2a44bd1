//! The fields of a request, from JSON or from a form, each taken once: what is left in the end is named.

use std::collections::BTreeMap;

use l2p_engine::shown_name;
use serde_json::{Map, Value};

use super::failure::Failure;

/// The most fields of a request.
const MOST: usize = 256;

/// Fields by name.
#[derive(Debug)]
pub struct Fields {
    values: BTreeMap<String, Value>,
    /// Whether numbers and truth come as text, as they do in forms.
    texts: bool,
}

impl Fields {
    /// Those of a JSON object.
    ///
    /// # Errors
    /// When it is none, or has too many.
    pub fn of_json(bytes: &[u8]) -> Result<Self, Failure> {
        let object: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| Failure::bad(format!("expected a JSON object: {error}")))?;
        Fields::new(object.into_iter().collect(), false)
    }

    /// Those of a form, all of them text.
    ///
    /// # Errors
    /// When there are too many.
    pub fn of_form(texts: BTreeMap<String, String>) -> Result<Self, Failure> {
        let values = texts.into_iter().map(|(name, text)| (name, Value::String(text)));
        Fields::new(values.collect(), true)
    }

    fn new(values: BTreeMap<String, Value>, texts: bool) -> Result<Self, Failure> {
        match values.len() > MOST {
            true => Err(Failure::bad(format!("{} fields are more than {MOST}", values.len()))),
            // Clients write null where they mean nothing.
            false => Ok(Fields {
                values: values.into_iter().filter(|(_, value)| !value.is_null()).collect(),
                texts,
            }),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// When it is something else.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        match self.values.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(Failure::field(name, format!("expected a text, found {}", kind(&other)))),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    /// When it is something else.
    pub fn number(&mut self, name: &str) -> Result<Option<f64>, Failure> {
        let Some(value) = self.values.remove(name) else {
            return Ok(None);
        };
        let number = match &value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) if self.texts => text.trim().parse().ok(),
            _ => None,
        };
        match number.filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(Failure::field(
                name,
                format!("expected a number, found {}", kind(&value)),
            )),
        }
    }

    /// A number that fits f32.
    ///
    /// # Errors
    /// When it is something else.
    pub fn real(&mut self, name: &str) -> Result<Option<f32>, Failure> {
        let number = self.number(name)?.map(|number| number as f32);
        match number.filter(|number| !number.is_finite()) {
            Some(_) => Err(Failure::field(name, "expected a number that fits 32 bits")),
            None => Ok(number),
        }
    }

    /// A whole number that is not negative.
    ///
    /// # Errors
    /// When it is something else.
    pub fn whole(&mut self, name: &str) -> Result<Option<u64>, Failure> {
        let Some(value) = self.values.remove(name) else {
            return Ok(None);
        };
        let number = match &value {
            // Some clients write 8.0 for 8.
            Value::Number(number) => number.as_u64().or_else(|| {
                let real = number.as_f64()?;
                (real.fract() == 0.0 && (0.0..9.0e15).contains(&real)).then_some(real as u64)
            }),
            Value::String(text) if self.texts => text.trim().parse().ok(),
            _ => None,
        };
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(Failure::field(
                name,
                format!("expected a whole number of 0 or more, found {}", kind(&value)),
            )),
        }
    }

    /// True or false.
    ///
    /// # Errors
    /// When it is something else.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, Failure> {
        match self.values.remove(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(Value::String(text)) if self.texts && (text == "true" || text == "false") => Ok(Some(text == "true")),
            Some(other) => Err(Failure::field(
                name,
                format!("expected true or false, found {}", kind(&other)),
            )),
        }
    }

    /// The only text of a list.
    ///
    /// # Errors
    /// When it is no list of one text.
    pub fn only_text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        match self.values.remove(name) {
            None => Ok(None),
            Some(Value::Array(mut list)) if list.len() == 1 && list[0].is_string() => {
                Ok(list.pop().and_then(|text| text.as_str().map(str::to_owned)))
            }
            Some(other) => Err(Failure::field(
                name,
                format!("expected a list of one text, found {}", kind(&other)),
            )),
        }
    }

    /// Leaves fields away that mean nothing here, and returns the names of those that were there.
    pub fn pass_over(&mut self, names: &[&str]) -> Vec<String> {
        let there = names.iter().filter(|name| self.values.remove(**name).is_some());
        there.map(|name| (*name).to_owned()).collect()
    }

    /// The names that were not taken.
    pub fn left(self) -> Vec<String> {
        self.values
            .into_keys()
            .map(|name| shown_name(&name).into_owned())
            .collect()
    }

    /// Refuses fields that were not taken.
    ///
    /// # Errors
    /// Naming the first one.
    pub fn finish(self) -> Result<(), Failure> {
        match self.left().first() {
            Some(name) => Err(Failure::field(name, "is no field of this request")),
            None => Ok(()),
        }
    }
}

/// What a value is, in words.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("the text `{}`", shown_name(text)),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_what_they_should_be() {
        let mut fields =
            Fields::of_json(br#"{"a": "x", "n": 3, "f": 8.0, "r": 0.5, "t": true, "z": null, "l": ["y"], "q": 1}"#)
                .unwrap();
        assert_eq!(fields.text("a").unwrap().as_deref(), Some("x"));
        assert_eq!(
            (fields.whole("n").unwrap(), fields.whole("f").unwrap()),
            (Some(3), Some(8))
        );
        assert_eq!(
            (fields.real("r").unwrap(), fields.flag("t").unwrap()),
            (Some(0.5), Some(true))
        );
        assert_eq!(
            (fields.text("z").unwrap(), fields.only_text("l").unwrap().as_deref()),
            (None, Some("y"))
        );
        assert!(fields.finish().unwrap_err().message.starts_with("q: "));
        for bad in [
            r#"{"v": "1"}"#,
            r#"{"v": -1}"#,
            r#"{"v": 1.5}"#,
            r#"{"v": [1]}"#,
            r#"{"v": 1e300}"#,
        ] {
            assert!(Fields::of_json(bad.as_bytes()).unwrap().whole("v").is_err(), "{bad}");
        }
        for bad in ["", "[]", "1", "{", "{\"a\": NaN}", "\"\u{1}\""] {
            assert!(Fields::of_json(bad.as_bytes()).is_err(), "{bad}");
        }
        let form = |text: &str| Fields::of_form([("v".to_owned(), text.to_owned())].into()).unwrap();
        assert_eq!(
            (form("2").whole("v").unwrap(), form("-0.5").real("v").unwrap()),
            (Some(2), Some(-0.5))
        );
        assert_eq!(form("true").flag("v").unwrap(), Some(true));
        assert!(form("NaN").number("v").is_err() && form("1e99").real("v").is_err() && form("x").whole("v").is_err());
    }
}
