//! A truth that was planted is found: experts that were given a domain each in training are named by it and bear it out when they
//! are switched off; experts that were given tokens by lot are not said to be for a domain.

#![allow(clippy::unwrap_used)]

use senmon_insight::report::Report;
use senmon_insight::statistics::{self, Options};
use senmon_insight::words::{self, Checked, ExpertWords, LabelKind, Tally, WordOptions};
use senmon_insight::{About, Trace};
use senmon_models::decoder::Decoder;
use senmon_models::params::{initial_values, param_defs};
use senmon_models::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec};
use senmon_moe::RouterConfig;
use senmon_moe::rng::Stream;
use senmon_train::ablation::check;
use senmon_train::balancing::Balancing;
use senmon_train::config::{OptimizerConfig, RunConfig};
use senmon_train::eval::EvalText;
use senmon_train::step::{AdamW, MicroBatch, step};
use senmon_train::tracing::record;

const VOCAB: usize = 100;
const DOMAINS: usize = 10;
const LEN: usize = 32;

/// A window of a domain: tokens that mostly follow each other in the domain's own order.
fn window(domain: usize, number: u64, own: bool) -> Vec<u32> {
    let stream = Stream::new(&[7, domain as u64, number]);
    let size = VOCAB / DOMAINS;
    let mut tokens: Vec<u32> = Vec::new();
    for i in 0..=LEN as u64 {
        let lot = stream.uniform(2 * i);
        let any = ((stream.uniform(2 * i + 1) * size as f32) as usize).min(size - 1);
        // All domains share ten tokens, or each has ten of its own.
        let first = if own { domain * size } else { 0 };
        let within = match tokens.last() {
            Some(last) if lot < 0.85 => ((*last as usize - first) * 3 + domain + 1) % size,
            _ => any,
        };
        tokens.push((first + within) as u32);
    }
    tokens
}

/// A model whose router goes by a table of tokens, trained on all domains.
fn trained(layers: usize, steps: u64, own: bool, expert: impl Fn(usize) -> usize) -> Decoder {
    let router = RouterConfig { kind: "hash".into(), ..RouterConfig::default() };
    let moe = FfnSpec::Moe(MoeSpec { router, ..MoeSpec::plain(DOMAINS, 1, MlpSpec::gated(32)) });
    let attention = AttentionSpec::plain(2, 2, 16);
    // With one matrix for both, what follows a token must be computed: embeddings alone cannot say it.
    let spec = ModelSpec {
        max_positions: 64,
        tie_embeddings: true,
        ..ModelSpec::plain(VOCAB, 32, attention, vec![moe; layers])
    };
    let mut values = initial_values(&spec, 1);
    for (def, values) in param_defs(&spec).iter().zip(&mut values) {
        if def.name.ends_with(".router_table") {
            values.iter_mut().enumerate().for_each(|(token, of)| *of = expert(token) as f32);
        }
    }
    let decoder = Decoder::new(&spec, values, true).unwrap();
    let (mut adamw, mut balancing) = (AdamW::new(&decoder), Balancing::new(&RunConfig::default()));
    for number in 1..=steps {
        let mut next = |_| {
            let windows =
                (0..2 * DOMAINS as u64).map(|i| window(i as usize % DOMAINS, 1000 * number + i, own));
            Ok(MicroBatch { tokens: windows.flatten().collect(), batch: 2 * DOMAINS })
        };
        let config = OptimizerConfig::default();
        step(&decoder, &mut adamw, &mut balancing, &config, number, 1e-2, 0, 1, &mut next, "").unwrap();
    }
    decoder
}

fn traced(decoder: &Decoder, own: bool) -> Trace {
    let windows = (0..20).flat_map(|i| (0..DOMAINS).map(move |d| (window(d, i, own), d as u16)));
    let text = EvalText {
        documents: Vec::new(),
        windows: windows.collect(),
        domains: (0..DOMAINS).map(|d| format!("domain{d}")).collect(),
        bytes_of_token: vec![1; VOCAB],
    };
    record(decoder, &text, About::default(), true, &|| false).unwrap().unwrap()
}

/// Words and checks of all experts, and what the report says.
fn looked_at(decoder: &Decoder, trace: &Trace) -> (Vec<(ExpertWords, Checked)>, String) {
    let token = |id: u32| format!("t{id} ");
    let words = words::of(trace, &WordOptions::default(), &token).unwrap();
    let checked = check(decoder, trace, &words, 5, &mut |_, _| (), &|| false).unwrap().unwrap();
    let statistics = statistics::of(trace, &Options { ranks: vec![], ..Options::default() }).unwrap();
    let report = Report {
        model: "planted",
        trace,
        statistics: &statistics,
        words: &words,
        alike: &[],
        checked: Some(&checked),
        training: None,
        token: &token,
    };
    let html = report.page().to_html().unwrap();
    let experts = words.iter().flat_map(|layer| layer.experts.clone()).zip(checked.into_iter().flatten());
    (experts.collect(), html)
}

#[test]
fn experts_of_domains_are_named_and_bear_it_out() {
    let decoder = trained(1, 150, true, |token| token / (VOCAB / DOMAINS));
    let trace = traced(&decoder, true);
    let (experts, html) = looked_at(&decoder, &trace);
    let right = experts
        .iter()
        .enumerate()
        .filter(|(e, (words, _))| {
            words.label.kind == LabelKind::Domain && words.label.name == format!("domain{e}")
        })
        .count();
    assert!(
        right >= 9,
        "{right} of {DOMAINS}: {:?}",
        experts.iter().map(|(w, _)| &w.label).collect::<Vec<_>>()
    );
    let stand = experts.iter().filter(|(_, checked)| checked.stands()).count();
    assert!(
        stand >= 9,
        "{stand} of {DOMAINS}: {:?}",
        experts.iter().map(|(_, c)| c.confirmation).collect::<Vec<_>>()
    );
    assert!(html.contains("Experts of domains"));
}

#[test]
fn tokens_dealt_by_lot_make_no_experts_of_domains() {
    let lot = |token: usize| (token * 7 + 3) % DOMAINS;
    let decoder = trained(2, 60, false, lot);
    let trace = traced(&decoder, false);
    let (experts, html) = looked_at(&decoder, &trace);
    let tally = Tally::of(experts.iter().map(|(words, checked)| (words, Some(checked))));
    assert_eq!(tally.experts, 2 * DOMAINS);
    assert!(tally.domains_confirmed <= 1, "{tally:?}");
    assert!(html.contains("No specialisation by domain"));
}
