//! Waiting for pictures, and turning them into files.

use std::sync::Arc;

use axum::http::StatusCode;
use l2p_engine::image_io::{ImageFormat, RgbImage};

use super::app::{App, Ask, Drawing};
use super::failure::Failure;
use super::pictures::encode;

/// A picture's file.
pub struct Picture {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What it says of how it was drawn.
    pub settings: l2p_engine::image_io::Settings,
}

/// Puts a request into the queue, away from the threads that serve others: pictures that were sent are decoded for it.
///
/// # Errors
/// As [`App::ask`].
pub async fn ask(app: &Arc<App>, client: String, request: Ask, previews: bool) -> Result<Drawing, Failure> {
    let app = app.clone();
    blocking(move || app.ask(&client, request, previews)).await
}

/// Waits for what was asked.
///
/// # Errors
/// What went wrong.
pub async fn drawn(drawing: &mut Drawing) -> Result<Vec<RgbImage>, Failure> {
    match (&mut drawing.waiting.answer).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::later(
            StatusCode::SERVICE_UNAVAILABLE,
            "the server is about to end",
            30,
        )),
    }
}

/// The files of pictures.
///
/// # Errors
/// When the format has no room for them.
pub async fn files(
    app: &Arc<App>,
    drawing: &Drawing,
    pictures: Vec<RgbImage>,
    (format, quality): (ImageFormat, u8),
) -> Result<Vec<Picture>, Failure> {
    let (app, model, order) = (app.clone(), drawing.model.clone(), drawing.order.clone());
    blocking(move || {
        let file = |(number, image): (usize, RgbImage)| {
            let settings = model.described(&order, number, &app.arguments);
            Ok(Picture {
                bytes: encode(&image, format, &settings, quality)?,
                settings,
            })
        };
        pictures.into_iter().enumerate().map(file).collect()
    })
    .await
}

/// Runs work that takes its time on a thread of its own.
///
/// # Errors
/// Those of the work, and when it ends in a panic.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.unwrap_or_else(|error| {
        tracing::error!(%error, "a request ended in a panic");
        Err(Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the server failed at this; its log says why",
        ))
    })
}
