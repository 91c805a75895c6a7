//! Words for experts where the truth is known: it was planted.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Draws, layer, texts};
use senmon_insight::Trace;
use senmon_insight::words::{self, Ablation, Label, LabelKind, Verdict, WordOptions, confirm};

const DOMAINS: usize = 10;

/// Ids that some domain has more often than others, and such as all have.
fn id(draws: &Draws, row: usize, domain: usize) -> u32 {
    let own = draws.uniform(7 * row as u64) < 0.3;
    let rank = (1.0 / (0.02 + 0.98 * draws.uniform(7 * row as u64 + 1))) as u32;
    if own { 1000 + 100 * domain as u32 + rank } else { rank * 3 + draws.below(7 * row as u64 + 2, 3) as u32 }
}

fn of(trace: &Trace) -> Vec<words::LayerWords> {
    words::of(trace, &WordOptions::default(), &|id| format!("t{id}")).unwrap()
}

/// Losses with an expert off: what `lost` says, and noise of each text and of each token.
fn off(trace: &Trace, seed: u64, lost: impl Fn(usize) -> f64) -> Vec<f32> {
    let draws = Draws::new(seed);
    let delta = |row: usize| {
        let text = 0.05 * draws.normal(2 * u64::from(trace.sequence[row]));
        lost(row) + text + 0.2 * draws.normal(2 * row as u64 + 1)
    };
    trace.loss.iter().enumerate().map(|(row, loss)| (f64::from(*loss) + delta(row)) as f32).collect()
}

/// The verdict on a label of an expert, and of a control that is the next one.
fn verdict(
    trace: &Trace,
    layer: usize,
    e: usize,
    experts: usize,
    label: &Label,
    off: &[f32],
    control: &[f32],
) -> Verdict {
    let mine = Ablation::of(trace, layer, e as u16, label, off).unwrap();
    let control = Ablation::of(trace, layer, ((e + 1) % experts) as u16, label, control).unwrap();
    confirm(label, &mine, &control).verdict
}

#[test]
fn domains_that_force_the_routing_are_named_and_their_loss_confirms_them() {
    let draws = Draws::new(1);
    let mut trace = texts(80, 100, DOMAINS, |row, domain| id(&draws, row, domain));
    let n = trace.len();
    // An expert of its own for each domain, missed by every tenth token, and another by chance.
    let choose = |row: usize| {
        let by_chance = draws.different(1_000_000 + row as u64, DOMAINS, 2);
        let own = trace.domains[row];
        if draws.below(2_000_000 + row as u64, 10) == 0 || by_chance[0] == own {
            by_chance
        } else {
            vec![own, by_chance[0]]
        }
    };
    let made = layer(n, DOMAINS, 2, choose);
    trace.layers.insert(0, made);
    let found = of(&trace);
    let right = |e: usize| {
        let words = &found[0].experts[e];
        words.label.kind == LabelKind::Domain && words.label.domain == Some(e as u16)
    };
    let named = (0..DOMAINS).filter(|e| right(*e)).count();
    assert!(
        named >= 9,
        "{named} of {DOMAINS}: {:?}",
        found[0].experts.iter().map(|e| &e.sentence).collect::<Vec<_>>()
    );
    let first = &found[0].experts[0];
    // Two experts of a token, of which one is its domain's.
    let sentence = "often domain 0: 45 % of its tokens against 10 % by chance; tokens such as `t";
    assert!(first.sentence.starts_with(sentence), "{}", first.sentence);
    assert_eq!(first.domains[0].text, "domain 0");
    assert!(first.label.ln_p < -100.0 && first.label.evidence > 400 && first.label.texts == 8);

    // The expert off: its domain loses. The control off: as much is lost, elsewhere.
    let confirmed = (0..DOMAINS).filter(|e| {
        let label = &found[0].experts[*e].label;
        let mine =
            off(
                &trace,
                100 + *e as u64,
                |row| if usize::from(trace.domains[row]) == *e { 0.2 } else { 0.01 },
            );
        let theirs = off(&trace, 200 + *e as u64, |row| {
            if usize::from(trace.domains[row]) == (*e + 1) % 10 { 0.2 } else { 0.01 }
        });
        verdict(&trace, 0, *e, DOMAINS, label, &mine, &theirs) == Verdict::Confirmed
    });
    let confirmed = confirmed.count();
    assert!(confirmed >= 9, "{confirmed}");
}

