//! Noise, schedules and sampling.

mod noise_source;
mod sampler;
mod torch_rng;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    noise_source::register(suite);
    sampler::register(suite);
    torch_rng::register(suite);
}
