//! Model files: damage, layouts, parameters, sizes, and the folders that models come in.

mod config;
pub mod damage;
pub mod demo;
mod eight_bit;
mod encoded;
mod header;
pub mod layouts;
pub mod model;
mod numbers;
mod params;
mod parts;
mod paths;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    config::register(suite);
    damage::register(suite);
    eight_bit::register(suite);
    encoded::register(suite);
    header::register(suite);
    layouts::register(suite);
    numbers::register(suite);
    params::register(suite);
    parts::register(suite);
    paths::register(suite);
}
