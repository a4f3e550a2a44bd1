//! The optimizer's state of a run on several ranks: a file of every rank's part.
//!
//! `state.safetensors` is the first rank's, `state-00001-of-00004.safetensors` the second one's, and so on. A tensor of such a file holds
//! some elements of a parameter as they lie in memory, rows of stacked projections one behind the other, and the metadata say from which
//! element on. Any number of ranks goes on from them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Content, Fetch, Float, OutputFile, OutputTensor, SafetensorsFile};
use crate::error::{Error, Result};
use crate::files;
use crate::limits::Ranks;
use crate::train::StateSource;

/// The optimizer's state in a checkpoint's folder, or the first rank's part of it.
pub(super) const STATE: &str = "state.safetensors";

/// The key of [`Header`] in the metadata.
const METADATA: &str = "l2p.slice";

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    rank: usize,
    ranks: usize,
    /// The first element of each tensor.
    first: BTreeMap<String, usize>,
}

/// The name of a rank's file.
pub(super) fn file_name(rank: usize, ranks: usize) -> String {
    match rank {
        0 => STATE.into(),
        _ => format!("state-{rank:05}-of-{ranks:05}.safetensors"),
    }
}

/// This rank's part as a file, if ranks divide the state among them.
///
/// # Errors
/// When it cannot be described.
pub(super) fn own_part(source: &dyn StateSource, rank: usize, ranks: usize) -> Result<Option<OutputFile<'_>>> {
    let Some(slices) = source.state_slices() else {
        return Ok(None);
    };
    let header = Header {
        rank,
        ranks,
        first: slices
            .iter()
            .map(|slice| (slice.name.clone(), slice.elements.start))
            .collect(),
    };
    let json = serde_json::to_string(&header).map_err(|error| Error::invalid(error.to_string()))?;
    let tensors = slices.into_iter().map(|slice| OutputTensor {
        name: slice.name.clone(),
        dtype: Dtype::F32,
        shape: vec![slice.elements.len()],
        content: Content::Fetched(Fetch::new(move || slice.read()), Float::F32),
    });
    Ok(Some(OutputFile::new(
        tensors.collect(),
        [(METADATA.to_owned(), json)].into(),
    )))
}

/// The parts of all ranks.
#[derive(Debug)]
pub(super) struct Parts {
    files: Vec<(SafetensorsFile, Header)>,
    /// Of each tensor, in the order of their elements: the first element, the number of elements, the file.
    places: BTreeMap<String, Vec<(usize, usize, usize)>>,
}

impl Parts {
    /// Opens the parts of the checkpoint whose first one is `first`; `None` where that is the whole state.
    ///
    /// # Errors
    /// When a part is missing, or one of another checkpoint.
    pub fn open(first: &SafetensorsFile) -> Result<Option<Self>> {
        let Some(header) = header(first)? else {
            return Ok(None);
        };
        let folder = first.path().parent().unwrap_or(Path::new("")).to_owned();
        let ranks = header.ranks;
        let mut files = Vec::with_capacity(ranks);
        for rank in 0..ranks {
            let file = SafetensorsFile::open(&folder.join(file_name(rank, ranks)))?;
            match self::header(&file)? {
                Some(own) if (own.rank, own.ranks) == (rank, ranks) => files.push((file, own)),
                _ => {
                    return Err(Error::file(
                        file.path(),
                        format!("is not the part of rank {rank} of {ranks}"),
                    ));
                }
            }
        }
        let mut places: BTreeMap<String, Vec<(usize, usize, usize)>> = BTreeMap::new();
        for (number, (file, header)) in files.iter().enumerate() {
            for (name, tensor) in file.tensors() {
                let first = header.first.get(name);
                let first = *first.ok_or_else(|| {
                    Error::file(file.path(), format!("does not say which elements of `{name}` it holds"))
                })?;
                let count = tensor.shape.iter().product::<usize>();
                if tensor.dtype != Dtype::F32 || first.checked_add(count).is_none() {
                    return Err(Error::file(file.path(), format!("`{name}` is no part of a state")));
                }
                places.entry(name.clone()).or_default().push((first, count, number));
            }
        }
        places.values_mut().for_each(|places| places.sort_unstable());
        Ok(Some(Parts { files, places }))
    }

    /// The files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|(file, _)| file.path().to_owned()).collect()
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Some elements of a tensor.
    ///
    /// # Errors
    /// When they are not all there.
    pub fn read(&self, name: &str, elements: Range<usize>) -> Result<Vec<f32>> {
        let path = self.files[0].0.path();
        let places = self.places.get(name);
        let places =
            places.ok_or_else(|| Error::file(path, format!("lacks `{name}`: it was written with another policy")))?;
        let mut values = Vec::with_capacity(elements.len());
        for &(first, count, number) in places {
            let next = elements.start + values.len();
            if next == elements.end {
                break;
            }
            if !(first..first + count).contains(&next) {
                continue;
            }
            let file = &self.files[number].0;
            let end = elements.end.min(first + count);
            let mut bytes = vec![0; (end - next) * 4];
            file.read_at(file.tensors()[name].range.start + (next - first) * 4, &mut bytes)?;
            values.extend(bytes.chunks_exact(4).map(|bytes| Float::F32.read(bytes)));
        }
        match values.len() == elements.len() {
            true => Ok(values),
            false => Err(Error::file(
                path,
                format!(
                    "the parts hold {} of the elements {elements:?} of `{name}`",
                    values.len()
                ),
            )),
        }
    }
}

fn header(file: &SafetensorsFile) -> Result<Option<Header>> {
    let Some(text) = file.metadata().get(METADATA) else {
        return Ok(None);
    };
    let header: Header = files::from_json(text.as_bytes())
        .map_err(|reason| Error::file(file.path(), format!("holds a part of a state that {reason}")))?;
    Ranks::checked(header.ranks).map_err(|reason| Error::file(file.path(), format!("is a part of many: {reason}")))?;
    Ok(Some(header))
}
