//! Model files: damage, layouts, parameters, sizes, and the folders that models come in.

mod config;
pub mod damage;
pub mod layouts;
pub mod model;
mod params;
mod paths;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    config::register(suite);
    damage::register(suite);
    layouts::register(suite);
    params::register(suite);
    paths::register(suite);
}
