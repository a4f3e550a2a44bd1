//! Noise, schedules and sampling.

mod torch_rng;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    torch_rng::register(suite);
}
