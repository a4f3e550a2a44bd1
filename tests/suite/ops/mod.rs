//! One file per operation, named like the operation's own.

mod layer_norm;
mod linear;
mod rms_norm;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    layer_norm::register(suite);
    linear::register(suite);
    rms_norm::register(suite);
}
