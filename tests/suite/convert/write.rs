//! `l2p-convert init`, `merge` and `export`: what they write.

use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use safetensors::Dtype;
use serde_json::json;

use super::{json, names, run};
use crate::checkpoint::layouts::{expect_tensors, open};
use crate::checkpoint::model::{self, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu("convert::write::init_copies_the_trunk", init_copies_the_trunk);
    suite.cpu(
        "convert::write::init_is_random_as_pytorch_is",
        init_is_random_as_pytorch_is,
    );
    suite.cpu("convert::write::init_is_deterministic", init_is_deterministic);
    suite.cpu(
        "convert::write::init_from_a_lower_resolution",
        init_from_a_lower_resolution,
    );
    suite.cpu(
        "convert::write::a_manifest_is_exported_whole",
        a_manifest_is_exported_whole,
    );
    suite.cpu("convert::write::merge_gives_the_whole", merge_gives_the_whole);
    suite.cpu(
        "convert::write::layouts_go_round_bit_by_bit",
        layouts_go_round_bit_by_bit,
    );
    suite.cpu(
        "convert::write::folders_have_shards_and_index",
        folders_have_shards_and_index,
    );
    suite.cpu("convert::write::types_are_converted", types_are_converted);
    suite.cpu("convert::write::prefixes_are_found_again", prefixes_are_found_again);
}

/// Whatever prefix is written is read again, and one that would not be is refused.
fn prefixes_are_found_again() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let plain = model::pixel(Dtype::BF16);
    model::save(&at("plain.safetensors"), &plain)?;
    for (given, written) in [
        ("pipe.dit", "pipe.dit."),
        ("pipe.dit.", "pipe.dit."),
        ("model.diffusion_model", "model.diffusion_model."),
        ("transformer.", "transformer."),
        ("module.transformer", "module.transformer."),
    ] {
        let arguments =
            format!("export --in plain.safetensors --out o.safetensors --layout plain --force --prefix {given}");
        run(folder.path(), &arguments)?.success()?;
        assert!(
            model::read(&at("o.safetensors"))? == model::prefixed(&plain, written),
            "{given}"
        );
        expect_tensors(given, &open(&at("o.safetensors"), None)?.checkpoint, &plain)?;
        std::fs::remove_file(at("o.safetensors"))?;
    }
    for given in ["mine.", "pipe.dot", "layers.", "diffusion-model."] {
        let arguments = format!("export --in plain.safetensors --out o.safetensors --layout plain --prefix {given}");
        let finished = run(folder.path(), &arguments)?;
        let clear = finished
            .stderr
            .contains("is no prefix under which a transformer is found again");
        assert!(finished.code == 2 && clear, "{given}: {}", finished.stderr);
    }
    // A packed name without its patch size has no way back: nothing takes the place of what was there.
    let bias = "all_x_embedder.16-1.bias";
    model::save(
        &at("bias.safetensors"),
        &[(bias.to_owned(), plain[bias].clone())].into(),
    )?;
    std::fs::write(at("o.safetensors"), "mine")?;
    run(
        folder.path(),
        "export --in bias.safetensors --out o.safetensors --layout packed --force",
    )?
    .failure(
        1,
        &format!(
            "o.safetensors: would not be read as it was meant: tensor `{bias}` is not found again; it was not written"
        ),
    )?;
    assert_eq!(std::fs::read_to_string(at("o.safetensors"))?, "mine");
    assert_eq!(
        names(folder.path())?,
        ["bias.safetensors", "o.safetensors", "plain.safetensors"]
    );
    Ok(())
}

/// The values of a bf16 tensor.
fn values(tensor: &model::Stored) -> Vec<f64> {
    let pairs = tensor.bytes.as_chunks::<2>().0.iter();
    pairs.map(|bytes| half::bf16::from_le_bytes(*bytes).to_f64()).collect()
}

