//! Statistics of traces whose answers are known, and of any trace at all.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Draws, layer, texts};
use proptest::prelude::*;
use senmon_insight::replay::{self, Capacity, Drop, Ranks, Replayed, Scenario};
use senmon_insight::statistics::{self, Figure, Options, Placement, Statistics};
use senmon_insight::words::{self, WordOptions};
use senmon_insight::{EMPTY, LayerTrace, NONE, Trace};
use std::collections::BTreeMap;

/// Routing by chance, of even experts.
fn even(experts: usize, k: usize) -> Trace {
    let draws = Draws::new(11);
    let mut trace = texts(64, 256, 4, |row, _| draws.below(row as u64, 200) as u32);
    let n = trace.len();
    for l in 0..2u64 {
        trace.layers.insert(
            l as usize,
            layer(n, experts, k, |row| draws.different((l + 1) * 10_000_000 + row as u64, experts, k)),
        );
    }
    trace
}

fn near(figure: &Figure, within: f64, what: &str) {
    let value = figure.value.unwrap();
    for chance in [figure.chance, figure.by_load].into_iter().flatten() {
        assert!((value - chance).abs() <= within * chance.abs().max(0.05), "{what}: {figure:?}");
    }
}

#[test]
fn where_chance_routes_every_figure_is_at_its_chance() {
    let trace = even(16, 4);
    let found = statistics::of(&trace, &Options::default()).unwrap();
    for layer in &found.layers {
        let load = &layer.load;
        near(&load.cv, 0.6, "cv");
        near(&load.max_over_mean, 0.02, "max over mean");
        near(&load.entropy, 0.001, "entropy");
        assert_eq!((load.dead_count.value, load.dead.len()), (Some(0.0), 0));
        let coactivation = &layer.coactivation;
        let (shares, by_load) =
            (coactivation.shares.as_ref().unwrap(), coactivation.by_load.as_ref().unwrap());
        assert!((coactivation.even.unwrap() - 0.2).abs() < 1e-12);
        for (i, j) in (0..16).flat_map(|i| (0..16).map(move |j| (i, j))) {
            let (share, chance) = (shares[i][j].unwrap(), by_load[i][j].unwrap());
            assert!((share - chance).abs() < 0.03, "{i} {j}: {share} {chance}");
        }
        let information = &layer.domains.information;
        assert!((information.nats / information.expected - 1.0).abs() < 0.6, "{information:?}");
        assert!((information.shuffled.unwrap() / information.expected - 1.0).abs() < 0.6, "{information:?}");
        for by in [&layer.vocabulary.input, &layer.vocabulary.target, &layer.vocabulary.predicted] {
            near(&by.favourite, 0.03, "favourite");
            near(&by.favourite_by_occurrence, 0.03, "favourite by occurrence");
            near(&by.favourites, 0.03, "favourites");
        }
        for repeat in layer.repeats.domains.iter().chain([&layer.repeats.all]) {
            near(&repeat.first_rate, 0.15, "the same first");
            near(&repeat.common_rate, 0.05, "in common");
        }
        let positions = &layer.positions.experts.information;
        assert!((positions.nats / positions.expected - 1.0).abs() < 0.5, "{positions:?}");
        for batch in &layer.batches {
            near(&batch.distinct, 0.01, "distinct");
            near(&batch.share, 0.01, "share");
        }
        assert_eq!(layer.batches.last().unwrap().tokens, 64);
        for size in 0..16 {
            let at = |rates: &[Option<f64>]| rates[size].unwrap();
            let (lru, chance) = (at(&layer.cache.lru), at(&layer.cache.chance));
            assert!(
                (lru - chance).abs() < 0.02 && (lru - at(&layer.cache.shuffled)).abs() < 0.02,
                "{size}: {lru} {chance}"
            );
            assert!(lru <= at(&layer.cache.best));
        }
        for suggestion in &layer.placement {
            near(&suggestion.contiguous.sent_per_token, 0.02, "sent");
            near(&suggestion.contiguous.imbalance, 0.05, "imbalance");
            // On new texts there is nothing to be gained.
            near(&suggestion.held_out.as_ref().unwrap().suggested.sent_per_token, 0.02, "sent");
        }
    }
    let transition = &found.transitions[0];
    assert!((transition.information.nats / transition.information.expected - 1.0).abs() < 0.3);
    near(&transition.guess, 0.4, "guess");
    for path in &found.paths[0].frequent {
        assert!(path.share.value.unwrap() < 2.0 * path.share.by_load.unwrap());
    }
}

