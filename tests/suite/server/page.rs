//! The page in a real browser.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use l2p_engine::image_io::{RgbImage, WriteOptions, read_image, write_image};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Server, decoded, sampled};
use crate::browser::{Browser, PROGRAM};

pub fn register(suite: &mut Suite) {
    suite.with_program(PROGRAM, "server::page::draws_a_picture", draws);
    suite.with_program(PROGRAM, "server::page::takes_settings_and_paints_masks", edits);
    suite.with_program(PROGRAM, "server::page::fits_narrow_screens_and_asks_for_keys", narrow);
}

/// Opens the page of a server.
fn open(server: &Server, size: [usize; 2]) -> Result<Browser, Failed> {
    let mut browser = Browser::open(&format!("http://127.0.0.1:{}/", server.port), size)?;
    browser.wait_for("document.body.dataset.ready === 'yes'")?;
    Ok(browser)
}

/// Puts a value into a field, as typing does.
fn fill(browser: &mut Browser, id: &str, value: &str) -> Result<(), Failed> {
    let script = format!(
        "(f => {{ f.value = {}; f.dispatchEvent(new Event('input', {{bubbles: true}})); f.dispatchEvent(new Event('change', {{bubbles: true}})); }})(document.getElementById('{id}'))",
        json!(value)
    );
    browser.value(&script).map(|_| ())
}

/// The file of the picture that was drawn last, from the browser's store: the page may not fetch what it shows.
const FILE: &str = "new Promise(done => { const opened = indexedDB.open('l2p'); opened.onsuccess = () => {
    const all = opened.result.transaction('pictures').objectStore('pictures').getAll();
    all.onsuccess = () => { const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(all.result.at(-1).blob); }; }; })";

/// A text that would run as a script if it reached the page as markup.
const EVIL: &str = "<img src=x onerror=\"window.hacked=1\"> fox";

fn draws() -> Outcome {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&[])?;
    let mut browser = open(&server, [1300, 1000])?;
    browser.click("#prompt")?;
    browser.type_text(EVIL)?;
    for (id, value) in [
        ("width", "120"),
        ("height", "120"),
        ("steps", "16"),
        ("seed", "5"),
        ("cfg", "1"),
    ] {
        fill(&mut browser, id, value)?;
    }
    assert_eq!(
        browser.value("document.getElementById('rounded').textContent")?,
        json!("Drawn at 128 × 128: this model draws multiples of 16.")
    );
    browser.press("Enter", true)?;
    browser.wait_for("document.getElementById('status').textContent.startsWith('Done in')")?;
    browser.wait_for(
        "document.querySelector('#shown img').complete && document.querySelector('#shown img').naturalWidth === 128",
    )?;
    assert_ne!(
        browser.value("Number(document.body.dataset.previews ?? 0)")?,
        json!(0),
        "previews were shown"
    );
    let expected = sampled(
        folder.path(),
        &[
            "--prompt", EVIL, "--width", "128", "--height", "128", "--steps", "16", "--seed", "5", "--cfg", "1",
        ],
    )?;
    let shown = browser.value(FILE)?;
    assert!(decoded(&shown)? == expected, "the picture is l2p-sample's");
    assert_eq!(browser.value("window.hacked")?, Value::Null);
    // It is there after the page is loaded again, and gives its settings.
    browser.value("document.body.dataset.ready = 'no'")?;
    browser.reload()?;
    browser
        .wait_for("document.body?.dataset.ready === 'yes' && document.querySelectorAll('#history li').length === 1")?;
    browser.click("#history button")?;
    assert_eq!(browser.value("document.getElementById('seed').value")?, json!("5"));
    assert_eq!(browser.value("document.getElementById('prompt').value")?, json!(EVIL));
    // A second one beside the first.
    fill(&mut browser, "seed", "6")?;
    browser.click("#draw")?;
    browser.wait_for("document.querySelectorAll('#history li').length === 2")?;
    for entry in [1, 2] {
        browser.click(&format!("#history li:nth-child({entry}) button:nth-child(3)"))?;
    }
    browser.wait_for("!document.getElementById('compare').hidden && [...document.querySelectorAll('.pane img')].every(i => i.naturalWidth === 128)")?;
    // What is cancelled says so, and the next one is drawn.
    for (id, value) in [("steps", "100"), ("width", "256"), ("height", "256")] {
        fill(&mut browser, id, value)?;
    }
    browser.click("#draw")?;
    browser.wait_for("document.getElementById('status').textContent.startsWith('Step')")?;
    browser.press("Escape", false)?;
    browser.wait_for(
        "document.getElementById('status').textContent === 'Cancelled' && !document.getElementById('draw').disabled",
    )?;
    browser.click("#history li:last-child button:last-child")?;
    browser.wait_for("document.querySelectorAll('#history li').length === 1")?;
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    if let Some(path) = std::env::var_os("L2P_SCREENSHOT") {
        browser.click("#uncompare")?;
        browser.click("#history li button:last-child")?;
        for (id, value) in [
            ("width", "128"),
            ("height", "128"),
            ("steps", "20"),
            ("cfg", "2.5"),
            ("seed", ""),
        ] {
            fill(&mut browser, id, value)?;
        }
        for prompt in ["red apple", "fox", "smiling face with sunglasses", "slice of pizza"] {
            fill(&mut browser, "prompt", prompt)?;
            browser.value("document.getElementById('status').textContent = ''")?;
            browser.click("#draw")?;
            browser.wait_for("document.getElementById('status').textContent.startsWith('Done in')")?;
        }
        browser.value("scrollTo(0, 0)")?;
        let shot = browser.screenshot()?;
        std::fs::File::create(path)?.write_all(&BASE64.decode(shot)?)?;
    }
    Ok(())
}

