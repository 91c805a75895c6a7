//! Progress for people: a bar on a terminal, a line every few seconds elsewhere. It writes to what it is handed.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::alarms::Alarm;
use crate::error::{Result, TrainError};
use crate::observer::{EvalRecord, Observer, RunInfo, StepRecord, Summary};
use crate::schedule::{Limits, TimeLeft, TrainingClock};

/// Shows a run to people.
pub struct Terminal<W> {
    out: Out<W>,
    limits: Limits,
    clock: TrainingClock,
    loss: Smoothed,
    /// Seconds per token.
    time: Smoothed,
    left: TimeLeft,
}

enum Out<W> {
    Bar(ProgressBar),
    Lines { out: W, every: Duration, last: Option<Instant> },
}

/// A running mean whose first values count as much as they should.
#[derive(Default)]
struct Smoothed {
    sum: f64,
    weight: f64,
}

/// How much of a running mean is older than the newest value.
const MEMORY: f64 = 0.95;
/// The bar's length; it shows progress, whatever that is measured in.
const TICKS: u64 = 10_000;

impl Smoothed {
    fn add(&mut self, value: f64) {
        if value.is_finite() {
            self.sum = MEMORY * self.sum + value;
            self.weight = MEMORY * self.weight + 1.0;
        }
    }

    fn value(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

impl Terminal<std::io::Sink> {
    /// A progress bar on `target`.
    pub fn bar(target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(Some(TICKS), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {percent:>3} %  {msg}") {
            bar.set_style(style);
        }
        Self::new(Out::Bar(bar))
    }
}

impl<W: Write> Terminal<W> {
    /// Plain lines to `out`, one at most every `every`, for logs and pipes.
    pub fn lines(out: W, every: Duration) -> Self {
        Self::new(Out::Lines { out, every, last: None })
    }

    fn new(out: Out<W>) -> Self {
        Self {
            out,
            limits: Limits::default(),
            clock: TrainingClock::resume(0.0),
            loss: Smoothed::default(),
            time: Smoothed::default(),
            left: TimeLeft::default(),
        }
    }

    /// A line that stays.
    fn say(&mut self, line: &str) -> Result<()> {
        match &mut self.out {
            Out::Bar(bar) => {
                bar.println(line);
                Ok(())
            }
            Out::Lines { out, .. } => {
                writeln!(out, "{line}").and_then(|()| out.flush()).map_err(TrainError::Show)
            }
        }
    }

    /// "loss 3.412 · 12.3k tokens/s · load CV 0.21 (layer 3) · 2 min 5 s left"
    fn status(&mut self, record: &StepRecord, progress: f64) -> String {
        let mut parts = vec![format!("loss {:.3}", self.loss.value().unwrap_or(record.loss))];
        if let Some(time) = self.time.value() {
            parts.push(format!("{} tokens/s", short(1.0 / time)));
        }
        let worst = record.layers.iter().max_by(|a, b| a.load_cv.total_cmp(&b.load_cv));
        if let Some(worst) = worst {
            parts.push(format!("load CV {:.2} (layer {})", worst.load_cv, worst.layer));
        }
        let dead: usize = record.layers.iter().map(|l| l.dead).sum();
        if dead > 0 {
            parts.push(format!("{dead} idle experts"));
        }
        if let Some(left) = self.left.at(progress) {
            parts.push(format!("{} left", duration(left)));
        }
        parts.join(" · ")
    }
}

impl<W: Write> Observer for Terminal<W> {
    fn started(&mut self, info: &RunInfo) -> Result<()> {
        self.limits = info.limits;
        self.clock = TrainingClock::resume(info.seconds_before);
        let mut line = format!(
            "{} parameters, {} active per token; {} tokens a step; {} {}",
            short(info.parameters as f64),
            short(info.active_parameters as f64),
            short(info.tokens_per_step as f64),
            info.threads,
            if info.threads == 1 { "thread" } else { "threads" },
        );
        if let Some(step) = info.resumed_from {
            line += &format!("; going on after step {step}");
        }
        self.say(&line)
    }

    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.loss.add(record.loss);
        // Times can be averaged, speeds cannot.
        self.time.add(1.0 / record.tokens_per_second);
        let progress = self.limits.progress(record.step, record.tokens, self.clock.elapsed());
        let status = self.status(record, progress);
        match &mut self.out {
            Out::Bar(bar) => {
                bar.set_position((progress * TICKS as f64) as u64);
                bar.set_message(status);
                Ok(())
            }
            Out::Lines { every, last, .. } => {
                if last.is_some_and(|t| t.elapsed() < *every) {
                    return Ok(());
                }
                *last = Some(Instant::now());
                self.say(&format!("step {} ({:.0} %): {status}", record.step, 100.0 * progress))
            }
        }
    }

    fn evaluated(&mut self, record: &EvalRecord) -> Result<()> {
        self.say(&format!(
            "step {}: held-out loss {:.4}, {:.4} bits per byte",
            record.step, record.eval_loss, record.bits_per_byte
        ))
    }

    fn alarm(&mut self, alarm: &Alarm) -> Result<()> {
        self.say(&format!("step {}: ALARM: {}; {}", alarm.step, alarm.message, alarm.remedy))
    }

    fn saved(&mut self, step: u64, path: &Path) -> Result<()> {
        match self.out {
            // On a terminal it would only push the rest out of sight.
            Out::Bar(_) => Ok(()),
            Out::Lines { .. } => self.say(&format!("step {step}: saved {}", path.display())),
        }
    }

    fn finished(&mut self, _summary: &Summary) -> Result<()> {
        if let Out::Bar(bar) = &self.out {
            bar.finish_and_clear();
        }
        Ok(())
    }
}

/// 1234567 as "1.23M".
pub fn short(x: f64) -> String {
    for (unit, suffix) in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")] {
        // What rounds up to the unit is written in it.
        if x.abs() >= 0.9995 * unit {
            let y = x / unit;
            let digits = if y.abs() < 9.995 {
                2
            } else if y.abs() < 99.95 {
                1
            } else {
                0
            };
            return format!("{y:.digits$}{suffix}");
        }
    }
    format!("{x:.0}")
}

