use l2p_engine::ops::patch_embed::patch_embed;
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::patch_embed::cpu_equals_references", cpu_equals_references);
    suite.cpu("ops::patch_embed::no_columns_give_no_tokens", no_columns_give_no_tokens);
    suite.cpu("ops::patch_embed::wrong_sizes_are_named", wrong_sizes_are_named);
    suite.cuda("ops::patch_embed::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda(
        "ops::patch_embed::cuda_names_unaligned_sizes",
        cuda_names_unaligned_sizes,
    );
}

fn cpu_equals_references() -> Outcome {
    for case in Group::load("ops").cases("patch_embed") {
        let (image, shape) = case.input("image");
        let (patch, dim) = (case.size(&["patch"]), case.size(&["dim"]));
        let image = Tensor::from_slice(&Device::Cpu, &image, shape.as_slice())?;
        let weight = case.weight("embed.weight");
        let weight = Tensor::from_slice(&Device::Cpu, &weight, [dim, weight.len() / dim])?;
        let bias = Tensor::from_slice(&Device::Cpu, &case.weight("embed.bias"), [dim])?;
        case.check("y", patch_embed(&image, patch, &weight, &bias)?.as_slice()?)?;
    }
    Ok(())
}

fn no_columns_give_no_tokens() -> Outcome {
    let zeros = |shape: &[usize]| Tensor::zeros(&Device::Cpu, shape, DType::F32);
    let tokens = patch_embed(&zeros(&[1, 8, 0, 3])?, 4, &zeros(&[16, 48])?, &zeros(&[16])?)?;
    assert_eq!(tokens.shape().to_vec(), [1, 0, 16]);
    Ok(())
}

fn wrong_sizes_are_named() -> Outcome {
    let zeros = |shape: &[usize]| Tensor::zeros(&Device::Cpu, shape, DType::F32);
    let (weight, bias) = (zeros(&[16, 48])?, zeros(&[16])?);
    let message = |image: &[usize], patch| -> Result<String> {
        Ok(patch_embed(&zeros(image)?, patch, &weight, &bias)
            .unwrap_err()
            .to_string())
    };
    assert_eq!(
        message(&[1, 10, 8, 3], 4)?,
        "patch_embed: an image of 10x8 cannot be divided into patches of 4"
    );
    assert_eq!(
        message(&[1, 8, 8, 4], 4)?,
        "patch_embed: weight has shape [16, 48], expected [16, 64]"
    );
    assert_eq!(
        message(&[1, 8, 8, 3], 0)?,
        "patch_embed: an image of 8x8 cannot be divided into patches of 0"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let sizes = [
        // The published patches: latent 2, pixel 16, 64, 128 and 160.
        (2, [6, 10, 16], 2, 256),
        (1, [208, 208, 3], 16, 3840),
        (1, [128, 192, 3], 64, 384),
        (1, [128, 384, 3], 128, 264),
        (1, [160, 320, 3], 160, 256),
        // One token and one vector of outputs; rows of a patch of one chunk; K that ends within a stage; more than one tile.
        (1, [8, 8, 1], 8, 8),
        (2, [24, 40, 1], 8, 8),
        (1, [9, 21, 8], 3, 136),
        (3, [35, 45, 8], 5, 520),
        (1, [66, 46, 16], 2, 72),
        (1, [26, 14, 24], 1, 248),
        // Enough tokens, and rows of patches long enough, for bulk copies.
        (1, [1024, 4096, 3], 64, 264),
        (2, [256, 4096, 16], 16, 72),
    ];
    for (batch, [height, width, channels], patch, dim) in sizes {
        let what = format!("{batch}x{height}x{width}x{channels} patch {patch} to {dim}");
        expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
            let image = random_bf16("image", batch * height * width * channels);
            let image = Tensor::from_f32(device, &image, [batch, height, width, channels])?;
            let inputs = patch * patch * channels;
            let weight = Tensor::from_f32(device, &random_bf16("weight", dim * inputs), [dim, inputs])?;
            let bias = Tensor::from_f32(device, &random_bf16("bias", dim), [dim])?;
            Ok(vec![patch_embed(&image, patch, &weight, &bias)?])
        })?;
    }
    Ok(())
}

fn cuda_names_unaligned_sizes(device: &Device) -> Outcome {
    let zeros = |shape: &[usize]| Tensor::zeros(device, shape, DType::Bf16);
    let outcome = patch_embed(&zeros(&[1, 8, 8, 3])?, 4, &zeros(&[16, 48])?, &zeros(&[16])?);
    assert_eq!(
        outcome.unwrap_err().to_string(),
        "patch_embed: patch·channels is 12 and dim is 16; the CUDA kernel needs multiples of 8"
    );
    Ok(())
}
