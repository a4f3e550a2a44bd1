//! The layouts met in the wild load to identical tensors.

use std::path::Path;

use l2p_engine::checkpoint::{Checkpoint, Layout, ModelPaths, PathOverrides, Transformer, is_delta, is_whole};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use safetensors::Dtype;

use super::model::{self, Stored, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "checkpoint::layouts::all_load_to_identical_tensors",
        all_load_to_identical_tensors,
    );
    suite.cpu("checkpoint::layouts::prefixes_combine", prefixes_combine);
    suite.cpu(
        "checkpoint::layouts::foreign_tensors_are_left_aside",
        foreign_tensors_are_left_aside,
    );
    suite.cpu(
        "checkpoint::layouts::a_delta_lies_over_its_base",
        a_delta_lies_over_its_base,
    );
    suite.cpu(
        "checkpoint::layouts::a_delta_must_fit_its_base",
        a_delta_must_fit_its_base,
    );
}

/// Fails unless the checkpoint holds exactly these tensors, bit by bit.
pub fn expect_tensors(what: &str, checkpoint: &Checkpoint, expected: &Tensors) -> Outcome {
    let mut found = Tensors::new();
    for (name, tensor) in checkpoint.tensors() {
        let stored = Stored {
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            bytes: tensor.bytes()?,
        };
        found.insert(name.clone(), stored);
    }
    for (name, tensor) in expected {
        if found.get(name) != Some(tensor) {
            return Err(format!("{what}: tensor {name} differs or is missing").into());
        }
    }
    match found.keys().find(|name| !expected.contains_key(*name)) {
        Some(extra) => Err(format!("{what}: tensor {extra} is not expected").into()),
        None => Ok(()),
    }
}

/// Opens the transformer of a model as a program does.
pub fn open(path: &Path, base: Option<&Path>) -> l2p_engine::Result<Transformer> {
    let overrides = PathOverrides {
        base: base.map(Into::into),
        ..PathOverrides::default()
    };
    ModelPaths::resolve(path, &overrides)?.open_transformer()
}

fn all_load_to_identical_tensors() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let latent = model::latent(dtype);
        let pixel = model::pixel(dtype);
        for (kind, tensors) in [("latent", &latent), ("pixel", &pixel)] {
            let name = |layout: &str| at(&format!("{kind}-{layout}-{dtype}"));
            let plain = model::save(&name("plain").with_extension("safetensors"), tensors)?;
            let packed = model::save(&name("packed").with_extension("safetensors"), &model::packed(tensors))?;
            let prefixed = model::prefixed(&model::packed(tensors), "model.diffusion_model.");
            let prefixed = model::save(&name("prefixed").with_extension("safetensors"), &prefixed)?;
            model::save_shards(&name("shards"), tensors, 5)?;
            model::save_shards(&name("unlisted"), tensors, 3)?;
            std::fs::remove_file(name("unlisted").join("diffusion_pytorch_model.safetensors.index.json"))?;
            let diffusers = name("diffusers");
            model::save_shards(&diffusers.join("transformer"), tensors, 4)?;
            std::fs::write(diffusers.join("model_index.json"), "{}")?;
            let index = name("shards").join("diffusion_pytorch_model.safetensors.index.json");
            for path in [
                plain,
                packed,
                prefixed,
                name("shards"),
                index,
                name("unlisted"),
                diffusers,
            ] {
                let found = open(&path, None)?;
                expect_tensors(&path.display().to_string(), &found.checkpoint, tensors)?;
                let is_packed =
                    path.to_string_lossy().contains("packed") || path.to_string_lossy().contains("prefixed");
                assert_eq!(found.checkpoint.layout() == Layout::Packed, is_packed);
            }
        }
    }
    Ok(())
}

