//! Traces in files: what is written comes back, and what is damaged is refused in one line.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use senmon_insight::{About, EMPTY, LayerTrace, NONE, Trace};
use std::collections::BTreeMap;

/// A trace of `n` tokens with layers of (number, experts, K, with logits, with a name), everything from `seed`.
fn trace(seed: u64, n: usize, layers: &[(usize, usize, usize, bool, bool)]) -> Trace {
    let mut state = seed;
    let mut draw = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let mut of = |count: usize, below: u32| -> Vec<u32> { (0..count).map(|_| draw() % below).collect() };
    let ids = |all: Vec<u32>| -> Vec<u16> { all.into_iter().map(|id| id as u16).collect() };
    let numbers = |all: Vec<u32>| -> Vec<f32> { all.into_iter().map(|x| x as f32 / 7.0 - 3.0).collect() };
    let tokens = of(n, 50_000);
    let mut made = BTreeMap::new();
    for (l, count, k, logits, named) in layers {
        // The last id stands for a slot that a capacity emptied.
        let mut experts = ids(of(n * k, *count as u32 + 1));
        let mut weights = numbers(of(n * k, 100));
        let mut dropped = vec![0; n * k];
        for (slot, expert) in experts.iter_mut().enumerate().filter(|(_, id)| usize::from(**id) == *count) {
            (*expert, weights[slot], dropped[slot]) = (EMPTY, 0.0, (slot % 2) as u8);
        }
        let layer = LayerTrace {
            name: named.then(|| format!("decoder.{l}")),
            count: Some(*count),
            top_k: *k,
            experts,
            weights,
            dropped,
            logits: logits.then(|| numbers(of(n * count, 1000))),
        };
        made.insert(*l, layer);
    }
    Trace {
        about: About {
            model: "0123".into(),
            router: "topk_pre".into(),
            domains: vec!["text".into(), "\"漢\n".into()],
        },
        sequence: of(n, 3),
        position: of(n, 2048),
        targets: of(n, 3).into_iter().map(|x| if x == 0 { NONE } else { x }).collect(),
        predicted: of(n, 50_000),
        loss: numbers(of(n, 100)),
        domains: ids(of(n, 2)),
        documents: Vec::new(),
        tokens,
        layers: made,
    }
}

fn bytes(trace: &Trace) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    trace.write(&path).unwrap();
    assert_eq!(&Trace::read(&path).unwrap(), trace);
    std::fs::read(path).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_trace_comes_back(
        seed in any::<u64>(),
        n in 0usize..40,
        layers in prop::collection::vec((1usize..9, 1usize..4, any::<bool>(), any::<bool>()), 0..4),
    ) {
        let layers: Vec<_> = layers
            .into_iter()
            .enumerate()
            .map(|(l, (count, k, logits, named))| (3 * l + 1, count, k, logits, named))
            .collect();
        let trace = trace(seed, n, &layers);
        let first = bytes(&trace);
        prop_assert_eq!(&first, &bytes(&trace));
        let header = u64::from_le_bytes(first[..8].try_into().unwrap());
        prop_assert!(header.is_multiple_of(8));
    }

    #[test]
    fn any_damage_is_an_error_of_one_line_or_a_sound_trace(
        seed in any::<u64>(),
        places in prop::collection::vec((any::<u16>(), any::<u8>()), 1..6),
        length in any::<u16>(),
        shorten in any::<bool>(),
    ) {
        let mut bytes = bytes(&trace(seed, 5, &[(0, 4, 2, true, false), (2, 3, 1, false, true)]));
        for (at, byte) in places {
            let at = at as usize % bytes.len();
            bytes[at] = byte;
        }
        if shorten {
            bytes.truncate(length as usize % bytes.len());
        }
        match Trace::from_bytes(&bytes) {
            Ok(trace) => prop_assert!(trace.validate().is_ok()),
            Err(e) => prop_assert_eq!(e.to_string().lines().count(), 1),
        }
    }
}

