//! The folder of a run over a manifest: what made it, what is there already, and who else is writing into it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use megafuse::image::read_png_text;
use megafuse::{Error, Result};
use serde_json::Value;

use super::manifest::Line;
use super::output;

/// Says what made the pictures beside it. No picture is called so: those end in .png.
const DESCRIPTION: &str = "run.json";

/// A folder that fits the run; nothing in it has been touched.
pub struct RunFolder {
    path: PathBuf,
    description: Value,
    /// Names of all pictures that are there.
    pictures: HashSet<String>,
}

/// What the file of a picture holds.
pub enum Found {
    /// The picture of its line, whole.
    Picture,
    /// Half a file or none of ours: to be made again.
    Damaged,
}

impl RunFolder {
    /// Looks, and writes nothing.
    ///
    /// # Errors
    /// [`Error::File`]: the place is a file, cannot be written or has no parent folder; it has something in it already,
    /// without `resume`; with it, what is there was made with other parameters, which are named with both values.
    pub fn inspect(path: &Path, description: Value, resume: bool) -> Result<RunFolder> {
        let mut folder = RunFolder { path: path.to_path_buf(), description, pictures: HashSet::new() };
        if fs::symlink_metadata(path).is_err() {
            output::check_folder(path)?;
            return Ok(folder);
        }
        if !path.is_dir() {
            return Err(Error::file(path, "is a file; --manifest writes into a folder of its own, name another"));
        }
        output::check_writable(&path.join(DESCRIPTION))?;
        let mut others = Vec::new();
        for entry in fs::read_dir(path).map_err(|error| Error::io(path, error))? {
            let name = entry.map_err(|error| Error::io(path, error))?.file_name().to_string_lossy().into_owned();
            match name.ends_with(".png") {
                true => drop(folder.pictures.insert(name)),
                false if output::is_part(&name) => {}
                false => others.push(name),
            }
        }
        if folder.pictures.is_empty() && others.is_empty() {
            return Ok(folder);
        }
        if !resume {
            let count = folder.pictures.len() + others.len();
            let reason = format!(
                "is not empty ({count} files); name another folder, or --resume to make what is missing in this one"
            );
            return Err(Error::file(path, reason));
        }
        if !folder.is_described()? {
            let reason =
                format!("has files but no {DESCRIPTION}, so no run over a manifest made it; name another folder");
            return Err(Error::file(path, reason));
        }
        Ok(folder)
    }

    /// Is a description there? Then it is this run's.
    fn is_described(&self) -> Result<bool> {
        let path = self.path.join(DESCRIPTION);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::io(&path, error)),
        };
        let found: Value =
            serde_json::from_str(&text).map_err(|error| Error::file(&path, format!("not JSON: {error}")))?;
        let differences = differences(&found, &self.description);
        if differences.is_empty() {
            return Ok(true);
        }
        let reason = format!("these pictures were made otherwise: {}; name another folder", differences.join(", "));
        Err(Error::file(&path, reason))
    }

    /// Pictures that no line makes: then the folder is another manifest's. `wanted`: those that lines make.
    ///
    /// # Errors
    /// [`Error::File`] naming one of them.
    pub fn check_names(&self, wanted: HashSet<String>) -> Result<()> {
        match self.pictures.iter().filter(|name| !wanted.contains(*name)).min() {
            None => Ok(()),
            Some(name) => Err(Error::file(
                &self.path.join(name),
                "no line of the manifest makes this picture; name another folder, or move the picture away",
            )),
        }
    }

    /// Is there a picture of this name?
    pub fn has(&self, name: &str) -> bool {
        self.pictures.contains(name)
    }

    /// What the file for `line` holds, whose picture says `parameters` about itself.
    ///
    /// # Errors
    /// [`Error::File`]: a picture of something else, naming the first parameter that differs.
    pub fn find(&self, line: &Line, parameters: &Value) -> Result<Found> {
        let path = self.picture(line);
        let text = match read_png_text(&path, "megafuse") {
            Err(Error::File { .. }) => return Ok(Found::Damaged),
            other => other?,
        };
        let found = text.and_then(|text| serde_json::from_str::<Value>(&text).ok()).unwrap_or_default();
        let mut differences = differences(&found, parameters);
        // Which card of several made it; and what is known only once it is made.
        differences.retain(|difference| !["device ", "cache_computed "].iter().any(|of| difference.starts_with(of)));
        if found.is_object() && differences.is_empty() {
            return Ok(Found::Picture);
        }
        let what = if found.is_object() { differences.join(", ") } else { "it is not from this program".into() };
        let reason =
            format!("is not the picture of line {}: {what}; name another folder, or move it away", line.number);
        Err(Error::file(&path, reason))
    }

    pub fn picture(&self, line: &Line) -> PathBuf {
        self.path.join(line.file_name())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder and its description, where they are not there, and removes what an ended run left half-written.
    /// The result is to be kept as long as the run writes.
    ///
    /// # Errors
    /// As [`inspect`](RunFolder::inspect), when another run came first; those of [`output::replace`].
    pub fn begin(&self) -> Result<Writing> {
        match fs::create_dir(&self.path) {
            // Another part of the run may have been faster.
            Err(error) if !self.path.is_dir() => return Err(Error::io(&self.path, error)),
            _ => {}
        }
        let writing = Writing::begin(&self.path);
        if !self.is_described()? {
            output::replace_unnamed(&self.path.join(DESCRIPTION), format!("{:#}\n", self.description).as_bytes())?;
        }
        Ok(writing)
    }
}

