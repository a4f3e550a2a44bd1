//! Matrix products through cuBLASLt.
//!
//! # Algorithms
//!
//! A plan (descriptors, and the library's own first choice of an algorithm) is made for every exact shape when it is met. For a
//! large product the algorithm is taken from its class of shapes (`class`), where the library says that this shape can run with
//! it. The first product of a class that has no choice yet searches for one (`search`), within a budget that is a share of a
//! step; [`Blas::set_effort`] asks for the thorough search that `l2p-sample warm` makes ahead of time. Choices are kept on disk
//! (`choices`).
//!
//! # What the bits of a product depend on
//!
//! On its operands and its exact shape, on the build and the library's version, on the kind of GPU, and on the algorithm, which
//! decides in which order sums are taken. So the same shape gives the same bits as long as the file of choices holds the same
//! for its class: a later run, in which nothing is searched, repeats the one before. The run that makes a search may choose
//! otherwise than another would have, since timings vary; so may a thorough search that replaces a quick one's choice. With
//! `L2P_GEMM_SEARCH=0` ([`DeviceOptions::matmul_search`]) the library's first choice is taken whatever the file holds, and the bits depend on no file.

mod choices;
mod class;
mod plan;
mod search;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cudarc::cublaslt::{result, sys};

pub use self::class::class_rows;
pub use self::search::Effort;

use self::choices::{Answer, Choices};
use self::plan::{Algorithm, Plan};
use self::search::Trials;
use super::block::Block;
use super::gpu::Gpu;
use super::memory::MemoryTag;
use super::options::DeviceOptions;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::lock::lock;

/// Scratch memory offered to cuBLASLt; what it asks for on Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Algorithms that a search may try.
const CANDIDATES: usize = 24;

/// One matrix product on row-major operands: `D[m, n] = op(A) · op(B) (+ bias[n]) (+ D)`.
///
/// `A` is `[m, k]`, or `[k, m]` when `transpose_a` is set; `B` is `[k, n]`, or `[n, k]` when `transpose_b` is set. The
/// operands are bf16; sums are kept in f32 and rounded once when `D` is bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// The summed extent.
    pub k: usize,
    /// `A` is stored as `[k, m]`.
    pub transpose_a: bool,
    /// `B` is stored as `[n, k]`.
    pub transpose_b: bool,
    /// What the result is stored as: bf16 or f32.
    pub output: DType,
    /// A bf16 vector of `n` elements is added to each row.
    pub bias: bool,
    /// The product is added to what `D` holds.
    pub accumulate: bool,
}

/// Addresses of one product's operands in GPU memory.
#[derive(Clone, Copy, Debug)]
pub struct MatmulOperands {
    /// First element of `A`.
    pub a: u64,
    /// First element of `B`.
    pub b: u64,
    /// First element of the bias; read only when the product has one.
    pub bias: u64,
    /// First element of `D`.
    pub d: u64,
}

/// What searches for algorithms have taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Searched {
    /// Products that were searched for.
    pub products: usize,
    /// The host's time.
    pub time: Duration,
}

/// A cuBLASLt handle with the plans of the products met so far.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Matmul, Plan>>,
    choices: Mutex<Choices>,
    workspace: Mutex<Option<Arc<Block>>>,
    effort: Mutex<Effort>,
    searched: Mutex<Searched>,
}

