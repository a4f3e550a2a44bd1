//! What is counted, in Prometheus' text format.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use l2p_engine::device::MemoryTag;
use l2p_engine::pipeline::Report;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// A request's end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Served {
    /// The route as it is declared, so that there are few of them.
    route: String,
    /// The status.
    status: u16,
}

/// A kind of memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Tag {
    tag: String,
}

/// The numbers, and their registry.
pub struct Metrics {
    registry: Registry,
    requests: Family<Served, Counter>,
    seconds: Histogram,
    pictures: Counter,
    drawing: Counter<f64, AtomicU64>,
    picture_seconds: Histogram,
    step_seconds: Histogram,
    given_up: Counter,
    waiting: Gauge,
    memory: Family<Tag, Gauge>,
}

impl Metrics {
    /// All zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("l2p");
        let long = || Histogram::new(exponential_buckets(0.01, 2.0, 15));
        let metrics = Metrics {
            requests: Family::default(),
            seconds: long(),
            pictures: Counter::default(),
            drawing: Counter::default(),
            picture_seconds: long(),
            step_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            given_up: Counter::default(),
            waiting: Gauge::default(),
            memory: Family::default(),
            registry: Registry::default(),
        };
        registry.register("requests", "Requests by route and status", metrics.requests.clone());
        let seconds = "From a request to the beginning of its answer";
        registry.register_with_unit("request", seconds, Unit::Seconds, metrics.seconds.clone());
        registry.register("pictures", "Pictures drawn", metrics.pictures.clone());
        registry.register_with_unit("drawing", "Time spent drawing", Unit::Seconds, metrics.drawing.clone());
        let per_picture = "Time of a batch by its pictures";
        registry.register_with_unit("picture", per_picture, Unit::Seconds, metrics.picture_seconds.clone());
        let per_step = "Time of a step of all pictures of a batch";
        registry.register_with_unit("step", per_step, Unit::Seconds, metrics.step_seconds.clone());
        registry.register(
            "given_up",
            "Batches that nobody waited for any more",
            metrics.given_up.clone(),
        );
        registry.register("waiting", "Requests that wait", metrics.waiting.clone());
        let memory = "The last batch's peak of device memory by what it is for";
        registry.register_with_unit("memory", memory, Unit::Bytes, metrics.memory.clone());
        Metrics { registry, ..metrics }
    }

    /// A request has an answer, or one that begins.
    pub fn served(&self, route: &str, status: u16, taken: Duration) {
        let served = Served {
            route: route.to_owned(),
            status,
        };
        self.requests.get_or_create(&served).inc();
        self.seconds.observe(taken.as_secs_f64());
    }

    /// Pictures were drawn at once.
    pub fn drew(&self, pictures: usize, taken: Duration) {
        self.pictures.inc_by(pictures as u64);
        self.drawing.inc_by(taken.as_secs_f64());
        self.picture_seconds
            .observe(taken.as_secs_f64() / pictures.max(1) as f64);
    }

    /// Nobody waited any more for what was drawn.
    pub fn gave_up(&self) {
        self.given_up.inc();
    }

    /// What a batch of so many steps took of the device.
    pub fn took(&self, report: &Report, steps: usize) {
        if let Some(phase) = report.phase("denoise") {
            self.step_seconds.observe(phase.seconds / steps.max(1) as f64);
        }
        let Some(memory) = report.fullest() else { return };
        for (tag, usage) in MemoryTag::ALL.iter().zip(&memory.by_tag) {
            let tag = Tag {
                tag: format!("{tag:?}").to_lowercase(),
            };
            self.memory.get_or_create(&tag).set(usage.peak as i64);
        }
    }

    /// The text, with so many requests waiting.
    pub fn text(&self, waiting: usize) -> String {
        self.waiting.set(waiting as i64);
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_the_text() {
        let metrics = Metrics::new();
        metrics.served("/v1/models", 200, Duration::from_millis(3));
        metrics.drew(4, Duration::from_secs(2));
        let text = metrics.text(7);
        for line in [
            "l2p_requests_total{route=\"/v1/models\",status=\"200\"} 1",
            "l2p_pictures_total 4",
            "l2p_drawing_seconds_total 2.0",
            "l2p_waiting 7",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