#[test]
fn what_is_known_without_computing() {
    // Two texts of four tokens; one expert each, of four, of which one is never used.
    let mut trace = texts(2, 4, 2, |row, _| row as u32 % 4);
    trace.layers.insert(3, layer(8, 4, 1, |row| vec![[0, 0, 0, 1, 2, 2, 2, 1][row]]));
    let found = statistics::of(&trace, &Options { min_occurrences: 1, ..Options::default() }).unwrap();
    let layer = &found.layers[0];
    assert_eq!((layer.layer, layer.experts, layer.top_k), (3, 4, 1));
    assert_eq!(layer.load.counts, [3, 2, 3, 0]);
    assert_eq!((layer.load.dead.as_slice(), layer.load.dead_count.value), (&[3][..], Some(1.0)));
    assert_eq!(layer.load.max_over_mean.value, Some(1.5));
    assert_eq!(layer.domains.of_class[0], [Some(0.75), Some(0.0)]);
    assert_eq!(layer.domains.of_expert[1], [Some(0.5), Some(0.5)]);
    assert_eq!(layer.domains.of_expert[3], [None, None]);
    assert_eq!((layer.domains.even, &layer.domains.by_size), (Some(0.25), &vec![Some(0.5); 2]));
    assert_eq!((layer.repeats.all.pairs, layer.repeats.all.same_first), (6, 4));
    assert_eq!(layer.repeats.all.first_rate.chance, Some(0.25));
    assert_eq!(layer.vocabulary.input.favourite.value, Some(0.625));
    assert_eq!(layer.positions.from, [0, 1, 3]);
    assert_eq!(layer.positions.experts.tokens, [2, 4, 2]);
    // A place of both texts: 0 and 2 three times, 1 and 1 once.
    assert_eq!(layer.batches[1].distinct.value, Some(1.75));
    // 0 0 0 1 2 2 2 1: room for one hits the two repeats of each.
    assert_eq!(layer.cache.lru_hits, [4, 5, 5, 5]);
    assert_eq!(layer.confidence.mean_weight.value, Some(0.5));
    assert_eq!(found.paths[0].distinct, 3);
    assert!(found.transitions.is_empty());
    assert_eq!(found.loss, Some(2.0));
}

#[test]
fn saturation_is_all_between_a_trace_and_itself_and_chance_between_strangers() {
    let trace = even(16, 4);
    for layer in statistics::saturation(&trace, &trace).unwrap() {
        assert_eq!((layer.experts.value, layer.first.value), (Some(1.0), Some(1.0)));
        assert_eq!((layer.experts.chance, layer.first.chance), (Some(0.25), Some(1.0 / 16.0)));
    }
    let mut other = trace.clone();
    let layers: Vec<LayerTrace> = other.layers.values().cloned().rev().collect();
    other.layers = layers.into_iter().enumerate().collect();
    for layer in statistics::saturation(&trace, &other).unwrap() {
        near(&layer.experts, 0.05, "experts");
        near(&layer.first, 0.1, "first");
    }
    other.tokens[5] += 1;
    assert!(statistics::saturation(&trace, &other).unwrap_err().to_string().contains("tokens"));
    other.tokens[5] -= 1;
    other.layers.remove(&1);
    assert!(statistics::saturation(&trace, &other).unwrap_err().to_string().contains("[0, 1] and [0]"));
}

/// What a trace is replayed under that changes nothing.
fn unchanged(trace: &Trace, scenario: &Scenario) -> Vec<Replayed> {
    let (found, known) =
        (replay::replay(trace, scenario).unwrap(), statistics::of(trace, &Options::default()).unwrap());
    for (replayed, layer) in found.iter().zip(&known.layers) {
        assert_eq!(replayed.counts, layer.load.counts);
        assert_eq!((replayed.assignments, replayed.idle), (layer.load.assignments, layer.load.idle));
        assert_eq!((replayed.dropped, replayed.dropped_before), (0, layer.load.dropped));
        assert_eq!(replayed.tokens, layer.load.tokens);
    }
    found
}

