//! `bench-head`: the Detailer Heads, whole and operation by operation.

use clap::{Parser, ValueEnum};
use l2p_engine::model::detailer::Detailer;
use l2p_engine::model::zimage::HEAD_PREFIX;
use l2p_engine::profile::{OpTime, measure};
use l2p_engine::{Device, Result, Tensor};
use serde_json::{Value, json};

use crate::arguments::{COLUMNS, Common};
use crate::check::relative_error;
use crate::inputs::random;
use crate::params::RandomParams;
use crate::published;
use crate::record::{milliseconds, percent};
use crate::runner::{Bench, Case};

const HELP: &str = "\
Examples:
  bench-head                     the heads for 1K and 4K at their published sizes
  bench-head --peer              beside PyTorch, eager and compiled
  bench-head --heads 8k          the head for 8192 x 8192
  bench-head --tiny --device cpu

The reference is the same head on the CPU in f32, on a corner of the image that is large enough for the pixels compared.
Operations of a head are timed one by one in a run of their own, between events.";

/// Times Detailer Heads with random weights; checks them against the CPU.
#[derive(Parser, Debug)]
#[command(name = "bench-head", version, after_help = HELP, after_long_help = format!("{HELP}\n\n{COLUMNS}"))]
pub struct Arguments {
    /// Which heads
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_enum, default_values_t = [Head::OneK, Head::FourK])]
    heads: Vec<Head>,
    /// Side of the image, a multiple of the head's patch [default: 64 patches]
    #[arg(long, value_name = "PIXELS")]
    side: Option<usize>,
    /// Narrow heads on small images
    #[arg(long)]
    tiny: bool,
    #[command(flatten)]
    common: Common,
}

/// The published heads whose feature map has one pixel for each pixel of their bottleneck.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// Patch 16
    #[value(name = "1k")]
    OneK,
    /// Patch 64
    #[value(name = "4k")]
    FourK,
    /// Patch 128
    #[value(name = "8k")]
    EightK,
}

impl Head {
    fn patch(self) -> usize {
        match self {
            Head::OneK => 16,
            Head::FourK => 64,
            Head::EightK => 128,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Head::OneK => "1k",
            Head::FourK => "4k",
            Head::EightK => "8k",
        }
    }
}

/// Runs the benchmark.
///
/// # Errors
/// When a case cannot be run or its result is wrong.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut bench = Bench::start("head", &arguments.common, "head.py")?;
    for &head in &arguments.heads {
        run_head(&mut bench, head, arguments)?;
    }
    bench.finish()
}

