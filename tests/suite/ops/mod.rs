//! One file per operation, named like the operation's own.

mod add_rms_norm;
mod attention;
mod attention_backward;
mod backward;
mod cast;
mod conv;
mod conv_backward;
mod detail_stage;
mod downsample_conv;
mod embedding;
mod finite;
mod flow_loss;
mod from_rgb8;
mod group_norm;
mod guidance;
mod latent;
mod layer_norm;
mod linear;
mod linear_swiglu;
mod loops;
mod noise;
mod patch_embed;
mod qk_norm_rope;
mod resize;
mod resize_backward;
mod rms_norm;
mod swiglu;
mod timestep;
mod to_rgb8;
mod tokens;
mod unpatchify;

use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    add_rms_norm::register(suite);
    attention::register(suite);
    attention_backward::register(suite);
    backward::register(suite);
    cast::register(suite);
    conv::register(suite);
    downsample_conv::register(suite);
    conv_backward::register(suite);
    detail_stage::register(suite);
    embedding::register(suite);
    finite::register(suite);
    flow_loss::register(suite);
    from_rgb8::register(suite);
    group_norm::register(suite);
    guidance::register(suite);
    latent::register(suite);
    layer_norm::register(suite);
    linear::register(suite);
    linear_swiglu::register(suite);
    noise::register(suite);
    patch_embed::register(suite);
    qk_norm_rope::register(suite);
    resize::register(suite);
    resize_backward::register(suite);
    rms_norm::register(suite);
    swiglu::register(suite);
    timestep::register(suite);
    to_rgb8::register(suite);
    tokens::register(suite);
    unpatchify::register(suite);
}
