use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A model on the hub: `ORG/NAME`, where wanted with a revision, `ORG/NAME@REVISION`, and with the one file of a repository
/// of single files, `ORG/NAME/FILE.safetensors[@REVISION]`, or `FILE.ckpt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `ORG/NAME`
    pub repository: String,
    /// A branch, a tag, a commit of 40 digits, or `refs/pr/N`. `None`: `main`.
    pub revision: Option<String>,
    pub file: Option<String>,
}

/// What a name looks like, for messages.
const FORM: &str = "ORG/NAME, ORG/NAME@REVISION or ORG/NAME/FILE.safetensors";
/// How a file of weights ends: safetensors, and what `torch.save` writes.
const FILES: [&str; 5] = [".safetensors", ".ckpt", ".pt", ".pth", ".bin"];
/// The hub's limit for ORG/NAME.
const LONGEST: usize = 96;

impl HubName {
    /// `models--ORG--NAME`, the repository's folder in the cache.
    pub(super) fn folder(&self) -> String {
        format!("models--{}", self.repository.replace('/', "--"))
    }

    /// The revision, `main` by default.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The revision where it is a whole commit, which never changes.
    pub fn commit(&self) -> Option<&str> {
        self.revision.as_deref().filter(|revision| is_commit(revision))
    }
}

impl FromStr for HubName {
    type Err = Error;

    fn from_str(text: &str) -> Result<HubName> {
        let refuse = |reason: String| Err(Error::Hub { name: text.into(), reason });
        let (path, revision) = match text.split_once('@') {
            None => (text, None),
            Some((path, revision)) => (path, Some(revision)),
        };
        let parts: Vec<&str> = path.split('/').collect();
        let [org, name, file @ ..] = &parts[..] else {
            return refuse(format!("is no name of a model on the hub; expected {FORM}"));
        };
        let repository = format!("{org}/{name}");
        if !is_word(org) || !is_word(name) || name.ends_with(".git") || repository.len() > LONGEST {
            return refuse(format!(
                "is no name of a model on the hub; expected {FORM}, of letters, digits, '-', '_', '.'"
            ));
        }
        if let Some(revision) = revision.filter(|revision| !is_revision(revision)) {
            return refuse(format!("{revision:?} is no revision; expected a branch, a tag, a commit or refs/pr/N"));
        }
        let file = match file {
            [] => None,
            segments if segments.iter().all(|segment| is_segment(segment)) => Some(segments.join("/")),
            _ => return refuse(format!("is no name of a file on the hub; expected {FORM}")),
        };
        let is_weights = |file: &&String| FILES.iter().any(|end| file.to_ascii_lowercase().ends_with(end));
        if let Some(file) = file.as_ref().filter(|file| !is_weights(file)) {
            return refuse(format!("{file} is no file of weights ({}); expected {FORM}", FILES.join(", ")));
        }
        Ok(HubName { repository, revision: revision.map(String::from), file })
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.repository)?;
        self.file.iter().try_for_each(|file| write!(f, "/{file}"))?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

/// The hub's rules for an organisation and for a name.
fn is_word(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let ends = |c: Option<char>| c.is_some_and(|c| c != '-' && c != '.');
    text.chars().all(plain)
        && ends(text.chars().next())
        && ends(text.chars().last())
        && !text.contains("--")
        && !text.contains("..")
}

/// A revision becomes a path below refs/ and part of an address.
fn is_revision(text: &str) -> bool {
    let segment = |segment: &str| is_segment(segment) && !segment.starts_with('.') && !segment.ends_with(".lock");
    text.len() <= 200 && text.split('/').all(segment)
}

/// One step of a path that stays where it is.
pub(super) fn is_segment(text: &str) -> bool {
    let odd = |c: char| c.is_control() || "\\:?*[~^\"<>|".contains(c);
    !text.is_empty() && text != "." && text != ".." && !text.chars().any(odd)
}

/// 40 hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let of = |text: &str| text.parse::<HubName>().map(|name| (name.repository, name.revision, name.file));
        let some = |text: &str| Some(text.to_string());
        assert_eq!(of("acme/tiny").unwrap(), ("acme/tiny".into(), None, None));
        assert_eq!(of("acme/tiny@refs/pr/7").unwrap(), ("acme/tiny".into(), some("refs/pr/7"), None));
        let file = ("a-b_c/x.1".into(), some("v1.0"), some("sub/m.safetensors"));
        assert_eq!(of("a-b_c/x.1/sub/m.safetensors@v1.0").unwrap(), file);
        for (text, part) in [
            ("tiny", "no name of a model"),
            ("", "no name of a model"),
            ("./tiny", "no name of a model"),
            ("../tiny", "no name of a model"),
            ("~/tiny", "no name of a model"),
            ("/tiny", "no name of a model"),
            ("acme/", "no name of a model"),
            ("acme/ti ny", "no name of a model"),
            ("acme/a--b", "no name of a model"),
            ("acme/tiny.git", "no name of a model"),
            ("C:\\acme/tiny", "no name of a model"),
            ("https://huggingface.co/acme/tiny", "no name of a model"),
            ("acme/tiny@", "\"\" is no revision"),
            ("acme/tiny@../../x", "is no revision"),
            ("acme/tiny@a:b", "is no revision"),
            ("acme/tiny@refs//1", "is no revision"),
            ("acme/tiny/model.gguf", "model.gguf is no file of weights"),
            ("acme/tiny/../x.safetensors", "no name of a file"),
            ("acme/tiny/", "no name of a file"),
        ] {
            let message = text.parse::<HubName>().expect_err(text).to_string();
            assert!(message.contains(part), "{part} for {text} in: {message}");
        }
        assert!(format!("acme/{}", "x".repeat(92)).parse::<HubName>().is_err(), "the hub's limit is 96 letters");
    }

    #[test]
    fn a_name_is_written_as_it_was_read() {
        for text in ["acme/tiny", "acme/tiny@main", "acme/tiny/a/b.safetensors@refs/pr/1", "acme/tiny/a.ckpt"] {
            assert_eq!(text.parse::<HubName>().unwrap().to_string(), text);
        }
    }
}
