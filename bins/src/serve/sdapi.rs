//! AUTOMATIC1111's interface, as existing front ends speak it: `/sdapi/v1/…`. Its `cfg_scale` is our `cfg`, its `denoising_strength` our
//! strength, its `mask_blur` our feather; `batch_size` times `n_iter` pictures are drawn. Fields without meaning here are passed over
//! and named in `info`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use l2p_engine::image_io::ImageFormat;
use serde_json::{Value, json};

use super::app::{App, Ask};
use super::failure::Failure;
use super::fields::Fields;
use super::guard::{self, Client};
use super::pictures::{from_base64, preview, to_base64};
use super::wait;

/// The routes.
pub fn router() -> Router<Arc<App>> {
    Router::new()
        .route("/sdapi/v1/txt2img", post(txt2img))
        .route("/sdapi/v1/img2img", post(img2img))
        .route("/sdapi/v1/progress", get(progress))
        .route("/sdapi/v1/interrupt", post(interrupt))
        .route("/sdapi/v1/sd-models", get(models))
        .route("/sdapi/v1/options", get(options).post(set_options))
        .route("/sdapi/v1/samplers", get(samplers))
        .route("/sdapi/v1/schedulers", get(schedulers))
        .route("/sdapi/v1/upscalers", get(nothing))
        .route("/sdapi/v1/loras", get(nothing))
        .route("/sdapi/v1/embeddings", get(no_embeddings))
}

/// Who asks through this interface: what a client asks for elsewhere is not shown or interrupted here.
fn own(client: &str) -> String {
    format!("{client} (sdapi)")
}

/// What a request asks for, and the fields that mean nothing here.
///
/// # Errors
/// Naming the field at fault.
pub(super) fn parse(bytes: &[u8], with_image: bool) -> Result<(Ask, Vec<String>), Failure> {
    let mut fields = Fields::of_json(bytes)?;
    let count = fields
        .whole("batch_size")?
        .unwrap_or(1)
        .saturating_mul(fields.whole("n_iter")?.unwrap_or(1));
    let seed = match fields.number("seed")? {
        // Their word for some seed.
        None | Some(-1.0) => None,
        Some(seed) if seed >= 0.0 && seed.fract() == 0.0 && seed < 9.0e15 => Some(seed as u64),
        Some(seed) => {
            return Err(Failure::field(
                "seed",
                format!("expected a whole number, or -1 for any, found {seed}"),
            ));
        }
    };
    let picture = |fields: &mut Fields, name: &str| -> Result<Option<Vec<u8>>, Failure> {
        let text = match name {
            "init_images" => fields.only_text(name)?,
            _ => fields.text(name)?,
        };
        text.map(|text| from_base64(name, &text)).transpose()
    };
    let (image, mask) = match with_image {
        true => (picture(&mut fields, "init_images")?, picture(&mut fields, "mask")?),
        false => (None, None),
    };
    if with_image && image.is_none() {
        return Err(Failure::field("init_images", "is missing: the picture to begin with"));
    }
    let inverted = fields.whole("inpainting_mask_invert")?.unwrap_or(0) == 1;
    let (width, height) = (fields.whole("width")?, fields.whole("height")?);
    let (strength, feather) = (fields.real("denoising_strength")?, fields.whole("mask_blur")?);
    let ask = Ask {
        model: None,
        prompt: fields.text("prompt")?.unwrap_or_default(),
        negative: fields.text("negative_prompt")?,
        // A mask keeps the picture's size.
        width: width.filter(|_| mask.is_none()),
        height: height.filter(|_| mask.is_none()),
        steps: fields.whole("steps")?,
        cfg: fields.real("cfg_scale")?,
        shift: fields.real("shift")?,
        seed,
        count: Some(count),
        rng: fields.text("rng")?,
        strength: strength.filter(|_| image.is_some()),
        feather: feather.filter(|_| mask.is_some()),
        invert_mask: inverted && mask.is_some(),
        image,
        mask,
        extend: None,
    };
    Ok((ask, fields.left()))
}

