//! What is said of repeated measurements: median, quartiles, intervals, and whether two runs differ.

use serde_json::{Value, json};

/// Times of one call, in seconds, sorted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<f64>);

/// Of the standard normal distribution: 95 % lie within this many deviations.
const NORMAL_95: f64 = 1.959964;

/// Samples that a report keeps; of more, every so many-th in order of size.
const KEPT: usize = 200;

impl Samples {
    pub fn new(mut seconds: Vec<f64>) -> Samples {
        seconds.sort_by(f64::total_cmp);
        Samples(seconds)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The value below which a share `q` of the samples lies, between two of them by a straight line. 0 for none.
    pub fn quantile(&self, q: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else { return 0.0 };
        let at = q * last as f64;
        let (below, above) = (self.0[at.floor() as usize], self.0[at.ceil() as usize]);
        below + (above - below) * at.fract()
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn least(&self) -> f64 {
        self.quantile(0.0)
    }

    /// 95 % confidence interval of the median, from the order of the samples alone (binomial distribution, normal
    /// approximation): it supposes no distribution, but samples that do not depend on each other. Fewer than six samples
    /// have none; then it is the whole range.
    pub fn interval(&self) -> [f64; 2] {
        let n = self.0.len();
        if n < 6 {
            return [self.quantile(0.0), self.quantile(1.0)];
        }
        let half = NORMAL_95 * (n as f64).sqrt() / 2.0;
        let middle = n as f64 / 2.0;
        let first = ((middle - half).floor() as usize).saturating_sub(1);
        let last = ((middle + half).ceil() as usize).min(n - 1);
        [self.0[first], self.0[last]]
    }

    /// Half the interval's width over the median.
    pub fn spread(&self) -> f64 {
        let [low, high] = self.interval();
        (high - low) / 2.0 / self.median()
    }

    /// In microseconds.
    pub fn to_json(&self) -> Value {
        let us = |seconds: f64| seconds * 1e6;
        let step = self.len().div_ceil(KEPT).max(1);
        let kept: Vec<f64> = self.0.iter().skip(step / 2).step_by(step).map(|&seconds| us(seconds)).collect();
        json!({
            "median_us": us(self.median()), "interval_us": self.interval().map(us), "samples": self.len(),
            "quartiles_us": [us(self.quantile(0.25)), us(self.quantile(0.75))], "samples_us": kept,
        })
    }
}

/// How a second run compares with a first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Median of the second over that of the first, and the 95 % interval of it.
    pub ratio: f64,
    pub interval: [f64; 2],
}

/// Resamples of the bootstrap.
const RESAMPLES: usize = 2000;

impl Comparison {
    /// By the percentile bootstrap (Efron 1979): both runs are drawn again with replacement, [`RESAMPLES`] times, and the
    /// ratios of their medians counted. The draws are the same each time.
    pub fn new(first: &Samples, second: &Samples) -> Comparison {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut resampled = |samples: &Samples| {
            let count = samples.len();
            let mut draw = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                samples.0[((state >> 33) % count as u64) as usize]
            };
            Samples::new((0..count).map(|_| draw()).collect()).median()
        };
        let ratios = (0..RESAMPLES).map(|_| resampled(second) / resampled(first)).collect();
        let ratios = Samples::new(ratios);
        let interval = [ratios.quantile(0.025), ratios.quantile(0.975)];
        Comparison { ratio: second.median() / first.median(), interval }
    }

    /// `faster`, `slower`: the interval does not hold 1. Else no difference was shown, which is not that there is none.
    pub fn verdict(&self) -> &'static str {
        let [low, high] = self.interval;
        if high < 1.0 {
            "faster"
        } else if low > 1.0 {
            "slower"
        } else {
            "no difference shown"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_the_samples() {
        let samples = Samples::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!([0.0, 0.25, 0.5, 1.0].map(|q| samples.quantile(q)), [1.0, 1.75, 2.5, 4.0]);
        assert_eq!(Samples::default().median(), 0.0);
        assert_eq!(Samples::new(vec![7.0]).interval(), [7.0, 7.0]);
    }

    /// As the textbook has it (Conover, Practical Nonparametric Statistics): of 100 samples the 40th and the 61st.
    #[test]
    fn the_interval_is_that_of_the_order_statistics() {
        let samples = Samples::new((1..=100).map(f64::from).collect());
        assert_eq!(samples.interval(), [40.0, 61.0]);
        assert!((samples.spread() - 10.5 / 50.5).abs() < 1e-12);
    }

    /// Of 400 runs of 40 samples each, the interval holds the true median about 95 times in 100.
    #[test]
    fn the_interval_holds_the_median_as_often_as_it_says() {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let held = (0..400)
            .filter(|_| {
                let [low, high] = Samples::new((0..40).map(|_| uniform().powi(3)).collect()).interval();
                (low..=high).contains(&0.125)
            })
            .count();
        assert!((368..=396).contains(&held), "{held} of 400");
    }

    #[test]
    fn a_difference_is_shown_where_it_is_larger_than_the_noise() {
        let run = |scale: f64| Samples::new((0..50).map(|i| scale * (1.0 + 0.01 * f64::from(i * 37 % 50))).collect());
        assert_eq!(Comparison::new(&run(1.0), &run(1.0)).verdict(), "no difference shown");
        assert_eq!(Comparison::new(&run(1.0), &run(1.02)).verdict(), "no difference shown");
        let slower = Comparison::new(&run(1.0), &run(1.5));
        assert_eq!(slower.verdict(), "slower");
        assert!(
            (slower.ratio - 1.5).abs() < 1e-9 && slower.interval[0] < 1.5 && slower.interval[1] > 1.5,
            "{slower:?}"
        );
        assert_eq!(Comparison::new(&run(1.5), &run(1.0)).verdict(), "faster");
    }
}
