//! Noise, schedules and sampling.

mod sampler;
mod torch_rng;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    sampler::register(suite);
    torch_rng::register(suite);
}
