//! kernels/*.cu with nvcc: a compressed fat binary a file, and what each kernel takes of a multiprocessor.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::archs::{self, Archs};
use super::jobs::{self, Job, Log, run_tool, stem};
use super::resources;
use super::toolchain::{self, Nvcc};
use super::watched;

pub struct Card {
    archs: Archs,
    nvcc: Result<Nvcc, String>,
    sources: Vec<PathBuf>,
    jobs: Vec<Job>,
}

pub fn plan(out: &Path, sources: &[PathBuf]) -> Result<Card, String> {
    let wanted = watched("MEGAFUSE_CUDA_ARCHS");
    let archs = archs::parse(wanted.as_deref().unwrap_or(archs::DEFAULT))?;
    let nvcc = toolchain::nvcc();
    let jobs = match &nvcc {
        Ok(nvcc) => plan_jobs(nvcc, &archs, out, sources)?,
        Err(reason) => {
            toolchain::warn(&format!("no kernels for --device cuda in this build: {reason}"));
            vec![]
        }
    };
    Ok(Card { archs, nvcc, sources: sources.to_vec(), jobs })
}

fn plan_jobs(nvcc: &Nvcc, archs: &Archs, out: &Path, sources: &[PathBuf]) -> Result<Vec<Job>, String> {
    check_archs(nvcc, archs)?;
    let mut arguments: Vec<OsString> = ["-std=c++20", "-O3", "-Ikernels", "-fatbin"].map(OsString::from).to_vec();
    // Registers and spills; smaller binaries; only device code is made, so the host compiler's age does not matter.
    arguments.extend(["-Xptxas", "-v", "-Xfatbin", "-compress-all", "-allow-unsupported-compiler"].map(OsString::from));
    arguments.extend(archs.gencode().into_iter().map(OsString::from));
    // nvcc preprocesses with the host's compiler, g++ unless told.
    let host = toolchain::host_compiler();
    let host_version = match &host {
        Ok(host) => {
            arguments.extend(["-ccbin", host.bare()].map(OsString::from));
            host.version.as_str()
        }
        Err(_) => "",
    };
    let identity = format!("{} {host_version}", nvcc.version);
    let job = |source: &PathBuf| Job {
        identity: identity.clone(),
        program: nvcc.program.clone(),
        arguments: arguments.clone(),
        source: source.clone(),
        output: out.join("card").join(stem(source)).with_extension("fatbin"),
    };
    Ok(sources.iter().map(job).collect())
}

/// An architecture that this nvcc does not know is named, with those that it does.
fn check_archs(nvcc: &Nvcc, archs: &Archs) -> Result<(), String> {
    let known = run_tool(Command::new(&nvcc.program).arg("--list-gpu-code"))?;
    let known: Vec<&str> = known.lines().filter_map(|line| line.trim().strip_prefix("sm_")).collect();
    // The list has no variants (90a); those of a known capability are left to nvcc itself.
    let is_known = |arch: &&String| known.contains(&arch.trim_end_matches(['a', 'f']));
    match archs.sass.iter().chain(&archs.ptx).find(|arch| !is_known(arch)) {
        None => Ok(()),
        Some(arch) => Err(format!(
            "MEGAFUSE_CUDA_ARCHS={archs}: {} is version {} and cannot compile for {arch}; it knows {}",
            nvcc.program.display(),
            nvcc.version,
            known.join(", ")
        )),
    }
}

impl Card {
    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Writes kernels.rs and resources.tsv, and returns the latter. A kernel that does not compile is an error.
    pub fn finish(&self, out: &Path, logs: &[Log]) -> Result<String, String> {
        let mut found = Vec::new();
        let mut failed = Vec::new();
        for (source, log) in self.sources.iter().zip(logs) {
            match log {
                Ok(text) => found.extend(resources::parse(text).map_err(|e| format!("{}: {e}", source.display()))?),
                Err(text) => failed.push(format!("{} does not compile for the card:\n{text}", source.display())),
            }
        }
        if !failed.is_empty() {
            return Err(failed.join("\n\n"));
        }
        let table = resources::table(found);
        jobs::write(&out.join("resources.tsv"), table.as_bytes())?;
        jobs::write(&out.join("kernels.rs"), self.rust().as_bytes())?;
        println!("cargo::rustc-env=MEGAFUSE_CUDA_ARCHS={}", self.archs);
        println!("cargo::rustc-env=MEGAFUSE_NVCC={}", self.nvcc.as_ref().map_or("", |nvcc| &nvcc.version));
        Ok(table)
    }

    fn rust(&self) -> String {
        let mut text = String::from(
            "/// The kernels of one .cu file.\n\
             #[derive(Clone, Copy, Debug)]\n\
             pub struct KernelFile {\n    \
                 /// The file's name without its extension.\n    \
                 pub name: &'static str,\n    \
                 /// A fat binary, or a placeholder if not [`BUILT`].\n    \
                 pub image: &'static [u8],\n\
             }\n\n\
             /// Sorted by name.\n\
             pub static KERNELS: &[KernelFile] = &[\n",
        );
        for name in self.sources.iter().map(|source| stem(source)) {
            let image = match self.nvcc {
                Ok(_) => format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/card/{name}.fatbin\"))"),
                Err(_) => "b\"built without nvcc\"".to_owned(),
            };
            let _ = writeln!(text, "    KernelFile {{ name: {name:?}, image: {image} }},");
        }
        let built = self.nvcc.is_ok();
        let _ = writeln!(text, "];\n\n/// The compute capabilities that they are compiled for.");
        let _ = writeln!(text, "pub const ARCHS: &str = {:?};", self.archs.to_string());
        let _ = writeln!(text, "/// Whether there was an nvcc.\npub const BUILT: bool = {built};");
        text
    }
}