#[test]
fn domains_that_only_come_with_the_ids_are_seldom_confirmed_by_chance() {
    const EXPERTS: usize = 64;
    let draws = Draws::new(2);
    let mut trace = texts(80, 100, DOMAINS, |row, domain| id(&draws, row, domain));
    let n = trace.len();
    let hash = |row: usize| vec![Draws::new(u64::from(trace.tokens[row])).below(0, EXPERTS as u64) as u16];
    let made = layer(n, EXPERTS, 1, hash);
    trace.layers.insert(0, made);
    let found = of(&trace);
    // An expert by its ids is said to have ids.
    let used = found[0].experts.iter().filter(|words| words.tokens >= 20);
    let (all, by_id) = used.fold((0, 0), |(all, by_id), words| {
        (all + 1, by_id + usize::from(words.label.kind == LabelKind::Token))
    });
    assert!(by_id * 10 >= all * 8, "{by_id} of {all}");
    // Every expert's foremost domain, as if it were its label: what an ablation that means nothing confirms.
    let (mut labels, mut survive) = (0, 0);
    for words in &found[0].experts {
        let Some(domain) = words.domains.first() else { continue };
        let label = match words.label.kind {
            LabelKind::Domain => words.label.clone(),
            _ => Label { kind: LabelKind::Domain, domain: Some(domain.id as u16), ..Label::default() },
        };
        for round in 0..5 {
            let seed = 1000 * u64::from(words.expert) + 10 * round;
            let (mine, theirs) = (off(&trace, seed, |_| 0.0), off(&trace, seed + 1, |_| 0.0));
            labels += 1;
            survive += usize::from(
                verdict(&trace, 0, usize::from(words.expert), EXPERTS, &label, &mine, &theirs)
                    == Verdict::Confirmed,
            );
        }
    }
    assert!(labels >= 200 && survive * 20 <= labels, "{survive} of {labels}");
}

#[test]
fn places_and_what_follows_are_named_too() {
    let draws = Draws::new(3);
    let mut trace = texts(60, 64, 3, |row, _| draws.below(row as u64, 40) as u32);
    let n = trace.len();
    // Expert 0: the first three tokens. Expert 1: what comes before the ids 5 and 6. Others: by chance.
    let choose = |row: usize| {
        vec![match (trace.position[row], trace.targets[row]) {
            (0..=2, _) => 0,
            (_, 5 | 6) => 1,
            _ => 2 + draws.below(1_000_000 + row as u64, 4) as u16,
        }]
    };
    let made = layer(n, 6, 1, choose);
    trace.layers.insert(4, made);
    let found = &of(&trace)[0];
    assert_eq!(found.layer, 4);
    let label = |e: usize| &found.experts[e].label;
    assert_eq!((label(0).kind, label(0).positions), (LabelKind::Position, Some((0, 2))));
    assert!(found.experts[0].sentence.starts_with("mostly the first 3 tokens of texts: 100 % of its tokens"));
    let mut ids = label(1).ids.clone();
    ids.sort_unstable();
    assert_eq!((label(1).kind, ids), (LabelKind::Next, vec![5, 6]));
    for e in 2..6 {
        // Not the first three: a small lift for the rest, which is no label.
        assert_eq!(label(e).kind, LabelKind::None, "{:?}", found.experts[e].sentence);
    }
    let context = &found.experts[1].contexts[0];
    assert_eq!(context.token, format!("t{}", trace.tokens[context.row]));
    assert!(context.after.starts_with("t5") || context.after.starts_with("t6"), "{context:?}");
    assert!(found.experts[1].contexts.len() == 5);
}

#[test]
fn nothing_stands_out_where_chance_routes() {
    let draws = Draws::new(4);
    let mut trace = texts(60, 64, 5, |row, domain| id(&draws, row, domain));
    let made = layer(trace.len(), 16, 2, |row| draws.different(1_000_000 + row as u64, 16, 2));
    trace.layers.insert(0, made);
    let labels = of(&trace).remove(0).experts.into_iter().filter(|words| words.label.kind != LabelKind::None);
    assert_eq!(labels.map(|words| words.sentence).collect::<Vec<_>>(), Vec::<String>::new());
}

#[test]
fn settings_and_losses_that_mean_nothing_are_refused() {
    let trace = texts(2, 4, 1, |row, _| row as u32);
    let of = |options| words::of(&trace, &options, &|_| String::new()).unwrap_err().to_string();
    assert!(of(WordOptions { level: 0.0, ..WordOptions::default() }).contains("level"));
    assert!(of(WordOptions { lift: f64::NAN, ..WordOptions::default() }).contains("lift"));
    let error = Ablation::of(&trace, 0, 0, &Label::default(), &[0.0; 3]).unwrap_err().to_string();
    assert!(error.contains("3 losses") && error.contains('8'));
}
