mod cuda;
mod differences;

use l2p_engine::layers::{MemoryParams, ParamSource};
use l2p_engine::ops::conv::{
    Activation, Conv, ConvGrads, ConvSaved, SourceGrads, conv2d, conv2d_backward, conv2d_f32_backward,
    conv2d_silu_with_sum, conv3x3_silu_pool, conv3x3_silu_pool_backward, conv3x3_silu_pool_with_sum,
    upsample_conv3x3_backward,
};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_close, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::conv_backward::cpu_equals_torch", cpu_equals_torch);
    suite.cpu("ops::conv_backward::cpu_pool_equals_torch", cpu_pool_equals_torch);
    suite.cpu(
        "ops::conv_backward::cpu_upsample_equals_torch",
        cpu_upsample_equals_torch,
    );
    suite.cpu(
        "ops::conv_backward::cpu_two_sources_equal_torch",
        cpu_two_sources_equal_torch,
    );
    suite.cpu("ops::conv_backward::only_what_is_asked_for", only_what_is_asked_for);
    suite.cpu("ops::conv_backward::kept_sums_change_nothing", kept_sums_change_nothing);
    suite.cpu(
        "ops::conv_backward::the_first_of_equal_maxima_gets_the_gradient",
        || first_of_equal_maxima(&Device::Cpu),
    );
    suite.cpu(
        "ops::conv_backward::without_outputs_nothing_is_added",
        without_outputs_nothing_is_added,
    );
    suite.cpu("ops::conv_backward::mistakes_are_named", mistakes_are_named);
    differences::register(suite);
    cuda::register(suite);
}

/// Of results for which a gradient is rounded to bf16 on the way: what enters the sums, and what leaves them.
const TWICE_ROUNDED: f64 = 2.0 * BF16_TOLERANCE;

/// A convolution with the buffers for its parameters' gradients.
struct Layer {
    conv: Conv,
    weight: Tensor,
    bias: Tensor,
}

impl Layer {
    /// Random weights that keep the size of their input; gradient buffers that hold something already.
    fn new(device: &Device, kernel: usize, channels: &[usize], outputs: usize) -> Result<Self> {
        let depth = kernel * kernel * channels.iter().sum::<usize>();
        let rounded = |name: &str, count: usize, scale: f32| -> Vec<f32> {
            let values = random_bf16(name, count).into_iter();
            values
                .map(|value| half::bf16::from_f32(value * scale).to_f32())
                .collect()
        };
        let weight = rounded("w", outputs * depth, 1.0 / (depth as f32).sqrt());
        let conv = Conv::new(
            Tensor::from_f32(device, &weight, [outputs, depth])?,
            Tensor::from_f32(device, &random_bf16("b", outputs), [outputs])?,
            kernel,
            channels,
        )?;
        Self::of(
            conv,
            rounded("dw", outputs * depth, 0.125),
            rounded("db", outputs, 0.125),
        )
    }

    fn of(conv: Conv, weight: Vec<f32>, bias: Vec<f32>) -> Result<Self> {
        let device = conv.weight().device();
        Ok(Layer {
            weight: Tensor::from_f32(&device, &weight, conv.weight().shape())?,
            bias: Tensor::from_f32(&device, &bias, [conv.outputs()])?,
            conv,
        })
    }

    fn grads(&mut self) -> Option<ConvGrads<'_>> {
        Some(ConvGrads {
            weight: &mut self.weight,
            bias: &mut self.bias,
        })
    }
}

fn image(device: &Device, name: &str, shape: [usize; 4]) -> Result<Tensor> {
    Tensor::from_f32(device, &random_bf16(name, shape.iter().product()), shape)
}

fn fixture_layer(case: &Case<'_>, channels: &[usize]) -> Result<Layer> {
    let params = MemoryParams(case.weights().into_iter().collect());
    let kernel = params.shape("conv.weight").map_or(0, |shape| shape[2]);
    let outputs = params.shape("conv.bias").map_or(0, |shape| shape[0]);
    let conv = Conv::new(
        params.load_conv(&Device::Cpu, "conv.weight")?,
        params.load(&Device::Cpu, "conv.bias", &[outputs])?,
        kernel,
        channels,
    )?;
    let zeros = |tensor: &Tensor| vec![0.0; tensor.elements()];
    let (weight, bias) = (zeros(conv.weight()), vec![0.0; outputs]);
    Layer::of(conv, weight, bias)
}

fn fixture_input(case: &Case<'_>, name: &str) -> Result<Tensor> {
    let (values, shape) = case.input(name);
    Tensor::from_f32(&Device::Cpu, &values, &shape[..])
}