// SAFETY: cuBLASLt handles may be used from several threads at once.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub(super) fn new(gpu: &str, options: &DeviceOptions) -> Result<Self> {
        let handle = check("cublasLtCreate", result::create_handle())?;
        // SAFETY: the library is loaded; the call has no preconditions.
        let version = unsafe { sys::cublasLtGetVersion() };
        Ok(Blas {
            handle,
            plans: Mutex::default(),
            choices: Mutex::new(Choices::open(gpu, version, options)),
            workspace: Mutex::new(None),
            effort: Mutex::new(Effort::Bounded),
            searched: Mutex::default(),
        })
    }

    /// How thoroughly to search from now on. Plans that exist are made anew where a more thorough search may change them.
    pub fn set_effort(&self, effort: Effort) {
        *lock(&self.effort) = effort;
        lock(&self.plans).clear();
    }

    /// What searches have taken so far.
    pub fn searched(&self) -> Searched {
        *lock(&self.searched)
    }

    /// The file that choices are kept in, where there is a place for it.
    pub fn choices_file(&self) -> Option<PathBuf> {
        lock(&self.choices).path().map(Into::into)
    }

    /// Keeps choices in another file from now on (nowhere with `None`), and forgets those known so far.
    pub fn set_choices_file(&self, path: Option<PathBuf>) {
        lock(&self.choices).move_to(path);
        lock(&self.plans).clear();
    }

    /// Runs `product` on the device's stream. The first large product of its class is run with several algorithms to find the
    /// fastest; see the module's head comment.
    ///
    /// # Errors
    /// When the library has no algorithm for the product or refuses it.
    ///
    /// # Safety
    /// The addresses must belong to bf16 matrices (`D` to one of the product's output type) of the extents that `product`
    /// names, on `device`, and `D` must not be shared with a tensor that somebody reads.
    pub unsafe fn matmul(&self, device: &Arc<Gpu>, product: Matmul, operands: MatmulOperands) -> Result<()> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        device.bind()?;
        let workspace = self.workspace(device)?;
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(product) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut plan = Plan::new(self.handle, product)?;
                // The library loads its kernels when they run first.
                let first_run = || {
                    // SAFETY: by the caller's promise; the workspace has the size that plans are made for.
                    unsafe {
                        self.choose(device, &mut plan, operands, workspace)?;
                        plan.run(device, operands, workspace)
                    }
                };
                device.charged(|beside| &mut beside.library, first_run)?;
                entry.insert(plan);
                return Ok(());
            }
        };
        // SAFETY: as above.
        unsafe { plan.run(device, operands, workspace) }
    }

    /// Gives `plan` the algorithm of its class, after a search where there is none yet.
    ///
    /// # Safety
    /// As for [`Blas::matmul`].
    unsafe fn choose(
        &self,
        device: &Arc<Gpu>,
        plan: &mut Plan,
        operands: MatmulOperands,
        workspace: u64,
    ) -> Result<()> {
        let (product, effort) = (plan.product, *lock(&self.effort));
        let mut choices = lock(&self.choices);
        let valid = |plan: &Plan, data| plan.accepts(&Algorithm { data });
        let mut answer = choices.answer(product, effort, |data| valid(plan, data));
        if answer == Answer::Unknown {
            let start = Instant::now();
            // SAFETY: by the caller's promise.
            let found = unsafe { search(device, plan, operands, workspace, effort)? };
            let mut searched = lock(&self.searched);
            searched.products += 1;
            searched.time += start.elapsed();
            drop(searched);
            choices.keep(product, effort, found.data);
            answer = choices.answer(product, effort, |data| valid(plan, data));
        }
        if let Answer::Chosen(data) = answer {
            plan.algorithm = Algorithm { data };
        }
        Ok(())
    }

    fn workspace(&self, device: &Arc<Gpu>) -> Result<u64> {
        let mut workspace = lock(&self.workspace);
        if let Some(buffer) = &*workspace {
            return Ok(buffer.ptr());
        }
        let _tag = MemoryTag::Workspace.scope();
        let buffer = Block::new(device, WORKSPACE_BYTES)?;
        let address = buffer.ptr();
        *workspace = Some(buffer);
        Ok(address)
    }
}

/// The fastest of the library's algorithms for a plan's product, by running it; the plan's own is left as it was.
///
/// # Safety
/// As for [`Blas::matmul`].
unsafe fn search(
    device: &Arc<Gpu>,
    plan: &mut Plan,
    mut operands: MatmulOperands,
    workspace: u64,
    effort: Effort,
) -> Result<Algorithm> {
    let product = plan.product;
    // A search runs the product often; one that adds to its result must do so elsewhere.
    let _tag = MemoryTag::Workspace.scope();
    let elsewhere = match product.accumulate {
        true => Some(Block::new(device, product.m * product.n * product.output.size())?),
        false => None,
    };
    if let Some(buffer) = &elsewhere {
        buffer.fill(0)?;
        operands.d = buffer.ptr();
    }
    let (first_choice, candidates) = (plan.algorithm, plan.candidates(CANDIDATES)?);
    // What was submitted before is not the search's time.
    device.record_event()?.wait()?;
    let mut trials = OnDevice {
        device,
        plan,
        operands,
        workspace,
        start: Instant::now(),
    };
    let found = search::fastest(&candidates, effort, &mut trials);
    plan.algorithm = first_choice;
    Ok(found.unwrap_or(first_choice))
}

/// Runs of a plan's product, on operands that [`Blas::matmul`]'s caller vouches for; what runs leave in the result is overwritten,
/// or is nobody's.
struct OnDevice<'a> {
    device: &'a Arc<Gpu>,
    plan: &'a mut Plan,
    operands: MatmulOperands,
    workspace: u64,
    start: Instant,
}

impl Trials for OnDevice<'_> {
    type Algorithm = Algorithm;

    fn time(&mut self, algorithm: Algorithm, runs: usize) -> Result<f32> {
        self.plan.algorithm = algorithm;
        let start = self.device.record_event()?;
        for _ in 0..runs {
            // SAFETY: by the promise of this type's head comment.
            unsafe { self.plan.run(self.device, self.operands, self.workspace)? };
        }
        Ok(start.milliseconds_to(&self.device.record_event()?)? / runs as f32)
    }

    fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

fn check<T>(call: &str, outcome: std::result::Result<T, result::CublasError>) -> Result<T> {
    outcome.map_err(|error| Error::Cuda {
        call: call.into(),
        reason: format!("{:?}", error.0),
    })
}
