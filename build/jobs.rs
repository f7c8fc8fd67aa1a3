//! Compilations: several at a time, and only those whose source, includes or command have changed.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::SystemTime;

use super::depfile;

/// One compilation of one file, and what is made of its output. The options for output and dependencies are added to the arguments.
pub struct Job {
    /// What the compiler calls itself; a new version compiles everything again.
    pub identity: String,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub source: PathBuf,
    /// Beside it lie `.d` (what the compiler read), `.log` (what it printed) and `.key` (the hash of all of it).
    pub output: PathBuf,
    /// Make further files from `output`.
    pub steps: Vec<Step>,
}

pub struct Step {
    pub arguments: Vec<OsString>,
    pub output: PathBuf,
}

/// What the compiler printed, in this run or in the one that made the file.
pub type Log = Result<String, String>;

/// The logs of all jobs, in their order; a failed one does not stop the others, so that one build shows all mistakes.
pub fn run<'a>(jobs: impl Iterator<Item = &'a Job>) -> Result<Vec<Log>, String> {
    let jobs: Vec<&Job> = jobs.collect();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let wanted = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(cores);
    let hashes = Hashes::default();
    let stale: Vec<usize> = (0..jobs.len()).filter(|&i| jobs[i].is_stale(&hashes)).collect();

    let next = AtomicUsize::new(0);
    let failures: Mutex<HashMap<usize, String>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..wanted.clamp(1, cores).min(stale.len()) {
            scope.spawn(|| {
                while let Some(&index) = stale.get(next.fetch_add(1, Relaxed)) {
                    if let Err(message) = jobs[index].compile() {
                        failures.lock().expect("no thread panics while it holds this").insert(index, message);
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().expect("no thread panics while it holds this");
    jobs.iter()
        .enumerate()
        .map(|(index, job)| match failures.remove(&index) {
            Some(message) => Ok(Err(message)),
            None => read(&job.beside("log")).map(Ok),
        })
        .collect()
}

impl Job {
    fn beside(&self, extension: &str) -> PathBuf {
        self.output.with_extension(extension)
    }

    fn is_stale(&self, hashes: &Hashes) -> bool {
        let log = self.beside("log");
        let mut outputs = self.steps.iter().map(|step| &step.output).chain([&self.output, &log]);
        let key = fs::read_to_string(self.beside("key")).ok();
        !outputs.all(|path| path.is_file()) || key.is_none() || key != self.key(hashes)
    }

    /// The hash of the command and of every file that the last compilation read; `None` if there was none, or if a file
    /// is gone.
    fn key(&self, hashes: &Hashes) -> Option<String> {
        let read_files = depfile::parse(&fs::read_to_string(self.beside("d")).ok()?).ok()?;
        let mut hasher = DefaultHasher::new();
        let steps: Vec<_> = self.steps.iter().map(|step| &step.arguments).collect();
        (&self.identity, &self.program, &self.arguments, steps).hash(&mut hasher);
        for file in &read_files {
            (file, hashes.of(Path::new(file))?).hash(&mut hasher);
        }
        Some(format!("{:016x}", hasher.finish()))
    }

    fn compile(&self) -> Result<(), String> {
        let started = SystemTime::now();
        make_folder(&self.output)?;
        // Until the key is there again, the output counts as missing.
        let _ = fs::remove_file(self.beside("key"));
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg("-MD").arg("-MF").arg(self.beside("d"));
        command.arg("-o").arg(&self.output).arg(&self.source);
        let mut log = run_tool(&mut command)?;
        for step in &self.steps {
            make_folder(&step.output)?;
            let mut command = Command::new(&self.program);
            command.args(&step.arguments).arg("-o").arg(&step.output).arg(&self.output);
            log += &run_tool(&mut command)?;
        }
        write(&self.beside("log"), log.as_bytes())?;

        let hashes = Hashes::default();
        let key = self.key(&hashes).ok_or_else(|| {
            format!("{} left no readable list of what it read for {}", self.program.display(), self.source.display())
        })?;
        // A file saved while the compiler ran may or may not be in the output: compile again next time.
        if hashes.newest() <= Some(started) { write(&self.beside("key"), key.as_bytes()) } else { Ok(()) }
    }
}

/// The folder of an output.
fn make_folder(output: &Path) -> Result<(), String> {
    let folder = output.parent().expect("an output lies in a folder");
    fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))
}

/// What the tool prints, stdout and stderr; as an error, with the command, where it fails.
pub fn run_tool(command: &mut Command) -> Log {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("cannot run {program}: {error}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    Err(format!("{program} {}\n{text}{}", arguments.join(" "), output.status))
}

/// File hashes, each file read once: hundreds of headers are shared by all sources.
#[derive(Default)]
struct Hashes(Mutex<HashMap<PathBuf, Option<(u64, SystemTime)>>>);

impl Hashes {
    fn of(&self, path: &Path) -> Option<u64> {
        let mut known = self.0.lock().expect("no thread panics while it holds this");
        let entry = known.entry(path.to_owned()).or_insert_with(|| {
            let mut hasher = DefaultHasher::new();
            fs::read(path).ok()?.hash(&mut hasher);
            Some((hasher.finish(), fs::metadata(path).ok()?.modified().ok()?))
        });
        entry.map(|(hash, _)| hash)
    }

    fn newest(&self) -> Option<SystemTime> {
        let known = self.0.lock().expect("no thread panics while it holds this");
        known.values().flatten().map(|&(_, modified)| modified).max()
    }
}

/// The files of a folder with this extension, sorted.
pub fn files_with_extension(folder: &str, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("cannot read {folder}: {error}"))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| format!("cannot read {folder}: {error}"))?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The folders in a folder, sorted.
pub fn folders(folder: &str) -> Result<Vec<PathBuf>, String> {
    let cannot_read = |error| format!("cannot read {folder}: {error}");
    let entries = fs::read_dir(folder).map_err(cannot_read)?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(cannot_read));
    let mut found =
        paths.filter(|path| path.as_ref().map_or(true, |path| path.is_dir())).collect::<Result<Vec<_>, _>>()?;
    found.sort();
    Ok(found)
}

/// `kernels/norm.cu` -> `norm`.
pub fn stem(source: &Path) -> String {
    source.file_stem().expect("a source file has a name").to_string_lossy().into_owned()
}

pub fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

pub fn write(path: &Path, contents: &[u8]) -> Result<(), String> {
    fs::write(path, contents).map_err(|error| format!("cannot write {}: {error}", path.display()))
}
