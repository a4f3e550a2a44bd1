use l2p_engine::device::MemoryTag;
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::detailer::DetailerLayout;
use l2p_engine::model::zimage::DitConfig;
use l2p_engine::model::zimage::ZImage;
use l2p_engine::train::{Division, PlanInput, Recompute, Sharding, TrainingPlan};
use l2p_engine::{Device, Result};
use l2p_tests::{Outcome, Suite};

use super::{Inputs, load, options};
use crate::models::{random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("train::plan::the_published_recipe_has_its_published_size", published);
    suite.cpu("train::plan::recomputing_trades_memory_for_time", recomputing);
    suite.cpu("train::plan::unsuitable_policies_are_refused", refused);
    suite.cpu("train::plan::ranks_divide_the_optimizer", ranks_divide);
    suite.cuda("train::plan::cuda_needs_what_was_planned", cuda_needs_what_was_planned);
}

fn config_1k() -> DitConfig {
    DitConfig {
        dim: 3840,
        heads: 30,
        layers: 30,
        refiner_layers: 2,
        ffn_hidden: 10240,
        caption_width: 2560,
        ..small_config(ModelKind::Pixel, 3840, 16)
    }
}

fn head(patch: usize, widths: Option<&[usize]>, bottleneck: Option<usize>, dim: usize) -> Result<DetailerLayout> {
    DetailerLayout::for_patch(patch, widths, bottleneck, dim)
}

fn plan_1k(policy: &str, recompute: Recompute) -> Result<TrainingPlan> {
    let config = config_1k();
    TrainingPlan::new(&PlanInput {
        spec: &ZImage {
            config: config.clone(),
            head: Some(head(16, None, None, 3840)?),
        },
        options: &options(policy, recompute),
        size: [1024, 1024],
        caption_tokens: 96,
        batch: 1,
        cuda: true,
        division: Division::default(),
    })
}

fn published() -> Outcome {
    let plan = plan_1k("released", Recompute::None)?;
    let near = |what: &str, found: f64, expected: f64, by: f64| {
        assert!((found - expected).abs() <= by, "{what}: {found}, expected {expected}");
    };
    near("trained", plan.trained_parameters as f64 / 1e9, 2.54, 0.02);
    near(
        "all",
        (plan.trained_parameters + plan.frozen_parameters) as f64 / 1e9,
        6.16,
        0.02,
    );
    // 56 TFLOP forward, 69 for gradients of inputs, 18 for those of weights, and the head's 0.8 each.
    let sum = |of: &dyn Fn(&l2p_engine::train::Arithmetic) -> f64| plan.arithmetic.iter().map(of).sum::<f64>() / 1e12;
    near("forward", sum(&|part| part.forward), 57.0, 1.0);
    near("inputs", sum(&|part| part.inputs), 70.0, 1.5);
    near("weights", sum(&|part| part.weights), 19.0, 1.5);
    near("again", sum(&|part| part.again), 0.0, 0.0);
    let memory = plan.memory;
    near(
        "kept",
        (memory.weights + memory.gradients + memory.optimizer) as f64 / 1e9,
        48.0,
        0.3,
    );
    assert!(memory.peak < 76_000_000_000, "{memory:?}");
    let paper = plan_1k("paper", Recompute::None)?;
    assert!(paper.trained_parameters < plan.trained_parameters && paper.memory.saved < plan.memory.saved);
    assert!(plan.trained.contains(&"layers.0.attention.to_q.weight".to_owned()));
    assert!(!plan.trained.contains(&"layers.5.attention.to_q.weight".to_owned()));
    Ok(())
}

fn recomputing() -> Outcome {
    let plans: Vec<TrainingPlan> = Recompute::ALL
        .map(|choice| plan_1k("released", choice))
        .into_iter()
        .collect::<Result<_>>()?;
    for pair in plans.windows(2) {
        assert!(pair[0].memory.peak > pair[1].memory.peak);
        assert!(pair[0].operations() < pair[1].operations());
    }
    assert!(plans[2].memory.peak < 54_000_000_000, "{:?}", plans[2].memory);
    let head_only = plan_1k("head-only", Recompute::None)?;
    let blocks = head_only.arithmetic.iter().filter(|part| part.part.starts_with("main"));
    assert!(blocks.into_iter().all(|part| part.inputs == 0.0 && part.weights == 0.0));
    Ok(())
}

