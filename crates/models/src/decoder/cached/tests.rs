//! Whole sequences, parts of them and single tokens, alone and in batches, give the same bits.

use super::*;
use crate::params::initial_values;
use crate::spec::{FfnSpec, MlpSpec, ModelSpec, MoeSpec, menu, odd_spec, test_spec};
use senmon_moe::rng::Stream;

fn decoder(mut spec: ModelSpec, seed: u64) -> Decoder {
    spec.init_std = 0.4;
    let mut values = initial_values(&spec, seed);
    // Norms and biases that hide nothing.
    let stream = Stream::new(&[seed, 2]);
    for (n, values) in values.iter_mut().enumerate() {
        for (i, x) in values.iter_mut().enumerate() {
            *x += 0.2 * (stream.uniform((n * 1000 + i) as u64) - 0.5);
        }
    }
    Decoder::new(&spec, values, false).unwrap()
}

fn tokens(spec: &ModelSpec, n: usize) -> Vec<u32> {
    let stream = Stream::new(&[9]);
    (0..n as u64).map(|i| (stream.bits(i) % spec.vocab as u64) as u32).collect()
}

#[test]
fn what_a_router_is_when_not_training_in_plainer_words_gives_the_same() {
    let mut plainer = 0;
    for spec in menu() {
        let words = spec.at_inference();
        words.validate().unwrap();
        assert_eq!(words.at_inference(), words);
        if crate::params::param_defs(&words) != crate::params::param_defs(&spec) {
            panic!("{spec:?}");
        }
        let text = tokens(&spec, 9);
        let logits = |spec: &ModelSpec| {
            let model = decoder(spec.clone(), 4);
            model.logits(&text, &mut model.cache(9).unwrap(), false, &mut Pass::default()).unwrap()
        };
        let (a, b) = (logits(&spec), logits(&words));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{spec:?}");
        let kind = |spec: &ModelSpec| spec.first_moe().unwrap().router.kind.clone();
        plainer += usize::from(kind(&spec) != kind(&words));
    }
    // gshard and sinkhorn; noisy_topk learns its deviations here.
    assert_eq!(plainer, 2);
}

#[test]
fn prefill_chunks_and_single_tokens_give_the_same_bits() {
    let spec = |seed: u64| if seed < 30 { odd_spec(seed) } else { test_spec(seed) };
    for (spec, seed) in (0..40).map(|seed| (spec(seed), seed)).chain(menu().into_iter().zip(0..)) {
        let model = decoder(spec.clone(), seed);
        let text = tokens(&spec, 23);
        let run = |cuts: &[usize]| {
            let mut cache = model.cache(23).unwrap();
            let mut logits = Vec::new();
            for pair in cuts.windows(2) {
                let chunk = &text[pair[0]..pair[1]];
                logits.extend(model.logits(chunk, &mut cache, false, &mut Pass::default()).unwrap());
            }
            logits
        };
        let whole = run(&[0, 23]);
        assert!(whole.iter().all(|x| x.is_finite()), "{spec:?}");
        assert_eq!(run(&(0..24).collect::<Vec<_>>()), whole, "{spec:?}");
        assert_eq!(run(&[0, 5, 6, 18, 23]), whole, "{spec:?}");
        // Two sequences at once, without a cache.
        let twice = [&text[..], &text[..]].concat();
        let (x, _) = model.forward(&twice, 2, &mut Pass::default()).unwrap();
        let x = x.to_vec2::<f32>().unwrap();
        assert_eq!(x[..23], x[23..46], "{spec:?}");
        let loss = model.loss(&text[..22], &text[1..], 1, None, &mut Pass::default()).unwrap().0;
        for (t, loss) in loss.per_token.iter().enumerate() {
            let row: Vec<f64> = whole[t * spec.vocab..][..spec.vocab].iter().map(|x| *x as f64).collect();
            let sum = row.iter().map(|x| x.exp()).sum::<f64>().ln();
            let want = sum - row[text[t + 1] as usize];
            assert!((*loss as f64 - want).abs() < 1e-4 * (1.0 + want), "{spec:?}: {loss} {want}");
        }
    }
}

#[test]
fn a_window_forgets_what_it_cannot_see_and_nothing_else() {
    let mut spec = test_spec(1);
    (spec.max_positions, spec.attention.window) = (700, Some(70));
    let model = decoder(spec.clone(), 1);
    let text = tokens(&spec, 700);
    let mut whole = model.cache(700).unwrap();
    let expected = model.logits(&text, &mut whole, false, &mut Pass::default()).unwrap();
    let mut cache = model.cache(700).unwrap();
    for (t, row) in expected.chunks_exact(spec.vocab).enumerate() {
        let logits = model.logits(&text[t..t + 1], &mut cache, true, &mut Pass::default()).unwrap();
        assert_eq!(logits, row, "{t}");
    }
    let width = spec.attention.cached();
    assert!(cache.layers.iter().all(|layer| layer.len() <= (70 + 5 * 64) * width));
    // Back where the window still reaches, not further.
    assert!(!cache.truncate(300) && cache.len() == 700);
    assert!(cache.truncate(690));
    let again = model.logits(&text[690..], &mut cache, false, &mut Pass::default()).unwrap();
    assert_eq!(again, expected[690 * spec.vocab..]);
}