fn edits() -> Outcome {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&[])?;
    let mut browser = open(&server, [1300, 1000])?;
    let drawn = sampled(
        folder.path(),
        &[
            "--prompt", "fox", "--width", "64", "--height", "64", "--steps", "2", "--seed", "9",
        ],
    )?;
    let drop = |bytes: &[u8]| {
        format!(
            "(t => {{ t.items.add(new File([Uint8Array.from(atob({}), c => c.charCodeAt(0))], 'a.png', {{type: 'image/png'}}));
             document.body.dispatchEvent(new DragEvent('drop', {{dataTransfer: t, bubbles: true, cancelable: true}})); }})(new DataTransfer())",
            json!(BASE64.encode(bytes))
        )
    };
    browser.value(&drop(&drawn))?;
    browser.wait_for(
        "document.getElementById('seed').value === '9' && document.getElementById('prompt').value === 'fox'",
    )?;
    // A picture without settings is one to begin with.
    let grey = RgbImage::new(64, 64, vec![90; 3 * 64 * 64])?;
    write_image(&folder.path().join("grey.png"), &grey, &WriteOptions::default())?;
    browser.value(&drop(&std::fs::read(folder.path().join("grey.png"))?))?;
    browser.wait_for("!document.getElementById('begun').hidden && document.getElementById('mask').width === 64")?;
    // The right part of it is painted over, and drawn anew.
    fill(&mut browser, "radius", "40")?;
    browser.drag("#mask", [0.8, 0.05], [0.8, 0.95])?;
    browser.wait_for("document.getElementById('strength').disabled")?;
    browser.click("#draw")?;
    browser.wait_for("document.getElementById('status').textContent.startsWith('Done in')")?;
    std::fs::write(folder.path().join("edited.png"), decoded(&browser.value(FILE)?)?)?;
    let edited = read_image(&folder.path().join("edited.png"))?;
    assert_eq!((edited.width(), edited.height()), (64, 64));
    let pixel = |x: usize, y: usize| &edited.pixels()[3 * (64 * y + x)..][..3];
    assert!(
        (0..64).all(|y| (0..20).all(|x| pixel(x, y) == [90; 3])),
        "what is not painted stays"
    );
    assert!((20..60).any(|y| pixel(51, y) != [90; 3]), "what is painted is drawn");
    // Undone, nothing is painted.
    browser.click("#undo")?;
    browser.wait_for("!document.getElementById('strength').disabled")?;
    // The one complaint is the browser's own, of the picture that had no settings.
    assert!(
        browser
            .complaints
            .iter()
            .all(|complaint| complaint.contains("/api/settings")),
        "{:?}",
        browser.complaints
    );
    Ok(())
}

fn narrow() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("keys");
    std::fs::write(&path, "0123456789abcdef\n")?;
    let server = Server::start(&["--api-key-file", &path.display().to_string()])?;
    let mut browser = Browser::open(&format!("http://127.0.0.1:{}/", server.port), [360, 740])?;
    browser.wait_for("document.getElementById('key').open")?;
    browser.click("#key-text")?;
    browser.type_text("0123456789abcdef")?;
    browser.click("#key-done")?;
    browser.wait_for("document.body.dataset.ready === 'yes'")?;
    browser.value("document.getElementById('edit').open = true")?;
    assert_eq!(
        browser.value("document.documentElement.scrollWidth <= 360")?,
        json!(true)
    );
    // Every field has a label, and the server's own words are shown where it refuses.
    let unlabelled = "[...document.querySelectorAll('input:not([hidden]), select, textarea')].filter(f => !f.labels.length).map(f => f.id)";
    assert_eq!(browser.value(unlabelled)?, json!([]));
    fill(&mut browser, "prompt", "fox")?;
    browser.value("document.getElementById('steps').removeAttribute('min')")?;
    fill(&mut browser, "steps", "100000")?;
    browser.click("#draw")?;
    browser.wait_for("document.getElementById('error').textContent.startsWith('steps: expected 1 to 100')")?;
    Ok(())
}
