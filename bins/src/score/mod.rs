//! `l2p-data score`: scores of pictures that need no foreign network, and tables of what foreign programs found.

mod arguments;
mod arrays;
mod clip;
mod crops;
mod distances;
mod folders;
mod frechet;
mod inception;
mod kernel;
mod npy;
mod pictures;
mod random_state;
mod results;
mod vae;

use std::path::Path;

use anyhow::Context;
use rayon::prelude::*;
use serde_json::{Value, json};

pub use arguments::Score;
use arguments::{Clip, Inception, Pictures, Results, Which};
use pictures::{Edges, Likeness};
use results::{Dpg, Geneval, Share};

use crate::progress::PhaseBar;

/// Pictures that are compared between two looks at whether to go on.
const CHUNK: usize = 32;

/// What is printed: for people and for programs.
struct Scores {
    table: String,
    value: Value,
}

/// Computes the scores that the arguments ask for, and prints them.
///
/// # Errors
/// Whatever the user needs to know, as one sentence.
pub fn score(arguments: &Score) -> anyhow::Result<()> {
    let (scores, as_json) = match &arguments.which {
        Which::Pictures(pictures) => (of_pictures(pictures)?, pictures.json),
        Which::Features(features) => (distances::of_features(features)?, features.json),
        Which::Inception(inception) => (of_logits(inception)?, inception.json),
        Which::Clip(clip) => (of_pairs(clip)?, clip.json),
        Which::Vae(vae) => (distances::in_vae(vae)?, vae.json),
        Which::Crops(crops) => (crops::write(crops)?, crops.json),
        Which::Geneval(results) => (of_geneval(results)?, results.json),
        Which::Dpg(results) => (of_dpg(results)?, results.json),
    };
    match as_json {
        true => crate::print(&format!("{:#}\n", scores.value)),
        false => crate::print(&scores.table),
    }
}

fn of_pictures(arguments: &Pictures) -> anyhow::Result<Scores> {
    let mut display = PhaseBar::new();
    let mut rows = vec![
        [
            "set", "pictures", "PSNR", "SSIM", "colours", "detail", "seams", "theirs",
        ]
        .map(String::from)
        .to_vec(),
    ];
    let mut values = Vec::new();
    for set in &arguments.sets {
        let pairs = folders::pairs(&set.path, &arguments.against)?;
        let mut found = Vec::with_capacity(pairs.len());
        for chunk in pairs.chunks(CHUNK) {
            display.show("comparing", found.len() as u64, pairs.len() as u64);
            go_on()?;
            let likeness =
                |(drawn, reference): &folders::Pair| pictures::compare(drawn, reference, arguments.patch.get());
            found.extend(chunk.par_iter().map(likeness).collect::<anyhow::Result<Vec<_>>>()?);
        }
        let summary = Summary::of(&found);
        rows.push(summary.row(&set.name));
        values.push(summary.json(&set.name, &set.path));
    }
    display.clear();
    let patch = arguments.patch.get();
    Ok(Scores {
        table: format!(
            "{}colours: how far patches of {patch}x{patch} are apart, in levels of 255; detail: deviation within them over the \
             reference's;\nseams: differences across their edges over those inside, and of the reference\n",
            columns(&rows)
        ),
        value: json!({ "against": shown(&arguments.against), "patch": patch, "sets": values }),
    })
}

/// Of all pairs of a set.
struct Summary {
    pictures: usize,
    /// Pairs without any difference, which have no PSNR.
    equal: usize,
    psnr: Option<f64>,
    ssim: f64,
    colour_error: Option<f64>,
    detail: Option<f64>,
    seams: [Option<f64>; 2],
}

impl Summary {
    fn of(found: &[Likeness]) -> Self {
        let mean = |values: Vec<f64>| (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
        let different: Vec<f64> = found
            .iter()
            .map(|pair| pair.psnr)
            .filter(|psnr| psnr.is_finite())
            .collect();
        let patches: Vec<_> = found.iter().filter_map(|pair| pair.patches).collect();
        let mut edges = [Edges::default(); 2];
        for pair in &patches {
            edges.iter_mut().zip(pair.edges).for_each(|(sum, edges)| sum.add(edges));
        }
        let detail = |which: usize| patches.iter().map(|patches| patches.detail[which]).sum::<f64>();
        let squares = patches.iter().map(|patches| patches.colour_error.powi(2)).collect();
        Summary {
            pictures: found.len(),
            equal: found.len() - different.len(),
            psnr: mean(different),
            ssim: mean(found.iter().map(|pair| pair.ssim).collect()).unwrap_or_default(),
            colour_error: mean(squares).map(f64::sqrt),
            detail: (detail(1) > 0.0).then(|| detail(0) / detail(1)),
            seams: edges.map(|edges| edges.ratio()),
        }
    }

    fn row(&self, name: &str) -> Vec<String> {
        let psnr = match self.psnr {
            Some(psnr) if self.equal == 0 => format!("{psnr:.3}"),
            Some(psnr) => format!("{psnr:.3} ({} equal)", self.equal),
            None => "equal".into(),
        };
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3}"));
        vec![
            name.into(),
            self.pictures.to_string(),
            psnr,
            format!("{:.5}", self.ssim),
            number(self.colour_error),
            number(self.detail),
            number(self.seams[0]),
            number(self.seams[1]),
        ]
    }

    fn json(&self, name: &str, path: &Path) -> Value {
        json!({
            "name": name,
            "path": shown(path),
            "pictures": self.pictures,
            "equal": self.equal,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "patch_colour_error": self.colour_error,
            "patch_detail": self.detail,
            "seams": self.seams[0],
            "reference_seams": self.seams[1],
        })
    }
}

