//! Where the time of a computation goes: spans of kernels and of what their threads do, recorded on demand.
//!
//! Kernels say what they are with [`span`]; while nothing is recorded that is one load of a flag. [`record`] gathers the spans of
//! all threads while something runs.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The name of matrix products with weights, wherever they are.
pub const PRODUCTS: &str = "products";

static ON: AtomicBool = AtomicBool::new(false);
static RECORDING: Mutex<()> = Mutex::new(());
static THREADS: Mutex<Vec<Arc<Mutex<Vec<Timed>>>>> = Mutex::new(Vec::new());

thread_local! {
    static MINE: RefCell<Option<Arc<Mutex<Vec<Timed>>>>> = const { RefCell::new(None) };
    static CURRENT: Cell<&'static str> = const { Cell::new("") };
}

/// What a span is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A step of the computation, on the thread that asked for it.
    Step,
    /// A thread's share of a step.
    Share,
}

#[derive(Clone, Copy)]
struct Timed {
    name: &'static str,
    kind: Kind,
    start: Instant,
    end: Instant,
}

/// A span, from the start of the recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it is of.
    pub name: &'static str,
    /// Step or share.
    pub kind: Kind,
    /// Number of the thread, the recording one first.
    pub thread: usize,
    /// When it began.
    pub start: Duration,
    /// When it ended.
    pub end: Duration,
}

/// What was recorded.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// How long all of it took.
    pub wall: Duration,
    /// The spans, by thread and start; of two that start together the longer first.
    pub events: Vec<Event>,
}

/// The time of steps of one name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Total {
    /// The name.
    pub name: &'static str,
    /// How many steps there were.
    pub count: usize,
    /// Their time without that of steps within them, seconds.
    pub seconds: f64,
    /// The time that threads spent on their shares, summed over threads, seconds.
    pub busy: f64,
}

/// Until it is dropped, time on this thread belongs to `name`.
#[must_use = "a span lasts until it is dropped"]
pub fn span(name: &'static str) -> Span {
    if !ON.load(Ordering::Relaxed) {
        return Span(None);
    }
    let before = CURRENT.replace(name);
    Span(Some(Open { name, kind: Kind::Step, start: Instant::now(), before }))
}

/// What the calling thread is doing, to be told to those that help it.
pub(crate) fn current() -> &'static str {
    if ON.load(Ordering::Relaxed) { CURRENT.get() } else { "" }
}

/// This thread's share of a step.
pub(crate) fn share(name: &'static str) -> Span {
    if !ON.load(Ordering::Relaxed) {
        return Span(None);
    }
    let before = CURRENT.replace(name);
    Span(Some(Open { name, kind: Kind::Share, start: Instant::now(), before }))
}

/// A span that is not over; made by [`span`].
pub struct Span(Option<Open>);

