//! Where the compilers are.

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::jobs::{Log, run_tool};
use super::{variable, watched};

/// The host's C++ compiler: `CXX`, which may carry arguments or a launcher (`ccache g++`), else what the PATH has.
pub struct HostCompiler {
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// The first line of `--version`.
    pub version: String,
}

pub fn host_compiler() -> Result<HostCompiler, String> {
    if is_lint() {
        return Err(LINT.into());
    }
    let candidates = match watched("CXX") {
        Some(command) => vec![command],
        None => ["c++", "g++", "clang++"].map(String::from).to_vec(),
    };
    for command in &candidates {
        let mut words = command.split_whitespace().map(String::from);
        let Some(program) = words.next().and_then(|program| find(&program)) else { continue };
        let arguments: Vec<String> = words.collect();
        let version = run_tool(Command::new(&program).args(&arguments).arg("--version"))
            .map_err(|_| format!("{command} --version fails; set CXX to a C++ compiler"))?;
        let version = version.lines().next().unwrap_or_default().trim().to_owned();
        return Ok(HostCompiler { program, arguments, version });
    }
    Err(format!("no C++ compiler found (looked for {}); install g++ 12 or newer", candidates.join(", ")))
}

impl HostCompiler {
    /// The compiler itself, without a launcher before it.
    pub fn bare(&self) -> &str {
        match self.arguments.iter().rev().find(|argument| !argument.starts_with('-')) {
            Some(last) => last,
            None => self.program.to_str().unwrap_or("c++"),
        }
    }
}

const LINT: &str = "not for clippy";

pub struct Nvcc {
    pub program: PathBuf,
    /// `13.0.88`
    pub version: String,
}

impl Nvcc {
    /// Another program of the toolkit: in nvcc's folder, also where `program` is a link; else in the PATH.
    pub fn beside(&self, name: &str) -> PathBuf {
        let real = self.program.canonicalize().unwrap_or_else(|_| self.program.clone());
        let beside =
            [&self.program, &real].map(|nvcc| nvcc.with_file_name(name)).into_iter().find(|path| path.is_file());
        beside.unwrap_or_else(|| name.into())
    }
}

/// Older ones know neither C++20 nor sm_90a.
const OLDEST_NVCC: [u32; 2] = [12, 0];
/// The oldest that knows every card of a release.
const COMPLETE_NVCC: [u32; 2] = [12, 8];

/// Under clippy, which compiles the crate beside the normal build and needs no kernels to do so, there are no compilers:
/// kernels would be built twice.
pub fn is_lint() -> bool {
    let wrapper = variable("RUSTC_WORKSPACE_WRAPPER");
    wrapper.is_some_and(|wrapper| Path::new(&wrapper).file_stem().is_some_and(|name| name == "clippy-driver"))
}

/// `NVCC` (`none`: build without), `CUDA_HOME`, `CUDA_PATH`, the PATH, /usr/local/cuda, the environment of tools/nvcc.
/// `Err` says why there is none.
pub fn nvcc() -> Result<Nvcc, String> {
    if is_lint() {
        return Err(LINT.into());
    }
    let wanted = watched("NVCC");
    let mut candidates = Vec::new();
    match wanted.as_deref() {
        Some("none") => return Err("left out: NVCC=none".into()),
        Some(command) => candidates.push(find(command).ok_or(format!("NVCC={command} is not there"))?),
        None => {
            let homes = ["CUDA_HOME", "CUDA_PATH"].map(|name| watched(name).map(PathBuf::from));
            candidates.extend(homes.into_iter().flatten().map(|home| home.join("bin/nvcc")));
            candidates.extend(find("nvcc"));
            candidates.push("/usr/local/cuda/bin/nvcc".into());
            candidates.extend(environment_of_tools_nvcc());
        }
    }
    let mut reasons = Vec::new();
    for program in candidates.into_iter().filter(|program| program.is_file()) {
        println!("cargo::rerun-if-changed={}", program.display());
        match nvcc_version(&program) {
            Ok((number, version)) if number >= OLDEST_NVCC => {
                if number < COMPLETE_NVCC {
                    let [major, minor] = COMPLETE_NVCC;
                    warn(&format!(
                        "{} is version {version}, older than {major}.{minor}: it cannot compile for cards from sm_100a \
                         on; tools/nvcc installs 13.0",
                        program.display()
                    ));
                }
                return Ok(Nvcc { program, version });
            }
            Ok((_, version)) => {
                let [major, minor] = OLDEST_NVCC;
                reasons.push(format!("{} is version {version}, older than {major}.{minor}", program.display()));
            }
            Err(reason) => reasons.push(reason),
        }
    }
    reasons.push("no usable nvcc found; run tools/nvcc, which installs one, and build again".into());
    Err(reasons.join("; "))
}

fn nvcc_version(program: &Path) -> Result<([u32; 2], String), String> {
    let text = run_tool(Command::new(program).arg("--version"))
        .map_err(|_| format!("{} --version fails", program.display()))?;
    parse_nvcc_version(&text).ok_or_else(|| format!("{} --version printed {text:?}", program.display()))
}

/// `... release 13.0, V13.0.88` -> `[13, 0]` and `13.0.88`
pub fn parse_nvcc_version(text: &str) -> Option<([u32; 2], String)> {
    let (_, rest) = text.split_once("release ")?;
    let (_, version) = rest.split_once('V')?;
    let version = version.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    Some(([numbers.next()??, numbers.next()??], version.to_owned()))
}

/// nvcc in the virtual environment that tools/nvcc makes, whichever Python made it.
fn environment_of_tools_nvcc() -> Option<PathBuf> {
    let environment = watched("MEGAFUSE_NVCC_VENV").map(PathBuf::from).or_else(|| {
        let cache = watched("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(Path::new(&variable("HOME")?).join(".cache")))?;
        Some(cache.join("megafuse/nvcc-13.0"))
    })?;
    let pythons = std::fs::read_dir(environment.join("lib")).ok()?.flatten();
    let mut found = pythons.map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    found.find(|nvcc| nvcc.is_file())
}

/// A program by its path, or by its name in the PATH.
fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(|path| path.is_file());
    }
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// What compilers warned of, each line once, though a source is compiled several times.
pub fn pass_on_warnings(logs: &[Log]) {
    let lines = logs.iter().flatten().flat_map(|log| log.lines());
    for line in lines.filter(|line| line.contains("warning")).collect::<BTreeSet<_>>() {
        warn(line);
    }
}

pub fn warn(message: &str) {
    if is_lint() {
        return;
    }
    for line in message.lines() {
        println!("cargo::warning={line}");
    }
}
