//! Tables of distances between sets of features, whoever made these.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use l2p_engine::Device;
use l2p_engine::checkpoint::{ModelPaths, PathOverrides};
use nalgebra::DMatrix;
use serde_json::{Value, json};

use super::arguments::{Features, SubsetFlags, Vae};
use super::arrays::{self, Features as Content};
use super::frechet::Moments;
use super::kernel::{self, Kernel, Subsets};
use super::vae::Extractor;
use super::{Scores, columns, go_on, shown};
use crate::progress::PhaseBar;

/// Pictures in a subset of KID, where sets have so many.
const SUBSET: usize = 1000;

/// What sets are compared with.
struct Reference {
    moments: Moments,
    /// The features themselves, where they are known.
    samples: Option<DMatrix<f64>>,
}

impl Reference {
    fn of(features: Content) -> anyhow::Result<Self> {
        let moments = Moments::of(&features)?;
        Ok(Reference {
            moments,
            samples: match features {
                Content::Samples(samples) => Some(samples),
                Content::Moments { .. } => None,
            },
        })
    }
}

/// Distances of one set.
struct Distances {
    pictures: Option<usize>,
    fid: f64,
    kid: Option<(Kernel, Subsets)>,
}

impl Distances {
    fn between(
        set: Content,
        reference: &Reference,
        flags: &SubsetFlags,
        display: &mut PhaseBar,
    ) -> anyhow::Result<Self> {
        display.show("Fréchet distance", 0, 1);
        let set = Reference::of(set)?;
        let fid = set.moments.distance(&reference.moments)?;
        go_on()?;
        let kid = match (&set.samples, &reference.samples) {
            (Some(first), Some(second)) => Some(kernel_distance(first, second, flags, display)?),
            _ => None,
        };
        Ok(Distances {
            pictures: set.moments.samples,
            fid,
            kid,
        })
    }

    fn row(&self, name: &str) -> Vec<String> {
        let (kid, deviation) = match self.kid {
            Some((kid, _)) => (format!("{:.6}", kid.mean), format!("{:.6}", kid.deviation)),
            None => ("-".into(), "-".into()),
        };
        let pictures = self.pictures.map_or("?".into(), |pictures| pictures.to_string());
        vec![name.into(), pictures, significant(self.fid), kid, deviation]
    }

    fn json(&self, name: &str, path: &std::path::Path) -> Value {
        json!({
            "name": name,
            "path": shown(path),
            "pictures": self.pictures,
            "fid": self.fid,
            "kid": self.kid.map(|(kid, _)| kid.mean),
            "kid_deviation": self.kid.map(|(kid, _)| kid.deviation),
            "kid_subset_size": self.kid.map(|(_, subsets)| subsets.size),
        })
    }
}

fn kernel_distance(
    first: &DMatrix<f64>,
    second: &DMatrix<f64>,
    flags: &SubsetFlags,
    display: &mut PhaseBar,
) -> anyhow::Result<(Kernel, Subsets)> {
    let fewest = first.ncols().min(second.ncols());
    let subsets = Subsets {
        count: flags.subsets.get(),
        size: flags.subset_size.map_or(SUBSET.min(fewest), |size| size.get()),
        seed: flags.seed.get() as u32,
    };
    display.show("kernel distance", 0, subsets.count as u64);
    let done = AtomicU64::new(0);
    let display = std::sync::Mutex::new(display);
    let distance = kernel::distance(first, second, subsets, &|| {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        // Whoever finds it in use leaves it to the next.
        if let Ok(mut display) = display.try_lock() {
            display.show("kernel distance", done, subsets.count as u64);
        }
        go_on()
    })?;
    Ok((distance, subsets))
}

fn header() -> Vec<Vec<String>> {
    vec![["set", "pictures", "FID", "KID", "±"].map(String::from).to_vec()]
}

