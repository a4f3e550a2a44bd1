//! Writes pictures on a thread of its own, so that the next one is drawn meanwhile.

use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use l2p_engine::image_io::{RgbImage, Settings, WriteOptions, write_image};

/// Pictures that may wait to be written before drawing waits for them.
const QUEUE: usize = 2;

/// A picture to be written.
pub struct Finished {
    /// Where to.
    pub path: PathBuf,
    /// RGB bytes, row by row.
    pub pixels: Vec<u8>,
    /// What goes into the file beside the picture, its size included.
    pub settings: Settings,
}

/// The writing thread.
pub struct Writer {
    queue: Option<SyncSender<Finished>>,
    thread: Option<JoinHandle<l2p_engine::Result<()>>>,
}

impl Writer {
    /// Starts the thread. JPEG files get this quality.
    pub fn start(jpeg_quality: u8) -> Self {
        let (queue, pictures) = sync_channel::<Finished>(QUEUE);
        let thread = std::thread::spawn(move || {
            for Finished { path, pixels, settings } in pictures {
                let image = RgbImage::new(settings.width, settings.height, pixels)?;
                write_image(
                    &path,
                    &image,
                    &WriteOptions {
                        jpeg_quality,
                        settings: Some(&settings),
                    },
                )?;
            }
            Ok(())
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
    pub fn write(&mut self, picture: Finished) -> anyhow::Result<()> {
        let accepted = self.queue.as_ref().is_some_and(|queue| queue.send(picture).is_ok());
        if accepted { Ok(()) } else { self.finish() }
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    /// The first reason why a picture could not be written.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        self.queue = None;
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(outcome)) => Ok(outcome?),
            Some(Err(_)) => anyhow::bail!("the thread that writes pictures stopped unexpectedly"),
        }
    }
}

impl Drop for Writer {
    /// Pictures already handed over are still written when drawing ends early.
    fn drop(&mut self) {
        let _ = self.finish();
    }
}
