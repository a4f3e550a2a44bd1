//! Kernels and their images: what a launch is checked for.

use l2p_engine::device::Args;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    suite.cuda(
        "kernels::arguments_are_compared_with_the_image",
        arguments_are_compared_with_the_image,
    );
}

/// One kernel stands for all: every other test that launches one is refused where its arguments are not those of the image.
fn arguments_are_compared_with_the_image(device: &Device) -> Outcome {
    let Device::Cuda(cuda) = device else {
        return Err("not a GPU".into());
    };
    let kernel = cuda.kernel("from_rgb8", "from_rgb8")?;
    let x = Tensor::zeros(device, [6], DType::U8)?;
    let mut y = Tensor::zeros(device, [6], DType::F32)?;
    let mut addresses = || Args::new().input(&x)?.output(&mut y);
    let message = |args: Args| kernel.check(&args).unwrap_err().to_string();
    for _ in 0..2 {
        // What has passed, or has been refused, says nothing of another layout.
        kernel.check(&addresses()?.long(6))?;
        assert_eq!(
            message(addresses()?.int(6)),
            "kernel from_rgb8: argument 3 is an int of 4 bytes at offset 16, but the image's parameter has 8 bytes at offset 16"
        );
        assert_eq!(
            message(addresses()?),
            "kernel from_rgb8: argument 3 is missing: the image's kernel takes 3 arguments"
        );
        assert_eq!(
            message(addresses()?.long(6).float(1.0)),
            "kernel from_rgb8: argument 4 is a float of 4 bytes at offset 24, but the image's kernel takes 3 arguments"
        );
    }
    Ok(())
}
