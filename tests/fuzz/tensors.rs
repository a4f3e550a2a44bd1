//! Changes to safetensors files that keep most of their sense: numbers, shapes, offsets, names.

use serde_json::{Value, json};

use crate::bytes;
use crate::json::Node;
use crate::random::Random;

/// A file taken apart.
struct Parts {
    metadata: Value,
    tensors: Vec<Tensor>,
}

#[derive(Clone)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    data: Vec<u8>,
}

/// Numbers that a weight cannot be, or hardly: infinities, NaN, the largest and the smallest, zero.
const VALUES: [f32; 10] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN,
    1e30,
    1e-38,
    1e-45,
    0.0,
    -1.0,
];

/// Prefixes that programs put before names.
const PREFIXES: [&str; 7] = [
    "model.",
    "module.",
    "transformer.",
    "model.diffusion_model.",
    "pipe.dit.",
    "base_model.model.",
    "",
];

/// Changes a file; `other` is one to take pieces from.
pub fn mutate(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    match (random.below(10), Parts::of(file)) {
        (0..=5, Some(mut parts)) => {
            for _ in 0..1 + random.length(4) {
                parts.change(random);
            }
            *file = parts.write();
        }
        (6 | 7, Some(_)) => mutate_header(file, random),
        (8, _) => mutate_length(file, random),
        _ => bytes::mutate(file, other, random),
    }
}

/// Where the header ends.
fn header_end(file: &[u8]) -> Option<usize> {
    let (length, rest) = file.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    (length <= rest.len()).then(|| 8 + length)
}

/// Changes the header as any JSON; the data stay.
fn mutate_header(file: &mut Vec<u8>, random: &mut Random) {
    let Some(end) = header_end(file) else { return };
    let Some(mut tree) = Node::parse(&file[8..end]) else {
        return;
    };
    tree.mutate(random);
    let header = tree.to_bytes();
    *file = [&(header.len() as u64).to_le_bytes()[..], &header, &file[end..]].concat();
}

fn mutate_length(file: &mut [u8], random: &mut Random) {
    if let Some(length) = file.first_chunk_mut::<8>() {
        let found = u64::from_le_bytes(*length);
        let changed = match random.below(5) {
            0 => found.wrapping_add(1),
            1 => found.wrapping_sub(1),
            2 => random.next() >> random.below(64),
            3 => u64::MAX - random.below(16) as u64,
            _ => found ^ (1 << random.below(64)),
        };
        *length = changed.to_le_bytes();
    }
}

impl Parts {
    fn of(file: &[u8]) -> Option<Self> {
        let end = header_end(file)?;
        let header: Value = serde_json::from_slice(&file[8..end]).ok()?;
        let mut parts = Parts {
            metadata: header.get("__metadata__").cloned().unwrap_or_default(),
            tensors: Vec::new(),
        };
        for (name, entry) in header.as_object()?.iter().filter(|(name, _)| *name != "__metadata__") {
            let offset = |index: usize| usize::try_from(entry["data_offsets"][index].as_u64()?).ok();
            parts.tensors.push(Tensor {
                name: name.clone(),
                dtype: entry["dtype"].as_str()?.into(),
                shape: entry["shape"]
                    .as_array()?
                    .iter()
                    .map(Value::as_u64)
                    .collect::<Option<_>>()?,
                data: file.get(end + offset(0)?..end + offset(1)?)?.to_vec(),
            });
        }
        Some(parts)
    }

    fn write(&self) -> Vec<u8> {
        let mut header = Vec::new();
        if !self.metadata.is_null() {
            header.push(("__metadata__".to_owned(), Node::of(&self.metadata)));
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            let start = data.len();
            data.extend_from_slice(&tensor.data);
            let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
            header.push((tensor.name.clone(), Node::of(&entry)));
        }
        let header = Node::Map(header).to_bytes();
        [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
    }

    fn change(&mut self, random: &mut Random) {
        if random.one_in(12) && !self.metadata.is_null() {
            return self.change_metadata(random);
        }
        if random.one_in(60) {
            return self.add_many(random);
        }
        if self.tensors.is_empty() {
            return;
        }
        let place = random.below(self.tensors.len());
        let donor = self.tensors[random.below(self.tensors.len())].clone();
        let tensor = &mut self.tensors[place];
        match random.below(12) {
            0..=4 => tensor.set_values(random),
            5 => tensor.reshape(random),
            6 => tensor.retype(random),
            7 => tensor.data = donor.data,
            8 => {
                self.tensors.remove(place);
            }
            9 => self.tensors.push(donor),
            10 => tensor.name = crate::json::text_like(&tensor.name, random),
            _ => {
                let prefix = random.pick(&PREFIXES);
                self.tensors
                    .iter_mut()
                    .for_each(|tensor| tensor.name.insert_str(0, prefix));
            }
        }
    }

    /// A file's metadata are texts, some of which are JSON.
    fn change_metadata(&mut self, random: &mut Random) {
        let texts = self.metadata.as_object_mut().into_iter().flatten();
        for (_, text) in texts {
            if let Some(mut tree) = text.as_str().and_then(|text| Node::parse(text.as_bytes())) {
                tree.mutate(random);
                *text = String::from_utf8_lossy(&tree.to_bytes()).into();
            }
        }
    }

    /// A header of many small entries.
    fn add_many(&mut self, random: &mut Random) {
        let dims = random.below(4);
        for index in 0..random.length(20_000) {
            self.tensors.push(Tensor {
                name: format!("t{index}"),
                dtype: "F32".into(),
                shape: [vec![0], vec![1; dims]].concat(),
                data: Vec::new(),
            });
        }
    }
}

impl Tensor {
    /// Puts an impossible number into one element, some, or all.
    fn set_values(&mut self, random: &mut Random) {
        let value = random.pick(&VALUES);
        let element: Vec<u8> = match self.dtype.as_str() {
            "F32" => value.to_le_bytes().into(),
            "BF16" => value.to_le_bytes()[2..].into(),
            "F16" => [0, 0x7e].into(),
            _ => return bytes::mutate(&mut self.data, &[], random),
        };
        let count = self.data.len() / element.len();
        let (first, length) = match random.below(3) {
            0 => (0, count),
            1 => (random.below(count), 1),
            _ => {
                let first = random.below(count);
                (first, random.length(count - first))
            }
        };
        let places = self.data.chunks_exact_mut(element.len()).skip(first).take(length);
        places.for_each(|place| place.copy_from_slice(&element));
    }

    /// Another shape of as many elements, or nearly.
    fn reshape(&mut self, random: &mut Random) {
        match random.below(6) {
            0 => self.shape.reverse(),
            1 => self.shape.push(1),
            2 => self.shape = vec![self.shape.iter().product()],
            3 => self.shape = Vec::new(),
            4 if self.shape.len() > 1 && self.shape[0].is_multiple_of(2) => {
                self.shape[0] /= 2;
                self.shape[1] *= 2;
            }
            _ if !self.shape.is_empty() => {
                let place = random.below(self.shape.len());
                let bytes = self.data.len() as u64;
                let rest = bytes / self.shape[place].max(1);
                self.shape[place] = random.length(8) as u64;
                self.data.resize((rest * self.shape[place]).min(1 << 20) as usize, 0);
            }
            _ => {}
        }
    }

    fn retype(&mut self, random: &mut Random) {
        let types = [
            "F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "I8", "X", "",
        ];
        self.dtype = random.pick(&types).into();
    }
}
