//! One file per operation, named like the operation's own.

mod conv;
mod group_norm;
mod latent;
mod linear;
mod resize;
mod rms_norm;
mod to_rgb8;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    conv::register(suite);
    group_norm::register(suite);
    latent::register(suite);
    linear::register(suite);
    resize::register(suite);
    rms_norm::register(suite);
    to_rgb8::register(suite);
}
