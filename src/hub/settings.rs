use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};

/// Where the hub and its local cache are, and how patient a run is with them.
#[derive(Clone)]
pub struct HubSettings {
    /// The folder that holds `models--ORG--NAME`.
    pub cache: PathBuf,
    /// `https://huggingface.co`, or a mirror; without a slash at its end.
    pub endpoint: String,
    /// Sent to the endpoint and to nobody else.
    pub token: Option<String>,
    /// Certificates in PEM that are trusted in place of the usual authorities: those of a proxy that reads along.
    pub certificates: Option<PathBuf>,
    /// Nothing is asked of the network.
    pub offline: bool,
    /// How long another process that holds a lock may make no progress.
    pub lock_patience: Duration,
    /// Before the first further attempt after a broken connection; it doubles from attempt to attempt.
    pub retry_delay: Duration,
}

impl std::fmt::Debug for HubSettings {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "(secret)");
        let mut fields = f.debug_struct("HubSettings");
        fields.field("cache", &self.cache).field("endpoint", &self.endpoint).field("token", &token);
        fields.field("offline", &self.offline).finish_non_exhaustive()
    }
}

impl HubSettings {
    /// As the hub's own programs read the environment: `HF_HUB_CACHE` (also `HUGGINGFACE_HUB_CACHE`), else `hub` in
    /// `HF_HOME`, else in `huggingface` of `XDG_CACHE_HOME` or `~/.cache`; `HF_ENDPOINT`; `HF_TOKEN`, else the file
    /// `HF_TOKEN_PATH`, else `token` in `HF_HOME`, unless `HF_HUB_DISABLE_IMPLICIT_TOKEN`; `HF_HUB_OFFLINE` (also
    /// `TRANSFORMERS_OFFLINE`); `REQUESTS_CA_BUNDLE`, else `SSL_CERT_FILE`. The proxy's variables (`HTTPS_PROXY`, `NO_PROXY`)
    /// hold too.
    ///
    /// # Errors
    /// [`Error::Hub`], naming the variable: no home folder and no variable in its place, an endpoint that is no address, a
    /// token that no header can carry. [`Error::Io`]: the token's file cannot be read.
    pub fn from_env() -> Result<HubSettings> {
        HubSettings::from_variables(|name| std::env::var_os(name), std::env::home_dir().as_deref())
    }

    fn from_variables(get: impl Fn(&str) -> Option<OsString>, home: Option<&Path>) -> Result<HubSettings> {
        let set = |names: &[&str]| names.iter().find_map(|name| get(name).filter(|value| !value.is_empty()));
        let path = |names: &[&str]| set(names).map(|value| at_home(value.into(), home));
        let is_true = |names: &[&str]| {
            let value = set(names).map(|value| value.to_string_lossy().to_ascii_uppercase());
            value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str()))
        };
        let cache_home = || path(&["XDG_CACHE_HOME"]).or_else(|| Some(home?.join(".cache")));
        let hf_home = path(&["HF_HOME"]).or_else(|| Some(cache_home()?.join("huggingface")));
        let cache = path(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).or_else(|| Some(hf_home.as_ref()?.join("hub")));
        let cache = cache.ok_or_else(|| {
            wrong("HF_HUB_CACHE", "is not set, and there is no home folder: name a folder for the hub's cache")
        })?;
        let endpoint = match set(&["HF_ENDPOINT"]) {
            None => "https://huggingface.co".to_string(),
            Some(value) => value.to_string_lossy().trim_end_matches('/').to_string(),
        };
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(wrong("HF_ENDPOINT", format!("is {endpoint:?}, expected https://HOST")));
        }
        let token_file = path(&["HF_TOKEN_PATH"]).or_else(|| Some(hf_home.as_ref()?.join("token")));
        let token = match set(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]) {
            Some(value) => Some(("HF_TOKEN".to_string(), value.to_string_lossy().into_owned())),
            None if is_true(&["HF_HUB_DISABLE_IMPLICIT_TOKEN"]) => None,
            None => match token_file {
                None => None,
                Some(path) => match std::fs::read_to_string(&path) {
                    Ok(text) => Some((path.display().to_string(), text)),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                    Err(error) => return Err(Error::io(&path, error)),
                },
            },
        };
        let token = match token.map(|(place, text)| (place, text.trim().to_string())) {
            Some((_, token)) if token.is_empty() => None,
            Some((place, token)) if !token.bytes().all(|byte| byte.is_ascii_graphic()) => {
                return Err(wrong(&place, "holds characters that no token has: log in again (hf auth login)"));
            }
            other => other.map(|(_, token)| token),
        };
        let offline = is_true(&["HF_HUB_OFFLINE"]) || is_true(&["TRANSFORMERS_OFFLINE"]);
        let (lock_patience, retry_delay) = (Duration::from_secs(60), Duration::from_millis(500));
        let certificates = path(&["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"]).filter(|path| !path.is_dir());
        Ok(HubSettings { cache, endpoint, token, certificates, offline, lock_patience, retry_delay })
    }
}

fn wrong(name: &str, reason: impl Into<String>) -> Error {
    Error::Hub { name: name.into(), reason: reason.into() }
}

fn at_home(path: PathBuf, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<HubSettings> {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        HubSettings::from_variables(get, Some(Path::new("/nobody")))
    }

    #[test]
    fn the_cache_is_where_the_variables_say() {
        for (variables, cache) in [
            (&[][..], "/nobody/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/x")], "/nobody/hf/hub"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HOME", "/h")], "/old"),
            (&[("HF_HUB_CACHE", "/new"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/new"),
            (&[("HF_HUB_CACHE", ""), ("HF_HOME", "/h")], "/h/hub"),
        ] {
            assert_eq!(settings(variables).unwrap().cache, Path::new(cache), "{variables:?}");
        }
        let none = HubSettings::from_variables(|_| None, None).unwrap_err().to_string();
        assert!(none.contains("HF_HUB_CACHE"), "{none}");
    }

    #[test]
    fn endpoint_offline_and_token() {
        assert_eq!(settings(&[]).unwrap().endpoint, "https://huggingface.co");
        assert_eq!(settings(&[("HF_ENDPOINT", "http://mirror:80/")]).unwrap().endpoint, "http://mirror:80");
        let message = settings(&[("HF_ENDPOINT", "mirror")]).unwrap_err().to_string();
        assert!(message.contains("HF_ENDPOINT: is \"mirror\""), "{message}");
        for (value, offline) in [("1", true), ("true", true), ("Yes", true), ("0", false), ("", false), ("no", false)] {
            assert_eq!(settings(&[("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
        }

        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        std::fs::write(folder.path().join("token"), " hf_file\n").unwrap();
        let token = |more: &[(&str, &str)]| settings(&[&[("HF_HOME", home)], more].concat()).unwrap().token;
        assert_eq!(token(&[]).as_deref(), Some("hf_file"));
        assert_eq!(token(&[("HF_TOKEN", "hf_env")]).as_deref(), Some("hf_env"));
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        let message = settings(&[("HF_TOKEN", "hf\n secret")]).unwrap_err().to_string();
        assert!(message.contains("HF_TOKEN") && !message.contains("secret"), "{message}");
        let shown = format!("{:?}", settings(&[("HF_TOKEN", "hf_env")]).unwrap());
        assert!(!shown.contains("hf_env"), "{shown}");
    }
}