fn run_head(bench: &mut Bench, head: Head, arguments: &Arguments) -> anyhow::Result<()> {
    let name = format!("head-{}", head.label());
    if !bench.may_want(&name) {
        return Ok(());
    }
    let (patch, tiny) = (head.patch(), arguments.tiny);
    let side = arguments.side.unwrap_or(patch * if tiny { 4 } else { 64 });
    anyhow::ensure!(
        side > 0 && side.is_multiple_of(patch),
        "--side {side} is no multiple of {name}'s patch of {patch}"
    );
    let context = published::transformer(l2p_engine::model::config::ModelKind::Pixel, patch, tiny).dim;
    let layout = published::head(patch, context, tiny)?;
    let cells = side / patch;
    // Per pixel of the bottleneck, about 300 MFLOP in the published heads.
    let flops = if tiny { 0.0 } else { 3e8 * (cells * cells) as f64 };
    bench.ensure_feasible(&name, flops, "give --tiny, or a smaller --side")?;

    let (device, seed) = (bench.device.clone(), bench.common.seed);
    let params = RandomParams::new(seed, layout.tensors(HEAD_PREFIX));
    let module = Detailer::load(&params, &device, HEAD_PREFIX)?;
    let (image, features) = ([1, side, side, 3], [1, cells, cells, context]);
    let bytes = (image.iter().product::<usize>() + features.iter().product::<usize>()) * device.compute_dtype().size();
    let sets = bench.sets(bytes);
    let inputs = (0..sets as u64)
        .map(|set| {
            Ok((
                random(&device, image, seed, 2 * set)?,
                random(&device, features, seed, 2 * set + 1)?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let corner = Corner::new(patch, layout.reduction(), side);
    let mut call = |set: usize| Ok(vec![module.forward(&inputs[set].0, &inputs[set].1)?]);
    let sizes = json!({ "head": head.label(), "side": side, "context": context, "tiny": tiny, "sets": sets });
    let row = bench.measure(Case {
        name: name.clone(),
        inputs: sizes.clone(),
        sets,
        call: &mut call,
        check: &mut |results| {
            let reference = Detailer::load(&params, &Device::Cpu, HEAD_PREFIX)?;
            let (x, c) = (corner.of_image(&inputs[0].0)?, corner.of_features(&inputs[0].1)?);
            let expected = corner.compared_of(&reference.forward(&x, &c)?)?;
            Ok(relative_error(&corner.compared_of(&results[0])?, &expected))
        },
        tolerance: 3e-2,
        peer: Some(sizes),
    })?;
    let Some(mut row) = row else { return Ok(()) };

    // A run before keeps the device busy while this one is submitted.
    let (x, c) = &inputs[0];
    drop(module.forward(x, c)?);
    let (_, profile) = measure(&device, || module.forward(x, c).map(drop))?;
    let stages = profile.ops.iter().map(|op| stage(bench, op));
    row.details.insert("stages".into(), stages.collect());
    row.details.insert("stages_ms".into(), json!(profile.milliseconds));
    bench.add(row)?;
    for op in &profile.ops {
        bench.say(&format!(
            "  {:<20}{:<24}{:>10}{:>9} of its ceiling",
            op.name,
            op.shape.to_string(),
            milliseconds(op.milliseconds),
            percent(bench.ceilings().share(op.work, op.milliseconds))
        ))?;
    }
    Ok(())
}

fn stage(bench: &Bench, op: &OpTime) -> Value {
    json!({
        "op": op.name,
        "input": op.shape.to_vec(),
        "milliseconds": op.milliseconds,
        "work": op.work,
        "share": bench.ceilings().share(op.work, op.milliseconds),
    })
}

/// The corner of an image from which its first pixels can be computed.
///
/// With n stages, a result at pixel p reads the image at most `4 · (2ⁿ − 1)` pixels further: two 3×3 convolutions per decoder
/// stage and one per encoder stage, at every scale, and what lies within the pixels of the bottleneck.
struct Corner {
    patch: usize,
    /// Pixels of the corner and of what is compared in it.
    side: usize,
    compared: usize,
}

impl Corner {
    fn new(patch: usize, downsampling: usize, side: usize) -> Self {
        let reach = 4 * downsampling;
        match 2 * reach < side {
            true => Corner {
                patch,
                side: 2 * reach,
                compared: reach,
            },
            // The whole image.
            false => Corner {
                patch,
                side,
                compared: side,
            },
        }
    }

    fn of_image(&self, image: &Tensor) -> Result<Tensor> {
        cut(image, self.side)
    }

    fn of_features(&self, features: &Tensor) -> Result<Tensor> {
        cut(features, self.side / self.patch)
    }

    fn compared_of(&self, result: &Tensor) -> Result<Vec<f32>> {
        cut(result, self.compared)?.to_vec_f32()
    }
}

/// The first `side` rows and columns of a map `[1, height, width, channels]`, on the CPU.
fn cut(map: &Tensor, side: usize) -> Result<Tensor> {
    let [width, channels] = [map.dim(2), map.dim(3)];
    let rows = map
        .reshape([map.dim(1), width * channels])?
        .narrow(0, side)?
        .to_vec_f32()?;
    let values: Vec<f32> = rows
        .chunks(width * channels)
        .flat_map(|row| row[..side * channels].iter().copied())
        .collect();
    Tensor::from_slice(&Device::Cpu, &values, [1, side, side, channels])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a corner gives is what the whole image gives there: no pixel that is compared reads past the corner.
    #[test]
    fn a_corner_is_large_enough() {
        let layout = published::head(16, 32, true).unwrap();
        let params = RandomParams::new(3, layout.tensors(HEAD_PREFIX));
        let head = Detailer::load(&params, &Device::Cpu, HEAD_PREFIX).unwrap();
        let (side, patch) = (192, 16);
        let image = random(&Device::Cpu, [1, side, side, 3], 1, 0).unwrap();
        let features = random(&Device::Cpu, [1, side / patch, side / patch, 32], 1, 1).unwrap();
        let corner = Corner::new(patch, layout.reduction(), side);
        assert_eq!((corner.side, corner.compared), (128, 64));
        let whole = head.forward(&image, &features).unwrap();
        let part = head
            .forward(
                &corner.of_image(&image).unwrap(),
                &corner.of_features(&features).unwrap(),
            )
            .unwrap();
        let error = relative_error(
            &corner.compared_of(&part).unwrap(),
            &corner.compared_of(&whole).unwrap(),
        );
        assert!(error < 1e-6, "{error}");
        // One pixel further it is not.
        let further = Corner {
            compared: 128,
            ..corner
        };
        assert_ne!(
            further.compared_of(&part).unwrap(),
            further.compared_of(&whole).unwrap()
        );
    }
}