struct Open {
    name: &'static str,
    kind: Kind,
    start: Instant,
    before: &'static str,
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(open) = self.0.take() else { return };
        CURRENT.set(open.before);
        let timed = Timed { name: open.name, kind: open.kind, start: open.start, end: Instant::now() };
        MINE.with_borrow_mut(|mine| {
            let mine = mine.get_or_insert_with(|| {
                let new = Arc::new(Mutex::new(Vec::with_capacity(1 << 12)));
                locked(&THREADS).push(new.clone());
                new
            });
            locked(mine).push(timed);
        });
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` and records it. One recording runs at a time, others wait; spans of threads that work on something else meanwhile
/// are in it too.
pub fn record<R>(work: impl FnOnce() -> R) -> (R, Profile) {
    let _alone = locked(&RECORDING);
    locked(&THREADS).iter().for_each(|thread| locked(thread).clear());
    ON.store(true, Ordering::Relaxed);
    let start = Instant::now();
    // So that this thread has a list, and a number.
    drop(span(""));
    let result = work();
    let wall = start.elapsed();
    ON.store(false, Ordering::Relaxed);
    let own = MINE.with_borrow(Clone::clone);
    let mut events = Vec::new();
    let threads = locked(&THREADS).clone();
    let is_own = |list: &Arc<Mutex<Vec<Timed>>>| own.as_ref().is_some_and(|own| Arc::ptr_eq(own, list));
    let (mine, others): (Vec<_>, Vec<_>) = threads.iter().partition(|list| is_own(list));
    let lists = mine.into_iter().chain(others).filter(|list| !locked(list).is_empty());
    for (thread, list) in lists.enumerate() {
        for timed in locked(list).iter().filter(|timed| !timed.name.is_empty()) {
            let since = |at: Instant| at.saturating_duration_since(start).min(wall);
            let (start, end) = (since(timed.start), since(timed.end));
            events.push(Event { name: timed.name, kind: timed.kind, thread, start, end });
        }
    }
    events.sort_by_key(|event| (event.thread, event.start, std::cmp::Reverse(event.end)));
    (result, Profile { wall, events })
}

impl Profile {
    /// Time by name, the longest first. What is left of [`wall`](Profile::wall) is time outside any step.
    pub fn totals(&self) -> Vec<Total> {
        let mut totals: Vec<Total> = Vec::new();
        let mut add = |name: &'static str, count: usize, seconds: f64, busy: f64| match totals
            .iter_mut()
            .find(|total| total.name == name)
        {
            Some(total) => {
                total.count += count;
                total.seconds += seconds;
                total.busy += busy;
            }
            None => totals.push(Total { name, count, seconds, busy }),
        };
        // Steps that the present one lies in, on the same thread.
        let mut open: Vec<&Event> = Vec::new();
        for event in &self.events {
            let seconds = event.end.saturating_sub(event.start).as_secs_f64();
            match event.kind {
                Kind::Share => add(event.name, 0, 0.0, seconds),
                Kind::Step => {
                    while open.last().is_some_and(|o| o.thread != event.thread || o.end <= event.start) {
                        open.pop();
                    }
                    if let Some(around) = open.last() {
                        add(around.name, 0, -seconds, 0.0);
                    }
                    add(event.name, 1, seconds, 0.0);
                    open.push(event);
                }
            }
        }
        totals.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool;

    fn event(name: &'static str, kind: Kind, thread: usize, start: u64, end: u64) -> Event {
        Event { name, kind, thread, start: Duration::from_secs(start), end: Duration::from_secs(end) }
    }

    #[test]
    fn the_time_of_a_step_is_without_those_within() {
        let events = vec![
            event("head", Kind::Step, 0, 0, 10),
            event(PRODUCTS, Kind::Step, 0, 1, 5),
            event(PRODUCTS, Kind::Share, 0, 1, 5),
            event(PRODUCTS, Kind::Step, 0, 5, 8),
            event("norm", Kind::Step, 0, 10, 11),
            event(PRODUCTS, Kind::Share, 1, 2, 5),
        ];
        let totals = Profile { wall: Duration::from_secs(12), events }.totals();
        let of = |name| *totals.iter().find(|total| total.name == name).unwrap();
        assert_eq!(of(PRODUCTS), Total { name: PRODUCTS, count: 2, seconds: 7.0, busy: 7.0 });
        assert_eq!(of("head"), Total { name: "head", count: 1, seconds: 3.0, busy: 0.0 });
        assert_eq!(of("norm").seconds, 1.0);
        assert_eq!(totals[0].name, PRODUCTS);
    }

    #[test]
    fn what_threads_do_is_recorded_under_what_they_help_with() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let ((), profile) = pool.install(|| {
            record(|| {
                let _span = span("outer");
                let _inner = span("inner");
                pool::for_each(64, |_| std::thread::sleep(Duration::from_micros(50)));
            })
        });
        let steps: Vec<_> = profile.events.iter().filter(|e| e.kind == Kind::Step).map(|e| e.name).collect();
        assert_eq!(steps, ["outer", "inner"]);
        let shares: Vec<_> = profile.events.iter().filter(|e| e.kind == Kind::Share).collect();
        assert!(!shares.is_empty() && shares.iter().all(|e| e.name == "inner" && e.end <= profile.wall));
        // And nothing when nothing records.
        drop(span("outside"));
        let ((), empty) = record(|| ());
        assert!(empty.events.iter().all(|event| event.name != "outside"));
    }
}
