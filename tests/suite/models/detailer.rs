use l2p_engine::layers::MemoryParams;
use l2p_engine::model::detailer::{Detailer, DetailerLayout};
use l2p_engine::{Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_like_cpu};

use super::{channels_first, input_image, params, rounded, rounded_params};

const PREFIX: &str = "local_decoder";

pub fn register(suite: &mut Suite) {
    suite.cpu("models::detailer::cpu_equals_torch", cpu_equals_torch);
    suite.cpu("models::detailer::layouts_are_read_off_the_names", layouts_are_read);
    suite.cpu("models::detailer::mistakes_are_named", mistakes_are_named);
    suite.cuda("models::detailer::cuda_equals_cpu", cuda_equals_cpu);
}

/// Some fifteen layers, each rounded to bf16.
const BF16_HEAD_TOLERANCE: f64 = 2e-2;

fn cpu_equals_torch() -> Outcome {
    let group = Group::load("heads");
    for case in group.cases("") {
        let head = Detailer::load(&params(&case), &Device::Cpu, PREFIX)?;
        let v = head.forward(&input_image(&case, "x")?, &input_image(&case, "c")?)?;
        case.check("v", &channels_first(&v)?)?;
    }
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let group = Group::load("heads");
    for case in group.cases("") {
        let params = rounded_params(&case);
        let (x, c) = (input_image(&case, "x")?, input_image(&case, "c")?);
        let (x_values, c_values) = (rounded(x.as_slice()?), rounded(c.as_slice()?));
        expect_like_cpu(case.name(), device, BF16_HEAD_TOLERANCE, |device| {
            let head = Detailer::load(&params, device, PREFIX)?;
            let c = Tensor::from_f32(device, &c_values, c.shape())?;
            // The image is taken in the compute type, and in f32 as the sampler holds it.
            let rounded = Tensor::from_f32(device, &x_values, x.shape())?;
            let single = Tensor::from_slice(device, &x_values, x.shape())?;
            Ok(vec![head.forward(&rounded, &c)?, head.forward(&single, &c)?])
        })?;
    }
    Ok(())
}

fn layouts_are_read() -> Outcome {
    let group = Group::load("heads");
    let layout = |case: &str| DetailerLayout::read(&params(&group.case(case)), PREFIX);
    let names =
        |layout: &DetailerLayout| -> Vec<String> { layout.stages.iter().map(|stage| stage.name.clone()).collect() };
    let one = layout("1k_published")?;
    assert_eq!(names(&one), ["1", "2", "3", "4"]);
    assert_eq!((one.context, one.bottleneck, one.reduction()), (3840, 512, 16));
    let outputs: Vec<usize> = one.stages.iter().map(|stage| stage.outputs).collect();
    assert_eq!(outputs, [64, 64, 128, 256]);
    assert_eq!(names(&layout("4k")?), ["0", "0b", "1", "2", "3", "4"]);
    assert_eq!(names(&layout("8k")?), ["_8k", "0", "0b", "1", "2", "3", "4"]);
    let ten = layout("10k")?;
    assert_eq!(names(&ten), ["_10k_a", "0", "0b", "1", "2", "3"]);
    assert_eq!((ten.stages[0].inputs, ten.stages[0].skip), (3, 3));
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let group = Group::load("heads");
    let case = group.case("1k");
    let message = |change: &dyn Fn(&mut MemoryParams)| {
        let mut params = params(&case);
        change(&mut params);
        let outcome = Detailer::load(&params, &Device::Cpu, PREFIX);
        outcome.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let reshaped = |name: &str, shape: &[usize]| {
        message(&|params| params.insert(format!("{PREFIX}.{name}"), shape, vec![0.0; shape.iter().product()]))
    };
    assert_eq!(
        reshaped("enc2.0.weight", &[16, 9, 3, 3]),
        "`local_decoder.enc2.0.weight` has shape [16, 9, 3, 3], expected [16, 8, 3, 3]"
    );
    assert_eq!(
        reshaped("dec4.0.weight", &[24, 60, 3, 3]),
        "`local_decoder.dec4.0.weight` has shape [24, 60, 3, 3], expected [24, 64, 3, 3]"
    );
    assert_eq!(
        reshaped("out_conv.weight", &[4, 8, 1, 1]),
        "`local_decoder.out_conv.weight` has shape [4, 8, 1, 1], expected [3, 8, 1, 1]"
    );
    assert_eq!(
        reshaped("bottleneck.0.weight", &[32, 32, 1, 1]),
        "`local_decoder.bottleneck.0.weight` reads 32 channels, but the last encoder stage alone gives 32"
    );
    assert!(reshaped("enc2.0.bias", &[15]).contains("local_decoder.enc2.0.bias"));
    let missing = message(&|params| drop(params.0.remove("local_decoder.up3.1.weight")));
    assert_eq!(missing, "there is no parameter `local_decoder.up3.1.weight`");
    let nothing = message(&|params| params.0.clear());
    assert_eq!(
        nothing,
        "there is no detailer head `local_decoder`: it has no stage `local_decoder.enc1.0.weight` or no \
         `local_decoder.bottleneck.0.weight`"
    );
    let head = Detailer::load(&params(&case), &Device::Cpu, PREFIX)?;
    let (x, c) = (
        Tensor::from_f32(&Device::Cpu, &[0.0; 24 * 16 * 3], [1, 24, 16, 3])?,
        Tensor::from_f32(&Device::Cpu, &[0.0; 256], [1, 1, 1, 256])?,
    );
    assert_eq!(
        head.forward(&x, &c).unwrap_err().to_string(),
        "detailer: an image of 24x16 cannot be halved 4 times: height and width must be multiples of 16"
    );
    Ok(())
}
