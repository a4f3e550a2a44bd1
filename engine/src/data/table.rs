//! The metadata of a drawn set as a table, for trainers that read no JSON.

use std::path::Path;

use super::metadata::Metadata;
use crate::error::{Error, Result};
use crate::files;

/// The list that a drawn set has, and the table that is made of it.
const LIST: &str = "metadata.jsonl";
const TABLE: &str = "metadata.csv";

/// Writes `metadata.csv` beside the `metadata.jsonl` of a folder: columns `image`, `prompt` and `seed`, a row for each picture, in the same
/// order. What was there is replaced.
///
/// # Errors
/// When the list cannot be read, or the disk does not take the table.
pub fn write_table(folder: &Path) -> Result<()> {
    let path = folder.join(TABLE);
    let failed = |error: csv::Error| Error::file(&path, format!("cannot be written: {error}"));
    let list = Metadata::read(&folder.join(LIST))?;
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record(["image", "prompt", "seed"]).map_err(failed)?;
    for record in &list.records {
        let seed = record.seed.map(|seed| seed.to_string()).unwrap_or_default();
        table
            .write_record([record.name.as_str(), record.caption.as_str(), seed.as_str()])
            .map_err(failed)?;
    }
    let bytes = table
        .into_inner()
        .map_err(|error| Error::file(&path, format!("cannot be written: {error}")))?;
    files::replace(&path, &bytes)
}