fn prefixes_combine() -> Outcome {
    let folder = tempfile::tempdir()?;
    let plain = model::pixel(Dtype::BF16);
    for prefix in [
        "model.diffusion_model.",
        "diffusion_model.",
        "pipe.dit.",
        "pipe.dit.model.diffusion_model.",
        "model.diffusion_model.pipe.dit.",
        "transformer.",
        "base_model.model.",
        "module.",
        "model.",
        "dit.",
        "denoiser.",
        "module._orig_mod.transformer.",
        "_fsdp_wrapped_module.",
    ] {
        let path = model::save(
            &folder.path().join("model.safetensors"),
            &model::prefixed(&plain, prefix),
        )?;
        let found = open(&path, None)?;
        expect_tensors(prefix, &found.checkpoint, &plain)?;
        assert_eq!(found.checkpoint.prefixes().collect::<Vec<_>>(), [prefix]);
    }
    // Wrappers of modules within.
    let inner: Tensors = plain
        .iter()
        .map(|(name, tensor)| {
            let name = name.replace(".attention.", "._checkpoint_wrapped_module.attention._orig_mod.");
            (format!("_orig_mod.{name}"), tensor.clone())
        })
        .collect();
    let path = model::save(&folder.path().join("inner.safetensors"), &inner)?;
    expect_tensors("inner", &open(&path, None)?.checkpoint, &plain)?;
    // What is not understood is named, and so is what is.
    let path = model::save(
        &folder.path().join("mine.safetensors"),
        &model::prefixed(&plain, "mine.ema."),
    )?;
    let message = open(&path, None).err().ok_or("accepted")?.to_string();
    let expected = "no tensor is part of a Z-Image or FLUX.2 transformer; its names begin with `mine.ema.`, which is none of the prefixes \
                    that are understood (diffusion_model. pipe. dit. transformer. denoiser. net. model. module. base_model. \
                    state_dict. _orig_mod. _fsdp_wrapped_module. _checkpoint_wrapped_module.)";
    assert!(message.ends_with(expected), "{message}");
    // A language model has layers too.
    let text = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    .map(|name| (name.to_owned(), model::stored(name, Dtype::BF16, &[2, 2])));
    let path = model::save(&folder.path().join("text.safetensors"), &text.into())?;
    let message = open(&path, None).err().ok_or("accepted")?.to_string();
    let expected = "no tensor is part of a Z-Image or FLUX.2 transformer; its tensors are `model.layers.0.mlp.up_proj.weight` and 2 others";
    assert!(message.ends_with(expected), "{message}");
    // One half of the file with a prefix, the other without.
    let mut mixed = Tensors::new();
    for (index, (name, tensor)) in plain.iter().enumerate() {
        let prefix = if index % 2 == 0 { "" } else { "pipe.dit." };
        mixed.insert(format!("{prefix}{name}"), tensor.clone());
    }
    let path = model::save(&folder.path().join("mixed.safetensors"), &mixed)?;
    expect_tensors("mixed", &open(&path, None)?.checkpoint, &plain)
}

fn foreign_tensors_are_left_aside() -> Outcome {
    let folder = tempfile::tempdir()?;
    let plain = model::pixel(Dtype::BF16);
    let mut all = model::prefixed(&plain, "model.diffusion_model.");
    all.insert(
        "vae.decoder.conv_in.weight".into(),
        model::stored("v", Dtype::F32, &[2, 2, 3, 3]),
    );
    all.insert(
        "norm_final.weight".into(),
        model::stored("n", Dtype::BF16, &[model::DIM]),
    );
    let path = model::save(&folder.path().join("all.safetensors"), &all)?;
    let found = open(&path, None)?;
    expect_tensors("all in one", &found.checkpoint, &plain)?;
    assert_eq!(
        found.checkpoint.foreign(),
        ["norm_final.weight", "vae.decoder.conv_in.weight"]
    );
    Ok(())
}

