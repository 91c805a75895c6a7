//! Traces of text through a model, run again as they are and with experts switched off.

#![allow(clippy::unwrap_used)]

mod common;

use common::{config, create, newest_bytes, train, write_corpus};
use senmon_insight::replay::{Capacity, Drop, Scenario, choices_of};
use senmon_insight::statistics::saturation;
use senmon_insight::{About, EMPTY, Trace};
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::params::initial_values;
use senmon_models::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec};
use senmon_moe::RouterConfig;
use senmon_train::eval::{EvalText, evaluate};
use senmon_train::observer::Observers;
use senmon_train::tracing::{losses, record, replayed};
use std::sync::atomic::AtomicBool;

fn spec(kind: &str, normalize: bool) -> ModelSpec {
    let router = RouterConfig { kind: kind.into(), normalize, ..RouterConfig::default() };
    let moe = FfnSpec::Moe(MoeSpec { router, ..MoeSpec::plain(4, 2, MlpSpec::gated(8)) });
    ModelSpec { max_positions: 64, ..ModelSpec::plain(50, 16, AttentionSpec::plain(2, 2, 8), vec![moe; 2]) }
}

/// With weights of a size that makes experts matter.
fn model(spec: &ModelSpec) -> Decoder {
    let mut values = initial_values(spec, 3);
    values.iter_mut().flatten().filter(|w| **w != 1.0).for_each(|w| *w *= 15.0);
    Decoder::new(spec, values, false).unwrap()
}

fn text() -> EvalText {
    let window =
        |i: u32, len: u32| ((0..len).map(|p| (p * p + 7 * i + p * i) % 50).collect(), (i % 2) as u16);
    EvalText {
        documents: Vec::new(),
        windows: (0..9).map(|i| window(i, if i == 4 { 6 } else { 13 })).collect(),
        domains: vec!["a".into(), "b".into()],
        bytes_of_token: vec![2; 50],
    }
}

fn traced(decoder: &Decoder) -> Trace {
    record(decoder, &text(), About::default(), true, &|| false).unwrap().unwrap()
}

#[test]
fn a_trace_has_every_token_with_its_loss() {
    let decoder = model(&spec("topk_pre", true));
    let trace = traced(&decoder);
    assert_eq!((trace.len(), trace.layers.len()), (8 * 12 + 5, 2));
    assert_eq!(trace.about.domains, ["a", "b"]);
    assert!(
        trace.targets.iter().all(|target| *target < 50) && trace.loss.iter().all(|loss| loss.is_finite())
    );
    let of_b = trace.domains.iter().filter(|domain| **domain == 1).count();
    assert_eq!(of_b, 4 * 12);
    // The mean is what evaluation says.
    let mean = trace.loss.iter().map(|loss| f64::from(*loss)).sum::<f64>() / trace.len() as f64;
    let record = evaluate(&decoder, &text(), 4, 0, 0, &|| false).unwrap().unwrap();
    assert!((mean / record.eval_loss - 1.0).abs() < 1e-5, "{mean}, {}", record.eval_loss);
    for (number, name) in ["a", "b"].into_iter().enumerate() {
        let own = trace.loss.iter().zip(&trace.domains).filter(|(_, domain)| usize::from(**domain) == number);
        let own: Vec<f64> = own.map(|(loss, _)| f64::from(*loss)).collect();
        let found = &record.domains[name];
        let mean = own.iter().sum::<f64>() / own.len() as f64;
        assert_eq!(found.tokens, own.len() as u64);
        assert!((mean / found.loss - 1.0).abs() < 1e-5, "{name}: {mean}, {}", found.loss);
    }
    assert!(
        senmon_train::tracing::record(&decoder, &text(), About::default(), false, &|| true)
            .unwrap()
            .is_none()
    );
}

#[test]
fn windows_without_anything_to_predict_are_passed_over_and_domains_have_names() {
    let decoder = model(&spec("topk_pre", true));
    let plain = evaluate(&decoder, &text(), 4, 0, 0, &|| false).unwrap().unwrap();
    let mut more = text();
    more.windows.insert(0, (Vec::new(), 1));
    more.windows.insert(5, (vec![3], 0));
    more.windows.push((vec![3], 1));
    // The same groups of windows, whole ones among them: the same bits.
    let again = evaluate(&decoder, &more, 1, 0, 0, &|| false).unwrap().unwrap();
    let alone = evaluate(&decoder, &text(), 1, 0, 0, &|| false).unwrap().unwrap();
    assert_eq!((again.eval_loss, again.eval_tokens), (alone.eval_loss, plain.eval_tokens));
    assert_eq!(again.domains["b"].loss, alone.domains["b"].loss);
    more.windows[3].1 = 2;
    let refused = evaluate(&decoder, &more, 4, 0, 0, &|| false).unwrap_err().to_string();
    assert!(refused.contains("domain 2"), "{refused}");
}

