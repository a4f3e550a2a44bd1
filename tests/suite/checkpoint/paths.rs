//! Where a model's parts are found, and what is said when one is not.

use std::path::{Path, PathBuf};

use l2p_engine::checkpoint::{Container, Defaults, ModelPaths, PathOverrides};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::layouts::expect_tensors;
use super::model;

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "checkpoint::paths::diffusers_folders_have_all_parts",
        diffusers_folders_have_all_parts,
    );
    suite.cpu(
        "checkpoint::paths::a_manifest_shares_its_bases_parts",
        a_manifest_shares_its_bases_parts,
    );
    suite.cpu(
        "checkpoint::paths::wrong_manifests_are_errors",
        wrong_manifests_are_errors,
    );
    suite.cpu(
        "checkpoint::paths::missing_parts_say_how_to_give_them",
        missing_parts_say_how_to_give_them,
    );
}

fn resolve(path: &Path) -> l2p_engine::Result<ModelPaths> {
    ModelPaths::resolve(path, &PathOverrides::default())
}

fn diffusers_folders_have_all_parts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("source");
    model::save_diffusers(&source, 2)?;
    let paths = resolve(&source)?;
    assert_eq!(paths.container, Container::Diffusers);
    assert_eq!(paths.text_encoder()?, source.join("text_encoder"));
    assert_eq!(paths.tokenizer()?, source.join("tokenizer"));
    assert_eq!(paths.vae()?, source.join("vae"));
    assert_eq!(paths.scheduler()?.map(|scheduler| scheduler.shift), Some(3.0));
    assert_eq!(
        paths.transformer_config()?.ok_or("no config")?.path(),
        source.join("transformer/config.json")
    );
    expect_tensors(
        "diffusers",
        &paths.open_transformer()?.checkpoint,
        &model::latent(Dtype::BF16),
    )?;

    let transformer = resolve(&source.join("transformer"))?;
    assert_eq!(transformer.container, Container::Folder);
    assert!(transformer.transformer_config()?.is_some());
    std::fs::remove_dir_all(source.join("transformer"))?;
    let message = resolve(&source).unwrap_err().to_string();
    assert_eq!(
        message,
        format!(
            "{}: has a model_index.json but no folder `transformer`",
            source.display()
        )
    );
    Ok(())
}

/// A pixel delta in `folder/pixel` over the diffusers folder `folder/source`.
fn pixel_over_source(folder: &Path, manifest: &Value) -> Result<PathBuf, Failed> {
    model::save_diffusers(&folder.join("source"), 1)?;
    let pixel = folder.join("pixel");
    std::fs::create_dir_all(&pixel)?;
    model::save(&pixel.join("delta.safetensors"), &model::delta(Dtype::BF16))?;
    std::fs::write(pixel.join("l2p.json"), manifest.to_string())?;
    Ok(pixel)
}

fn a_manifest_shares_its_bases_parts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("source");
    let manifest = json!({
        "format": 1, "kind": "pixel", "transformer": "delta.safetensors", "base": "../source",
        "defaults": { "width": 128, "height": 96, "steps": 20, "shift": 4.0, "cfg": 2.5 },
    });
    let pixel = pixel_over_source(folder.path(), &manifest)?;
    let mut expected = model::pixel(Dtype::BF16);
    expected.extend(model::delta(Dtype::BF16));
    // The folder, the manifest and the file that it names are the same model.
    for path in [pixel.clone(), pixel.join("l2p.json"), pixel.join("delta.safetensors")] {
        let paths = resolve(&path)?;
        assert_eq!(paths.container, Container::Manifest);
        assert_eq!(paths.text_encoder()?, source.join("text_encoder"));
        assert_eq!(paths.tokenizer()?, source.join("tokenizer"));
        let defaults = Defaults {
            width: Some(128),
            height: Some(96),
            steps: Some(20),
            shift: Some(4.0),
            cfg: Some(2.5),
            solver: None,
        };
        assert_eq!(paths.defaults, defaults);
        expect_tensors("manifest", &paths.open_transformer()?.checkpoint, &expected)?;
    }
    // The base's config.json holds for the trunk, although it describes a latent model.
    let mut config = model::latent_config();
    config["rope_theta"] = json!(512.0);
    std::fs::write(source.join("transformer/config.json"), config.to_string())?;
    assert_eq!(resolve(&pixel)?.open_transformer()?.spec.sizes()["rope_theta"], 512.0);

    // Parts named in the manifest win over the base's, and those named by the user over both.
    let mine = pixel.join("tokenizer");
    std::fs::create_dir(&mine)?;
    let mut named = manifest.clone();
    named["tokenizer"] = json!("tokenizer");
    std::fs::write(pixel.join("l2p.json"), named.to_string())?;
    assert_eq!(resolve(&pixel)?.tokenizer()?, mine);
    let overrides = PathOverrides {
        tokenizer: Some(folder.path().into()),
        ..PathOverrides::default()
    };
    assert_eq!(ModelPaths::resolve(&pixel, &overrides)?.tokenizer()?, folder.path());

    // Shards of a delta, and a manifest over a manifest.
    let (first, second): (model::Tensors, model::Tensors) = model::delta(Dtype::BF16)
        .into_iter()
        .partition(|(name, _)| name.starts_with("local_decoder."));
    model::save(&pixel.join("a.safetensors"), &first)?;
    model::save(&pixel.join("b.safetensors"), &second)?;
    let mut listed = manifest.clone();
    listed["transformer"] = json!(["a.safetensors", "b.safetensors"]);
    std::fs::write(pixel.join("l2p.json"), listed.to_string())?;
    expect_tensors("list", &resolve(&pixel)?.open_transformer()?.checkpoint, &expected)?;
    let third = folder.path().join("third");
    std::fs::create_dir(&third)?;
    let head: model::Tensors = first
        .keys()
        .map(|name| (name.clone(), model::pixel(Dtype::BF16)[name].clone()))
        .collect();
    model::save(&third.join("head.safetensors"), &head)?;
    let over = json!({ "format": 1, "transformer": "head.safetensors", "base": "../pixel" });
    std::fs::write(third.join("l2p.json"), over.to_string())?;
    expected.extend(head);
    let paths = resolve(&third)?;
    expect_tensors("chain", &paths.open_transformer()?.checkpoint, &expected)?;
    assert_eq!(paths.text_encoder()?, source.join("text_encoder"));
    Ok(())
}

