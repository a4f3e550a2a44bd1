//! The report of a folder: its numbers, and the page in a real browser.

use std::fmt::Write;
use std::path::Path;

use l2p_tests::{Outcome, Suite};
use serde_json::{Value, json};

use super::{data, lines};
#[cfg(unix)]
use crate::browser::{Browser, PROGRAM};
use crate::data::write_grey;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::factory::page::says_what_is_in_the_folder", numbers);
    #[cfg(unix)]
    suite.with_program(PROGRAM, "data::factory::page::is_filtered_and_paged_through", clicked);
}

/// What would run as a script, or end an element, if a text of the set reached the page as it is.
const EVIL: &str = "</script><script>window.hacked=1</script><img src=x onerror=\"window.hacked=2\"> & more";

/// A folder of 60 prompts, three of which are not to be used, and pictures of the others.
fn folder(folder: &Path) -> Outcome {
    data(
        folder,
        &["prompts", "--count", "60", "--languages", "en,zh", "--out", "set"],
    )?
    .success()?;
    let set = folder.join("set");
    let mut prompts = lines(&set.join("prompts.jsonl"))?;
    prompts[7]["prompt"] = json!(EVIL);
    prompts[8]["prompt"] = json!("short");
    prompts[9]["prompt"] = json!("short too");
    let text: String = prompts.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(set.join("prompts.jsonl"), text)?;
    data(folder, &["check", "--out", "set"])?.success()?;
    std::fs::create_dir(set.join("000"))?;
    let mut metadata = String::new();
    for (index, prompt) in prompts.iter().enumerate().filter(|(index, _)| !(8..10).contains(index)) {
        let name = format!("000/{index:06}.png");
        write_grey(&set.join(&name), 40, 24, index as u8)?;
        writeln!(
            metadata,
            "{}",
            json!({"file_name": name, "prompt": prompt["prompt"], "seed": index})
        )?;
    }
    std::fs::write(set.join("metadata.jsonl"), metadata)?;
    std::fs::write(set.join("000/000003.png"), "no picture")?;
    Ok(())
}

fn numbers() -> Outcome {
    let temporary = tempfile::tempdir()?;
    folder(temporary.path())?;
    let finished = data(
        temporary.path(),
        &["report", "set", "--json", "--write", "page.html", "--pictures", "10"],
    )?
    .success()?;
    let numbers: Value = serde_json::from_str(&finished.stdout)?;
    for (key, expected) in [("prompts", 60), ("valid", 57), ("unchecked", 0), ("pictures", 58)] {
        assert_eq!(numbers[key], json!(expected), "{key}: {numbers}");
    }
    assert_eq!(numbers["rejected"], json!({"format": 1, "length": 2}));
    let by_class: u64 = numbers["sub_classes"]
        .as_object()
        .unwrap()
        .values()
        .map(|of| of[0].as_u64().unwrap())
        .sum();
    assert_eq!((by_class, numbers["sub_classes"].as_object().unwrap().len()), (60, 20));
    assert_eq!(
        (&numbers["languages"]["English"], &numbers["languages"]["Chinese"]),
        (&json!(30), &json!(30))
    );
    let page = std::fs::read_to_string(temporary.path().join("page.html"))?;
    assert!(!page.contains("<script>window.hacked") && !page.contains("<img src=x"));
    assert_eq!(
        page.matches("\"picture\":\"/9j/").count() + page.matches("\"picture\":null").count(),
        10
    );
    // Nothing beside it is needed.
    assert!(!page.contains("src=\"http") && !page.contains("href=") && page.contains("<svg"));
    Ok(())
}

#[cfg(unix)]
fn clicked() -> Outcome {
    let temporary = tempfile::tempdir()?;
    folder(temporary.path())?;
    data(temporary.path(), &["report", "set"])?.success()?;
    let mut browser = Browser::open_file(&temporary.path().join("set/report.html"))?;
    let figures = "document.querySelectorAll('#pictures figure').length";
    let place = "document.querySelector('#pictures .place').textContent";
    assert_eq!(browser.value(figures)?, json!(48));
    assert_eq!(browser.value(place)?, json!("page 1 of 2, 58 found"));
    browser.click("#pictures .next")?;
    browser.wait_for(&format!("{place} === 'page 2 of 2, 58 found'"))?;
    assert_eq!(browser.value(figures)?, json!(10));
    assert_eq!(
        browser.value("document.querySelector('#pictures .next').disabled")?,
        json!(true)
    );
    browser.click("#pictures .back")?;
    browser.wait_for(&format!("{place} === 'page 1 of 2, 58 found'"))?;
    // Pictures are decoded, but the one that is none.
    browser.wait_for(
        "[...document.querySelectorAll('#pictures img')].slice(0, 3).every(i => i.complete && i.naturalWidth === 40)",
    )?;
    assert_eq!(
        browser.value("document.querySelectorAll('#pictures figure p').length")?,
        json!(1)
    );
    // By sub-class, as a user would choose it.
    let choose = |value: &str| {
        format!(
            "(s => {{ s.value = {}; s.dispatchEvent(new Event('change')); return s.value; }})(document.querySelector('#pictures select'))",
            json!(value)
        )
    };
    assert_eq!(browser.value(&choose("nature/animals"))?, json!("nature/animals"));
    let found = browser.value(figures)?.as_u64().unwrap_or(0);
    let captions =
        "[...document.querySelectorAll('#pictures figcaption')].every(c => c.textContent.includes('nature/animals'))";
    assert!(
        (1..=4).contains(&found) && browser.value(captions)? == json!(true),
        "{found}"
    );
    browser.value(&choose(""))?;
    // By words, typed; the text that would be a script is a text.
    browser.click("#pictures input")?;
    browser.type_text("window.hacked")?;
    browser.wait_for(&format!("{place} === 'page 1 of 1, 1 found'"))?;
    let caption = browser.value("document.querySelector('#pictures figcaption').textContent")?;
    assert!(caption.as_str().unwrap_or_default().starts_with(EVIL), "{caption}");
    browser.click("#pictures img")?;
    browser.wait_for("document.querySelector('#pictures figure').classList.contains('open')")?;
    let refused = browser.value("document.querySelector('#refused .items').textContent")?;
    let refused = refused.as_str().unwrap_or_default();
    assert!(
        refused.contains(EVIL) && refused.contains("has 5 characters, expected"),
        "{refused}"
    );
    assert_eq!(browser.value("typeof window.hacked")?, json!("undefined"));
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    Ok(())
}