/// Compares the parameters' gradients, the weight's in torch's order of axes.
fn check_parameters(case: &Case<'_>, layer: &Layer) -> Outcome {
    let inputs: usize = layer.conv.channels().iter().sum();
    let weight = layer.weight.as_slice::<f32>()?;
    let (outputs, taps) = (layer.conv.outputs(), weight.len() / layer.conv.outputs() / inputs);
    let at = |index: usize| {
        let (output, input, tap) = (index / (inputs * taps), index / taps % inputs, index % taps);
        weight[(output * taps + tap) * inputs + input]
    };
    let torch: Vec<f32> = (0..outputs * inputs * taps).map(at).collect();
    case.check("grad.conv.weight", &torch)?;
    case.check("grad.conv.bias", layer.bias.as_slice()?)
}

fn ensure_some(gradient: Option<Tensor>) -> std::result::Result<Tensor, String> {
    gradient.ok_or_else(|| "a gradient that was wanted is missing".to_string())
}

fn cpu_equals_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.convolution.") {
        let (x, dy) = (fixture_input(&case, "x")?, fixture_input(&case, "grad.y")?);
        let silu = case.has_config(&["silu"]);
        for f32_result in [false, true] {
            if silu && f32_result {
                continue;
            }
            let mut layer = fixture_layer(&case, &[x.dim(3)])?;
            let (conv, activation) = (
                layer.conv.clone(),
                if silu { Activation::Silu } else { Activation::None },
            );
            let dx = match f32_result {
                true => conv2d_f32_backward(&dy, &x, &conv, 1.0, true, layer.grads())?,
                false => conv2d_backward(&dy, ConvSaved::of(&x), &conv, activation, [true, false], layer.grads())?.x,
            };
            case.check("grad.x", ensure_some(dx)?.as_slice()?)?;
            check_parameters(&case, &layer)?;
        }
    }
    Ok(())
}

fn cpu_pool_equals_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.conv3x3_silu_pool.") {
        let x = fixture_input(&case, "x")?;
        let mut layer = fixture_layer(&case, &[x.dim(3)])?;
        let conv = layer.conv.clone();
        let (full, _) = conv3x3_silu_pool(&x, &conv)?;
        let upstream = [
            &fixture_input(&case, "grad.skip")?,
            &fixture_input(&case, "grad.pooled")?,
        ];
        let dx = conv3x3_silu_pool_backward(upstream, &full, ConvSaved::of(&x), &conv, true, layer.grads())?;
        case.check("grad.x", ensure_some(dx)?.as_slice()?)?;
        check_parameters(&case, &layer)?;
    }
    Ok(())
}

fn cpu_upsample_equals_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.upsample_conv3x3.") {
        let (x, dy) = (fixture_input(&case, "x")?, fixture_input(&case, "grad.y")?);
        let mut layer = fixture_layer(&case, &[x.dim(3)])?;
        let conv = layer.conv.clone();
        let dx = upsample_conv3x3_backward(&dy, &x, &conv, true, layer.grads())?;
        case.check("grad.x", ensure_some(dx)?.as_slice()?)?;
        check_parameters(&case, &layer)?;
    }
    Ok(())
}

fn cpu_two_sources_equal_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.two_source_conv.") {
        let (a, b) = (fixture_input(&case, "a")?, fixture_input(&case, "b")?);
        let mut layer = fixture_layer(&case, &[a.dim(3), b.dim(3)])?;
        let conv = layer.conv.clone();
        let saved = ConvSaved {
            second: Some(&b),
            ..ConvSaved::of(&a)
        };
        let dy = fixture_input(&case, "grad.y")?;
        let SourceGrads { x, second } =
            conv2d_backward(&dy, saved, &conv, Activation::Silu, [true, true], layer.grads())?;
        case.check("grad.a", ensure_some(x)?.as_slice()?)?;
        case.check("grad.b", ensure_some(second)?.as_slice()?)?;
        check_parameters(&case, &layer)?;
    }
    Ok(())
}

