//! Grids of four pictures, of which a scorer cuts the pictures out again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use l2p_engine::image_io::{RgbImage, WriteOptions, read_header, read_image, write_image};
use l2p_engine::{Error, Result};
use rayon::prelude::*;

use super::sets::{CELLS, Set};

/// Grids that are made between two looks at whether to go on.
const CHUNK: usize = 16;

/// Makes the grids of a set whose pictures are all there: those of which a picture was `drawn` now, by its number among all, and those
/// that are not there. Returns how many were made.
///
/// # Errors
/// When a picture cannot be read, the pictures of a grid differ in size, or the disk does not take it; those of `go_on`, asked now and then
/// with how many of how many are done.
pub fn make(set: &Set, drawn: &[usize], go_on: &mut dyn FnMut(usize, usize) -> Result<()>) -> Result<usize> {
    let drawn: BTreeSet<usize> = drawn.iter().map(|number| number / CELLS).collect();
    let grids = set.entries.iter().enumerate();
    let grids = grids.filter_map(|(number, entry)| Some((number, entry, set.out.join(entry.grid.as_ref()?))));
    let missing: Vec<(Vec<PathBuf>, PathBuf)> = grids
        .filter(|(number, _, grid)| drawn.contains(number) || !is_there(grid))
        .map(|(_, entry, grid)| {
            let cells = entry.pictures.iter().map(|picture| set.folder.join(picture));
            (cells.collect(), grid)
        })
        .collect();
    for (index, chunk) in missing.chunks(CHUNK).enumerate() {
        go_on(index * CHUNK, missing.len())?;
        chunk.par_iter().try_for_each(|(cells, grid)| {
            let image = grid_of(cells)?;
            write_image(grid, &image, &WriteOptions::default())
        })?;
    }
    Ok(missing.len())
}

/// Whether a grid is there and whole. Its pictures are compared when they are drawn, and it is written at once or not at all.
fn is_there(grid: &Path) -> bool {
    read_header(grid).is_ok() && read_image(grid).is_ok()
}

/// Two rows of two pictures.
fn grid_of(cells: &[PathBuf]) -> Result<RgbImage> {
    let images: Vec<RgbImage> = cells.iter().map(|cell| read_image(cell)).collect::<Result<_>>()?;
    let [a, b, c, d] = &images[..] else {
        return Err(Error::invalid(format!(
            "{} pictures make no grid of {CELLS}",
            images.len()
        )));
    };
    let (width, height) = (a.width(), a.height());
    for (image, path) in images.iter().zip(cells) {
        if (image.width(), image.height()) != (width, height) {
            return Err(Error::file(
                path,
                format!(
                    "has {}x{} pixels, the first of its grid {width}x{height}",
                    image.width(),
                    image.height()
                ),
            ));
        }
    }
    let mut pixels = Vec::with_capacity(12 * width * height);
    for (left, right) in [(a, b), (c, d)] {
        let rows = left.pixels().chunks(3 * width).zip(right.pixels().chunks(3 * width));
        rows.for_each(|(left, right)| {
            pixels.extend_from_slice(left);
            pixels.extend_from_slice(right);
        });
    }
    RgbImage::new(2 * width, 2 * height, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_in_rows() {
        let folder = tempfile::tempdir().unwrap();
        let cell = |name: &str, width: usize, grey: u8| {
            let path = folder.path().join(name);
            let image = RgbImage::new(width, 1, vec![grey; 3 * width]).unwrap();
            write_image(&path, &image, &WriteOptions::default()).unwrap();
            path
        };
        let mut cells: Vec<PathBuf> = (1..5).map(|grey| cell(&format!("{grey}.png"), 1, grey)).collect();
        let grid = grid_of(&cells).unwrap();
        assert_eq!((grid.width(), grid.height()), (2, 2));
        assert_eq!(grid.pixels(), [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]);
        cells[2] = cell("wide.png", 2, 3);
        let message = grid_of(&cells).unwrap_err().to_string();
        assert!(message.contains("wide.png") && message.contains("2x1"), "{message}");
    }
}
