//! The fastest algorithm of each large product, found by trying and kept on disk.
//!
//! The library's own model of its algorithms is good but not perfect: at the transformer's shapes its first choice is up to
//! several percent behind its best. Candidates are timed round robin, so that all of them meet the same clocks; a choice is
//! kept in `gemm-<gpu>-<library version>.json` under `L2P_CACHE_DIR`, `$XDG_CACHE_HOME/l2p` or `~/.cache/l2p`, and used by
//! every later process, so that results repeat bit for bit. `L2P_GEMM_SEARCH=0` turns the search off and leaves the
//! library's first choice, also where another is on disk.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::cublaslt::sys;
use serde::{Deserialize, Serialize};

use super::plan::{Algorithm, Plan};
use super::{Matmul, MatmulOperands};
use crate::device::CudaBuffer;
use crate::device::cuda::CudaDevice;
use crate::device::memory::MemoryTag;
use crate::error::Result;

/// Multiply-adds below which a search would take longer than it saves.
const SMALLEST_PRODUCT: f64 = 2e9;
/// Algorithms that are tried.
const CANDIDATES: usize = 24;
/// Of these, how many are timed closely after a first look.
const FINALISTS: usize = 6;
/// Runs per turn, and turns of the finalists.
const RUNS: usize = 4;
const TURNS: usize = 5;

/// The choices for one GPU and one version of the library.
pub(super) struct AlgorithmCache {
    enabled: bool,
    path: Option<PathBuf>,
    known: File,
}

/// The file's content.
#[derive(Default, Serialize, Deserialize)]
struct File {
    /// The algorithm's words by product.
    algorithms: BTreeMap<String, [u64; 8]>,
}

impl AlgorithmCache {
    /// The cache for this kind of GPU. A file that cannot be read counts as empty.
    pub fn open(gpu: &str) -> Self {
        let enabled = !std::env::var("L2P_GEMM_SEARCH").is_ok_and(|value| value == "0");
        // SAFETY: the library is loaded; the call has no preconditions.
        let version = unsafe { sys::cublasLtGetVersion() };
        let gpu: String = gpu
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let path = folder().map(|folder| folder.join(format!("gemm-{gpu}-{version}.json")));
        let read = || serde_json::from_slice(&std::fs::read(path.as_ref()?).ok()?).ok();
        let known = read().unwrap_or_default();
        AlgorithmCache { enabled, path, known }
    }

    /// Gives `plan` the fastest algorithm: the one on disk, or the winner of a search, which runs the product many times.
    ///
    /// # Safety
    /// As for [`super::Blas::matmul`].
    pub unsafe fn choose(
        &mut self,
        device: &Arc<CudaDevice>,
        plan: &mut Plan,
        operands: MatmulOperands,
        workspace: u64,
    ) -> Result<()> {
        let product = plan.product;
        if !self.enabled || product.m as f64 * product.n as f64 * (product.k as f64) < SMALLEST_PRODUCT {
            return Ok(());
        }
        if let Some(&data) = self.known.algorithms.get(&key(&product)) {
            plan.algorithm = Algorithm { data };
            return Ok(());
        }
        // A search runs the product often; one that adds to its result must do so elsewhere.
        let _tag = MemoryTag::Workspace.scope();
        let mut elsewhere = match product.accumulate {
            true => Some(CudaBuffer::new(device, product.m * product.n * product.output.size())?),
            false => None,
        };
        let mut tried = operands;
        if let Some(buffer) = &mut elsewhere {
            buffer.fill_zero()?;
            tried.d = buffer.ptr();
        }
        // SAFETY: by the caller's promise; where the result goes elsewhere, there is room for it.
        plan.algorithm = unsafe { search(device, plan, tried, workspace)? };
        self.known.algorithms.insert(key(&product), plan.algorithm.data);
        if let Err(error) = self.save() {
            tracing::warn!("the choice of matrix algorithms could not be kept on disk: {error}");
        }
        Ok(())
    }

