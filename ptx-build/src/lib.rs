//! Compiles a folder of CUDA C++ sources at build time.
//!
//! Every `*.cu` file becomes one image per [`Target`]: sm_90a machine code for Hopper and compute_80 PTX, which the driver
//! compiles when it is loaded on any other GPU from Ampere on. Images are cached by the hash of everything that went into
//! them (source, the headers it includes, flags, compiler version), so a rebuild compiles only what changed.
//!
//! A build script uses it like this:
//!
//! ```no_run
//! let build = ptx_build::Builder::new("cuda", std::env::var("OUT_DIR").unwrap()).compile().unwrap();
//! for line in build.cargo_lines() {
//!     println!("{line}");
//! }
//! ```

mod cache;
mod includes;
mod report;
mod toolchain;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use report::KernelReport;
pub use toolchain::{Nvcc, SearchLog, find_nvcc};

/// What an image is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Machine code for compute capability 9.0 with the architecture-specific features (wgmma, setmaxnreg).
    Sm90a,
    /// PTX for compute capability 8.0, compiled by the driver of any later GPU when it is loaded.
    Compute80,
}

impl Target {
    /// All targets, in the order in which [`Image::files`] holds them.
    pub const ALL: [Target; 2] = [Target::Sm90a, Target::Compute80];

    /// The suffix of image files and the name used in messages.
    pub fn name(self) -> &'static str {
        match self {
            Target::Sm90a => "sm_90a",
            Target::Compute80 => "compute_80",
        }
    }

    fn gencode(self) -> &'static str {
        match self {
            Target::Sm90a => "-gencode=arch=compute_90a,code=sm_90a",
            Target::Compute80 => "-gencode=arch=compute_80,code=compute_80",
        }
    }
}

/// What every source is compiled with, whatever the target; one flag a line. A file of its own, so that scripts that compile a
/// kernel on the side do it as the build does.
const FLAGS: &str = include_str!("../nvcc-flags");

/// Why a build failed.
#[derive(Debug)]
pub enum Error {
    /// A file could not be read or written.
    Io(PathBuf, std::io::Error),
    /// The compiler rejected a source; holds the source, the target and the compiler's output.
    Compile(PathBuf, Target, String),
    /// A compiler was named explicitly but cannot be used; holds the reason.
    Toolchain(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Error::Compile(path, target, output) => {
                write!(f, "nvcc failed on {} for {}:\n{output}", path.display(), target.name())
            }
            Error::Toolchain(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}

/// One source's compiled images.
#[derive(Debug)]
pub struct Image {
    /// The source's file stem, for example `attention` for `attention.cu`.
    pub name: String,
    /// One fat binary per entry of [`Target::ALL`].
    pub files: [PathBuf; 2],
    /// Registers, shared memory and spills of every kernel in the sm_90a image.
    pub kernels: Vec<KernelReport>,
}

/// The outcome of a build.
#[derive(Debug)]
pub struct Build {
    /// The compiled images in the order of their names; empty when no compiler was found.
    pub images: Vec<Image>,
    /// The compiler used, or `None` when none was found.
    pub nvcc: Option<Nvcc>,
    /// Where a compiler was looked for and what was found there, one entry per place.
    pub search: SearchLog,
    watched: Vec<PathBuf>,
}

/// Configures and runs a build; see the crate's example.
#[derive(Debug)]
pub struct Builder {
    source_dir: PathBuf,
    include_dir: PathBuf,
    out_dir: PathBuf,
    toolchain_dir: Option<PathBuf>,
}

impl Builder {
    /// A build of every `*.cu` directly in `source_dir`, with its images in `out_dir`. Headers are looked up in
    /// `source_dir` too, unless [`Builder::include_dir`] names another folder.
    pub fn new(source_dir: impl Into<PathBuf>, out_dir: impl Into<PathBuf>) -> Self {
        let source_dir = source_dir.into();
        Builder {
            include_dir: source_dir.clone(),
            source_dir,
            out_dir: out_dir.into(),
            toolchain_dir: None,
        }
    }

    /// Looks headers up in `dir` instead of the sources' folder.
    pub fn include_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.include_dir = dir.into();
        self
    }

    /// Also looks for `bin/nvcc` in `dir`, after all the standard places.
    pub fn toolchain_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.toolchain_dir = Some(dir.into());
        self
    }

    /// Compiles what is not cached. Without any compiler the build succeeds with no images.
    ///
    /// # Errors
    /// When a source does not compile, a file cannot be read or written, or `L2P_NVCC` names an unusable compiler.
    pub fn compile(&self) -> Result<Build, Error> {
        let sources = list_sources(&self.source_dir)?;
        let headers = list_headers(&self.include_dir)?;
        let (nvcc, search) = find_nvcc(self.toolchain_dir.as_deref())?;
        let mut watched: Vec<PathBuf> = sources.iter().chain(&headers).cloned().collect();
        watched.extend([self.source_dir.clone(), self.include_dir.clone()]);
        watched.extend(self.toolchain_dir.iter().cloned());
        let images = match &nvcc {
            Some(nvcc) => self.compile_all(nvcc, &sources)?,
            None => Vec::new(),
        };
        Ok(Build {
            images,
            nvcc,
            search,
            watched,
        })
    }

