//! The writer of SVG pictures: the same calls give the same bytes.

use std::fmt::{Display, Write};

use super::html::escaped;

/// Okabe and Ito's colours, which can be told apart with any kind of colour vision; black is left out.
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c",
];

/// Of axes and their words.
pub(super) const INK: &str = "#444";

/// Of lines across a plot.
pub(super) const GRID: &str = "#eee";

/// The colour of the `index`-th thing in a picture.
pub fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// On which side of its place a text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// Its middle is there.
    Middle,
    /// It ends there.
    End,
}

impl Anchor {
    fn name(self) -> &'static str {
        match self {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        }
    }
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stroke {
    /// Its colour.
    pub colour: &'static str,
    /// Pixels.
    pub width: f64,
    /// Whether it has gaps.
    pub dashed: bool,
}

impl Stroke {
    /// A line without gaps.
    pub fn of(colour: &'static str, width: f64) -> Self {
        Stroke {
            colour,
            width,
            dashed: false,
        }
    }
}

/// A picture that is being drawn, on white; places are pixels from its upper left corner.
#[derive(Debug)]
pub struct Svg {
    text: String,
}

impl Svg {
    /// An empty picture of this size in CSS pixels.
    pub fn new(width: f64, height: f64) -> Self {
        let mut svg = Svg { text: String::new() };
        svg.line(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             font-family=\"system-ui, sans-serif\" font-size=\"12\">"
        ));
        svg.line("<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>");
        svg
    }

    fn line(&mut self, element: impl Display) {
        // Writing to a string succeeds.
        let _ = writeln!(self.text, "{element}");
    }

    /// A headline.
    pub fn title(&mut self, (x, y): (f64, f64), anchor: Anchor, words: &str) {
        self.line(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{}\" font-size=\"14\" font-weight=\"600\">{}</text>",
            anchor.name(),
            escaped(words)
        ));
    }

    /// A text.
    pub fn words(&mut self, (x, y): (f64, f64), anchor: Anchor, colour: &str, words: &str) {
        self.line(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{}\" fill=\"{colour}\">{}</text>",
            anchor.name(),
            escaped(words)
        ));
    }

    /// A text from the bottom up, its middle at this place.
    pub fn words_upwards(&mut self, (x, y): (f64, f64), colour: &str, words: &str) {
        self.line(format_args!(
            "<text transform=\"translate({x:.1} {y:.1}) rotate(-90)\" text-anchor=\"middle\" fill=\"{colour}\">{}</text>",
            escaped(words)
        ));
    }

    /// Lines from point to point; a point that stands nowhere leaves a gap.
    pub fn lines(&mut self, points: impl IntoIterator<Item = Option<(f64, f64)>>, stroke: Stroke) {
        let (mut path, mut pen) = (String::new(), 'M');
        for point in points {
            match point {
                Some((x, y)) => {
                    let _ = write!(path, "{pen}{x:.1} {y:.1}");
                    pen = 'L';
                }
                None => pen = 'M',
            }
        }
        let Stroke { colour, width, dashed } = stroke;
        let dash = if dashed { " stroke-dasharray=\"5 3\"" } else { "" };
        self.line(format_args!(
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"{dash}/>"
        ));
    }

    /// A mark for the `index`-th thing, told apart by those who see no colours, too: a circle, a square or a diamond.
    pub fn mark(&mut self, (x, y): (f64, f64), index: usize) {
        let fill = colour(index);
        match index % 3 {
            0 => self.line(format_args!(
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" fill=\"{fill}\"/>"
            )),
            1 => self.line(format_args!(
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\" fill=\"{fill}\"/>",
                x - 4.0,
                y - 4.0
            )),
            _ => self.line(format_args!(
                "<path d=\"M{x:.1} {:.1}l5.5 5.5l-5.5 5.5l-5.5 -5.5z\" fill=\"{fill}\"/>",
                y - 5.5
            )),
        }
    }

    /// The whole file.
    pub fn finish(mut self) -> String {
        self.line("</svg>");
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_gaps_and_texts_are_escaped() {
        let mut svg = Svg::new(10.0, 20.0);
        let points = [Some((0.0, 1.0)), Some((1.0, 2.0)), None, Some((3.0, 4.0))];
        svg.lines(points, Stroke::of(colour(7), 2.0));
        svg.words((1.0, 2.0), Anchor::End, INK, "a < b & c");
        let text = svg.finish();
        assert!(
            text.contains("d=\"M0.0 1.0L1.0 2.0M3.0 4.0\"") && text.contains(colour(0)),
            "{text}"
        );
        assert!(text.contains("a &lt; b &amp; c") && text.contains("\"end\""), "{text}");
        assert!(text.starts_with("<svg") && text.ends_with("</svg>\n"), "{text}");
    }
}