#[test]
fn a_replay_drops_what_is_over_capacity_and_keeps_the_rest() {
    let trace = even(8, 2);
    for drop in [Drop::Position, Drop::Token, Drop::Priority, Drop::Gate, Drop::Random] {
        let capacity = Some(Capacity { factor: 1.0, batch: 64, drop });
        let found = replay::replay(&trace, &Scenario { capacity, ..Scenario::default() }).unwrap();
        for layer in found {
            assert_eq!(layer.assignments + layer.dropped, 2 * trace.len() as u64);
            near(&layer.dropped_rate, 0.1, "dropped");
            assert!(layer.counts.iter().all(|n| *n <= 16 * trace.len() as u64 / 64));
        }
    }
    // Room for all: nothing is dropped.
    let capacity = Some(Capacity { factor: 8.0, batch: 0, drop: Drop::Position });
    unchanged(&trace, &Scenario { capacity, top_k: Some(2), ..Scenario::default() });
}

#[test]
fn a_replay_of_fewer_experts_keeps_the_first_and_of_more_needs_logits() {
    let mut trace = even(8, 2);
    let found = replay::replay(&trace, &Scenario { top_k: Some(1), ..Scenario::default() }).unwrap();
    let mut firsts = [0u64; 8];
    trace.layers[&0].experts.chunks(2).for_each(|row| firsts[usize::from(row[0])] += 1);
    assert_eq!(found[0].counts, firsts);
    let more = Scenario { top_k: Some(3), ..Scenario::default() };
    let error = replay::replay(&trace, &more).unwrap_err().to_string();
    assert!(error.contains("logits.0") && error.contains("the trace has 2"), "{error}");
    // Expert 7 has the greatest logit, then 6: a token gets the first that it does not have.
    let n = trace.len();
    for layer in trace.layers.values_mut() {
        layer.logits = Some((0..n).flat_map(|_| (0..8).map(|e| e as f32)).collect());
    }
    let found = replay::replay(&trace, &more).unwrap();
    let rows = trace.layers[&0].experts.chunks(2);
    let third = rows.map(|row| (0..8u16).rev().find(|e| !row.contains(e)).unwrap());
    let mut counts = statistics::of(&trace, &Options::default()).unwrap().layers[0].load.counts.clone();
    third.for_each(|e| counts[usize::from(e)] += 1);
    assert_eq!(found[0].counts, counts);
    let many = replay::replay(&trace, &Scenario { top_k: Some(9), ..Scenario::default() });
    assert!(many.unwrap_err().to_string().contains("8 experts, 9 per token"));
}

#[test]
fn scenarios_that_mean_nothing_are_refused() {
    let trace = even(8, 2);
    let refused = |scenario: Scenario, words: &str| {
        let error = replay::replay(&trace, &scenario).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(Scenario { top_k: Some(0), ..Scenario::default() }, "top_k = 0");
    refused(Scenario { cache: Some(0), ..Scenario::default() }, "cache = 0");
    for factor in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let capacity = Some(Capacity { factor, batch: 0, drop: Drop::Position });
        refused(Scenario { capacity, ..Scenario::default() }, "capacity factor");
    }
    let ranks =
        |ranks, placements| Scenario { ranks: Some(Ranks { ranks, placements }), ..Scenario::default() };
    refused(ranks(0, BTreeMap::new()), "0 ranks");
    let of = |experts: usize, over: usize| Placement::contiguous(experts, over).unwrap();
    refused(ranks(2, BTreeMap::from([(9, of(8, 2))])), "layer 9");
    refused(ranks(2, BTreeMap::from([(0, of(8, 4))])), "4 ranks");
    refused(ranks(2, BTreeMap::from([(0, of(7, 2))])), "7 experts");
    assert!(serde_json::from_str::<Placement>("{\"ranks\": 2, \"of\": [0, 2]}").is_err());
    assert!(statistics::cost(&trace, 5, &of(8, 2)).unwrap_err().to_string().contains("no layer 5"));
    let options = Options { ranks: vec![0], ..Options::default() };
    assert!(statistics::of(&trace, &options).unwrap_err().to_string().contains("0 ranks"));
    let options = Options { balance: f64::NAN, ..Options::default() };
    assert!(statistics::of(&trace, &options).unwrap_err().to_string().contains("balance"));
    let options = Options { shuffles: usize::MAX, ..Options::default() };
    assert!(statistics::of(&trace, &options).unwrap_err().to_string().contains("shuffles"));
    let mut wide = even(8, 2);
    wide.layers.get_mut(&0).unwrap().count = Some(usize::MAX);
    assert!(statistics::of(&wide, &Options::default()).unwrap_err().to_string().contains("experts.0"));
    wide.layers.get_mut(&0).unwrap().weights.pop();
    assert!(statistics::of(&wide, &Options::default()).is_err());
    assert!(replay::replay(&wide, &Scenario::default()).is_err());
}

