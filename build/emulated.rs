//! The emulated card: the kernels, those of one instruction set too, and kernels/emu/{machine,driver}/*.cpp with the host's
//! C++ compiler, as libraries with the face of the driver's libcuda.so.1. In a build for tests there are three: `plain`,
//! `race`, which reports unordered accesses to shared memory, and `sanitize`, under the address and undefined behaviour
//! sanitizers.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::jobs::{self, Job, Log, run_tool, stem};
use super::sources::Source;
use super::toolchain::{self, HostCompiler};
use super::variable;

/// One of the libraries.
struct Variant {
    name: &'static str,
    flags: &'static [&'static str],
    kernel_flags: &'static [&'static str],
    link_flags: &'static [&'static str],
}

/// -ffp-contract=off: a product and a sum are rounded apart unless a kernel says fmaf, on every host alike.
/// -fno-strict-aliasing: kernels read and write through pointers to wider types, as they may under nvcc.
const FLAGS: [&str; 5] = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Ikernels"];
/// The name under which cudarc first asks for the driver, so that the loader finds this library when it is loaded already.
const LINK_FLAGS: [&str; 4] = ["-shared", "-Wl,-soname,libcuda.so", "-lpthread", "-ldl"];
const PLAIN: Variant =
    Variant { name: "plain", flags: &["-O2", "-g0"], kernel_flags: &[], link_flags: &["-Wl,-z,defs"] };
