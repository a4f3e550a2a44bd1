//! Plots as SVG text: the same records give the same bytes.

use std::fmt::Write;

/// Pixels.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 56.0;

/// Told apart by those who see no colours, too: each series also has a mark of its own.
const COLORS: [&str; 7] = [
    "#0b66c3", "#d1495b", "#2e8b57", "#8d6a9f", "#e08e2b", "#5b6770", "#00868b",
];

/// Room for a legend beside the plot.
const LEGEND: f64 = 190.0;

/// An axis with a logarithmic scale.
#[derive(Clone, Debug)]
pub struct LogAxis {
    /// What it shows, with its unit.
    pub label: String,
    first: f64,
    last: f64,
}

impl LogAxis {
    /// An axis that reaches from below the smallest to above the largest of these positive values.
    pub fn over(label: &str, values: impl Iterator<Item = f64>) -> Self {
        let (mut first, mut last) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| *value > 0.0 && value.is_finite()) {
            first = first.min(value);
            last = last.max(value);
        }
        if first > last {
            (first, last) = (1.0, 10.0);
        }
        LogAxis {
            label: label.into(),
            first: first / 1.5,
            last: last * 1.5,
        }
    }

    /// 0 at the start, 1 at the end.
    fn place(&self, value: f64) -> f64 {
        (value / self.first).ln() / (self.last / self.first).ln()
    }

    /// 1, 2 and 5 times powers of ten within; the ones alone where that would be many.
    fn ticks(&self) -> Vec<f64> {
        let decades = self.first.log10().floor() as i32..=self.last.log10().ceil() as i32;
        let factors: &[f64] = match (self.last / self.first).log10() > 2.5 {
            true => &[1.0],
            false => &[1.0, 2.0, 5.0],
        };
        let all = decades.flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)));
        all.filter(|value| (self.first..=self.last).contains(value)).collect()
    }
}

/// Points that belong together.
#[derive(Clone, Debug)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// Category and value.
    pub points: Vec<(usize, f64)>,
}

/// Values by category, as lines.
#[derive(Clone, Debug)]
pub struct LineChart {
    /// Above the plot.
    pub title: String,
    /// Along the horizontal axis.
    pub categories: Vec<String>,
    /// What the values are.
    pub axis: String,
    /// The lines.
    pub series: Vec<Series>,
}

/// A frame that is drawn in.
struct Canvas {
    text: String,
    /// Where the plot ends.
    right: f64,
}

impl Canvas {
    fn new(title: &str, right: f64) -> Self {
        let text = String::new();
        let mut canvas = Canvas { text, right };
        canvas.line(&format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">"
        ));
        canvas.line(&format!(
            "<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>"
        ));
        canvas.words(WIDTH / 2.0, 22.0, "middle", "#1c1c1c", title);
        canvas
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn words(&mut self, x: f64, y: f64, anchor: &str, color: &str, words: &str) {
        let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        self.line(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{color}\">{words}</text>"
        ));
    }

    fn stroke(&mut self, points: &[(f64, f64)], color: &str, width: f64) {
        let mut list = String::new();
        for (x, y) in points {
            // Writing to a string succeeds.
            let _ = write!(list, "{x:.1},{y:.1} ");
        }
        self.line(&format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\"/>",
            list.trim_end()
        ));
    }

    /// A circle, a square or a diamond.
    fn mark(&mut self, (x, y): (f64, f64), index: usize) {
        let color = COLORS[index % COLORS.len()];
        self.line(&match index % 3 {
            0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" fill=\"{color}\"/>"),
            1 => format!(
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\" fill=\"{color}\"/>",
                x - 4.0,
                y - 4.0
            ),
            _ => format!(
                "<path d=\"M{x:.1} {:.1}l5.5 5.5l-5.5 5.5l-5.5 -5.5z\" fill=\"{color}\"/>",
                y - 5.5
            ),
        });
    }

    /// The vertical axis with its lines across the plot.
    fn vertical(&mut self, axis: &LogAxis) {
        for tick in axis.ticks() {
            let y = vertical(axis, tick);
            self.stroke(&[(LEFT, y), (self.right, y)], "#e3e3e3", 1.0);
            self.words(LEFT - 8.0, y + 4.0, "end", "#444444", &number(tick));
        }
        let (x, y) = (18.0, (TOP + HEIGHT - BOTTOM) / 2.0);
        self.line(&format!("<g transform=\"rotate(-90 {x} {y:.1})\">"));
        self.words(x, y, "middle", "#444444", &axis.label);
        self.line("</g>");
    }

    fn legend(&mut self, names: &[String], left: f64, top: f64) {
        for (index, name) in names.iter().enumerate() {
            let y = top + 18.0 * index as f64;
            self.mark((left, y), index);
            self.words(left + 12.0, y + 4.0, "start", "#1c1c1c", name);
        }
    }

    fn finish(mut self) -> String {
        self.line("</svg>");
        self.text
    }
}

fn vertical(axis: &LogAxis, value: f64) -> f64 {
    HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - BOTTOM - TOP)
}

/// A number without needless zeros.
fn number(value: f64) -> String {
    match value {
        value if value >= 1000.0 => format!("{value:.0}"),
        value if value >= 0.995 => format!("{value:.1}").trim_end_matches(".0").to_owned(),
        value => format!("{value:.3}").trim_end_matches('0').to_owned(),
    }
}

