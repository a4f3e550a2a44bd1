//! Crops at random places, the same in every set: what FID-patch is computed of, by whatever extracts the features.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use l2p_engine::flow::MersenneTwister;
use l2p_engine::image_io::{RgbImage, WriteOptions, read_header, read_image, write_image};
use rayon::prelude::*;
use serde_json::json;

use super::arguments::Crops;
use super::{CHUNK, Scores, columns, folders, go_on, shown};
use crate::progress::PhaseBar;

/// The set that the others' pictures are matched with.
const REFERENCE: &str = "reference";

/// A picture's name, and the upper left corners of its crops.
struct Place {
    name: PathBuf,
    size: [usize; 2],
    corners: Vec<[usize; 2]>,
}

/// Writes crops of all sets.
///
/// # Errors
/// Naming pictures that have no counterpart, are of another size or smaller than a crop; when the disk does not take a file.
pub fn write(arguments: &Crops) -> anyhow::Result<Scores> {
    let (side, out) = (arguments.side.get(), &arguments.out);
    let mut sets = vec![(REFERENCE.to_owned(), folders::pictures(&arguments.against)?)];
    for set in &arguments.sets {
        folders::pairs(&set.path, &arguments.against)?;
        let is_plain = matches!(
            Path::new(&set.name).components().collect::<Vec<_>>()[..],
            [Component::Normal(_)]
        );
        if !is_plain || sets.iter().any(|(name, _)| *name == set.name) {
            bail!(
                "`{}` cannot be the name of a folder of crops, or is there twice: give it another, NAME=DIR",
                set.name
            );
        }
        sets.push((set.name.clone(), folders::pictures(&set.path)?));
    }
    let places = places(arguments)?;
    let mut display = PhaseBar::new();
    let mut rows = Vec::new();
    for (name, pictures) in &sets {
        let folder = out.join(name);
        for (index, chunk) in places.chunks(CHUNK).enumerate() {
            display.show("cropping", (index * CHUNK) as u64, places.len() as u64);
            go_on()?;
            chunk
                .par_iter()
                .try_for_each(|place| crop(place, &pictures[&place.name], &folder, side))?;
        }
        let count = places.len() * arguments.per_picture.get();
        rows.push(vec![
            folder.display().to_string(),
            format!("{count} crops of {side}x{side}"),
        ]);
    }
    display.clear();
    Ok(Scores {
        table: columns(&rows),
        value: json!({
            "folders": sets.iter().map(|(name, _)| shown(&out.join(name))).collect::<Vec<_>>(),
            "crops": places.len() * arguments.per_picture.get(),
            "side": side,
            "seed": arguments.seed,
        }),
    })
}

/// Where the crops are: one generator, picture by picture in the order of their names.
fn places(arguments: &Crops) -> anyhow::Result<Vec<Place>> {
    let side = arguments.side.get();
    let mut words = MersenneTwister::new(arguments.seed.get() as u32);
    let mut place = |(name, path): (PathBuf, PathBuf)| {
        let header = read_header(&path)?;
        let size = [header.height, header.width];
        if size[0].min(size[1]) < side {
            bail!(
                "{}: has {}x{} pixels, too few for a crop of {side}x{side}",
                path.display(),
                size[1],
                size[0]
            );
        }
        let mut corner = |length: usize| ((u64::from(words.word()) * (length - side + 1) as u64) >> 32) as usize;
        let corners = (0..arguments.per_picture.get()).map(|_| size.map(&mut corner));
        Ok(Place {
            name,
            size,
            corners: corners.collect(),
        })
    };
    folders::pictures(&arguments.against)?
        .into_iter()
        .map(&mut place)
        .collect()
}

fn crop(place: &Place, path: &Path, folder: &Path, side: usize) -> anyhow::Result<()> {
    let image = read_image(path)?;
    if [image.height(), image.width()] != place.size {
        bail!(
            "{}: has {}x{} pixels, its counterpart {}x{}: crops at the same places need one size",
            path.display(),
            image.width(),
            image.height(),
            place.size[1],
            place.size[0]
        );
    }
    for (number, [top, left]) in place.corners.iter().enumerate() {
        let rows = (*top..top + side).flat_map(|row| &image.pixels()[3 * (row * image.width() + left)..][..3 * side]);
        let crop = RgbImage::new(side, side, rows.copied().collect())?;
        let mut name = place.name.clone().into_os_string();
        name.push(format!("-{}.png", number + 1));
        let target = folder.join(name);
        let parent = target.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make the folder {}", parent.display()))?;
        write_image(&target, &crop, &WriteOptions::default())?;
    }
    Ok(())
}
