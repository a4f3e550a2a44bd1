//! Everything that reads files from outside, each behind the door through which users come to it.

mod draws;
mod factory;
mod files;
mod planted;
mod runs;

use crate::case::Case;

/// How a case ended, panics aside.
pub enum Ended {
    /// The files were taken.
    Accepted,
    /// They were taken, and a picture was drawn of them.
    Drawn,
    /// They were refused.
    Refused(String),
    /// Something that must not be; in words.
    Wrong(&'static str, String),
}

/// One reader.
pub struct Reader {
    /// Its name in reports.
    pub name: &'static str,
    /// How often it is chosen, relative to the others.
    pub weight: usize,
    /// What of the base its cases hold: beginnings of paths.
    pub files: &'static [&'static str],
    /// Which of these are changed: parts of paths.
    pub changes: &'static [&'static str],
    /// Reads a case.
    pub read: fn(&mut Case) -> Ended,
}

const fn reader(
    name: &'static str,
    weight: usize,
    files: &'static [&'static str],
    changes: &'static [&'static str],
    read: fn(&mut Case) -> Ended,
) -> Reader {
    Reader {
        name,
        weight,
        files,
        changes,
        read,
    }
}

const PIXEL: &[&str] = &["pixel/", "latent/text_encoder/", "latent/tokenizer/"];
const EIGHT_BIT: &[&str] = &["eight-bit/", "latent/text_encoder/", "latent/tokenizer/"];
const PIXEL_AND_INPUTS: &[&str] = &["pixel/", "latent/text_encoder/", "latent/tokenizer/", "inputs/"];
const PIXEL_AND_SETS: &[&str] = &["pixel/", "latent/text_encoder/", "latent/tokenizer/", "sets/"];
const RUN: &[&str] = &[
    "pixel/",
    "latent/text_encoder/",
    "latent/tokenizer/",
    "data/",
    "run/",
    "train.toml",
];
const SET: &[&str] = &[
    "pixel/",
    "latent/text_encoder/",
    "latent/tokenizer/",
    "data/",
    "run/cache",
    "train.toml",
];

/// All of them. Weights follow cost: what takes microseconds is read most often.
pub static READERS: [Reader; 34] = [
    reader(
        "safetensors",
        130,
        &["inputs/noise", "pixel/transformer/diff"],
        &[".safetensors"],
        files::tensors,
    ),
    reader(
        "shards",
        80,
        &["latent/transformer/"],
        &["index.json", ".safetensors"],
        files::shards,
    ),
    reader("inspect", 50, &["latent/"], &[".json", ".safetensors"], files::inspect),
    reader(
        "second family",
        40,
        &["flux2/"],
        &[".json", ".safetensors"],
        files::second_family,
    ),
    reader("convert", 20, &["latent/", "pixel/"], &["transformer/"], files::convert),
    reader("tokenizer", 110, &["tokenizers/"], &["tokenizer"], files::tokenizer),
    reader(
        "template",
        110,
        &["templates/", "tokenizers/bytes/"],
        &[".jinja"],
        files::template,
    ),
    reader(
        "training configuration",
        70,
        &["train.toml"],
        &["train.toml"],
        files::training_configuration,
    ),
    reader("flags", 50, &[], &[], files::flags),
    reader("metadata", 110, &["data/"], &["metadata"], files::metadata),
    reader("pictures", 120, &["data/"], &[".png", ".jpg", ".webp"], files::pictures),
    reader("requests", 60, &["requests/"], &["requests/"], files::requests),
    reader("like", 40, &["inputs/like.png"], &["like.png"], files::like),
    reader("stores", 25, &["run/cache/"], &[".safetensors"], files::stores),
    reader(
        "bench records",
        25,
        &["tree/"],
        &[".json", "README"],
        files::bench_records,
    ),
    reader(
        "prompts",
        60,
        &["inputs/"],
        &["prompts.jsonl", "data.jsonl"],
        draws::prompts,
    ),
    reader("evaluation sets", 50, &["sets/"], &["sets/"], draws::sets),
    reader("manifests", 6, PIXEL_AND_SETS, &["geneval.jsonl"], draws::manifests),
    reader("features", 60, &["scores/"], &[".npz", ".npy"], files::features),
    reader(
        "results",
        50,
        &["scores/"],
        &["geneval.jsonl", "dpg.txt"],
        files::results,
    ),
    reader("taxonomy", 50, &["factory/taxonomy"], &["taxonomy"], factory::taxonomy),
    reader("answers", 110, &["factory/answers/"], &["answers/"], factory::answers),
    reader(
        "factory",
        30,
        &["factory/set/", "factory/taxonomy"],
        &[".jsonl", "set/factory.json"],
        factory::folder,
    ),
    reader(
        "latent model",
        25,
        &["latent/"],
        &["config.json", "model_index", "scheduler", "tokenizer"],
        draws::latent,
    ),
    reader(
        "language model",
        15,
        &["latent/"],
        &["text_encoder/config.json", "generation_config.json", "tokenizer"],
        files::language,
    ),
    reader("latent weights", 20, &["latent/"], &[".safetensors"], draws::latent),
    reader("pixel model", 40, PIXEL, &["l2p.json", "config.json"], draws::pixel),
    reader("pixel weights", 20, PIXEL, &[".safetensors"], draws::pixel),
    reader("eight-bit weights", 30, EIGHT_BIT, &[".safetensors"], draws::eight_bit),
    reader(
        "noise and embeds",
        40,
        PIXEL_AND_INPUTS,
        &["noise", "embeds"],
        draws::inputs,
    ),
    reader("synthesis", 10, PIXEL_AND_INPUTS, &["data.jsonl"], draws::synthesis),
    reader("log", 30, &["run/log.jsonl", "run/samples"], &["log.jsonl"], runs::log),
    reader("checkpoints", 8, RUN, &["run/", "train.toml"], runs::resume),
    reader("evaluation", 8, SET, &["data/", "run/cache"], runs::evaluate),
];

/// A reader with faults of every kind.
pub static PLANTED: Reader = reader("planted", 1, &[], &[], planted::read);

/// The end of something that gives nothing but success.
fn ended<T>(outcome: Result<T, impl std::fmt::Display>) -> Ended {
    match outcome {
        Ok(_) => Ended::Accepted,
        Err(error) => Ended::Refused(error.to_string()),
    }
}
