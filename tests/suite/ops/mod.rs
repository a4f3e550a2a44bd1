//! One file per operation, named like the operation's own.

mod cast;
mod embedding;
mod guidance;
mod layer_norm;
mod linear;
mod noise;
mod patch_embed;
mod qk_norm_rope;
mod rms_norm;
mod swiglu;
mod timestep;
mod tokens;
mod unpatchify;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    cast::register(suite);
    embedding::register(suite);
    guidance::register(suite);
    layer_norm::register(suite);
    linear::register(suite);
    noise::register(suite);
    patch_embed::register(suite);
    qk_norm_rope::register(suite);
    rms_norm::register(suite);
    swiglu::register(suite);
    timestep::register(suite);
    tokens::register(suite);
    unpatchify::register(suite);
}
