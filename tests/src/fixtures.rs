//! Reference outputs of `diffusers`, `transformers` and `torch`; `fixtures/README.md` describes the files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::{Outcome, expect_sample_close, hash_uniform_seeded};

/// The folder of the fixtures: `L2P_FIXTURES`, or the one in the source tree.
pub fn folder() -> PathBuf {
    match std::env::var_os("L2P_FIXTURES") {
        Some(folder) => folder.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures"),
    }
}

/// All cases of one group, and the outputs stored for them.
pub struct Group {
    name: String,
    cases: Vec<Value>,
    stored: Vec<u8>,
}

impl Group {
    /// Reads the group `name`.
    ///
    /// # Panics
    /// When a file is missing or malformed: the fixtures are part of the source tree.
    pub fn load(name: &str) -> Self {
        let path = |extension: &str| folder().join("data").join(format!("{name}.{extension}"));
        let read = |extension: &str| {
            let path = path(extension);
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let description: Value = serde_json::from_slice(&read("json")).expect("fixture descriptions are JSON");
        let cases = description["cases"].as_array().expect("a group has cases").clone();
        Group {
            name: name.into(),
            cases,
            stored: read("safetensors"),
        }
    }

    /// The cases whose name starts with `prefix`.
    ///
    /// # Panics
    /// When there is none, which would make a test that checks nothing.
    pub fn cases(&self, prefix: &str) -> Vec<Case<'_>> {
        let cases: Vec<Case<'_>> = self
            .cases
            .iter()
            .filter(|case| case["case"].as_str().is_some_and(|name| name.starts_with(prefix)))
            .map(|description| Case {
                group: self,
                description,
            })
            .collect();
        assert!(!cases.is_empty(), "group {} has no case {prefix}*", self.name);
        cases
    }

    /// The case named `name`.
    ///
    /// # Panics
    /// When there is none.
    pub fn case(&self, name: &str) -> Case<'_> {
        let description = self.cases.iter().find(|case| case["case"] == name);
        Case {
            group: self,
            description: description.unwrap_or_else(|| panic!("group {} has no case {name}", self.name)),
        }
    }

    fn stored_f32(&self, key: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.stored).expect("fixture data is safetensors");
        let view = file
            .tensor(key)
            .unwrap_or_else(|error| panic!("{}: {key}: {error}", self.name));
        let words = view
            .data()
            .chunks_exact(4)
            .map(|bytes| [bytes[0], bytes[1], bytes[2], bytes[3]]);
        match view.dtype() {
            safetensors::Dtype::F32 => words.map(f32::from_le_bytes).collect(),
            safetensors::Dtype::I32 => words.map(|bytes| i32::from_le_bytes(bytes) as f32).collect(),
            other => panic!("{}: {key} holds {other:?}", self.name),
        }
    }
}

/// One case: a module, its sizes, and what it must give.
pub struct Case<'a> {
    group: &'a Group,
    description: &'a Value,
}

