//! `MEGAFUSE_CUDA_ARCHS`: the cards that kernels are compiled for.

use std::fmt;

pub const DEFAULT: &str = "80,90a";
/// PTX that is added where none is named: the driver of any later card compiles it at load.
const DEFAULT_PTX: &str = "ptx80";
/// cp.async and mma with bf16 begin here.
const OLDEST: u32 = 80;

/// Compute capabilities as nvcc writes them: `80`, `90a`.
#[derive(Debug, PartialEq)]
pub struct Archs {
    /// Machine code.
    pub sass: Vec<String>,
    /// PTX only.
    pub ptx: Vec<String>,
}

/// A comma-separated list of compute capabilities, `ptxNN` for PTX; PTX of 80 is added where the list names none.
pub fn parse(text: &str) -> Result<Archs, String> {
    let mut archs = Archs { sass: vec![], ptx: vec![] };
    for entry in text.split(',').map(str::trim) {
        let (list, capability) = match entry.strip_prefix("ptx") {
            Some(capability) => (&mut archs.ptx, capability),
            None => (&mut archs.sass, entry),
        };
        check(capability).map_err(|reason| {
            format!("MEGAFUSE_CUDA_ARCHS=\"{text}\": \"{entry}\" {reason}; write for example {DEFAULT} or 80,90a,ptx80")
        })?;
        if list.iter().any(|known| known == capability) {
            return Err(format!("MEGAFUSE_CUDA_ARCHS=\"{text}\": \"{entry}\" is named twice"));
        }
        list.push(capability.to_owned());
    }
    if archs.ptx.is_empty() {
        archs.ptx.push(DEFAULT_PTX["ptx".len()..].to_owned());
    }
    Ok(archs)
}

/// `90a` -> 90
pub fn number(capability: &str) -> u32 {
    capability.trim_end_matches(['a', 'f']).parse().expect("capabilities were checked when they were read")
}

fn check(capability: &str) -> Result<(), String> {
    let digits = capability.trim_end_matches(['a', 'f']);
    if capability.len() > digits.len() + 1 || digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err("is not a compute capability".into());
    }
    let number: u32 = digits.parse().map_err(|_| "is not a compute capability".to_string())?;
    if number < OLDEST {
        return Err(format!("is older than {OLDEST} (Ampere), the first that the kernels run on"));
    }
    Ok(())
}

impl Archs {
    /// Whether nothing is made.
    pub fn is_empty(&self) -> bool {
        self.sass.is_empty() && self.ptx.is_empty()
    }

    /// Every capability once, whether machine code, PTX or both are made for it.
    pub fn all(&self) -> Vec<&str> {
        let only_ptx = self.ptx.iter().filter(|arch| !self.sass.contains(arch));
        self.sass.iter().chain(only_ptx).map(String::as_str).collect()
    }
}

/// `80,90a,ptx80`, which `parse` reads back.
impl fmt::Display for Archs {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let ptx = self.ptx.iter().map(|arch| format!("ptx{arch}"));
        let all: Vec<String> = self.sass.iter().cloned().chain(ptx).collect();
        f.write_str(&all.join(","))
    }
}
