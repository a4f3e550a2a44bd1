//! The fastest of several algorithms, found by trying them, within a budget of time.
//!
//! The library's own model of its algorithms is good but not perfect: at a transformer's shapes its first choice is up to
//! several percent behind its best. Algorithms are tried in the order that the library expects them to be fast in, those that did
//! well are timed again round robin, so that all of them meet the same clocks, and the best median wins.
//!
//! A search in the middle of other work may take as long as [`PRODUCTS`] runs of the product that it is for: a step of a
//! transformer runs each of its large products some thirty times, so that all searches together take no more than half of the
//! first step's time. Small products, where loading an algorithm takes longer than running it, may take [`LEAST`].

use std::time::Duration;

use crate::error::Result;

/// How many runs of a product a search for it may last.
const PRODUCTS: u32 = 15;

/// How long any search may last.
const LEAST: Duration = Duration::from_millis(4);

/// The share of its time that a search spends on looking at algorithms once; the rest decides between the best.
const LOOKING: f64 = 0.7;

/// How thoroughly to search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Within the budget of the module's head comment.
    Bounded,
    /// As long as it takes to time every algorithm closely: some 240 runs of the product.
    Thorough,
}

/// Numbers of one effort.
struct Plan {
    /// When to stop.
    budget: Duration,
    /// Runs that are timed together.
    runs: usize,
    /// Algorithms that are timed again.
    finalists: usize,
    /// How often.
    turns: usize,
}

impl Effort {
    /// For a product whose first algorithm takes so long.
    fn plan(self, milliseconds: f32) -> Plan {
        match self {
            Effort::Thorough => Plan {
                budget: Duration::MAX,
                runs: 4,
                finalists: 6,
                turns: 5,
            },
            Effort::Bounded => Plan {
                budget: budget(milliseconds),
                // A timing of less than a tenth of a millisecond says little.
                runs: (0.1 / milliseconds.max(0.025)).ceil() as usize,
                finalists: 3,
                turns: 3,
            },
        }
    }
}

/// How long a bounded search for a product of so many milliseconds may last.
fn budget(milliseconds: f32) -> Duration {
    let product = Duration::try_from_secs_f32(milliseconds / 1e3).unwrap_or(Duration::ZERO);
    (PRODUCTS * product).max(LEAST)
}

/// What a search runs.
pub(super) trait Trials {
    /// What can be tried.
    type Algorithm: Copy;

    /// Milliseconds of each of so many runs, one after the other.
    ///
    /// # Errors
    /// When the algorithm does not run after all.
    fn time(&mut self, algorithm: Self::Algorithm, runs: usize) -> Result<f32>;

    /// Since the search began.
    fn elapsed(&self) -> Duration;
}

/// The fastest of `candidates`, which are in the order of speed that is expected of them; `None` when none of them runs.
pub(super) fn fastest<T: Trials>(candidates: &[T::Algorithm], effort: Effort, trials: &mut T) -> Option<T::Algorithm> {
    let mut candidates = candidates.iter().copied();
    // A candidate that turns out not to run is passed over; its first run loads it and does not count.
    let first = candidates.find_map(|algorithm| {
        let loaded = trials.time(algorithm, 1).and_then(|_| trials.time(algorithm, 1));
        loaded.ok().map(|time| (time, algorithm))
    })?;
    let plan = effort.plan(first.0);
    let mut looked = Vec::new();
    for (index, algorithm) in std::iter::once(first.1).chain(candidates).enumerate() {
        if index > 0 && trials.elapsed() >= share(plan.budget, LOOKING) {
            break;
        }
        let loaded = index == 0 || trials.time(algorithm, 1).is_ok();
        if loaded && let Ok(time) = trials.time(algorithm, plan.runs) {
            looked.push((vec![time], algorithm));
        }
    }
    // The order that the library expects decides between equals.
    looked.sort_by(|(a, _), (b, _)| a[0].total_cmp(&b[0]));
    looked.truncate(plan.finalists);
    for _ in 0..plan.turns {
        if looked.len() < 2 || trials.elapsed() >= plan.budget {
            break;
        }
        for (times, algorithm) in &mut looked {
            // One that no longer runs has seen its last time.
            times.push(trials.time(*algorithm, plan.runs).unwrap_or(f32::INFINITY));
        }
    }
    let medians = looked.iter_mut().map(|(times, algorithm)| (median(times), *algorithm));
    medians
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, algorithm)| algorithm)
}

fn share(of: Duration, share: f64) -> Duration {
    match of {
        Duration::MAX => of,
        _ => of.mul_f64(share),
    }
}

