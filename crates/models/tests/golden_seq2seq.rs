//! Encoder-decoders that transformers wrote (`tests/golden`): logits, experts, dropped tokens and greedy continuations.

#![allow(clippy::unwrap_used)]

use safetensors::SafeTensors;
use senmon_models::audit::Audit;
use senmon_models::seq2seq::{self, Seq2Seq};
use senmon_moe::{Routing, RoutingObserver};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const CASES: &[&str] = &[
    "t5-relu-tied-decoder2",
    "t5-gated-head",
    "switch_transformers-within-capacity",
    "switch_transformers-drops-head",
];
const BOUND: f32 = 1e-4;

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// The words of the tensors of a golden file.
fn golden(case: &str) -> BTreeMap<String, Vec<[u8; 4]>> {
    let bytes = std::fs::read(folder(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), view.data().as_chunks::<4>().0.to_vec())).collect()
}

fn ids(words: &[[u8; 4]]) -> Vec<u32> {
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

fn numbers(words: &[[u8; 4]]) -> Vec<f32> {
    words.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

/// Experts, the weights of those that were not dropped, and how many were, by layer.
#[derive(Default)]
struct Seen(BTreeMap<usize, (Vec<u32>, Vec<f32>, usize)>);

impl RoutingObserver for Seen {
    fn routed(&mut self, layer: usize, routing: &Routing) {
        let weights: Vec<f32> = routing.weights.flatten_all().unwrap().to_vec1().unwrap();
        let seen = self.0.entry(layer).or_default();
        let kept = |expert: &u32, weight: f32| if *expert == u32::MAX { 0.0 } else { weight };
        seen.1.extend(routing.experts.iter().zip(weights).map(|(expert, weight)| kept(expert, weight)));
        seen.0.extend(&routing.experts);
        seen.2 += routing.dropped;
    }
}

fn off(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let greatest = |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |a, b| a.max(b.abs()));
    greatest(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / greatest(&mut expected.iter().copied())
}

/// The likeliest tokens after the start, each from all before it at once or over a cache.
fn greedy(model: &Seq2Seq, tokens: &[u32], count: usize, cached: bool) -> Vec<u32> {
    let encoded = model.encode(tokens, None).unwrap();
    let mut text = vec![model.spec().start];
    let mut cache = model.cache();
    for _ in 0..count {
        let logits = match cached {
            true => model.logits(&text[text.len() - 1..], &encoded, &mut cache, true, None).unwrap(),
            false => model.logits(&text, &encoded, &mut model.cache(), true, None).unwrap(),
        };
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        text.push(best as u32);
    }
    text.split_off(1)
}

#[test]
fn encoder_decoders_are_those_of_transformers() {
    for case in CASES {
        let opened = seq2seq::open(&folder(case), Audit::Full).unwrap();
        let (model, golden) = (opened.model, golden(case));
        let (tokens, decoder) = (ids(&golden["tokens"]), ids(&golden["decoder_tokens"]));
        let mut seen = Seen::default();
        let encoded = model.encode(&tokens, Some(&mut seen)).unwrap();
        let logits = model.logits(&decoder, &encoded, &mut model.cache(), false, Some(&mut seen)).unwrap();
        let far = off(&logits, &numbers(&golden["logits"]));
        println!("{case}: {far:.1e} of the largest");
        assert!(far <= BOUND, "{case}: {far}");
        let encoders = model.spec().encoder.len();
        let mut dropped = 0;
        for (layer, (experts, weights, gone)) in &seen.0 {
            let name = match layer.checked_sub(encoders) {
                Some(layer) => format!("decoder.{layer}"),
                None => format!("encoder.{layer}"),
            };
            let wanted = numbers(&golden[&format!("weights.{name}")]);
            assert!(
                weights.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-5),
                "{case} {name}: {weights:?}"
            );
            let picks = ids(&golden[&format!("experts.{name}")]);
            let same =
                experts.iter().zip(&picks).zip(weights).all(|((a, b), weight)| *weight == 0.0 || a == b);
            assert!(same, "{case} {name}: {experts:?}, not {picks:?}");
            dropped += gone;
        }
        assert_eq!(golden.keys().filter(|name| name.starts_with("experts.")).count(), seen.0.len());
        assert_eq!(dropped > 0, case.contains("drops"), "{case}: {dropped} dropped");
        let wanted = ids(&golden["greedy"]);
        assert_eq!(greedy(&model, &tokens, wanted.len(), false), wanted, "{case}");
        let cached = golden.get("greedy_cached").map_or(wanted, |words| ids(words));
        assert_eq!(greedy(&model, &tokens, cached.len(), true), cached, "{case}");
        // Without drops, token by token gives the same bits.
        if dropped == 0 {
            let mut cache = model.cache();
            let step = |token: &u32| model.logits(&[*token], &encoded, &mut cache, false, None).unwrap();
            assert_eq!(decoder.iter().flat_map(step).collect::<Vec<_>>(), logits, "{case}");
        }
    }
}

#[test]
fn broken_encoder_decoders_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let case = folder("switch_transformers-within-capacity");
    let config = std::fs::read_to_string(case.join("config.json")).unwrap();
    let refused = |config: &str, change: &dyn Fn(&mut BTreeMap<String, (Vec<usize>, Vec<u8>)>)| {
        let bytes = std::fs::read(case.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors =
            file.iter().map(|(n, v)| (n.to_owned(), (v.shape().to_vec(), v.data().to_vec()))).collect();
        change(&mut tensors);
        let view = |(shape, bytes): &(Vec<usize>, Vec<u8>)| {
            let (shape, bytes) = (shape.clone(), bytes.clone());
            (shape, bytes)
        };
        let owned: Vec<(String, (Vec<usize>, Vec<u8>))> =
            tensors.iter().map(|(name, tensor)| (name.clone(), view(tensor))).collect();
        let views = owned.iter().map(|(name, (shape, bytes))| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
            (name.clone(), view)
        });
        std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap())
            .unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        seq2seq::open(dir.path(), Audit::Full).map(|_| ()).unwrap_err().to_string()
    };
    let expert = |e: usize| format!("decoder.block.1.layer.2.mlp.experts.expert_{e}.wi.weight");
    let down = |e: usize| format!("decoder.block.1.layer.2.mlp.experts.expert_{e}.wo.weight");
    let text = refused(&config, &|t| drop(t.remove(&expert(2))));
    assert!(text.contains(&expert(2)) && text.contains("missing"), "{text}");
    let text = refused(&config, &|t| {
        for of in [&expert as &dyn Fn(usize) -> String, &down] {
            let twin = t[&of(0)].clone();
            t.insert(of(1), twin);
        }
    });
    assert!(text.contains("expert") && text.contains("same as"), "{text}");
    let text =
        refused(&config, &|t| t.get_mut(&expert(0)).unwrap().1[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    assert!(text.contains(&expert(0)) && text.contains("NaN"), "{text}");
    let text = refused(&config, &|t| t.get_mut(&expert(0)).unwrap().0.reverse());
    assert!(text.contains("transposed"), "{text}");
    let text = refused(&config, &|t| drop(t.insert("extra.weight".into(), (vec![1], vec![0; 4]))));
    assert!(text.contains("extra.weight"), "{text}");
    let text = refused(&config.replace("\"num_experts\": 3", "\"num_experts\": 4"), &|_| {});
    assert!(text.contains("router.classifier") && text.contains("[4, 24]"), "{text}");
    let text = refused(&config.replace("\"d_model\": 24", "\"d_model\": 25"), &|_| {});
    assert!(text.contains("shared.weight") && text.contains("25"), "{text}");
}
