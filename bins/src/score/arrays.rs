//! Files of features as their extractors wrote them: `.npy`, `.npz` or safetensors, told apart by what they begin with.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use anyhow::bail;
use l2p_engine::checkpoint::read_values;
use l2p_engine::limits::{Budget, FEATURE_ARRAYS};
use l2p_engine::{Error, Result, files, shown_name};
use nalgebra::DMatrix;
use zip::ZipArchive;

use super::npy::{self, Array};

/// What arrays with features are called where a file has several and nobody says which.
const NAMES: [&str; 8] = [
    "features",
    "feats",
    "feat",
    "embeddings",
    "logits",
    "pool3",
    "pool_3",
    "arr_0",
];

/// What a file of features holds.
pub enum Features {
    /// One column per picture, one row per dimension.
    Samples(DMatrix<f64>),
    /// Mean and covariance alone, as pytorch-fid and clean-fid keep them of whole sets.
    Moments {
        /// `mu`, one value per dimension.
        mean: Vec<f64>,
        /// `sigma`, one column per dimension.
        covariance: DMatrix<f64>,
    },
}

/// The features of a file: the array named `key`, or the only matrix.
///
/// # Errors
/// When it cannot be read, is larger than its budget, holds a number that is none, or it is not clear which array is meant.
pub fn features(path: &Path, key: Option<&str>) -> anyhow::Result<Features> {
    let mut arrays = read(path)?;
    if key.is_none()
        && let (Some(mean), Some(sigma)) = (arrays.get("mu"), arrays.get("sigma"))
    {
        let dimensions = mean.values.len();
        if mean.shape.len() != 1 || sigma.shape != [dimensions, dimensions] || dimensions == 0 {
            let reason = format!(
                "holds `mu` of shape {:?} and `sigma` of shape {:?}, expected [dimensions] and [dimensions, dimensions]",
                mean.shape, sigma.shape
            );
            return Err(Error::file(path, reason).into());
        }
        return Ok(Features::Moments {
            mean: mean.values.clone(),
            covariance: DMatrix::from_column_slice(dimensions, dimensions, &sigma.values),
        });
    }
    let name = chosen(path, &arrays, key)?;
    let Some(Array { shape, values }) = arrays.remove(&name) else {
        bail!("{}: holds no array `{}`", path.display(), shown_name(&name));
    };
    match shape[..] {
        [rows, columns] if rows > 0 && columns > 0 => Ok(Features::Samples(DMatrix::from_vec(columns, rows, values))),
        _ => bail!(
            "{}: array `{}` has shape {shape:?}, expected [pictures, dimensions]",
            path.display(),
            shown_name(&name)
        ),
    }
}

/// As [`features`], where mean and covariance do not do.
///
/// # Errors
/// As [`features`], and when there are only these.
pub fn samples(path: &Path, key: Option<&str>, what_for: &str) -> anyhow::Result<DMatrix<f64>> {
    match features(path, key)? {
        Features::Samples(samples) => Ok(samples),
        Features::Moments { .. } => bail!(
            "{}: holds mean and covariance (mu, sigma) alone, but {what_for} needs the features of every picture",
            path.display()
        ),
    }
}

fn chosen(path: &Path, arrays: &BTreeMap<String, Array>, key: Option<&str>) -> anyhow::Result<String> {
    let all = || {
        let names = arrays
            .iter()
            .map(|(name, array)| format!("`{}` {:?}", shown_name(name), array.shape));
        // Enough to choose from.
        names.take(12).collect::<Vec<_>>().join(", ")
    };
    if let Some(key) = key {
        return match arrays.contains_key(key) {
            true => Ok(key.into()),
            false => bail!("{}: holds no array `{key}` (--key), but {}", path.display(), all()),
        };
    }
    let matrices: Vec<&String> = arrays
        .iter()
        .filter(|(_, array)| array.shape.len() == 2)
        .map(|(name, _)| name)
        .collect();
    let named = NAMES.iter().find(|name| matrices.iter().any(|matrix| matrix == *name));
    match (&matrices[..], named) {
        ([one], _) => Ok((*one).clone()),
        ([], _) => bail!(
            "{}: holds no array of shape [pictures, dimensions], but {}",
            path.display(),
            all()
        ),
        (_, Some(name)) => Ok((*name).to_owned()),
        _ => bail!(
            "{}: holds several arrays: name one with --key, of {}",
            path.display(),
            all()
        ),
    }
}

