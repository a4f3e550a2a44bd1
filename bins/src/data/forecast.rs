//! How long pictures will take, and how much disk.

use std::path::{Path, PathBuf};
use std::time::Instant;

use l2p_engine::device::format_bytes;
use l2p_engine::pipeline::Settings;

use super::arguments::Format;
use super::synthesize::Order;

/// The part of the engine's work that pictures are drawn in.
const DRAWING: &str = "drawing, in steps of a picture";

/// Pictures whose sizes are looked at.
const MEASURED: usize = 256;

/// Bytes of a pixel in a picture of a camera or a model, by format; simple pictures take less.
fn bytes_per_pixel(format: Format) -> f64 {
    match format {
        Format::Png => 1.8,
        Format::Webp => 1.3,
        Format::Jpg => 0.4,
    }
}

/// What the pictures will take of the disk, before any is drawn.
pub(super) fn disk(order: &Order<'_>, settings: &Settings, pictures: usize) -> String {
    let pixels = (settings.width * settings.height) as f64;
    let bytes = pixels * bytes_per_pixel(order.draw.format) * pictures as f64;
    let free = free_bytes(order.out);
    let word = format!("up to about {} of disk", format_bytes(bytes as u64));
    match free {
        Some(free) if bytes > free as f64 => format!(
            "note: {word}, and {} has only {} free",
            order.out.display(),
            format_bytes(free)
        ),
        Some(free) => format!(
            "{word}, {} are free; the time is told after the first batch",
            format_bytes(free)
        ),
        None => format!("{word}; the time is told after the first batch"),
    }
}

/// Bytes that the disk of a folder has free, where the system tells.
#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let there = folder
        .ancestors()
        .find(|folder| folder.exists() && !folder.as_os_str().is_empty());
    let found = rustix::fs::statvfs(there.unwrap_or(Path::new("."))).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
fn free_bytes(_folder: &Path) -> Option<u64> {
    None
}

/// Measures the first batch, and a quarter of all, and says what that means for the rest.
pub(super) struct Forecast {
    out: PathBuf,
    pictures: usize,
    /// Steps of the first batch.
    batch: usize,
    /// When drawing began, and where.
    began: Option<(Instant, usize)>,
    told: usize,
}

impl Forecast {
    /// Of so many pictures in all, `batch` steps being those of a batch.
    pub(super) fn new(out: &Path, pictures: usize, batch: usize) -> Self {
        Forecast {
            out: out.into(),
            pictures,
            batch,
            began: None,
            told: 0,
        }
    }

    /// A sentence, when `done` of `total` steps make one due.
    pub(super) fn after(&mut self, what: &str, done: usize, total: usize) -> Option<String> {
        if what != DRAWING {
            return None;
        }
        let (began, first) = *self.began.get_or_insert((Instant::now(), done));
        let gained = done - first.min(done);
        let due = match self.told {
            0 => gained >= self.batch,
            1 => gained * 4 >= total,
            _ => false,
        };
        if !due || done >= total {
            return None;
        }
        let bytes = bytes_per_picture(&self.out)?;
        self.told += 1;
        let seconds = began.elapsed().as_secs_f64() * (total - done) as f64 / gained as f64;
        let measured = if self.told == 1 {
            "the first batch"
        } else {
            "a quarter of them"
        };
        Some(format!(
            "by {measured}: about {} left, and {} of disk for all {} pictures",
            duration(seconds),
            format_bytes((bytes * self.pictures as f64) as u64),
            self.pictures
        ))
    }
}

/// The mean size of pictures that are there.
fn bytes_per_picture(out: &Path) -> Option<f64> {
    let files = out.join("000").read_dir().ok()?.flatten();
    let pictures = files.filter(|file| !file.file_name().to_string_lossy().starts_with('.'));
    let sizes: Vec<u64> = pictures
        .take(MEASURED)
        .filter_map(|file| Some(file.metadata().ok()?.len()))
        .collect();
    (!sizes.is_empty()).then(|| sizes.iter().sum::<u64>() as f64 / sizes.len() as f64)
}

/// Seconds as people say them.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).ceil() as u64;
    match whole {
        0..120 => format!("{whole} s"),
        120..7200 => format!("{} min", whole.div_ceil(60)),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_batch_and_a_quarter_are_told() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("000")).unwrap();
        let mut forecast = Forecast::new(folder.path(), 100, 20);
        assert_eq!(forecast.after("encoding the prompts", 5, 10), None);
        assert_eq!(forecast.after(DRAWING, 0, 2000), None);
        // Nothing is written yet.
        assert_eq!(forecast.after(DRAWING, 20, 2000), None);
        std::fs::write(folder.path().join("000/000000.png"), [0; 1000]).unwrap();
        let word = forecast.after(DRAWING, 21, 2000).unwrap();
        assert!(
            word.contains("the first batch") && word.contains("100 pictures"),
            "{word}"
        );
        assert_eq!(forecast.after(DRAWING, 100, 2000), None);
        assert!(forecast.after(DRAWING, 500, 2000).unwrap().contains("a quarter"));
        assert_eq!(forecast.after(DRAWING, 1500, 2000), None);
    }

    #[test]
    fn times_are_said_as_people_do() {
        for (seconds, text) in [(0.2, "1 s"), (119.0, "119 s"), (121.0, "3 min"), (7300.0, "2 h 1 min")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
