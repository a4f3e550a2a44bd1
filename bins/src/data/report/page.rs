//! The page itself: numbers as tables and a chart, and lists that a script of a few lines filters and pages through. Texts of a set reach
//! the page escaped, or as JSON that cannot end its element, and the script only ever sets them as text.

use l2p_engine::report::html::{details, escaped, figure, page as html_page, part, table};
use l2p_engine::report::{Chart, Scale, Series};
use serde::Serialize;

use super::Content;

/// Characters of a bar of the histogram.
const BAR: usize = 10;

/// The page.
pub(super) fn page(title: &str, content: &Content) -> anyhow::Result<String> {
    let body = [
        format!("<style>{}</style>", include_str!("page.css")),
        part("Overview", &overview(content)),
        part("Sub-classes", &sub_classes(content)),
        part("Length of prompts", &lengths(content)),
        part("Refused", &refused(content)?),
        part("Pictures", &pictures(content)?),
        content
            .manifest
            .as_ref()
            .map(|manifest| details("The manifest", &format!("{manifest:#}")))
            .unwrap_or_default(),
        format!("<script>{}</script>", include_str!("page.js")),
    ];
    Ok(html_page(title, &body.concat()))
}

fn overview(content: &Content) -> String {
    let numbers = &content.numbers;
    let row = |name: &str, value: String| [name.to_owned(), value];
    let mut rows = vec![
        row("prompts", numbers.prompts.to_string()),
        row("may be used", numbers.valid.to_string()),
        row("not checked", numbers.unchecked.to_string()),
        row("pictures", numbers.pictures.to_string()),
        row(
            "near-duplicates dropped",
            format!("{:.2} % of all texts", 100.0 * numbers.duplicate_rate),
        ),
    ];
    rows.extend(
        numbers
            .languages
            .iter()
            .map(|(name, count)| row(&format!("in {name}"), count.to_string())),
    );
    table(rows)
}

fn sub_classes(content: &Content) -> String {
    let head = ["sub-class", "prompts", "may be used", "pictures"].map(String::from);
    let rows = content.numbers.sub_classes.iter();
    let rows = rows.map(|(name, counts)| {
        [
            name.clone(),
            counts[0].to_string(),
            counts[1].to_string(),
            counts[2].to_string(),
        ]
    });
    table(std::iter::once(head).chain(rows))
}

fn lengths(content: &Content) -> String {
    let series: Vec<Series> = content
        .lengths
        .iter()
        .map(|(name, lengths)| Series {
            name: name.clone(),
            points: outline(lengths),
            dashed: false,
        })
        .collect();
    if series.is_empty() {
        return "<p>No prompts.</p>".into();
    }
    let chart = Chart {
        title: "Prompts by length",
        x: "characters",
        y: "prompts",
        series: &series,
        scale: Scale::Linear,
    };
    figure(&chart.svg())
}

/// The outline of a histogram's bars.
fn outline(lengths: &[usize]) -> Vec<(f64, f64)> {
    let (Some(least), Some(most)) = (lengths.iter().min(), lengths.iter().max()) else {
        return Vec::new();
    };
    let (first, last) = (least / BAR, most / BAR);
    let mut points = vec![((first * BAR) as f64, 0.0)];
    for bar in first..=last {
        let count = lengths.iter().filter(|length| *length / BAR == bar).count() as f64;
        points.extend([((bar * BAR) as f64, count), (((bar + 1) * BAR) as f64, count)]);
    }
    points.push((((last + 1) * BAR) as f64, 0.0));
    points
}

fn refused(content: &Content) -> anyhow::Result<String> {
    let numbers = &content.numbers;
    let rows = |stage: &'static str, counts: &std::collections::BTreeMap<String, usize>| -> Vec<[String; 3]> {
        counts
            .iter()
            .map(|(rule, count)| [stage.to_owned(), rule.clone(), count.to_string()])
            .collect()
    };
    let rows = [
        rows("while writing", &numbers.dropped),
        rows("by the check", &numbers.rejected),
    ]
    .concat();
    let counts = match rows.is_empty() {
        true => "<p>Nothing was refused.</p>".to_owned(),
        false => table(rows),
    };
    if content.refused.is_empty() {
        return Ok(counts);
    }
    Ok(format!(
        "{counts}{}",
        list("refused", &["rule", "sub_class"], &content.refused)?
    ))
}

fn pictures(content: &Content) -> anyhow::Result<String> {
    list("pictures", &["sub_class", "language"], &content.shown)
}

/// A list that the script fills: a search field, a choice for each of the named fields, and buttons to page through.
fn list(name: &str, fields: &[&str], items: &impl Serialize) -> anyhow::Result<String> {
    // Within a script element nothing but "</" and "<!" ends or changes it.
    let json = serde_json::to_string(items)?.replace('<', "\\u003c");
    let choices: String = fields
        .iter()
        .map(|field| {
            let label = escaped(&field.replace('_', "-"));
            format!(
                "<label>{label} <select data-field=\"{}\"><option value=\"\">all</option></select></label> ",
                escaped(field)
            )
        })
        .collect();
    Ok(format!(
        "<div class=\"list\" id=\"{name}\"><p class=\"controls\">{choices}<input type=\"search\" placeholder=\"search\" aria-label=\"search\">\
         <button type=\"button\" class=\"back\">back</button> <span class=\"place\"></span> \
         <button type=\"button\" class=\"next\">next</button></p><div class=\"items\"></div>\
         <script type=\"application/json\">{json}</script></div>"
    ))
}
