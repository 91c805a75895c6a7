//! The statistics of a small trace are those that numpy computes (`tools/parity/check_insight.py`, which wrote the golden files).

#![allow(clippy::unwrap_used)]

use senmon_insight::{Trace, replay, statistics};
use serde_json::{Value, json};
use std::path::Path;

const RELATIVE: f64 = 1e-6;
const ABSOLUTE: f64 = 1e-12;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn trace(name: &str) -> Trace {
    Trace::read(&golden(name)).unwrap()
}

fn expected() -> Value {
    serde_json::from_slice(&std::fs::read(golden("statistics.json")).unwrap()).unwrap()
}

/// What of numpy's is otherwise in ours. Whole numbers must be equal. Says how many values were compared.
fn differences(ours: &Value, numpy: &Value, at: &str, found: &mut Vec<String>) -> usize {
    match (ours, numpy) {
        (Value::Object(ours), Value::Object(numpy)) => {
            let one = |(key, value): (&String, &Value)| {
                differences(ours.get(key).unwrap_or(&json!("missing")), value, &format!("{at}.{key}"), found)
            };
            numpy.iter().map(one).sum()
        }
        (Value::Array(ours), Value::Array(numpy)) if ours.len() == numpy.len() => {
            let each = ours.iter().zip(numpy).enumerate();
            each.map(|(i, (a, b))| differences(a, b, &format!("{at}[{i}]"), found)).sum()
        }
        (Value::Number(a), Value::Number(b)) if !b.is_u64() => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            if (a - b).abs() > (RELATIVE * b.abs()).max(ABSOLUTE) {
                found.push(format!("{at}: {a}, numpy {b}"));
            }
            1
        }
        _ => {
            if ours != numpy {
                found.push(format!("{at}: {ours}, numpy {numpy}"));
            }
            1
        }
    }
}

fn check(ours: &Value, numpy: &Value, at: &str) -> usize {
    let mut found = Vec::new();
    let compared = differences(ours, numpy, at, &mut found);
    assert!(
        found.is_empty(),
        "{} of {compared} differ:\n{}",
        found.len(),
        found[..found.len().min(30)].join("\n")
    );
    compared
}

/// Keys of ours that numpy has no value for.
fn uncovered(ours: &Value, numpy: &Value, at: &str, found: &mut Vec<String>) {
    match (ours, numpy) {
        (Value::Object(ours), Value::Object(numpy)) => {
            for (key, value) in ours {
                match numpy.get(key) {
                    Some(numpy) => uncovered(value, numpy, &format!("{at}.{key}"), found),
                    None => found.push(format!("{at}.{key}")),
                }
            }
        }
        (Value::Array(ours), Value::Array(numpy)) => {
            ours.iter().zip(numpy).for_each(|(a, b)| uncovered(a, b, &format!("{at}[]"), found));
        }
        _ => {}
    }
}

#[test]
fn statistics_are_those_of_numpy() {
    let golden = expected();
    let options: statistics::Options = serde_json::from_value(golden["options"].clone()).unwrap();
    let ours = serde_json::to_value(statistics::of(&trace("trace.safetensors"), &options).unwrap()).unwrap();
    let compared = check(&ours, &golden["statistics"], "statistics");
    assert!(compared > 2000, "only {compared} values were compared");
    let mut left = Vec::new();
    uncovered(&ours, &golden["statistics"], "", &mut left);
    left.sort();
    left.dedup();
    // Found by a search; what placements cost is compared.
    let search = [
        ".layers[].placement[].held_out",
        ".layers[].placement[].placement",
        ".layers[].placement[].suggested",
    ];
    assert_eq!(left, search);
}

#[test]
fn saturation_is_that_of_numpy() {
    let found = statistics::saturation(&trace("trace.safetensors"), &trace("later.safetensors")).unwrap();
    check(&serde_json::to_value(found).unwrap(), &expected()["saturation"], "saturation");
}

#[test]
fn replays_are_those_of_numpy() {
    for (at, case) in expected()["replays"].as_array().unwrap().iter().enumerate() {
        let layers: Vec<usize> = serde_json::from_value(case["layers"].clone()).unwrap();
        let scenario: replay::Scenario = serde_json::from_value(case["scenario"].clone()).unwrap();
        let mut trace = trace("trace.safetensors");
        trace.layers.retain(|layer, _| layers.contains(layer));
        let found = replay::replay(&trace, &scenario).unwrap();
        check(&serde_json::to_value(found).unwrap(), &case["replayed"], &format!("replays[{at}]"));
    }
}
