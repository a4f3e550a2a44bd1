//! What the tests share: registration, deterministic data, comparison.

pub mod cli;
mod compare;
pub mod fixtures;

pub use compare::{Tolerance, expect_close, expect_sample_close, relative_error};

use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use l2p_engine::{Device, DeviceChoice, Result, Tensor};
use libtest_mimic::{Failed, Trial};

/// What a test returns; any error fails it.
pub type Outcome = std::result::Result<(), Failed>;

/// Collects tests for the runner.
#[derive(Default)]
pub struct Suite {
    /// The tests so far.
    pub trials: Vec<Trial>,
}

impl Suite {
    /// Adds a test that needs no GPU.
    pub fn cpu(&mut self, name: &str, test: fn() -> Outcome) {
        self.trials.push(Trial::test(name, test));
    }

    /// Adds a test that needs a program which may be installed or not: it counts as ignored where it is not.
    pub fn with_program(&mut self, program: &str, name: &str, test: fn() -> Outcome) {
        let trial = Trial::test(name, test).with_kind(program);
        self.trials.push(trial.with_ignored_flag(!cli::is_installed(program)));
    }

    /// Adds a test that needs a GPU: it runs where there is one and counts as ignored elsewhere. GPU tests run one at a
    /// time, with new buffers poisoned.
    pub fn cuda(&mut self, name: &str, test: fn(&Device) -> Outcome) {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let run = move || {
            let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let device = gpu().as_ref().map_err(|reason| Failed::from(reason.as_str()))?;
            test(device)?;
            device.synchronize().map_err(Failed::from)
        };
        self.trials.push(
            Trial::test(name, run)
                .with_kind("cuda")
                .with_ignored_flag(gpu().is_err()),
        );
    }
}

/// The first GPU, or why it cannot be used.
pub fn gpu() -> &'static std::result::Result<Device, String> {
    static GPU: OnceLock<std::result::Result<Device, String>> = OnceLock::new();
    GPU.get_or_init(|| Device::open(DeviceChoice::Cuda(0)).map_err(|error| error.to_string()))
}

/// The folder of the models that come with the source tree: `L2P_MODELS`, or the one in the source tree.
pub fn models_folder() -> PathBuf {
    match std::env::var_os("L2P_MODELS") {
        Some(folder) => folder.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models"),
    }
}

/// Deterministic numbers in [-1, 1): the generator that the fixture scripts use, see `fixtures/README.md`.
pub fn hash_uniform(name: &str, count: usize) -> Vec<f32> {
    hash_uniform_seeded(name, 0, count)
}

/// As [`hash_uniform`], with a seed.
pub fn hash_uniform_seeded(name: &str, seed: u64, count: usize) -> Vec<f32> {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    }) ^ seed;
    (1..=count as u64)
        .map(|index| {
            let mut z = hash.wrapping_add(index.wrapping_mul(STEP));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            (z >> 40) as f32 * 2.0f32.powi(-23) - 1.0
        })
        .collect()
}

/// Deterministic numbers of about unit variance.
pub fn random(name: &str, count: usize) -> Vec<f32> {
    hash_uniform(name, count)
        .into_iter()
        .map(|value| value * 3f32.sqrt())
        .collect()
}

/// Numbers rounded to bf16, so that CPU and CUDA start from the same values.
pub fn random_bf16(name: &str, count: usize) -> Vec<f32> {
    random(name, count)
        .into_iter()
        .map(|value| half::bf16::from_f32(value).to_f32())
        .collect()
}

/// The largest relative error of one bf16 operation against the same in f32, from the same inputs: the rounding of its
/// result and of what it keeps in bf16 on the way.
pub const BF16_TOLERANCE: f64 = 4e-3;

/// The largest relative error of one f32 operation against a reference in higher precision.
pub const F32_TOLERANCE: f64 = 1e-5;

/// What `work` gives while new buffers hold NaNs, so that an element that nobody writes shows. One caller at a time.
pub fn with_poisoned_buffers<T>(work: impl FnOnce() -> T) -> T {
    struct Poison;

    impl Drop for Poison {
        fn drop(&mut self) {
            l2p_engine::device::set_poison_new_buffers(false);
        }
    }

    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let _poison = Poison;
    l2p_engine::device::set_poison_new_buffers(true);
    work()
}

/// Fails unless `op` gives on `device` what it gives on the CPU, from the same inputs (given in bf16-representable f32).
///
/// # Errors
/// Naming `what` and the error found.
pub fn expect_like_cpu(
    what: &str,
    device: &Device,
    tolerance: impl Into<Tolerance>,
    op: impl Fn(&Device) -> Result<Vec<Tensor>>,
) -> Outcome {
    let tolerance = tolerance.into();
    let expected = op(&Device::Cpu)?;
    let found = with_poisoned_buffers(|| op(device));
    for (index, (found, expected)) in found?.iter().zip(&expected).enumerate() {
        if found.shape() != expected.shape() {
            return Err(format!(
                "{what}: output {index} has shape {}, on the CPU {}",
                found.shape(),
                expected.shape()
            )
            .into());
        }
        expect_close(
            &format!("{what}, output {index}"),
            &found.to_vec_f32()?,
            &expected.to_vec_f32()?,
            expected.shape(),
            tolerance,
        )?;
    }
    Ok(())
}
