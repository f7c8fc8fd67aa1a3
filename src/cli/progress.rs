//! Progress on standard error: a bar per stage on a terminal, else a line per stage and every ten seconds.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use megafuse::Result;
use megafuse::image::{PngText, encode_png, to_bytes};
use megafuse::pipeline::{Event, Observer, Parameters, Pipeline, Request, StepProgress};

use super::console::say;
use super::flags;
use super::output::{self, Target};
use super::safetensors_file::Array;

/// Which intermediate tensors a run's files need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// Those that are pictures, for `--strip`.
    Pictures,
    /// All, for `--dump`.
    All,
}

/// Shows where a run stands and collects the tensors of `--dump` and `--strip`.
pub struct Progress {
    bar: Option<ProgressBar>,
    terminal: bool,
    stage: String,
    stage_begin: Instant,
    last_line: Instant,
    keep: Keep,
    /// The intermediate tensors of each picture by name, those that are wanted.
    pub tensors: Vec<BTreeMap<String, Array>>,
    /// Of each picture.
    phases: Vec<PhaseFiles>,
}

/// Where the pictures of a picture's phases go, and what their text says.
pub struct PhaseFiles {
    targets: Vec<Target>,
    /// None where no phase is wanted.
    parameters: Option<Parameters>,
}

impl PhaseFiles {
    /// # Errors
    /// As [`Pipeline::parameters`].
    pub fn new(pipeline: &Pipeline, request: &Request, targets: &[Target]) -> Result<PhaseFiles> {
        let parameters = (!targets.is_empty()).then(|| pipeline.parameters(request)).transpose()?;
        Ok(PhaseFiles { targets: targets.to_vec(), parameters })
    }

    /// Writes the picture of `phase` (from 1), if it is wanted; returns where it went.
    ///
    /// # Errors
    /// As [`Target::write`].
    fn write(&self, phase: usize, [height, width]: [usize; 2], values: &[f32]) -> Result<Option<PathBuf>> {
        let target = phase.checked_sub(1).and_then(|at| self.targets.get(at));
        let (Some(target), Some(parameters)) = (target, &self.parameters) else { return Ok(None) };
        let text = PngText { parameters: &parameters.text, json: &parameters.json.to_string() };
        target.write(&encode_png(&to_bytes(values)?, width, height, text)?).map(Some)
    }
}

const LINE_INTERVAL: Duration = Duration::from_secs(10);

impl Progress {
    pub fn new(keep: Keep) -> Progress {
        Progress {
            bar: None,
            terminal: std::io::stderr().is_terminal(),
            stage: String::new(),
            stage_begin: Instant::now(),
            last_line: Instant::now(),
            keep,
            tensors: Vec::new(),
            phases: Vec::new(),
        }
    }

    /// Pictures of phases are written here as they come, of each picture of the batch.
    pub fn with_phases(mut self, phases: Vec<PhaseFiles>) -> Progress {
        self.phases = phases;
        self
    }

    /// One line above whatever is being drawn.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say!("{text}")),
            None => say!("{text}"),
        }
    }

    fn insert(&mut self, index: usize, name: &str, array: Array) {
        if self.tensors.len() <= index {
            self.tensors.resize_with(index + 1, BTreeMap::new);
        }
        self.tensors[index].insert(name.to_string(), array);
    }

    fn begin(&mut self, stage: String, steps: usize) {
        self.finish();
        self.stage = stage;
        self.stage_begin = Instant::now();
        self.last_line = Instant::now();
        if self.terminal {
            let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
            // At most 80 columns, the usual terminal.
            let style = "{prefix:22} {bar:16} {pos}/{len}  {msg}  {elapsed}  ETA {eta}";
            bar.set_style(ProgressStyle::with_template(style).expect("a fixed template"));
            bar.set_prefix(self.stage.clone());
            bar.enable_steady_tick(Duration::from_millis(200));
            self.bar = Some(bar);
        } else {
            say!("{}: {}", self.stage, steps_text(steps));
        }
    }

    fn step(&mut self, at: &StepProgress) {
        let seconds = self.stage_begin.elapsed().as_secs_f64();
        let rate = at.step as f64 / seconds.max(1e-9);
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{rate:.*} steps/s", if rate < 1.0 { 3 } else { 2 }));
            bar.set_position(at.step as u64);
        } else if at.step == at.stage_steps {
            say!("{}: {} in {}, {}", self.stage, steps_text(at.step), seconds_text(seconds), rate_text(rate));
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            let left = seconds_text((at.stage_steps - at.step) as f64 / rate);
            say!("{}: {}/{} steps, {}, ETA {left}", self.stage, at.step, at.stage_steps, rate_text(rate));
        }
    }

    /// Leaves the stage's last state on the terminal.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
    }
}

