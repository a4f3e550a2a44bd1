//! Masks: which places of a picture may change.

use std::path::Path;

use rayon::prelude::*;

use super::read::read_lightness;
use crate::error::{Error, Result};

/// How much each place of a picture may change: 0 stays as it is, 255 is drawn anew, and what lies between is a mixture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    width: usize,
    height: usize,
    weights: Vec<u8>,
}

impl Mask {
    /// A mask of the given extents: rows from top to bottom, a weight for each place.
    ///
    /// # Errors
    /// When an extent is 0, or `weights` does not hold one for each place.
    pub fn new(width: usize, height: usize, weights: Vec<u8>) -> Result<Self> {
        match width.checked_mul(height) == Some(weights.len()) && !weights.is_empty() {
            true => Ok(Mask { width, height, weights }),
            false => Err(Error::invalid(format!(
                "{} weights do not make a mask of {width}x{height} places",
                weights.len()
            ))),
        }
    }

    /// Reads a PNG, JPEG or WebP file as a mask. Of a picture with transparent places these may change, the more the more transparent they
    /// are; of any other the light places may, the more the lighter they are: white is drawn anew and black stays.
    ///
    /// # Errors
    /// Those of [`super::read_image`].
    pub fn read(path: &Path) -> Result<Self> {
        let picture = read_lightness(path)?;
        let (places, _) = picture.pixels().as_chunks::<3>();
        let transparent = places.iter().any(|[_, _, opacity]| *opacity != u8::MAX);
        let weights = places.iter().map(|[lightness, _, opacity]| match transparent {
            true => u8::MAX - opacity,
            false => *lightness,
        });
        Mask::new(picture.width(), picture.height(), weights.collect())
    }

    /// Places in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The weights, row after row.
    pub fn weights(&self) -> &[u8] {
        &self.weights
    }

    /// Whether everything stays as it is.
    pub fn holds_all(&self) -> bool {
        self.weights.iter().all(|&weight| weight == 0)
    }

    /// The mask with softer borders: within `reach` places of one that stays, weights rise in proportion to the distance. Places that
    /// stay still do, and what was less than that is left.
    pub fn feathered(mut self, reach: usize) -> Self {
        if reach == 0 {
            return self;
        }
        let distances = squared_distances(&self);
        let reach = reach as f64 + 1.0;
        self.weights
            .par_iter_mut()
            .zip(&distances)
            .filter(|(weight, _)| **weight > 0)
            .for_each(|(weight, &distance)| {
                let most = (255.0 * f64::from(distance).sqrt() / reach).round().min(255.0) as u8;
                *weight = most.min(*weight).max(1);
            });
        self
    }

    /// The mask for cells of `cell`x`cell` places, each with the largest weight of its places; sides are rounded up.
    pub fn of_cells(&self, cell: usize) -> Self {
        let cell = cell.max(1);
        let (width, height) = (self.width.div_ceil(cell), self.height.div_ceil(cell));
        let mut weights = vec![0; width * height];
        for (row, places) in self.weights.chunks_exact(self.width).enumerate() {
            let cells = &mut weights[row / cell * width..][..width];
            for (largest, places) in cells.iter_mut().zip(places.chunks(cell)) {
                *largest = places.iter().copied().max().unwrap_or(0).max(*largest);
            }
        }
        Mask { width, height, weights }
    }

    /// A larger mask with this one in it: so many columns and rows more at its left, top, right and bottom, each with `weight`.
    ///
    /// # Errors
    /// When no memory holds it.
    pub fn extended(&self, [left, top, right, bottom]: [usize; 4], weight: u8) -> Result<Self> {
        let (width, height) = (left + self.width + right, top + self.height + bottom);
        let mut weights = vec![weight; width.checked_mul(height).ok_or_else(|| too_large(width, height))?];
        for (row, places) in self.weights.chunks_exact(self.width).enumerate() {
            weights[(top + row) * width + left..][..self.width].copy_from_slice(places);
        }
        Mask::new(width, height, weights)
    }
}

fn too_large(width: usize, height: usize) -> Error {
    Error::invalid(format!("a mask of {width}x{height} places is too large"))
}

/// The squared distance of every place to the next one that stays, [`u32::MAX`] where none does. Source: Felzenszwalb and Huttenlocher,
/// "Distance Transforms of Sampled Functions" (2012).
fn squared_distances(mask: &Mask) -> Vec<u32> {
    let (width, height) = (mask.width, mask.height);
    // Down and up the columns: how many rows away one stays in the same column.
    let mut rows_away = vec![u32::MAX; width * height];
    let steps = (0..height).map(|row| (row, row.checked_sub(1)));
    let back = (0..height)
        .rev()
        .map(|row| (row, Some(row + 1).filter(|&below| below < height)));
    for (row, before) in steps.chain(back) {
        for column in 0..width {
            let reached = before.map_or(u32::MAX, |before| rows_away[before * width + column].saturating_add(1));
            let here = &mut rows_away[row * width + column];
            *here = match mask.weights[row * width + column] {
                0 => 0,
                _ => (*here).min(reached),
            };
        }
    }
    rows_away.par_chunks_mut(width).for_each(lower_envelope);
    rows_away
}

