//! The curves of several runs beside each other.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;
use serde_json::Value;

use super::history::{History, sheet_path};
use super::samples::{table, tile};
use crate::error::{Error, Result};
use crate::files;
use crate::image_io::{RgbImage, read_image};
use crate::report::{Chart, Scale, Series};

/// What runs are compared over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum XAxis {
    /// Optimizer steps.
    #[default]
    Steps,
    /// Pictures seen.
    Pictures,
    /// Seconds of training.
    Seconds,
}

impl XAxis {
    fn label(self) -> &'static str {
        match self {
            XAxis::Steps => "step",
            XAxis::Pictures => "pictures seen",
            XAxis::Seconds => "seconds of training",
        }
    }
}

impl FromStr for XAxis {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "steps" => Ok(XAxis::Steps),
            "pictures" => Ok(XAxis::Pictures),
            "seconds" => Ok(XAxis::Seconds),
            _ => Err(Error::invalid(format!(
                "`{text}` is nothing to compare over; use steps, pictures or seconds"
            ))),
        }
    }
}

/// Several runs, ready to be drawn and to be written.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What the points' first numbers are.
    pub x: XAxis,
    /// The runs, in the order given.
    pub runs: Vec<ComparedRun>,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct ComparedRun {
    /// Its label.
    pub name: String,
    /// Its folder; not written with the rest, for it means nothing elsewhere.
    #[serde(skip)]
    pub folder: PathBuf,
    /// The keys in whose values the runs differ, but for places and names.
    pub differing: serde_json::Map<String, Value>,
    /// Points of the training loss.
    pub training: Vec<(f64, f64)>,
    /// Points of the validation loss.
    pub validation: Vec<(f64, f64)>,
    /// The last validation loss.
    pub last_validation: Option<f64>,
    /// The lowest validation loss.
    pub best_validation: Option<f64>,
    /// Steps done.
    pub steps: u64,
    /// Pictures seen.
    pub pictures: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// Parameters that were trained.
    pub trained_parameters: u64,
    /// The device.
    pub device: String,
}

/// Keys that do not change what a run learns.
const IMMATERIAL: [&str; 8] = [
    "log_every",
    "save_every",
    "keep_last",
    "keep_every",
    "validate_every",
    "sample_every",
    "cache",
    "workers",
];

/// Reads the runs in these folders, each with a label (by default the folder's name).
///
/// # Errors
/// When a folder holds no log of a run.
pub fn compare(runs: &[(Option<String>, PathBuf)], x: XAxis) -> Result<Comparison> {
    let histories: Vec<History> = runs.iter().map(|(_, folder)| history(folder)).collect::<Result<_>>()?;
    let configs: Vec<&Value> = histories
        .iter()
        .filter_map(|history| Some(&history.start()?.config))
        .collect();
    let differs = |key: &str| configs.iter().any(|config| config.get(key) != configs[0].get(key));
    let keys: Vec<String> = configs
        .first()
        .and_then(|config| config.as_object())
        .into_iter()
        .flat_map(|config| config.keys())
        .filter(|key| differs(key) && !IMMATERIAL.contains(&key.as_str()))
        .cloned()
        .collect();
    let compared = runs.iter().zip(&histories).map(|((name, folder), history)| {
        let name = name.clone().unwrap_or_else(|| label(folder));
        compared(name, folder, history, &keys, x)
    });
    Ok(Comparison {
        x,
        runs: compared.collect(),
    })
}

fn history(folder: &Path) -> Result<History> {
    let history = History::read(folder)?;
    match history.start() {
        Some(_) => Ok(history),
        None => Err(Error::file(folder, "holds no log of a training run")),
    }
}

