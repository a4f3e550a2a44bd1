//! A picture's own noise.

use l2p_engine::Device;
use l2p_engine::flow::TorchNormal;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_tests::{Outcome, Suite};

const SOURCES: [NoiseSource; 2] = [NoiseSource::Philox, NoiseSource::Torch];

pub fn register(suite: &mut Suite) {
    suite.cpu("flow::noise_source::torch_draws_planes", torch_draws_planes);
    suite.cpu(
        "flow::noise_source::seeds_stand_for_themselves",
        seeds_stand_for_themselves,
    );
    suite.cpu("flow::noise_source::names_are_read", names_are_read);
}

/// PyTorch draws `[1, channels, height, width]`, the engine keeps channels last.
fn torch_draws_planes() -> Outcome {
    let (height, width, channels) = (3, 5, 4);
    let seeds = [7, 11];
    let noise = NoiseSource::Torch.noise(&Device::Cpu, &seeds, [height, width, channels])?;
    assert_eq!(noise.shape().to_vec(), [2, height, width, channels]);
    let noise = noise.to_vec_f32()?;
    for (item, seed) in seeds.into_iter().enumerate() {
        let planes = TorchNormal::new(seed).sample(height * width * channels);
        for row in 0..height {
            for column in 0..width {
                for channel in 0..channels {
                    let found = noise[((item * height + row) * width + column) * channels + channel];
                    let drawn = planes[(channel * height + row) * width + column];
                    assert_eq!(
                        found, drawn,
                        "seed {seed}, row {row}, column {column}, channel {channel}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// A picture is the same whatever else is drawn beside it, and another one for another seed.
fn seeds_stand_for_themselves() -> Outcome {
    for source in SOURCES {
        let draw = |seeds: &[u64]| source.noise(&Device::Cpu, seeds, [4, 4, 3])?.to_vec_f32();
        let (together, first, last) = (draw(&[5, 6, 1 << 40])?, draw(&[5])?, draw(&[1 << 40])?);
        assert_eq!((&together[..48], &together[96..]), (&first[..], &last[..]), "{source}");
        assert_ne!(together[..48], together[48..96], "{source}");
    }
    Ok(())
}

fn names_are_read() -> Outcome {
    for source in SOURCES {
        assert_eq!(source.to_string().parse::<NoiseSource>()?, source);
    }
    let message = "numpy".parse::<NoiseSource>().unwrap_err().to_string();
    assert_eq!(message, "`numpy` names no generator; use philox or torch");
    assert_eq!(NoiseSource::default(), NoiseSource::Philox);
    Ok(())
}