impl LineChart {
    /// As SVG.
    pub fn svg(&self) -> String {
        let values = self
            .series
            .iter()
            .flat_map(|series| series.points.iter().map(|point| point.1));
        let axis = LogAxis::over(&self.axis, values);
        let mut canvas = Canvas::new(&self.title, WIDTH - RIGHT);
        canvas.vertical(&axis);
        let step = (WIDTH - LEFT - RIGHT) / self.categories.len().max(1) as f64;
        let horizontal = |category: usize| LEFT + step * (category as f64 + 0.5);
        for (index, name) in self.categories.iter().enumerate() {
            canvas.words(horizontal(index), HEIGHT - BOTTOM + 22.0, "middle", "#444444", name);
        }
        for (index, series) in self.series.iter().enumerate() {
            let places: Vec<(f64, f64)> = series
                .points
                .iter()
                .map(|&(category, value)| (horizontal(category), vertical(&axis, value)))
                .collect();
            canvas.stroke(&places, COLORS[index % COLORS.len()], 2.0);
            for (place, &(_, value)) in places.iter().zip(&series.points) {
                canvas.mark(*place, index);
                // Neighbouring series have nearly the same values: each has a corner of its own.
                let (aside, anchor) = if index < 2 { (8.0, "start") } else { (-8.0, "end") };
                let above = if index % 2 == 0 { 16.0 } else { -7.0 };
                canvas.words(
                    place.0 + aside,
                    place.1 + above,
                    anchor,
                    COLORS[index % COLORS.len()],
                    &short(value),
                );
            }
        }
        let names: Vec<String> = self.series.iter().map(|series| series.name.clone()).collect();
        canvas.legend(&names, LEFT + 14.0, TOP + 14.0);
        canvas.finish()
    }
}

/// Three digits.
fn short(value: f64) -> String {
    match value {
        value if value < 9.995 => format!("{value:.2}"),
        value if value < 99.95 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

/// Kernels under the roof of a device.
#[derive(Clone, Debug)]
pub struct Roofline {
    /// Above the plot.
    pub title: String,
    /// 10¹² bytes per second.
    pub terabytes_per_second: f64,
    /// 10¹² operations per second.
    pub tflops: f64,
    /// Name, operations per byte, and 10¹² operations per second.
    pub kernels: Vec<(String, f64, f64)>,
}

impl Roofline {
    /// As SVG.
    pub fn svg(&self) -> String {
        let ridge = self.tflops / self.terabytes_per_second;
        let intensities = self.kernels.iter().map(|kernel| kernel.1).chain([ridge]);
        let across = LogAxis::over("operations per byte", intensities);
        let roof = |intensity: f64| self.tflops.min(intensity * self.terabytes_per_second);
        let rates = self
            .kernels
            .iter()
            .map(|kernel| kernel.2)
            .chain([self.tflops, roof(across.first)]);
        let axis = LogAxis::over("TFLOP/s", rates);
        let right = WIDTH - RIGHT - LEGEND;
        let mut canvas = Canvas::new(&self.title, right);
        canvas.vertical(&axis);
        let horizontal = |value: f64| LEFT + across.place(value) * (right - LEFT);
        for tick in across.ticks() {
            let x = horizontal(tick);
            canvas.stroke(&[(x, HEIGHT - BOTTOM), (x, HEIGHT - BOTTOM + 5.0)], "#444444", 1.0);
            canvas.words(x, HEIGHT - BOTTOM + 22.0, "middle", "#444444", &number(tick));
        }
        canvas.words((LEFT + right) / 2.0, HEIGHT - 12.0, "middle", "#444444", &across.label);
        let corners = [across.first, ridge.clamp(across.first, across.last), across.last];
        let places: Vec<(f64, f64)> = corners
            .iter()
            .map(|&intensity| (horizontal(intensity), vertical(&axis, roof(intensity))))
            .collect();
        canvas.stroke(&places, "#1c1c1c", 2.0);
        for (index, (_, intensity, rate)) in self.kernels.iter().enumerate() {
            canvas.mark((horizontal(*intensity), vertical(&axis, *rate)), index);
        }
        let names: Vec<String> = self
            .kernels
            .iter()
            .map(|(name, intensity, rate)| format!("{name}: {:.0} %", 100.0 * rate / roof(*intensity)))
            .collect();
        canvas.legend(&names, right + 14.0, TOP + 14.0);
        canvas.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_axis_has_round_ticks_within() {
        let axis = LogAxis::over("ms", [3.0, 40.0].into_iter());
        assert_eq!(axis.ticks(), [2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(axis.place(axis.first), 0.0);
        assert!((axis.place(axis.last) - 1.0).abs() < 1e-12);
        assert!(LogAxis::over("ms", std::iter::empty()).ticks().len() > 1);
    }

    #[test]
    fn every_point_is_drawn_within_the_frame() {
        let chart = LineChart {
            title: "a < b".into(),
            categories: ["1K", "2K"].map(String::from).to_vec(),
            axis: "ms".into(),
            series: vec![
                Series {
                    name: "one".into(),
                    points: vec![(0, 1.0), (1, 100.0)],
                },
                Series {
                    name: "two".into(),
                    points: vec![(1, 5.0)],
                },
            ],
        };
        let svg = chart.svg();
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
        // A mark for each point and each name.
        assert_eq!(svg.matches("<circle").count(), 3);
        assert_eq!(svg.matches("width=\"8\"").count(), 2);
        for part in svg.split("cy=\"").skip(1) {
            let y: f64 = part.split('"').next().unwrap().parse().unwrap();
            assert!((TOP..=HEIGHT - BOTTOM).contains(&y), "{y}");
        }
    }

    #[test]
    fn kernels_stand_under_the_roof() {
        let roofline = Roofline {
            title: "t".into(),
            terabytes_per_second: 4.0,
            tflops: 800.0,
            kernels: vec![("copying".into(), 10.0, 20.0), ("product".into(), 1000.0, 760.0)],
        };
        let svg = roofline.svg();
        assert!(svg.contains("copying: 50 %") && svg.contains("product: 95 %"), "{svg}");
    }
}
