use std::io::Read;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use ureq::http::{Response, StatusCode};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::cache::is_inside;
use super::name::is_commit;
use super::{Failure, HubName, HubSettings};
use crate::error::{Error, Result};

/// Speaks to the hub about one model.
pub(crate) struct Client {
    agent: Agent,
    name: HubName,
    endpoint: String,
    token: Option<String>,
    retry_delay: Duration,
}

/// What a revision of a repository holds.
#[derive(Debug)]
pub(crate) struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

/// A file on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// In the repository, with slashes.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// What it is called in blobs/.
    pub id: String,
    /// Is `id` the SHA-256 of its bytes?
    pub is_sha256: bool,
}

impl Listing {
    pub fn file(&self, path: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|file| file.path == path)
    }

    pub fn has(&self, path: &str) -> bool {
        self.file(path).is_some()
    }
}

/// Attempts after the first, each after a longer pause.
pub(super) const FURTHER_ATTEMPTS: u32 = 3;
const MOST_REDIRECTS: usize = 10;
/// The list of a repository with a hundred thousand files is shorter.
const LONGEST_LISTING_BYTES: u64 = 64 << 20;
/// A connection on which nothing arrives for so long is broken.
const SILENCE: Duration = Duration::from_secs(30);

impl Client {
    /// # Errors
    /// [`Error::File`]: the file of certificates has none.
    pub fn new(name: &HubName, settings: &HubSettings) -> Result<Client> {
        let roots = settings.certificates.as_deref().map_or(Ok(RootCerts::WebPki), certificates)?;
        let config = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .http_status_as_error(false)
            .max_redirects(0) // followed here, where it is known who may see the token
            .max_redirects_will_error(false)
            .timeout_resolve(Some(SILENCE))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("megafuse/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Client {
            agent: Agent::new_with_config(config),
            name: name.clone(),
            endpoint: settings.endpoint.clone(),
            token: settings.token.clone(),
            retry_delay: settings.retry_delay,
        })
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Asks which files the revision has.
    ///
    /// # Errors
    /// What the hub says of the model (none of this name, a private or gated one, no such revision); an answer that is no
    /// listing.
    pub fn list(&self) -> std::result::Result<Listing, Failure> {
        let (repository, revision) = (&self.name.repository, quoted(self.name.revision()));
        let url = format!("{}/api/models/{repository}/revision/{revision}?blobs=true", self.endpoint);
        let mut attempt = 0;
        loop {
            let failure = match self.get(&url, 0) {
                Ok(response) if response.status() == StatusCode::OK => return self.read_listing(response),
                Ok(response) => self.refusal(&response, None),
                // Without a network further attempts only delay what the cache may serve.
                Err(failure) => return Err(failure),
            };
            match failure {
                Failure::Unreachable(_) if attempt < FURTHER_ATTEMPTS => self.pause(&mut attempt),
                failure => return Err(failure),
            }
        }
    }

    fn read_listing(&self, response: Response<Body>) -> std::result::Result<Listing, Failure> {
        let mut bytes = Vec::new();
        let read = response.into_body().into_reader().take(LONGEST_LISTING_BYTES).read_to_end(&mut bytes);
        read.map_err(|error| Failure::Unreachable(format!("{}: {error}", self.endpoint)))?;
        listing(&bytes).map_err(|what| {
            let endpoint = &self.endpoint;
            Failure::Final(self.refused(format!("{endpoint} sent no listing of a model: {what}; is it a hub?")))
        })
    }

