//! The learning rate of a step, and when a run ends: pure functions of what is in the run's state, so that a resumed
//! run goes on as if it had never stopped.

use std::f64::consts::PI;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The form of a schedule (`[schedule] kind`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Warm-up, then always `lr`.
    Constant,
    /// Warm-up, then half a cosine down to `min_lr` at the end of the run.
    #[default]
    Cosine,
    /// Warm-up, then `lr`, then in the last part of the run a straight line down to `min_lr`.
    Wsd,
}

/// How long the learning rate rises from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// This many steps; step s (from 0) has lr · (s + 1) / n.
    Steps(u64),
    /// This fraction of the run, below 1.
    Fraction(f64),
}

/// The learning rate as a function of the step and of the run's progress.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Its form.
    pub kind: ScheduleKind,
    /// The greatest learning rate.
    pub lr: f64,
    /// The learning rate at the end of the run, for the kinds that go down.
    pub min_lr: f64,
    /// The rise at the start.
    pub warmup: Warmup,
    /// Fraction of the run that `wsd` spends going down.
    pub decay: f64,
    /// Steps of the whole run, where known beforehand (it ends by steps or tokens).
    pub total_steps: Option<u64>,
}

impl Schedule {
    /// The learning rate of optimiser step `step`, counted from 0, that starts at `progress` in \[0, 1\]
    /// ([`Limits::progress`]).
    ///
    /// The cosine begins where the warm-up ends. Where that is not known beforehand (a warm-up in steps, a run that
    /// ends by minutes) it begins at progress 0 and the warm-up multiplies it: still continuous, still between 0 and
    /// `lr`.
    pub fn lr(&self, step: u64, progress: f64) -> f64 {
        let progress = if progress.is_finite() { progress.clamp(0.0, 1.0) } else { 0.0 };
        let (ramp, warm) = match (self.warmup, self.total_steps) {
            (Warmup::Fraction(f), _) if f > 0.0 => ((progress / f).min(1.0), f.min(1.0)),
            (Warmup::Fraction(_) | Warmup::Steps(0), _) => (1.0, 0.0),
            (Warmup::Steps(n), total) => {
                let ramp = (step.saturating_add(1) as f64 / n as f64).min(1.0);
                (ramp, total.map_or(0.0, |t| (n as f64 / t.max(1) as f64).min(1.0)))
            }
        };
        let top = self.lr;
        let down = |fraction: f64| self.min_lr + (top - self.min_lr) * fraction;
        let shape = match self.kind {
            ScheduleKind::Constant => top,
            ScheduleKind::Cosine if progress <= warm => top,
            ScheduleKind::Cosine => down(0.5 * (1.0 + (PI * (progress - warm) / (1.0 - warm)).cos())),
            ScheduleKind::Wsd => {
                let start = (1.0 - self.decay).max(warm);
                if progress <= start { top } else { down((1.0 - progress) / (1.0 - start)) }
            }
        };
        ramp * shape
    }
}

/// When a run ends: at whichever of these comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Optimiser steps.
    pub steps: Option<u64>,
    /// Tokens trained on.
    pub tokens: Option<u64>,
    /// Minutes spent training, over all resumptions.
    pub minutes: Option<f64>,
}

impl Limits {
    /// How much of the run is done, in \[0, 1\]: the furthest of its limits. A run without limits stays at 0.
    pub fn progress(&self, steps: u64, tokens: u64, elapsed: Duration) -> f64 {
        let part = |done: f64, all: f64| if all > 0.0 { (done / all).min(1.0) } else { 1.0 };
        let steps = self.steps.map_or(0.0, |all| part(steps as f64, all as f64));
        let tokens = self.tokens.map_or(0.0, |all| part(tokens as f64, all as f64));
        let minutes = self.minutes.map_or(0.0, |all| part(elapsed.as_secs_f64(), all * 60.0));
        steps.max(tokens).max(minutes)
    }