impl Observer for Progress {
    fn event(&mut self, event: &Event) {
        match event {
            Event::StageBegins { stage, stages, size, steps, parts } => {
                self.begin(format!("stage {}/{stages} {size}{parts}", stage + 1), *steps);
            }
            Event::Step(at) => self.step(at),
            Event::Cached(computed) => self.line(&format!("{computed} evaluations by the network")),
            Event::Upscale { size } => self.line(&format!("upscaling to {size}")),
            Event::PictureEnds { .. } => self.finish(),
            _ => {}
        }
    }

    fn warning(&mut self, message: &str) {
        self.line(&format!("warning: {}", flags::named(message)));
    }

    fn wants_tensors(&self, _index: usize) -> bool {
        self.keep != Keep::Nothing
    }

    fn tensor(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        let picture = name.ends_with(".decoded") || name.ends_with(".upsampled");
        if self.keep == Keep::All || self.keep == Keep::Pictures && picture {
            self.insert(index, name, Array::f32(shape, values));
        }
        Ok(())
    }

    fn integers(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<i64>) -> Result<()> {
        if self.keep == Keep::All {
            self.insert(index, name, Array::i64(shape, values));
        }
        Ok(())
    }

    fn phase(&mut self, index: usize, phase: usize, size: [usize; 2], values: Vec<f32>) -> Result<()> {
        let Some(files) = self.phases.get(index) else { return Ok(()) };
        if let Some(path) = files.write(phase, size, &values)? {
            self.line(&format!("phase {phase}: {}x{}", size[1], size[0]));
            output::print_name(&path);
        }
        Ok(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Where a run of many pictures stands: a bar on a terminal, else a line every ten seconds.
pub struct PicturesProgress {
    bar: Option<ProgressBar>,
    begin: Instant,
    last_line: Instant,
    count: usize,
    done: usize,
    /// What all pictures cost together, and those that are done: the remaining time is worked out from these.
    cost: u64,
    cost_done: u64,
    /// What the picture in the making is called.
    name: String,
    warnings: usize,
    /// Of each picture in the making.
    phases: Vec<PhaseFiles>,
}

/// Further warnings are counted: ten thousand prompts may all be too long.
const MOST_WARNINGS: usize = 5;

impl PicturesProgress {
    /// `cost`: of all pictures together, in any unit.
    pub fn new(count: usize, cost: u64) -> PicturesProgress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(count as u64), ProgressDrawTarget::stderr());
            let style = "{bar:20} {pos}/{len}  {prefix}  {elapsed}  {msg}";
            bar.set_style(ProgressStyle::with_template(style).expect("a fixed template"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        if bar.is_none() {
            say!("{count} pictures");
        }
        let now = Instant::now();
        let (done, cost_done, name, warnings, phases) = (0, 0, String::new(), 0, Vec::new());
        PicturesProgress { bar, begin: now, last_line: now, count, done, cost, cost_done, name, warnings, phases }
    }

    /// A picture begins, or a batch of them, whose phases' pictures go to these places.
    pub fn picture(&mut self, name: String, phases: Vec<PhaseFiles>) {
        self.name = name;
        self.phases = phases;
    }

    /// It is done, or has failed; `cost`: its own.
    pub fn picture_done(&mut self, cost: u64) {
        self.done += 1;
        self.cost_done += cost;
        let share = self.cost_done as f64 / self.cost.max(1) as f64;
        let left = self.begin.elapsed().as_secs_f64() * (1.0 / share.max(1e-9) - 1.0).max(0.0);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done as u64);
            bar.set_prefix(format!("{}, ETA {}", self.rate_text(), seconds_text(left)));
        } else if self.last_line.elapsed() >= LINE_INTERVAL && self.done < self.count {
            self.last_line = Instant::now();
            say!("{}/{} pictures, {}, ETA {}", self.done, self.count, self.rate_text(), seconds_text(left));
        }
    }

    /// Pictures done, those that failed included.
    pub fn done(&self) -> usize {
        self.done
    }

    /// `1.25 pictures/s`, or below one the other way round: `4.0 s/picture`.
    pub fn rate_text(&self) -> String {
        let rate = self.done as f64 / self.begin.elapsed().as_secs_f64().max(1e-9);
        if rate >= 1.0 { format!("{rate:.2} pictures/s") } else { format!("{:.1} s/picture", 1.0 / rate.max(1e-9)) }
    }

    /// One line above whatever is being drawn.
    pub fn line(&self, text: &str) {
        self.suspend(|| say!("{text}"));
    }

    /// Prints without the bar in the way.
    pub fn suspend(&self, print: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Leaves the last state on the terminal.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
        if self.warnings > MOST_WARNINGS {
            say!("{} further warnings of this kind", self.warnings - MOST_WARNINGS);
            self.warnings = 0;
        }
    }
}

impl Observer for PicturesProgress {
    fn event(&mut self, event: &Event) {
        let Some(bar) = &self.bar else { return };
        if let Event::Step(at) = event {
            bar.set_message(format!("step {}/{}", at.run_step, at.run_steps));
        }
    }

