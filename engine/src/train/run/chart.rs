//! Curves as SVG: axes with round numbers, a legend, colours that can be told apart with any kind of colour vision.

use std::fmt::Write;

/// A chart's extents in CSS pixels.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 48.0;
const LEGEND_LINE: f64 = 16.0;

/// Okabe and Ito's colours, black left out.
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c",
];

/// Points drawn of a curve; more cannot be seen.
const MOST_POINTS: usize = 1200;

/// About how many numbers stand at an axis.
const TICKS: f64 = 6.0;

/// A curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points, by rising x.
    pub points: Vec<(f64, f64)>,
    /// Draw dashed.
    pub dashed: bool,
}

/// A chart of curves over one x axis.
#[derive(Clone, Debug)]
pub struct Chart<'a> {
    /// Above it.
    pub title: &'a str,
    /// What x is.
    pub x: &'a str,
    /// What y is.
    pub y: &'a str,
    /// The curves.
    pub series: &'a [Series],
    /// Powers of ten at equal distances on the y axis; values that are not positive are left out.
    pub logarithmic: bool,
}

/// An axis: values from `low` to `high` along `start` to `end`.
#[derive(Clone, Copy)]
struct Axis {
    low: f64,
    high: f64,
    start: f64,
    end: f64,
    logarithmic: bool,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, start: f64, end: f64, logarithmic: bool) -> Self {
        let usable = values.filter(|value| value.is_finite() && (!logarithmic || *value > 0.0));
        let (mut low, mut high) = usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        if low > high {
            (low, high) = (1.0, 10.0);
        }
        if high - low <= f64::EPSILON * high.abs() {
            let margin = if high == 0.0 { 1.0 } else { high.abs() * 0.1 };
            (low, high) = (low - margin, high + margin);
            if logarithmic {
                low = low.max(high * 0.5);
            }
        }
        Axis {
            low,
            high,
            start,
            end,
            logarithmic,
        }
    }

    fn scaled(&self, value: f64) -> f64 {
        if self.logarithmic { value.log10() } else { value }
    }

    /// Where a value stands; `None` where it cannot.
    fn place(&self, value: f64) -> Option<f64> {
        let usable = value.is_finite() && (!self.logarithmic || value > 0.0);
        let (low, high) = (self.scaled(self.low), self.scaled(self.high));
        usable.then(|| self.start + (self.scaled(value) - low) / (high - low) * (self.end - self.start))
    }

    /// Round numbers along the axis.
    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let decades = self.high.log10() - self.low.log10();
            let mantissas: &[f64] = match decades {
                wide if wide > 3.0 => &[1.0],
                wide if wide > 1.2 => &[1.0, 2.0, 5.0],
                _ => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
            };
            let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            return exponents
                .flat_map(|exponent| mantissas.iter().map(move |mantissa| mantissa * 10f64.powi(exponent)))
                .filter(|tick| (self.low..=self.high).contains(tick))
                .collect();
        }
        let rough = (self.high - self.low) / TICKS;
        let magnitude = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| step * magnitude >= rough);
        let step = step.unwrap_or(10.0) * magnitude;
        let first = (self.low / step).ceil() as i64;
        (first..)
            .map(|index| index as f64 * step)
            .take_while(|tick| *tick <= self.high + step * 1e-9)
            .collect()
    }
}