/// All arrays of a file by their names; the only one of a `.npy` file is `arr_0`, as in an archive without names.
///
/// # Errors
/// Naming file and array.
pub fn read(path: &Path) -> Result<BTreeMap<String, Array>> {
    let mut file = files::open_regular(path)?;
    let bytes = file.metadata().map_err(|error| Error::io(path, error))?.len();
    if bytes > Budget::FEATURES.bytes {
        return Err(Error::file(path, too_large(bytes, "")));
    }
    let mut start = [0; 6];
    let read = file.read_exact(&mut start);
    file.rewind().map_err(|error| Error::io(path, error))?;
    match read {
        Ok(()) if start.starts_with(npy::MAGIC) => {
            let array = npy::read(&mut BufReader::new(file), bytes).map_err(|reason| Error::file(path, reason))?;
            Ok(BTreeMap::from([("arr_0".to_owned(), array)]))
        }
        Ok(()) if start.starts_with(b"PK") => archive(path, file),
        _ => {
            drop(file);
            let values = read_values(path)?;
            let arrays = values.into_iter().map(|(name, values)| {
                let array = Array {
                    shape: values.shape,
                    values: values.values.into_iter().map(f64::from).collect(),
                };
                (name, array)
            });
            Ok(arrays.collect())
        }
    }
}

fn too_large(bytes: u64, of: &str) -> String {
    format!(
        "{of}has {bytes} bytes, more than the {} that a {} may have",
        Budget::FEATURES.bytes,
        Budget::FEATURES.kind
    )
}

