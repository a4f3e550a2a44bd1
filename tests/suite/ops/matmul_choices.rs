//! Which algorithms matrix products run with: one search for a class of shapes, kept in a file, checked for each shape.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;
use l2p_engine::device::{CudaDevice, Effort, class_rows};
use l2p_engine::ops::linear::{LinearGradients, linear, linear_backward_weight};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cuda(
        "ops::matmul_choices::a_class_is_searched_once",
        a_class_is_searched_once,
    );
    suite.cuda(
        "ops::matmul_choices::bits_repeat_from_the_file",
        bits_repeat_from_the_file,
    );
    suite.cuda("ops::matmul_choices::choices_are_checked", choices_are_checked);
    suite.cuda("ops::matmul_choices::thorough_choices_stay", thorough_choices_stay);
}

const INPUTS: usize = 2048;
const OUTPUTS: usize = 1536;

/// Choices in a file of their own while this lives.
struct OwnFile {
    cuda: Arc<CudaDevice>,
    before: Option<PathBuf>,
    folder: tempfile::TempDir,
}

impl OwnFile {
    fn new(device: &Device) -> std::result::Result<Self, libtest_mimic::Failed> {
        let Device::Cuda(cuda) = device.clone() else {
            return Err("not a GPU".into());
        };
        let own = OwnFile {
            before: cuda.blas()?.choices_file(),
            folder: tempfile::tempdir()?,
            cuda,
        };
        own.open()?;
        Ok(own)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("choices.json")
    }

    /// Reads the file again, as a new process would.
    fn open(&self) -> Result<()> {
        self.cuda.blas()?.set_choices_file(Some(self.path()));
        Ok(())
    }

    /// Products that were searched for during `work`.
    fn searched(&self, work: impl FnOnce() -> Result<()>) -> Result<usize> {
        let before = self.cuda.searched().products;
        work()?;
        Ok(self.cuda.searched().products - before)
    }
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        if let Ok(blas) = self.cuda.blas() {
            blas.set_effort(Effort::Bounded);
            blas.set_choices_file(self.before.take());
        }
    }
}

/// A layer's result for so many rows.
fn layer(device: &Device, rows: usize) -> Result<Tensor> {
    let x = Tensor::from_f32(device, &random_bf16("x", rows * INPUTS), [1, rows, INPUTS])?;
    let weight = Tensor::from_f32(device, &random_bf16("w", OUTPUTS * INPUTS), [OUTPUTS, INPUTS])?;
    linear(&x, &weight, None)
}

fn bits(device: &Device, rows: usize) -> Result<Vec<bf16>> {
    layer(device, rows)?.to_vec::<bf16>()
}

/// As captions of other lengths behind the same picture; the same for a weight's gradient, which sums over the rows.
fn a_class_is_searched_once(device: &Device) -> Outcome {
    let own = OwnFile::new(device)?;
    let members = [4128, 4192, 4608, 4097];
    assert!(members.iter().all(|&rows| class_rows(rows) == 4608));
    for (index, rows) in members.into_iter().enumerate() {
        let searched = own.searched(|| layer(device, rows).map(drop))?;
        assert_eq!(searched, usize::from(index == 0), "{rows} rows");
        expect_like_cpu(&format!("{rows} rows"), device, BF16_TOLERANCE, |device| {
            Ok(vec![layer(device, rows)?])
        })?;
    }
    assert_eq!(own.searched(|| layer(device, 4609).map(drop))?, 1, "another class");
    for (index, rows) in members.into_iter().enumerate() {
        let searched = own.searched(|| {
            let x = Tensor::from_f32(device, &random_bf16("x", rows * INPUTS), [1, rows, INPUTS])?;
            let dy = Tensor::from_f32(device, &random_bf16("dy", rows * OUTPUTS), [1, rows, OUTPUTS])?;
            let mut gradient = Tensor::from_f32(device, &vec![0.0; OUTPUTS * INPUTS], [OUTPUTS, INPUTS])?;
            let wanted = LinearGradients {
                weight: Some(&mut gradient),
                bias: None,
            };
            linear_backward_weight(&dy, &x, wanted)
        })?;
        assert_eq!(searched, usize::from(index == 0), "gradient of {rows} rows");
    }
    Ok(())
}

/// What one process found, the next one uses, whatever shape it meets first.
fn bits_repeat_from_the_file(device: &Device) -> Outcome {
    let own = OwnFile::new(device)?;
    let first = [4192, 4128].map(|rows| bits(device, rows));
    let [first, other] = first;
    let (first, other) = (first?, other?);
    for _ in 0..3 {
        own.open()?;
        let searched = own.searched(|| {
            assert!(bits(device, 4128)? == other, "another shape of the class first");
            assert!(bits(device, 4192)? == first, "the shape that was searched for");
            Ok(())
        })?;
        assert_eq!(searched, 0);
    }
    Ok(())
}

/// Words that are no algorithm, and one for another product, are asked about and left; the result is right all the same.
fn choices_are_checked(device: &Device) -> Outcome {
    let own = OwnFile::new(device)?;
    layer(device, 4192)?;
    let text = std::fs::read_to_string(own.path())?;
    let choices: serde_json::Value = serde_json::from_str(&text)?;
    for words in [[0u64; 8], [u64::MAX; 8], [0x0123_4567_89ab_cdef; 8]] {
        let mut changed = choices.clone();
        let all = changed["choices"].as_object_mut().ok_or("a file holds choices")?;
        assert_eq!(all.len(), 1);
        for choice in all.values_mut() {
            choice["algorithm"] = serde_json::json!(words);
        }
        std::fs::write(own.path(), changed.to_string())?;
        own.open()?;
        let searched = own.searched(|| {
            layer(device, 4192)?;
            Ok(())
        })?;
        assert_eq!(searched, 0, "the library's own choice needs no search");
        expect_like_cpu("with a damaged choice", device, BF16_TOLERANCE, |device| {
            Ok(vec![layer(device, 4192)?])
        })?;
    }
    Ok(())
}

/// A thorough search comes after a quick one, once.
fn thorough_choices_stay(device: &Device) -> Outcome {
    let own = OwnFile::new(device)?;
    let blas = own.cuda.blas()?;
    assert_eq!(own.searched(|| layer(device, 4192).map(drop))?, 1);
    blas.set_effort(Effort::Thorough);
    assert_eq!(own.searched(|| layer(device, 4128).map(drop))?, 1, "more thoroughly");
    assert_eq!(own.searched(|| layer(device, 4608).map(drop))?, 0, "once");
    let kept = is_thorough(&own.path())?;
    blas.set_effort(Effort::Bounded);
    own.open()?;
    assert_eq!(own.searched(|| layer(device, 4097).map(drop))?, 0);
    assert!(kept && is_thorough(&own.path())?);
    Ok(())
}

fn is_thorough(path: &Path) -> std::result::Result<bool, libtest_mimic::Failed> {
    let file: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let choices = file["choices"].as_object().ok_or("a file holds choices")?;
    Ok(choices.values().all(|choice| choice["thorough"] == true))
}