fn init_copies_the_trunk() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save_diffusers(&folder.path().join("source"), 2)?;
    for (patch, layout, stages) in [(16, "1k", 4), (64, "4k", 6), (128, "8k", 6), (160, "10k", 5)] {
        let arguments = format!("init --source source --patch {patch} --seed 7 --out init-{patch}.safetensors");
        let result = json(folder.path(), &arguments)?;
        let path = folder.path().join(format!("init-{patch}.safetensors"));
        let found = open(&path, None)?;
        let head = found.spec.head().ok_or("no head")?;
        let geometry = found.spec.geometry();
        assert_eq!((geometry.patch, geometry.channels), (patch, 3));
        assert_eq!(head.variant().map(|variant| variant.name), Some(layout));
        assert_eq!(head.widths().iter().filter(|width| **width != 3).count(), stages);
        let (source, made) = (model::latent(Dtype::BF16), model::read(&path)?);
        let copied = made
            .iter()
            .filter(|(name, tensor)| source.get(*name) == Some(tensor))
            .count();
        assert_eq!(result["copied"], json!(copied));
        assert_eq!(copied, source.len() - 6, "all but the latent's own input and output");
        let random = made.keys().filter(|name| !source.contains_key(*name));
        assert!(
            random
                .clone()
                .all(|name| name.starts_with("all_x_embedder.") || name.starts_with("local_decoder."))
        );
        assert_eq!(result["random"].as_array().map(Vec::len), Some(random.count()));
        assert!(made.values().all(|tensor| tensor.dtype == Dtype::BF16));
        assert_eq!(result["bytes"], json!(std::fs::metadata(&path)?.len()));
    }
    let widths =
        "init --source source --patch 16 --head-widths 8,8,16,16 --head-bottleneck 24 --out widths.safetensors";
    run(folder.path(), widths)?.success()?;
    let made = open(&folder.path().join("widths.safetensors"), None)?;
    let head = made.spec.head().ok_or("no head")?;
    assert_eq!((head.widths(), head.bottleneck), (vec![8, 8, 16, 16], 24));
    Ok(())
}

fn init_is_random_as_pytorch_is() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save(&folder.path().join("latent.safetensors"), &model::latent(Dtype::BF16))?;
    run(
        folder.path(),
        "init --source latent.safetensors --patch 16 --out init.safetensors",
    )?
    .success()?;
    let made = model::read(&folder.path().join("init.safetensors"))?;
    // Width 128 gets a head of half the published widths.
    for (name, fan_in) in [
        ("all_x_embedder.16-1.weight", 768),
        ("all_x_embedder.16-1.bias", 768),
        ("local_decoder.enc3.0.weight", 64 * 9),
        ("local_decoder.bottleneck.0.weight", 256 + 128),
        ("local_decoder.up4.1.bias", 256 * 9),
    ] {
        let values = values(&made[name]);
        let bound = 1.0 / f64::from(fan_in).sqrt();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let deviation = (values.iter().map(|value| value * value).sum::<f64>() / count).sqrt();
        let largest = values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        // bf16 rounds the bound itself by at most 1/256; six deviations for the means.
        assert!(
            largest <= bound * 1.004 && largest > bound * 0.9,
            "{name}: {largest} of {bound}"
        );
        assert!(mean.abs() < 6.0 * bound / (3.0 * count).sqrt(), "{name}: mean {mean}");
        let expected = bound / 3f64.sqrt();
        assert!(
            (deviation / expected - 1.0).abs() < 6.0 * 0.45 / count.sqrt(),
            "{name}: {deviation} of {expected}"
        );
    }
    // The documented rule, for one value.
    let first = l2p_init_value(0, "all_x_embedder.16-1.weight", 5, 768);
    assert_eq!(
        values(&made["all_x_embedder.16-1.weight"])[5],
        half::bf16::from_f32(first).to_f64()
    );
    Ok(())
}

/// The rule of the engine's documentation, written a second time.
fn l2p_init_value(seed: u64, name: &str, index: u64, fan_in: u32) -> f32 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let start = mix(seed.wrapping_add(STEP)) ^ hash;
    let z = mix(start.wrapping_add((index + 1).wrapping_mul(STEP)));
    ((z >> 40) as f32 / 8_388_608.0 - 1.0) * (1.0 / (fan_in as f32).sqrt())
}

fn init_is_deterministic() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save(&folder.path().join("latent.safetensors"), &model::latent(Dtype::BF16))?;
    let make = |seed: &str, out: &str| -> Result<Vec<u8>, Failed> {
        let arguments = format!("init --source latent.safetensors --patch 64 --seed {seed} --out {out}");
        run(folder.path(), &arguments)?.success()?;
        Ok(std::fs::read(folder.path().join(out))?)
    };
    let first = make("3", "a.safetensors")?;
    assert!(
        first == make("3", "b.safetensors")?,
        "the same seed gives the same file"
    );
    assert!(first != make("4", "c.safetensors")?, "another seed gives another file");
    let (a, c) = (
        model::read(&folder.path().join("a.safetensors"))?,
        model::read(&folder.path().join("c.safetensors"))?,
    );
    let same = a.iter().filter(|(name, tensor)| c[*name] == **tensor).count();
    assert_eq!(
        same,
        model::latent(Dtype::BF16).len() - 6,
        "only what is random differs"
    );
    Ok(())
}

