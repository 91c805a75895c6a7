//! Requests to the hub. Redirections are followed here, so that the token goes to the hub's own address and nowhere else.

use crate::cache::repository;
use crate::error::{HubError, Result};
use crate::name::{Name, is_commit};
use crate::settings::Settings;
use std::io::Read;
use std::time::Duration;
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

/// Redirections of one request, at most.
const MAX_REDIRECTS: usize = 8;
/// Bytes of the list of a repository's files, at most.
const MAX_LISTING: u64 = 64 << 20;
/// How long a server may be silent.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(20);

/// Speaks with one server.
pub(crate) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// What a server says of a file before it sends it.
#[derive(Debug)]
pub(crate) struct Meta {
    /// The name of the content in the cache.
    pub etag: String,
    /// Bytes.
    pub size: u64,
    /// The content's SHA-256, where the server says it.
    pub sha256: Option<String>,
}

impl Client {
    pub fn new(settings: &Settings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("senmon/", env!("CARGO_PKG_VERSION")))
            // Lengths and places are those of the file, not of a packed form.
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .build();
        Self { agent: config.into(), endpoint: settings.endpoint.clone(), token: settings.token.clone() }
    }

    /// The commit that a revision is, and the names of its files.
    pub fn listing(&self, name: &Name) -> Result<(String, Vec<String>)> {
        let url = format!("{}/api/{}", self.endpoint, repository(name, name.revision()).api_url());
        let wrong = |what: String| HubError::Server { url: url.clone(), what };
        let response = self.send(name, &url, Ask::All)?;
        if response.status() == 404 {
            return Err(HubError::NotFound { name: name.to_string(), endpoint: self.endpoint.clone() });
        }
        self.check(name, &url, &response)?;
        let mut text = Vec::new();
        let mut body = response.into_body().into_reader().take(MAX_LISTING + 1);
        body.read_to_end(&mut text).map_err(|e| self.network(name, &e))?;
        if text.len() as u64 > MAX_LISTING {
            return Err(wrong(format!("the list of files is longer than {MAX_LISTING} bytes")));
        }
        let info: hf_hub::api::RepoInfo =
            serde_json::from_slice(&text).map_err(|e| wrong(format!("is no list of files: {e}")))?;
        if !is_commit(&info.sha) {
            return Err(wrong(format!("names the commit {:?}, which is none", info.sha)));
        }
        Ok((info.sha, info.siblings.into_iter().map(|file| file.rfilename).collect()))
    }

    /// The address of a file.
    pub fn address(&self, name: &Name, commit: &str, file: &str) -> String {
        let repository = repository(name, commit);
        let (url, revision) = (repository.url(), repository.url_revision());
        format!("{}/{url}/resolve/{revision}/{}", self.endpoint, escaped(file))
    }

    /// What a file is.
    pub fn meta(&self, name: &Name, url: &str) -> Result<Meta> {
        let wrong = |what: &str| HubError::Server { url: url.into(), what: what.into() };
        let response = self.send(name, url, Ask::Head)?;
        if !response.status().is_redirection() {
            self.check(name, url, &response)?;
        }
        let headers = response.headers();
        let linked = text(headers, "x-linked-etag");
        let etag = linked
            .or_else(|| text(headers, "etag"))
            .map(|etag| etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"'));
        let etag = etag.ok_or_else(|| wrong("the server names no content (ETag)"))?;
        let plain = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
        if etag.is_empty() || etag.len() > 128 || etag.starts_with('.') || !etag.bytes().all(plain) {
            return Err(wrong("the server names a content (ETag) that cannot be the name of a file"));
        }
        let size = text(headers, "x-linked-size").or_else(|| text(headers, "content-length"));
        let size = size.and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| wrong("the server does not say how long the file is"))?;
        let is_sha256 = etag.len() == 64 && etag.bytes().all(|c| c.is_ascii_hexdigit());
        let sha256 = (linked.is_some() && is_sha256).then(|| etag.to_lowercase());
        Ok(Meta { etag: etag.to_owned(), size, sha256 })
    }

    /// The content of a file from a byte on, and from which byte on it really is: 0 where the server cannot begin elsewhere.
    pub fn content(&self, name: &Name, url: &str, from: u64) -> Result<(u64, Body)> {
        let response = self.send(name, url, Ask::From(from))?;
        self.check(name, url, &response)?;
        let start = match response.status().as_u16() {
            206 => {
                let range = text(response.headers(), "content-range").unwrap_or_default();
                let start =
                    range.strip_prefix("bytes ").and_then(|range| range.split('-').next()?.parse().ok());
                start.filter(|start| *start == from).ok_or_else(|| HubError::Server {
                    url: url.into(),
                    what: format!("asked for bytes from {from} on, it sends {range:?}"),
                })?
            }
            _ => 0,
        };
        Ok((start, response.into_body()))
    }

    /// An error of the network, about the hub.
    pub fn network(&self, name: &Name, what: &dyn std::fmt::Display) -> HubError {
        HubError::Network { name: name.to_string(), host: self.endpoint.clone(), what: what.to_string() }
    }

    /// Sends a request and follows redirections: for [`Ask::Head`] only those within the hub, whose answer is what counts.
    fn send(&self, name: &Name, url: &str, ask: Ask) -> Result<Response<Body>> {
        let wrong = |what: &str| HubError::Server { url: url.into(), what: what.into() };
        let home: Uri = self.endpoint.parse().map_err(|_| HubError::Variable {
            variable: "HF_ENDPOINT",
            what: format!("{:?} is no address", self.endpoint),
        })?;
        let mut at: Uri = url.parse().map_err(|_| wrong("is no address"))?;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = match ask {
                Ask::Head => self.agent.head(&at),
                _ => self.agent.get(&at),
            };
            if let (true, Some(token)) = (same_origin(&at, &home), &self.token) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Ask::From(from @ 1..) = ask {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|e| match e {
                e @ (ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::Protocol(_)) => {
                    wrong(&e.to_string())
                }
                e => self.network(name, &e),
            })?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let to = text(response.headers(), "location").and_then(|to| join(&at, to));
            let to = to.ok_or_else(|| wrong("is redirected to nowhere"))?;
            if matches!(ask, Ask::Head) && !same_origin(&to, &home) {
                return Ok(response);
            }
            if at.scheme_str() == Some("https") && to.scheme_str() != Some("https") {
                return Err(wrong("is redirected to an address without encryption"));
            }
            at = to;
        }
        Err(wrong(&format!("is redirected more than {MAX_REDIRECTS} times")))
    }

    /// Refuses what is no success.
    fn check(&self, name: &Name, url: &str, response: &Response<Body>) -> Result<()> {
        let (status, endpoint) = (response.status().as_u16(), self.endpoint.clone());
        let wrong = |what: String| Err(HubError::Server { url: url.into(), what });
        match status {
            200..300 => Ok(()),
            401 | 403 => Err(HubError::Forbidden {
                name: name.to_string(),
                endpoint,
                status,
                token: self.token.is_some(),
            }),
            429 => wrong("the server is asked too often (429): wait a while, or set HF_TOKEN".into()),
            status => wrong(format!("the server answers with status {status}")),
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy)]
enum Ask {
    /// The headers.
    Head,
    /// All.
    All,
    /// What comes from this byte on.
    From(u64),
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// The same scheme, host and port.
fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| {
        uri.port_u16().or(match uri.scheme_str() {
            Some("https") => Some(443),
            _ => Some(80),
        })
    };
    a.scheme() == b.scheme() && a.host() == b.host() && port(a) == port(b)
}