/// `guidance 3, now 5` for every key whose value differs.
fn differences(found: &Value, wanted: &Value) -> Vec<String> {
    // Through text, as what was found: reading a number may change its last bit.
    let wanted: Value = serde_json::from_str(&wanted.to_string()).unwrap_or_default();
    let empty = serde_json::Map::new();
    let (found, wanted) = (found.as_object().unwrap_or(&empty), wanted.as_object().unwrap_or(&empty));
    let new = found.keys().filter(|key| !wanted.contains_key(*key));
    let keys = wanted.keys().chain(new).filter(|key| found.get(*key) != wanted.get(*key));
    let text = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "none".to_string(),
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(value) => value.to_string(),
    };
    keys.map(|key| format!("{key} {}, now {}", text(found.get(key)), text(wanted.get(key)))).collect()
}

/// A run writes into the folder: others that ask know it from a lock on the folder, which the system takes away with the
/// process, however it ends. Where the system cannot lock a folder, nobody asks.
pub struct Writing {
    /// Locked as long as it is open.
    _folder: Option<File>,
    /// Another run is writing into the folder too.
    pub shared: bool,
}

impl Writing {
    fn begin(path: &Path) -> Writing {
        let Ok(folder) = File::open(path) else { return Writing { _folder: None, shared: false } };
        let alone = match folder.try_lock() {
            Ok(()) => Some(true),
            Err(fs::TryLockError::WouldBlock) => Some(false),
            Err(fs::TryLockError::Error(_)) => None,
        };
        if alone == Some(true) {
            // Nobody's file is in the making: what looks like one was left by a run that was killed.
            output::remove_parts(path);
            drop(folder.unlock());
        }
        // Readers of a lock share it: so many runs can say that they are there. This waits for one that removes files, so
        // that it does not take ours for a dead run's.
        let locked = alone.is_some() && folder.lock_shared().is_ok();
        Writing { _folder: locked.then_some(folder), shared: alone == Some(false) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn differing_values_are_named_with_both() {
        let found = json!({"size": "64x64", "guidance": 3.0, "old": true, "same": [1]});
        let wanted = json!({"size": null, "guidance": 5.0, "same": [1], "seed": 0});
        let want = ["size 64x64, now none", "guidance 3.0, now 5.0", "seed none, now 0", "old true, now none"];
        assert_eq!(differences(&found, &wanted), want);
        assert!(differences(&wanted, &wanted).is_empty());
    }

    #[test]
    fn what_a_killed_run_left_is_removed_by_the_next_that_is_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pictures");
        let begin = |description| RunFolder::inspect(&path, description, true)?.begin();
        let parts = || fs::read_dir(&path).unwrap().filter(|e| e.as_ref().unwrap().file_name() != DESCRIPTION).count();
        let first = begin(json!({"seed": 0})).unwrap();
        assert!(!first.shared);
        let part = path.join(".megafuse-abc.part");
        fs::write(&part, "half").unwrap();
        let second = begin(json!({"seed": 0})).unwrap();
        assert!(second.shared);
        assert_eq!(parts(), 1, "it may be the first run's");
        drop((first, second));
        assert!(!begin(json!({"seed": 0})).unwrap().shared);
        assert_eq!(parts(), 0);

        let error = begin(json!({"seed": 1})).err().unwrap().to_string();
        assert!(error.contains("run.json") && error.contains("seed 0, now 1"), "{error}");
        let error = RunFolder::inspect(&path, json!({"seed": 0}), false).err().unwrap().to_string();
        assert!(error.contains("--resume"), "{error}");
    }
}