/// NaN, which is not equal to itself, by its bits.
#[test]
fn a_loss_that_is_no_number_keeps_its_bits() {
    let mut with = trace(1, 3, &[]);
    with.loss[1] = f32::NAN;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    with.write(&path).unwrap();
    let bits = |trace: &Trace| trace.loss.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&Trace::read(&path).unwrap()), bits(&with));
}

#[test]
fn traces_that_are_not_sound_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let refused = |change: &dyn Fn(&mut Trace), words: &[&str]| {
        let mut trace = trace(3, 4, &[(1, 4, 2, false, false)]);
        let layer = trace.layers.get_mut(&1).unwrap();
        (layer.experts[0], layer.dropped[0]) = (1, 0);
        change(&mut trace);
        let error = trace.write(&path).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)) && error.lines().count() == 1, "{error}");
        assert!(!path.exists());
    };
    fn layer(trace: &mut Trace) -> &mut LayerTrace {
        trace.layers.get_mut(&1).unwrap()
    }
    refused(&|t| t.loss.truncate(3), &["t.safetensors", "loss", "3 elements", "expected 4"]);
    refused(&|t| t.domains[2] = 9, &["domains", "domain 9"]);
    refused(&|t| layer(t).weights.truncate(7), &["weights.1", "7"]);
    refused(&|t| layer(t).dropped[0] = 1, &["dropped.1", "token 0"]);
    refused(&|t| layer(t).weights[0] = f32::NAN, &["weights.1", "NaN"]);
    refused(&|t| (layer(t).experts[0], layer(t).weights[0]) = (EMPTY, 0.5), &["weights.1", "empty slot"]);
    refused(&|t| layer(t).top_k = 0, &["experts.1"]);
}

/// The bytes of a trace whose header is changed as a text.
fn rewritten(from: &str, to: &str) -> Vec<u8> {
    let whole = bytes(&trace(3, 4, &[(1, 4, 2, true, false)]));
    let end = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&whole[8..end]).unwrap();
    assert!(header.contains(from), "{header}");
    let header = header.replace(from, to);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &whole[end..]].concat()
}

#[test]
fn files_that_are_not_traces_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let refused = |bytes: &[u8], words: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Trace::read(&path).unwrap_err().to_string();
        let words = words.iter().chain(&["t.safetensors"]);
        assert!(words.clone().all(|word| error.contains(word)) && error.lines().count() == 1, "{error}");
    };
    refused(b"", &["not a whole safetensors file"]);
    refused(&rewritten("\"predicted\"", "\"elsewhere\""), &["predicted", "is missing"]);
    refused(&rewritten("\"router\"", "\"routes\""), &["`router`", "no trace"]);
    refused(&rewritten("\"layers\":\"[1]\"", "\"layers\":\"[7]\""), &["experts.7", "is missing"]);
    refused(&rewritten("\"layers\":\"[1]\"", "\"layers\":\"[]\""), &["metadata `experts`", "0 layers"]);
    refused(&rewritten("\"layers\":\"[1]\"", "\"layers\":\"?\""), &["`layers`", "JSON list"]);
    refused(&rewritten("\"dtype\":\"U16\"", "\"dtype\":\"I16\""), &["has type I16", "expected U16"]);
    refused(&rewritten("\"shape\":[4,2]", "\"shape\":[2,4]"), &["experts.1"]);
    refused(&rewritten("\"logits.1\"", "\"lo\\ngits\""), &["lo\\ngits", "not part of a trace"]);
    let whole = bytes(&trace(3, 4, &[(1, 4, 2, false, false)]));
    refused(&whole[..whole.len() - 1], &["not a whole safetensors file"]);
    let missing = Trace::read(&dir.path().join("none")).unwrap_err().to_string();
    assert!(missing.contains("cannot read") && missing.contains("none"), "{missing}");
}
