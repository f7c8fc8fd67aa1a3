//! What a kernel takes of a multiprocessor, from what `ptxas -v` says while compiling.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// One kernel on one architecture.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resources {
    pub arch: String,
    pub kernel: String,
    pub registers: u32,
    pub static_shared_bytes: u32,
    pub spill_store_bytes: u32,
    pub spill_load_bytes: u32,
    pub stack_bytes: u32,
}

/// A line of resources.tsv.
impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Resources { arch, kernel, registers, static_shared_bytes, .. } = self;
        let Resources { spill_store_bytes, spill_load_bytes, stack_bytes, .. } = self;
        write!(f, "{arch}\t{kernel}\t{registers}\t{static_shared_bytes}\t")?;
        write!(f, "{spill_store_bytes}\t{spill_load_bytes}\t{stack_bytes}")
    }
}

/// The kernels in the output of `nvcc -Xptxas -v`. Each has three parts, which nothing else may interrupt:
///
/// ```text
/// ptxas info    : Compiling entry function 'add_bf16' for 'sm_80'
/// ptxas info    : Function properties for add_bf16
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 10 registers, used 0 barriers, 384 bytes smem, 376 bytes cmem[0]
/// ```
pub fn parse(text: &str) -> Result<Vec<Resources>, String> {
    let mut found = Vec::new();
    let mut entry: Option<(String, String)> = None;
    let mut memory: Option<[u32; 3]> = None;
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            if let Some((kernel, _)) = &entry {
                return Err(format!("ptxas -v: no registers of {kernel} before the next kernel"));
            }
            let (kernel, rest) = rest.split_once("' for 'sm_").ok_or_else(|| unread(line))?;
            let (arch, _) = rest.split_once('\'').ok_or_else(|| unread(line))?;
            entry = Some((kernel.to_owned(), arch.to_owned()));
            memory = None;
        } else if line.contains(" bytes stack frame") {
            // Also printed for device functions that were not inlined; those come before the entry's own line.
            let mut amounts = line.split(',').map(|part| part.split_whitespace().next()?.parse::<u32>().ok());
            let [Some(Some(stack)), Some(Some(stores)), Some(Some(loads))] = [(); 3].map(|()| amounts.next()) else {
                return Err(unread(line));
            };
            memory = Some([stack, stores, loads]);
        } else if let Some((_, used)) = line.split_once(": Used ") {
            let (arch_kernel, [stack, stores, loads]) = match (entry.take(), memory.take()) {
                (Some(entry), Some(memory)) => (entry, memory),
                _ => return Err(format!("ptxas -v: registers of an unnamed kernel: {line}")),
            };
            let amount = |unit: &str| {
                let part = used.split(',').map(str::trim).find(|part| part.ends_with(unit))?;
                part.split_whitespace().next()?.parse::<u32>().ok()
            };
            found.push(Resources {
                kernel: arch_kernel.0,
                arch: arch_kernel.1,
                registers: amount(" registers").ok_or_else(|| unread(line))?,
                static_shared_bytes: amount(" bytes smem").unwrap_or(0),
                spill_store_bytes: stores,
                spill_load_bytes: loads,
                stack_bytes: stack,
            });
        }
    }
    match entry {
        Some((kernel, arch)) => Err(format!("ptxas -v: the output ends before the registers of {kernel} on {arch}")),
        None => Ok(found),
    }
}

/// What ptxas says of code that runs, but at a fraction of the speed that it was written for: wgmma one after the other
/// (C7510, C7512), setmaxnreg left out (C7508). The words are those of all such notes, the numbers are in case they change.
const SLOWED_DOWN: [&str; 4] = ["Potential Performance Loss", "(C7508)", "(C7510)", "(C7512)"];

/// What makes kernels much slower than they are written to be, a message each: registers spilled to memory, and what ptxas
/// says it could not do as asked.
pub fn slowed_down(text: &str, kernels: &[Resources]) -> Vec<String> {
    let notes = text.lines().filter(|line| SLOWED_DOWN.iter().any(|note| line.contains(note)));
    let spills = kernels.iter().filter(|kernel| kernel.spill_store_bytes + kernel.spill_load_bytes > 0).map(|kernel| {
        let Resources { arch, kernel, registers, spill_store_bytes, spill_load_bytes, .. } = kernel;
        format!(
            "{kernel} for {arch} has {registers} registers and spills: {spill_store_bytes} bytes stored, \
             {spill_load_bytes} loaded"
        )
    });
    notes.map(|line| line.trim().to_owned()).chain(spills).collect()
}

/// A kernel's name that two files use: the program finds kernels by name alone.
pub fn name_twice(found: &[(&Path, Resources)]) -> Option<String> {
    let mut files: BTreeMap<&str, &Path> = BTreeMap::new();
    found.iter().find_map(|(file, Resources { kernel, .. })| {
        let first = *files.entry(kernel).or_insert(file);
        (first != *file).then(|| format!("{kernel} is in {} and in {}", first.display(), file.display()))
    })
}

fn unread(line: &str) -> String {
    format!("ptxas -v: cannot read {line:?}")
}

/// resources.tsv: a line a kernel, sorted.
pub fn table(mut resources: Vec<Resources>) -> String {
    resources.sort();
    resources.iter().map(|line| format!("{line}\n")).collect()
}
