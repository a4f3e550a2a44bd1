use l2p_engine::ops::Modulation;
use l2p_engine::ops::layer_norm::layer_norm_modulate;
use l2p_engine::ops::linear::{InputActivation, linear, linear_vectors};
use l2p_engine::ops::unpatchify::{patchify, unpatchify};
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_like_cpu, random_bf16, with_poisoned_buffers};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "ops::unpatchify::final_layer_equals_reference",
        final_layer_equals_reference,
    );
    suite.cpu(
        "ops::unpatchify::pixels_go_where_they_belong",
        pixels_go_where_they_belong,
    );
    suite.cpu("ops::unpatchify::no_columns_are_no_pixels", no_columns_are_no_pixels);
    suite.cpu("ops::unpatchify::wrong_sizes_are_named", wrong_sizes_are_named);
    suite.cpu("ops::unpatchify::wrong_images_are_named", wrong_images_are_named);
    suite.cuda("ops::unpatchify::cuda_equals_cpu", cuda_equals_cpu);
}

/// The whole final layer of the latent model, which ends in `unpatchify`.
fn final_layer_equals_reference() -> Outcome {
    for case in Group::load("ops").cases("final_layer") {
        let tensor =
            |(values, shape): (Vec<f32>, Vec<usize>)| Tensor::from_slice(&Device::Cpu, &values, shape.as_slice());
        let weights = case.weights();
        let weight = |name: &str| {
            let (shape, values) = &weights[name];
            Tensor::from_slice(&Device::Cpu, values, shape.as_slice())
        };
        let (x, c) = (tensor(case.input("x"))?, tensor(case.input("c"))?);
        let scale = linear_vectors(
            &c,
            InputActivation::Silu,
            &weight("adaLN_modulation.1.weight")?,
            Some(&weight("adaLN_modulation.1.bias")?),
        )?;
        let table = scale.reshape([scale.dim(0), 1, scale.dim(1)])?;
        let normalised = layer_norm_modulate(&x, Some(Modulation::new(&table, 0)?), 1e-6)?;
        let tokens = linear(&normalised, &weight("linear.weight")?, Some(&weight("linear.bias")?))?;
        let [rows, columns, patch, channels] = ["rows", "columns", "patch", "channels"].map(|key| case.size(&[key]));
        let y = unpatchify(&tokens, rows * patch, columns * patch, patch, channels, 1.0)?;
        case.check("y", y.as_slice()?)?;
    }
    Ok(())
}

fn pixels_go_where_they_belong() -> Outcome {
    // Two patches of 2x2 pixels with one channel side by side, and a pad token.
    let tokens: Vec<f32> = (1..=12).map(|value| value as f32).collect();
    let tokens = Tensor::from_slice(&Device::Cpu, &tokens, [1, 3, 4])?;
    let image = unpatchify(&tokens, 2, 4, 2, 1, -2.0)?;
    assert_eq!(*image.shape(), [1, 2, 4, 1]);
    assert_eq!(
        image.as_slice::<f32>()?,
        [-2.0, -4.0, -10.0, -12.0, -6.0, -8.0, -14.0, -16.0]
    );
    // Back again, with zeros for the pad token or without it.
    let patches: Vec<f32> = (1..=8).map(|value| value as f32).collect();
    for (count, pad) in [(2, &[][..]), (3, &[0.0; 4])] {
        let found = with_poisoned_buffers(|| patchify(&image, 2, count, -0.5))?;
        assert_eq!(*found.shape(), [1, count, 4]);
        assert_eq!(found.as_slice::<f32>()?, [&patches, pad].concat());
    }
    Ok(())
}

fn no_columns_are_no_pixels() -> Outcome {
    let tokens = Tensor::zeros(&Device::Cpu, [1, 2, 12], DType::F32)?;
    let image = unpatchify(&tokens, 4, 0, 2, 3, 1.0)?;
    assert_eq!(*image.shape(), [1, 4, 0, 3]);
    Ok(())
}

/// Extents that patches do not divide, one and both; no patch at all, also of no image.
const UNDIVIDED: [[usize; 3]; 5] = [[4, 5, 2], [5, 4, 2], [5, 5, 2], [4, 4, 0], [0, 0, 0]];

fn wrong_sizes_are_named() -> Outcome {
    let tokens = Tensor::zeros(&Device::Cpu, [1, 5, 12], DType::F32)?;
    let message = |height, width, patch, channels| {
        unpatchify(&tokens, height, width, patch, channels, 1.0)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        message(4, 6, 2, 3),
        "unpatchify: tokens has shape [1, 5, 12], expected [batch, 6 or more, 12]"
    );
    assert_eq!(
        message(4, 4, 2, 4),
        "unpatchify: tokens has shape [1, 5, 12], expected [batch, 4 or more, 16]"
    );
    for [height, width, patch] in UNDIVIDED {
        assert_eq!(
            message(height, width, patch, 3),
            format!("unpatchify: an image of {height}x{width} cannot be divided into patches of {patch}")
        );
    }
    Ok(())
}

fn wrong_images_are_named() -> Outcome {
    let message = |[height, width, patch]: [usize; 3], tokens, dtype| -> l2p_engine::Result<String> {
        let image = Tensor::zeros(&Device::Cpu, [1, height, width, 3], dtype)?;
        Ok(patchify(&image, patch, tokens, 1.0).unwrap_err().to_string())
    };
    for [height, width, patch] in UNDIVIDED {
        assert_eq!(
            message([height, width, patch], 6, DType::F32)?,
            format!("patchify: an image of {height}x{width} cannot be divided into patches of {patch}")
        );
    }
    assert_eq!(
        message([4, 6, 2], 5, DType::F32)?,
        "patchify: 6 patches do not fit 5 tokens"
    );
    assert_eq!(
        message([4, 6, 2], 6, DType::Bf16)?,
        "patchify: image holds bf16, expected f32"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let sizes = [
        (1, 1, 1, 2, 16, 0),
        (2, 3, 5, 2, 16, 17),
        (1, 65, 67, 2, 16, 1),
        (3, 4, 2, 16, 3, 0),
        (1, 2, 3, 1, 8, 4),
    ];
    for (batch, rows, columns, patch, channels, pads) in sizes {
        let what = format!("{batch}x{rows}x{columns} patch {patch}x{channels}, {pads} pads");
        expect_like_cpu(&what, device, 0.0, |device| {
            let shape = [batch, rows * columns + pads, patch * patch * channels];
            let tokens = Tensor::from_f32(device, &random_bf16("tokens", shape.iter().product()), shape)?;
            Ok(vec![unpatchify(
                &tokens,
                rows * patch,
                columns * patch,
                patch,
                channels,
                -1.0,
            )?])
        })?;
    }
    Ok(())
}
