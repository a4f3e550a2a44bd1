//! Finds a usable `nvcc`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

/// The oldest release that compiles every kernel (C++20 device code, sm_90a and compressed images).
const OLDEST_RELEASE: (u32, u32) = (12, 8);

/// A compiler that can be used.
#[derive(Debug, Clone)]
pub struct Nvcc {
    /// The executable.
    pub path: PathBuf,
    /// The full text of `nvcc --version`; part of every cache key.
    pub version: String,
    /// The release, for example `(13, 0)`.
    pub release: (u32, u32),
}

/// The places looked at, with what was found there.
#[derive(Debug, Default)]
pub struct SearchLog(pub Vec<(String, String)>);

impl fmt::Display for SearchLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries: Vec<String> = self
            .0
            .iter()
            .map(|(place, found)| format!("{place}: {found}"))
            .collect();
        f.write_str(&entries.join("; "))
    }
}

/// Looks in `L2P_NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda` and `toolchain_dir`, in this order.
///
/// # Errors
/// When `L2P_NVCC` is set but names no usable compiler: an explicit wish is not passed over in silence.
pub fn find_nvcc(toolchain_dir: Option<&Path>) -> Result<(Option<Nvcc>, SearchLog), Error> {
    let mut log = SearchLog::default();
    if let Some(path) = std::env::var_os("L2P_NVCC").filter(|value| !value.is_empty()) {
        let path = PathBuf::from(path);
        return match probe(&path) {
            Ok(nvcc) => Ok((Some(nvcc), log)),
            Err(reason) => Err(Error::Toolchain(format!("L2P_NVCC={}: {reason}", path.display()))),
        };
    }
    log.0.push(("L2P_NVCC".into(), "not set".into()));
    for (place, candidate) in candidates(toolchain_dir) {
        let found = match candidate {
            Some(path) => match probe(&path) {
                Ok(nvcc) => return Ok((Some(nvcc), log)),
                Err(reason) => format!("{} {reason}", path.display()),
            },
            None => "not set".into(),
        };
        log.0.push((place, found));
    }
    Ok((None, log))
}

fn candidates(toolchain_dir: Option<&Path>) -> Vec<(String, Option<PathBuf>)> {
    let mut places: Vec<(String, Option<PathBuf>)> = ["CUDA_HOME", "CUDA_PATH"]
        .map(|name| {
            let home = std::env::var_os(name).filter(|value| !value.is_empty());
            (name.to_string(), home.map(|home| Path::new(&home).join("bin/nvcc")))
        })
        .into();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path)
        .map(|dir| dir.join("nvcc"))
        .find(|file| file.is_file());
    places.push(("PATH".into(), Some(in_path.unwrap_or_else(|| "nvcc".into()))));
    places.push(("/usr/local/cuda".into(), Some("/usr/local/cuda/bin/nvcc".into())));
    if let Some(dir) = toolchain_dir {
        places.push(("toolchain folder".into(), Some(dir.join("bin/nvcc"))));
    }
    places
}

fn probe(path: &Path) -> Result<Nvcc, String> {
    let output = Command::new(path)
        .arg("--version")
        .output()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "not found".to_string(),
            _ => format!("does not start: {error}"),
        })?;
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    let release = parse_release(&version).ok_or("is no nvcc: `--version` names no release")?;
    if release < OLDEST_RELEASE {
        let (major, minor) = OLDEST_RELEASE;
        return Err(format!(
            "is release {}.{}, older than {major}.{minor}",
            release.0, release.1
        ));
    }
    Ok(Nvcc {
        path: path.to_path_buf(),
        version,
        release,
    })
}

fn parse_release(version: &str) -> Option<(u32, u32)> {
    let text = version.split("release ").nth(1)?.split(',').next()?;
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::parse_release;

    #[test]
    fn release_is_read_from_the_version_text() {
        let text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\n";
        assert_eq!(parse_release(text), Some((13, 0)));
        assert_eq!(parse_release("gcc (Debian) 12.2.0"), None);
    }
}
