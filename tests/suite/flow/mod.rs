//! Noise, schedules and sampling.

mod noise_source;
mod reports;
mod sampler;
mod schedule;
mod torch_rng;

use l2p_tests::Suite;
pub use sampler::taken;

pub fn register(suite: &mut Suite) {
    noise_source::register(suite);
    reports::register(suite);
    sampler::register(suite);
    schedule::register(suite);
    torch_rng::register(suite);
}
