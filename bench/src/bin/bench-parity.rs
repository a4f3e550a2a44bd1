//! Checks a component of a model against reference outputs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use l2p_bench::parity::{Component, check};
use l2p_bench::timing::median;
use l2p_engine::device::format_bytes;
use l2p_engine::{Device, DeviceChoice};
use serde_json::json;

const HELP: &str = "\
The reference file is a safetensors file with f32 tensors:
  dit   x [B, C, H, W], t [B] = 1 - sigma, cap.0, cap.1, .. [tokens, width]; expected v, the velocity (noise - image)
  head  x [B, 3, H, W], c [B, dim, h, w]; expected v
  text  input_ids [L]; expected hidden [L, width]
  vae   latent [B, C, h, w]; expected image [B, 3, 8h, 8w]

Example:
  bench-parity dit --model l2p_1k.safetensors --io reference.safetensors --device cuda

Exit code: 0 within the tolerance, 1 beyond it or on an error.";

/// Compares a component's output with a reference: the relative and the largest absolute difference.
#[derive(Parser)]
#[command(name = "bench-parity", version, after_help = HELP)]
struct Arguments {
    /// What to run
    component: ComponentName,
    /// The model: anything that l2p-sample takes; for `head` a file with local_decoder.* tensors will do
    #[arg(long, value_name = "DIR|FILE")]
    model: PathBuf,
    /// Inputs and expected outputs
    #[arg(long, value_name = "FILE")]
    io: PathBuf,
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// The largest relative difference that passes [default: 1e-4 on the CPU, 3e-2 on CUDA]
    #[arg(long, value_name = "R")]
    tolerance: Option<f64>,
    /// Timed runs after the comparison
    #[arg(long, value_name = "N", default_value_t = 0)]
    repeats: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum ComponentName {
    Dit,
    Head,
    Text,
    Vae,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    l2p_bins::run(|| run(&arguments))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let component = match arguments.component {
        ComponentName::Dit => Component::Dit,
        ComponentName::Head => Component::Head,
        ComponentName::Text => Component::Text,
        ComponentName::Vae => Component::Vae,
    };
    let device = Device::open(arguments.device)?;
    let tolerance = arguments.tolerance.unwrap_or(match device {
        Device::Cpu => 1e-4,
        Device::Cuda(_) => 3e-2,
    });
    let outcome = check(component, &arguments.model, &arguments.io, &device, arguments.repeats)?;
    let worst = outcome.outputs.iter().map(|output| output.error).fold(0.0, f64::max);
    let pass = worst <= tolerance;
    if arguments.json {
        let mut record = serde_json::to_value(&outcome)?;
        record["component"] = json!(format!("{component:?}").to_lowercase());
        record["device"] = json!(device.to_string());
        record["tolerance"] = json!(tolerance);
        record["median_ms"] = json!(median(&outcome.samples_ms));
        record["pass"] = json!(pass);
        l2p_bins::print(&format!("{}\n", serde_json::to_string_pretty(&record)?))?;
    } else {
        for output in &outcome.outputs {
            let line = format!(
                "{:<8} {:?}  relative {:.3e}  largest {:.3e}\n",
                output.name, output.shape, output.error, output.max_abs
            );
            l2p_bins::print(&line)?;
        }
        let time = match arguments.repeats {
            0 => String::new(),
            _ => format!(", {:.3} ms", median(&outcome.samples_ms)),
        };
        l2p_bins::print(&format!("peak {}{time}\n", format_bytes(outcome.peak_bytes)))?;
    }
    match pass {
        true => Ok(()),
        false => anyhow::bail!("the relative difference {worst:.3e} is above the tolerance {tolerance:.1e}"),
    }
}