/// Where a redirection from `base` leads.
fn join(base: &Uri, to: &str) -> Option<Uri> {
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let uri: Uri = match to {
        _ if to.starts_with("//") => format!("{scheme}:{to}").parse().ok()?,
        _ if to.starts_with('/') => format!("{scheme}://{authority}{to}").parse().ok()?,
        _ => to.parse().ok()?,
    };
    matches!(uri.scheme_str(), Some("http" | "https")).then_some(uri)
}

/// The name of a file in an address.
fn escaped(file: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"-_.~/".contains(&c);
    file.bytes().map(|c| if plain(c) { char::from(c).to_string() } else { format!("%{c:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn the_hub_is_scheme_host_and_port() {
        let hub = uri("https://hub.co");
        for (address, expected) in [
            ("https://hub.co/x", true),
            ("https://hub.co:443/x", true),
            ("http://hub.co/x", false),
            ("https://hub.co:8443/x", false),
            ("https://cdn.hub.co/x", false),
            ("https://hub.co.evil.org/x", false),
        ] {
            assert_eq!(same_origin(&uri(address), &hub), expected, "{address}");
        }
    }

    #[test]
    fn redirections_lead_somewhere_or_nowhere() {
        let base = uri("https://hub.co/a/b?c");
        let to = |to: &str| join(&base, to).map(|uri| uri.to_string());
        assert_eq!(to("/d?e").unwrap(), "https://hub.co/d?e");
        assert_eq!(to("//cdn.co/d").unwrap(), "https://cdn.co/d");
        assert_eq!(to("http://x/y").unwrap(), "http://x/y");
        for nowhere in ["", "d", "ftp://x/y", "file:///etc/passwd", "http://", "https:// x"] {
            assert_eq!(to(nowhere), None, "{nowhere}");
        }
    }

    #[test]
    fn addresses_have_no_characters_of_their_own_meaning() {
        assert_eq!(escaped("a b/c?#%é.gguf"), "a%20b/c%3F%23%25%C3%A9.gguf");
    }
}