    /// True if the run is over.
    pub fn reached(&self, steps: u64, tokens: u64, elapsed: Duration) -> bool {
        self.steps.is_some_and(|all| steps >= all)
            || self.tokens.is_some_and(|all| tokens >= all)
            || self.minutes.is_some_and(|all| elapsed.as_secs_f64() >= all * 60.0)
    }

    /// Steps of the whole run, where they are known beforehand; a limit in minutes may cut them short.
    pub fn total_steps(&self, tokens_per_step: u64) -> Option<u64> {
        let by_tokens = self.tokens.map(|t| t.div_ceil(tokens_per_step.max(1)));
        match (self.steps, by_tokens) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}

/// The time spent training, over all resumptions: what the run's state holds, and what has passed since.
#[derive(Clone, Copy, Debug)]
pub struct TrainingClock {
    before: Duration,
    since: Instant,
}

impl TrainingClock {
    /// Goes on from the seconds in a run's state; 0 for a new run. A value that is no time counts as 0.
    pub fn resume(seconds: f64) -> Self {
        Self { before: Duration::try_from_secs_f64(seconds).unwrap_or_default(), since: Instant::now() }
    }

    /// Time spent training up to now.
    pub fn elapsed(&self) -> Duration {
        self.before.saturating_add(self.since.elapsed())
    }

    /// Time spent training since this process took over.
    pub fn this_process(&self) -> Duration {
        self.since.elapsed()
    }
}

/// How long a run still takes, judged by how far it has come since this process took over.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimeLeft {
    /// Progress at the first step of this process, and when that was.
    start: Option<(f64, Instant)>,
}

