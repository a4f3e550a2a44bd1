//! Bars and spinners, for the rank that is heard.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use l2p_engine::dist::World;

/// Between two frames of what moves by itself.
const TICK: Duration = Duration::from_millis(200);

/// A bar of this form; `{per_step}` stands for the time of one of its parts.
pub fn bar(template: &str, world: &World) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let per_step = |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
        let seconds = state.elapsed().as_secs_f64() / state.pos().max(1) as f64;
        // Nothing can be done about a terminal that does not take text.
        let _ = match state.pos() {
            0 => write!(out, "- s/step"),
            _ => write!(out, "{seconds:.3} s/step"),
        };
    };
    let bar = ProgressBar::no_length();
    bar.set_style(style.with_key("per_step", per_step));
    of(bar, world)
}

/// A spinner with a word beside it.
pub fn spinner(message: &'static str, world: &World) -> ProgressBar {
    of(ProgressBar::new_spinner().with_message(message), world)
}

/// Seen on the first rank alone.
fn of(bar: ProgressBar, world: &World) -> ProgressBar {
    match world.is_first() {
        true => bar.enable_steady_tick(TICK),
        false => bar.set_draw_target(ProgressDrawTarget::hidden()),
    }
    bar
}
