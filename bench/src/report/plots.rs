//! The plots: values by picture size, and kernels under their roof.

use l2p_engine::report::{Anchor, Axis, Frame, Scale, Stroke, Svg, colour};

/// Pixels.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const FRAME: Frame = Frame {
    left: 74.0,
    right: WIDTH - 24.0,
    top: 40.0,
    bottom: HEIGHT - 56.0,
};

/// Room for a legend beside the plot.
const LEGEND: f64 = 230.0;
const LEGEND_LINE: f64 = 18.0;

/// Of words and of the roof.
const DARK: &str = "#1c1c1c";

/// How much further an axis reaches than its values.
const MARGIN: f64 = 1.5;

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

impl LineChart {
    /// As SVG.
    pub fn svg(&self) -> String {
        let mut svg = Svg::new(WIDTH, HEIGHT);
        svg.title((WIDTH / 2.0, 22.0), Anchor::Middle, &self.title);
        let points = self.series.iter().flat_map(|series| &series.points);
        let axis = Axis::new(points.map(|point| point.1), FRAME.upwards(), Scale::Logarithmic).widened(MARGIN);
        FRAME.draw_upwards(&mut svg, &axis, &self.axis);
        FRAME.draw_edges(&mut svg);
        let step = (FRAME.right - FRAME.left) / self.categories.len().max(1) as f64;
        let across = |category: usize| FRAME.left + step * (category as f64 + 0.5);
        for (index, name) in self.categories.iter().enumerate() {
            FRAME.name_across(&mut svg, across(index), name);
        }
        for (index, series) in self.series.iter().enumerate() {
            let place = |&(category, value): &(usize, f64)| Some((across(category), axis.place(value)?));
            svg.lines(series.points.iter().map(place), Stroke::of(colour(index), 2.0));
            for point in &series.points {
                let Some(at) = place(point) else { continue };
                svg.mark(at, index);
                // Neighbouring series have nearly the same values: each has a corner of its own.
                let (aside, anchor) = match index < 2 {
                    true => (8.0, Anchor::Start),
                    false => (-8.0, Anchor::End),
                };
                let above = if index % 2 == 0 { 16.0 } else { -7.0 };
                svg.words((at.0 + aside, at.1 + above), anchor, colour(index), &short(point.1));
            }
        }
        let names = self.series.iter().map(|series| series.name.clone());
        legend(&mut svg, (FRAME.left + 14.0, FRAME.top + 14.0), names);
        svg.finish()
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

/// A mark and a name a line, from this place down.
fn legend(svg: &mut Svg, (left, top): (f64, f64), names: impl Iterator<Item = String>) {
    for (index, name) in names.enumerate() {
        let y = top + LEGEND_LINE * index as f64;
        svg.mark((left, y), index);
        svg.words((left + 12.0, y + 4.0), Anchor::Start, DARK, &name);
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
        let frame = Frame {
            right: FRAME.right - LEGEND,
            ..FRAME
        };
        let ridge = self.tflops / self.terabytes_per_second;
        let intensities = self.kernels.iter().map(|kernel| kernel.1).chain([ridge]);
        let across = Axis::new(intensities, frame.across(), Scale::Logarithmic).widened(MARGIN);
        let roof = |intensity: f64| self.tflops.min(intensity * self.terabytes_per_second);
        let [lowest, highest] = across.range();
        let rates = self.kernels.iter().map(|kernel| kernel.2);
        let rates = rates.chain([self.tflops, roof(lowest)]);
        let upwards = Axis::new(rates, frame.upwards(), Scale::Logarithmic).widened(MARGIN);
        let mut svg = Svg::new(WIDTH, HEIGHT);
        svg.title((WIDTH / 2.0, 22.0), Anchor::Middle, &self.title);
        frame.draw_across(&mut svg, &across, "operations per byte");
        frame.draw_upwards(&mut svg, &upwards, "TFLOP/s");
        frame.draw_edges(&mut svg);
        let place = |intensity: f64, rate: f64| across.place(intensity).zip(upwards.place(rate));
        let corners = [lowest, ridge.clamp(lowest, highest), highest];
        let corners = corners.map(|intensity| place(intensity, roof(intensity)));
        svg.lines(corners, Stroke::of(DARK, 2.0));
        for (index, (_, intensity, rate)) in self.kernels.iter().enumerate() {
            if let Some(at) = place(*intensity, *rate) {
                svg.mark(at, index);
            }
        }
        let share = |intensity: f64, rate: f64| 100.0 * rate / roof(intensity);
        let kernels = self.kernels.iter();
        let names = kernels.map(|(name, intensity, rate)| format!("{name}: {:.0} %", share(*intensity, *rate)));
        legend(&mut svg, (frame.right + 14.0, frame.top + 14.0), names);
        svg.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert!((FRAME.top..=FRAME.bottom).contains(&y), "{y}");
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
