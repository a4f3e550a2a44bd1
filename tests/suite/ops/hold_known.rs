use l2p_engine::ops::hold_known::hold_known;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite, expect_like_cpu, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::hold_known::places_are_held_as_the_mask_says", by_the_mask);
    suite.cpu("ops::hold_known::wrong_arguments_are_named", wrong_arguments);
    suite.cuda("ops::hold_known::cuda_equals_cpu", cuda_equals_cpu);
}

/// Masks with places of every kind.
fn mask(places: usize) -> Vec<u8> {
    (0..places)
        .map(|place| [0, 255, 77, 255, 0, 200, 1][place % 7])
        .collect()
}

fn by_the_mask() -> Outcome {
    let [batch, height, width, channels] = [2, 3, 5, 3];
    let item = height * width * channels;
    let values = |name: &str, items: usize| random(name, items * item);
    let (before, known, noise, mask) = (
        values("x", batch),
        values("known", 1),
        values("noise", batch),
        mask(height * width),
    );
    let device = Device::Cpu;
    for [a, b] in [[0.25f32, 0.75], [1.0, 0.0], [0.0, 1.0]] {
        let mut x = Tensor::from_slice(&device, &before, [batch, height, width, channels])?;
        hold_known(
            &mut x,
            &Tensor::from_slice(&device, &known, [1, height, width, channels])?,
            &Tensor::from_slice(&device, &noise, [batch, height, width, channels])?,
            &Tensor::from_slice(&device, &mask, [1, height, width, 1])?,
            [a, b],
        )?;
        for (index, &after) in x.as_slice::<f32>()?.iter().enumerate() {
            let place = mask[index % item / channels];
            let held = f64::from(a) * f64::from(known[index % item]) + f64::from(b) * f64::from(noise[index]);
            let expected = held + f64::from(place) / 255.0 * (f64::from(before[index]) - held);
            assert!(
                (f64::from(after) - expected).abs() < 1e-6,
                "{index}: {after} instead of {expected}"
            );
            match place {
                255 => assert_eq!(after.to_bits(), before[index].to_bits()),
                0 if [a, b] == [1.0, 0.0] => assert_eq!(after, known[index % item]),
                _ => {}
            }
        }
    }
    Ok(())
}

fn wrong_arguments() -> Outcome {
    let device = Device::Cpu;
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype);
    let (image, bytes) = (zeros(&[1, 2, 3, 3], DType::F32)?, zeros(&[1, 2, 3, 1], DType::U8)?);
    let mut x = zeros(&[2, 2, 3, 3], DType::F32)?;
    let noise = zeros(&[2, 2, 3, 3], DType::F32)?;
    let mut message = |known: &Tensor, noise: &Tensor, mask: &Tensor| {
        hold_known(&mut x, known, noise, mask, [1.0, 0.0])
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        message(&noise, &noise, &bytes),
        "hold_known: known has shape [2, 2, 3, 3], expected [1, 2, 3, 3]"
    );
    assert_eq!(
        message(&image, &image, &bytes),
        "hold_known: noise has shape [1, 2, 3, 3], expected [2, 2, 3, 3]"
    );
    assert_eq!(
        message(&image, &noise, &image),
        "hold_known: mask holds f32, expected u8"
    );
    assert_eq!(
        message(&image, &noise, &zeros(&[1, 3, 2, 1], DType::U8)?),
        "hold_known: mask has shape [1, 3, 2, 1], expected [1, 2, 3, 1]"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for [batch, height, width, channels] in [[1, 1, 1, 3], [2, 3, 5, 3], [1, 64, 96, 3], [3, 17, 31, 16]] {
        let item = height * width * channels;
        expect_like_cpu(
            &format!("{batch}x{height}x{width}x{channels}"),
            device,
            // Every bit.
            0.0,
            |device| {
                let tensor = |name: &str, items: usize| {
                    Tensor::from_slice(device, &random(name, items * item), [items, height, width, channels])
                };
                let mask = Tensor::from_slice(device, &mask(height * width), [1, height, width, 1])?;
                let mut x = tensor("x", batch)?;
                hold_known(
                    &mut x,
                    &tensor("known", 1)?,
                    &tensor("noise", batch)?,
                    &mask,
                    [0.3, 0.7],
                )?;
                Ok(vec![x])
            },
        )?;
    }
    Ok(())
}
