//! The whole transformer, latent and pixel.

use l2p_engine::layers::MemoryParams;
use l2p_engine::model::Precision;
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::family::TransformerConfig;
use l2p_engine::model::zimage::DitConfig;
use l2p_engine::model::zimage::{Dit, ZImage};
use l2p_engine::model::{Denoiser, Spec};
use l2p_engine::ops::tokens::narrow_tokens;
use l2p_engine::{Device, Error, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{Outcome, Suite, expect_close, expect_like_cpu, random_bf16};

use super::{channels_first, input_image, params, random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("models::dit::latent_equals_diffusers", latent_equals_diffusers);
    suite.cpu("models::dit::pixel_equals_torch", pixel_equals_torch);
    suite.cpu("models::dit::items_do_not_touch", items_do_not_touch);
    suite.cpu(
        "models::dit::times_are_scaled_as_configured",
        times_are_scaled_as_configured,
    );
    suite.cpu("models::dit::mistakes_are_named", mistakes_are_named);
    suite.cpu("models::dit::loading_can_be_stopped", loading_can_be_stopped);
    suite.cuda("models::dit::latent_on_cuda_equals_cpu", latent_on_cuda_equals_cpu);
    suite.cuda("models::dit::pixel_on_cuda_equals_cpu", pixel_on_cuda_equals_cpu);
    suite.cuda(
        "models::dit::odd_widths_are_refused_on_cuda",
        odd_widths_are_refused_on_cuda,
    );
}

/// 1.25 times the errors of PyTorch's own bf16 on small models of width 384: 9.0e-3 for a latent velocity, 8.1e-3 for the
/// features of a pixel model, 4.3e-3 to 5.6e-3 for its velocity, most of which comes from the image.
const BF16_LATENT_TOLERANCE: f64 = 1.12e-2;
const BF16_FEATURE_TOLERANCE: f64 = 1.01e-2;
const BF16_PIXEL_TOLERANCE: f64 = 6.9e-3;

/// The configuration as a program reads it: the sizes off the tensors, the rest from the case's `config.json`.
pub fn config(case: &Case<'_>, params: &MemoryParams) -> Result<DitConfig> {
    let dir = tempfile::tempdir().expect("a temporary folder can be made");
    let path = dir.path().join("config.json");
    std::fs::write(&path, case.config(&["config"]).to_string()).expect("it can be written to");
    DitConfig::read(params, Some(&TransformerConfig::read(&path)?))
}

pub fn load(params: &MemoryParams, config: &DitConfig, device: &Device) -> Result<Dit> {
    load_over(params, config, &Precision::default(), device)
}

pub fn load_over(params: &MemoryParams, config: &DitConfig, precision: &Precision, device: &Device) -> Result<Dit> {
    let spec = ZImage::read(params, config)?;
    Dit::load(&spec, &precision.over(params), device, &mut |_, _| Ok(()))
}

/// The caption `name`, `[1, tokens, width]`.
pub fn caption(case: &Case<'_>, name: &str) -> Result<Tensor> {
    let (values, shape) = case.input(name);
    Tensor::from_f32(&Device::Cpu, &values, [1, shape[0], shape[1]])
}

fn captions(case: &Case<'_>) -> Result<Vec<Tensor>> {
    let names = (0..).map(|index| format!("cap.{index}"));
    names
        .take_while(|name| case.has_input(name))
        .map(|name| caption(case, &name))
        .collect()
}

/// `[batch, tokens, dim]` from `count` image tokens on a grid, as `[batch, dim, rows, columns]`.
fn as_map(tokens: &Tensor, [rows, columns]: [usize; 2]) -> Result<Vec<f32>> {
    let tokens = narrow_tokens(tokens, 0, rows * columns)?;
    channels_first(&tokens.reshape([tokens.dim(0), rows, columns, tokens.dim(2)])?)
}

fn latent_equals_diffusers() -> Outcome {
    let group = Group::load("dit_latent");
    for case in group.cases("") {
        let params = params(&case);
        let dit = load(&params, &config(&case, &params)?, &Device::Cpu)?;
        let (x, times) = (input_image(&case, "x")?, case.input("t").0);
        let captions = captions(&case)?;
        let prepared = dit.prepare(&captions.iter().collect::<Vec<_>>(), [x.dim(1), x.dim(2)])?;
        let modulations = dit.modulate(&times, None)?;
        for name in case.expected() {
            let found = match name {
                "c" => dit.embed_times(&times)?.to_vec_f32()?,
                "noise_refiner" => dit.refine_image(&x, &prepared, &modulations)?.to_vec_f32()?,
                "context_refiner" => dit.refined_captions(&prepared)?.to_vec_f32()?,
                "layers" => dit.run_trunk(&x, &prepared, &modulations)?.to_vec_f32()?,
                _ => channels_first(&dit.forward(&x, &prepared, &modulations)?)?,
            };
            case.check(name, &found)?;
        }
    }
    Ok(())
}

fn pixel_equals_torch() -> Outcome {
    let group = Group::load("dit_pixel");
    for case in group.cases("") {
        let params = params(&case);
        let config = config(&case, &params)?;
        assert_eq!(config.kind, ModelKind::Pixel);
        let dit = load(&params, &config, &Device::Cpu)?;
        let x = input_image(&case, "x")?;
        let captions = captions(&case)?;
        let prepared = dit.prepare(&captions.iter().collect::<Vec<_>>(), [x.dim(1), x.dim(2)])?;
        let modulations = dit.modulate(&case.input("t").0, None)?;
        let sequence = dit.run_trunk(&x, &prepared, &modulations)?;
        let grid = [x.dim(1) / config.patch, x.dim(2) / config.patch];
        case.check("c", &as_map(&sequence, grid)?)?;
        case.check("v", &channels_first(&dit.forward(&x, &prepared, &modulations)?)?)?;
    }
    Ok(())
}

/// A batch gives each item what it gets alone, whatever the lengths of the other captions.
fn items_do_not_touch() -> Outcome {
    let group = Group::load("dit_latent");
    let case = group.case("b3_unequal");
    let params = params(&case);
    let dit = load(&params, &config(&case, &params)?, &Device::Cpu)?;
    let (x, times, captions) = (input_image(&case, "x")?, case.input("t").0, captions(&case)?);
    let run = |items: std::ops::Range<usize>| -> Result<Vec<f32>> {
        let captions: Vec<&Tensor> = captions[items.clone()].iter().collect();
        let prepared = dit.prepare(&captions, [x.dim(1), x.dim(2)])?;
        let x = x.narrow(items.start, items.len())?;
        dit.forward(&x, &prepared, &dit.modulate(&times[items], None)?)?
            .to_vec_f32()
    };
    let together = run(0..3)?;
    for (item, expected) in together.chunks(together.len() / 3).enumerate() {
        let shape = x.narrow(item, 1)?.shape();
        expect_close(&format!("item {item}"), &run(item..item + 1)?, expected, shape, 5e-6)?;
    }
    Ok(())
}

fn times_are_scaled_as_configured() -> Outcome {
    let group = Group::load("dit_latent");
    let case = group.case("b1");
    let params = params(&case);
    let usual = config(&case, &params)?;
    let halved = DitConfig {
        t_scale: 500.0,
        ..usual.clone()
    };
    let of = |config: &DitConfig, time: f32| load(&params, config, &Device::Cpu)?.embed_times(&[time])?.to_vec_f32();
    assert_eq!(of(&halved, 0.5)?, of(&usual, 0.25)?);
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let group = Group::load("dit_latent");
    let case = group.case("b1");
    let params = params(&case);
    let dit = load(&params, &config(&case, &params)?, &Device::Cpu)?;
    let caption =
        |tokens: usize, width: usize| Tensor::from_f32(&Device::Cpu, &vec![0.0; tokens * width], [1, tokens, width]);
    let prepare = |caption: &Tensor, size: [usize; 2]| match dit.prepare(&[caption], size) {
        Ok(_) => "prepared".to_owned(),
        Err(error) => error.to_string(),
    };
    assert_eq!(
        prepare(&caption(4, 96)?, [12, 17]),
        "an image of 17x12 cannot be cut into patches of 2"
    );
    assert_eq!(
        prepare(&caption(4, 96)?, [0, 4]),
        "an image of 4x0 cannot be cut into patches of 2"
    );
    assert_eq!(prepare(&caption(0, 96)?, [4, 4]), "a caption has no tokens");
    assert_eq!(
        prepare(&caption(4, 95)?, [4, 4]),
        "dit: caption has shape [1, 4, 95], expected [1, 4, 96]"
    );
    let prepared = dit.prepare(&[&caption(4, 96)?], [4, 6])?;
    let image = Tensor::from_f32(&Device::Cpu, &[0.0; 4 * 4 * 16], [1, 4, 4, 16])?;
    let message = dit
        .forward(&image, &prepared, &dit.modulate(&[0.5], None)?)
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert_eq!(message, "dit: image has shape [1, 4, 4, 16], expected [1, 4, 6, 16]");

    let mut lacking = params.clone();
    lacking.0.remove("layers.1.feed_forward.w3.weight");
    let outcome = load(&lacking, &config(&case, &params)?, &Device::Cpu);
    assert_eq!(
        outcome.map(|_| ()).unwrap_err().to_string(),
        "there is no parameter `layers.1.feed_forward.w3.weight`"
    );
    Ok(())
}

fn loading_can_be_stopped() -> Outcome {
    let config = small_config(ModelKind::Latent, 256, 2);
    let params = random_model(&config, &[]);
    let mut seen = Vec::new();
    let spec = ZImage::read(&params, &config)?;
    let outcome = Dit::load(&spec, &params, &Device::Cpu, &mut |done, total| {
        seen.push((done, total));
        if done == 2 { Err(Error::Interrupted) } else { Ok(()) }
    });
    assert!(matches!(outcome.map(|_| ()), Err(Error::Interrupted)));
    let parameters = spec.metas().len();
    assert_eq!(seen, [(1, parameters), (2, parameters)]);
    Ok(())
}

/// A batch of pictures, captions and times for a model, in numbers that bf16 holds.
struct Inputs {
    size: [usize; 2],
    lengths: &'static [usize],
    times: &'static [f32],
}

impl Inputs {
    /// The features of the image tokens and the velocity.
    fn run(&self, params: &MemoryParams, config: &DitConfig, device: &Device) -> Result<Vec<Tensor>> {
        let dit = load(params, config, device)?;
        let [height, width] = self.size;
        let shape = [self.lengths.len(), height, width, config.in_channels];
        let x = Tensor::from_f32(device, &random_bf16("x", shape.iter().product()), shape)?;
        let captions = self.lengths.iter().enumerate().map(|(index, &tokens)| {
            let values = random_bf16(&format!("cap.{index}"), tokens * config.caption_width);
            Tensor::from_f32(device, &values, [1, tokens, config.caption_width])
        });
        let captions: Vec<Tensor> = captions.collect::<Result<_>>()?;
        let prepared = dit.prepare(&captions.iter().collect::<Vec<_>>(), self.size)?;
        let modulations = dit.modulate(self.times, None)?;
        let tokens = height / config.patch * (width / config.patch);
        let sequence = dit.run_trunk(&x, &prepared, &modulations)?;
        Ok(vec![
            narrow_tokens(&sequence, 0, tokens)?,
            dit.forward(&x, &prepared, &modulations)?,
        ])
    }

    fn expect_like_cpu(
        &self,
        what: &str,
        config: &DitConfig,
        head: &[usize],
        device: &Device,
        tolerances: [f64; 2],
    ) -> Outcome {
        let params = random_model(config, head);
        for (output, tolerance) in tolerances.into_iter().enumerate() {
            expect_like_cpu(
                &format!("{what}, {}", ["features", "velocity"][output]),
                device,
                tolerance,
                |device| Ok(vec![self.run(&params, config, device)?.swap_remove(output)]),
            )?;
        }
        Ok(())
    }
}

fn latent_on_cuda_equals_cpu(device: &Device) -> Outcome {
    let config = small_config(ModelKind::Latent, 384, 2);
    for inputs in [
        Inputs {
            size: [16, 16],
            lengths: &[32],
            times: &[0.25],
        },
        // 35 image tokens, padded to 64, and captions padded to 32 and 64.
        Inputs {
            size: [10, 14],
            lengths: &[20, 45],
            times: &[0.25, 0.875],
        },
        // One time for all items, as the sampler has it.
        Inputs {
            size: [6, 6],
            lengths: &[1, 64, 33],
            times: &[0.5],
        },
    ] {
        let what = format!("{:?} with captions of {:?}", inputs.size, inputs.lengths);
        inputs.expect_like_cpu(&what, &config, &[], device, [BF16_LATENT_TOLERANCE; 2])?;
    }
    Ok(())
}

fn pixel_on_cuda_equals_cpu(device: &Device) -> Outcome {
    let [one, four, ten]: [&[usize]; 3] = [&[8, 16, 24, 32], &[8, 8, 16, 16, 24, 32], &[8, 8, 16, 16, 24]];
    for (patch, widths, size, lengths, times) in [
        (16, one, [48, 80], &[20][..], &[0.3][..]),
        (16, one, [96, 112], &[20, 45], &[0.25, 0.875]),
        (64, four, [128, 192], &[33, 32], &[0.0, 1.0]),
        (128, four, [128, 256], &[5], &[0.45]),
        (160, ten, [320, 320], &[12], &[0.1]),
    ] {
        let config = small_config(ModelKind::Pixel, 384, patch);
        let inputs = Inputs { size, lengths, times };
        let what = format!("patch {patch}, {size:?}");
        let tolerances = [BF16_FEATURE_TOLERANCE, BF16_PIXEL_TOLERANCE];
        inputs.expect_like_cpu(&what, &config, widths, device, tolerances)?;
    }
    Ok(())
}

/// Before anything is loaded, with the reason and the way out.
fn odd_widths_are_refused_on_cuda(device: &Device) -> Outcome {
    let config = small_config(ModelKind::Latent, 256, 2);
    let before = device.memory_report().total.current;
    let message = load(&MemoryParams::default(), &config, device)
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "the transformer cannot run on CUDA: its feed-forward width of 682 is not a multiple of 8; use --device cpu"
    );
    let config = small_config(ModelKind::Pixel, 384, 16);
    let params = random_model(&config, &[8, 16, 20, 32]);
    let message = load(&params, &config, device).map(|_| ()).unwrap_err().to_string();
    assert_eq!(
        message,
        "the detailer head cannot run on CUDA: its encoder width of 20 is not a multiple of 8; use --device cpu"
    );
    assert_eq!(device.memory_report().total.current, before);
    Ok(())
}
