//! What waits for the device, and who is next: clients share it fairly, and pictures that are alike are made together.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use megafuse::pipeline::Request;

/// What a level of priority is worth: a picture goes before those of its client that came so much earlier. As waiting counts like
/// priority, none waits for ever.
const PRIORITY: Duration = Duration::from_secs(30);

/// One picture of a job.
#[derive(Clone, Debug)]
pub struct Waiting {
    pub job: u64,
    /// Which of the job's pictures, from 0.
    pub index: usize,
    /// Its name.
    pub model: Arc<str>,
    /// Of one picture.
    pub request: Request,
    /// In multiply-accumulates.
    pub cost: u64,
    /// Whose share of the device it uses.
    pub client: String,
    /// -10 to 10, higher is sooner.
    pub priority: i32,
    pub arrived: Instant,
}

impl Waiting {
    /// How long it has waited, with what its priority is worth, in seconds.
    fn urgency(&self, now: Instant) -> f64 {
        (now - self.arrived).as_secs_f64() + PRIORITY.as_secs_f64() * f64::from(self.priority)
    }
}

/// The waiting pictures of all clients. Each client has an account of the work that was done for it; the one with the least is
/// next (start-time fair queueing), so one that asks for a thousand pictures delays the others by one batch.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Vec<Waiting>,
    /// Work done for each client that has something waiting or has had it lately.
    accounts: HashMap<String, u64>,
    /// The account of the client that was served last: who comes newly does not get what it never asked for.
    served: u64,
}