    fn warning(&mut self, message: &str) {
        self.warnings += 1;
        if self.warnings <= MOST_WARNINGS {
            self.line(&format!("warning: {}: {}", self.name, flags::named(message)));
        }
    }

    fn phase(&mut self, index: usize, phase: usize, size: [usize; 2], values: Vec<f32>) -> Result<()> {
        let Some(files) = self.phases.get(index) else { return Ok(()) };
        if let Some(path) = files.write(phase, size, &values)? {
            self.suspend(|| output::print_name(&path));
        }
        Ok(())
    }
}

impl Drop for PicturesProgress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// `1 step`, `2 steps`
fn steps_text(steps: usize) -> String {
    format!("{steps} step{}", if steps == 1 { "" } else { "s" })
}

/// `3.21 steps/s`, or below one the other way round: `4.0 s/step`.
fn rate_text(steps_per_second: f64) -> String {
    if steps_per_second >= 1.0 {
        format!("{steps_per_second:.2} steps/s")
    } else {
        format!("{steps_per_second:.3} steps/s ({:.1} s/step)", 1.0 / steps_per_second)
    }
}

/// `0.43 s`, `12.3 s`, `4:05 min`, `1:02:03 h`.
pub fn seconds_text(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{s:.2} s"),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{}:{:02} min", s as u64 / 60, s as u64 % 60),
        s => format!("{}:{:02}:{:02} h", s as u64 / 3600, s as u64 / 60 % 60, s as u64 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        assert_eq!(seconds_text(0.431), "0.43 s");
        assert_eq!(seconds_text(12.34), "12.3 s");
        assert_eq!(seconds_text(245.0), "4:05 min");
        assert_eq!(seconds_text(3723.0), "1:02:03 h");
        assert_eq!([1, 2].map(steps_text), ["1 step", "2 steps"]);
        assert_eq!(rate_text(3.214), "3.21 steps/s");
        assert_eq!(rate_text(0.25), "0.250 steps/s (4.0 s/step)");
    }
}
