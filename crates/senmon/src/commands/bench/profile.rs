//! `--profile`: where the time of one run of each case goes, in words and as a trace that a browser opens.

use crate::failure::{Failure, Result};
use senmon_kernels::profile::{Kind, PRODUCTS, Profile, Total};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// A table of each case.
pub(super) fn words(cases: &[(String, Profile)], threads: usize) -> String {
    let mut out = String::new();
    for (name, profile) in cases {
        let wall = profile.wall.as_secs_f64();
        let totals = profile.totals();
        let _ = writeln!(
            out,
            "\n{name}: one run of {:.2} ms\n{:<28} {:>7}  {:>9}  {:>7}  {:>12}",
            1e3 * wall,
            "",
            "steps",
            "ms",
            "of all",
            "threads busy"
        );
        for total in &totals {
            let _ = writeln!(
                out,
                "{:<28} {:>7}  {:>9.2}  {:>5.1} %  {:>12}",
                total.name,
                total.count,
                1e3 * total.seconds,
                100.0 * total.seconds / wall,
                busy(total, threads)
            );
        }
        let outside = outside(profile, &totals);
        let _ = writeln!(
            out,
            "{:<28} {:>7}  {:>9.2}  {:>5.1} %",
            "outside",
            "",
            1e3 * outside,
            100.0 * outside / wall
        );
    }
    out
}

/// Time outside any step, in seconds.
fn outside(profile: &Profile, totals: &[Total]) -> f64 {
    (profile.wall.as_secs_f64() - totals.iter().map(|total| total.seconds).sum::<f64>()).max(0.0)
}

/// The part of the threads' time in these steps in which they worked.
fn busy(total: &Total, threads: usize) -> String {
    match total.busy > 0.0 && total.seconds > 0.0 {
        true => format!("{:.0} %", (100.0 * total.busy / total.seconds / threads as f64).min(100.0)),
        false => "one thread".into(),
    }
}

/// The same for programs.
pub(super) fn json(cases: &[(String, Profile)]) -> Value {
    let case = |(name, profile): &(String, Profile)| {
        let totals = profile.totals();
        let wall = profile.wall.as_secs_f64();
        let products: f64 = totals.iter().filter(|t| t.name == PRODUCTS).map(|t| t.seconds).sum();
        let outside = outside(profile, &totals);
        let steps: Vec<Value> = totals
            .iter()
            .map(|t| json!({"name": t.name, "steps": t.count, "seconds": t.seconds, "busy_seconds": t.busy}))
            .collect();
        json!({
            "name": name, "seconds": wall, "products": products / wall, "outside_seconds": outside, "steps": steps,
        })
    };
    cases.iter().map(case).collect()
}

/// Writes the trace: events of the Trace Event Format, a process for each case, for chrome://tracing and ui.perfetto.dev.
pub(super) fn write(path: &Path, cases: &[(String, Profile)]) -> Result<()> {
    let text = trace(cases).to_string();
    senmon_files::write_whole(path, |to| to.write_all(text.as_bytes()))
        .map_err(|e| Failure::mistake(format!("cannot write {}: {e}", path.display())))
}

/// Numbers of processes are this far apart, and those of threads lie between: browsers take a thread of the same number in two
/// processes for one.
const APART: usize = 1000;

/// Microseconds, for readers that cut what is left of a nanosecond: those of a step's end and of its last share's stay the same.
fn micros(time: Duration) -> f64 {
    (time.as_nanos() as f64 + 0.25) / 1e3
}

fn trace(cases: &[(String, Profile)]) -> Value {
    let mut events = Vec::new();
    for (number, (name, profile)) in cases.iter().enumerate() {
        let process = APART * (number + 1);
        events.push(json!({"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}));
        let threads = profile.events.iter().map(|event| event.thread).max().map_or(0, |last| last + 1);
        for thread in 0..threads {
            let called = if thread == 0 { "the model".into() } else { format!("helper {thread}") };
            events.push(json!({
                "ph": "M", "pid": process, "tid": process + thread, "name": "thread_name", "args": {"name": called},
            }));
        }
        for event in &profile.events {
            events.push(json!({
                "ph": "X", "pid": process, "tid": process + event.thread, "name": event.name,
                "cat": if event.kind == Kind::Step { "step" } else { "share" },
                "ts": micros(event.start), "dur": micros(event.end.saturating_sub(event.start)),
            }));
        }
    }
    json!({"displayTimeUnit": "ms", "traceEvents": events})
}

#[cfg(test)]
mod tests {
    use super::*;
    use senmon_kernels::profile::{record, span};

    fn recorded() -> Vec<(String, Profile)> {
        let ((), profile) = record(|| {
            let _head = span("head");
            let _products = span(PRODUCTS);
            std::thread::sleep(std::time::Duration::from_millis(2));
        });
        vec![("a case".into(), profile)]
    }

    #[test]
    fn a_trace_has_what_browsers_ask_for() {
        let twice = [recorded(), recorded()].concat();
        let trace = trace(&twice);
        let events = trace["traceEvents"].as_array().unwrap();
        let spans: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!(spans.len(), 4);
        assert_eq!((&spans[0]["name"], &spans[1]["name"]), (&json!("head"), &json!(PRODUCTS)));
        // As a browser reads it, in whole nanoseconds: what began within a step ends within it.
        let nanos = |value: &Value| (value.as_f64().unwrap() * 1e3) as u64;
        let end = |event: &Value| nanos(&event["ts"]) + nanos(&event["dur"]);
        assert!(end(spans[1]) <= end(spans[0]));
        let recorded = &twice[0].1.events[0];
        assert_eq!(u128::from(nanos(&spans[0]["ts"])), recorded.start.as_nanos());
        assert_eq!(u128::from(end(spans[0])), recorded.end.as_nanos());
        // A thread of each process.
        assert_ne!(spans[0]["tid"], spans[2]["tid"]);
        assert!(
            events.iter().any(|event| event["name"] == "process_name" && event["args"]["name"] == "a case")
        );
    }

    #[test]
    fn tables_tell_shares() {
        let cases = recorded();
        let text = words(&cases, 2);
        assert!(text.contains("a case: one run of") && text.contains("outside"), "{text}");
        assert!(json(&cases)[0]["products"].as_f64().unwrap() > 0.5);
    }
}