    /// The bytes of a file from `from` on; the answer may be an error's.
    pub(super) fn file(
        &self,
        commit: &str,
        file: &RemoteFile,
        from: u64,
    ) -> std::result::Result<Response<Body>, Failure> {
        let path: Vec<String> = file.path.split('/').map(quoted).collect();
        self.get(&format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.name.repository, path.join("/")), from)
    }

    /// Follows redirects; the token goes to the endpoint alone.
    fn get(&self, url: &str, from: u64) -> std::result::Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..=MOST_REDIRECTS {
            // As they are: a compressed body has another size.
            let mut request = self.agent.get(&url).header("accept-encoding", "identity");
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| self.unreachable(&url, error))?;
            let location = response.headers().get("location").and_then(|location| location.to_str().ok());
            match location.filter(|_| response.status().is_redirection()) {
                None => return Ok(response),
                Some(location) => {
                    let next = joined(&url, location);
                    if is_encrypted(&url) && !is_encrypted(&next) {
                        let reason = format!("{} redirects to an address without encryption", origin(&url));
                        return Err(Failure::Final(self.refused(reason)));
                    }
                    url = next;
                }
            }
        }
        Err(Failure::Final(self.refused(format!("{} redirects in a circle", self.endpoint))))
    }

    fn unreachable(&self, url: &str, error: ureq::Error) -> Failure {
        let place = origin(url);
        match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => Failure::Final(
                self.refused(format!("{place}: {error}; look at HF_ENDPOINT and at the proxy's variables")),
            ),
            ureq::Error::HostNotFound => Failure::Unreachable(format!("{place}: no such host is known")),
            ureq::Error::Io(error) => Failure::Unreachable(format!("{place}: {error}")),
            error => Failure::Unreachable(format!("{place}: {error}")),
        }
    }

    /// What an answer that is no success means, for the model or one of its files.
    pub(super) fn refusal(&self, response: &Response<Body>, file: Option<&str>) -> Failure {
        let status = response.status();
        let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default();
        let HubName { repository, .. } = &self.name;
        let page = format!("{}/{repository}", self.endpoint);
        let gated =
            format!("accept its licence at {page}, then set HF_TOKEN to a token of yours (or run hf auth login)");
        let reason = match status.as_u16() {
            401 | 403 if code == "GatedRepo" || (file.is_some() && self.token.is_none()) => {
                format!("the model is gated ({status}); {gated}")
            }
            401 | 403 if self.token.is_some() => {
                format!(
                    "the hub refuses it with this token ({status}): there is no model of this name, or the token may not read \
                     it; where it is gated, {gated}"
                )
            }
            401 | 403 => {
                format!(
                    "no such path here, and the hub has no public model of this name ({status}); where it is private or \
                     gated, {gated}"
                )
            }
            404 if file.is_some() => {
                format!("{} is listed and not there ({status}); try again later", file.unwrap_or_default())
            }
            404 if code == "RevisionNotFound" => {
                format!("the model has no revision {}; see {page}", self.name.revision())
            }
            404 if self.name.revision.is_some() => {
                format!(
                    "the hub has no such model, or it has no revision {} ({status}); see {page}",
                    self.name.revision()
                )
            }
            404 => format!("no such path here, and no such model on the hub ({status}); is {page} there?"),
            429 => {
                return Failure::Unreachable(format!(
                    "{}: too many requests ({status}); HF_TOKEN may help",
                    self.endpoint
                ));
            }
            500..600 => return Failure::Unreachable(format!("{}: the server failed ({status})", self.endpoint)),
            _ => format!("{} answered {status}", self.endpoint),
        };
        Failure::Final(self.refused(reason))
    }

    pub(super) fn refused(&self, reason: impl Into<String>) -> Error {
        Error::Hub { name: self.name.to_string(), reason: reason.into() }
    }

    /// Twice as long as before.
    pub(super) fn pause(&self, attempt: &mut u32) {
        std::thread::sleep(self.retry_delay * 2u32.pow(*attempt));
        *attempt += 1;
    }
}

/// What is trusted in place of the usual authorities.
///
/// # Errors
/// [`Error::File`], [`Error::Io`].
fn certificates(path: &Path) -> Result<RootCerts> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    let certificates: Vec<_> = parse_pem(&bytes)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    match certificates.is_empty() {
        true => {
            Err(Error::file(path, "holds no certificate in PEM; SSL_CERT_FILE or REQUESTS_CA_BUNDLE names this file"))
        }
        false => Ok(RootCerts::new_with_certs(&certificates)),
    }
}

