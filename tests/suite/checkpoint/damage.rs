//! Every kind of damage gives one clear error, from the library and from the command line.

use std::path::{Path, PathBuf};

use l2p_engine::checkpoint::{Checkpoint, ModelPaths, PathOverrides, inspect};
use l2p_tests::{Outcome, Suite, cli};
use libtest_mimic::Failed;
use safetensors::Dtype;
use serde_json::json;

use super::model::{self, Stored, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu("checkpoint::damage::no_header_makes_it_panic", no_header_makes_it_panic);
    suite.cpu(
        "checkpoint::damage::each_kind_has_its_message",
        each_kind_has_its_message,
    );
    suite.cpu(
        "checkpoint::damage::each_kind_has_its_exit_code",
        each_kind_has_its_exit_code,
    );
    suite.cpu(
        "checkpoint::damage::any_truncation_is_an_error",
        any_truncation_is_an_error,
    );
}

/// A damaged file or folder and the end of the message that it gives, after the folder of the test.
pub struct Case {
    pub path: PathBuf,
    pub message: String,
}

fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// A header entry of four f32.
fn entry(dtype: &str, shape: &[u64], offsets: [u64; 2]) -> serde_json::Value {
    json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets })
}

fn single_files(folder: &Path) -> Result<Vec<Case>, Failed> {
    let data = [0u8; 32];
    let two =
        |a: serde_json::Value, b: serde_json::Value, data: &[u8]| raw(&json!({ "a": a, "b": b }).to_string(), data);
    let (first, second) = (entry("F32", &[4], [0, 16]), entry("F32", &[4], [16, 32]));
    let whole = two(first.clone(), second.clone(), &data);
    let duplicate = format!("{{\"a\":{first},\"a\":{second}}}");
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("short", b"abc".to_vec(), "not a safetensors file: it has only 3 bytes"),
        ("noise", vec![0x37; 100], "not a safetensors file"),
        (
            "zip",
            [b"PK\x03\x04".as_slice(), &[9; 100]].concat(),
            "not a safetensors file: it looks like a PyTorch or zip archive; convert it with the safetensors package first",
        ),
        (
            "pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(),
            "not a safetensors file: it is a Git LFS pointer; fetch the file itself with `git lfs pull`",
        ),
        (
            "long_header",
            [&5000u64.to_le_bytes()[..], b"{\"a\":"].concat(),
            "the header claims 5000 bytes but only 5 follow: the file is truncated or damaged",
        ),
        (
            "bad_json",
            raw("{\"a\":}", &[]),
            "the header is not valid: expected value at line 1 column 6",
        ),
        (
            "no_shape",
            raw(
                &json!({ "a": { "dtype": "F32", "data_offsets": [0, 16] } }).to_string(),
                &data[..16],
            ),
            "tensor `a` has a malformed entry: missing field `shape`",
        ),
        (
            "truncated",
            whole[..whole.len() - 1].to_vec(),
            "tensor `b` ends at byte 32 of the data, of which there are only 31: the file is truncated",
        ),
        (
            "overlap",
            two(first.clone(), entry("F32", &[4], [8, 24]), &data[..24]),
            "tensors `a` and `b` overlap: the header's offsets are wrong",
        ),
        (
            "out_of_file",
            two(first.clone(), entry("F32", &[4], [100, 116]), &data),
            "tensor `b` starts at byte 100 of 32 bytes of data: the header's offsets are wrong",
        ),
        (
            "gap",
            two(first.clone(), entry("F32", &[3], [20, 32]), &data),
            "4 bytes before tensor `b` belong to none: the header's offsets are wrong",
        ),
        (
            "rest",
            [&whole[..], b"xy"].concat(),
            "2 bytes at the end belong to no tensor: the file is damaged",
        ),
        (
            "wrong_length",
            two(entry("F32", &[5], [0, 16]), second.clone(), &data),
            "tensor `a` has 16 bytes, but F32 [5] takes 20: the header is wrong",
        ),
        (
            "backwards",
            two(entry("F32", &[4], [16, 0]), second.clone(), &data),
            "tensor `a` ends at byte 0 before it starts at byte 16",
        ),
        (
            "impossible_shape",
            two(entry("F32", &[1 << 40, 1 << 40], [0, 16]), second.clone(), &data),
            "tensor `a` has the impossible shape [1099511627776, 1099511627776]",
        ),
        (
            "impossible_offset",
            two(first.clone(), entry("F32", &[4], [u64::MAX - 16, u64::MAX]), &data),
            "tensor `b` lies at the impossible offsets 18446744073709551599 to 18446744073709551615",
        ),
        (
            "dtype",
            two(first.clone(), entry("Q7", &[4], [16, 32]), &data),
            "tensor `b` has the unknown element type `Q7`",
        ),
        ("duplicate", raw(&duplicate, &data), "tensor `a` is in the header twice"),
        (
            "stranger",
            whole.clone(),
            "no tensor is part of a Z-Image or FLUX.2 transformer; its tensors are `a` and 1 others",
        ),
        (
            "empty",
            raw("{}", &[]),
            "no tensor is part of a Z-Image or FLUX.2 transformer; it holds no tensor",
        ),
        (
            "lora",
            raw(
                &json!({ "diffusion_model.layers.0.attention.to_q.lora_A.weight": first }).to_string(),
                &data[..16],
            ),
            "is a LoRA (it holds `diffusion_model.layers.0.attention.to_q.lora_A.weight`): changes to a model, no model by itself, \
             and this program does not apply them; merge it into its model with the program that made it",
        ),
        (
            "two_meanings",
            raw(
                &json!({ "x_pad_token": first, "pipe.dit.x_pad_token": second }).to_string(),
                &data,
            ),
            "tensors `pipe.dit.x_pad_token` and `x_pad_token` both stand for `x_pad_token`",
        ),
        (
            "odd_stack",
            raw(
                &json!({ "layers.0.attention.qkv.weight": first }).to_string(),
                &data[..16],
            ),
            "tensor `layers.0.attention.qkv.weight` has shape [4], expected 3 equal groups of rows",
        ),
    ];
    let mut written = vec![Case {
        path: folder.join("nothing.safetensors"),
        message: "nothing.safetensors: No such file or directory (os error 2)".into(),
    }];
    for (name, bytes, message) in cases {
        let file = format!("{name}.safetensors");
        std::fs::write(folder.join(&file), bytes)?;
        written.push(Case {
            path: folder.join(&file),
            message: format!("{file}: {message}"),
        });
    }
    Ok(written)
}