/// Along a row: makes of the rows away `r` of each column the least `(column − other)² + r(other)²` over all others.
fn lower_envelope(row: &mut [u32]) {
    let heights: Vec<Option<f64>> = row
        .iter()
        .map(|&away| (away != u32::MAX).then(|| f64::from(away).powi(2)))
        .collect();
    // The parabolas that are lowest somewhere, each with where that begins.
    let mut lowest: Vec<(usize, f64, f64)> = Vec::new();
    for (column, height) in heights.iter().enumerate() {
        let Some(height) = *height else { continue };
        let place = column as f64;
        let begin = loop {
            let Some(&(other, other_height, begin)) = lowest.last() else {
                break f64::NEG_INFINITY;
            };
            let other = other as f64;
            let crossing = ((height + place * place) - (other_height + other * other)) / (2.0 * (place - other));
            if crossing > begin {
                break crossing;
            }
            lowest.pop();
        };
        lowest.push((column, height, begin));
    }
    let mut at = 0;
    for (column, away) in row.iter_mut().enumerate() {
        while lowest.get(at + 1).is_some_and(|(_, _, begin)| *begin <= column as f64) {
            at += 1;
        }
        if let Some((other, height, _)) = lowest.get(at) {
            *away = ((column as f64 - *other as f64).powi(2) + height).min(f64::from(u32::MAX)) as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(rows: &[&[u8]]) -> Mask {
        Mask::new(rows[0].len(), rows.len(), rows.concat()).unwrap()
    }

    #[test]
    fn distances_are_those_to_the_next_place_that_stays() {
        let (width, height) = (23, 17);
        for seed in 0..8u64 {
            // Few places stay, in no order.
            let stays = |place: usize| (place as u64 * 2_654_435_761 + seed * 977).is_multiple_of(11 + 13 * seed);
            let weights = (0..width * height).map(|place| if stays(place) { 0 } else { 200 });
            let mask = Mask::new(width, height, weights.collect()).unwrap();
            let found = squared_distances(&mask);
            for (place, found) in found.into_iter().enumerate() {
                let squared = |other: usize| {
                    let [x, y] = [
                        (place % width).abs_diff(other % width),
                        (place / width).abs_diff(other / width),
                    ];
                    (x * x + y * y) as u32
                };
                let expected = (0..width * height).filter(|&other| stays(other)).map(squared).min();
                assert_eq!(found, expected.unwrap_or(u32::MAX), "{place} of {seed}");
            }
        }
        assert_eq!(squared_distances(&mask(&[&[9, 9]])), [u32::MAX; 2]);
    }

    #[test]
    fn borders_become_softer_within_what_may_change() {
        let row: &[u8] = &[0, 255, 255, 255, 255, 40];
        let soft = mask(&[row]).feathered(3);
        assert_eq!(soft.weights(), [0, 64, 128, 191, 255, 40]);
        assert_eq!(mask(&[row]).feathered(0).weights(), row);
        // Nothing stays, so nothing is softened; and what may change at all still may.
        assert_eq!(mask(&[&[255, 3]]).feathered(5).weights(), [255, 3]);
        assert_eq!(mask(&[&[0, 1]]).feathered(200).weights(), [0, 1]);
    }

    #[test]
    fn cells_change_where_one_of_their_places_does() {
        let places = mask(&[&[0, 0, 7, 0, 0], &[0, 0, 0, 9, 0], &[0, 1, 0, 0, 255]]);
        assert_eq!(places.of_cells(2), mask(&[&[0, 9, 0], &[1, 0, 255]]));
        assert_eq!(places.of_cells(1), places);
    }

    #[test]
    fn masks_grow_on_all_sides() {
        let grown = mask(&[&[1, 2]]).extended([1, 1, 2, 0], 9).unwrap();
        assert_eq!(grown, mask(&[&[9, 9, 9, 9, 9], &[9, 1, 2, 9, 9]]));
        assert!(Mask::new(2, 2, vec![0; 3]).is_err());
        assert!(Mask::new(0, 2, Vec::new()).is_err());
        assert!(mask(&[&[0, 0]]).holds_all() && !mask(&[&[0, 1]]).holds_all());
    }
}
