//! Timing work on a device.

use std::collections::VecDeque;
use std::time::Instant;

use l2p_engine::device::Graph;
use l2p_engine::{Device, Result, Tensor};

/// Calls are put together until a sample takes this long.
const SAMPLE_MS: f64 = 2.0;

/// Work that takes longer is submitted call by call: it hides what that costs.
const RECORDED_BELOW_MS: f64 = 20.0;

/// No recording holds more calls.
const MOST_CALLS: usize = 512;

/// Runs `work` until it is warm, then `repeats` times, and returns the milliseconds of each timed run: device time between
/// events on CUDA, wall time on the CPU.
///
/// # Errors
/// Those of `work`.
pub fn samples(
    device: &Device,
    warm_up: usize,
    repeats: usize,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Vec<f64>> {
    for _ in 0..warm_up {
        work()?;
    }
    device.synchronize()?;
    (0..repeats).map(|_| sample(device, &mut work)).collect()
}

/// The milliseconds of one run of `work`, as [`samples`] takes them.
///
/// # Errors
/// Those of `work`.
pub fn sample(device: &Device, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    match device {
        Device::Cpu => {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed().as_secs_f64() * 1e3)
        }
        Device::Cuda(cuda) => {
            let start = cuda.record_event()?;
            work()?;
            let end = cuda.record_event()?;
            Ok(f64::from(start.milliseconds_to(&end)?))
        }
    }
}

/// One call with the inputs of the given set; returns its results.
pub type Call<'a> = dyn FnMut(usize) -> Result<Vec<Tensor>> + 'a;

/// Times calls that rotate through several sets of inputs. Results are kept for a rotation, so that no call writes where the
/// one before has just written.
pub struct Timer<'a> {
    device: Device,
    sets: usize,
    /// Calls of a sample.
    calls: usize,
    graph: Option<Graph>,
    call: &'a mut Call<'a>,
    /// The set of the next call, when calls are not recorded.
    next: usize,
}

impl<'a> Timer<'a> {
    /// Makes work warm and finds how many calls a sample has.
    ///
    /// # Errors
    /// Those of `call`.
    pub fn new(device: &Device, sets: usize, call: &'a mut Call<'a>) -> Result<Self> {
        let mut rotation = || rotate(0..sets, sets, call);
        rotation()?;
        let once = sample(device, &mut rotation)? / sets as f64;
        let mut timer = Timer {
            device: device.clone(),
            sets,
            calls: 1,
            graph: None,
            call,
            next: 0,
        };
        if once < RECORDED_BELOW_MS {
            let wanted = (SAMPLE_MS / once.max(1e-6)).ceil() as usize;
            timer.calls = wanted.clamp(1, MOST_CALLS).next_multiple_of(sets);
            if let Device::Cuda(cuda) = device {
                let indices = 0..timer.calls;
                timer.graph = Some(Graph::record(cuda, || rotate(indices, sets, timer.call))?);
                // The first replay uploads the graph.
                timer.sample()?;
            }
        }
        Ok(timer)
    }

    /// Milliseconds per call.
    ///
    /// # Errors
    /// Those of the calls.
    pub fn sample(&mut self) -> Result<f64> {
        let Timer {
            sets,
            calls,
            call,
            next,
            ..
        } = self;
        let mut work: Box<dyn FnMut() -> Result<()> + '_> = match &mut self.graph {
            Some(graph) => Box::new(|| graph.launch()),
            None => Box::new(|| {
                let first = *next;
                *next = (first + *calls) % *sets;
                rotate(first..first + *calls, *sets, &mut **call)
            }),
        };
        let milliseconds = sample(&self.device, &mut *work)?;
        Ok(milliseconds / *calls as f64)
    }
}

/// Calls with one set after the other, keeping each result until the same set comes again.
fn rotate(indices: std::ops::Range<usize>, sets: usize, call: &mut Call<'_>) -> Result<()> {
    let mut kept = VecDeque::with_capacity(sets);
    for index in indices {
        if kept.len() == sets {
            kept.pop_front();
        }
        kept.push_back(call(index % sets)?);
    }
    Ok(())
}

/// The value below which the given share of the samples lies, interpolated; 0 of nothing.
fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = share * last as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// The median; 0 of nothing.
pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// The distance of the quartiles over the median; 0 of nothing.
pub fn spread(samples: &[f64]) -> f64 {
    let middle = median(samples);
    match middle > 0.0 {
        true => (quantile(samples, 0.75) - quantile(samples, 0.25)) / middle,
        false => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn the_spread_is_that_of_the_middle_half() {
        assert_eq!(spread(&[5.0, 5.0, 5.0]), 0.0);
        assert_eq!(spread(&[1.0, 2.0, 3.0, 4.0, 5.0]), 2.0 / 3.0);
        assert_eq!(spread(&[]), 0.0);
    }

    #[test]
    fn a_timer_rotates_through_all_sets() {
        let mut seen = Vec::new();
        let mut call = |set: usize| {
            seen.push(set);
            std::thread::sleep(std::time::Duration::from_millis(1));
            Ok(Vec::new())
        };
        let mut timer = Timer::new(&Device::Cpu, 3, &mut call).unwrap();
        assert_eq!(timer.calls % 3, 0);
        assert!(timer.sample().unwrap() >= 1.0);
        drop(timer);
        assert_eq!(seen[..6], [0, 1, 2, 0, 1, 2]);
        assert!(seen.len() > 6 && seen[6..].iter().zip([0, 1, 2].iter().cycle()).all(|(a, b)| a == b));
    }
}