/// The commit and the files of a revision, as the hub's interface lists them. A name that would lead out of the model's
/// folder is left out.
fn listing(json: &[u8]) -> std::result::Result<Listing, String> {
    let json: Value = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let commit = json["sha"].as_str().filter(|sha| is_commit(sha)).ok_or("sha is no commit")?;
    let siblings = json["siblings"].as_array().ok_or("siblings is no list")?;
    let files = siblings.iter().map(|entry| {
        let path = entry["rfilename"].as_str().ok_or("a file without a name")?;
        let hash = |value: &Value, digits: usize| {
            let id = value.as_str().filter(|id| id.len() == digits && id.bytes().all(|c| c.is_ascii_hexdigit()));
            id.map(String::from)
        };
        let sha256 = hash(&entry["lfs"]["sha256"], 64);
        let is_sha256 = sha256.is_some();
        let id = sha256.or_else(|| hash(&entry["blobId"], 40)).ok_or("a file without a hash")?;
        let size = entry["size"].as_u64().ok_or("a file without a size")?;
        Ok(RemoteFile { path: path.to_string(), size, id, is_sha256 })
    });
    let files = files.collect::<std::result::Result<Vec<RemoteFile>, &str>>()?;
    let files = files.into_iter().filter(|file| is_inside(&file.path)).collect();
    Ok(Listing { commit: commit.to_string(), files })
}

/// `https://host:port` of an address.
fn origin(url: &str) -> String {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    url[..end].to_ascii_lowercase()
}

fn is_encrypted(url: &str) -> bool {
    origin(url).starts_with("https://")
}

/// Where a redirect of `url` leads.
fn joined(url: &str, location: &str) -> String {
    if location.contains("://") {
        return location.to_string();
    }
    if let Some(rest) = location.strip_prefix("//") {
        let scheme = url.split("://").next().unwrap_or("https");
        return format!("{scheme}://{rest}");
    }
    if location.starts_with('/') {
        return format!("{}{location}", origin(url));
    }
    let path = url.split(['?', '#']).next().unwrap_or(url);
    let folder = path.rfind('/').filter(|&at| at >= origin(url).len()).map_or(path, |at| &path[..at]);
    format!("{folder}/{location}")
}

/// A step of an address, with what is not plain written as %XX.
fn quoted(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects() {
        let from = "https://hub.org/a/b?c=d";
        for (location, to) in [
            ("https://cdn.org/x", "https://cdn.org/x"),
            ("//cdn.org/x", "https://cdn.org/x"),
            ("/x?y", "https://hub.org/x?y"),
            ("x", "https://hub.org/a/x"),
        ] {
            assert_eq!(joined(from, location), to);
        }
        assert_eq!(joined("http://h:1", "x"), "http://h:1/x");
        let encrypted = |location| is_encrypted(&joined(from, location));
        assert!(["HTTPS://cdn.org/x", "//cdn.org/x", "/x", "x"].into_iter().all(encrypted));
        assert!(!["http://cdn.org/x", "ftp://cdn.org/x", "http://hub.org/https://x"].into_iter().any(encrypted));
    }

    #[test]
    fn a_listed_name_stays_inside_the_folder() {
        let entry = |path: &str| format!(r#"{{"rfilename": {path:?}, "size": 1, "blobId": "{}"}}"#, "0".repeat(40));
        let names = ["unet/config.json", "../x", "unet/../../x", "/etc/x", "a//b", "./x", "..", "", r"a\b", "c:x"];
        let siblings = names.map(entry).join(", ");
        let json = format!(r#"{{"sha": "{}", "siblings": [{siblings}]}}"#, "a".repeat(40));
        let paths: Vec<String> = listing(json.as_bytes()).unwrap().files.into_iter().map(|file| file.path).collect();
        assert_eq!(paths, ["unet/config.json"]);
    }

    /// The token is for the endpoint, not for what looks like it.
    #[test]
    fn origins() {
        let endpoint = origin("https://hub.org");
        for same in ["https://hub.org/a", "HTTPS://Hub.org/a", "https://hub.org?x"] {
            assert_eq!(origin(same), endpoint, "{same}");
        }
        for other in
            ["https://hub.org:8443/", "http://hub.org/", "https://hub.org@evil.org/", "https://hub.org.evil.org/"]
        {
            assert_ne!(origin(other), endpoint, "{other}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(quoted("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(quoted("a b+é"), "a%20b%2B%C3%A9");
    }
}