impl TimeLeft {
    /// The run has come to `progress` in \[0, 1\]; what is left, where that can be told yet.
    pub fn at(&mut self, progress: f64) -> Option<Duration> {
        let (from, since) = *self.start.get_or_insert((progress, Instant::now()));
        let gained = progress - from;
        let seconds = since.elapsed().as_secs_f64() * (1.0 - progress) / gained;
        if gained <= 0.0 { None } else { Duration::try_from_secs_f64(seconds).ok() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cosine(warmup: Warmup, total: Option<u64>) -> Schedule {
        Schedule { kind: ScheduleKind::Cosine, lr: 1.0, min_lr: 0.1, warmup, decay: 0.2, total_steps: total }
    }

    #[test]
    fn known_points() {
        let s = cosine(Warmup::Steps(10), Some(110));
        assert!((s.lr(0, 0.0) - 0.1).abs() < 1e-12);
        assert_eq!(s.lr(9, 9.0 / 110.0), 1.0);
        assert_eq!(s.lr(10, 10.0 / 110.0), 1.0);
        assert!((s.lr(60, 60.0 / 110.0) - 0.55).abs() < 1e-12);
        assert!((s.lr(110, 1.0) - 0.1).abs() < 1e-12);
        let s = Schedule { kind: ScheduleKind::Wsd, ..cosine(Warmup::Fraction(0.1), None) };
        assert_eq!(s.lr(0, 0.05), 0.5);
        assert_eq!(s.lr(0, 0.8), 1.0);
        assert!((s.lr(0, 0.9) - 0.55).abs() < 1e-12);
        assert!((s.lr(0, 1.0) - 0.1).abs() < 1e-12);
        let s = Schedule { kind: ScheduleKind::Constant, ..cosine(Warmup::Steps(0), None) };
        assert_eq!(s.lr(0, 0.0), 1.0);
        assert_eq!(s.lr(1_000_000, 1.0), 1.0);
        // A warm-up that outlasts the run only rises.
        let s = cosine(Warmup::Steps(100), Some(10));
        assert!((s.lr(9, 0.9) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn limits_and_progress() {
        let minute = Duration::from_secs(60);
        let l = Limits { steps: Some(10), tokens: Some(1000), minutes: Some(2.0) };
        assert_eq!(l.progress(0, 0, Duration::ZERO), 0.0);
        assert_eq!(l.progress(1, 0, minute), 0.5);
        assert_eq!(l.progress(1, 900, minute), 0.9);
        assert!(!l.reached(9, 999, minute));
        assert!(l.reached(10, 0, minute) && l.reached(0, 1000, minute) && l.reached(0, 0, 2 * minute));
        assert_eq!(l.total_steps(300), Some(4));
        assert_eq!(Limits { minutes: Some(1.0), ..Limits::default() }.total_steps(1), None);
        assert!(!Limits::default().reached(u64::MAX, u64::MAX, Duration::MAX));
    }

    #[test]
    fn the_clock_goes_on_where_it_stopped() {
        assert!(TrainingClock::resume(90.0).elapsed() >= Duration::from_secs(90));
        for nonsense in [f64::NAN, -1.0, f64::INFINITY] {
            assert!(TrainingClock::resume(nonsense).elapsed() < Duration::from_secs(5));
        }
    }

    fn any_schedule() -> impl Strategy<Value = Schedule> {
        let warmup =
            prop_oneof![(0u64..300).prop_map(Warmup::Steps), (0.0..0.9f64).prop_map(Warmup::Fraction)];
        let kind =
            prop_oneof![Just(ScheduleKind::Constant), Just(ScheduleKind::Cosine), Just(ScheduleKind::Wsd)];
        (kind, 1e-5..1.0f64, 0.0..1.0f64, warmup, 0.01..1.0f64, prop::option::of(1u64..2000)).prop_map(
            |(kind, lr, low, warmup, decay, total_steps)| Schedule {
                kind,
                lr,
                min_lr: lr * low,
                warmup,
                decay,
                total_steps,
            },
        )
    }

    proptest! {
        #[test]
        fn stays_between_zero_and_lr(s in any_schedule(), step in 0u64..5000, p in -0.5..1.5f64) {
            let lr = s.lr(step, p);
            prop_assert!(lr >= 0.0 && lr <= s.lr * (1.0 + 1e-12));
        }

        /// Up to the end of the warm-up it never falls, after it it never rises, and at the end it is min_lr.
        #[test]
        fn rises_then_falls(s in any_schedule(), total in 2u64..600) {
            let s = Schedule { total_steps: Some(total), ..s };
            let warm = match s.warmup {
                Warmup::Steps(n) => n,
                Warmup::Fraction(f) => (f * total as f64).floor() as u64,
            };
            let at = |step: u64| s.lr(step, step as f64 / total as f64);
            for step in 1..total {
                let (a, b) = (at(step - 1), at(step));
                if step < warm {
                    prop_assert!(b >= a - 1e-12, "{step}: {a} {b}");
                } else if step > warm + 1 {
                    prop_assert!(b <= a + 1e-12, "{step}: {a} {b}");
                }
            }
            if s.kind != ScheduleKind::Constant && warm < total {
                prop_assert!((s.lr(total, 1.0) - s.min_lr).abs() < 1e-9);
            }
        }

        /// No jump anywhere: a small step in progress is a small step in the rate.
        #[test]
        fn is_continuous_in_progress(s in any_schedule(), p in 0.0..1.0f64) {
            let warm = match (s.warmup, s.total_steps) {
                (Warmup::Fraction(f), _) => f,
                (Warmup::Steps(n), Some(t)) => (n as f64 / t as f64).min(1.0),
                _ => 0.0,
            };
            // The steepest slope there can be: the ramp, the cosine, or the line down.
            let tail = (1.0 - (1.0 - s.decay).max(warm)).max(1e-3);
            let rise = if let Warmup::Fraction(f) = s.warmup { f.max(1e-3) } else { 1.0 };
            let slope = s.lr * (1.0 / rise + PI / tail + PI / (1.0 - warm).max(1e-3));
            let h = 1e-7;
            let jump = (s.lr(400, p + h) - s.lr(400, p)).abs();
            prop_assert!(jump <= slope * h * 1.01 + 1e-12, "{jump} {slope}");
        }
    }
}