async fn txt2img(
    state: State<Arc<App>>,
    client: Extension<Client>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, Failure> {
    let bytes = guard::json(&state.0, &headers, body).await?;
    draw(state.0, client.0, bytes, false).await
}

async fn img2img(
    state: State<Arc<App>>,
    client: Extension<Client>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, Failure> {
    let bytes = guard::json(&state.0, &headers, body).await?;
    draw(state.0, client.0, bytes, true).await
}

async fn draw(
    app: Arc<App>,
    Client(client): Client,
    bytes: guard::Read,
    with_image: bool,
) -> Result<Json<Value>, Failure> {
    let (ask, ignored) = wait::blocking(move || parse(&bytes, with_image)).await?;
    let mut drawing = wait::ask(&app, own(&client), ask, true).await?;
    let pictures = wait::drawn(&mut drawing).await?;
    let files = wait::files(&app, &drawing, pictures, (ImageFormat::Png, 92)).await?;
    let settings = files.first().map(|file| file.settings.clone());
    let seeds: Vec<u64> = files.iter().map(|file| file.settings.seed).collect();
    let images: Vec<String> = files.iter().map(|file| to_base64(&file.bytes)).collect();
    let order = &drawing.order;
    let parameters = json!({
        "prompt": order.prompt, "negative_prompt": order.negative, "seed": order.seed, "steps": order.settings.steps,
        "cfg_scale": order.settings.cfg, "width": order.settings.width, "height": order.settings.height, "batch_size": order.count,
    });
    let mut info = parameters.clone();
    info["all_seeds"] = json!(seeds);
    info["sd_model_name"] = json!(drawing.model.name);
    info["sampler_name"] = json!("Euler");
    info["settings"] = json!(settings);
    info["without_meaning"] = json!(ignored);
    Ok(Json(
        json!({"images": images, "parameters": parameters, "info": info.to_string()}),
    ))
}

/// How far the client's request is that came first.
async fn progress(State(app): State<Arc<App>>, Extension(Client(client)): Extension<Client>) -> Json<Value> {
    let all = app.under_way();
    let client = own(&client);
    let mine = || all.values().filter(|one| one.client == client);
    let now = mine()
        .map(|one| one.progress.borrow().clone())
        .find(|progress| progress.steps.is_some());
    let (done, total) = now.as_ref().and_then(|progress| progress.steps).unwrap_or((0, 0));
    let image = now.and_then(|progress| progress.previews.last().map(|(_, image)| image.clone()));
    let shown = match image {
        Some(image) => wait::blocking(move || Ok(preview(&image))).await.ok().flatten(),
        None => None,
    };
    let share = if total == 0 { 0.0 } else { done as f64 / total as f64 };
    Json(json!({
        "progress": share, "eta_relative": 0.0,
        "state": {"skipped": false, "interrupted": false, "job": "", "job_count": mine().count(), "job_no": 0,
                  "sampling_step": done, "sampling_steps": total},
        "current_image": shown.map(|bytes| to_base64(&bytes)), "textinfo": null,
    }))
}

/// Gives up whatever the client waits for.
async fn interrupt(State(app): State<Arc<App>>, Extension(Client(client)): Extension<Client>) -> Json<Value> {
    let all = app.under_way();
    let client = own(&client);
    all.values()
        .filter(|one| one.client == client)
        .for_each(super::app::UnderWay::give_up);
    Json(json!({}))
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let entry = |name: &String| json!({"title": name, "model_name": name, "hash": null, "sha256": null, "filename": name, "config": null});
    Json(app.models.iter().map(|model| entry(&model.name)).collect())
}

async fn options(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"sd_model_checkpoint": app.models[0].name, "samples_format": "png"}))
}

/// One server draws with its first model here; asking for another one is a mistake.
async fn set_options(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, Failure> {
    let bytes = guard::body(&app, body).await?;
    let mut fields = Fields::of_json(&bytes)?;
    match fields.text("sd_model_checkpoint")? {
        Some(name) if name != app.models[0].name => Err(Failure::field(
            "sd_model_checkpoint",
            format!("this interface draws with {}", app.models[0].name),
        )),
        _ => Ok(Json(json!({}))),
    }
}

async fn samplers() -> Json<Value> {
    Json(json!([{"name": "Euler", "aliases": ["euler"], "options": {}}]))
}

async fn schedulers() -> Json<Value> {
    Json(
        json!([{"name": "automatic", "label": "Automatic", "aliases": null, "default_rho": -1, "need_inner_model": false}]),
    )
}

async fn nothing() -> Json<Value> {
    Json(json!([]))
}

async fn no_embeddings() -> Json<Value> {
    Json(json!({"loaded": {}, "skipped": {}}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_front_ends_send_is_understood() {
        let (ask, ignored) = parse(
            br#"{"prompt": "fox", "negative_prompt": "", "seed": -1, "steps": 8, "cfg_scale": 1, "width": 64, "height": 64,
                 "batch_size": 2, "n_iter": 3, "sampler_name": "Euler a", "restore_faces": false, "override_settings": {}}"#,
            false,
        )
        .unwrap();
        assert_eq!(
            (ask.count, ask.seed, ask.cfg, ask.width),
            (Some(6), None, Some(1.0), Some(64))
        );
        assert_eq!(ignored, ["override_settings", "restore_faces", "sampler_name"]);
        let (ask, _) = parse(
            br#"{"init_images": ["data:image/png;base64,UE5H"], "mask": "UE5H", "denoising_strength": 0.5, "mask_blur": 4, "width": 9,
                 "inpainting_mask_invert": 1, "seed": 5}"#,
            true,
        )
        .unwrap();
        assert_eq!(
            (ask.image.as_deref(), ask.mask.as_deref()),
            (Some(&b"PNG"[..]), Some(&b"PNG"[..]))
        );
        assert_eq!(
            (ask.strength, ask.feather, ask.width, ask.invert_mask),
            (Some(0.5), Some(4), None, true)
        );
        for bad in [
            r#"{}"#,
            r#"{"init_images": []}"#,
            r#"{"init_images": ["!"]}"#,
            r#"{"init_images": ["UE5H"], "seed": 0.5}"#,
        ] {
            assert!(parse(bad.as_bytes(), true).is_err(), "{bad}");
        }
    }
}
