//! A Hugging Face hub on this machine, as far as a client sees it: the list of a repository's files, files with their hashes
//! and commits, large ones on a second server, parts of files. It writes down what it is asked.

#![allow(dead_code)]

use ring::digest::{SHA256, digest};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// The commit of every repository.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// GET or HEAD.
    pub method: String,
    /// The path, of the hub or, where it begins with `/large/`, of the second server.
    pub path: String,
    /// The first byte that is asked for, if not all.
    pub from: Option<u64>,
    /// The header with the token.
    pub token: Option<String>,
}

/// What is wrong with the server.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The status of every answer for the list of files.
    pub listing: Option<u16>,
    /// The status of every answer for a file.
    pub files: Option<u16>,
    /// How often a large file breaks off after so many bytes.
    pub cuts: usize,
    /// Where it breaks off.
    pub cut_after: usize,
    /// Ranges are ignored.
    pub no_ranges: bool,
    /// What large files are said to be longer than they are; negative, shorter.
    pub longer: i64,
    /// The name that contents are given.
    pub etag: Option<String>,
    /// A byte of every large file is another.
    pub flipped: bool,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    asked: Vec<Asked>,
    faults: Faults,
}

/// The two servers; they end with the process.
pub struct HubServer {
    state: Arc<Mutex<State>>,
    /// The address of the hub.
    pub endpoint: String,
}

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_large(file: &str) -> bool {
    [".safetensors", ".gguf"].iter().any(|end| file.ends_with(end))
}

impl HubServer {
    /// With one repository, of these files: whatever its name is, it is this.
    pub fn new(files: BTreeMap<String, Vec<u8>>) -> Self {
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, large) = (listen(), listen());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let (endpoint, other) = (address(&hub), address(&large));
        for listener in [hub, large] {
            let (state, other) = (state.clone(), other.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let (state, other) = (state.clone(), other.clone());
                    // A client that goes away is no failure of the server.
                    std::thread::spawn(move || drop(answer(stream, &state, &other)));
                }
            });
        }
        Self { state, endpoint }
    }

    /// What was asked since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.lock().unwrap().asked)
    }

    /// From now on this is wrong.
    pub fn fail(&self, faults: Faults) {
        self.state.lock().unwrap().faults = faults;
    }

    /// Puts a file into the repository.
    pub fn put(&self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.state.lock().unwrap().files.insert(name.into(), bytes.into());
    }
}

/// Reads a request and answers it; the connection ends with the answer.
fn answer(stream: std::io::Result<TcpStream>, state: &Mutex<State>, other: &str) -> std::io::Result<()> {
    let mut stream = stream?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = || -> std::io::Result<String> {
        let mut text = String::new();
        lines.by_ref().take(8192).read_line(&mut text)?;
        Ok(text.trim_end().to_owned())
    };
    let first = line()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut asked = Asked { method, path, from: None, token: None };
    loop {
        let header = line()?;
        let Some((key, value)) = header.split_once(": ") else { break };
        match key.to_lowercase().as_str() {
            "authorization" => asked.token = Some(value.to_owned()),
            "range" => {
                let from = value.strip_prefix("bytes=").and_then(|range| range.split('-').next());
                asked.from = from.and_then(|from| from.parse().ok());
            }
            _ => {}
        }
    }
    let (reply, cut) = reply(&asked, &mut state.lock().unwrap(), other);
    stream.write_all(&reply[..cut.unwrap_or(reply.len())])
}

/// The bytes of an answer, and where they break off.
fn reply(asked: &Asked, state: &mut State, other: &str) -> (Vec<u8>, Option<usize>) {
    state.asked.push(asked.clone());
    let faults = state.faults.clone();
    let whole = |status: u16, headers: String, body: &[u8]| {
        let mut reply = format!(
            "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        )
        .into_bytes();
        if asked.method != "HEAD" {
            reply.extend(body);
        }
        reply
    };
    if asked.path.starts_with("/api/models/") {
        let names: Vec<_> = state.files.keys().map(|file| serde_json::json!({ "rfilename": file })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": names }).to_string();
        let body = if faults.listing.is_some() { "" } else { &body };
        return (whole(faults.listing.unwrap_or(200), String::new(), body.as_bytes()), None);
    }
    if let Some(file) = asked.path.strip_prefix("/large/") {
        let mut bytes = state.files.get(file).cloned().unwrap_or_default();
        if faults.flipped {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        let from = asked.from.filter(|_| !faults.no_ranges);
        let reply = match from {
            Some(from) => {
                let (last, all) = (bytes.len() - 1, bytes.len());
                whole(206, format!("Content-Range: bytes {from}-{last}/{all}\r\n"), &bytes[from as usize..])
            }
            None => whole(200, String::new(), &bytes),
        };
        let body = bytes.len() - from.unwrap_or(0) as usize;
        let cut = (asked.method == "GET" && faults.cuts > 0 && body > faults.cut_after)
            .then(|| reply.len() - body + faults.cut_after);
        state.faults.cuts -= usize::from(cut.is_some());
        return (reply, cut);
    }
    let file = asked.path.split_once(&format!("/resolve/{COMMIT}/")).map(|(_, file)| file);
    let Some((file, bytes)) = file.and_then(|file| state.files.get_key_value(file)) else {
        return (whole(404, String::new(), b""), None);
    };
    if let Some(status) = faults.files {
        return (whole(status, String::new(), b""), None);
    }
    let hash = faults.etag.unwrap_or_else(|| sha256(bytes));
    let reply = if is_large(file) {
        let size = bytes.len() as i64 + faults.longer;
        let headers = format!(
            "Location: {other}/large/{file}\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{hash}\"\r\n\
             X-Linked-Size: {size}\r\nETag: \"other\"\r\n"
        );
        whole(302, headers, b"")
    } else {
        // The hub hashes small files in another way.
        whole(
            200,
            format!("X-Repo-Commit: {COMMIT}\r\nETag: W/\"{}\"\r\n", &hash[..40.min(hash.len())]),
            bytes,
        )
    };
    (reply, None)
}
