//! Golden checkpoints in batches: each sequence has the bits that it has alone, and a trace has the routing of the golden file.

#![allow(clippy::unwrap_used)]

mod golden_files;

use golden_files::{Golden, folders, for_each};
use senmon_insight::{About, EMPTY, NONE, Recorder, Trace};
use senmon_models::audit::Audit;
use senmon_models::decoder::{Cache, Decoder, Pass};
use senmon_models::{checkpoint, seq2seq};
use senmon_moe::RoutingObserver;

/// The decoder of a folder, from its mapped files.
fn open(folder: &std::path::Path) -> Result<Decoder, String> {
    let opened = checkpoint::open(folder, Audit::Structure).map_err(|e| e.to_string())?;
    Decoder::run(&opened.spec, opened.weights).map_err(|e| e.to_string())
}

/// What a trace is of, here.
fn about() -> About {
    About { model: "golden".into(), router: "any".into(), domains: vec!["text".into()] }
}

/// The trace, by way of a file.
fn through_a_file(trace: &Trace) -> Trace {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.safetensors");
    trace.write(&path).unwrap();
    Trace::read(&path).unwrap()
}

/// Runs parts of texts over their caches; gives each text's logits so far and lets a recorder see the pass.
fn step(
    model: &Decoder,
    turns: &[(usize, &[u32])],
    caches: &mut [Cache],
    found: &mut [Vec<f32>],
    recorder: &mut Recorder,
) {
    recorder.pass(&turns.iter().map(|(n, tokens)| (*n as u32, *tokens)).collect::<Vec<_>>());
    let tokens: Vec<&[u32]> = turns.iter().map(|(_, tokens)| *tokens).collect();
    let mut group: Vec<&mut Cache> = caches
        .iter_mut()
        .enumerate()
        .filter(|(n, _)| turns.iter().any(|(of, _)| of == n))
        .map(|(_, cache)| cache)
        .collect();
    let mut pass = Pass { observer: Some(recorder), ..Pass::default() };
    let logits = model.logits_batch(&tokens, &mut group, false, &mut pass).unwrap();
    for ((n, _), logits) in turns.iter().zip(logits) {
        recorder.predicted(*n as u32, &logits);
        found[*n].extend(logits);
    }
}

#[test]
fn batches_have_the_bits_of_sequences_alone_and_the_routing_of_transformers() {
    for_each(|folder| {
        let (golden, model) = (Golden::of(folder), open(folder)?);
        let tokens = golden.ids("tokens");
        let vocab = model.spec().vocab;
        // The golden text, its beginning, and it from its middle on.
        let texts = [&tokens[..], &tokens[..7], &tokens[9..], &tokens[..1]];
        let alone: Vec<Vec<f32>> = texts
            .iter()
            .map(|text| {
                let mut cache = model.cache(text.len()).unwrap();
                model.logits(text, &mut cache, false, &mut Pass::default()).unwrap()
            })
            .collect();
        let mut caches: Vec<Cache> = texts.iter().map(|text| model.cache(text.len()).unwrap()).collect();
        let mut found = vec![Vec::new(); texts.len()];
        let mut recorder = Recorder::new(true);
        // Parts of a prompt beside single tokens; texts join and leave at different times.
        let mut at = [0; 4];
        for parts in [[5, 1, 0, 0], [1, 1, 7, 1], [6, 0, 1, 0], [1, 5, 1, 0]] {
            let turns: Vec<(usize, &[u32])> =
                (0..4).filter(|n| parts[*n] > 0).map(|n| (n, &texts[n][at[n]..at[n] + parts[n]])).collect();
            step(&model, &turns, &mut caches, &mut found, &mut recorder);
            (0..4).for_each(|n| at[n] += parts[n]);
        }
        while at.iter().zip(&texts).any(|(at, text)| *at < text.len()) {
            let turns: Vec<(usize, &[u32])> = (0..4)
                .filter(|n| at[*n] < texts[*n].len())
                .map(|n| (n, &texts[n][at[n]..at[n] + 1]))
                .collect();
            step(&model, &turns, &mut caches, &mut found, &mut recorder);
            turns.iter().for_each(|(n, _)| at[*n] += 1);
        }
        if found != alone {
            return Err("a batch gives other bits".into());
        }
        let trace = recorder.finish(about(), |_| None).map_err(|e| e.to_string())?;
        check_against(&through_a_file(&trace), &golden)?;
        // What was predicted, and how well, is what the logits say.
        for (row, t) in (0..tokens.len()).enumerate() {
            let logits: Vec<f64> = alone[0][t * vocab..][..vocab].iter().map(|x| f64::from(*x)).collect();
            let best = logits.iter().copied().fold(f64::MIN, f64::max);
            let predicted = trace.predicted[row] as usize;
            if logits[predicted] != best || trace.position[row] as usize != t {
                return Err(format!("token {t}: {predicted} was predicted"));
            }
            match tokens.get(t + 1) {
                Some(target) => {
                    let sum: f64 = logits.iter().map(|x| x.exp()).sum();
                    let want = sum.ln() - logits[*target as usize];
                    if trace.targets[row] != *target || (f64::from(trace.loss[row]) - want).abs() > 1e-4 {
                        return Err(format!("token {t}: loss {}, not {want}", trace.loss[row]));
                    }
                }
                None if trace.targets[row] != NONE || !trace.loss[row].is_nan() => {
                    return Err("the last token has a target".into());
                }
                None => {}
            }
        }
        Ok(())
    });
}

