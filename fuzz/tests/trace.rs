//! The reader of routing traces: any bytes are a sound trace or an error of one line.

#![allow(clippy::unwrap_used)]

use senmon_fuzz::fuzz;
use senmon_insight::{About, EMPTY, InsightError, LayerTrace, NONE, Trace};

/// An error without its numbers and names.
fn word(error: &InsightError) -> String {
    let text = error.to_string();
    assert!(!text.is_empty() && text.lines().count() == 1 && text.len() < 2000, "{text:?}");
    let (kind, what) = match error {
        InsightError::Trace { what } => ("trace", what),
        InsightError::Tensor { what, .. } => ("tensor", what),
        other => return format!("{other:?}"),
    };
    let plain = what.chars().filter(|c| c.is_ascii_lowercase() || *c == ' ').take(40);
    [kind, " "].into_iter().map(str::to_owned).chain(plain.map(String::from)).collect()
}

fn read(bytes: &[u8]) -> String {
    let trace = match Trace::from_bytes(bytes) {
        Ok(trace) => trace,
        Err(e) => return word(&e),
    };
    trace.validate().expect("what was read is sound");
    // Bytes rather than values: a number that is none is not equal to itself.
    let again = written(&trace);
    assert!(written(&Trace::from_bytes(&again).expect("what was written can be read")) == again);
    format!("{} {}", trace.len(), trace.layers.len())
}

/// The bytes of a trace's file.
fn written(trace: &Trace) -> Vec<u8> {
    let mut bytes = Vec::new();
    trace.write_to(&mut bytes).expect("memory takes everything");
    bytes
}

/// Short traces, so that damage meets every field.
fn seeds() -> Vec<Vec<u8>> {
    let about = |domains: &[&str]| About {
        model: "0a".into(),
        router: "switch".into(),
        domains: domains.iter().map(|name| (*name).to_owned()).collect(),
    };
    let mut trace = Trace {
        about: about(&["text", "rs"]),
        tokens: vec![1, 2],
        sequence: vec![0, 0],
        position: vec![0, 1],
        targets: vec![2, NONE],
        predicted: vec![2, NONE],
        loss: vec![0.5, f32::NAN],
        domains: vec![0, 1],
        ..Trace::default()
    };
    let plain = written(&trace);
    let layer = LayerTrace {
        name: Some("encoder.1".into()),
        count: Some(3),
        top_k: 1,
        experts: vec![2, EMPTY],
        weights: vec![0.25, 0.0],
        dropped: vec![0, 1],
        logits: Some(vec![1.0, 2.0, f32::NAN, 0.0, 0.0, 0.0]),
    };
    trace.layers.insert(1, layer);
    let empty = Trace { about: about(&[]), ..Trace::default() };
    vec![plain, written(&trace), written(&empty)]
}

#[test]
fn any_bytes_are_a_trace_or_an_error_of_one_line() {
    fuzz("trace", &seeds(), 150_000, read);
}