    fn compile_all(&self, nvcc: &Nvcc, sources: &[PathBuf]) -> Result<Vec<Image>, Error> {
        let jobs: Vec<(usize, Target)> = (0..sources.len())
            .flat_map(|index| Target::ALL.map(|target| (index, target)))
            .collect();
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<(usize, Target, Compiled)>> = Mutex::new(Vec::new());
        let failure: Mutex<Option<Error>> = Mutex::new(None);
        let workers = std::thread::available_parallelism()
            .map_or(1, |n| n.get())
            .min(jobs.len().max(1));
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(&(index, target)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        match self.compile_one(nvcc, &sources[index], target) {
                            Ok(compiled) => done.lock().unwrap().push((index, target, compiled)),
                            Err(error) => {
                                failure.lock().unwrap().get_or_insert(error);
                                return;
                            }
                        }
                    }
                });
            }
        });
        if let Some(error) = failure.into_inner().unwrap() {
            return Err(error);
        }
        let mut done = done.into_inner().unwrap();
        done.sort_by_key(|(index, target, _)| (*index, *target as usize));
        let mut done = done.into_iter();
        Ok(sources
            .iter()
            .map(|source| {
                let (_, _, machine) = done.next().expect("one machine-code image per source");
                let (_, _, portable) = done.next().expect("one PTX image per source");
                Image {
                    name: stem(source),
                    files: [machine.file, portable.file],
                    kernels: machine.kernels,
                }
            })
            .collect())
    }

    fn compile_one(&self, nvcc: &Nvcc, source: &Path, target: Target) -> Result<Compiled, Error> {
        let flags: Vec<&str> = FLAGS.lines().chain([target.gencode()]).collect();
        let files = includes::reached_from(source, &self.include_dir)?;
        let key = cache::key(&files, &flags, &nvcc.version)?;
        let base = self.out_dir.join(format!("{}.{}", stem(source), target.name()));
        let file = base.with_extension(format!("{}.{key:016x}.fatbin", target.name()));
        let log = file.with_extension("log");
        if !(file.exists() && log.exists()) {
            cache::remove_stale(&self.out_dir, &format!("{}.{}.", stem(source), target.name()))?;
            let partial = file.with_extension("partial");
            let output = Command::new(&nvcc.path)
                .args(&flags)
                .arg("-I")
                .arg(&self.include_dir)
                .arg("-o")
                .arg(&partial)
                .arg(source)
                .output()
                .map_err(|error| Error::Io(nvcc.path.clone(), error))?;
            let text = format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
            if !output.status.success() {
                return Err(Error::Compile(source.to_path_buf(), target, text));
            }
            std::fs::write(&log, &text).map_err(|error| Error::Io(log.clone(), error))?;
            std::fs::rename(&partial, &file).map_err(|error| Error::Io(file.clone(), error))?;
        }
        let text = std::fs::read_to_string(&log).map_err(|error| Error::Io(log, error))?;
        Ok(Compiled {
            file,
            kernels: report::parse(&text),
        })
    }
}

struct Compiled {
    file: PathBuf,
    kernels: Vec<KernelReport>,
}

impl Build {
    /// The lines a build script prints: what to watch, a warning for every kernel that spills registers, and, when
    /// `L2P_KERNEL_REPORT` is set, each kernel's resources.
    pub fn cargo_lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = ["L2P_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "L2P_KERNEL_REPORT"]
            .map(|name| format!("cargo::rerun-if-env-changed={name}"))
            .into();
        lines.extend(
            self.watched
                .iter()
                .map(|path| format!("cargo::rerun-if-changed={}", path.display())),
        );
        if self.nvcc.is_none() {
            lines.push(format!(
                "cargo::warning=no CUDA compiler found, building for the CPU only ({})",
                self.search
            ));
        }
        let report_all = std::env::var_os("L2P_KERNEL_REPORT").is_some();
        for image in &self.images {
            for kernel in image.kernels.iter().filter(|kernel| report_all || kernel.spills()) {
                lines.push(format!("cargo::warning={}.cu: {kernel}", image.name));
            }
        }
        lines
    }
}

fn stem(source: &Path) -> String {
    source
        .file_stem()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The sources directly in `dir`, sorted by path.
fn list_sources(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut sources: Vec<PathBuf> = list_folder(dir)?
        .into_iter()
        .filter(|path| has_extension(path, &["cu"]) && !path.is_dir())
        .collect();
    sources.sort();
    Ok(sources)
}

/// The headers anywhere below `dir`, sorted by path.
fn list_headers(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let (mut headers, mut folders) = (Vec::new(), vec![dir.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for path in list_folder(&folder)? {
            if path.is_dir() {
                folders.push(path);
            } else if has_extension(&path, &["cuh", "h"]) {
                headers.push(path);
            }
        }
    }
    headers.sort();
    Ok(headers)
}

fn list_folder(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |error| Error::Io(dir.to_path_buf(), error);
    std::fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| Ok(entry.map_err(failed)?.path()))
        .collect()
}

fn has_extension(path: &Path, wanted: &[&str]) -> bool {
    path.extension()
        .and_then(|extension| extension.to_str())
        .is_some_and(|extension| wanted.contains(&extension))
}
