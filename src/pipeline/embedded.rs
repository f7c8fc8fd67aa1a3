//! The model that ships inside the program.

use crate::error::{Error, Result};

/// Path inside the model's directory, contents.
#[derive(Clone, Copy)]
pub struct Files(&'static [(&'static str, &'static [u8])]);

impl Files {
    pub fn get(&self, name: &str) -> Option<&'static [u8]> {
        self.0.iter().find(|(path, _)| *path == name).map(|(_, bytes)| *bytes)
    }
}

const FILES: Files = Files(&[]);

pub fn files() -> Result<Files> {
    if FILES.0.is_empty() {
        let reason = "this build has no embedded model; name a model directory with --model";
        return Err(Error::config("embedded model", reason));
    }
    Ok(FILES)
}