/// Any sound trace: ids beyond E, empty and dropped slots, experts twice, positions and texts of any number, logits of any value.
fn any_trace() -> impl Strategy<Value = Trace> {
    let layers = prop::collection::vec((0usize..7, 1usize..5, 0u8..3), 0..4);
    (any::<u64>(), 0usize..30, 1usize..4, layers).prop_map(|(seed, n, domains, layers)| {
        let draws = Draws::new(seed);
        let mut trace = texts(n, 1, domains, |row, _| draws.below(row as u64, 3) as u32);
        let mut at = 1000;
        let mut next = |below: u64| {
            at += 1;
            draws.below(at, below)
        };
        for row in 0..n {
            trace.sequence[row] = [0, 1, u32::MAX][next(3) as usize];
            trace.position[row] = [0, 1, 2, u32::MAX - 1, u32::MAX][next(5) as usize];
            trace.targets[row] = [0, 1, NONE][next(3) as usize];
            trace.loss[row] = [1.0, f32::NAN, f32::INFINITY][next(3) as usize];
        }
        for (l, (experts, k, kind)) in layers.into_iter().enumerate() {
            let mut made = layer(n, experts, k, |_| vec![0; k]);
            for slot in 0..n * k {
                made.experts[slot] = match next(10) {
                    0 | 1 => EMPTY,
                    2 => experts as u16 + next(3) as u16,
                    3 => 65_534,
                    _ => next(experts.max(1) as u64) as u16,
                };
                let empty = made.experts[slot] == EMPTY;
                made.weights[slot] = if empty { 0.0 } else { [0.0, -1.0, 0.5, f32::MAX][next(4) as usize] };
                made.dropped[slot] = u8::from(empty && next(2) == 0);
            }
            if kind == 0 {
                let values = [0.0, 1.0, -1.0, f32::NAN, f32::NEG_INFINITY, f32::INFINITY];
                made.logits = Some(
                    (0..n * experts)
                        .map(|_| values[next(if experts > 3 { 6 } else { 3 }) as usize])
                        .collect(),
                );
            }
            if kind == 1 && !made.experts.contains(&65_534) {
                made.count = None;
            }
            trace.layers.insert(l, made);
        }
        trace
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_sound_trace_has_statistics_words_and_replays_that_go_through_json(
        trace in any_trace(),
        k in 1usize..6,
        cache in 1usize..9,
        ranks in 1usize..5,
        factor in 0.1f64..3.0,
        batch in 0usize..9,
        drop in prop::sample::select(vec![Drop::Position, Drop::Token, Drop::Priority, Drop::Gate, Drop::Random]),
    ) {
        let options = Options { min_occurrences: 1, ranks: vec![1, 2, 3], ..Options::default() };
        let found = statistics::of(&trace, &options).unwrap();
        // A number that is none would be written as null, and would not be read as a number.
        let text = serde_json::to_string(&found).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Statistics>(&text).unwrap(), &found);
        unchanged(&trace, &Scenario::default());
        let words = words::of(&trace, &WordOptions { min_count: 1, ..WordOptions::default() }, &|id| format!("\n`{id}")).unwrap();
        let text = serde_json::to_string(&words).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Vec<words::LayerWords>>(&text).unwrap(), &words);
        for words in words.iter().flat_map(|layer| &layer.experts) {
            prop_assert_eq!(words.sentence.lines().count(), 1);
        }
        let scenario = Scenario {
            top_k: Some(k),
            capacity: Some(Capacity { factor, batch, drop }),
            ranks: Some(Ranks { ranks, placements: BTreeMap::new() }),
            cache: Some(cache),
        };
        match replay::replay(&trace, &scenario) {
            Ok(found) => {
                let text = serde_json::to_string(&found).unwrap();
                prop_assert_eq!(&serde_json::from_str::<Vec<Replayed>>(&text).unwrap(), &found);
            }
            Err(error) => prop_assert!(error.to_string().contains("logits"), "{}", error),
        }
    }
}

#[test]
fn statistics_are_the_same_on_any_number_of_threads() {
    let trace = even(8, 2);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| serde_json::to_string(&statistics::of(&trace, &Options::default()).unwrap()).unwrap())
    };
    assert_eq!(on(1), on(3));
}
