//! Curves over one axis, with a legend below.

use super::axis::{Axis, Frame, Scale};
use super::svg::{Anchor, INK, Stroke, Svg, colour};

/// A chart's extents in CSS pixels.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 360.0;
const FRAME: Frame = Frame {
    left: 64.0,
    right: WIDTH - 16.0,
    top: 34.0,
    bottom: HEIGHT - 48.0,
};
const LEGEND_LINE: f64 = 16.0;

/// Points drawn of a curve; more cannot be seen.
const MOST_POINTS: usize = 1200;

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
    /// Of the y axis.
    pub scale: Scale,
}

impl Chart<'_> {
    /// The chart as an SVG element.
    pub fn svg(&self) -> String {
        let mut svg = Svg::new(WIDTH, HEIGHT + self.series.len() as f64 * LEGEND_LINE);
        svg.title((FRAME.left, 20.0), Anchor::Start, self.title);
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = Axis::new(points().map(|point| point.0), FRAME.across(), Scale::Linear);
        let y = Axis::new(points().map(|point| point.1), FRAME.upwards(), self.scale);
        FRAME.draw_across(&mut svg, &x, self.x);
        FRAME.draw_upwards(&mut svg, &y, self.y);
        FRAME.draw_edges(&mut svg);
        for (index, series) in self.series.iter().enumerate() {
            let stroke = |width| Stroke {
                dashed: series.dashed,
                ..Stroke::of(colour(index), width)
            };
            let places = thinned(&series.points).map(|point| x.place(point.0).zip(y.place(point.1)));
            svg.lines(places, stroke(1.6));
            let line = HEIGHT + index as f64 * LEGEND_LINE;
            svg.lines([(FRAME.left, line), (FRAME.left + 24.0, line)].map(Some), stroke(2.4));
            svg.words((FRAME.left + 32.0, line + 4.0), Anchor::Start, INK, &series.name);
        }
        svg.finish()
    }
}

/// As many of the points as can be seen, the last one among them.
fn thinned(points: &[(f64, f64)]) -> impl Iterator<Item = &(f64, f64)> {
    let step = points.len().div_ceil(MOST_POINTS).max(1);
    let last = points.len().saturating_sub(1);
    let shown = points.iter().enumerate();
    shown
        .filter(move |(index, _)| index % step == 0 || *index == last)
        .map(|(_, point)| point)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            scale: Scale::Linear,
        };
        let svg = chart.svg();
        assert!(svg.contains("loss &amp; more") && svg.contains("a &lt; b"));
        assert!(svg.contains("M64.0 312.0M"), "{svg}");
        let empty = Chart { series: &[], ..chart };
        assert!(empty.svg().ends_with("</svg>\n"));
    }

    #[test]
    fn long_curves_are_thinned_out_and_keep_their_end() {
        let points: Vec<(f64, f64)> = (0..5000).map(|index| (f64::from(index), 0.0)).collect();
        let shown: Vec<_> = thinned(&points).collect();
        assert!(shown.len() <= MOST_POINTS + 1 && shown.last() == Some(&&points[4999]));
        assert_eq!(thinned(&points[..3]).count(), 3);
    }
}