impl Queue {
    pub fn push(&mut self, item: Waiting) {
        if !self.waiting.iter().any(|other| other.client == item.client) {
            let account = self.accounts.entry(item.client.clone()).or_insert(self.served);
            *account = self.served.max(*account);
        }
        self.waiting.push(item);
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Pictures that wait in all, in multiply-accumulates.
    pub fn cost(&self) -> u64 {
        self.waiting.iter().map(|item| item.cost).sum()
    }

    /// The same of one job's.
    pub fn cost_of(&self, job: u64) -> u64 {
        self.waiting.iter().filter(|item| item.job == job).map(|item| item.cost).sum()
    }

    /// The pictures to make next, in one batch: at most `most`, fewer where no more are alike.
    pub fn take(&mut self, most: usize, now: Instant) -> Vec<Waiting> {
        let mut group: Vec<Waiting> = Vec::new();
        while group.len() < most.max(1) {
            let fits = |item: &Waiting| match group.first() {
                None => true,
                Some(first) => {
                    let alone = first.request.one_at_a_time() || item.request.one_at_a_time();
                    !alone && item.model == first.model && item.request.fits_into_batch_of(&first.request)
                }
            };
            let candidates = self.waiting.iter().enumerate().filter(|(_, item)| fits(item));
            let Some((at, _)) = candidates.min_by(|(_, a), (_, b)| self.order(a, b, now)) else { break };
            let item = self.waiting.remove(at);
            let account = self.accounts.entry(item.client.clone()).or_insert(self.served);
            if group.is_empty() {
                self.served = self.served.max(*account);
            }
            *account += item.cost;
            group.push(item);
        }
        let (waiting, served) = (&self.waiting, self.served);
        self.accounts.retain(|client, account| *account > served || waiting.iter().any(|item| item.client == *client));
        group
    }

    fn order(&self, a: &Waiting, b: &Waiting, now: Instant) -> Ordering {
        let account = |item: &Waiting| self.accounts.get(&item.client).copied().unwrap_or(self.served);
        let urgent = b.urgency(now).total_cmp(&a.urgency(now));
        account(a).cmp(&account(b)).then(urgent).then(a.job.cmp(&b.job)).then(a.index.cmp(&b.index))
    }

    /// Takes out every picture of a job: how many there were.
    pub fn remove(&mut self, job: u64) -> usize {
        let before = self.waiting.len();
        self.waiting.retain(|item| item.job != job);
        before - self.waiting.len()
    }

    /// How many pictures are made before the first of this job's, were nothing to come: `None`: none of its waits.
    pub fn before(&self, job: u64, now: Instant) -> Option<usize> {
        let first = self.waiting.iter().filter(|item| item.job == job).min_by(|a, b| self.order(a, b, now))?;
        Some(self.waiting.iter().filter(|item| self.order(item, first, now) == Ordering::Less).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(job: u64, client: &str, steps: usize, priority: i32, arrived: Instant) -> Waiting {
        let request = Request { prompt: format!("{job}"), steps: Some(steps), ..Request::default() };
        Waiting { job, index: 0, model: "m".into(), request, cost: 10, client: client.into(), priority, arrived }
    }

    fn jobs(group: Vec<Waiting>) -> Vec<u64> {
        group.iter().map(|item| item.job).collect()
    }

    #[test]
    fn clients_take_turns_however_much_one_asks_for() {
        let now = Instant::now();
        let mut queue = Queue::default();
        (0..6).for_each(|job| queue.push(item(job, "many", 5, 0, now)));
        assert_eq!(jobs(queue.take(1, now)), [0]);
        assert_eq!(jobs(queue.take(1, now)), [1]);
        queue.push(item(10, "few", 5, 0, now));
        queue.push(item(11, "few", 5, 0, now));
        assert_eq!(queue.before(10, now), Some(0));
        let order: Vec<u64> = std::iter::from_fn(|| jobs(queue.take(1, now)).pop()).collect();
        assert_eq!(order, [10, 2, 11, 3, 4, 5]);
        assert_eq!((queue.len(), queue.cost()), (0, 0));
    }

    #[test]
    fn who_comes_newly_owes_nothing_and_is_owed_nothing() {
        let now = Instant::now();
        let mut queue = Queue::default();
        (0..8).for_each(|job| queue.push(item(job, "first", 5, 0, now)));
        (0..4).for_each(|_| drop(queue.take(1, now)));
        (20..26).for_each(|job| queue.push(item(job, "second", 5, 0, now)));
        let order: Vec<u64> = std::iter::from_fn(|| jobs(queue.take(1, now)).pop()).collect();
        assert_eq!(order, [20, 4, 21, 5, 22, 6, 23, 7, 24, 25]);
    }

    #[test]
    fn a_batch_holds_what_is_alike_of_all_clients() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for (job, client, steps) in [(0, "a", 5), (1, "a", 9), (2, "b", 5), (3, "b", 9), (4, "a", 5)] {
            queue.push(item(job, client, steps, 0, now));
        }
        assert_eq!(jobs(queue.take(8, now)), [0, 2, 4]);
        assert_eq!(jobs(queue.take(8, now)), [3, 1]);
        assert!(queue.take(8, now).is_empty());
        queue.push(Waiting { model: "n".into(), ..item(5, "a", 5, 0, now) });
        queue.push(item(6, "a", 5, 0, now));
        assert_eq!((jobs(queue.take(8, now)), jobs(queue.take(8, now))), (vec![5], vec![6]));
    }

    #[test]
    fn priority_is_worth_waiting_and_no_more() {
        let begin = Instant::now();
        let mut queue = Queue::default();
        queue.push(item(0, "a", 5, -1, begin));
        queue.push(item(1, "a", 5, 0, begin));
        queue.push(item(2, "a", 5, 1, begin + PRIORITY / 2));
        queue.push(item(3, "a", 5, 1, begin + 3 * PRIORITY));
        let order: Vec<u64> = std::iter::from_fn(|| jobs(queue.take(1, begin + 4 * PRIORITY)).pop()).collect();
        assert_eq!(order, [2, 1, 0, 3]);
    }

    #[test]
    fn a_job_is_taken_out_whole() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for job in [0, 1, 1, 2] {
            queue.push(item(job, "a", 5, 0, now));
        }
        assert_eq!(
            (queue.remove(1), queue.remove(1), queue.before(2, now), queue.before(1, now)),
            (2, 0, Some(1), None)
        );
    }
}