    fn save(&self) -> std::io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let folder = path.parent().unwrap_or(std::path::Path::new("."));
        std::fs::create_dir_all(folder)?;
        let temporary = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&temporary, &self.known)?;
        temporary.persist(path)?;
        Ok(())
    }
}

fn folder() -> Option<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("L2P_CACHE_DIR")
        .or_else(|| variable("XDG_CACHE_HOME").map(|folder| folder.join("l2p")))
        .or_else(|| variable("HOME").map(|folder| folder.join(".cache/l2p")))
}

fn key(product: &Matmul) -> String {
    let Matmul {
        m,
        n,
        k,
        transpose_a,
        transpose_b,
        output,
        bias,
        accumulate,
    } = product;
    let flag = |set: bool, letter: &'static str| if set { letter } else { "" };
    format!(
        "{m}x{n}x{k}-{}{}-{output}{}{}",
        if *transpose_a { "T" } else { "N" },
        if *transpose_b { "T" } else { "N" },
        flag(*bias, "-bias"),
        flag(*accumulate, "-accumulate")
    )
}

/// The fastest of the library's candidates.
///
/// # Safety
/// As for [`super::Blas::matmul`].
unsafe fn search(
    device: &Arc<CudaDevice>,
    plan: &mut Plan,
    operands: MatmulOperands,
    workspace: u64,
) -> Result<Algorithm> {
    let first_choice = plan.algorithm;
    let candidates = plan.candidates(CANDIDATES)?;
    let mut time = |algorithm: Algorithm, runs: usize| -> Result<f32> {
        plan.algorithm = algorithm;
        let start = device.record_event()?;
        for _ in 0..runs {
            // SAFETY: by the caller's promise; what runs leave in the result is overwritten, or is nobody's.
            unsafe { plan.run(device, operands, workspace)? };
        }
        start.milliseconds_to(&device.record_event()?)
    };
    // A candidate that turns out not to run is passed over; its first run loads it and does not count.
    let look = |algorithm| {
        time(algorithm, 1)
            .and_then(|_| time(algorithm, RUNS))
            .ok()
            .map(|time| (time, algorithm))
    };
    let mut finalists: Vec<(f32, Algorithm)> = candidates.into_iter().filter_map(look).collect();
    finalists.sort_by(|a, b| a.0.total_cmp(&b.0));
    finalists.truncate(FINALISTS);
    let mut samples = vec![Vec::with_capacity(TURNS); finalists.len()];
    for _ in 0..TURNS {
        for (samples, (_, algorithm)) in samples.iter_mut().zip(&finalists) {
            samples.push(time(*algorithm, RUNS)?);
        }
    }
    let median = |samples: &mut Vec<f32>| {
        samples.sort_by(f32::total_cmp);
        samples[samples.len() / 2]
    };
    let timed = samples.iter_mut().map(median).zip(&finalists);
    let best = timed.min_by(|a, b| a.0.total_cmp(&b.0));
    Ok(best.map_or(first_choice, |(_, (_, algorithm))| *algorithm))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn products_have_keys_of_their_own() {
        let product = Matmul {
            m: 4192,
            n: 11520,
            k: 3840,
            transpose_a: false,
            transpose_b: true,
            output: DType::Bf16,
            bias: false,
            accumulate: false,
        };
        assert_eq!(key(&product), "4192x11520x3840-NT-bf16");
        assert_eq!(
            key(&Matmul {
                bias: true,
                transpose_a: true,
                ..product
            }),
            "4192x11520x3840-TT-bf16-bias"
        );
    }

    #[test]
    fn choices_come_back_from_their_file() {
        let file = File {
            algorithms: [("a".to_owned(), [1, 2, 3, 4, 5, 6, 7, u64::MAX])].into(),
        };
        let text = serde_json::to_string(&file).unwrap();
        let read: File = serde_json::from_str(&text).unwrap();
        assert_eq!(read.algorithms, file.algorithms);
    }
}
