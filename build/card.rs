//! The kernels with nvcc: a compressed fat binary a file, and what each kernel takes of a multiprocessor.
//!
//! Every file is compiled to PTX, once for all architectures for which that is the same ([`Source::ptx_for`]), and that to machine
//! code for each. One call of nvcc for all would do it for each architecture, one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::archs::{self, Archs};
use super::jobs::{self, Job, Log, Step, run_tool};
use super::ptx;
use super::resources::{self, Resources};
use super::sources::Source;
use super::toolchain::{self, Nvcc};
use super::watched;

/// From this compute capability on a launch may begin before the one before it has ended.
const FIRST_WITH_OVERLAP: u32 = 90;

pub struct Card {
    archs: Archs,
    nvcc: Result<Nvcc, String>,
    sources: Vec<Source>,
    jobs: Vec<Job>,
}

pub fn plan(out: &Path, sources: &[Source]) -> Result<Card, String> {
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

fn plan_jobs(nvcc: &Nvcc, archs: &Archs, out: &Path, sources: &[Source]) -> Result<Vec<Job>, String> {
    check_archs(nvcc, archs)?;
    // nvcc preprocesses with the host's compiler, g++ unless told. It makes device code only, so the age of the host's
    // compiler does not matter.
    let mut options: Vec<OsString> = ["-O3", "-allow-unsupported-compiler"].map(OsString::from).to_vec();
    let mut identity = nvcc.version.clone();
    if let Ok(host) = toolchain::host_compiler() {
        options.extend(["-ccbin", host.bare()].map(OsString::from));
        identity = format!("{identity} {}", host.version);
    }
    let mut jobs = Vec::new();
    for (source, ptx, machine_code) in sources.iter().flat_map(|source| compilations(source, archs)) {
        let arguments = |extra: &[&str]| options.iter().cloned().chain(extra.iter().map(OsString::from)).collect();
        let step = |arch: &String| Step {
            arguments: arguments(&["-cubin", &format!("-arch=sm_{arch}"), "-Xptxas", "-v"]),
            output: image(out, source, arch, "cubin"),
        };
        jobs.push(Job {
            identity: identity.clone(),
            program: nvcc.program.clone(),
            arguments: arguments(&["-std=c++20", "-Ikernels", "-ptx", &format!("-arch=compute_{ptx}")]),
            source: source.path.clone(),
            output: image(out, source, &ptx, "ptx"),
            steps: machine_code.iter().map(step).collect(),
        });
    }
    Ok(jobs)
}

/// A source with each PTX of it and the architectures whose machine code is made from that.
fn compilations<'a>(source: &'a Source, wanted: &Archs) -> Vec<(&'a Source, String, Vec<String>)> {
    let archs = source.archs(wanted);
    let of = |ptx: String| {
        let from_it = archs.sass.iter().filter(|arch| source.ptx_for(arch) == ptx).cloned().collect();
        (source, ptx, from_it)
    };
    ptx_of(source, &archs).into_iter().map(of).collect()
}

/// Every PTX that is made of a source: what machine code is made from, and what is asked for.
fn ptx_of(source: &Source, archs: &Archs) -> BTreeSet<String> {
    archs.sass.iter().map(|arch| source.ptx_for(arch)).chain(archs.ptx.iter().cloned()).collect()
}

/// OUT_DIR/card/90a/norm.cubin, OUT_DIR/card/90a/sm90/linear.cubin
fn image(out: &Path, source: &Source, arch: &str, kind: &str) -> PathBuf {
    out.join("card").join(arch).join(&source.name).with_extension(kind)
}

/// OUT_DIR/card/norm.fatbin
fn fat_binary(out: &Path, source: &Source) -> PathBuf {
    out.join("card").join(&source.name).with_extension("fatbin")
}

