//! Which files hold kernels, and for which cards each is compiled.
//!
//! kernels/*.cu are portable: they are compiled for every architecture that is asked for. A folder of an instruction set
//! below kernels/ has the files that only its cards run; they are compiled for its architecture alone, and are left out of
//! a build that does not make that.

use std::path::{Path, PathBuf};

use super::archs::{self, Archs};
use super::jobs;

/// An instruction set with a folder of its own.
#[derive(Debug, PartialEq)]
pub struct InstructionSet {
    /// Below kernels/.
    pub folder: &'static str,
    /// The architecture that its files are compiled for, as nvcc writes it.
    pub arch: &'static str,
    /// Its name in `Isa` of src/runtime/cuda/isa.rs.
    pub isa: &'static str,
}

/// Every folder with kernels; another instruction set is another line here and in `Isa`.
pub const FOLDERS: [InstructionSet; 1] = [InstructionSet { folder: "sm90", arch: "90a", isa: "Sm90a" }];
/// Folders of sources for readers, which no program contains: docs/kernels.md goes through them, `bench --kernel` and
/// tests/tutorial.rs compile them.
const FOR_READERS: [&str; 1] = ["tutorial"];
/// What the portable files are written for, in `Isa`.
const PORTABLE: &str = "Sm80";

/// The capabilities at which the portable files say something else: 8-bit floats in hardware, launches that overlap. PTX of
/// each of them is what the machine code of all cards up to the next is made from, so that the compiler's front end, half of
/// its work, runs once for them.
const PTX_LEVELS: [u32; 3] = [80, 89, 90];

/// A .cu file.
#[derive(Clone, Debug)]
pub struct Source {
    /// `kernels/sm90/linear.cu`
    pub path: PathBuf,
    /// Below kernels/, without the extension: `linear`, `sm90/linear`.
    pub name: String,
    /// Of a folder of its own; `None`: portable.
    pub set: Option<&'static InstructionSet>,
}

/// Every .cu file below `kernels`, the portable ones first, each kind sorted. One in a folder that nothing compiles is an
/// error.
pub fn find(kernels: &str) -> Result<Vec<Source>, String> {
    let in_folder = |folder: Option<&'static InstructionSet>| {
        let place = folder.map_or(kernels.to_owned(), |set| format!("{kernels}/{}", set.folder));
        if !Path::new(&place).is_dir() {
            return Ok(vec![]);
        }
        let files = jobs::files_with_extension(&place, "cu")?;
        Ok::<_, String>(files.into_iter().map(move |path| Source::new(path, folder)).collect())
    };
    let mut found = in_folder(None)?;
    for set in &FOLDERS {
        found.extend(in_folder(Some(set))?);
    }
    for folder in jobs::folders(kernels)? {
        if FOLDERS.iter().any(|set| folder.ends_with(set.folder))
            || FOR_READERS.iter().any(|name| folder.ends_with(name))
        {
            continue;
        }
        if let Some(stray) = jobs::files_with_extension(&folder.to_string_lossy(), "cu")?.first() {
            let known = FOLDERS.map(|set| set.folder).join(", ");
            return Err(format!(
                "{}: nothing compiles this folder; kernels for every card lie in {kernels}, those of one instruction set \
                 in a folder that build/sources.rs lists ({known})",
                stray.display()
            ));
        }
    }
    Ok(found)
}

impl Source {
    fn new(path: PathBuf, set: Option<&'static InstructionSet>) -> Source {
        let stem = jobs::stem(&path);
        let name = set.map_or(stem.clone(), |set| format!("{}/{stem}", set.folder));
        Source { path, name, set }
    }

    /// Its instruction set's name in `Isa`.
    pub fn isa(&self) -> &'static str {
        self.set.map_or(PORTABLE, |set| set.isa)
    }

    /// From which PTX the machine code for `arch` is made.
    pub fn ptx_for(&self, arch: &str) -> String {
        let level = |number: u32| PTX_LEVELS.into_iter().rfind(|&level| level <= number);
        match self.set {
            None => level(archs::number(arch)).map_or(arch.to_owned(), |level| level.to_string()),
            Some(_) => arch.to_owned(),
        }
    }

    /// For which of the architectures it is compiled. Nothing, where the only one that it is for is not asked for.
    pub fn archs(&self, wanted: &Archs) -> Archs {
        let own = |archs: &[String]| match self.set {
            None => archs.to_vec(),
            Some(set) => archs.iter().filter(|arch| *arch == set.arch).cloned().collect(),
        };
        Archs { sass: own(&wanted.sass), ptx: own(&wanted.ptx) }
    }
}
