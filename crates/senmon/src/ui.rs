//! What people see: progress on standard error, and only on a terminal where it moves.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use senmon_data::Progress;
use senmon_models::inspect::short;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The first Ctrl-C asks for an orderly end, the second ends at once.
pub fn catch_interrupts() {
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!("\nending the step and saving; once more to end at once");
    });
}

/// Ctrl-C ends an answer; where none is given, the program.
pub fn catch_interrupts_of_answers() {
    let _ = ctrlc::set_handler(|| {
        if !ANSWERING.load(Ordering::SeqCst) || INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    });
}

/// Ctrl-C ends a work that leaves nothing behind.
pub fn catch_interrupts_of_work() {
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    });
}

/// Shows how many bytes are done.
pub struct ByteProgress(Option<ProgressBar>);

impl ByteProgress {
    /// Nothing is shown when `quiet`, or where standard error is no terminal.
    pub fn new(quiet: bool, what: &str) -> Self {
        let bar = (!quiet && on_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let form = "{msg} {wide_bar} {bytes}/{total_bytes} {eta}";
            let style = ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style);
            bar.set_message(what.to_owned());
            bar
        });
        Self(bar)
    }

    /// So many are done, of so many.
    pub fn at(&self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// Takes the bar away.
    pub fn done(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Shows downloads: a bar for each file on a terminal, a line elsewhere.
pub struct HubProgress {
    quiet: bool,
    file: Mutex<Option<(String, ByteProgress)>>,
}

impl HubProgress {
    /// Nothing is shown when `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, file: Mutex::default() }
    }

    /// Takes the bar away.
    pub fn done(&self) {
        if let Some((_, bar)) = self.file.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.done();
        }
    }
}

impl senmon_hub::Progress for HubProgress {
    fn at(&self, file: &str, done: u64, total: u64) {
        if self.quiet {
            return;
        }
        let mut shown = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.as_ref().is_none_or(|(name, _)| name != file) {
            if let Some((_, bar)) = shown.take() {
                bar.done();
            }
            if !on_terminal() {
                eprintln!("downloading {file}, {}B", short(total));
            }
            *shown = Some((file.to_owned(), ByteProgress::new(self.quiet, file)));
        }
        if let Some((_, bar)) = &*shown {
            bar.at(done, total);
        }
    }

    fn note(&self, text: &str) {
        if !self.quiet {
            self.done();
            eprintln!("note: {text}");
        }
    }
}

/// An answer is given.
pub static ANSWERING: AtomicBool = AtomicBool::new(false);

/// Standard error is a terminal.
pub fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// Shows the stages of opening a data set.
pub struct DataProgress {
    quiet: bool,
    bar: Mutex<Option<ProgressBar>>,
}

impl DataProgress {
    /// Nothing is shown when `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, bar: Mutex::default() }
    }

    /// Takes the bar away.
    pub fn done(&self) {
        if let Some(bar) = self.bar.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.finish_and_clear();
        }
    }
}

/// A bar for passes over something.
pub struct Passes {
    bar: Option<ProgressBar>,
}

impl Passes {
    /// Nothing is shown when `quiet`; where there is no terminal only what is done.
    pub fn new(quiet: bool, what: &'static str) -> Self {
        if quiet {
            return Self { bar: None };
        }
        if !on_terminal() {
            eprintln!("{what}");
            return Self { bar: None };
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}") {
            bar.set_style(style);
        }
        bar.set_message(what);
        Self { bar: Some(bar) }
    }

    /// `done` of `all`.
    pub fn show(&self, done: usize, all: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        }
    }

    /// Takes the bar away.
    pub fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for DataProgress {
    fn stage(&self, name: &str, total: Option<u64>) {
        self.done();
        if self.quiet {
            return;
        }
        if !on_terminal() {
            eprintln!("{name}");
            return;
        }
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let form = if total.is_some() { "{msg} {wide_bar} {percent}% {eta}" } else { "{spinner} {msg}" };
        bar.set_style(ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        *self.bar.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar);
    }

    fn advance(&self, n: u64) {
        if let Some(bar) = &*self.bar.lock().unwrap_or_else(PoisonError::into_inner) {
            bar.inc(n);
        }
    }

    fn cancelled(&self) -> bool {
        INTERRUPTED.load(Ordering::Relaxed)
    }
}

/// The greatest memory that this process has held, in bytes, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The middle of several figures.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}