/// An architecture that this nvcc does not know is named, with those that it does.
fn check_archs(nvcc: &Nvcc, archs: &Archs) -> Result<(), String> {
    let known = run_tool(Command::new(&nvcc.program).arg("--list-gpu-code"))?;
    let known: Vec<&str> = known.lines().filter_map(|line| line.trim().strip_prefix("sm_")).collect();
    // The list has no variants (90a); those of a known capability are left to nvcc itself.
    let is_known = |arch: &&str| known.contains(&arch.trim_end_matches(['a', 'f']));
    match archs.all().into_iter().find(|arch| !is_known(arch)) {
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

    /// Writes kernels.rs and resources.tsv, and returns the latter. A kernel that does not compile, or not as it was
    /// written, is an error.
    pub fn finish(&self, out: &Path, logs: &[Log]) -> Result<String, String> {
        let mut found: Vec<(&Path, Resources)> = Vec::new();
        let mut failed = Vec::new();
        for (job, log) in self.jobs.iter().zip(logs) {
            let source = job.source.display();
            match log {
                Ok(text) => {
                    let kernels = resources::parse(text).map_err(|error| format!("{source}: {error}"))?;
                    let slow = resources::slowed_down(text, &kernels);
                    failed.extend(slow.into_iter().map(|reason| format!("{source} would be slow: {reason}")));
                    found.extend(kernels.into_iter().map(|kernel| (&*job.source, kernel)));
                }
                Err(text) => failed.push(format!("{source} does not compile for the card:\n{text}")),
            }
        }
        failed.extend(resources::name_twice(&found));
        if !failed.is_empty() {
            return Err(failed.join("\n\n"));
        }
        toolchain::pass_on_warnings(logs);
        if let Ok(nvcc) = &self.nvcc {
            self.compiled().try_for_each(|source| self.bind(nvcc, out, source))?;
        }
        let table = resources::table(found.into_iter().map(|(_, kernel)| kernel).collect());
        jobs::write(&out.join("resources.tsv"), table.as_bytes())?;
        jobs::write(&out.join("kernels.rs"), self.rust(out)?.as_bytes())?;
        let program = self.nvcc.as_ref().map_or("".into(), |nvcc| nvcc.program.display().to_string());
        jobs::write(&out.join("nvcc"), program.as_bytes())?;
        println!("cargo::rustc-env=MEGAFUSE_CUDA_ARCHS={}", self.archs);
        println!("cargo::rustc-env=MEGAFUSE_NVCC={}", self.nvcc.as_ref().map_or("", |nvcc| &nvcc.version));
        Ok(table)
    }

    /// The sources that there is an architecture for.
    fn compiled(&self) -> impl Iterator<Item = &Source> {
        self.sources.iter().filter(|source| !source.archs(&self.archs).is_empty())
    }

    /// One fat binary of a file's images.
    fn bind(&self, nvcc: &Nvcc, out: &Path, source: &Source) -> Result<(), String> {
        let mut fat = OsString::from("--create=");
        let file = fat_binary(out, source);
        let folder = file.parent().expect("a file lies in a folder");
        std::fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
        fat.push(file);
        let mut command = Command::new(nvcc.beside("fatbinary"));
        command.arg(fat).args(["-64", "-compress-all"]);
        let archs = source.archs(&self.archs);
        for (kind, extension, archs) in [("elf", "cubin", &archs.sass), ("ptx", "ptx", &archs.ptx)] {
            for arch in archs {
                let mut spec = OsString::from(format!("--image3=kind={kind},sm={arch},file="));
                spec.push(image(out, source, arch, extension));
                command.arg(spec);
            }
        }
        run_tool(&mut command).map(drop)
    }

    /// How many parameters each kernel of a file has. All its PTX must say the same; and where launches may overlap, that it
    /// waits for the one before it.
    fn parameters(&self, out: &Path, source: &Source) -> Result<BTreeMap<String, usize>, String> {
        let mut found = BTreeMap::new();
        if self.nvcc.is_err() {
            return Ok(found);
        }
        for arch in ptx_of(source, &source.archs(&self.archs)) {
            let ptx = image(out, source, &arch, "ptx");
            let text = std::fs::read_to_string(&ptx).map_err(|error| format!("{}: {error}", ptx.display()))?;
            for (entry, kernel) in ptx::entries(&text).map_err(|error| format!("{}: {error}", ptx.display()))? {
                if !kernel.waits && archs::number(&arch) >= FIRST_WITH_OVERLAP {
                    return Err(format!(
                        "{}: {entry} for {arch} does not wait for the launch before it; begin it with follow_previous() \
                         (kernels/common/device.cuh)",
                        source.path.display()
                    ));
                }
                let count = kernel.parameters;
                match found.insert(entry.clone(), count) {
                    Some(other) if other != count => {
                        return Err(format!("{}: {entry} has {count} parameters, elsewhere {other}", ptx.display()));
                    }
                    _ => {}
                }
            }
        }
        Ok(found)
    }

    fn rust(&self, out: &Path) -> Result<String, String> {
        let mut text = String::from(
            "/// The kernels of one .cu file.\n\
             #[derive(Clone, Copy, Debug)]\n\
             pub struct KernelFile {\n    \
                 /// The file's path below kernels/ without its extension: `linear`, `sm90/linear`.\n    \
                 pub name: &'static str,\n    \
                 /// What a card must be able to do to run them.\n    \
                 pub isa: Isa,\n    \
                 /// A fat binary, or a placeholder if not [`BUILT`]; `None`: no architecture of this build runs them.\n    \
                 pub image: Option<&'static [u8]>,\n    \
                 /// Kernels and how many parameters each has, sorted by name; nothing if not [`BUILT`].\n    \
                 pub parameters: &'static [(&'static str, usize)],\n\
             }\n\n\
             /// The portable ones first, each kind sorted by name.\n\
             pub static KERNELS: &[KernelFile] = &[\n",
        );
        let mut images = String::new();
        for source in &self.sources {
            let (name, isa) = (&source.name, source.isa());
            let image = match self.nvcc {
                Ok(_) if source.archs(&self.archs).is_empty() => "None".to_owned(),
                Ok(_) => {
                    let (symbol, item) = embedded(name, &fat_binary(out, source))?;
                    images += &item;
                    // SAFETY, of the generated code: the symbol has as many bytes, which nothing writes.
                    format!("Some(unsafe {{ &{symbol} }})")
                }
                Err(_) => "Some(b\"built without nvcc\")".to_owned(),
            };
            let parameters: Vec<(String, usize)> = self.parameters(out, source)?.into_iter().collect();
            let _ = writeln!(
                text,
                "    KernelFile {{ name: {name:?}, isa: Isa::{isa}, image: {image}, parameters: &{parameters:?} }},"
            );
        }
        let built = self.nvcc.is_ok();
        let _ = writeln!(text, "];\n\n/// Whether there was an nvcc.\npub const BUILT: bool = {built};");
        text += &images;
        Ok(text)
    }
}

/// A file as a symbol that the assembler puts into the program, and the Rust that says so. The compiler does not see the
/// bytes: as `include_bytes!` megabytes of them go through its optimiser after every change of a kernel. Nor does it see that
/// they change, so their hash is part of the text.
fn embedded(name: &str, file: &Path) -> Result<(String, String), String> {
    let bytes = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let path = file.to_str().ok_or_else(|| format!("{} is not UTF-8", file.display()))?;
    let path = path.replace('\\', "\\\\").replace('"', "\\\"");
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let (length, hash) = (bytes.len(), hasher.finish());
    let symbol = format!("MEGAFUSE_KERNELS_{}", name.replace(|c: char| !c.is_ascii_alphanumeric(), "_").to_uppercase());
    let lines = [
        "    .pushsection .rodata.megafuse_kernels, \"a\", %progbits".to_owned(),
        "    .balign 16".to_owned(),
        format!("    .globl {symbol}"),
        format!("{symbol}:"),
        format!("    .incbin \"{path}\""),
        "    .popsection".to_owned(),
    ];
    let mut item = format!("\nstd::arch::global_asm!(\n    \"/* {hash:016x} */\",\n");
    for line in lines {
        let _ = writeln!(item, "    {line:?},");
    }
    let _ = write!(item, "    options(raw),\n);\nunsafe extern \"C\" {{\n    static {symbol}: [u8; {length}];\n}}\n");
    Ok((symbol, item))
}