/// Random numbers below a bound.
fn draws(seed: u64) -> impl FnMut(usize) -> usize {
    let stream = Stream::new(&[seed, 77]);
    let mut next = 0;
    move |below| {
        next += 1;
        (stream.bits(next) % below.max(1) as u64) as usize
    }
}

/// Random texts, up to `longest` tokens, that join a batch at any time and leave it at their end: each has the bits that it
/// has alone.
fn check_batches(spec: &ModelSpec, seed: u64, longest: usize) {
    let model = decoder(spec.clone(), seed);
    let mut draw = draws(seed);
    let texts: Vec<Vec<u32>> =
        (0..2 + draw(6)).map(|_| (0..1 + draw(longest)).map(|_| draw(spec.vocab) as u32).collect()).collect();
    let alone: Vec<Vec<f32>> = texts
        .iter()
        .map(|text| {
            let mut cache = model.cache(text.len()).unwrap();
            model.logits(text, &mut cache, false, &mut Pass::default()).unwrap()
        })
        .collect();
    let mut caches: Vec<Cache> = texts.iter().map(|text| model.cache(text.len()).unwrap()).collect();
    let last_only = draw(2) == 0;
    while caches.iter().zip(&texts).any(|(cache, text)| cache.len() < text.len()) {
        let (mut turns, mut parts, mut group) = (Vec::new(), Vec::new(), Vec::new());
        for (n, (cache, text)) in caches.iter_mut().zip(&texts).enumerate() {
            if cache.len() == text.len() || draw(3) == 0 {
                continue;
            }
            let left = text.len() - cache.len();
            // A token as in decoding, some as in a prompt, or none.
            let count = [1, 1, 1 + draw(left), 0][draw(4)].min(left);
            let first = cache.len();
            turns.push((n, first));
            parts.push(&text[first..first + count]);
            group.push(cache);
        }
        let found = model.logits_batch(&parts, &mut group, last_only, &mut Pass::default()).unwrap();
        assert_eq!(found.len(), parts.len());
        for (((n, first), part), found) in turns.into_iter().zip(&parts).zip(found) {
            let end = first + part.len();
            let from = if last_only { end.saturating_sub(1).max(first) } else { first };
            assert!(found == alone[n][from * spec.vocab..end * spec.vocab], "{seed} {n}: {spec:?}");
        }
    }
}

#[test]
fn a_batch_gives_each_sequence_the_bits_that_it_gets_alone() {
    for seed in 0..60 {
        let spec = if seed % 2 == 0 { odd_spec(seed) } else { test_spec(seed) };
        check_batches(&spec, seed, 30);
    }
    for (spec, seed) in menu().into_iter().zip(0..) {
        check_batches(&spec, seed, 30);
    }
}

/// Where rows, columns and sums are cut, and tiles of attention filled.
#[test]
fn a_batch_of_a_wide_model_gives_each_sequence_the_bits_that_it_gets_alone() {
    for seed in [3, 4] {
        let mut spec = if seed == 4 { odd_spec(seed) } else { test_spec(seed) };
        (spec.vocab, spec.hidden, spec.max_positions) = (1100, 600, 200);
        let mlp = MlpSpec::gated(530);
        spec.layers = vec![FfnSpec::Dense(mlp.clone()), FfnSpec::Moe(MoeSpec::plain(8, 3, mlp))];
        spec.attention.window_layers = None;
        check_batches(&spec, seed, 80);
    }
}

#[test]
fn a_window_forgets_in_a_batch_as_alone() {
    let mut spec = test_spec(1);
    (spec.max_positions, spec.attention.window) = (700, Some(70));
    let model = decoder(spec.clone(), 1);
    let text = tokens(&spec, 700);
    let alone = model.logits(&text, &mut model.cache(700).unwrap(), false, &mut Pass::default()).unwrap();
    let mut caches = [model.cache(700).unwrap(), model.cache(700).unwrap()];
    // One comes in parts of 50, the other token by token after the first 600.
    let mut group: Vec<&mut Cache> = caches.iter_mut().collect();
    for step in 0..14 {
        let parts =
            [&text[50 * step..][..50], if step == 0 { &text[..600] } else { &text[599 + step..][..1] }];
        let found = model.logits_batch(&parts, &mut group, true, &mut Pass::default()).unwrap();
        let row = |t: usize| &alone[t * spec.vocab..][..spec.vocab];
        assert_eq!(found[0], row(50 * step + 49), "{step}");
        assert_eq!(found[1], row(599 + step), "{step}");
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused_and_changes_nothing() {
    let spec = test_spec(3);
    let model = decoder(spec.clone(), 3);
    let text = tokens(&spec, 9);
    let (mut one, mut two) = (model.cache(64).unwrap(), model.cache(64).unwrap());
    let mut run =
        |parts: &[&[u32]]| model.logits_batch(parts, &mut [&mut one, &mut two], true, &mut Pass::default());
    let long = vec![0; 5000];
    let error = run(&[&text, &long]).unwrap_err();
    assert!(error.is_users_mistake() && error.to_string().contains("5000 tokens"), "{error}");
    assert!(run(&[&text]).is_err());
    assert_eq!(run(&[&[], &[]]).unwrap(), [Vec::<f32>::new(), Vec::new()]);
    assert!(one.is_empty() && two.is_empty());
}
