//! What a measurement was made on and when.

use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use l2p_engine::Device;
use serde::{Deserialize, Serialize};

/// Device, driver, commit and date of a record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// The GPU's name as the vendor gives it; `cpu` without one.
    pub gpu: String,
    /// The driver's version; `none` without a GPU, `unknown` where the system does not tell.
    pub driver: String,
    /// The commit that was built; `unknown` where nothing tells.
    pub commit: String,
    /// RFC 3339, in UTC.
    pub date: String,
}

impl Environment {
    /// That of this moment.
    pub fn of(device: &Device) -> Self {
        let (gpu, driver) = match device {
            Device::Cpu => ("cpu".to_owned(), "none".to_owned()),
            Device::Cuda(device) => (device.name().to_owned(), driver().unwrap_or_else(|| "unknown".into())),
        };
        Environment {
            gpu,
            driver,
            commit: commit().unwrap_or_else(|| "unknown".into()),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        }
    }

    /// The folder for records of this GPU; see [`folder_of`].
    pub fn folder(&self) -> String {
        folder_of(&self.gpu)
    }
}

/// A GPU's name as a folder: the word of its name with a digit in it, `h200` for `NVIDIA H200`; all words where none has.
pub fn folder_of(gpu: &str) -> String {
    let lower = gpu.to_lowercase();
    let words: Vec<&str> = lower
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    let model = words.iter().find(|word| word.contains(|c: char| c.is_ascii_digit()));
    match model {
        Some(word) => (*word).to_owned(),
        None => words.join("-"),
    }
}

/// The driver's version, from the kernel module or else from nvidia-smi.
fn driver() -> Option<String> {
    let first_line = |text: String| {
        text.lines()
            .next()
            .map(|line| line.trim().to_owned())
            .filter(|line| !line.is_empty())
    };
    if let Some(version) = std::fs::read_to_string("/sys/module/nvidia/version")
        .ok()
        .and_then(first_line)
    {
        return Some(version);
    }
    let query = ["--query-gpu=driver_version", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output().ok()?;
    output
        .status
        .success()
        .then(|| first_line(String::from_utf8_lossy(&output.stdout).into_owned()))?
}

/// The commit that this program was built from: `L2P_COMMIT`, the file `commit` of a bundle, or the checkout's HEAD.
fn commit() -> Option<String> {
    let given = std::env::var("L2P_COMMIT").ok().filter(|commit| !commit.is_empty());
    given.or_else(bundled_commit).or_else(|| {
        let output = Command::new("git").args(["rev-parse", "HEAD"]).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        (output.status.success() && !text.is_empty()).then_some(text)
    })
}

fn bundled_commit() -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let file = program.parent().and_then(Path::parent)?.join("commit");
    let text = std::fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_short_names_of_gpus() {
        for (gpu, folder) in [
            ("NVIDIA H200", "h200"),
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA A100-SXM4-40GB", "a100"),
            ("NVIDIA GeForce RTX 4090", "4090"),
            ("cpu", "cpu"),
            ("Tesla", "tesla"),
        ] {
            assert_eq!(folder_of(gpu), folder);
        }
    }

    #[test]
    fn a_record_says_where_it_comes_from() {
        let found = Environment::of(&Device::Cpu);
        assert_eq!((found.gpu.as_str(), found.driver.as_str()), ("cpu", "none"));
        assert!(found.date.ends_with('Z') && found.date.len() == 20, "{}", found.date);
        assert!(!found.commit.is_empty());
    }
}
