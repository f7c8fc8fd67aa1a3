//! Every job of the server: what it asks for, where it stands, and its pictures for as long as they are kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use megafuse::pipeline::{Request, Size};
use megafuse::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;
use utoipa::ToSchema;

use super::metrics::Metrics;
use super::queue::{Queue, Waiting};

/// Jobs in a list, at most.
const MOST_LISTED: usize = 100;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Waits for the device.
    Queued,
    /// At least one of its pictures has begun.
    Running,
    /// All pictures are made.
    Done,
    /// One could not be made; those made before it are kept.
    Failed,
    Cancelled,
}

impl State {
    pub fn is_over(self) -> bool {
        matches!(self, State::Done | State::Failed | State::Cancelled)
    }
}

/// What anyone may know of a job.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Status {
    /// Unguessable: who knows it may read and cancel the job.
    pub id: String,
    pub model: String,
    pub state: State,
    /// Pictures that are made before its first, while it is queued.
    pub before: Option<usize>,
    /// Of how many pictures `made` are finished.
    pub count: usize,
    pub made: usize,
    /// Of the picture that is being made: steps done, of `steps`, over all stages.
    pub step: usize,
    pub steps: usize,
    /// The stage, from 1, and its size.
    pub stage: usize,
    pub stages: usize,
    pub size: Option<String>,
    /// Of the last steps; larger ones later take longer.
    pub steps_per_second: Option<f64>,
    /// Until its last picture is finished, as far as the work done so far tells.
    pub eta_seconds: Option<f64>,
    /// In seconds since 1970.
    pub created: u64,
    pub finished: Option<u64>,
    /// What was odd about the request, a sentence each.
    pub warnings: Vec<String>,
    pub error: Option<String>,
    pub pictures: Vec<PictureStatus>,
}

/// A finished picture.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PictureStatus {
    /// Which of the job's, from 0.
    pub index: usize,
    pub seed: u64,
    pub width: usize,
    pub height: usize,
    /// Where it is, below the server's address.
    pub url: String,
    /// Everything that made it, as in the PNG's text.
    #[schema(value_type = Object)]
    pub parameters: Value,
    /// The same as stable-diffusion-webui writes it.
    pub infotext: String,
}

struct Job {
    client: String,
    status: watch::Sender<Status>,
    /// Ends it at the next step.
    cancelled: bool,
    deadline: Option<Instant>,
    /// Pictures that are neither made nor given up.
    left: usize,
    finished: Option<Instant>,
}

/// What is asked for.
pub struct Order {
    pub client: String,
    pub model: Arc<str>,
    /// The pictures, one each, all of the same cost.
    pub requests: Vec<Request>,
    pub cost: u64,
    pub steps: usize,
    pub stages: usize,
    pub warnings: Vec<String>,
    pub priority: i32,
    /// It fails when it has not been finished by then.
    pub patience: Option<Duration>,
}

/// Why a job was not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// So many pictures wait; try again after so many seconds.
    Full { waiting: usize, after_seconds: u64 },
    /// The server ends.
    Draining,
}

/// A finished picture as it comes from the device.
pub struct Made {
    pub seed: u64,
    pub size: Size,
    pub png: Vec<u8>,
    pub parameters: Value,
    pub infotext: String,
}

struct Inner {
    queue: Queue,
    jobs: BTreeMap<u64, Job>,
    by_name: HashMap<String, u64>,
    /// Those that are not over: few beside those that are kept.
    open: BTreeSet<u64>,
    next: u64,
    /// The model is loaded.
    ready: bool,
    /// No job is taken, and when none is left the device's thread ends.
    draining: bool,
    /// Jobs that have pictures on the device now, each once.
    running: Vec<u64>,
    /// Multiply-accumulates per second, of the batches made lately.
    rate: Option<f64>,
}

/// Shared by the device's thread and the routes.
pub struct Jobs {
    inner: Mutex<Inner>,
    wake: Condvar,
    /// Finished pictures, gone with the server.
    folder: TempDir,
    keep: Duration,
    most_waiting: usize,
    pub metrics: Metrics,
}