fn init_from_a_lower_resolution() -> Outcome {
    let folder = tempfile::tempdir()?;
    let latent = model::save(&folder.path().join("latent.safetensors"), &model::latent(Dtype::BF16))?;
    run(
        folder.path(),
        "init --source latent.safetensors --patch 16 --out 1k.safetensors",
    )?
    .success()?;
    std::fs::remove_file(latent)?;
    let result = json(
        folder.path(),
        "init --source 1k.safetensors --patch 64 --seed 1 --out 4k.safetensors",
    )?;
    let (low, high) = (
        model::read(&folder.path().join("1k.safetensors"))?,
        model::read(&folder.path().join("4k.safetensors"))?,
    );
    let random: Vec<String> = serde_json::from_value(result["random"].clone())?;
    for (name, tensor) in &high {
        let fits = low.get(name).is_some_and(|stored| stored.shape == tensor.shape);
        assert_eq!(fits, !random.contains(name), "{name}");
        assert!(!fits || low[name] == *tensor, "{name} is copied bit by bit");
    }
    // The inner stages of both heads are the same; the outer ones and the input projection are new.
    for name in [
        "local_decoder.enc2.0.weight",
        "local_decoder.bottleneck.0.weight",
        "local_decoder.dec2.0.bias",
    ] {
        assert!(!random.iter().any(|random| random == name), "{name}");
    }
    for name in [
        "local_decoder.enc1.0.weight",
        "local_decoder.enc0b.0.weight",
        "all_x_embedder.64-1.weight",
    ] {
        assert!(random.iter().any(|random| random == name), "{name}");
    }
    assert!(!high.contains_key("all_x_embedder.16-1.weight"));
    Ok(())
}

fn merge_gives_the_whole() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let (pixel, delta) = (model::pixel(Dtype::BF16), model::delta(Dtype::BF16));
    model::save(
        &at("base.safetensors"),
        &model::prefixed(&model::packed(&pixel), "diffusion_model."),
    )?;
    model::save(&at("delta.safetensors"), &delta)?;
    model::save_diffusers(&at("source"), 2)?;
    let mut expected = pixel;
    expected.extend(delta.clone());
    for base in ["base.safetensors", "source"] {
        let arguments = format!("merge --base {base} --delta delta.safetensors --out merged.safetensors --force");
        let result = json(folder.path(), &arguments)?;
        assert_eq!(result["from_delta"], json!(delta.len()));
        assert_eq!(result["from_base"], json!(expected.len() - delta.len()));
        assert!(
            model::read(&at("merged.safetensors"))? == expected,
            "merged over {base}"
        );
    }
    Ok(())
}

/// A folder whose manifest lays a delta over a base is exported as one whole model.
fn a_manifest_is_exported_whole() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    model::save_diffusers(&at("source"), 2)?;
    std::fs::create_dir(at("pixel"))?;
    model::save(&at("pixel/delta.safetensors"), &model::delta(Dtype::BF16))?;
    let manifest = json!({ "format": 1, "transformer": "delta.safetensors", "base": "../source" });
    std::fs::write(at("pixel/l2p.json"), manifest.to_string())?;
    run(
        folder.path(),
        "export --in pixel --out whole.safetensors --layout plain",
    )?
    .success()?;
    let mut expected = model::pixel(Dtype::BF16);
    expected.extend(model::delta(Dtype::BF16));
    assert!(model::read(&at("whole.safetensors"))? == expected);
    Ok(())
}