fn label(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.into());
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn compared(name: String, folder: &Path, history: &History, keys: &[String], x: XAxis) -> ComparedRun {
    let last = history.intervals.last();
    // Validation is logged by step; where it stands on another axis, the interval that ends there says.
    let place = |step: u64| match x {
        XAxis::Steps => Some(step as f64),
        _ if step == 0 => Some(0.0),
        _ => {
            let interval = history.intervals.iter().find(|interval| interval.step >= step)?;
            Some(if x == XAxis::Pictures {
                interval.pictures as f64
            } else {
                interval.elapsed_seconds
            })
        }
    };
    let validation: Vec<(f64, f64)> = history
        .validation
        .iter()
        .filter_map(|(step, loss)| Some((place(*step)?, *loss)))
        .collect();
    let start = history.start();
    ComparedRun {
        differing: keys
            .iter()
            .filter_map(|key| Some((key.clone(), start?.config.get(key)?.clone())))
            .collect(),
        training: history
            .intervals
            .iter()
            .filter_map(|i| Some((place(i.step)?, i.loss?)))
            .collect(),
        last_validation: validation.last().map(|point| point.1),
        best_validation: validation.iter().map(|point| point.1).min_by(f64::total_cmp),
        validation,
        steps: last.map_or(0, |last| last.step),
        pictures: last.map_or(0, |last| last.pictures),
        seconds: last.map_or(0.0, |last| last.elapsed_seconds),
        trained_parameters: start.map_or(0, |start| start.trained_parameters),
        device: start.map(|start| start.device.clone()).unwrap_or_default(),
        folder: folder.into(),
        name,
    }
}

/// The last sheets of samples of several runs as one picture: a row for each run, in the order given, with its first `columns`
/// samples.
///
/// # Errors
/// When a run has no sheet, or another size of samples than the first.
pub fn sample_rows(runs: &[PathBuf], columns: usize) -> Result<RgbImage> {
    let mut rows: Vec<Vec<Vec<u8>>> = Vec::with_capacity(runs.len());
    let mut shared: Option<[usize; 2]> = None;
    for folder in runs {
        let history = history(folder)?;
        let sheet = history.samples.last();
        let sheet = sheet.ok_or_else(|| Error::file(folder, "has drawn no samples (sample_every, sample_prompts)"))?;
        let size = *shared.get_or_insert(sheet.size);
        if size != sheet.size {
            let [width, height] = size;
            return Err(Error::file(
                folder,
                format!("drew samples of another size than {width}x{height}"),
            ));
        }
        let image = read_image(&sheet_path(folder, &sheet.file)?)?;
        let tiles = (0..sheet.count.min(columns)).map(|index| tile(&image, index, sheet.count, size));
        rows.push(tiles.collect::<Result<_>>()?);
    }
    let [width, height] = shared.ok_or_else(|| Error::invalid("no runs to compare"))?;
    let widest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let rows: Vec<&[Vec<u8>]> = rows.iter().map(Vec::as_slice).collect();
    table(&rows, widest, width, height)
}

impl Comparison {
    /// The files of a comparison whose picture goes to `out`: the picture, and the numbers beside it.
    ///
    /// # Errors
    /// When `out` does not end as a picture of this kind does.
    pub fn files(out: &Path) -> Result<[PathBuf; 2]> {
        let is_svg = out
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
        match is_svg {
            true => Ok([out.into(), out.with_extension("json")]),
            false => Err(Error::file(
                out,
                "does not end in .svg, which the picture is; the numbers go beside it to a file that ends in .json",
            )),
        }
    }

    /// Writes picture and numbers to these files, each of which is whole or as it was before, and returns the numbers.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub fn write(&self, [picture, numbers]: &[PathBuf; 2], title: &str) -> Result<String> {
        let json = serde_json::to_string_pretty(self).map_err(|error| Error::invalid(error.to_string()))?;
        files::replace(picture, format!("{}\n", self.svg(title)).as_bytes())?;
        files::replace(numbers, format!("{json}\n").as_bytes())?;
        Ok(json)
    }

    /// One chart of all validation losses, or of the training losses where a run has no other.
    pub fn svg(&self, title: &str) -> String {
        let validated = self.runs.iter().all(|run| !run.validation.is_empty());
        let series: Vec<Series> = self
            .runs
            .iter()
            .map(|run| Series {
                name: match run.last_validation.filter(|_| validated) {
                    Some(loss) => format!("{} ({loss:.4})", run.name),
                    None => run.name.clone(),
                },
                points: if validated { &run.validation } else { &run.training }.clone(),
                dashed: false,
            })
            .collect();
        Chart {
            title,
            x: self.x.label(),
            y: if validated {
                "held-out flow-matching loss"
            } else {
                "training loss"
            },
            series: &series,
            scale: Scale::Logarithmic,
        }
        .svg()
    }
}
