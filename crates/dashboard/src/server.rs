//! The server: a thread with a runtime of its own, that makes the page when someone asks for it.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::stream::{self, Stream};
use tokio::sync::watch;

use senmon_page::Page;

use crate::blocks;
use crate::error::{DashboardError, Result};
use crate::view::View;

/// Between two updates of one browser.
const EVERY: Duration = Duration::from_secs(1);
/// How long browsers have to take the last state when the run is over.
const FAREWELL: Duration = Duration::from_secs(2);

/// What all requests share.
struct Shared {
    view: Arc<Mutex<View>>,
    /// This server, told apart from another that is found at the same address later.
    instance: String,
    changes: watch::Receiver<Change>,
    /// The page as it was last made: one making serves all browsers.
    made: Mutex<Option<Made>>,
}

#[derive(Clone, Copy, Default)]
struct Change {
    number: u64,
    /// Counts changes after which a page has other parts than before.
    shape: u64,
    closing: bool,
}

/// A page and what it was made of.
#[derive(Clone)]
struct Made {
    change: Change,
    at: tokio::time::Instant,
    page: Arc<Page>,
    blocks: Arc<[Arc<str>]>,
}

impl Made {
    /// Whether it will do, for a while or because nothing has happened since.
    fn will_do(&self, now: Change) -> bool {
        let is_like_it = (self.change.shape, self.change.closing) == (now.shape, now.closing);
        is_like_it && (self.change.number == now.number || self.at.elapsed() < EVERY)
    }
}