fn refused() -> Outcome {
    let message = |policy: &str| match plan_1k(policy, Recompute::None) {
        Ok(plan) => format!("{} trained", plan.trained_parameters),
        Err(error) => error.to_string(),
    };
    assert_eq!(message("layers.0.attention.to_out.0.weight"), "14745600 trained");
    assert!(message("layers.0.attention.to_q.weight").contains("train both or neither"));
    assert!(message("layers.99.*").contains("the pattern `layers.99.*` of the freeze policy fits no tensor"));
    Ok(())
}

/// The plan against what the device counts, for a model large enough that weights and saved tensors dominate.
fn cuda_needs_what_was_planned(device: &Device) -> Outcome {
    let config = DitConfig {
        layers: 6,
        ..small_config(ModelKind::Pixel, 1536, 16)
    };
    let widths = [32, 64, 128, 256];
    let params = random_model(&config, &widths);
    let size = [512, 512];
    for recompute in Recompute::ALL {
        let options = options("released:2", recompute);
        let plan = TrainingPlan::new(&PlanInput {
            spec: &ZImage {
                config: config.clone(),
                head: Some(head(16, Some(&widths), Some(32), config.dim)?),
            },
            options: &options,
            size,
            caption_tokens: 96,
            batch: 1,
            cuda: true,
            division: Division::default(),
        })?;
        let before = device.memory_report().total.current;
        let inputs = Inputs::new(device, "plan", &config, size, &[96])?;
        let mut model = load(&params, device, &config, &options)?;
        // The first time loads kernels and looks for algorithms.
        inputs.batch(|batch| model.accumulate(batch, 1.0))?;
        model.step(0.0)?;
        device.synchronize()?;
        device.reset_memory_peaks();
        inputs.batch(|batch| model.accumulate(batch, 1.0))?;
        model.step(0.0)?;
        device.synchronize()?;
        let report = device.memory_report();
        for (tag, planned) in [
            (MemoryTag::Gradients, plan.memory.gradients),
            (MemoryTag::Optimizer, plan.memory.optimizer),
            (MemoryTag::Saved, plan.memory.saved),
        ] {
            let found = report.tag(tag).peak as f64;
            let ratio = found / planned as f64;
            assert!(
                (0.9..1.35).contains(&ratio),
                "{recompute}, {}: {found} bytes, {planned} planned",
                tag.name()
            );
        }
        let peak = (report.total.peak - before) as f64 / plan.memory.peak as f64;
        assert!(
            (0.8..1.2).contains(&peak),
            "{recompute}: the peak is {peak} times the planned one"
        );
    }
    Ok(())
}

/// What a rank holds: the optimizer is divided, sums of gradients come on top.
fn ranks_divide() -> Outcome {
    let config = config_1k();
    let spec = ZImage {
        config: config.clone(),
        head: Some(head(16, None, None, 3840)?),
    };
    let plan = |ranks, sharding| {
        TrainingPlan::new(&PlanInput {
            spec: &spec,
            options: &options("released", Recompute::None),
            size: [1024, 1024],
            caption_tokens: 96,
            batch: 1,
            cuda: true,
            division: Division { ranks, sharding },
        })
    };
    let alone = plan(1, Sharding::Optimizer)?;
    let trained = alone.trained_parameters;
    assert_eq!(alone.memory.optimizer, 12 * trained);
    assert_eq!(alone.memory.exchange, 0);
    for ranks in [2, 8] {
        let divided = plan(ranks, Sharding::Optimizer)?;
        assert_eq!(divided.memory.optimizer, 12 * trained.div_ceil(ranks as u64));
        let sums = 4 * trained.div_ceil(ranks as u64);
        let on_the_way = divided.memory.exchange - sums;
        assert!((500_000_000..3_000_000_000).contains(&on_the_way), "{on_the_way}");
        assert_eq!(
            divided.memory.peak - divided.memory.optimizer - divided.memory.exchange,
            alone.memory.peak - alone.memory.optimizer
        );
        let whole = plan(ranks, Sharding::None)?;
        assert_eq!(whole.memory.optimizer, alone.memory.optimizer);
        assert_eq!(whole.memory.exchange, divided.memory.exchange + 4 * trained);
    }
    Ok(())
}
