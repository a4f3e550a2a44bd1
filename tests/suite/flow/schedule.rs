//! The noise levels that training draws from.

use l2p_engine::flow::schedule::training_sigma;
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    suite.cpu("flow::schedule::levels_of_training", levels_of_training);
}

/// Evenly spaced without a shift; with one, `shift · u / (1 + (shift − 1) · u)` of these, worked out by hand.
fn levels_of_training() -> Outcome {
    for (index, entries, shift, expected) in [
        (0, 4, 1.0, 1.0),
        (1, 4, 1.0, 0.75),
        (3, 4, 1.0, 0.25),
        (0, 4, 3.0, 1.0),
        (1, 4, 3.0, 0.9),
        (3, 4, 3.0, 0.5),
        (600, 1000, 6.0, 0.8),
    ] {
        let found: f32 = training_sigma(index, entries, shift);
        assert!(
            (found - expected).abs() < 1e-6,
            "{index} of {entries}, {shift}: {found}"
        );
    }
    Ok(())
}