impl Case<'_> {
    /// The case's name.
    pub fn name(&self) -> &str {
        self.description["case"].as_str().expect("a case has a name")
    }

    /// A value of the case's configuration, by its path, such as `["config", "dim"]`.
    ///
    /// # Panics
    /// When there is no such value.
    pub fn config(&self, path: &[&str]) -> &Value {
        let value = path.iter().fold(&self.description["config"], |value, key| &value[key]);
        assert!(!value.is_null(), "{} has no {path:?} in its configuration", self.name());
        value
    }

    /// Whether the case's configuration has a value at this path.
    pub fn has_config(&self, path: &[&str]) -> bool {
        let config = &self.description["config"];
        !path.iter().fold(config, |value, key| &value[key]).is_null()
    }

    /// A number of the case's configuration.
    ///
    /// # Panics
    /// When there is no such number.
    pub fn size(&self, path: &[&str]) -> usize {
        let value = self.config(path);
        value
            .as_u64()
            .unwrap_or_else(|| panic!("{}: {path:?} is {value}", self.name())) as usize
    }

    /// A list of numbers of the case's configuration.
    ///
    /// # Panics
    /// When there is no such list.
    pub fn sizes(&self, path: &[&str]) -> Vec<usize> {
        let value = self.config(path);
        let list = value
            .as_array()
            .unwrap_or_else(|| panic!("{}: {path:?} is {value}", self.name()));
        list.iter()
            .map(|value| value.as_u64().expect("sizes are whole numbers") as usize)
            .collect()
    }

    /// Every weight: name, shape and values by the generator's rules.
    pub fn weights(&self) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let entries = self.description["weights"]
            .as_array()
            .expect("a case lists its weights");
        entries
            .iter()
            .map(|entry| {
                let name = entry["name"].as_str().expect("a weight has a name");
                let shape = extents(&entry["shape"]);
                (
                    name.to_string(),
                    (shape.clone(), generated_weight(name, &shape, self.seed())),
                )
            })
            .collect()
    }

    /// The values of one weight.
    ///
    /// # Panics
    /// When the case has no such weight.
    pub fn weight(&self, name: &str) -> Vec<f32> {
        self.weights()
            .remove(name)
            .unwrap_or_else(|| panic!("{} has no weight {name}", self.name()))
            .1
    }

    /// The values and shape of an input.
    ///
    /// # Panics
    /// When the case has no such input.
    pub fn input(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let inputs = self.description["inputs"].as_array().expect("a case lists its inputs");
        let entry = inputs.iter().find(|entry| entry["name"] == name);
        let entry = entry.unwrap_or_else(|| panic!("{} has no input {name}", self.name()));
        let shape = extents(&entry["shape"]);
        let values = if let Some(scale) = entry["scale"].as_f64() {
            let full_name = format!("input.{}.{name}", self.name());
            let uniform = hash_uniform_seeded(&full_name, self.seed(), shape.iter().product());
            uniform.into_iter().map(|value| value * scale as f32).collect()
        } else if let Some(key) = entry["stored"].as_str() {
            self.group.stored_f32(key)
        } else {
            let values = flatten(&entry["values"]);
            values.into_iter().map(|value| value as f32).collect()
        };
        (values, shape)
    }

    /// Whether the case has an input of this name.
    pub fn has_input(&self, name: &str) -> bool {
        self.description["inputs"]
            .as_array()
            .is_some_and(|inputs| inputs.iter().any(|entry| entry["name"] == name))
    }

    /// The names of the expected outputs.
    pub fn expected(&self) -> Vec<&str> {
        let entries = self.description["expected"]
            .as_array()
            .expect("a case expects something");
        entries
            .iter()
            .map(|entry| entry["name"].as_str().expect("an output has a name"))
            .collect()
    }

    /// Fails unless `found`, the whole output `name` in row-major order, agrees with what is stored of the reference to
    /// within the case's tolerance.
    ///
    /// # Errors
    /// Naming the case, the output and the error found.
    pub fn check(&self, name: &str, found: &[f32]) -> Outcome {
        self.check_to(name, found, None)
    }

    /// The stored values of an output, all of them where it is small.
    pub fn stored(&self, name: &str) -> Vec<f32> {
        self.group.stored_f32(&format!("{}/{name}", self.name()))
    }

    /// As [`Case::check`], to within another tolerance.
    ///
    /// # Errors
    /// Naming the case, the output and the error found.
    pub fn check_to(&self, name: &str, found: &[f32], tolerance: Option<f64>) -> Outcome {
        let entries = self.description["expected"]
            .as_array()
            .expect("a case expects something");
        let entry = entries.iter().find(|entry| entry["name"] == name);
        let entry = entry.unwrap_or_else(|| panic!("{} expects no {name}", self.name()));
        let what = format!("{}/{}: {name}", self.group.name, self.name());
        let shape = extents(&entry["shape"]);
        if found.len() != shape.iter().product::<usize>() {
            return Err(format!("{what} has {} values, the reference has shape {shape:?}", found.len()).into());
        }
        let number = |key: &str| entry[key].as_f64().expect("outputs are described by numbers");
        let tolerance = tolerance.unwrap_or(number("tolerance"));
        let (start, step) = (number("start") as usize, number("step") as usize);
        let sampled: Vec<f32> = found.iter().skip(start).step_by(step).copied().collect();
        let reference = self
            .group
            .stored_f32(entry["key"].as_str().expect("an output has a key"));
        let norm = found.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        // An all-zero reference has no relative error; then the values themselves must be small.
        let norm_error = match number("norm") {
            0.0 => norm,
            expected => (norm - expected).abs() / expected,
        };
        if norm_error.is_nan() || norm_error > tolerance {
            return Err(format!("{what}: the norm is off by {norm_error:.3e}, more than {tolerance:.1e}").into());
        }
        if number("norm") == 0.0 {
            return Ok(());
        }
        expect_sample_close(&what, &sampled, &reference, &shape, (start, step), tolerance)
    }

    fn seed(&self) -> u64 {
        self.description["seed"].as_u64().expect("a case has a seed")
    }
}

fn extents(value: &Value) -> Vec<usize> {
    let list = value.as_array().expect("a shape is a list");
    list.iter()
        .map(|extent| extent.as_u64().expect("extents are whole numbers") as usize)
        .collect()
}

fn flatten(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(list) => list.iter().flat_map(flatten).collect(),
        other => vec![other.as_f64().expect("inputs are numbers")],
    }
}

/// A weight by the rules of `fixtures/README.md`.
pub fn generated_weight(name: &str, shape: &[usize], seed: u64) -> Vec<f32> {
    let uniform = hash_uniform_seeded(name, seed, shape.iter().product());
    if name.contains("pad_token") || name.contains("embed_tokens") {
        return uniform;
    }
    if shape.len() == 1 {
        let base = if name.ends_with("weight") { 1.0 } else { 0.0 };
        return uniform.into_iter().map(|value| base + 0.1 * value).collect();
    }
    let fan_in: usize = shape[1..].iter().product();
    let scale = (3.0 / fan_in as f64).sqrt() as f32;
    uniform.into_iter().map(|value| value * scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_vectors_are_reproduced() {
        let path = folder().join("data/golden.json");
        let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let vectors = golden["vectors"].as_array().expect("the file lists vectors");
        for vector in vectors {
            let name = vector["name"].as_str().expect("a vector has a name");
            let shape = extents(&vector["shape"]);
            let seed = vector["seed"].as_u64().expect("a vector has a seed");
            // Inputs of the golden vectors have unit variance.
            let values = match vector["rule"].as_str() {
                Some("input") => hash_uniform_seeded(name, seed, shape.iter().product())
                    .into_iter()
                    .map(|value| value * 3f32.sqrt())
                    .collect(),
                _ => generated_weight(name, &shape, seed),
            };
            let expected: Vec<f32> = flatten(&vector["first"])
                .into_iter()
                .map(|value| value as f32)
                .collect();
            assert_eq!(values[..expected.len()], expected, "{name}");
        }
    }
}