fn a_delta_lies_over_its_base() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let (latent, pixel, delta) = (
        model::latent(Dtype::BF16),
        model::pixel(Dtype::BF16),
        model::delta(Dtype::F32),
    );
    let mut expected = pixel.clone();
    expected.extend(delta.clone());
    let delta_path = model::save(&at("delta.safetensors"), &delta)?;
    let packed_path = model::save(
        &at("packed.safetensors"),
        &model::prefixed(&model::packed(&delta), "pipe.dit."),
    )?;
    let pixel_base = model::save(&at("base.safetensors"), &model::packed(&pixel))?;
    let latent_base = model::save(&at("latent.safetensors"), &latent)?;
    model::save_diffusers(&at("diffusers"), 3)?;

    let own = Checkpoint::open_transformer(&delta_path)?;
    assert!(is_delta(&own) && !is_whole(&own));
    let alone = open(&delta_path, None).unwrap_err().to_string();
    let lacks = "is a delta, or damaged: it lacks `t_embedder`, `cap_embedder`, `x_pad_token`, `cap_pad_token` and 4 more; \
                 give the model that it was trained over with --base";
    assert_eq!(alone, format!("{}: {lacks}", delta_path.display()));

    for delta in [&delta_path, &packed_path] {
        for base in [&pixel_base, &latent_base, &at("diffusers")] {
            let what = format!("{} over {}", delta.display(), base.display());
            expect_tensors(&what, &open(delta, Some(base))?.checkpoint, &expected)?;
        }
    }
    // A head alone takes the input projection of its base.
    let head: Tensors = delta
        .into_iter()
        .filter(|(name, _)| name.starts_with("local_decoder."))
        .collect();
    let mut expected = pixel;
    expected.extend(head.clone());
    let head = model::save(&at("head.safetensors"), &head)?;
    expect_tensors("head", &open(&head, Some(&pixel_base))?.checkpoint, &expected)?;
    // A latent delta keeps the latent's final layer.
    let trained: Tensors = latent
        .keys()
        .filter(|name| name.starts_with("layers.1."))
        .map(|name| (name.clone(), model::stored("trained", Dtype::BF16, &latent[name].shape)))
        .collect();
    let mut expected = latent;
    expected.extend(trained.clone());
    let trained = model::save(&at("trained.safetensors"), &trained)?;
    expect_tensors(
        "latent delta",
        &open(&trained, Some(&latent_base))?.checkpoint,
        &expected,
    )
}

fn a_delta_must_fit_its_base() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let delta = model::delta(Dtype::BF16);
    let delta_path = model::save(&at("delta.safetensors"), &delta)?;
    let base = model::save(&at("base.safetensors"), &model::pixel(Dtype::BF16))?;
    let expect = |delta: &Path, base: &Path, message: &str| -> Result<(), Failed> {
        let found = open(delta, Some(base)).unwrap_err().to_string();
        let expected = format!("{}{message}", folder.path().display());
        if found == expected {
            Ok(())
        } else {
            Err(format!("expected\n{expected}\nfound\n{found}").into())
        }
    };
    expect(
        &delta_path,
        &delta_path,
        "/delta.safetensors: is a delta, or damaged; the base must be a whole model",
    )?;
    let with = |name: &str, tensor: Stored| -> Result<_, Failed> {
        let mut changed = delta.clone();
        changed.insert(name.into(), tensor);
        model::save(&at("changed.safetensors"), &changed)
    };
    let shown = base.display();
    let wide = with("layers.0.ffn_norm1.weight", model::stored("w", Dtype::BF16, &[7]))?;
    let message = format!(
        "/changed.safetensors: tensor `layers.0.ffn_norm1.weight` has shape [7], in the base {shown} it has [128]: the delta \
         belongs to another model"
    );
    expect(&wide, &base, &message)?;
    let deep = with("layers.4.ffn_norm1.weight", model::stored("w", Dtype::BF16, &[128]))?;
    let message = format!(
        "/changed.safetensors: tensor `layers.4.ffn_norm1.weight` is not in the base {shown}: the delta belongs to another model"
    );
    expect(&deep, &base, &message)
}
