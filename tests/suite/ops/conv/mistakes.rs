//! What is checked before a convolution is computed.

use l2p_engine::ops::conv::{Activation, Canvas, conv2d, conv3x3_silu_picture};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite};

use super::{image, layer};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "ops::conv::layers_that_make_no_picture_are_named",
        layers_that_make_no_picture,
    );
    suite.cpu(
        "ops::conv::canvases_that_do_not_fit_are_named",
        canvases_that_do_not_fit,
    );
    suite.cpu("ops::conv::sources_of_other_types_are_named", sources_of_other_types);
}

const CPU: Device = Device::Cpu;

/// The convolution to colours is 1×1, takes what the one before it makes, and makes three channels.
fn layers_that_make_no_picture() -> Outcome {
    let (x, conv) = (image(&CPU, "x", [1, 2, 4, 5])?, layer(&CPU, 3, &[5], 4)?);
    for (kernel, channels, outputs) in [(3, 4, 3), (1, 5, 3), (1, 4, 4)] {
        let mut picture = Tensor::zeros(&CPU, [1, 2, 4, 3], DType::F32)?;
        let canvas = Canvas {
            picture: &mut picture,
            scale: 1.0,
            factors: None,
        };
        let to_picture = layer(&CPU, kernel, &[channels], outputs)?;
        let outcome = conv3x3_silu_picture(&x, None, &conv, &to_picture, canvas);
        assert_eq!(
            outcome.unwrap_err().to_string(),
            format!(
                "conv3x3_silu_picture: the last convolution is {kernel}x{kernel} from [{channels}, 0] to {outputs} \
                 channels, expected 1x1 from 4 to 3"
            )
        );
    }
    Ok(())
}

fn canvases_that_do_not_fit() -> Outcome {
    const FITS: [usize; 4] = [1, 2, 4, 3];
    let (x, conv) = (image(&CPU, "x", [1, 2, 4, 5])?, layer(&CPU, 3, &[5], 4)?);
    let to_picture = layer(&CPU, 1, &[4], 3)?;
    let run = |(shape, dtype): ([usize; 4], DType), factors: (usize, DType)| -> Result<()> {
        let mut picture = Tensor::zeros(&CPU, shape, dtype)?;
        let factors = Tensor::zeros(&CPU, [factors.0], factors.1)?;
        let canvas = Canvas {
            picture: &mut picture,
            scale: 1.0,
            factors: Some(&factors),
        };
        conv3x3_silu_picture(&x, None, &conv, &to_picture, canvas)
    };
    run((FITS, DType::F32), (2, DType::F32))?;
    for (picture, factors, expected) in [
        (
            ([1, 2, 5, 3], DType::F32),
            (2, DType::F32),
            "picture has shape [1, 2, 5, 3], expected [1, 2, 4, 3]",
        ),
        ((FITS, DType::Bf16), (2, DType::F32), "picture holds bf16, expected f32"),
        (
            (FITS, DType::F32),
            (1, DType::F32),
            "factors has shape [1], expected [2]",
        ),
        ((FITS, DType::F32), (2, DType::Bf16), "factors holds bf16, expected f32"),
    ] {
        let message = run(picture, factors).unwrap_err().to_string();
        assert_eq!(message, format!("conv3x3_silu_picture: {expected}"));
    }
    Ok(())
}

/// An image of at most three channels may be f32 where others are not; no image may be bf16 where others are f32.
fn sources_of_other_types() -> Outcome {
    for channels in [3, 8] {
        let x = Tensor::zeros(&CPU, [1, 2, 4, channels], DType::Bf16)?;
        let outcome = conv2d(&x, None, &layer(&CPU, 3, &[channels], 4)?, Activation::None, None);
        assert_eq!(outcome.unwrap_err().to_string(), "conv2d: x holds bf16, expected f32");
    }
    Ok(())
}