/// A frozen convolution gives the same gradients of its sources; gradients of parameters are added; nothing else is made.
fn only_what_is_asked_for() -> Outcome {
    let device = Device::Cpu;
    let (x, second) = (
        image(&device, "x", [1, 5, 4, 8])?,
        image(&device, "second", [1, 5, 4, 3])?,
    );
    let dy = image(&device, "dy", [1, 5, 4, 6])?;
    let mut layer = Layer::new(&device, 3, &[8, 3], 6)?;
    let conv = layer.conv.clone();
    let before = (layer.weight.to_vec::<f32>()?, layer.bias.to_vec::<f32>()?);
    let run = |want: [bool; 2], grads: Option<ConvGrads<'_>>| {
        let saved = ConvSaved {
            second: Some(&second),
            ..ConvSaved::of(&x)
        };
        conv2d_backward(&dy, saved, &conv, Activation::Silu, want, grads)
    };
    let all = run([true, true], layer.grads())?;
    let frozen = run([true, false], None)?;
    assert!(frozen.second.is_none());
    assert!(ensure_some(frozen.x)?.as_slice::<f32>()? == ensure_some(all.x)?.as_slice::<f32>()?);
    let mut trained = Layer::new(&device, 3, &[8, 3], 6)?;
    let none = run([false, false], trained.grads())?;
    assert!(none.x.is_none() && none.second.is_none());
    assert!(trained.weight.as_slice::<f32>()? == layer.weight.as_slice::<f32>()?);
    // Twice the same gradient on top of what was there.
    let once: Vec<f32> = layer
        .weight
        .as_slice::<f32>()?
        .iter()
        .zip(&before.0)
        .map(|(a, b)| a - b)
        .collect();
    run([false, false], trained.grads())?;
    let twice: Vec<f32> = trained
        .weight
        .as_slice::<f32>()?
        .iter()
        .zip(&before.0)
        .map(|(a, b)| (a - b) / 2.0)
        .collect();
    expect_close("weights twice", &twice, &once, layer.weight.shape(), 1e-5)?;
    assert!(once.iter().any(|value| *value != 0.0));
    let bias: Vec<f32> = layer
        .bias
        .as_slice::<f32>()?
        .iter()
        .zip(&before.1)
        .map(|(a, b)| a - b)
        .collect();
    let twice: Vec<f32> = trained
        .bias
        .as_slice::<f32>()?
        .iter()
        .zip(&before.1)
        .map(|(a, b)| (a - b) / 2.0)
        .collect();
    expect_close("bias twice", &twice, &bias, [6], 1e-5)
}

fn kept_sums_change_nothing() -> Outcome {
    let device = Device::Cpu;
    let x = image(&device, "x", [2, 5, 6, 8])?;
    let dy = image(&device, "dy", [2, 5, 6, 4])?;
    let conv = Layer::new(&device, 3, &[8], 4)?.conv;
    let (y, sum) = conv2d_silu_with_sum(&x, None, &conv)?;
    assert!(y.as_slice::<f32>()? == conv2d(&x, None, &conv, Activation::Silu, None)?.as_slice::<f32>()?);
    let gradient = |sum: Option<Tensor>| {
        let saved = ConvSaved {
            sum,
            ..ConvSaved::of(&x)
        };
        let grads = conv2d_backward(&dy, saved, &conv, Activation::Silu, [true, false], None)?;
        grads.x.map(|dx| dx.to_vec::<f32>()).transpose()
    };
    let again = gradient(None)?;
    assert!(again.is_some() && gradient(Some(sum))? == again);

    let (full, pooled, sum) = conv3x3_silu_pool_with_sum(&x, &conv)?;
    let (expected_full, expected_pooled) = conv3x3_silu_pool(&x, &conv)?;
    assert!(full.as_slice::<f32>()? == expected_full.as_slice::<f32>()?);
    assert!(pooled.as_slice::<f32>()? == expected_pooled.as_slice::<f32>()?);
    let d_pooled = image(&device, "d_pooled", [2, 2, 3, 4])?;
    let gradient = |sum: Option<Tensor>| {
        let saved = ConvSaved {
            sum,
            ..ConvSaved::of(&x)
        };
        let dx = conv3x3_silu_pool_backward([&dy, &d_pooled], &full, saved, &conv, true, None)?;
        dx.map(|dx| dx.to_vec::<f32>()).transpose()
    };
    let again = gradient(None)?;
    assert!(again.is_some() && gradient(Some(sum))? == again);
    Ok(())
}