pub(crate) struct Server {
    address: SocketAddr,
    changes: watch::Sender<Change>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn open(listener: TcpListener, view: Arc<Mutex<View>>) -> Result<Self> {
        let address = listener.local_addr().map_err(DashboardError::Start)?;
        if !address.ip().is_loopback() {
            return Err(DashboardError::Exposed(address));
        }
        listener.set_nonblocking(true).map_err(DashboardError::Start)?;
        let (changes, receiver) = watch::channel(Change { number: 1, ..Change::default() });
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let shared = Arc::new(Shared {
            view,
            instance: format!("{:x}-{:x}", std::process::id(), since.as_nanos()),
            changes: receiver.clone(),
            made: Mutex::new(None),
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(DashboardError::Start)?;
        let serve = move || {
            runtime.block_on(async move {
                // Registering the socket needs the runtime; a failure here leaves a run without its view.
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                let mut closing = receiver;
                let closed = async move {
                    let _ = closing.wait_for(|change| change.closing).await;
                };
                let _ = axum::serve(listener, router(shared)).with_graceful_shutdown(closed).await;
            });
        };
        let thread = std::thread::Builder::new().name("dashboard".into()).spawn(serve);
        Ok(Self { address, changes, thread: Some(thread.map_err(DashboardError::Start)?) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The view has changed.
    pub fn changed(&self) {
        self.changes.send_modify(|change| change.number += 1);
    }

    /// The view has changed so that the page has other parts: browsers load it anew.
    pub fn changed_shape(&self) {
        self.changes.send_modify(|change| {
            change.number += 1;
            change.shape += 1;
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.changes.send_modify(|change| change.closing = true);
        let Some(thread) = self.thread.take() else { return };
        let until = Instant::now() + FAREWELL;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        // A browser that does not take what it is sent is left to itself.
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/events", get(events))
        .fallback(async || (StatusCode::NOT_FOUND, "there is one page: /\n"))
        .layer(middleware::from_fn(only_by_name_of_this_machine))
        .with_state(shared)
}

/// A page of another site whose name leads to this machine must not read the run (DNS rebinding).
async fn only_by_name_of_this_machine(request: Request, next: Next) -> Response {
    if !is_this_machine(request.headers()) {
        return (StatusCode::FORBIDDEN, "ask for it by 127.0.0.1 or localhost\n").into_response();
    }
    // What another site's page asks for it could not read, but it would be made.
    if is_of_another_site(request.headers()) {
        return (StatusCode::FORBIDDEN, "type the address, or follow no link of another site\n")
            .into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    response
}

fn is_this_machine(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|c| c.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether a browser says that a page of another site asks, other than by a link that was followed.
fn is_of_another_site(headers: &HeaderMap) -> bool {
    let says = |name: &str, value: &str| headers.get(name).is_some_and(|found| found == value);
    says("sec-fetch-site", "cross-site") && !says("sec-fetch-mode", "navigate")
}

async fn page(State(shared): State<Arc<Shared>>) -> Response {
    let change = *shared.changes.borrow();
    match shared.made(change).page.to_html() {
        Ok(html) => ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// What changes, from now on. A browser says which page it has; one of another run is told to load this one.
async fn events(
    State(shared): State<Arc<Shared>>,
    uri: Uri,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let page = uri.query().and_then(|query| query.strip_prefix("page=")).unwrap_or_default().to_owned();
    let changes = shared.changes.clone();
    let listener = Listener { shared, changes, sent: Vec::new(), at: None, page, reloads: false };
    let events = stream::unfold(listener, async |mut listener| {
        let event = listener.next().await?;
        Some((Ok(event), listener))
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

/// A browser that listens.
struct Listener {
    shared: Arc<Shared>,
    changes: watch::Receiver<Change>,
    /// The blocks that it has.
    sent: Vec<Arc<str>>,
    /// When it was last sent something.
    at: Option<tokio::time::Instant>,
    /// The page that it has, by [`Shared::name`].
    page: String,
    /// It was told to load another.
    reloads: bool,
}

impl Listener {
    /// The next event; none when the server closes.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if self.reloads {
                // It comes again with the new page.
                return None;
            }
            if self.page != self.shared.name(*self.changes.borrow()) {
                self.reloads = true;
                return Some(Event::default().event("reload").data("another page"));
            }
            // The end is not waited for.
            let closing = self.changes.borrow().closing;
            if let (Some(at), false) = (self.at, closing) {
                let shape = self.changes.borrow().shape;
                let mut urgent = self.changes.clone();
                let is_urgent = |change: &Change| change.closing || change.shape != shape;
                let _ = tokio::time::timeout_at(at + EVERY, urgent.wait_for(is_urgent)).await;
            }
            let change = *self.changes.borrow_and_update();
            if self.page != self.shared.name(change) {
                continue;
            }
            let made = self.shared.made(change);
            let is_newest = made.change.number >= change.number;
            let new = self.new_blocks(&made.blocks);
            if !new.is_empty() {
                self.at = Some(tokio::time::Instant::now());
                return Some(Event::default().retry(EVERY).data(format!("[{}]", new.join(","))));
            }
            if change.closing {
                return None;
            }
            if !is_newest {
                // What was made for another browser a moment ago: the next one is due when that is a second old.
                self.at = Some(made.at);
            } else if self.changes.changed().await.is_err() {
                return None;
            }
        }
    }

    /// The blocks that it does not have as they are now; from then on it has them.
    fn new_blocks(&mut self, now: &[Arc<str>]) -> Vec<Arc<str>> {
        let is_new = |place: usize, block: &Arc<str>| self.sent.get(place) != Some(block);
        let new = now.iter().enumerate().filter(|(place, block)| is_new(*place, block));
        let new = new.map(|(_, block)| Arc::clone(block)).collect();
        self.sent = now.to_vec();
        new
    }
}

impl Shared {
    /// What a page after that change is told apart from others by.
    fn name(&self, change: Change) -> String {
        format!("{}-{}", self.instance, change.shape)
    }

    /// The page after a change, or one a second older at most.
    fn made(&self, change: Change) -> Made {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = made.as_ref().filter(|made| made.will_do(change)) {
            return made.clone();
        }
        let page = {
            let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            blocks::page(&view, &format!("/events?page={}", self.name(change)))
        };
        // A block that contradicts itself would be a mistake of this crate; the blocks then stay as they were.
        let blocks = match blocks::blocks(&page) {
            Ok(blocks) => blocks.into_iter().map(Arc::from).collect(),
            Err(_) => made.as_ref().map_or_else(|| Arc::new([]) as _, |made| Arc::clone(&made.blocks)),
        };
        let new = Made { change, at: tokio::time::Instant::now(), page: Arc::new(page), blocks };
        *made = Some(new.clone());
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine() {
        let asked = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
            is_this_machine(&headers)
        };
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:7878", "127.0.0.1", "[::1]:7878", "[::1]"] {
            assert!(asked(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:7878",
            "127.0.0.1.evil.example",
            "10.0.0.1:1",
            "localhost.evil.example",
            "",
        ] {
            assert!(!asked(host), "{host}");
        }
        assert!(!is_this_machine(&HeaderMap::new()));
    }
}