impl Chart<'_> {
    /// The chart as an SVG element.
    pub fn svg(&self) -> String {
        let legend = self.series.len() as f64 * LEGEND_LINE;
        let height = HEIGHT + legend;
        let bottom = HEIGHT - BOTTOM;
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = Axis::new(points().map(|point| point.0), LEFT, WIDTH - RIGHT, false);
        let y = Axis::new(points().map(|point| point.1), bottom, TOP, self.logarithmic);
        let mut svg = String::new();
        // Writing to a string succeeds.
        let _ = write!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
             font-family=\"system-ui, sans-serif\" font-size=\"12\">\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\
             <text x=\"{LEFT}\" y=\"20\" font-size=\"14\" font-weight=\"600\">{}</text>",
            escaped(self.title)
        );
        for tick in x.ticks() {
            let Some(at) = x.place(tick) else { continue };
            let _ = write!(
                svg,
                "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#eee\"/>\
                 <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#444\">{}</text>",
                bottom + 16.0,
                number(tick)
            );
        }
        for tick in y.ticks() {
            let Some(at) = y.place(tick) else { continue };
            let _ = write!(
                svg,
                "<path d=\"M{LEFT} {at:.1}H{}\" stroke=\"#eee\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#444\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0,
                number(tick)
            );
        }
        let _ = write!(
            svg,
            "<path d=\"M{LEFT} {TOP}V{bottom}H{}\" fill=\"none\" stroke=\"#444\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#444\">{}</text>\
             <text transform=\"translate(14 {}) rotate(-90)\" text-anchor=\"middle\" fill=\"#444\">{}</text>",
            WIDTH - RIGHT,
            (LEFT + WIDTH - RIGHT) / 2.0,
            bottom + 36.0,
            escaped(self.x),
            (TOP + bottom) / 2.0,
            escaped(self.y)
        );
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let dash = if series.dashed { " stroke-dasharray=\"5 3\"" } else { "" };
            let _ = write!(
                svg,
                "<path d=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"{dash}/>",
                path(&series.points, x, y)
            );
            let line = HEIGHT + index as f64 * LEGEND_LINE;
            let _ = write!(
                svg,
                "<path d=\"M{LEFT} {line}h24\" stroke=\"{colour}\" stroke-width=\"2.4\"{dash}/>\
                 <text x=\"{}\" y=\"{}\">{}</text>",
                LEFT + 32.0,
                line + 4.0,
                escaped(&series.name)
            );
        }
        svg.push_str("</svg>");
        svg
    }
}

/// The curve through the points, thinned out to what can be seen.
fn path(points: &[(f64, f64)], x: Axis, y: Axis) -> String {
    let step = points.len().div_ceil(MOST_POINTS).max(1);
    let last = points.len().saturating_sub(1);
    let shown = points
        .iter()
        .enumerate()
        .filter(|(index, _)| index % step == 0 || *index == last);
    let mut path = String::new();
    let mut pen = 'M';
    for (_, point) in shown {
        match (x.place(point.0), y.place(point.1)) {
            (Some(x), Some(y)) => {
                let _ = write!(path, "{pen}{x:.1} {y:.1}");
                pen = 'L';
            }
            _ => pen = 'M',
        }
    }
    path
}

/// A number with as many digits as it needs, up to four.
fn number(value: f64) -> String {
    let magnitude = value.abs();
    match magnitude {
        0.0 => "0".into(),
        _ if magnitude >= 1e6 => format!("{}M", trimmed(value / 1e6)),
        _ if magnitude >= 1e4 => format!("{}k", trimmed(value / 1e3)),
        _ if magnitude < 1e-3 => format!("{value:.0e}"),
        _ => trimmed(value),
    }
}

fn trimmed(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').into()
}

/// Text that may stand between tags and in attributes.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(low: f64, high: f64, logarithmic: bool) -> Axis {
        Axis::new([low, high].into_iter(), 0.0, 100.0, logarithmic)
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(axis(0.0, 100.0, false).ticks(), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(axis(-0.3, 0.31, false).ticks(), [-0.2, 0.0, 0.2]);
        assert_eq!(axis(0.01, 100.0, true).ticks(), [0.01, 0.1, 1.0, 10.0, 100.0]);
        assert_eq!(axis(0.9, 2.2, true).ticks(), [1.0, 1.2, 1.5, 2.0]);
        assert_eq!(
            [0.0, 12_000.0, 0.25, 2e6, 1e-4].map(number),
            ["0", "12k", "0.25", "2M", "1e-4"]
        );
    }

    #[test]
    fn values_stand_where_they_belong() {
        assert_eq!(axis(0.0, 10.0, false).place(5.0), Some(50.0));
        assert_eq!(axis(1.0, 100.0, true).place(10.0), Some(50.0));
        assert_eq!(axis(1.0, 100.0, true).place(0.0), None);
        // One value only: the axis goes around it.
        assert_eq!(axis(3.0, 3.0, false).place(3.0), Some(50.0));
    }

    #[test]
    fn charts_are_drawn_with_gaps_and_escapes() {
        let series = [Series {
            name: "a < b".into(),
            points: vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 2.0), (3.0, 1.5)],
            dashed: true,
        }];
        let chart = Chart {
            title: "loss & more",
            x: "step",
            y: "loss",
            series: &series,
            logarithmic: false,
        };
        let svg = chart.svg();
        assert!(svg.contains("loss &amp; more") && svg.contains("a &lt; b"));
        assert!(svg.contains("M64.0 312.0M"), "{svg}");
        let empty = Chart { series: &[], ..chart };
        assert!(empty.svg().ends_with("</svg>"));
    }
}
