//! Pieces of pages that need nothing beside them.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:780px;margin:2em auto;padding:0 1em;color:#222}\
    table{border-collapse:collapse;margin:1em 0}td{padding:2px 12px 2px 0;vertical-align:top}\
    td:first-child{color:#666}svg,img{max-width:100%;height:auto}figure{margin:1em 0}figcaption{color:#666}\
    details{margin:1em 0}.sheet img{image-rendering:auto;width:100%}";

/// Text that may stand between tags and in attributes.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A page with this title above the body, which is HTML.
pub fn page(title: &str, body: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><h1>{title}</h1>\n{body}</body></html>\n"
    )
}

/// A part of a page under a headline; `body` is HTML.
pub fn part(title: &str, body: &str) -> String {
    format!("<h2>{}</h2>{body}\n", escaped(title))
}

/// A table of texts.
pub fn table<const COLUMNS: usize>(rows: impl IntoIterator<Item = [String; COLUMNS]>) -> String {
    let row = |cells: [String; COLUMNS]| {
        let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
        format!("<tr>{cells}</tr>")
    };
    format!("<table>{}</table>\n", rows.into_iter().map(row).collect::<String>())
}

/// A list of texts.
pub fn list(items: impl IntoIterator<Item = String>) -> String {
    let items = items.into_iter().map(|item| format!("<li>{}</li>", escaped(&item)));
    format!("<ul>{}</ul>", items.collect::<String>())
}

/// A figure; `content` is HTML, such as a chart.
pub fn figure(content: &str) -> String {
    format!("<figure>{content}</figure>\n")
}

/// A sheet of samples, as a PNG file's bytes, with a caption below.
pub fn sheet(png: &[u8], caption: &str) -> String {
    format!(
        "<figure class=\"sheet\"><img alt=\"samples\" src=\"data:image/png;base64,{}\"><figcaption>{}</figcaption></figure>\n",
        BASE64_STANDARD.encode(png),
        escaped(caption)
    )
}

/// Preformatted text that is shown on demand.
pub fn details(title: &str, text: &str) -> String {
    format!(
        "<details><summary>{}</summary><pre>{}</pre></details>\n",
        escaped(title),
        escaped(text)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_escaped_and_pictures_are_in_the_page() {
        let body = [
            table([["a < b".to_owned(), "1".to_owned()]]),
            list(["c & d".to_owned()]),
            details("more", "\"e\""),
            sheet(&[0xff, 0xfe], "step 1 > 0"),
        ];
        let page = page("<run>", &part("s", &body.concat()));
        for expected in [
            "<h1>&lt;run&gt;</h1>",
            "<tr><td>a &lt; b</td><td>1</td></tr>",
            "<li>c &amp; d</li>",
            "<pre>&quot;e&quot;</pre>",
            "base64,//4=\"",
            "step 1 &gt; 0",
        ] {
            assert!(page.contains(expected), "{expected}: {page}");
        }
    }
}