/// A number with five digits that mean something, of very small ones fewer.
fn significant(value: f64) -> String {
    const DIGITS: i32 = 5;
    let before = if value == 0.0 {
        0
    } else {
        value.abs().log10().floor() as i32
    };
    let after = (DIGITS - 1 - before).clamp(0, 8) as usize;
    format!("{value:.after$}")
}

/// A word on sets of which the covariance has no full rank.
fn word_on_few(name: &str, pictures: Option<usize>, dimensions: usize) {
    if let Some(pictures) = pictures.filter(|pictures| *pictures <= dimensions) {
        crate::say(format_args!(
            "note: {name} has {pictures} pictures for features of {dimensions} dimensions: its FID is far too high, compare KID alone"
        ));
    }
}

/// Between files.
///
/// # Errors
/// Naming the file that cannot be read or compared.
pub fn of_features(arguments: &Features) -> anyhow::Result<Scores> {
    let key = arguments.key.as_deref();
    let named = |path: &std::path::Path| path.display().to_string();
    let mut display = PhaseBar::new();
    display.show("reading", 0, 1);
    let reference = arrays::features(&arguments.against, key)?;
    let reference = Reference::of(reference).with_context(|| named(&arguments.against))?;
    let dimensions = reference.moments.dimensions();
    word_on_few("the reference", reference.moments.samples, dimensions);
    let (mut rows, mut values) = (header(), Vec::new());
    for set in &arguments.sets {
        let found = Distances::between(
            arrays::features(&set.path, key)?,
            &reference,
            &arguments.subsets,
            &mut display,
        )
        .with_context(|| named(&set.path))?;
        word_on_few(&set.name, found.pictures, dimensions);
        rows.push(found.row(&set.name));
        values.push(found.json(&set.name, &set.path));
    }
    display.clear();
    Ok(Scores {
        table: columns(&rows),
        value: json!({ "against": shown(&arguments.against), "dimensions": dimensions, "sets": values }),
    })
}

/// Between folders, in the space of a VAE.
///
/// # Errors
/// Naming the picture, folder or part of the model that cannot be read.
pub fn in_vae(arguments: &Vae) -> anyhow::Result<Scores> {
    let overrides = PathOverrides {
        vae: arguments.vae.clone(),
        ..PathOverrides::default()
    };
    let paths = ModelPaths::resolve(&arguments.model, &overrides)?;
    let device = Device::open(arguments.device)?;
    let side = arguments.side.map(|side| side.get());
    let extractor = Extractor::open(&paths, device, side, arguments.grid.get())?;
    let mut display = PhaseBar::new();
    let encode = |folder: &std::path::Path, display: &mut PhaseBar| {
        extractor
            .features(folder, &mut |done, all| {
                display.show("encoding pictures", done as u64, all as u64);
                go_on()
            })
            .map(Content::Samples)
    };
    let reference = Reference::of(encode(&arguments.against, &mut display)?)
        .with_context(|| arguments.against.display().to_string())?;
    word_on_few("the reference", reference.moments.samples, extractor.dimensions());
    let (mut rows, mut values) = (header(), Vec::new());
    for set in &arguments.sets {
        let features = encode(&set.path, &mut display)?;
        let found = Distances::between(features, &reference, &arguments.subsets, &mut display)
            .with_context(|| set.path.display().to_string())?;
        word_on_few(&set.name, found.pictures, extractor.dimensions());
        rows.push(found.row(&set.name));
        values.push(found.json(&set.name, &set.path));
    }
    display.clear();
    Ok(Scores {
        table: format!("{}features: {}\n", columns(&rows), extractor.describe()),
        value: json!({
            "against": shown(&arguments.against),
            "features": extractor.describe(),
            "dimensions": extractor.dimensions(),
            "sets": values,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::significant;

    #[test]
    fn small_distances_have_digits_too() {
        for (value, text) in [
            (0.0, "0.0000"),
            (3.277943e-5, "0.00003278"),
            (0.0111096, "0.011110"),
            (33.4567, "33.457"),
            (123456.7, "123457"),
            (-2.5e-12, "-0.00000000"),
        ] {
            assert_eq!(significant(value), text);
        }
    }
}
