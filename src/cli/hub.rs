//! `--model ORG/NAME`: what is not there of a model of the Hugging Face hub is fetched before the command runs.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use megafuse::pipeline::{HubName, HubNeed, HubObserver, HubSettings, fetch_model};
use megafuse::{DType, Result};

use super::args::{ProbeArgs, QuantizeArgs};
use super::console::say;
use super::memory::bytes_text;
use super::output;
use super::picture_args::RunArgs;
use super::progress::seconds_text;

#[derive(Args)]
pub struct HubArgs {
    /// Ask nothing of the network: a model of the hub is taken from its local cache
    ///
    /// As HF_HUB_OFFLINE=1 says it. HF_HOME or HF_HUB_CACHE say where the cache is, HF_ENDPOINT names a mirror, HF_TOKEN (or
    /// hf auth login) opens models that are gated or private.
    #[arg(long, help_heading = "Machine")]
    pub offline: bool,
}

/// Puts the place in the local cache for a name of the hub. A path that exists is no name.
///
/// # Errors
/// As [`fetch_model`].
fn resolve(model: &mut Option<PathBuf>, hub: &HubArgs, need: impl FnOnce() -> Result<HubNeed>) -> Result<()> {
    let Some(text) = model.as_ref().filter(|path| !path.exists()).and_then(|path| path.to_str()) else { return Ok(()) };
    // What does not look like a name is a path, whose own error says that it is not there.
    let Ok(name) = text.parse::<HubName>() else { return Ok(()) };
    let mut settings = HubSettings::from_env()?;
    settings.offline |= hub.offline;
    let need = need()?;
    output::advise_on_interrupt("; what was fetched is kept, and the same command goes on from there");
    *model = Some(fetch_model(&name, need, &settings, &mut Fetching::new(&name))?);
    output::advise_on_interrupt("");
    Ok(())
}

/// For a command that makes pictures.
///
/// # Errors
/// As [`fetch_model`]; those of the device.
pub fn resolve_for_run(run: &mut RunArgs) -> Result<()> {
    let (device, dtype) = (run.device, run.dtype);
    let need = || match dtype {
        Some(dtype) => Ok(HubNeed::Weights(dtype)),
        None => Ok(HubNeed::Weights(super::picture_args::usual_dtype(&device.open()?))),
    };
    resolve(&mut run.model, &run.hub, need)
}

/// For one that reads configurations alone.
///
/// # Errors
/// As [`fetch_model`].
pub fn resolve_for_plan(run: &mut RunArgs) -> Result<()> {
    resolve(&mut run.model, &run.hub, || Ok(HubNeed::Configurations))
}

/// # Errors
/// As [`fetch_model`].
pub fn resolve_for_probe(args: &mut ProbeArgs) -> Result<()> {
    let dtype = args.dtype;
    resolve(&mut args.model, &args.hub, || Ok(HubNeed::Weights(dtype)))
}

/// # Errors
/// As [`fetch_model`].
pub fn resolve_for_quantize(args: &mut QuantizeArgs) -> Result<()> {
    let mut model = Some(args.model.clone());
    resolve(&mut model, &args.hub, || Ok(HubNeed::Weights(DType::F16)))?;
    args.model = model.unwrap_or_default();
    Ok(())
}

/// A bar of bytes on a terminal, else a line at the beginning, at the end and every ten seconds.
struct Fetching {
    model: String,
    bar: Option<ProgressBar>,
    bytes: u64,
    /// Where the rate is counted from: what was there before took no time.
    first: Option<u64>,
    done: u64,
    begin: Instant,
    last_line: Instant,
}

/// Less is there before it is read.
const SPOKEN_OF_BYTES: u64 = 100_000;
const LINE_INTERVAL: Duration = Duration::from_secs(10);

impl Fetching {
    fn new(name: &HubName) -> Fetching {
        let (model, now) = (name.repository.clone(), Instant::now());
        Fetching { model, bar: None, bytes: 0, first: None, done: 0, begin: now, last_line: now }
    }
}

impl HubObserver for Fetching {
    fn begin(&mut self, files: usize, bytes: u64) {
        (self.bytes, self.first, self.done) = (bytes, None, 0);
        (self.begin, self.last_line) = (Instant::now(), Instant::now());
        if bytes < SPOKEN_OF_BYTES {
            return;
        }
        let noun = if files == 1 { "file" } else { "files" };
        say!("fetching {files} {noun} of {}, {}", self.model, bytes_text(bytes));
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
            let style = "{prefix:22} {bar:16} {decimal_bytes}/{decimal_total_bytes}  {elapsed}  ETA {eta}";
            bar.set_style(ProgressStyle::with_template(style).expect("a fixed template"));
            bar.enable_steady_tick(Duration::from_millis(200));
            self.bar = Some(bar);
        }
    }

    fn position(&mut self, name: &str, done: u64) {
        self.done = done;
        let first = *self.first.get_or_insert(done);
        if let Some(bar) = &self.bar {
            // The end of a long name says more than its beginning.
            let from = name.char_indices().rev().nth(21).map_or(0, |(at, _)| at);
            bar.set_prefix(name[from..].to_string());
            bar.set_position(done);
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            let rate = done.saturating_sub(first) as f64 / self.begin.elapsed().as_secs_f64();
            let left = seconds_text(self.bytes.saturating_sub(done) as f64 / rate.max(1.0));
            let (done, bytes) = (bytes_text(done), bytes_text(self.bytes));
            say!("{name}: {done} of {bytes}, {}/s, ETA {left}", bytes_text(rate as u64));
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if self.done >= self.bytes && self.bytes >= SPOKEN_OF_BYTES {
            say!("fetched {} in {}", bytes_text(self.bytes), seconds_text(self.begin.elapsed().as_secs_f64()));
        }
    }

    fn warning(&mut self, message: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say!("warning: {message}")),
            None => say!("warning: {message}"),
        }
    }
}
