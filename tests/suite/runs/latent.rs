//! A latent model is trained by the same program: pictures go through the VAE once.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use l2p_engine::model::config::ModelKind;
use l2p_tests::cli::Finished;
use l2p_tests::{Outcome, Suite, expect_close};
use libtest_mimic::Failed;

use super::ranks::{children, kill};
use super::{PICTURES, World, command, curve, demo, train, validation, world, write_model};
use crate::models::small_config;

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::latent::latent_models_are_trained_on_latents", latent);
    suite.cpu("runs::latent::ranks_encode_shares", ranks);
}

/// The files of a part of a cache.
fn entries(part: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in part.read_dir()? {
        for entry in folder?.path().read_dir()? {
            found.push(entry?.path());
        }
    }
    found.sort();
    Ok(found)
}

/// What a cache holds, by name.
fn contents(cache: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, Failed> {
    let paths = [entries(&cache.join("captions"))?, entries(&cache.join("latents"))?];
    let read = |path: PathBuf| Ok((path.strip_prefix(cache)?.to_owned(), std::fs::read(&path)?));
    paths.into_iter().flatten().map(read).collect()
}

/// Ranks make the cache of one, whoever dies on the way, and train on it.
fn ranks() -> Outcome {
    let folder = tempfile::tempdir()?;
    let model = latent_model(folder.path())?;
    let world: &World = world()?;
    let run = |name: &str, more: &[&str]| -> Result<_, Failed> {
        let cache = folder.path().join(name).join("cache").display().to_string();
        let common = ["--model", &model, "--steps", "2", "--log-every", "1", "--cache", &cache];
        command(world, &folder.path().join(name), &[&common, more].concat())
    };
    let cache = |name: &str| folder.path().join(name).join("cache");
    Finished::from(&mut run("alone", &["--accumulate", "3"])?)?.success()?;
    let whole = contents(&cache("alone"))?;
    Finished::from(&mut run("three", &["--ranks", "3"])?)?.success()?;
    assert!(contents(&cache("three"))? == whole);
    let losses = |name: &str| -> Result<Vec<f32>, Failed> {
        let curve = curve(&folder.path().join(name))?.into_iter();
        Ok(curve.map(|(_, loss, _)| loss.unwrap_or(f64::NAN) as f32).collect())
    };
    expect_close("losses", &losses("three")?, &losses("alone")?, [2], 1e-4)?;

    // Killed as soon as there is an entry.
    let mut child = run("killed", &["--ranks", "3", "--max-restarts", "1"])?
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if cfg!(target_os = "linux") {
        while entries(&cache("killed").join("captions")).map_or(0, |entries| entries.len()) == 0 {
            assert!(child.try_wait()?.is_none(), "the run ended by itself");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        kill(children(child.id())?[1], "KILL")?;
    }
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(output.status.success(), "{stderr}");
    assert_eq!(
        stderr.contains("starting all ranks again"),
        cfg!(target_os = "linux"),
        "{stderr}"
    );
    let mut left = contents(&cache("killed"))?;
    left.retain(|(name, _)| name.extension().is_none_or(|extension| extension != "tmp"));
    assert!(left == whole);
    assert_eq!(losses("killed")?, losses("three")?);
    Ok(())
}

/// A latent model with random weights.
pub(super) fn latent_model(folder: &Path) -> Result<String, Failed> {
    let config = l2p_engine::model::zimage::DitConfig {
        caption_width: 256,
        ..small_config(ModelKind::Latent, 128, 2)
    };
    let model = folder.join("model");
    write_model(&model, &config, &[])?;
    Ok(model.display().to_string())
}

fn latent() -> Outcome {
    let folder = tempfile::tempdir()?;
    let model = latent_model(folder.path())?;
    let world: &World = world()?;
    let out = folder.path().join("run");
    let cache = folder.path().join("cache").display().to_string();
    let arguments = ["--model", &model, "--policy", "full", "--steps", "6", "--cache", &cache];
    train(world, &out, &arguments)?.success()?;
    let losses = validation(&out)?;
    assert!(losses[losses.len() - 1].1 < losses[0].1, "{losses:?}");
    // Every picture has one latent, which the next run finds.
    let latents = || entries(&folder.path().join("cache/latents"));
    let made = latents()?;
    assert_eq!(made.len(), PICTURES);
    let times = |paths: &[PathBuf]| -> std::io::Result<Vec<_>> {
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