/// Folders of shards, each damaged by `damage` after it was written whole.
fn shards(folder: &Path) -> Result<Vec<Case>, Failed> {
    const INDEX: &str = "diffusion_pytorch_model.safetensors.index.json";
    type Damage = fn(&Path) -> Result<(), Failed>;
    let shard = |number| model::shard_name(number, 3);
    let cases: [(&str, Damage, String); 9] = [
        (
            "missing_shard",
            |folder| Ok(std::fs::remove_file(folder.join(model::shard_name(2, 3)))?),
            format!(
                "{INDEX}: names the shard {} (35 tensors), which is not there: the download is incomplete",
                shard(2)
            ),
        ),
        (
            "missing_shard_without_index",
            |folder| {
                std::fs::remove_file(folder.join(INDEX))?;
                Ok(std::fs::remove_file(folder.join(model::shard_name(2, 3)))?)
            },
            format!("lacks the shard {}: the download is incomplete", shard(2)),
        ),
        (
            "swapped_shard",
            |folder| Ok(std::fs::copy(folder.join(model::shard_name(1, 3)), folder.join(model::shard_name(3, 3))).map(|_| ())?),
            format!(
                "{}: lacks tensor `layers.3.attention.norm_k.weight`, which {INDEX} places here: shards of two models are mixed",
                shard(3)
            ),
        ),
        (
            "foreign_tensor",
            |folder| {
                let path = folder.join(model::shard_name(3, 3));
                let mut tensors = model::read(&path)?;
                tensors.insert("layers.9.ffn_norm1.weight".into(), model::stored("x", Dtype::BF16, &[model::DIM]));
                model::save(&path, &tensors).map(|_| ())
            },
            format!(
                "{}: holds tensor `layers.9.ffn_norm1.weight`, which {INDEX} does not place here: shards of two models are mixed",
                shard(3)
            ),
        ),
        (
            "two_sets",
            |folder| {
                std::fs::remove_file(folder.join(INDEX))?;
                Ok(std::fs::copy(folder.join(model::shard_name(1, 3)), folder.join(model::shard_name(1, 2))).map(|_| ())?)
            },
            "mixes shards of two models: diffusion_pytorch_model-…-of-00002 and diffusion_pytorch_model-00001-of-00003".into(),
        ),
        (
            "two_models",
            |folder| {
                std::fs::remove_file(folder.join(INDEX))?;
                std::fs::rename(folder.join(model::shard_name(1, 3)), folder.join("a.safetensors"))?;
                std::fs::rename(folder.join(model::shard_name(2, 3)), folder.join("b.safetensors"))?;
                std::fs::remove_file(folder.join(model::shard_name(3, 3)))?;
                Ok(std::fs::copy(folder.join("a.safetensors"), folder.join("c.safetensors")).map(|_| ())?)
            },
            "c.safetensors: holds tensor `all_final_layer.2-1.adaLN_modulation.1.bias`, and so does a.safetensors: these are \
             two models; name one file"
                .into(),
        ),
        (
            "two_indices",
            |folder| Ok(std::fs::copy(folder.join(INDEX), folder.join("a.safetensors.index.json")).map(|_| ())?),
            "holds several models (a.safetensors.index.json, diffusion_pytorch_model.safetensors.index.json); name one of \
             these files instead of the folder"
                .into(),
        ),
        (
            "escaping_index",
            |folder| Ok(std::fs::write(folder.join(INDEX), r#"{"weight_map":{"a":"../a.safetensors"}}"#)?),
            format!("{INDEX}: names the shard `../a.safetensors`, which is no plain file name"),
        ),
        (
            "broken_index",
            |folder| Ok(std::fs::write(folder.join(INDEX), r#"{"weights":{}}"#)?),
            format!("{INDEX}: is not what was expected: missing field `weight_map` at line 1 column 14"),
        ),
    ];
    let latent = model::latent(Dtype::BF16);
    let mut written = Vec::new();
    for (name, damage, message) in cases {
        let path = folder.join(name);
        model::save_shards(&path, &latent, 3)?;
        damage(&path)?;
        let names_file = message.split(' ').next().is_some_and(|word| word.ends_with(':'));
        let separator = if names_file { "/" } else { ": " };
        written.push(Case {
            path,
            message: format!("{name}{separator}{message}"),
        });
    }
    let empty = folder.join("empty_folder");
    std::fs::create_dir(&empty)?;
    written.push(Case {
        path: empty,
        message: "empty_folder: holds no safetensors file".into(),
    });
    Ok(written)
}

pub fn cases(folder: &Path) -> Result<Vec<Case>, Failed> {
    let mut cases = single_files(folder)?;
    cases.extend(shards(folder)?);
    Ok(cases)
}

fn each_kind_has_its_message() -> Outcome {
    let folder = tempfile::tempdir()?;
    for Case { path, message } in cases(folder.path())? {
        let expected = format!("{}/{message}", folder.path().display());
        match Checkpoint::open_transformer(&path) {
            Ok(_) => return Err(format!("{} was read; expected\n{expected}", path.display()).into()),
            Err(error) if error.to_string() != expected => {
                return Err(format!("expected\n{expected}\nfound\n{error}").into());
            }
            Err(_) => {}
        }
    }
    Ok(())
}

fn each_kind_has_its_exit_code() -> Outcome {
    let folder = tempfile::tempdir()?;
    for Case { path, message } in cases(folder.path())? {
        let expected = format!("{}/{message}", folder.path().display());
        cli::run("l2p-convert", ["inspect".as_ref(), path.as_os_str()])?.failure(1, &expected)?;
    }
    Ok(())
}

/// Cut anywhere, a file is never read as if it were whole.
fn any_truncation_is_an_error() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tensor = |shape: &[usize]| model::stored("t", Dtype::F16, shape);
    let tensors: Tensors = [("x_pad_token", tensor(&[1, 3])), ("cap_pad_token", tensor(&[1, 2]))]
        .map(|(name, tensor): (&str, Stored)| (name.to_owned(), tensor))
        .into();
    let path = model::save(&folder.path().join("whole.safetensors"), &tensors)?;
    Checkpoint::open_transformer(&path)?;
    let whole = std::fs::read(&path)?;
    let cut = folder.path().join("cut.safetensors");
    for length in 0..whole.len() {
        std::fs::write(&cut, &whole[..length])?;
        if Checkpoint::open_transformer(&cut).is_ok() {
            return Err(format!("{length} of {} bytes were read as a whole file", whole.len()).into());
        }
    }
    Ok(())
}

/// Headers with digits, names and structure changed at random are read or refused, and so are the models they describe.
fn no_header_makes_it_panic() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.safetensors");
    let whole = std::fs::read(model::save(&path, &model::packed(&model::pixel(Dtype::BF16)))?)?;
    let data = 8 + u64::from_le_bytes(*whole.first_chunk().ok_or("no length")?) as usize;
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut read = 0;
    for round in 0..300 {
        let mut changed = whole.clone();
        for _ in 0..round % 4 {
            let at = 8 + random(data - 8);
            let choice: &[u8] = match changed[at] {
                b'0'..=b'9' => b"0123456789",
                b'a'..=b'z' => b"abcdeklnorstuvwxyz_.",
                _ => b"09,.:[]{}\"-x_",
            };
            changed[at] = choice[random(choice.len())];
        }
        std::fs::write(&path, changed)?;
        let paths = ModelPaths::resolve(&path, &PathOverrides::default())?;
        let _ = paths.open_transformer();
        read += usize::from(inspect(&paths).is_ok());
    }
    // The same shapes with an extent of zero take no data, whatever the other extents are.
    for extent in [0, 1, usize::MAX >> 8] {
        let mut header = serde_json::Map::new();
        for (name, tensor) in model::packed(&model::pixel(Dtype::BF16)) {
            let mut shape = tensor.shape;
            shape[0] = extent;
            shape.push(0);
            header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [0, 0] }));
        }
        std::fs::write(&path, raw(&serde_json::Value::Object(header).to_string(), &[]))?;
        let paths = ModelPaths::resolve(&path, &PathOverrides::default())?;
        let _ = paths.open_transformer();
        let _ = inspect(&paths);
    }
    assert!(read >= 100, "only {read} of the changed files were read at all");
    Ok(())
}