/// With all sums equal the first pixel of each window gets the gradient; a last odd row and column get none.
fn first_of_equal_maxima(device: &Device) -> Outcome {
    let shape = [1, 5, 7, 8];
    let x = Tensor::zeros(device, shape, device.compute_dtype())?;
    let conv = Conv::new(
        Tensor::zeros(device, [8, 72], device.compute_dtype())?,
        Tensor::from_f32(device, &[3.0; 8], [8])?,
        3,
        &[8],
    )?;
    let (full, _) = conv3x3_silu_pool(&x, &conv)?;
    let d_full = Tensor::zeros(device, shape, device.compute_dtype())?;
    let d_pooled = Tensor::from_f32(device, &[1.0; 2 * 3 * 8], [1, 2, 3, 8])?;
    // The bias alone decides; its gradient is that of silu at 3 for each of the six windows.
    let mut layer = Layer::of(conv, vec![0.0; 576], vec![0.0; 8])?;
    let conv = layer.conv.clone();
    conv3x3_silu_pool_backward(
        [&d_full, &d_pooled],
        &full,
        ConvSaved::of(&x),
        &conv,
        false,
        layer.grads(),
    )?;
    let sigmoid = 1.0 / (1.0 + (-3.0f32).exp());
    let expected = 6.0 * sigmoid * (1.0 + 3.0 * (1.0 - sigmoid));
    expect_close("bias", &layer.bias.to_vec_f32()?, &[expected; 8], [8], TWICE_ROUNDED)?;
    // The source shows where: with x = 0 but for one tap the weight's gradient tells which pixel sent it.
    for (index, first) in (0..35).map(|index| (index, index / 7 % 2 == 0 && index % 7 % 2 == 0)) {
        let mut values = vec![0.0; 35 * 8];
        values[index * 8] = 1.0;
        let x = Tensor::from_f32(device, &values, shape)?;
        let mut layer = Layer::of(conv.clone(), vec![0.0; 576], vec![0.0; 8])?;
        conv3x3_silu_pool_backward(
            [&d_full, &d_pooled],
            &full,
            ConvSaved::of(&x),
            &conv,
            false,
            layer.grads(),
        )?;
        let centre = layer.weight.to_vec_f32()?[4 * 8];
        let in_window = index / 7 < 4 && index % 7 < 6;
        assert_eq!(centre != 0.0, first && in_window, "pixel {index}: {centre}");
    }
    Ok(())
}

/// A convolution to no channels has parameters of no elements.
fn without_outputs_nothing_is_added() -> Outcome {
    let device = Device::Cpu;
    let (x, dy) = (image(&device, "x", [1, 4, 4, 8])?, image(&device, "dy", [1, 4, 4, 0])?);
    let mut layer = Layer::new(&device, 3, &[8], 0)?;
    let conv = layer.conv.clone();
    let saved = ConvSaved::of(&x);
    let none = conv2d_backward(&dy, saved, &conv, Activation::None, [false, false], layer.grads())?;
    assert!(none.x.is_none() && none.second.is_none());
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let device = Device::Cpu;
    let x = image(&device, "x", [1, 4, 4, 8])?;
    let dy = image(&device, "dy", [1, 4, 4, 6])?;
    let mut layer = Layer::new(&device, 3, &[8], 6)?;
    let conv = layer.conv.clone();
    let message = |dy: &Tensor, saved: ConvSaved<'_>, want: [bool; 2], grads: Option<ConvGrads<'_>>| {
        let outcome = conv2d_backward(dy, saved, &conv, Activation::Silu, want, grads);
        outcome.map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(
        message(&x, ConvSaved::of(&x), [true, false], None),
        "conv2d_backward: dy has shape [1, 4, 4, 8], expected [1, 4, 4, 6]"
    );
    assert_eq!(
        message(&dy, ConvSaved::of(&x), [true, true], None),
        "conv2d_backward: the gradient of a second source is wanted, but there is none"
    );
    let mut short = Tensor::zeros(&device, [6, 8], DType::F32)?;
    let grads = ConvGrads {
        weight: &mut short,
        bias: &mut layer.bias,
    };
    assert_eq!(
        message(&dy, ConvSaved::of(&x), [false, false], Some(grads)),
        "conv2d_backward: the weight's gradient has shape [6, 8], expected [6, 72]"
    );
    let (_, sum) = conv2d_silu_with_sum(&x, None, &conv)?;
    let shared = ConvSaved {
        sum: Some(sum.clone()),
        ..ConvSaved::of(&x)
    };
    assert_eq!(
        message(&dy, shared, [true, false], None),
        "a tensor that shares its buffer cannot be written"
    );
    let pointwise = Layer::new(&device, 1, &[8], 6)?.conv;
    let rounded = Tensor::zeros(&device, [1, 4, 4, 6], DType::Bf16)?;
    let outcome = conv2d_f32_backward(&rounded, &x, &pointwise, 1.0, true, None);
    assert_eq!(
        outcome.map(|_| ()).unwrap_err().to_string(),
        "conv2d_f32_backward: dy holds bf16, expected f32"
    );
    let outcome = upsample_conv3x3_backward(&dy, &x, &pointwise, true, None);
    assert_eq!(
        outcome.map(|_| ()).unwrap_err().to_string(),
        "upsample_conv3x3_backward: the kernel is 1x1, expected 3x3"
    );
    Ok(())
}
