//! Shared by the tests of the program from outside: it runs in a folder of its own.
#![allow(dead_code)] // each test binary uses a part

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A small random model of the SD 1.x family, native size 32x32, two pixels a latent cell.
pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/sd15");

pub struct Place {
    folder: tempfile::TempDir,
    always: &'static [&'static str],
}

impl Place {
    pub fn new() -> Place {
        Place::with(&[])
    }

    /// Every run has `always` after its own arguments.
    pub fn with(always: &'static [&'static str]) -> Place {
        Place { folder: tempfile::tempdir().expect("a temporary folder"), always }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
        command.args(args).args(self.always).current_dir(self.folder.path()).env("RAYON_NUM_THREADS", "2");
        // No test asks the real hub, or reads what this machine has of it.
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.folder.path().join("hf"));
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH"] {
            command.env_remove(name);
        }
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the program starts")
    }

    /// Standard output of a run that must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The message of a run that must fail with this status and write nothing.
    pub fn fails(&self, status: i32, args: &[&str]) -> String {
        let before = self.names();
        let output = self.run(args);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {message}");
        assert!(!message.contains("panicked"), "{args:?}: {message}");
        assert_eq!(self.names(), before, "{args:?} left something");
        message
    }

    pub fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.folder.path()).expect("the folder is there");
        entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect()
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

/// Copies a model's folder, without the values that other tests compare with.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display())) {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name");
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else if !name.to_string_lossy().starts_with("oracle") {
            fs::copy(&path, to.join(name)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
}

/// The same with one key of a configuration changed.
pub fn copy_changed(from: &Path, to: &Path, file: &str, key: &str, value: serde_json::Value) {
    copy(from, to);
    let path = to.join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config[key] = value;
    fs::write(&path, config.to_string()).expect("a file");
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
