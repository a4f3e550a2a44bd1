//! Checks a component of a model against reference outputs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use l2p_bench::parity::{Component, Outcome, Steps, Training, check, check_gradients};
use l2p_bench::timing::median;
use l2p_engine::device::format_bytes;
use l2p_engine::model::Precision;
use l2p_engine::train::{Policy, Recompute};
use l2p_engine::{Device, DeviceChoice};
use serde_json::json;

const HELP: &str = "\
The reference file is a safetensors file with f32 tensors:
  dit   x [B, C, H, W], t [B] = 1 - sigma (FLUX.2: sigma), cap.0, cap.1, .. [tokens, width]; expected v, the velocity (noise - image)
  head  x [B, 3, H, W], c [B, dim, h, w]; expected v
  text  input_ids [L]; expected hidden [L, width]
  vae   latent [B, C, h, w]; expected image [B, 3, 8h, 8w]
  grad  what dit takes and target [B, C, H, W], which v should be; expected loss [1] = mean((v - target)^2) and grad.NAME for
        each tensor NAME that --train trains; with --write both may be absent

Examples:
  bench-parity dit --model l2p_1k.safetensors --io reference.safetensors --device cuda
  bench-parity grad --model l2p_1k.safetensors --io reference.safetensors --train released --steps 10 --json

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
    /// grad: what is trained: paper, released, full, head-only, or patterns of names, as l2p-train takes it
    #[arg(long, value_name = "POLICY", required_if_eq("component", "grad"))]
    train: Option<Policy>,
    /// grad: blocks that keep only their input: none, frozen or all
    #[arg(long, value_name = "BLOCKS", default_value = "all")]
    recompute: Recompute,
    /// grad: optimizer steps on the same batch after the comparison; frozen tensors must keep their bits
    #[arg(long, value_name = "N", default_value_t = 0)]
    steps: usize,
    /// grad: the learning rate of these steps
    #[arg(long, value_name = "RATE", default_value_t = 5e-5)]
    learning_rate: f32,
    /// grad: write loss and gradients to this file
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// dit, text: how the weights of the blocks are kept: bf16 (the compute type), int8 or fp8
    #[arg(long, value_name = "TYPE", default_value_t = Precision::default())]
    weights: Precision,
    /// The largest relative difference that passes [default: 1e-4 on the CPU, 3e-2 on CUDA; grad 5e-2]
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
    Grad,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    l2p_bins::run(|| run(&arguments))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let device = Device::open(arguments.device)?;
    let grad = matches!(arguments.component, ComponentName::Grad);
    let tolerance = arguments.tolerance.unwrap_or(match device {
        Device::Cpu => 1e-4,
        Device::Cuda(_) if grad => 5e-2,
        Device::Cuda(_) => 3e-2,
    });
    let (outcome, steps) = measured(arguments, &device)?;
    let worst = outcome.outputs.iter().map(|output| output.error).fold(0.0, f64::max);
    let changed = steps.as_ref().map_or(0, |steps| steps.frozen_changed.len());
    let pass = worst <= tolerance && changed == 0;
    if arguments.json {
        let mut record = serde_json::to_value(&outcome)?;
        record["component"] = json!(format!("{:?}", arguments.component).to_lowercase());
        record["device"] = json!(device.to_string());
        record["tolerance"] = json!(tolerance);
        record["median_ms"] = json!(median(&outcome.samples_ms));
        if let Some(steps) = &steps {
            record["steps"] = json!(steps);
        }
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
        if let Some(steps) = steps.as_ref().filter(|steps| !steps.losses.is_empty()) {
            l2p_bins::print(&format!(
                "losses {:?}\n{} of {} frozen tensors have changed\n",
                steps.losses, changed, steps.frozen_tensors
            ))?;
        }
        let time = match arguments.repeats {
            0 => String::new(),
            _ => format!(", {:.3} ms", median(&outcome.samples_ms)),
        };
        l2p_bins::print(&format!("peak {}{time}\n", format_bytes(outcome.peak_bytes)))?;
    }
    match pass {
        true => Ok(()),
        false if changed > 0 => anyhow::bail!("{changed} frozen tensors have changed"),
        false => anyhow::bail!("the relative difference {worst:.3e} is above the tolerance {tolerance:.1e}"),
    }
}

fn measured(arguments: &Arguments, device: &Device) -> anyhow::Result<(Outcome, Option<Steps>)> {
    let Arguments {
        model,
        io,
        repeats,
        weights,
        ..
    } = arguments;
    let component = match arguments.component {
        ComponentName::Dit => Component::Dit,
        ComponentName::Head => Component::Head,
        ComponentName::Text => Component::Text,
        ComponentName::Vae => Component::Vae,
        ComponentName::Grad => {
            let training = Training {
                policy: arguments.train.clone().context("--train is missing")?,
                recompute: arguments.recompute,
                trunk: weights.clone(),
                steps: arguments.steps,
                learning_rate: arguments.learning_rate,
                write: arguments.write.clone(),
            };
            let (outcome, steps) = check_gradients(model, io, device, &training, *repeats)?;
            return Ok((outcome, Some(steps)));
        }
    };
    anyhow::ensure!(
        arguments.train.is_none() && arguments.steps == 0 && arguments.write.is_none(),
        "--train, --steps and --write are for grad alone"
    );
    Ok((check(component, model, weights, io, device, *repeats)?, None))
}
