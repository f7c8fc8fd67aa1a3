//! Who is heard: hosts, origins and the token; and what a client is told that is not.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::{AUTHORIZATION, HOST, HeaderMap, ORIGIN, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use megafuse::Error;
use serde_json::{Value, json};
use tower_http::cors::{Any, CorsLayer};
use utoipa::IntoResponses;

use super::args::ServeArgs;
use super::body::api_text;
use super::{App, page};

/// May be asked without a token and by any name: they do no work.
const OPEN: [&str; 2] = ["/healthz", "/readyz"];

pub struct Guard {
    /// The token's hash: comparing hashes tells nothing of how much of a guess was right.
    token: Option<blake3::Hash>,
    /// Names in requests' `Host`, beside the address itself. `None`: any.
    hosts: Option<Vec<String>>,
    origins: Vec<String>,
}

impl Guard {
    pub fn new(args: &ServeArgs) -> Guard {
        // A page on the web whose name leads here (DNS rebinding) sends its own name, and no token.
        let any = !args.addr.ip().is_loopback() && args.allow_host.is_empty();
        let mut hosts = vec!["localhost".to_string(), "127.0.0.1".into(), "[::1]".into(), args.addr.ip().to_string()];
        hosts.extend(args.allow_host.iter().map(|host| host.to_ascii_lowercase()));
        Guard {
            token: args.api_token.as_ref().map(|token| blake3::hash(token.as_bytes())),
            hosts: (!any).then_some(hosts),
            origins: args.allow_origin.clone(),
        }
    }

    /// What browsers are told of other origins.
    pub fn cors(&self) -> CorsLayer {
        let origins = self.origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
        let methods = [Method::GET, Method::POST, Method::DELETE];
        CorsLayer::new().allow_origin(origins.collect::<Vec<_>>()).allow_methods(methods).allow_headers(Any)
    }

    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        // Kubernetes' probes call a pod by its address.
        if OPEN.contains(&uri.path()) {
            return Ok(());
        }
        // In HTTP/1.1 a request may have it in its first line.
        let host = uri.authority().map(|authority| authority.as_str()).or(text(HOST)).unwrap_or_default();
        if self.hosts.as_ref().is_some_and(|hosts| !hosts.contains(&without_port(host).to_ascii_lowercase())) {
            let message = format!("host {host:?} is not this server's; start it with --allow-host for another name");
            return Err(Problem::new(StatusCode::FORBIDDEN, message));
        }
        if let Some(origin) = headers.get(ORIGIN) {
            let origin = origin.to_str().unwrap_or_default();
            let own = origin.split_once("://").is_some_and(|(_, of)| of.eq_ignore_ascii_case(host));
            if !own && !self.origins.iter().any(|allowed| allowed == origin) {
                let message = format!("origin {origin:?} may not use this server; start it with --allow-origin");
                return Err(Problem::new(StatusCode::FORBIDDEN, message));
            }
        }
        let Some(token) = &self.token else { return Ok(()) };
        if page::FILES.iter().any(|(path, ..)| *path == uri.path()) {
            return Ok(());
        }
        match text(AUTHORIZATION).and_then(given_token) {
            Some(given) if blake3::hash(given.as_bytes()) == *token => Ok(()),
            Some(_) => Err(Problem::new(StatusCode::UNAUTHORIZED, "the token is another one")),
            None => {
                Err(Problem::new(StatusCode::UNAUTHORIZED, "this server wants a token: Authorization: Bearer TOKEN"))
            }
        }
    }
}

/// Of `Bearer TOKEN`, or the password of `Basic`.
fn given_token(header: &str) -> Option<String> {
    let (scheme, value) = header.split_once(' ')?;
    match scheme.to_ascii_lowercase().as_str() {
        "bearer" => Some(value.trim().to_string()),
        "basic" => {
            let pair = String::from_utf8(STANDARD.decode(value.trim()).ok()?).ok()?;
            Some(pair.split_once(':')?.1.to_string())
        }
        _ => None,
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.is_empty() => name,
        _ => host,
    }
}

/// Before every route.
pub async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match app.guard.check(request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

/// Whose share of the device a request uses: the machine that sent it.
pub fn client_of(ConnectInfo(address): ConnectInfo<SocketAddr>) -> String {
    address.ip().to_string()
}

/// Why a request is not met. In the form of OpenAI's errors, which webui's clients read too.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    message: String,
    /// The field of the request that is wrong.
    field: Option<String>,
    /// Seconds after which it may be tried again.
    retry_after: Option<u64>,
}

/// Why a job is not taken, for the document.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "the document alone reads it")]
pub enum Refusals {
    /// What is wrong, naming the field.
    #[response(status = 400)]
    Wrong,
    /// Another model was asked for.
    #[response(status = 404)]
    OtherModel,
    /// More bytes than --max-body.
    #[response(status = 413)]
    TooLarge,
    /// Not the JSON that is expected.
    #[response(status = 422)]
    OtherJson,
    /// The queue is full; Retry-After says when to come again.
    #[response(status = 429)]
    Full,
    /// The server ends.
    #[response(status = 503)]
    Draining,
}

