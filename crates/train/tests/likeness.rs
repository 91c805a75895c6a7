//! Experts that were made alike are found to be, in what they give and in their weights; others are not.

#![allow(clippy::unwrap_used)]

use senmon_insight::About;
use senmon_models::decoder::Decoder;
use senmon_models::params::{initial_values, param_defs};
use senmon_models::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec};
use senmon_train::eval::EvalText;
use senmon_train::{likeness, tracing};

/// The same expert with its neurons in the opposite order: rows of gate and up, columns of down.
fn turned(values: &[f32], name: &str, inner: usize, hidden: usize) -> Vec<f32> {
    if name.contains("down") {
        return values.chunks(inner).flat_map(|row| row.iter().rev().copied()).collect();
    }
    let matrices = values.chunks(inner * hidden);
    matrices.flat_map(|matrix| matrix.chunks(hidden).rev().flatten().copied()).collect()
}

#[test]
fn a_copy_is_found() {
    let (vocab, experts, inner, hidden) = (40, 4, 8, 16);
    for gated in [true, false] {
        let mlp = MlpSpec { gated, ..MlpSpec::gated(inner) };
        let moe = FfnSpec::Moe(MoeSpec::plain(experts, 2, mlp));
        let spec = ModelSpec {
            max_positions: 32,
            ..ModelSpec::plain(vocab, hidden, AttentionSpec::plain(2, 2, 8), vec![moe; 2])
        };
        let mut values = initial_values(&spec, 3);
        let mut copied = 0;
        for (def, values) in param_defs(&spec).iter().zip(&mut values) {
            // Expert 3 of layer 1 is expert 1, its neurons in another order.
            if def.name.starts_with("layers.1.") && values.len() % (experts * inner * hidden) == 0 {
                let size = values.len() / experts;
                let expert = values[size..2 * size].to_vec();
                values[3 * size..].copy_from_slice(&turned(&expert, &def.name, inner, hidden));
                copied += 1;
            }
        }
        assert_eq!(copied, 2, "the matrices up and down of layer 1");
        let decoder = Decoder::new(&spec, values, false).unwrap();
        let window = |i: u32| (0..=16).map(|t| (7 * i + 3 * t) % vocab as u32).collect();
        let text = EvalText {
            documents: Vec::new(),
            windows: (0..5).map(|i| (window(i), 0)).collect(),
            domains: vec!["all".into()],
            bytes_of_token: vec![1; vocab],
        };
        let trace = tracing::record(&decoder, &text, About::default(), false, &|| false).unwrap().unwrap();
        let mut heard = Vec::new();
        let mut progress = |done, all| heard.push((done, all));
        let found = likeness::of(&decoder, &trace, &mut progress, &|| false).unwrap().unwrap();
        // Five texts and two layers.
        assert_eq!(heard, (0..7).map(|done| (done, 7)).collect::<Vec<_>>());
        assert_eq!(
            found.iter().map(|alike| (alike.layer, alike.tokens)).collect::<Vec<_>>(),
            [(0, 80), (1, 80)]
        );
        for alike in &found {
            let weights = alike.weights.as_ref().unwrap();
            for i in 0..experts {
                for j in i + 1..experts {
                    let same = (alike.layer, i, j) == (1, 1, 3);
                    let (outputs, weights) = (alike.outputs[i][j].unwrap(), weights[i][j].unwrap());
                    assert_eq!(outputs > 0.999, same, "{gated} layer {}: {i} {j}: {outputs}", alike.layer);
                    assert_eq!(weights > 0.999, same, "{gated} layer {}: {i} {j}: {weights}", alike.layer);
                }
            }
        }
        assert!(likeness::of(&decoder, &trace, &mut |_, _| (), &|| true).unwrap().is_none());
    }
}
