use l2p_engine::layers::MemoryParams;
use l2p_engine::model::config::VaeConfig;
use l2p_engine::model::vae::{VaeDecoder, VaeEncoder};
use l2p_engine::{Device, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{Outcome, Suite, expect_like_cpu};

use super::{channels_first, input_image, params, rounded_params};

pub fn register(suite: &mut Suite) {
    suite.cpu("models::vae::cpu_equals_diffusers", cpu_equals_diffusers);
    suite.cpu("models::vae::configurations_are_checked", configurations_are_checked);
    suite.cpu("models::vae::mistakes_are_named", mistakes_are_named);
    suite.cpu("models::vae::encoder_equals_diffusers", encoder_equals_diffusers);
    suite.cuda("models::vae::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("models::vae::encoder_on_cuda_equals_cpu", encoder_on_cuda_equals_cpu);
}

/// Some forty layers, each rounded to bf16.
const BF16_VAE_TOLERANCE: f64 = 3e-2;

fn config(case: &Case<'_>) -> l2p_engine::Result<VaeConfig> {
    VaeConfig::from_json(&case.config(&["config"]).to_string())
}

fn cpu_equals_diffusers() -> Outcome {
    let group = Group::load("vae");
    for case in group.cases("decode.") {
        let decoder = VaeDecoder::load(&params(&case), &Device::Cpu, &config(&case)?)?;
        let image = decoder.decode(&input_image(&case, "latent")?)?;
        case.check("image", &channels_first(&image)?)?;
    }
    Ok(())
}

fn encoder_equals_diffusers() -> Outcome {
    let group = Group::load("vae");
    for case in group.cases("encode.") {
        let config = config(&case)?;
        let encoder = VaeEncoder::load(&params(&case), &Device::Cpu, &config)?;
        let image = input_image(&case, "image")?;
        let (latent, shape) = encoder.latent(&image)?;
        let latent = Tensor::from_slice(&Device::Cpu, &latent, shape)?;
        case.check("latent", &channels_first(&latent)?)?;
        let moments = encoder.encode(&image)?.to_vec::<f32>()?;
        let channels = config.latent_channels;
        let means: Vec<f32> = moments
            .chunks(2 * channels)
            .flat_map(|cell| cell[..channels].to_vec())
            .collect();
        case.check(
            "mean",
            &channels_first(&Tensor::from_slice(&Device::Cpu, &means, shape)?)?,
        )?;
        let odd = Tensor::from_slice(&Device::Cpu, &[0.0f32; 8 * 12 * 3], [1, 8, 12, 3])?;
        assert_eq!(
            encoder.encode(&odd).unwrap_err().to_string(),
            "vae: an image of 12x8 has no latent: its sides must be multiples of 8"
        );
    }
    Ok(())
}

fn encoder_on_cuda_equals_cpu(device: &Device) -> Outcome {
    let group = Group::load("vae");
    for case in group.cases("encode.") {
        let (params, config) = (rounded_params(&case), config(&case)?);
        let image = input_image(&case, "image")?;
        expect_like_cpu(case.name(), device, BF16_VAE_TOLERANCE, |device| {
            let encoder = VaeEncoder::load(&params, device, &config)?;
            let image = Tensor::from_slice(device, image.as_slice::<f32>()?, image.shape())?;
            Ok(vec![encoder.encode(&image)?])
        })?;
    }
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let group = Group::load("vae");
    for case in group.cases("decode.") {
        let (params, config) = (rounded_params(&case), config(&case)?);
        let latent = input_image(&case, "latent")?;
        expect_like_cpu(case.name(), device, BF16_VAE_TOLERANCE, |device| {
            let decoder = VaeDecoder::load(&params, device, &config)?;
            let latent = Tensor::from_slice(device, latent.as_slice::<f32>()?, latent.shape())?;
            Ok(vec![decoder.decode(&latent)?])
        })?;
    }
    Ok(())
}

fn configurations_are_checked() -> Outcome {
    // The published one, with entries that the decoder does not need.
    let text = r#"{
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "force_upcast": true, "latent_channels": 16, "layers_per_block": 2, "latents_mean": null, "norm_num_groups": 32,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_post_quant_conv": false, "use_quant_conv": false,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
    }"#;
    let published = VaeConfig::from_json(text)?;
    assert_eq!(published.downsampling(), 8);
    assert_eq!((published.out_channels, published.mid_block_add_attention), (3, true));
    assert_eq!((published.scaling_factor, published.shift_factor), (0.3611, 0.1159));

    let message = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        VaeConfig::from_json(&text.replace(from, to)).unwrap_err().to_string()
    };
    assert_eq!(
        message("\"use_post_quant_conv\": false", "\"use_post_quant_conv\": true"),
        "the VAE's configuration says use_post_quant_conv = true, only false is supported"
    );
    assert_eq!(
        message("\"silu\"", "\"gelu\""),
        "the VAE's configuration says act_fn = \"gelu\", only \"silu\" is supported"
    );
    assert_eq!(
        message("[128, 256, 512, 512]", "[128, 256, 500, 512]"),
        "the VAE's configuration says block_out_channels = [128, 256, 500, 512], only multiples of norm_num_groups = 32 is supported"
    );
    assert!(message("[\"UpDecoderBlock2D\", ", "[\"AttnUpDecoderBlock2D\", ").contains("up_block_types"));
    assert!(message("0.3611", "0").contains("scaling_factor"));
    assert!(message("16", "\"sixteen\"").contains("the VAE's configuration"));
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let group = Group::load("vae");
    let case = group.case("decode.b2");
    let config = config(&case)?;
    let message = |change: &dyn Fn(&mut MemoryParams)| {
        let mut params = params(&case);
        change(&mut params);
        let outcome = VaeDecoder::load(&params, &Device::Cpu, &config);
        outcome.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let name = "decoder.up_blocks.2.resnets.0.conv_shortcut.weight";
    assert_eq!(
        message(&|params| drop(params.0.remove(name))),
        format!("there is no parameter `{name}`")
    );
    assert_eq!(
        message(&|params| params.insert("decoder.conv_in.weight", &[64, 8, 3, 3], vec![0.0; 64 * 72])),
        "`decoder.conv_in.weight` has shape [64, 8, 3, 3], expected [64, 16, 3, 3]"
    );
    let decoder = VaeDecoder::load(&params(&case), &Device::Cpu, &config)?;
    let latent = Tensor::from_slice(&Device::Cpu, &[0.0f32; 4 * 8], [1, 2, 2, 8])?;
    assert_eq!(
        decoder.decode(&latent).unwrap_err().to_string(),
        "conv2d: x has shape [1, 2, 2, 8], expected [1, 2, 2, 16]"
    );
    Ok(())
}