impl Jobs {
    /// `keep`: how long a finished job and its pictures stay; `most_waiting`: pictures in the queue, at most.
    ///
    /// # Errors
    /// [`Error::Io`]: no folder for the pictures can be made.
    pub fn new(keep: Duration, most_waiting: usize) -> Result<Jobs> {
        let folder = tempfile::Builder::new().prefix("megafuse-serve-").tempdir();
        let folder = folder.map_err(|error| Error::io(&std::env::temp_dir(), error))?;
        let inner = Inner {
            queue: Queue::default(),
            jobs: BTreeMap::new(),
            by_name: HashMap::new(),
            open: BTreeSet::new(),
            next: 0,
            ready: false,
            draining: false,
            running: Vec::new(),
            rate: None,
        };
        let (inner, metrics) = (Mutex::new(inner), Metrics::default());
        Ok(Jobs { inner, wake: Condvar::new(), folder, keep, most_waiting, metrics })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes a job: its status from now on.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn submit(&self, order: Order) -> std::result::Result<watch::Receiver<Status>, Refusal> {
        let mut inner = self.lock();
        if inner.draining {
            return Err(Refusal::Draining);
        }
        if inner.queue.len() + order.requests.len() > self.most_waiting {
            self.metrics.refused.inc();
            let seconds = inner.rate.map_or(5.0, |rate| inner.queue.cost() as f64 / rate);
            let after_seconds = seconds.clamp(1.0, 3600.0).ceil() as u64;
            return Err(Refusal::Full { waiting: inner.queue.len(), after_seconds });
        }
        let (number, name, now) = (inner.next, unguessable(), Instant::now());
        inner.next += 1;
        let status = Status {
            id: name.clone(),
            model: order.model.to_string(),
            state: State::Queued,
            before: None,
            count: order.requests.len(),
            made: 0,
            step: 0,
            steps: order.steps,
            stage: 0,
            stages: order.stages,
            size: None,
            steps_per_second: None,
            eta_seconds: None,
            created: unix_seconds(),
            finished: None,
            warnings: order.warnings,
            error: None,
            pictures: Vec::new(),
        };
        let (sender, receiver) = watch::channel(status);
        let deadline = order.patience.map(|patience| now + patience);
        let (left, client, cost) = (order.requests.len(), order.client, order.cost);
        for (index, request) in order.requests.into_iter().enumerate() {
            let (client, model) = (client.clone(), Arc::clone(&order.model));
            let waiting =
                Waiting { job: number, index, model, request, cost, client, priority: order.priority, arrived: now };
            inner.queue.push(waiting);
        }
        let job = Job { client, status: sender, cancelled: false, deadline, left, finished: None };
        inner.jobs.insert(number, job);
        inner.open.insert(number);
        inner.by_name.insert(name, number);
        self.metrics.jobs_taken.inc();
        inner.tell_places();
        self.wake.notify_all();
        Ok(receiver)
    }

    /// The status of a job, now and later.
    pub fn find(&self, name: &str) -> Option<watch::Receiver<Status>> {
        let inner = self.lock();
        let number = inner.by_name.get(name)?;
        Some(inner.jobs[number].status.subscribe())
    }

    /// The last jobs of a client, the latest first.
    pub fn of(&self, client: &str) -> Vec<Status> {
        let inner = self.lock();
        let own = inner.jobs.values().rev().filter(|job| job.client == client);
        own.take(MOST_LISTED).map(|job| job.status.borrow().clone()).collect()
    }

    /// What is on the device now, if anything.
    pub fn current(&self) -> Option<Status> {
        let inner = self.lock();
        let number = inner.running.first()?;
        Some(inner.jobs.get(number)?.status.borrow().clone())
    }

    /// Ends a job: what waits of it at once, what is being made at the next step, unless others' pictures are made with it.
    /// False: there is none of this name.
    pub fn cancel(&self, name: &str) -> bool {
        let mut inner = self.lock();
        let Some(&number) = inner.by_name.get(name) else { return false };
        inner.end(number, State::Cancelled, None, &self.metrics);
        true
    }

    /// Ends what is on the device now.
    pub fn interrupt(&self) {
        let mut inner = self.lock();
        let running = inner.running.clone();
        running.into_iter().for_each(|job| inner.end(job, State::Cancelled, None, &self.metrics));
    }

    /// From now on no job is taken, and the device's thread ends when none is left.
    pub fn drain(&self) {
        self.lock().draining = true;
        self.wake.notify_all();
    }

    pub fn is_draining(&self) -> bool {
        self.lock().draining
    }

    /// Is the model loaded, and does the server take jobs?
    pub fn is_ready(&self) -> bool {
        let inner = self.lock();
        inner.ready && !inner.draining
    }

    /// Pictures that wait.
    pub fn waiting(&self) -> usize {
        self.lock().queue.len()
    }

    /// Everything that is counted, as Prometheus reads it.
    pub fn metrics_text(&self) -> String {
        self.metrics.text(self.waiting())
    }

    /// The PNG of a finished picture by its URL, or what stands behind the last slash. `None`: it is not there, or no longer.
    pub fn picture(&self, url: &str) -> Option<Vec<u8>> {
        let name = name_of(url);
        // Names are made here; what is none must not become a path.
        name.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| std::fs::read(self.path_of(name)).ok())?
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.png"))
    }