fn of_logits(arguments: &Inception) -> anyhow::Result<Scores> {
    let mut rows = vec![["set", "pictures", "IS", "±"].map(String::from).to_vec()];
    let mut values = Vec::new();
    for set in &arguments.sets {
        let logits = arrays::samples(&set.path, arguments.key.as_deref(), "the Inception score")?;
        let found = inception::score(&logits, arguments.splits.get(), arguments.seed.get() as u32)
            .with_context(|| set.path.display().to_string())?;
        rows.push(vec![
            set.name.clone(),
            logits.ncols().to_string(),
            format!("{:.4}", found.mean),
            format!("{:.4}", found.deviation),
        ]);
        values.push(json!({
            "name": set.name,
            "path": shown(&set.path),
            "pictures": logits.ncols(),
            "classes": logits.nrows(),
            "inception_score": found.mean,
            "deviation": found.deviation,
        }));
    }
    Ok(Scores {
        table: columns(&rows),
        value: json!({ "splits": arguments.splits, "seed": arguments.seed, "sets": values }),
    })
}

fn of_pairs(arguments: &Clip) -> anyhow::Result<Scores> {
    let captions = arrays::samples(&arguments.captions, arguments.caption_key.as_deref(), "the CLIP score")?;
    let mut rows = vec![["set", "pictures", "CLIP"].map(String::from).to_vec()];
    let mut values = Vec::new();
    for set in &arguments.sets {
        let pictures = arrays::samples(&set.path, arguments.key.as_deref(), "the CLIP score")?;
        let found = clip::score(&pictures, &captions).with_context(|| set.path.display().to_string())?;
        rows.push(vec![
            set.name.clone(),
            pictures.ncols().to_string(),
            format!("{found:.4}"),
        ]);
        values.push(json!({
            "name": set.name,
            "path": shown(&set.path),
            "pictures": pictures.ncols(),
            "clip_score": found,
        }));
    }
    Ok(Scores {
        table: columns(&rows),
        value: json!({ "captions": shown(&arguments.captions), "sets": values }),
    })
}

/// Prompts of GenEval.
const GENEVAL_PROMPTS: usize = 553;
/// Prompts of DPG-Bench.
const DPG_PROMPTS: usize = 1065;

fn of_geneval(arguments: &Results) -> anyhow::Result<Scores> {
    let found = Geneval::read(&arguments.file)?;
    note_parts("GenEval", found.prompts.all, GENEVAL_PROMPTS);
    let row = |name: &str, share: Share| {
        vec![
            l2p_engine::shown_name(name).into_owned(),
            format!("{:.2} %", 100.0 * share.part()),
            format!("{} / {}", share.correct, share.all),
        ]
    };
    let mut rows: Vec<Vec<String>> = found.tasks.iter().map(|(tag, share)| row(tag, *share)).collect();
    rows.push(row("pictures", found.pictures));
    rows.push(row("prompts", found.prompts));
    rows.push(vec![
        "overall (mean of tasks)".into(),
        format!("{:.5}", found.overall()),
        String::new(),
    ]);
    let share = |share: Share| json!({ "correct": share.correct, "all": share.all, "part": share.part() });
    let tasks = found.tasks.iter().map(|(tag, counts)| (tag.clone(), share(*counts)));
    Ok(Scores {
        table: columns(&rows),
        value: json!({
            "overall": found.overall(),
            "pictures": share(found.pictures),
            "prompts": share(found.prompts),
            "tasks": serde_json::Map::from_iter(tasks),
        }),
    })
}

fn of_dpg(arguments: &Results) -> anyhow::Result<Scores> {
    let found = Dpg::read(&arguments.file)?;
    note_parts("DPG-Bench", found.prompts, DPG_PROMPTS);
    if !found.finished {
        crate::say("note: the file has no summary: the program was ended before, so that there are no categories");
    }
    let [broad, detailed] = &found.categories;
    let row = |(name, score): &(String, f64)| vec![l2p_engine::shown_name(name).into_owned(), format!("{score:.2}")];
    let mut rows: Vec<Vec<String>> = broad.iter().chain(detailed).map(row).collect();
    rows.push(vec![
        format!(
            "DPG-Bench ({} prompts, {} pictures each)",
            found.prompts, found.per_prompt
        ),
        format!("{:.2}", found.score),
    ]);
    let map = |scores: &[(String, f64)]| {
        serde_json::Map::from_iter(scores.iter().map(|(name, score)| (name.clone(), json!(score))))
    };
    Ok(Scores {
        table: columns(&rows),
        value: json!({
            "score": found.score,
            "prompts": found.prompts,
            "per_prompt": found.per_prompt,
            "finished": found.finished,
            "broad": map(broad),
            "detailed": map(detailed),
        }),
    })
}

/// A word where the results are those of a part of the prompts, or of others.
fn note_parts(what: &str, found: usize, all: usize) {
    if found != all {
        crate::say(format_args!(
            "note: {what} has {all} prompts, these results {found}: the score is not comparable with published ones"
        ));
    }
}

/// Rows under each other: the first column to the left, the others to the right.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| match column {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// A path for programs; it need not be UTF-8.
fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Whether to go on, asked by long work now and then.
fn go_on() -> anyhow::Result<()> {
    match crate::stop_requested() {
        true => Err(l2p_engine::Error::Interrupted.into()),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_under_each_other() {
        let rows = [&["set", "FID"][..], &["é", "10.5"], &["longer"]];
        let rows: Vec<Vec<String>> = rows
            .iter()
            .map(|row| row.iter().map(|cell| (*cell).into()).collect())
            .collect();
        assert_eq!(columns(&rows), "set      FID\né       10.5\nlonger\n");
    }
}
