//! Pictures that begin with another one.

use l2p_engine::image_io::{Filter, RgbImage, read_cover};
use l2p_engine::pipeline::{Settings, StartImage};
use l2p_engine::serve::{Request, Worker};
use l2p_engine::{Device, Result};
use l2p_tests::{Outcome, Suite, models_folder};

use super::{draw, small, worker};

pub fn register(suite: &mut Suite) {
    suite.cpu("serve::start::a_start_image_is_left_by_its_strength", strengths);
    suite.cpu("serve::start::start_images_of_other_sizes_are_refused", refused);
}

/// One of the demo's pictures, which its autoencoder knows how to keep.
fn fox(side: usize) -> Result<RgbImage> {
    let path = models_folder().join("demo/pictures/fox.webp");
    read_cover(&path, side, side, Filter::default())
}

/// The mean difference of two pictures' bytes.
fn difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let pairs = a.pixels().iter().zip(b.pixels());
    let sum: f64 = pairs.map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).sum();
    sum / a.pixels().len() as f64
}

fn from(
    worker: &Worker,
    settings: Settings,
    strength: Option<f32>,
) -> std::result::Result<RgbImage, libtest_mimic::Failed> {
    let start = match strength {
        Some(strength) => Some(StartImage {
            image: fox(settings.width)?,
            strength,
            kept: None,
        }),
        None => None,
    };
    let request = Request {
        start,
        ..Request::of("smiling face with sunglasses", settings, 3)
    };
    Ok(draw(worker, request)?.pictures.remove(0))
}

fn strengths() -> Outcome {
    for name in ["source", "pixel"] {
        let worker = worker(name, &Device::Cpu)?;
        let settings = Settings {
            width: 128,
            height: 128,
            steps: 20,
            shift: 1.0,
            cfg: 1.0,
            solver: l2p_engine::flow::solver::Solver::Euler,
        };
        let start = fox(settings.width)?;
        let free = from(&worker, settings, None)?;
        assert!(
            from(&worker, settings, Some(1.0))? == free,
            "{name}: full strength leaves nothing of the start image"
        );
        let differences: Vec<f64> = [0.05, 0.5, 0.9]
            .into_iter()
            .map(|strength| {
                Ok::<f64, libtest_mimic::Failed>(difference(&from(&worker, settings, Some(strength))?, &start))
            })
            .collect::<std::result::Result<_, _>>()?;
        println!("{name}: {differences:?}");
        assert!(
            differences.is_sorted() && differences[0] < 12.0,
            "{name}: {differences:?} are no growing distances"
        );
    }
    Ok(())
}

fn refused() -> Outcome {
    let worker = worker("pixel", &Device::Cpu)?;
    let settings = small(&worker)?;
    for (side, strength, word) in [(32, 0.5, "32x32 pixels, but 64x64"), (64, 0.0, "a strength of 0")] {
        let request = Request {
            start: Some(StartImage {
                image: fox(side)?,
                strength,
                kept: None,
            }),
            ..Request::of("fox", settings, 3)
        };
        let message = worker.draw(request).err().ok_or("accepted")?.to_string();
        assert!(message.contains(word), "{message}");
    }
    Ok(())
}