impl Problem {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Problem {
        Problem { status, message: message.into(), field: None, retry_after: None }
    }

    pub fn not_found(message: &str) -> Problem {
        Problem::new(StatusCode::NOT_FOUND, message)
    }

    pub fn method_not_allowed() -> Problem {
        Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this route takes another method; /openapi.json lists them")
    }

    pub fn internal() -> Problem {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "an internal error; the server's log has it")
    }

    pub fn full(waiting: usize, after_seconds: u64) -> Problem {
        let message = format!("{waiting} pictures wait, and no more may; try again later");
        Problem { retry_after: Some(after_seconds), ..Problem::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    pub fn draining() -> Problem {
        let message = "the server ends and takes no more jobs";
        Problem { retry_after: Some(10), ..Problem::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    pub fn cancelled() -> Problem {
        // What nginx calls a client that has gone; here another one has ended the job.
        Problem::new(StatusCode::CONFLICT, "the job was cancelled")
    }

    pub fn failed(error: &str) -> Problem {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error)
    }

    pub fn to_json(&self) -> Value {
        let kind = if self.status.is_client_error() { "invalid_request_error" } else { "server_error" };
        let error = json!({"message": self.message, "type": kind, "param": self.field, "code": self.status.as_u16()});
        json!({"error": error, "detail": self.message})
    }
}

impl From<Error> for Problem {
    /// What is wrong with a request.
    fn from(error: Error) -> Problem {
        let field = match &error {
            Error::Request { field, .. } => Some(field.trim_start_matches('-').replace('-', "_")),
            _ => None,
        };
        Problem { field, ..Problem::new(StatusCode::BAD_REQUEST, api_text(&error)) }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer, Basic realm=\"megafuse\""));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(token: Option<&str>, hosts: Option<&[&str]>, origins: &[&str]) -> Guard {
        let owned = |list: &[&str]| list.iter().map(|text| text.to_string()).collect::<Vec<_>>();
        Guard {
            token: token.map(|token| blake3::hash(token.as_bytes())),
            hosts: hosts.map(owned),
            origins: owned(origins),
        }
    }

    fn status(guard: &Guard, path: &str, headers: &[(&'static str, &str)]) -> u16 {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        guard.check(&path.parse().unwrap(), &map).err().map_or(200, |problem| problem.status.as_u16())
    }

    #[test]
    fn hosts_and_origins_are_this_servers() {
        let local = guard(None, Some(&["localhost", "127.0.0.1", "[::1]"]), &["https://a.example"]);
        for (headers, want) in [
            (&[("host", "localhost:7860")][..], 200),
            (&[("host", "LOCALHOST")], 200),
            (&[("host", "[::1]:7860")], 200),
            (&[("host", "[::1]")], 200),
            (&[("host", "evil.example:7860")], 403),
            (&[("host", "localhost.evil.example")], 403),
            (&[], 403),
            (&[("host", "localhost:7860"), ("origin", "http://localhost:7860")], 200),
            (&[("host", "localhost:7860"), ("origin", "http://localhost:9999")], 403),
            (&[("host", "localhost:7860"), ("origin", "https://evil.example")], 403),
            (&[("host", "localhost:7860"), ("origin", "null")], 403),
            (&[("host", "localhost:7860"), ("origin", "https://a.example")], 200),
        ] {
            assert_eq!(status(&local, "/v1/jobs", headers), want, "{headers:?}");
        }
        assert_eq!(status(&local, "/healthz", &[("host", "10.1.2.3:7860")]), 200);
        assert_eq!(status(&guard(None, None, &[]), "/v1/jobs", &[("host", "any.example")]), 200);
    }

    #[test]
    fn a_token_opens_every_route_but_those_of_health() {
        let closed = guard(Some("correct horse"), None, &[]);
        let basic = format!("Basic {}", STANDARD.encode("anyone:correct horse"));
        for (path, header, want) in [
            ("/healthz", None, 200),
            ("/readyz", None, 200),
            ("/", None, 200),
            ("/page.js", None, 200),
            ("/metrics", None, 401),
            ("/healthz/", None, 401),
            ("/v1/jobs", Some("Bearer correct horse"), 200),
            ("/v1/jobs", Some("bearer correct horse"), 200),
            ("/v1/jobs", Some(basic.as_str()), 200),
            ("/v1/jobs", Some("Bearer correct hors"), 401),
            ("/v1/jobs", Some("Bearer "), 401),
            ("/v1/jobs", Some("correct horse"), 401),
            ("/v1/jobs", Some("Basic !!!"), 401),
        ] {
            let headers: Vec<(&'static str, &str)> = header.map(|value| ("authorization", value)).into_iter().collect();
            assert_eq!(status(&closed, path, &headers), want, "{path} {header:?}");
        }
    }
}