const FOR_TESTS: [Variant; 2] = [
    Variant {
        name: "race",
        flags: &["-O1", "-g1", "-DEMU_RACE"],
        // The compiler calls a hook at every access; the emulator has the hooks, not the thread sanitizer's library.
        kernel_flags: &["-fsanitize=thread"],
        link_flags: &["-Wl,-z,defs"],
    },
    Variant {
        name: "sanitize",
        flags: &["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
        kernel_flags: &[],
        link_flags: &["-fsanitize=address,undefined"],
    },
];

pub struct Emulated {
    compiler: Result<HostCompiler, String>,
    variants: Vec<(Variant, usize)>,
    jobs: Vec<Job>,
}

pub fn plan(out: &Path, kernels: &[Source], for_tests: bool) -> Result<Emulated, String> {
    let compiler = compiler_for_target();
    let mut emulated = Emulated { compiler, variants: vec![], jobs: vec![] };
    let Ok(compiler) = &emulated.compiler else { return Ok(emulated) };
    let named = |folder| -> Result<Vec<(PathBuf, String)>, String> {
        let files = jobs::files_with_extension(folder, "cpp")?;
        Ok(files.into_iter().map(|path| (path.clone(), stem(&path))).collect())
    };
    let kernels: Vec<_> = kernels.iter().map(|source| (source.path.clone(), source.name.clone())).collect();
    let machine = named("kernels/emu/machine")?;
    let driver = named("kernels/emu/driver")?;
    let variants = [PLAIN].into_iter().chain(FOR_TESTS.into_iter().filter(|_| for_tests));
    for variant in variants {
        let folder = out.join("emu-objects").join(variant.name);
        let before = emulated.jobs.len();
        // A kernel and a part of the emulator may have the same name, so each kind has its folder.
        let kinds = [(&kernels, "kernels", variant.kernel_flags), (&machine, "machine", &[]), (&driver, "driver", &[])];
        for (sources, kind, extra) in kinds {
            let mut arguments: Vec<OsString> = compiler.arguments.iter().map(OsString::from).collect();
            arguments.extend(FLAGS.iter().chain(variant.flags).chain(extra).map(OsString::from));
            arguments.extend(["-x", "c++", "-c"].map(OsString::from));
            emulated.jobs.extend(sources.iter().map(|(source, name)| Job {
                identity: compiler.version.clone(),
                program: compiler.program.clone(),
                arguments: arguments.clone(),
                source: source.clone(),
                output: folder.join(kind).join(name).with_extension("o"),
                steps: vec![],
            }));
        }
        emulated.variants.push((variant, emulated.jobs.len() - before));
    }
    Ok(emulated)
}

/// The emulated card runs on the machine that builds it, and is loaded the way Linux loads the driver.
fn compiler_for_target() -> Result<HostCompiler, String> {
    let (host, target) = (variable("HOST"), variable("TARGET"));
    if variable("CARGO_CFG_TARGET_OS").as_deref() != Some("linux") {
        return Err("only on Linux".into());
    }
    if host != target {
        let [host, target] = [host, target].map(Option::unwrap_or_default);
        return Err(format!("not in a build for {target} on {host}"));
    }
    toolchain::host_compiler()
}

impl Emulated {
    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Links the libraries, each with `resources` beside it, and tells the crate where they are.
    pub fn finish(&self, out: &Path, logs: &[Log], resources: &str) -> Result<(), String> {
        let folder = out.join("emu");
        let note = match &self.compiler {
            Ok(compiler) => match self.link(compiler, &folder, logs, resources) {
                Ok(()) => Ok(format!("built with {}", compiler.version)),
                // A compiler that cannot do the language at all is like none; otherwise the mistake is ours.
                Err(message) => match probe(compiler, out) {
                    Ok(_) => return Err(message),
                    Err(_) => Err(format!("{} cannot compile C++20; install g++ 12 or newer", compiler.version)),
                },
            },
            Err(reason) => Err(reason.clone()),
        };
        let place = if note.is_ok() { folder.display().to_string() } else { String::new() };
        println!("cargo::rustc-env=MEGAFUSE_EMU_DIR={place}");
        println!("cargo::rustc-env=MEGAFUSE_EMU_NOTE={}", note.as_ref().unwrap_or_else(|reason| reason));
        if let Err(reason) = note {
            let _ = fs::remove_dir_all(&folder);
            toolchain::warn(&format!("no emulated card in this build: {reason}"));
        }
        Ok(())
    }

    fn link(&self, compiler: &HostCompiler, folder: &Path, logs: &[Log], resources: &str) -> Result<(), String> {
        let failed: Vec<String> = self
            .jobs
            .iter()
            .zip(logs)
            .filter_map(|(job, log)| {
                let text = log.as_ref().err()?;
                Some(format!("{} does not compile for the emulated card:\n{text}", job.source.display()))
            })
            .collect();
        if !failed.is_empty() {
            return Err(failed.join("\n\n"));
        }
        toolchain::pass_on_warnings(logs);
        let mut commands = String::new();
        let mut jobs = &self.jobs[..];
        for (variant, count) in &self.variants {
            let (own, rest) = jobs.split_at(*count);
            jobs = rest;
            self.describe(variant, own, &mut commands);
            let folder = folder.join(variant.name);
            fs::create_dir_all(&folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
            // Under another name first: a running test may have the old library loaded.
            let (fresh, library) = (folder.join("libcuda.so.1.new"), folder.join("libcuda.so.1"));
            let mut command = Command::new(&compiler.program);
            command.args(&compiler.arguments).arg("-o").arg(&fresh).args(own.iter().map(|job| &job.output));
            command.args(LINK_FLAGS).args(variant.link_flags);
            run_tool(&mut command)?;
            fs::rename(&fresh, &library).map_err(|error| format!("cannot write {}: {error}", library.display()))?;
            // Under the name that a program linked with it looks for. The build script itself may be built elsewhere.
            #[cfg(unix)]
            {
                let alias = folder.join("libcuda.so");
                if !alias.exists() {
                    let made = std::os::unix::fs::symlink("libcuda.so.1", &alias);
                    made.map_err(|error| format!("cannot make {}: {error}", alias.display()))?;
                }
            }
            jobs::write(&folder.join("resources.tsv"), resources.as_bytes())?;
        }
        jobs::write(&folder.join("commands.tsv"), commands.as_bytes())
    }

    /// For tools/mutate, which builds a library with one kernel file changed: how each object and the library are made,
    /// as `compile variant source object program arguments...` and `link variant program arguments...`.
    fn describe(&self, variant: &Variant, jobs: &[Job], commands: &mut String) {
        let mut line = |start: &[&OsStr], arguments: &[OsString]| {
            let fields = start.iter().copied().chain(arguments.iter().map(OsString::as_os_str));
            let fields: Vec<_> = fields.map(|field| field.to_string_lossy()).collect();
            *commands += &(fields.join("\t") + "\n");
        };
        let name = OsStr::new(variant.name);
        for Job { source, output, program, arguments, .. } in jobs {
            let start = [OsStr::new("compile"), name, source.as_os_str(), output.as_os_str(), program.as_os_str()];
            line(&start, arguments);
        }
        if let Some(job) = jobs.first() {
            let flags = LINK_FLAGS.iter().chain(variant.link_flags).map(OsString::from);
            line(&[OsStr::new("link"), name, job.program.as_os_str()], &flags.collect::<Vec<_>>());
        }
    }
}

/// Whether the compiler knows the language of the kernels.
fn probe(compiler: &HostCompiler, out: &Path) -> Log {
    let source = out.join("probe.cpp");
    jobs::write(&source, b"#include <bit>\nint main() { return std::bit_cast<int>(0.f); }\n")?;
    let mut command = Command::new(&compiler.program);
    command.args(&compiler.arguments).args(FLAGS).arg("-fsyntax-only").arg(&source);
    run_tool(&mut command)
}
