//! A latent model is trained by the same program: pictures go through the VAE once.

use l2p_engine::model::config::ModelKind;
use l2p_tests::{Outcome, Suite};

use super::{PICTURES, World, curve, demo, train, validation, world, write_model};
use crate::models::small_config;

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::latent::latent_models_are_trained_on_latents", latent);
}

fn latent() -> Outcome {
    let folder = tempfile::tempdir()?;
    let config = l2p_engine::model::zimage::DitConfig {
        caption_width: 256,
        ..small_config(ModelKind::Latent, 128, 2)
    };
    let model = folder.path().join("model");
    write_model(&model, &config, &[])?;
    let world: &World = world()?;
    let out = folder.path().join("run");
    let cache = folder.path().join("cache").display().to_string();
    let model = model.display().to_string();
    let arguments = ["--model", &model, "--policy", "full", "--steps", "6", "--cache", &cache];
    train(world, &out, &arguments)?.success()?;
    let losses = validation(&out)?;
    assert!(losses[losses.len() - 1].1 < losses[0].1, "{losses:?}");
    // Every picture has one latent, which the next run finds.
    let latents = || -> std::io::Result<Vec<std::path::PathBuf>> {
        let mut found = Vec::new();
        for part in folder.path().join("cache/latents").read_dir()? {
            for entry in part?.path().read_dir()? {
                found.push(entry?.path());
            }
        }
        found.sort();
        Ok(found)
    };
    let made = latents()?;
    assert_eq!(made.len(), PICTURES);
    let times = |paths: &[std::path::PathBuf]| -> std::io::Result<Vec<_>> {
        paths.iter().map(|path| path.metadata()?.modified()).collect()
    };
    let before = times(&made)?;
    let second = folder.path().join("second");
    train(world, &second, &arguments)?.success()?;
    assert_eq!(curve(&second)?, curve(&out)?);
    assert_eq!((latents()?, times(&made)?), (made.clone(), before));
    // A damaged latent is made again.
    std::fs::write(&made[3], b"no latent")?;
    let third = folder.path().join("third");
    train(world, &third, &arguments)?.success()?;
    assert_eq!(curve(&third)?, curve(&out)?);
    assert!(demo()?.is_dir());
    Ok(())
}