fn wrong_manifests_are_errors() -> Outcome {
    let folder = tempfile::tempdir()?;
    let manifest = json!({ "format": 1, "transformer": "delta.safetensors", "base": "../source" });
    let pixel = pixel_over_source(folder.path(), &manifest)?;
    let path = pixel.join("l2p.json");
    let expect = |content: String, message: &str| -> Outcome {
        std::fs::write(&path, content)?;
        let found = resolve(&pixel)
            .and_then(|paths| paths.open_transformer())
            .err()
            .ok_or("accepted")?
            .to_string();
        let found = found.replace(&folder.path().display().to_string(), "DIR");
        // An entry's place in the text follows.
        if found == message || found.starts_with(&format!("{message} at line 1 column ")) {
            Ok(())
        } else {
            Err(format!("expected\n{message}\nfound\n{found}").into())
        }
    };
    let with = |key: &str, value: Value| {
        let mut changed = manifest.clone();
        changed[key] = value;
        changed.to_string()
    };
    let at = "DIR/pixel/l2p.json: ";
    expect(
        "{".into(),
        &format!("{at}is not what was expected: EOF while parsing an object at line 1 column 1"),
    )?;
    expect("{}".into(), &format!("{at}does not say \"format\": 1"))?;
    expect(
        with("format", json!(2)),
        &format!("{at}is of format 2; this program reads format 1"),
    )?;
    expect(
        with("vea", json!("x")),
        &format!(
            "{at}is not what was expected: entry `vea`: unknown field `vea`, expected one of `format`, `kind`, `transformer`, `base`, `text_encoder`, `tokenizer`, \
             `vae`, `scheduler`, `objective`, `defaults`"
        ),
    )?;
    expect(
        with("defaults", json!({ "width": 0 })),
        &format!(
            "{at}is not what was expected: entry `defaults.width`: expected a whole number from 1 to 65536, found 0"
        ),
    )?;
    expect(
        with("defaults", json!({ "shift": -3 })),
        &format!("{at}is not what was expected: entry `defaults.shift`: expected a number from 0.01 to 1000, found -3"),
    )?;
    expect(
        with("base", json!("../sorce")),
        &format!("{at}names DIR/sorce, which is not there"),
    )?;
    expect(
        with("transformer", json!([])),
        &format!("{at}names no file of the transformer"),
    )?;
    expect(
        with("base", json!(".")),
        &format!("{at}is its own base, through others"),
    )?;
    expect(
        with("kind", json!("latent")),
        "DIR/pixel: is said to be a latent model, but its tensors are those of a pixel one",
    )?;
    expect(
        with("base", Value::Null),
        "DIR/pixel/delta.safetensors: is a delta, or damaged: it lacks `t_embedder`, `cap_embedder`, `x_pad_token`, \
         `cap_pad_token` and 4 more; give the model that it was trained over with --base",
    )
}

fn missing_parts_say_how_to_give_them() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = model::save(&folder.path().join("pixel.safetensors"), &model::pixel(Dtype::BF16))?;
    let paths = resolve(&path)?;
    let without = |what: &str, option: &str| {
        format!(
            "{}: comes without a {what}: name one with {option}, or in an l2p.json beside the model",
            path.display()
        )
    };
    assert_eq!(
        paths.text_encoder().unwrap_err().to_string(),
        without("text encoder", "--text-encoder DIR|FILE")
    );
    assert_eq!(
        paths.tokenizer().unwrap_err().to_string(),
        without("tokenizer", "--tokenizer DIR")
    );
    assert_eq!(
        paths.vae().unwrap_err().to_string(),
        without("VAE, which a latent model needs", "--vae DIR|FILE")
    );
    assert_eq!(paths.scheduler()?, None);
    let nowhere = PathOverrides {
        text_encoder: Some(folder.path().join("nowhere")),
        ..PathOverrides::default()
    };
    let message = ModelPaths::resolve(&path, &nowhere).unwrap_err().to_string();
    assert_eq!(
        message,
        format!(
            "{}/nowhere: No such file or directory (os error 2)",
            folder.path().display()
        )
    );
    let message = resolve(&folder.path().join("gone")).unwrap_err().to_string();
    assert_eq!(
        message,
        format!(
            "{}/gone: No such file or directory (os error 2)",
            folder.path().display()
        )
    );
    Ok(())
}