/// "3 h 20 min", "2 min 5 s", "12 s".
pub fn duration(d: Duration) -> String {
    let seconds = d.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::{Ending, LayerStats};
    use indicatif::{InMemoryTerm, TermLike};

    fn info(limits: Limits) -> RunInfo {
        RunInfo {
            parameters: 2_345_678,
            active_parameters: 1_123_456,
            training_tokens: None,
            tokens_per_step: 4096,
            limits,
            resumed_from: Some(7),
            seconds_before: 30.0,
            threads: 2,
        }
    }

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: 3.25,
            tokens_per_second: 12_345.0,
            layers: vec![LayerStats::from_counts(0, &[4, 4], 0), LayerStats::from_counts(3, &[8, 0], 0)],
            ..StepRecord::default()
        }
    }

    fn summary() -> Summary {
        Summary {
            ending: Ending::Done,
            steps: 10,
            tokens: 10,
            seconds: 1.0,
            tokens_per_second: 1.0,
            eval: None,
        }
    }

    fn run(observer: &mut impl Observer) {
        observer.started(&info(Limits { steps: Some(10), ..Limits::default() })).unwrap();
        for step in 8..=9 {
            observer.step(&record(step)).unwrap();
        }
        observer.evaluated(&EvalRecord { step: 9, eval_loss: 2.0, ..EvalRecord::default() }).unwrap();
        observer.saved(9, Path::new("run/checkpoints/step-00000009")).unwrap();
        observer.finished(&summary()).unwrap();
    }

    #[test]
    fn plain_lines() {
        let mut text = Vec::new();
        run(&mut Terminal::lines(&mut text, Duration::ZERO));
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            "2.35M parameters, 1.12M active per token; 4.10k tokens a step; 2 threads; going on after step 7"
        );
        assert_eq!(
            lines[1],
            "step 8 (80 %): loss 3.250 · 12.3k tokens/s · load CV 1.00 (layer 3) · 1 idle experts"
        );
        assert!(
            lines[2].starts_with("step 9 (90 %): loss 3.250") && lines[2].ends_with("left"),
            "{}",
            lines[2]
        );
        assert!(lines[3].contains("held-out loss 2.0000") && lines[4].contains("step-00000009"), "{text}");
        assert!(!text.contains('\x1b'));

        let mut text = Vec::new();
        run(&mut Terminal::lines(&mut text, Duration::from_secs(1000)));
        assert_eq!(String::from_utf8(text).unwrap().lines().count(), 4);
    }

    #[test]
    fn a_bar() {
        let term = InMemoryTerm::new(10, 120);
        let mut bar = Terminal::bar(ProgressDrawTarget::term_like(Box::new(term.clone())));
        bar.started(&info(Limits { steps: Some(10), ..Limits::default() })).unwrap();
        bar.step(&record(5)).unwrap();
        std::thread::sleep(Duration::from_millis(120));
        bar.step(&record(5)).unwrap();
        let shown = term.contents();
        assert!(shown.contains("2.35M parameters") && shown.contains("50 %  loss 3.250"), "{shown}");
        bar.finished(&summary()).unwrap();
        assert!(!term.contents().contains("50 %"), "{}", term.contents());
        assert_eq!(term.width(), 120);
    }

    #[test]
    fn a_closed_pipe_is_an_error() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut terminal = Terminal::lines(Closed, Duration::ZERO);
        assert!(matches!(terminal.step(&record(1)), Err(TrainError::Show(_))));
    }

    #[test]
    fn numbers_for_people() {
        for (x, text) in [
            (0.0, "0"),
            (999.0, "999"),
            (999.7, "1.00k"),
            (1234.0, "1.23k"),
            (12_345.0, "12.3k"),
            (999_600.0, "1.00M"),
            (2.5e9, "2.50G"),
        ] {
            assert_eq!(short(x), text);
        }
        for (s, text) in [(5, "5 s"), (65, "1 min 5 s"), (7260, "2 h 1 min")] {
            assert_eq!(duration(Duration::from_secs(s)), text);
        }
    }
}
