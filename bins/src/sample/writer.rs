//! Writes pictures on a thread of its own, so that the next one is drawn meanwhile.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use l2p_engine::image_io::{RgbImage, Settings, WriteOptions, write_image};
use l2p_engine::{Error, Result};

/// Pictures that may wait to be written before drawing waits for them.
const QUEUE: usize = 2;

/// A picture to be written.
pub struct Finished {
    /// Where to.
    pub path: PathBuf,
    /// Whether a file that is there stays, the picture getting another name.
    pub keep_others: bool,
    /// The picture.
    pub image: RgbImage,
    /// What goes into the file beside the picture.
    pub settings: Settings,
}

/// The writing thread.
pub struct Writer {
    queue: Option<SyncSender<Finished>>,
    thread: Option<JoinHandle<Result<Vec<usize>>>>,
}

impl Writer {
    /// Starts the thread. JPEG files get this quality.
    pub fn start(jpeg_quality: u8) -> Self {
        let (queue, pictures) = sync_channel::<Finished>(QUEUE);
        let thread = std::thread::spawn(move || {
            pictures
                .into_iter()
                .map(|picture| write(picture, jpeg_quality))
                .collect()
        });
        Writer {
            queue: Some(queue),
            thread: Some(thread),
        }
    }

    /// Hands over a picture.
    ///
    /// # Errors
    /// The reason why an earlier one could not be written.
    pub fn write(&mut self, picture: Finished) -> Result<()> {
        let accepted = self.queue.as_ref().is_some_and(|queue| queue.send(picture).is_ok());
        if accepted { Ok(()) } else { self.finish().map(|_| ()) }
    }

    /// Waits until everything is written. Returns which copies of their names the pictures have, see [`copy_of`], in the order in which
    /// they came.
    ///
    /// # Errors
    /// The first reason why a picture could not be written.
    pub fn finish(&mut self) -> Result<Vec<usize>> {
        self.queue = None;
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(Vec::new()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(Error::invalid("the thread that writes pictures stopped unexpectedly")),
        }
    }
}

impl Drop for Writer {
    /// Pictures already handed over are still written when drawing ends early.
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

/// Writes a picture, and returns which copy of its name it has.
fn write(picture: Finished, jpeg_quality: u8) -> Result<usize> {
    let Finished {
        path,
        keep_others,
        image,
        settings,
    } = picture;
    let options = WriteOptions {
        jpeg_quality,
        settings: Some(&settings),
        replace: !keep_others,
        durable: false,
    };
    let mut copy = 1;
    loop {
        match write_image(&copy_of(&path, copy), &image, &options) {
            // Another program has taken the name since names were given.
            Err(Error::Io { source, .. }) if keep_others && source.kind() == ErrorKind::AlreadyExists => copy += 1,
            outcome => return outcome.map(|()| copy),
        }
    }
}

/// `name.png` itself for 1, `name-2.png` for 2.
pub fn copy_of(path: &Path, copy: usize) -> PathBuf {
    if copy == 1 {
        return path.into();
    }
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{copy}."));
    name.push(path.extension().unwrap_or_default());
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(path: &Path, keep_others: bool, grey: u8) -> Finished {
        Finished {
            path: path.into(),
            keep_others,
            image: RgbImage::new(1, 1, vec![grey; 3]).unwrap(),
            settings: Settings {
                prompt: String::new(),
                negative: String::new(),
                seed: 0,
                steps: 1,
                cfg: 1.0,
                shift: 3.0,
                width: 1,
                height: 1,
                model: "m".into(),
                rng: "philox".into(),
                weights: None,
                start: None,
                solver: None,
            },
        }
    }

    #[test]
    fn names_that_others_took_meanwhile_stay_theirs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0001-0.png");
        std::fs::write(&path, "mine").unwrap();
        let mut writer = Writer::start(92);
        writer.write(picture(&path, true, 1)).unwrap();
        writer.write(picture(&path, true, 2)).unwrap();
        let written = writer.finish();
        assert_eq!(
            written
                .map(|copies| copies.into_iter().map(|copy| copy_of(&path, copy)).collect::<Vec<_>>())
                .unwrap(),
            ["0001-0-2.png", "0001-0-3.png"].map(|name| folder.path().join(name))
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        let mut writer = Writer::start(92);
        writer.write(picture(&path, false, 3)).unwrap();
        assert_eq!(writer.finish().unwrap(), [1]);
        assert_ne!(std::fs::read(&path).unwrap(), b"mine");
    }
}
