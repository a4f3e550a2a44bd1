//! The engine's switches: what environment variables say about devices, read once and kept with each device.
//!
//! Nothing else in the engine looks at these variables, so that a switch is either valid and in force from the start, or an error.
//! `docs/environment.md` lists them with all others.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::printable::shown_name;

/// Where the memory of tensors on a GPU comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PoolKind {
    /// One range of virtual addresses that all tensors are cut from, where the driver has such; see `pool`.
    #[default]
    Arena,
    /// An allocation of the driver for each tensor, so that compute-sanitizer sees its bounds.
    Direct,
}

/// How devices of this process are used. The default is what is in force where no variable is set, without any folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// `L2P_PORTABLE`: leave out the Hopper kernels.
    pub portable: bool,
    /// `L2P_FUSED_LINEAR`: use the products that do SwiGLU and the gather of patches inside.
    pub fused_linear: bool,
    /// `L2P_GRAPH`: record steps.
    pub graphs: bool,
    /// `L2P_OVERLAP`: let kernels that are made for it begin while the one ahead of them still runs.
    pub overlap: bool,
    /// `L2P_GEMM_SEARCH`: search for the algorithms of matrix products, and take those that were found before.
    pub matmul_search: bool,
    /// `L2P_POOL`: where tensors' memory comes from.
    pub pool: PoolKind,
    /// `L2P_CACHE_DIR`, or `l2p` in `XDG_CACHE_HOME`, or `.cache/l2p` in `HOME`: where algorithms that were found are kept.
    pub cache_folder: Option<PathBuf>,
    /// `L2P_KERNEL_IMAGES`: a folder whose images come before those of the build.
    pub kernel_images: Option<PathBuf>,
    /// `L2P_CUDA_LIBRARIES`: folders with CUDA's libraries, looked at before the usual ones.
    pub library_folders: Vec<PathBuf>,
    /// `VIRTUAL_ENV`, `CONDA_PREFIX` and the folders of `PATH` that have a `python3`: where pip may have put NCCL.
    pub python_prefixes: Vec<PathBuf>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions {
            portable: false,
            fused_linear: true,
            graphs: true,
            overlap: true,
            matmul_search: true,
            pool: PoolKind::Arena,
            cache_folder: None,
            kernel_images: None,
            library_folders: Vec::new(),
            python_prefixes: Vec::new(),
        }
    }
}

impl DeviceOptions {
    /// Those of this process's environment, read when this is first called.
    ///
    /// # Errors
    /// Naming the variable whose value means nothing, and those that do.
    pub fn of_process() -> Result<&'static Self> {
        static OPTIONS: OnceLock<std::result::Result<DeviceOptions, String>> = OnceLock::new();
        let options = OPTIONS.get_or_init(|| {
            let read = DeviceOptions::from_variables(&|name| std::env::var_os(name));
            read.map_err(|error| error.to_string())
        });
        options.as_ref().map_err(|reason| Error::invalid(reason.clone()))
    }

    /// Those that these variables give; one that is empty counts as not set.
    ///
    /// # Errors
    /// As for [`DeviceOptions::of_process`].
    pub fn from_variables(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self> {
        let read = Variables(variable);
        let usual = DeviceOptions::default();
        let cache = read.path("XDG_CACHE_HOME").map(|folder| folder.join("l2p"));
        let home = || read.path("HOME").map(|folder| folder.join(".cache/l2p"));
        Ok(DeviceOptions {
            portable: read.switch("L2P_PORTABLE", usual.portable)?,
            fused_linear: read.switch("L2P_FUSED_LINEAR", usual.fused_linear)?,
            graphs: read.switch("L2P_GRAPH", usual.graphs)?,
            overlap: read.switch("L2P_OVERLAP", usual.overlap)?,
            matmul_search: read.switch("L2P_GEMM_SEARCH", usual.matmul_search)?,
            pool: read.one_of(
                "L2P_POOL",
                &[("arena", PoolKind::Arena), ("direct", PoolKind::Direct)],
                usual.pool,
            )?,
            cache_folder: read.path("L2P_CACHE_DIR").or(cache).or_else(home),
            kernel_images: read.path("L2P_KERNEL_IMAGES"),
            library_folders: read.paths("L2P_CUDA_LIBRARIES"),
            python_prefixes: read.python_prefixes(),
        })
    }
}