/// The first sequence of a trace has the experts and the weights of the golden file, in every layer.
fn check_against(trace: &Trace, golden: &Golden) -> Result<(), String> {
    let layers = golden.tensors.keys().filter(|name| name.starts_with("experts.")).count();
    if trace.layers.len() != layers {
        return Err(format!("{} layers in the trace, not {layers}", trace.layers.len()));
    }
    for (l, layer) in &trace.layers {
        let k = layer.top_k;
        let (experts, weights) =
            (golden.ids(&format!("experts.{l}")), golden.numbers(&format!("weights.{l}")));
        let logits = layer.logits.as_ref().ok_or("no logits")?;
        if logits.iter().any(|x| x.is_nan()) || layer.dropped.contains(&1) {
            return Err(format!("layer {l}: a token that it did not see"));
        }
        for slot in 0..experts.len() {
            let token = slot / k * k..slot / k * k + k;
            let found = token.clone().find(|at| u32::from(layer.experts[*at]) == experts[slot]);
            if !found.is_some_and(|at| (layer.weights[at] - weights[slot]).abs() <= 1e-5) {
                let (ids, found) = (&layer.experts[token.clone()], &layer.weights[token]);
                return Err(format!("layer {l}, slot {slot}: {ids:?} {found:?}, not {}", experts[slot]));
            }
        }
    }
    Ok(())
}

#[test]
fn traces_of_encoder_decoders_have_two_sequences_and_their_drops() {
    let mut cases = 0;
    for folder in folders() {
        let case = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if !case.starts_with("switch_") {
            continue;
        }
        cases += 1;
        let golden = Golden::of(&folder);
        let model = seq2seq::open(&folder, Audit::Structure).unwrap().model;
        let (tokens, decoder) = (golden.ids("tokens"), golden.ids("decoder_tokens"));
        let mut recorder = Recorder::new(false);
        recorder.pass(&[(0, &tokens)]);
        let observer: &mut dyn RoutingObserver = &mut recorder;
        let encoded = model.encode(&tokens, Some(observer)).unwrap();
        recorder.pass(&[(1, &decoder)]);
        let observer: &mut dyn RoutingObserver = &mut recorder;
        let logits = model.logits(&decoder, &encoded, &mut model.cache(), false, Some(observer)).unwrap();
        recorder.predicted(1, &logits);
        recorder.follows(1, 3);
        let encoders = model.spec().encoder.len();
        let name = |layer: usize| match layer.checked_sub(encoders) {
            Some(layer) => Some(format!("decoder.{layer}")),
            None => Some(format!("encoder.{layer}")),
        };
        let trace = through_a_file(&recorder.finish(about(), name).unwrap());
        let n = tokens.len();
        assert_eq!(trace.tokens, [&tokens[..], &decoder].concat());
        assert_eq!(trace.sequence, [vec![0; n], vec![1; decoder.len()]].concat());
        assert!(trace.predicted[..n].iter().all(|token| *token == NONE));
        assert!(trace.loss[n..].iter().all(|loss| loss.is_finite()) && trace.targets[n - 1] == NONE);
        assert_eq!(trace.targets.last(), Some(&3));
        let mut dropped = 0;
        for layer in trace.layers.values() {
            let name = layer.name.clone().unwrap();
            let experts = golden.ids(&format!("experts.{name}"));
            let weights = golden.numbers(&format!("weights.{name}"));
            let (own, other) = match name.starts_with("encoder") {
                true => (0..n, n..trace.len()),
                false => (n..trace.len(), 0..n),
            };
            assert!(
                other.clone().all(|row| layer.experts[row] == EMPTY && layer.dropped[row] == 0),
                "{name}"
            );
            assert_eq!(own.len(), experts.len());
            for (row, (expert, weight)) in own.zip(experts.iter().zip(&weights)) {
                // A weight of 0 is a token that the expert had no place for.
                let gone = *weight == 0.0;
                assert_eq!(layer.dropped[row] == 1, gone, "{case} {name} {row}");
                let expert = if gone { EMPTY } else { *expert as u16 };
                assert_eq!(layer.experts[row], expert, "{case} {name} {row}");
                assert!((layer.weights[row] - weight).abs() <= 1e-5, "{case} {name} {row}");
                dropped += usize::from(gone);
            }
        }
        assert_eq!(
            trace.layers.len(),
            golden.tensors.keys().filter(|name| name.starts_with("experts.")).count()
        );
        assert_eq!(dropped > 0, case.contains("drops"), "{case}");
    }
    assert_eq!(cases, 2);
}