    /// Forgets what has been over for longer than it is kept.
    pub fn sweep(&self, now: Instant) {
        let mut inner = self.lock();
        let old: Vec<u64> = inner.jobs.iter().filter(|(_, job)| job.is_old(now, self.keep)).map(|(&n, _)| n).collect();
        for number in old {
            let Some(job) = inner.jobs.remove(&number) else { continue };
            let status = job.status.borrow().clone();
            inner.by_name.remove(&status.id);
            for picture in &status.pictures {
                let _ = std::fs::remove_file(self.path_of(name_of(&picture.url)));
            }
        }
    }

    /// How long so many multiply-accumulates take the device. `None`: nothing was made yet.
    pub fn seconds_of(&self, macs: u64) -> Option<f64> {
        Some(macs as f64 / self.lock().rate?)
    }

    // What the device's thread asks and tells.

    pub fn set_ready(&self, ready: bool) {
        self.lock().ready = ready;
    }

    /// Waits for pictures to make in one batch. `None`: the server ends, and nothing waits.
    pub fn take(&self, most: usize) -> Option<Vec<Waiting>> {
        let mut inner = self.lock();
        loop {
            inner.fail_late(Instant::now(), &self.metrics);
            let group = inner.queue.take(most, Instant::now());
            if !group.is_empty() {
                for item in &group {
                    inner.change(item.job, |status| {
                        status.state = State::Running;
                        status.before = None;
                    });
                }
                inner.running = group.iter().map(|item| item.job).collect();
                inner.running.sort_unstable();
                inner.running.dedup();
                inner.tell_places();
                return Some(group);
            }
            if inner.draining {
                return None;
            }
            inner = self.wake.wait(inner).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Has every job of the batch on the device been ended?
    pub fn is_given_up(&self) -> bool {
        let mut inner = self.lock();
        inner.fail_late(Instant::now(), &self.metrics);
        inner.running.iter().all(|job| inner.jobs.get(job).is_none_or(|job| job.cancelled))
    }

    /// Tells those who watch the batch where it stands. The closure gets the seconds that a job's later pictures will take, once a
    /// batch has been timed.
    pub fn progress(&self, change: impl Fn(&mut Status, Option<f64>)) {
        let inner = self.lock();
        for &job in &inner.running {
            let later = inner.seconds_after_batch(job);
            inner.change(job, |status| change(status, later));
        }
    }

    /// To the job on the device, where it is alone there: a warning may quote a prompt, which is no one else's to read.
    pub fn warn(&self, message: &str) {
        let inner = self.lock();
        let [job] = inner.running[..] else { return };
        inner.change(job, |status| {
            if !status.warnings.iter().any(|known| known == message) {
                status.warnings.push(message.to_string());
            }
        });
    }

    /// Keeps a picture of the batch on the device, unless its job was ended.
    ///
    /// # Errors
    /// [`Error::Io`]: it cannot be kept.
    pub fn finished(&self, item: &Waiting, made: Made) -> Result<()> {
        let name = unguessable();
        let path = self.path_of(&name);
        // Before the lock: a slow disk delays no other.
        megafuse::image::write_atomically(&path, |file| file.write_all(&made.png))?;
        let mut inner = self.lock();
        let Some(job) = inner.jobs.get_mut(&item.job).filter(|job| !job.cancelled) else {
            let _ = std::fs::remove_file(path);
            return Ok(());
        };
        job.left -= 1;
        let over = job.left == 0;
        if over {
            job.finished = Some(Instant::now());
            inner.open.remove(&item.job);
            self.metrics.jobs_done.inc();
        }
        self.metrics.pictures.inc();
        inner.change(item.job, |status| {
            status.pictures.push(PictureStatus {
                index: item.index,
                seed: made.seed,
                width: made.size.width,
                height: made.size.height,
                url: format!("/v1/files/{name}.png"),
                parameters: made.parameters.clone(),
                infotext: made.infotext.clone(),
            });
            status.pictures.sort_by_key(|picture| picture.index);
            status.made += 1;
            if over {
                status.state = State::Done;
                status.step = status.steps;
                status.eta_seconds = None;
                status.finished = Some(unix_seconds());
            }
        });
        Ok(())
    }

    /// A picture could not be made: its job is over.
    pub fn failed(&self, item: &Waiting, error: &str) {
        self.lock().end(item.job, State::Failed, Some(error.to_string()), &self.metrics);
    }

    /// No job goes on.
    pub fn fail_waiting(&self, error: &str) {
        let mut inner = self.lock();
        let open = inner.open.clone();
        open.into_iter().for_each(|job| inner.end(job, State::Failed, Some(error.to_string()), &self.metrics));
    }

    /// The batch on the device is over; `work` multiply-accumulates took so long. `None`: it ended early.
    pub fn batch_over(&self, work: Option<(u64, Duration)>) {
        let mut inner = self.lock();
        inner.running.clear();
        if let Some((work, took)) = work {
            let rate = work as f64 / took.as_secs_f64().max(1e-9);
            // Half of it is of the last batch: a card that is shared changes its speed.
            inner.rate = Some(inner.rate.map_or(rate, |before| (before + rate) / 2.0));
        }
    }
}

impl Job {
    fn is_old(&self, now: Instant, keep: Duration) -> bool {
        self.finished.is_some_and(|finished| now - finished >= keep)
    }
}

impl Inner {
    fn seconds_after_batch(&self, job: u64) -> Option<f64> {
        let waiting = self.queue.cost_of(job);
        if waiting == 0 { Some(0.0) } else { Some(waiting as f64 / self.rate?) }
    }

    fn change(&self, job: u64, change: impl FnOnce(&mut Status)) {
        if let Some(job) = self.jobs.get(&job).filter(|job| !job.cancelled) {
            job.status.send_modify(change);
        }
    }

    fn end(&mut self, number: u64, state: State, error: Option<String>, metrics: &Metrics) {
        let Some(job) = self.jobs.get_mut(&number).filter(|job| job.finished.is_none()) else { return };
        job.cancelled = true;
        job.finished = Some(Instant::now());
        self.open.remove(&number);
        match state {
            State::Failed => metrics.jobs_failed.inc(),
            _ => metrics.jobs_cancelled.inc(),
        };
        job.status.send_modify(|status| {
            status.state = state;
            status.error = error;
            status.before = None;
            status.eta_seconds = None;
            status.finished = Some(unix_seconds());
        });
        self.queue.remove(number);
        self.tell_places();
    }

    /// Ends what has passed its deadline.
    fn fail_late(&mut self, now: Instant, metrics: &Metrics) {
        let is_late = |number: &&u64| self.jobs[number].deadline.is_some_and(|deadline| now >= deadline);
        let late: Vec<u64> = self.open.iter().filter(is_late).copied().collect();
        for number in late {
            self.end(number, State::Failed, Some("its deadline has passed".into()), metrics);
        }
    }

    /// Tells those who wait how many are before them.
    fn tell_places(&self) {
        let now = Instant::now();
        for &number in &self.open {
            let before = self.queue.before(number, now);
            self.jobs[&number].status.send_if_modified(|status| {
                let changed = status.state == State::Queued && status.before != before;
                if changed {
                    status.before = before;
                }
                changed
            });
        }
    }
}

/// 128 bits of the system's randomness in hexadecimal digits.
fn unguessable() -> String {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).expect("every system has a source of randomness");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a picture's URL ends with, without `.png`.
fn name_of(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or_default().trim_end_matches(".png")
}

pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs(keep: u64, most_waiting: usize) -> Jobs {
        Jobs::new(Duration::from_secs(keep), most_waiting).unwrap()
    }

    fn order(client: &str, count: u64, patience: Option<Duration>) -> Order {
        let requests = (0..count).map(|seed| Request { seed, ..Request::default() }).collect();
        let client = client.into();
        Order {
            client,
            model: "m".into(),
            requests,
            cost: 10,
            steps: 4,
            stages: 1,
            warnings: Vec::new(),
            priority: 0,
            patience,
        }
    }

    fn made(seed: u64) -> Made {
        Made { seed, size: Size::new(8, 8), png: vec![1, 2, 3], parameters: Value::Null, infotext: String::new() }
    }

    #[test]
    fn a_job_is_done_with_its_last_picture_and_forgotten_with_its_files() {
        let jobs = jobs(60, 8);
        let status = jobs.submit(order("a", 2, None)).unwrap();
        let id = status.borrow().id.clone();
        let group = jobs.take(8).unwrap();
        assert_eq!((group.len(), status.borrow().state), (2, State::Running));
        jobs.finished(&group[1], made(1)).unwrap();
        assert_eq!((status.borrow().state, status.borrow().made), (State::Running, 1));
        jobs.finished(&group[0], made(0)).unwrap();
        jobs.batch_over(Some((20, Duration::from_secs(2))));
        let over = status.borrow().clone();
        assert_eq!(over.state, State::Done);
        assert_eq!(over.pictures.iter().map(|picture| picture.seed).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(jobs.seconds_of(30), Some(3.0));
        let name = over.pictures[0].url.strip_prefix("/v1/files/").unwrap().trim_end_matches(".png");
        assert_eq!(jobs.picture(name), Some(vec![1, 2, 3]));
        jobs.sweep(Instant::now() + Duration::from_secs(30));
        assert!(jobs.find(&id).is_some() && jobs.picture(name).is_some());
        jobs.sweep(Instant::now() + Duration::from_secs(61));
        assert!(jobs.find(&id).is_none() && jobs.picture(name).is_none());
        assert_eq!(std::fs::read_dir(jobs.folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_made_of_an_ended_job_is_thrown_away() {
        let jobs = jobs(60, 8);
        let (ended, other) = (jobs.submit(order("a", 1, None)).unwrap(), jobs.submit(order("b", 1, None)).unwrap());
        let group = jobs.take(8).unwrap();
        assert_eq!(group.len(), 2);
        let id = ended.borrow().id.clone();
        assert!(jobs.cancel(&id) && !jobs.is_given_up(), "the other one goes on");
        group.iter().for_each(|item| jobs.finished(item, made(0)).unwrap());
        assert_eq!((ended.borrow().state, other.borrow().state), (State::Cancelled, State::Done));
        assert_eq!((ended.borrow().pictures.len(), std::fs::read_dir(jobs.folder.path()).unwrap().count()), (0, 1));
        // An end is the end.
        jobs.failed(&group[0], "late");
        jobs.cancel(&other.borrow().id.clone());
        assert_eq!((ended.borrow().state, other.borrow().state), (State::Cancelled, State::Done));
    }

    #[test]
    fn full_queues_and_ends_are_told() {
        let jobs = jobs(60, 2);
        let late = jobs.submit(order("a", 1, Some(Duration::ZERO))).unwrap();
        let waits = jobs.submit(order("b", 1, None)).unwrap();
        let full = jobs.submit(order("c", 1, None)).unwrap_err();
        assert_eq!(full, Refusal::Full { waiting: 2, after_seconds: 5 });
        assert_eq!(jobs.take(8).unwrap().len(), 1);
        assert_eq!(late.borrow().error.as_deref(), Some("its deadline has passed"));
        jobs.drain();
        assert_eq!(jobs.submit(order("c", 1, None)).unwrap_err(), Refusal::Draining);
        assert!(jobs.take(8).is_none());
        jobs.fail_waiting("the server ends");
        assert_eq!(
            (waits.borrow().state, jobs.current().map(|status| status.state)),
            (State::Failed, Some(State::Failed))
        );
        for name in ["../../etc/passwd", "..", "a.png.txt", ""] {
            assert_eq!(jobs.picture(name), None, "{name}");
        }
    }
}
