//! What clients ask for and get, in each of the dialects.

use l2p_engine::image_io::{Filter, RgbImage, WriteOptions, read_cover, read_image, read_settings, write_image};
use l2p_tests::{Outcome, Suite, models_folder};
use serde_json::{Value, json};

use super::{Server, decoded, encoded, request, sampled};

pub fn register(suite: &mut Suite) {
    suite.cpu("server::api::pictures_are_those_of_l2p_sample", same_bits);
    suite.cpu("server::api::edits_keep_what_the_mask_keeps", edits);
    suite.cpu("server::api::drawing_is_told_as_it_happens", events);
    suite.cpu("server::api::front_ends_of_automatic1111_are_answered", automatic1111);
    suite.cpu("server::api::settings_are_read_from_pictures", settings);
    suite.cpu("server::api::other_formats_and_addresses", formats);
}

const SIZE: [&str; 8] = ["--width", "64", "--height", "48", "--steps", "3", "--seed", "5"];

fn same_bits() -> Outcome {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&[])?;
    let asked = json!({"prompt": "slice of pizza", "size": "64x48", "steps": 3, "seed": 5, "n": 2, "cfg": 1.0});
    let answer = server.post("/v1/images/generations", &asked)?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json()?;
    let data = answer["data"].as_array().ok_or("no data")?;
    assert_eq!(data.len(), 2);
    for (number, seed) in ["5", "6"].into_iter().enumerate() {
        let flags = [
            &["--prompt", "slice of pizza", "--cfg", "1"],
            &SIZE[..6],
            &["--seed", seed],
        ]
        .concat();
        let expected = sampled(folder.path(), &flags)?;
        assert!(decoded(&data[number]["b64_json"])? == expected, "picture {number}");
        assert_eq!(data[number]["seed"], json!(5 + number));
    }
    assert_eq!(
        (&answer["size"], &answer["steps"], &answer["cfg"]),
        (&json!("64x48"), &json!(3), &json!(1.0))
    );
    // Again, from what is kept; with guidance, and in the other dialects.
    let asked =
        json!({"prompt": "fox", "negative": "cat", "width": 64, "height": 48, "steps": 3, "seed": 5, "cfg": 3.0});
    let flags = [&["--prompt", "fox", "--negative", "cat", "--cfg", "3"], &SIZE[..]].concat();
    let expected = sampled(folder.path(), &flags)?;
    for _ in 0..2 {
        let events = server.post("/api/draw", &asked)?.events()?;
        let (_, picture) = events.iter().find(|(name, _)| name == "picture").ok_or("no picture")?;
        assert!(decoded(&picture["image"])? == expected);
    }
    let asked = json!({"prompt": "fox", "negative_prompt": "cat", "width": 64, "height": 48, "steps": 3, "seed": 5, "cfg_scale": 3});
    let answer = server.post("/sdapi/v1/txt2img", &asked)?.json()?;
    assert!(decoded(&answer["images"][0])? == expected);
    Ok(())
}

/// The demo's fox, as a file.
fn init(folder: &std::path::Path, width: usize, height: usize) -> Result<RgbImage, libtest_mimic::Failed> {
    let image = read_cover(
        &models_folder().join("demo/pictures/fox.webp"),
        width,
        height,
        Filter::default(),
    )?;
    write_image(&folder.join("init.png"), &image, &WriteOptions::default())?;
    Ok(image)
}