/// The middle one, the slower of two.
fn median(times: &mut [f32]) -> f32 {
    times.sort_by(f32::total_cmp);
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// A device on which algorithm `i` takes `times[i]` milliseconds, as often as it says so, and its first run more.
    struct Simulated {
        times: Vec<f32>,
        loading: f32,
        loaded: Vec<bool>,
        clock: f32,
        runs: usize,
        /// Added to every second timing of everything.
        noise: f32,
    }

    impl Simulated {
        fn new(times: &[f32], loading: f32) -> Self {
            Simulated {
                times: times.to_vec(),
                loading,
                loaded: vec![false; times.len()],
                clock: 0.0,
                runs: 0,
                noise: 0.0,
            }
        }

        fn search(&mut self, effort: Effort) -> Option<usize> {
            let candidates: Vec<usize> = (0..self.times.len()).collect();
            fastest(&candidates, effort, self)
        }
    }

    impl Trials for Simulated {
        type Algorithm = usize;

        fn time(&mut self, algorithm: usize, runs: usize) -> Result<f32> {
            let mut time = self.times[algorithm];
            if !time.is_finite() {
                return Err(Error::invalid("it does not run"));
            }
            self.runs += runs;
            if self.runs.is_multiple_of(2) {
                time += self.noise;
            }
            self.clock += time * runs as f32;
            if !std::mem::replace(&mut self.loaded[algorithm], true) {
                self.clock += self.loading;
            }
            Ok(time)
        }

        fn elapsed(&self) -> Duration {
            Duration::from_secs_f32(self.clock / 1e3)
        }
    }

    #[test]
    fn the_fastest_is_found() {
        let mut times = [1.0; 24];
        times[3] = 0.95;
        for effort in [Effort::Bounded, Effort::Thorough] {
            assert_eq!(Simulated::new(&times, 0.1).search(effort), Some(3), "{effort:?}");
        }
        // Far down the list, only with time.
        times[20] = 0.5;
        assert_eq!(Simulated::new(&times, 0.1).search(Effort::Thorough), Some(20));
        assert_eq!(Simulated::new(&times, 0.1).search(Effort::Bounded), Some(3));
        assert_eq!(Simulated::new(&[1.0; 24], 0.1).search(Effort::Thorough), Some(0));
        assert_eq!(Simulated::new(&[2.0], 0.1).search(Effort::Bounded), Some(0));
        assert_eq!(Simulated::new(&[], 0.1).search(Effort::Bounded), None);
    }

    #[test]
    fn what_does_not_run_is_passed_over() {
        let bad = f32::INFINITY;
        assert_eq!(
            Simulated::new(&[bad, 1.0, bad, 0.9], 0.1).search(Effort::Bounded),
            Some(3)
        );
        assert_eq!(Simulated::new(&[bad, bad], 0.1).search(Effort::Thorough), None);
    }

    #[test]
    fn noise_is_outlived() {
        let mut device = Simulated::new(&[1.0, 0.9, 1.0], 0.1);
        device.noise = 0.3;
        assert_eq!(device.search(Effort::Thorough), Some(1));
    }

    /// A bounded search ends in its time, but for what was begun: one look, or one turn of the finalists.
    #[test]
    fn a_bounded_search_keeps_to_its_budget() {
        for milliseconds in [0.02, 0.1, 0.5, 2.0, 10.0] {
            for loading in [0.0, 0.5, 5.0] {
                let mut device = Simulated::new(&[milliseconds; 24], loading);
                device.search(Effort::Bounded);
                let allowed = (15.0 * milliseconds).max(4.0);
                // A look takes a load and up to five runs, a turn three times up to four; the first choice is loaded in any case.
                let begun = (loading + 5.0 * milliseconds).max(12.0 * milliseconds) + loading;
                assert!(
                    device.clock <= allowed + begun,
                    "{milliseconds} ms, loading {loading} ms: {} of {allowed} ms",
                    device.clock
                );
            }
        }
        // A product of half a millisecond, as those of a 1K step: about half the time of the thirty that the step runs.
        let mut device = Simulated::new(&[0.5; 24], 0.2);
        device.search(Effort::Bounded);
        assert!(device.clock < 0.5 * 30.0 * 0.6, "{} ms", device.clock);
        // What it took before.
        let mut device = Simulated::new(&[0.5; 24], 0.2);
        device.search(Effort::Thorough);
        assert!(device.runs > 200 && device.clock > 100.0, "{} ms", device.clock);
    }

    #[test]
    fn budgets_are_of_the_product() {
        assert_eq!(budget(1.0), Duration::from_millis(15));
        assert_eq!(budget(0.01), LEAST);
        assert_eq!(budget(f32::NAN), LEAST);
    }
}