fn layouts_go_round_bit_by_bit() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    for (kind, plain) in [
        ("pixel", model::pixel(Dtype::BF16)),
        ("latent", model::latent(Dtype::F32)),
        ("delta", model::delta(Dtype::F16)),
    ] {
        model::save(&at("plain.safetensors"), &plain)?;
        let packing = "--in plain.safetensors --out packed.safetensors --layout packed --prefix pipe.dit. --force";
        run(folder.path(), &format!("export {packing}"))?.success()?;
        let expected = model::prefixed(&model::packed(&plain), "pipe.dit.");
        assert!(model::read(&at("packed.safetensors"))? == expected, "{kind} packed");
        run(
            folder.path(),
            "export --in packed.safetensors --out back.safetensors --layout plain --force",
        )?
        .success()?;
        assert!(model::read(&at("back.safetensors"))? == plain, "{kind} back");
    }
    // Foreign tensors and what is left of a latent model stay behind, and it is said so.
    let mut more = model::pixel(Dtype::BF16);
    more.insert(
        "all_final_layer.2-1.linear.bias".into(),
        model::stored("f", Dtype::BF16, &[64]),
    );
    more.insert("vae.x".into(), model::stored("v", Dtype::BF16, &[1]));
    model::save(&at("more.safetensors"), &more)?;
    let result = json(
        folder.path(),
        "export --in more.safetensors --out packed.safetensors --layout packed --force",
    )?;
    assert_eq!(result["left_out"], json!(["vae.x", "all_final_layer.2-1.linear.bias"]));
    assert!(model::read(&at("packed.safetensors"))? == model::packed(&model::pixel(Dtype::BF16)));
    // In place: what is read is what is replaced.
    run(
        folder.path(),
        "export --in plain.safetensors --out plain.safetensors --layout packed --force",
    )?
    .success()?;
    assert!(model::read(&at("plain.safetensors"))? == model::packed(&model::delta(Dtype::F16)));
    Ok(())
}

fn folders_have_shards_and_index() -> Outcome {
    let folder = tempfile::tempdir()?;
    let latent = model::latent(Dtype::BF16);
    model::save(&folder.path().join("packed.safetensors"), &model::packed(&latent))?;
    let arguments = "export --in packed.safetensors --out transformer --layout plain --max-shard-size 300kB";
    let result = json(folder.path(), arguments)?;
    let out = folder.path().join("transformer");
    let count = result["files"].as_u64().ok_or("no count")? as usize;
    assert!(count > 3, "{count} shards");
    let mut shards: Vec<String> = (1..=count).map(|number| model::shard_name(number, count)).collect();
    let mut together = Tensors::new();
    let mut total = 0;
    for shard in &shards {
        let tensors = model::read(&out.join(shard))?;
        let bytes: usize = tensors.values().map(|tensor| tensor.bytes.len()).sum();
        assert!(bytes <= 300_000 && bytes > 0, "{shard}: {bytes}");
        total += bytes;
        together.extend(tensors);
    }
    assert!(together == latent);
    let index = std::fs::read_to_string(out.join("diffusion_pytorch_model.safetensors.index.json"))?;
    let index: serde_json::Value = serde_json::from_str(&index)?;
    assert_eq!(index["metadata"]["total_size"], json!(total));
    assert_eq!(
        index["weight_map"].as_object().map(serde_json::Map::len),
        Some(latent.len())
    );
    shards.insert(0, "config.json".into());
    shards.push("diffusion_pytorch_model.safetensors.index.json".into());
    assert_eq!(names(&out)?, shards);
    expect_tensors("shards", &open(&out, None)?.checkpoint, &latent)?;
    // Replaced as a whole: fewer shards leave none of the old ones behind.
    let again = "export --in transformer --out transformer --layout plain --force";
    run(folder.path(), again)?.success()?;
    assert_eq!(names(&out)?, ["config.json", "diffusion_pytorch_model.safetensors"]);
    expect_tensors("one file", &open(&out, None)?.checkpoint, &latent)?;
    assert_eq!(names(folder.path())?, ["packed.safetensors", "transformer"]);
    Ok(())
}

fn types_are_converted() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    model::save(&at("f32.safetensors"), &model::pixel(Dtype::F32))?;
    for (name, dtype) in [("bf16", Dtype::BF16), ("f16", Dtype::F16), ("f32", Dtype::F32)] {
        let arguments =
            format!("export --in f32.safetensors --out out.safetensors --layout plain --dtype {name} --force");
        run(folder.path(), &arguments)?.success()?;
        assert!(model::read(&at("out.safetensors"))? == model::pixel(dtype), "{name}");
    }
    // Projections of different types stack only in a type chosen for all.
    let mut mixed = model::pixel(Dtype::BF16);
    let name = "layers.0.attention.to_k.weight";
    mixed.insert(name.into(), model::pixel(Dtype::F32)[name].clone());
    model::save(&at("mixed.safetensors"), &mixed)?;
    let arguments = "export --in mixed.safetensors --out packed.safetensors --layout packed";
    run(folder.path(), arguments)?.failure(
        1,
        "mixed.safetensors: cannot be packed: the parts of `layers.0.attention.qkv.weight` differ in type or width; choose a \
         type with --dtype",
    )?;
    run(folder.path(), &format!("{arguments} --dtype bf16"))?.success()?;
    assert!(model::read(&at("packed.safetensors"))? == model::packed(&model::pixel(Dtype::BF16)));
    Ok(())
}