/// Reads single variables.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<OsString>);

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<OsString> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    fn paths(&self, name: &str) -> Vec<PathBuf> {
        let text = self.text(name).unwrap_or_default();
        std::env::split_paths(&text)
            .filter(|path| !path.as_os_str().is_empty())
            .collect()
    }

    fn switch(&self, name: &str, usual: bool) -> Result<bool> {
        self.one_of(name, &[("0", false), ("1", true)], usual)
    }

    fn one_of<T: Copy>(&self, name: &str, choices: &[(&str, T)], usual: T) -> Result<T> {
        let Some(value) = self.text(name) else {
            return Ok(usual);
        };
        let chosen = choices.iter().find(|(word, _)| value == *word);
        chosen.map(|(_, choice)| *choice).ok_or_else(|| {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            Error::invalid(format!(
                "the environment variable {name} is `{}`, which means nothing: set it to {}, or not at all",
                shown_name(&value.to_string_lossy()),
                words.join(" or ")
            ))
        })
    }

    /// The Python environment that is active, then those whose `python3` is in the search path.
    fn python_prefixes(&self) -> Vec<PathBuf> {
        let active = ["VIRTUAL_ENV", "CONDA_PREFIX"]
            .into_iter()
            .filter_map(|name| self.path(name));
        let pythons = self.paths("PATH");
        let pythons = pythons.iter().filter(|folder| folder.join("python3").is_file());
        let prefixes = pythons.filter_map(|folder| Some(folder.parent()?.to_owned()));
        active.chain(prefixes).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<DeviceOptions> {
        DeviceOptions::from_variables(&|name| {
            let found = pairs.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn nothing_set_or_set_to_nothing_is_the_default() {
        assert_eq!(of(&[]).unwrap(), DeviceOptions::default());
        let empty = ["L2P_GRAPH", "L2P_POOL", "L2P_CACHE_DIR", "L2P_KERNEL_IMAGES", "HOME"].map(|name| (name, ""));
        assert_eq!(of(&empty).unwrap(), DeviceOptions::default());
    }

    #[test]
    fn every_variable_has_its_effect() {
        let changed = DeviceOptions {
            portable: true,
            fused_linear: false,
            graphs: false,
            overlap: false,
            matmul_search: false,
            pool: PoolKind::Direct,
            cache_folder: Some("/c".into()),
            kernel_images: Some("k".into()),
            library_folders: vec!["a".into(), "/b".into()],
            python_prefixes: vec!["v".into(), "/conda".into()],
        };
        let all = [
            ("L2P_PORTABLE", "1"),
            ("L2P_FUSED_LINEAR", "0"),
            ("L2P_GRAPH", "0"),
            ("L2P_OVERLAP", "0"),
            ("L2P_GEMM_SEARCH", "0"),
            ("L2P_POOL", "direct"),
            ("L2P_CACHE_DIR", "/c"),
            ("XDG_CACHE_HOME", "/x"),
            ("HOME", "/h"),
            ("L2P_KERNEL_IMAGES", "k"),
            ("L2P_CUDA_LIBRARIES", "a::/b"),
            ("VIRTUAL_ENV", "v"),
            ("CONDA_PREFIX", "/conda"),
        ];
        assert_eq!(of(&all).unwrap(), changed);
        let folder = |pairs: &[(&str, &str)]| of(pairs).unwrap().cache_folder;
        assert_eq!(folder(&all[7..]), Some("/x/l2p".into()));
        assert_eq!(folder(&all[8..]), Some("/h/.cache/l2p".into()));
        let usual = ["1", "1", "1", "1", "arena"];
        let names = [
            "L2P_FUSED_LINEAR",
            "L2P_GRAPH",
            "L2P_OVERLAP",
            "L2P_GEMM_SEARCH",
            "L2P_POOL",
        ];
        let said: Vec<(&str, &str)> = names.into_iter().zip(usual).collect();
        assert_eq!(of(&said).unwrap(), DeviceOptions::default());
    }

    #[test]
    fn values_that_mean_nothing_are_named_with_those_that_do() {
        for (name, value, way_out) in [
            ("L2P_PORTABLE", "yes", "set it to 0 or 1, or not at all"),
            ("L2P_FUSED_LINEAR", "2", "set it to 0 or 1, or not at all"),
            ("L2P_GRAPH", "off", "set it to 0 or 1, or not at all"),
            ("L2P_OVERLAP", "on", "set it to 0 or 1, or not at all"),
            ("L2P_GEMM_SEARCH", " 0", "set it to 0 or 1, or not at all"),
            ("L2P_POOL", "Direct", "set it to arena or direct, or not at all"),
        ] {
            let message = of(&[(name, value)]).unwrap_err().to_string();
            let named = message.starts_with(&format!("the environment variable {name} is `{value}`"));
            assert!(named && message.ends_with(way_out), "{message}");
        }
    }
}
