//! What the CUDA kernels cannot take is known before a device is asked.

use l2p_engine::Device;
use l2p_engine::layers::MemoryParams;
use l2p_engine::model::DeviceLimits;
use l2p_engine::model::config::{ModelKind, TextConfig, VaeConfig};
use l2p_engine::model::detailer::DetailerLayout;
use l2p_engine::model::zimage::{DitConfig, HEAD_PREFIX};
use l2p_tests::{Outcome, Suite};

use super::small_config;

pub fn register(suite: &mut Suite) {
    suite.cpu("models::limits::published_models_fit", published_models_fit);
    suite.cpu("models::limits::obstacles_are_named", obstacles_are_named);
}

/// The layout of a head with tensors of these shapes and no values.
fn head(layout: &DetailerLayout) -> l2p_engine::Result<DetailerLayout> {
    let shapes = layout
        .tensors(HEAD_PREFIX)
        .into_iter()
        .map(|(name, shape)| (name, (shape, Vec::new())));
    DetailerLayout::read(&MemoryParams(shapes.collect()), HEAD_PREFIX)
}

fn text() -> TextConfig {
    TextConfig {
        vocabulary: 151_936,
        dim: 2560,
        layers: 36,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        ffn_hidden: 9728,
        norm_eps: 1e-6,
        rope_theta: 1e6,
    }
}

fn vae() -> VaeConfig {
    VaeConfig {
        latent_channels: 16,
        block_out_channels: vec![128, 256, 512, 512],
        ..VaeConfig::default()
    }
}

fn published_models_fit() -> Outcome {
    for patch in [16, 64, 128, 160] {
        let trunk = DitConfig {
            ffn_hidden: 10240,
            caption_width: 2560,
            ..small_config(ModelKind::Pixel, 3840, patch)
        };
        assert_eq!(trunk.cuda_obstacle(), None);
        assert_eq!(
            head(&DetailerLayout::for_patch(patch, None, None, 3840)?)?.cuda_obstacle(),
            None,
            "{patch}"
        );
    }
    assert_eq!(small_config(ModelKind::Latent, 384, 2).cuda_obstacle(), None);
    assert_eq!(text().cuda_obstacle(), None);
    assert_eq!(vae().cuda_obstacle(), None);
    Ok(())
}

fn obstacles_are_named() -> Outcome {
    let trunk = small_config(ModelKind::Latent, 256, 2);
    let named = |obstacle: Option<String>, expected: &str| assert_eq!(obstacle.as_deref(), Some(expected));
    named(
        trunk.cuda_obstacle(),
        "its feed-forward width of 682 is not a multiple of 8",
    );
    let narrow_heads = DitConfig {
        head_dim: 64,
        ..small_config(ModelKind::Latent, 384, 2)
    };
    named(
        narrow_heads.cuda_obstacle(),
        "its attention heads are 64 wide, the kernels are for 128",
    );
    let layout = DetailerLayout::for_patch(128, Some(&[8, 8, 16, 12, 24, 32]), None, 384)?;
    named(
        head(&layout)?.cuda_obstacle(),
        "its encoder width of 12 is not a multiple of 8",
    );
    let layout = DetailerLayout::for_patch(16, Some(&[8, 8, 16, 16]), Some(30), 384)?;
    named(
        head(&layout)?.cuda_obstacle(),
        "its bottleneck of 30 is not a multiple of 8",
    );
    let odd_text = TextConfig {
        ffn_hidden: 1001,
        ..text()
    };
    named(
        odd_text.cuda_obstacle(),
        "its feed-forward width of 1001 is not a multiple of 8",
    );
    let wide = |widths: &[usize]| VaeConfig {
        block_out_channels: widths.to_vec(),
        ..vae()
    };
    named(
        wide(&[128, 132]).cuda_obstacle(),
        "its block width of 132 is not a multiple of 8",
    );
    named(
        wide(&[4096, 512]).cuda_obstacle(),
        "a block width of 4096 is more than the group normalisation takes, 2048",
    );
    named(
        wide(&[512, 1024]).cuda_obstacle(),
        "a block width of 1024 is more than the attention takes, 512",
    );
    // The CPU takes everything.
    trunk.ensure_runs_on(&Device::Cpu)?;
    Ok(())
}
