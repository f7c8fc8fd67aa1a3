//! What the server counts, as Prometheus reads it.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Counters since the server began. Clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub jobs_taken: Counter,
    pub jobs_done: Counter,
    pub jobs_failed: Counter,
    pub jobs_cancelled: Counter,
    /// Requests that found the queue full.
    pub refused: Counter,
    pub pictures: Counter,
    pub steps: Counter,
    /// Pictures per batch.
    pub batch: Histogram,
    /// Seconds per batch.
    pub batch_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics {
            jobs_taken: Counter::default(),
            jobs_done: Counter::default(),
            jobs_failed: Counter::default(),
            jobs_cancelled: Counter::default(),
            refused: Counter::default(),
            pictures: Counter::default(),
            steps: Counter::default(),
            batch: Histogram::new([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),
            batch_seconds: Histogram::new(exponential_buckets(0.05, 2.0, 14)),
        }
    }
}

impl Metrics {
    /// The exposition format's text; `waiting`: pictures in the queue.
    pub fn text(&self, waiting: usize) -> String {
        let queue: Gauge = Gauge::default();
        queue.set(waiting as i64);
        let mut registry = Registry::with_prefix("megafuse");
        registry.register("jobs_taken", "Jobs taken", self.jobs_taken.clone());
        registry.register("jobs_done", "Jobs whose pictures are all made", self.jobs_done.clone());
        registry.register("jobs_failed", "Jobs that could not be finished", self.jobs_failed.clone());
        registry.register("jobs_cancelled", "Jobs that their clients ended", self.jobs_cancelled.clone());
        registry.register("jobs_refused", "Jobs that found the queue full", self.refused.clone());
        registry.register("pictures", "Pictures made", self.pictures.clone());
        registry.register("steps", "Steps of the network, each of a whole batch", self.steps.clone());
        registry.register("queue_pictures", "Pictures that wait", queue);
        registry.register("batch_pictures", "Pictures per batch", self.batch.clone());
        let seconds = self.batch_seconds.clone();
        registry.register_with_unit("batch", "Time of a batch", Unit::Seconds, seconds);
        let mut text = String::new();
        encode(&mut text, &registry).expect("a string takes any text");
        text
    }
}
