//! Axes with round numbers, and the frame that they make.

use super::svg::{Anchor, GRID, INK, Stroke, Svg};

/// About how many numbers stand at an axis.
const TICKS: f64 = 6.0;

/// What stands at equal distances along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Numbers.
    Linear,
    /// Powers of ten; values that are not positive have no place.
    Logarithmic,
}

/// An axis: values from `low` to `high` along pixels from `start` to `end`.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    low: f64,
    high: f64,
    start: f64,
    end: f64,
    scale: Scale,
}

impl Axis {
    /// An axis from the smallest to the largest of `values` that have a place on it.
    pub fn new(values: impl Iterator<Item = f64>, [start, end]: [f64; 2], scale: Scale) -> Self {
        let logarithmic = scale == Scale::Logarithmic;
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
            scale,
        }
    }

    /// The same pixels for values from a `factor`-th of the smallest to `factor` times the largest, for a logarithmic axis.
    pub fn widened(self, factor: f64) -> Self {
        Axis {
            low: self.low / factor,
            high: self.high * factor,
            ..self
        }
    }

    /// The smallest and the largest value.
    pub fn range(&self) -> [f64; 2] {
        [self.low, self.high]
    }

    fn scaled(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => value,
            Scale::Logarithmic => value.log10(),
        }
    }

    /// The pixel where a value stands; `None` where it cannot.
    pub fn place(&self, value: f64) -> Option<f64> {
        let usable = value.is_finite() && (self.scale == Scale::Linear || value > 0.0);
        let (low, high) = (self.scaled(self.low), self.scaled(self.high));
        usable.then(|| self.start + (self.scaled(value) - low) / (high - low) * (self.end - self.start))
    }

    /// Round numbers along the axis.
    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => self.linear_ticks(),
            Scale::Logarithmic => self.logarithmic_ticks(),
        }
    }

    fn linear_ticks(&self) -> Vec<f64> {
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

    fn logarithmic_ticks(&self) -> Vec<f64> {
        let decades = self.high.log10() - self.low.log10();
        let mantissas: &[f64] = match decades {
            wide if wide > 3.0 => &[1.0],
            wide if wide > 1.2 => &[1.0, 2.0, 5.0],
            _ => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
        };
        let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        exponents
            .flat_map(|exponent| mantissas.iter().map(move |mantissa| mantissa * 10f64.powi(exponent)))
            .filter(|tick| (self.low..=self.high).contains(tick))
            .collect()
    }

    /// The values with a round number, their pixels and the numbers.
    fn marked(&self) -> Vec<(f64, String)> {
        let ticks = self.ticks().into_iter();
        ticks
            .filter_map(|tick| Some((self.place(tick)?, number(tick))))
            .collect()
    }
}

/// The edges of a plot within its picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Frame {
    /// The vertical axis stands here.
    pub left: f64,
    /// The horizontal axis ends here.
    pub right: f64,
    /// The vertical axis ends here.
    pub top: f64,
    /// The horizontal axis stands here.
    pub bottom: f64,
}

impl Frame {
    /// The pixels of the horizontal axis.
    pub fn across(&self) -> [f64; 2] {
        [self.left, self.right]
    }

    /// The pixels of the vertical axis.
    pub fn upwards(&self) -> [f64; 2] {
        [self.bottom, self.top]
    }

    /// Draws the horizontal axis's lines and numbers, and what it shows.
    pub fn draw_across(&self, svg: &mut Svg, axis: &Axis, what: &str) {
        for (x, number) in axis.marked() {
            svg.lines([Some((x, self.top)), Some((x, self.bottom))], Stroke::of(GRID, 1.0));
            self.name_across(svg, x, &number);
        }
        let middle = (self.left + self.right) / 2.0;
        svg.words((middle, self.bottom + 36.0), Anchor::Middle, INK, what);
    }

    /// Puts a name at a place below the horizontal axis.
    pub fn name_across(&self, svg: &mut Svg, x: f64, name: &str) {
        svg.words((x, self.bottom + 16.0), Anchor::Middle, INK, name);
    }

    /// Draws the vertical axis's lines and numbers, and what it shows.
    pub fn draw_upwards(&self, svg: &mut Svg, axis: &Axis, what: &str) {
        for (y, number) in axis.marked() {
            svg.lines([Some((self.left, y)), Some((self.right, y))], Stroke::of(GRID, 1.0));
            svg.words((self.left - 6.0, y + 4.0), Anchor::End, INK, &number);
        }
        svg.words_upwards((14.0, (self.top + self.bottom) / 2.0), INK, what);
    }

    /// Draws both axes over their lines.
    pub fn draw_edges(&self, svg: &mut Svg) {
        let corners = [
            (self.left, self.top),
            (self.left, self.bottom),
            (self.right, self.bottom),
        ];
        svg.lines(corners.map(Some), Stroke::of(INK, 1.0));
    }
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

#[cfg(test)]
mod tests {
    use super::Scale::{Linear, Logarithmic};
    use super::*;

    fn axis(low: f64, high: f64, scale: Scale) -> Axis {
        Axis::new([low, high].into_iter(), [0.0, 100.0], scale)
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(axis(0.0, 100.0, Linear).ticks(), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(axis(-0.3, 0.31, Linear).ticks(), [-0.2, 0.0, 0.2]);
        assert_eq!(axis(0.01, 100.0, Logarithmic).ticks(), [0.01, 0.1, 1.0, 10.0, 100.0]);
        assert_eq!(axis(0.9, 2.2, Logarithmic).ticks(), [1.0, 1.2, 1.5, 2.0]);
        assert_eq!(
            axis(3.0, 40.0, Logarithmic).widened(1.5).ticks(),
            [2.0, 5.0, 10.0, 20.0, 50.0]
        );
        assert_eq!(
            [0.0, 12_000.0, 0.25, 2e6, 1e-4].map(number),
            ["0", "12k", "0.25", "2M", "1e-4"]
        );
    }

    #[test]
    fn values_stand_where_they_belong() {
        assert_eq!(axis(0.0, 10.0, Linear).place(5.0), Some(50.0));
        assert_eq!(axis(1.0, 100.0, Logarithmic).place(10.0), Some(50.0));
        assert_eq!(axis(1.0, 100.0, Logarithmic).place(0.0), None);
        // One value only: the axis goes around it.
        assert_eq!(axis(3.0, 3.0, Linear).place(3.0), Some(50.0));
        // None at all: there is an axis still.
        assert!(Axis::new(std::iter::empty(), [0.0, 1.0], Logarithmic).ticks().len() > 1);
    }
}
