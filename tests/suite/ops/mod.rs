//! One file per operation, named like the operation's own.

mod attention;
mod linear;
mod rms_norm;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    attention::register(suite);
    linear::register(suite);
    rms_norm::register(suite);
}