fn edits() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let (width, height, column) = (75, 61, 40);
    let init = init(folder, width, height)?;
    let row: Vec<u8> = (0..width)
        .flat_map(|x| [if x >= column { 255 } else { 0 }; 3])
        .collect();
    let mask = RgbImage::new(width, height, row.repeat(height))?;
    write_image(&folder.join("mask.png"), &mask, &WriteOptions::default())?;
    let [init_file, mask_file] = ["init.png", "mask.png"].map(|name| std::fs::read(folder.join(name)));
    let (init_file, mask_file) = (init_file?, mask_file?);
    let mut body = Vec::new();
    let mut part = |name: &str, bytes: &[u8], file: bool| {
        let file = if file {
            "; filename=\"a.png\"\r\ncontent-type: image/png"
        } else {
            ""
        };
        body.extend_from_slice(
            format!("--xx\r\ncontent-disposition: form-data; name=\"{name}\"{file}\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(bytes);
        body.extend_from_slice(b"\r\n");
    };
    for (name, text) in [
        ("prompt", "slice of pizza"),
        ("steps", "3"),
        ("seed", "5"),
        ("cfg", "1"),
    ] {
        part(name, text.as_bytes(), false);
    }
    part("image", &init_file, true);
    part("mask", &mask_file, true);
    body.extend_from_slice(b"--xx--\r\n");
    let server = Server::start(&[])?;
    let form = "content-type: multipart/form-data; boundary=xx\r\n";
    let answer = server.exchange(&request("/v1/images/edits", form, &body))?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let edited = decoded(&answer.json()?["data"][0]["b64_json"])?;
    let flags = [
        "--prompt",
        "slice of pizza",
        "--init",
        "init.png",
        "--mask",
        "mask.png",
        "--steps",
        "3",
        "--seed",
        "5",
        "--cfg",
        "1",
    ];
    assert!(edited == sampled(folder, &flags)?);
    std::fs::write(folder.join("edited.png"), &edited)?;
    let edited = read_image(&folder.join("edited.png"))?;
    let kept = |image: &RgbImage| -> Vec<u8> {
        let rows = image.pixels().chunks_exact(3 * width);
        rows.flat_map(|row| &row[..3 * column]).copied().collect()
    };
    assert_eq!((edited.width(), edited.height()), (width, height));
    assert_eq!(kept(&edited), kept(&init));
    // The other dialects' ways to say the same; there the mask is meant the other way.
    let asked = json!({"prompt": "slice of pizza", "steps": 3, "seed": 5, "cfg": 1, "image": encoded(&init_file),
                       "mask": encoded(&mask_file)});
    let events = server.post("/api/draw", &asked)?.events()?;
    let (_, picture) = events.iter().find(|(name, _)| name == "picture").ok_or("no picture")?;
    assert!(decoded(&picture["image"])? == std::fs::read(folder.join("edited.png"))?);
    let asked = json!({"prompt": "slice of pizza", "steps": 3, "seed": 5, "init_images": [encoded(&init_file)], "mask": encoded(&mask_file),
                       "inpainting_mask_invert": 1, "width": 512, "height": 512, "denoising_strength": 1.0});
    let answer = server.post("/sdapi/v1/img2img", &asked)?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    std::fs::write(folder.join("inverted.png"), decoded(&answer.json()?["images"][0])?)?;
    let inverted = read_image(&folder.join("inverted.png"))?;
    assert_ne!(kept(&inverted), kept(&init));
    Ok(())
}

fn events() -> Outcome {
    let server = Server::start(&[])?;
    let asked = json!({"prompt": "fox", "width": 128, "height": 128, "steps": 20, "seed": 5, "count": 2});
    let events = server.post("/api/draw", &asked)?.events()?;
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((names[0], names[names.len() - 1]), ("accepted", "done"), "{names:?}");
    assert_eq!(names.iter().filter(|name| **name == "picture").count(), 2);
    assert_eq!(events[0].1["settings"]["seed"], json!(5));
    let steps: Vec<u64> = events
        .iter()
        .filter(|(name, _)| name == "step")
        .filter_map(|(_, data)| data["done"].as_u64())
        .collect();
    assert!(steps.is_sorted() && steps.last() == Some(&40), "{steps:?}");
    let preview = events.iter().find(|(name, _)| name == "preview").ok_or("no preview")?;
    let bytes = decoded(&preview.1["image"])?;
    assert!(bytes.starts_with(b"\xff\xd8"), "a preview is a JPEG");
    Ok(())
}

fn automatic1111() -> Outcome {
    let server = Server::start(&[])?;
    let models = server.get("/sdapi/v1/sd-models")?.json()?;
    assert_eq!(models[0]["model_name"], json!("pixel"));
    let progress = server.get("/sdapi/v1/progress?skip_current_image=false")?.json()?;
    assert_eq!(
        (&progress["progress"], &progress["current_image"]),
        (&json!(0.0), &Value::Null)
    );
    for path in ["samplers", "schedulers", "options", "upscalers", "loras", "embeddings"] {
        assert_eq!(server.get(&format!("/sdapi/v1/{path}"))?.status, 200, "{path}");
    }
    let other = server.post("/sdapi/v1/options", &json!({"sd_model_checkpoint": "other"}))?;
    assert_eq!(other.status, 400);
    let asked = json!({"prompt": "fox", "width": 64, "height": 64, "steps": 2, "batch_size": 2, "sampler_name": "Euler a", "seed": -1});
    let answer = server.post("/sdapi/v1/txt2img", &asked)?.json()?;
    let info: Value = serde_json::from_str(answer["info"].as_str().ok_or("no info")?)?;
    assert_eq!(answer["images"].as_array().map(Vec::len), Some(2));
    assert_eq!(info["all_seeds"].as_array().map(Vec::len), Some(2));
    assert_eq!(info["without_meaning"], json!(["sampler_name"]));
    Ok(())
}

fn settings() -> Outcome {
    let folder = tempfile::tempdir()?;
    let bytes = sampled(folder.path(), &[&["--prompt", "fox 🦊"], &SIZE[..]].concat())?;
    let server = Server::start(&[])?;
    let answer = server.exchange(&request("/api/settings", "", &bytes))?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let expected = read_settings(&folder.path().join("sampled.png"))?;
    assert_eq!(answer.json()?, serde_json::to_value(expected)?);
    write_image(
        &folder.path().join("bare.png"),
        &RgbImage::new(1, 1, vec![0; 3])?,
        &WriteOptions::default(),
    )?;
    let bare = server.exchange(&request(
        "/api/settings",
        "",
        &std::fs::read(folder.path().join("bare.png"))?,
    ))?;
    assert_eq!(bare.status, 400);
    Ok(())
}

fn formats() -> Outcome {
    let server = Server::start(&[])?;
    let asked = |format: &str| json!({"prompt": "fox", "size": "64x64", "steps": 2, "response_format": "url", "output_format": format});
    for (format, media_type, signature) in [
        ("png", "image/png", &b"\x89PNG"[..]),
        ("jpeg", "image/jpeg", b"\xff\xd8"),
        ("webp", "image/webp", b"RIFF"),
    ] {
        let answer = server.post("/v1/images/generations", &asked(format))?.json()?;
        let url = answer["data"][0]["url"].as_str().ok_or("no address")?;
        let path = url.strip_prefix("http://localhost").ok_or("another host")?;
        let file = server.get(path)?;
        assert!(
            file.status == 200 && file.head.contains(media_type) && file.body.starts_with(signature),
            "{format}"
        );
    }
    assert_eq!(server.get("/v1/files/0.png")?.status, 404);
    let models = server.get("/v1/models")?.json()?;
    assert_eq!(models["data"][0]["id"], json!("pixel"));
    assert_eq!(server.get("/v1/models/pixel")?.status, 200);
    assert_eq!(server.get("/v1/models/other")?.status, 404);
    assert_eq!(
        server
            .post("/v1/images/generations", &json!({"prompt": "x", "model": "other"}))?
            .status,
        404
    );
    let counts = server.get("/metrics")?.text();
    assert!(
        counts.contains("l2p_pictures_total 3") && counts.contains("l2p_waiting 0"),
        "{counts}"
    );
    Ok(())
}
