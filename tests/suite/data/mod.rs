//! Data sets: what metadata says, in which order pictures come, and what is kept of them on disk.

mod factory;
mod finite;
mod hostile;
mod loader;
mod metadata;
mod score;
mod stores;
mod synthesis;

use std::path::Path;

use l2p_engine::image_io::{RgbImage, WriteOptions, write_image};
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    factory::register(suite);
    finite::register(suite);
    hostile::register(suite);
    loader::register(suite);
    metadata::register(suite);
    score::register(suite);
    stores::register(suite);
    synthesis::register(suite);
}

/// A picture of one grey.
fn write_grey(path: &Path, width: usize, height: usize, grey: u8) -> Outcome {
    let image = RgbImage::new(width, height, vec![grey; width * height * 3])?;
    write_image(path, &image, &WriteOptions::default())?;
    Ok(())
}