/// The arrays of an `.npz` archive. What it will unpack to is known, and refused, before any of it is unpacked.
fn archive(path: &Path, file: File) -> Result<BTreeMap<String, Array>> {
    let damaged = |error: zip::result::ZipError| Error::file(path, format!("is no archive that can be read: {error}"));
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    if archive.len() > FEATURE_ARRAYS {
        let reason = format!(
            "holds {} arrays, more than the {FEATURE_ARRAYS} that are read",
            archive.len()
        );
        return Err(Error::file(path, reason));
    }
    let mut unpacked = 0u64;
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(damaged)?;
        unpacked = unpacked.saturating_add(entry.size());
    }
    if unpacked > Budget::FEATURES.bytes {
        return Err(Error::file(path, too_large(unpacked, "unpacked, it ")));
    }
    let mut arrays = BTreeMap::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(damaged)?;
        let name = match entry.name() {
            Ok(name) => name.into_owned(),
            Err(error) => return Err(damaged(error)),
        };
        let Some(array) = name.strip_suffix(".npy").map(str::to_owned) else {
            continue;
        };
        let bytes = entry.size();
        let named = |reason: String| Error::file(path, format!("array `{}` {reason}", shown_name(&array)));
        let content = npy::read(&mut (&mut entry).take(bytes), bytes).map_err(named)?;
        // One byte more than was said, or a sum that is wrong, shows at the end alone.
        let mut more = [0];
        match entry.read(&mut more) {
            Ok(0) => {}
            Ok(_) => return Err(named(format!("is longer than the {bytes} bytes that the archive says"))),
            Err(error) => return Err(named(format!("is damaged: {error}"))),
        }
        arrays.insert(array, content);
    }
    match arrays.is_empty() {
        true => Err(Error::file(path, "is an archive without arrays (.npy)")),
        false => Ok(arrays),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use zip::write::{SimpleFileOptions, ZipWriter};

    fn npy(shape: &str, values: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n");
        let mut bytes = [npy::MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes()].concat();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(values);
        bytes
    }

    fn npz(path: &Path, entries: &[(&str, Vec<u8>)]) {
        let mut archive = ZipWriter::new(File::create(path).unwrap());
        for (name, bytes) in entries {
            archive.start_file(*name, SimpleFileOptions::default()).unwrap();
            archive.write_all(bytes).unwrap();
        }
        archive.finish().unwrap();
    }

    #[test]
    fn the_array_that_is_meant_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npz");
        let matrix = || npy("(2, 3)", &[1, 2, 3, 4, 5, 6]);
        npz(&path, &[("x.npy", matrix()), ("labels.npy", npy("(2,)", &[0, 1]))]);
        let read = samples(&path, None, "x").unwrap();
        // A column is a picture.
        assert_eq!(
            (read.nrows(), read.ncols(), read[(2, 0)], read[(0, 1)]),
            (3, 2, 3.0, 4.0)
        );
        npz(&path, &[("x.npy", matrix()), ("y.npy", npy("(1, 1)", &[7]))]);
        let message = samples(&path, None, "x").unwrap_err().to_string();
        assert!(
            message.contains("name one with --key, of `x` [2, 3], `y` [1, 1]"),
            "{message}"
        );
        assert_eq!(samples(&path, Some("y"), "x").unwrap()[(0, 0)], 7.0);
        assert!(
            samples(&path, Some("z"), "x")
                .unwrap_err()
                .to_string()
                .contains("no array `z`")
        );
        npz(&path, &[("x.npy", matrix()), ("features.npy", npy("(1, 1)", &[7]))]);
        assert_eq!(samples(&path, None, "x").unwrap().len(), 1);
        npz(
            &path,
            &[
                ("mu.npy", npy("(2,)", &[1, 2])),
                ("sigma.npy", npy("(2, 2)", &[1, 0, 0, 1])),
            ],
        );
        assert!(matches!(features(&path, None).unwrap(), Features::Moments { mean, .. } if mean == [1.0, 2.0]));
        assert!(
            samples(&path, None, "KID")
                .err()
                .unwrap()
                .to_string()
                .contains("KID needs the features")
        );
        npz(
            &path,
            &[
                ("mu.npy", npy("(3,)", &[1, 2, 3])),
                ("sigma.npy", npy("(2, 2)", &[1, 0, 0, 1])),
            ],
        );
        assert!(
            features(&path, None)
                .err()
                .unwrap()
                .to_string()
                .contains("`sigma` of shape [2, 2]")
        );
    }

    #[test]
    fn archives_that_unpack_without_end_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bomb.npz");
        let mut archive = ZipWriter::new(File::create(&path).unwrap());
        let zeros = vec![0; 1 << 20];
        for entry in 0..9 {
            archive
                .start_file(format!("{entry}.npy"), SimpleFileOptions::default())
                .unwrap();
            (0..128).for_each(|_| archive.write_all(&zeros).unwrap());
        }
        archive.finish().unwrap();
        assert!(path.metadata().unwrap().len() < 4 << 20);
        let message = read(&path).unwrap_err().to_string();
        assert!(
            message.contains("bomb.npz: unpacked, it has 1207959552 bytes"),
            "{message}"
        );
        // A size that lies.
        npz(&path, &[("x.npy", npy("(9,)", &[1; 9]))]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(bytes.len() - 30);
        std::fs::write(&path, &bytes).unwrap();
        assert!(
            read(&path)
                .unwrap_err()
                .to_string()
                .contains("no archive that can be read")
        );
        std::fs::write(&path, b"PK\x03\x04").unwrap();
        assert!(read(&path).is_err());
        npz(&path, &[("x.txt", b"a".to_vec())]);
        assert!(read(&path).unwrap_err().to_string().contains("without arrays"));
    }
}
