//! What people look at: charts as SVG, pieces of HTML pages, and event files for TensorBoard. Runs of training and benchmarks draw
//! with these.

mod axis;
mod chart;
pub mod html;
mod svg;
mod tensorboard;

pub use axis::{Axis, Frame, Scale};
pub use chart::{Chart, Series};
pub use svg::{Anchor, Stroke, Svg, colour};
pub use tensorboard::{EventFile, Shown};