#[test]
fn run_again_with_its_own_experts_a_trace_comes_out_the_same() {
    let decoder = model(&spec("topk_post", true));
    let trace = traced(&decoder);
    let chosen = choices_of(&trace, &Scenario::default()).unwrap();
    let again = replayed(&decoder, &trace, &chosen, &|| false).unwrap().unwrap();
    assert_eq!(again.loss, trace.loss);
    for (l, layer) in &trace.layers {
        assert_eq!((&again.layers[l].experts, &again.layers[l].weights), (&layer.experts, &layer.weights));
    }
    // Other experts give another loss, and so does one expert of the two; all drops are a loss too.
    let mut other = chosen.clone();
    other.values_mut().for_each(|choice| choice.experts.iter_mut().for_each(|e| *e = (*e + 1) % 4));
    assert_ne!(replayed(&decoder, &trace, &other, &|| false).unwrap().unwrap().loss, trace.loss);
    let tight = Scenario {
        capacity: Some(Capacity { factor: 0.5, batch: 12, drop: Drop::Position }),
        ..Scenario::default()
    };
    let tight = choices_of(&trace, &tight).unwrap();
    assert!(tight[&0].experts.contains(&EMPTY));
    let tight = replayed(&decoder, &trace, &tight, &|| false).unwrap().unwrap();
    assert!(tight.loss != trace.loss && tight.loss.iter().all(|loss| loss.is_finite()));
    other.get_mut(&1).unwrap().experts.pop();
    let error = replayed(&decoder, &trace, &other, &|| false).unwrap_err().to_string();
    assert!(error.contains("layer 1 has"), "{error}");
}

#[test]
fn an_expert_switched_off_changes_its_own_tokens_alone() {
    for (kind, normalize) in [("topk_pre", true), ("topk_pre", false), ("topk_post", true)] {
        let spec = spec(kind, normalize);
        let decoder = model(&spec);
        let trace = traced(&decoder);
        let whole = losses(&decoder, &trace, None, &|| false).unwrap().unwrap();
        for (x, y) in whole.iter().zip(&trace.loss) {
            assert!((x - y).abs() <= 1e-4 * y.abs().max(1.0), "{x} and {y}");
        }
        // In the last layer only the tokens that picked it can change.
        let layer = &trace.layers[&1];
        for off in 0..4u16 {
            let without = losses(&decoder, &trace, Some((1, u32::from(off))), &|| false).unwrap().unwrap();
            for (row, (x, y)) in without.iter().zip(&whole).enumerate() {
                let had = layer.experts[2 * row..2 * row + 2].contains(&off);
                assert_eq!(x != y, had, "{kind}, expert {off}, row {row}");
            }
        }
        // Its weight goes to the other: the sum of a token's weights stays.
        let window: Vec<u32> = trace.tokens[..12].to_vec();
        let mut pass = Pass { off: Some((1, 2)), ..Pass::default() };
        let (_, routings) = decoder.forward(&window, 1, &mut pass).unwrap();
        let routing = &routings[1].1;
        let weights = routing.weights.to_vec2::<f32>().unwrap();
        for (row, weights) in weights.iter().enumerate() {
            let before: f32 = layer.weights[2 * row..2 * row + 2].iter().sum();
            assert!((weights.iter().sum::<f32>() - before).abs() < 1e-5);
            assert!(routing.experts[2 * row..2 * row + 2].iter().all(|expert| *expert != 2));
        }
        assert_eq!(routing.load[2], 0);
        assert!(layer.experts.iter().all(|expert| *expert != EMPTY));
    }
}

#[test]
fn a_run_traces_the_same_text_as_it_goes_and_is_none_the_different() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cache) = (dir.path().join("data"), dir.path().join("cache"));
    write_corpus(&data);
    let go = AtomicBool::new(false);
    let mut none = Observers::new();
    let plain = dir.path().join("plain");
    train(create(config(&data, &[]), &plain, &cache).unwrap(), &mut none, &go).unwrap();
    let out = dir.path().join("traced");
    let more = ["train.trace_every=4", "train.trace_tokens=128"];
    train(create(config(&data, &more), &out, &cache).unwrap(), &mut none, &go).unwrap();
    assert!(newest_bytes(&out)["model.safetensors"] == newest_bytes(&plain)["model.safetensors"]);
    let traces: Vec<Trace> = [0, 4, 8, 9]
        .iter()
        .map(|step| Trace::read(&out.join(format!("traces/step-{step:08}.safetensors"))).unwrap())
        .collect();
    assert_eq!(std::fs::read_dir(out.join("traces")).unwrap().count(), 4);
    for trace in &traces {
        assert_eq!((&trace.tokens, trace.len()), (&traces[0].tokens, 128));
    }
    assert_eq!(traces[1].about.model, "step 4");
    // The router settles: the last trace agrees with itself, the first less.
    let with_last = |i: usize| saturation(&traces[i], &traces[3]).unwrap()[0].experts.value.unwrap();
    assert!(with_last(3) == 1.0 && with_last(0) < 1.0);
}
