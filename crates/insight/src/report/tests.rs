//! The page of a made-up trace has every section, whatever is known of the model.

use super::*;
use crate::statistics::{self, Options};
use crate::trace::{About, LayerTrace};
use crate::words::{self, WordOptions};
use std::collections::BTreeMap;

/// Two domains, each with experts of its own in layer 1; layer 3 goes by the token.
pub(super) fn trace() -> Trace {
    let (texts, len) = (12, 20);
    let n = texts * len;
    let mut trace = Trace {
        about: About {
            model: "0123456789abcdef0123".into(),
            router: "topk_pre".into(),
            domains: vec!["md".into(), "rs".into()],
        },
        ..Trace::default()
    };
    for text in 0..texts {
        for position in 0..len {
            trace.tokens.push(((text * 7 + position * 3) % 11) as u32);
            trace.sequence.push(text as u32);
            trace.position.push(position as u32);
            trace.targets.push(((text * 7 + position * 3 + 3) % 11) as u32);
            trace.predicted.push(1);
            trace.loss.push(2.0);
            trace.domains.push((text % 2) as u16);
        }
    }
    let layer = |experts: Vec<u16>| LayerTrace {
        count: Some(4),
        top_k: 2,
        weights: [0.75, 0.25].repeat(n),
        dropped: vec![0; 2 * n],
        experts,
        ..LayerTrace::default()
    };
    let by_domain = (0..n).flat_map(|row| [2 * trace.domains[row], 2 * trace.domains[row] + 1]).collect();
    let by_token =
        (0..n).flat_map(|row| [(trace.tokens[row] % 4) as u16, ((trace.tokens[row] + 1) % 4) as u16]);
    trace.layers = BTreeMap::from([(1, layer(by_domain)), (3, layer(by_token.collect()))]);
    trace
}

fn checked(words: &[LayerWords]) -> Vec<Vec<Checked>> {
    words.iter().map(|layer| vec![Checked::default(); layer.experts.len()]).collect()
}

#[test]
fn a_page_has_every_section() {
    let trace = trace();
    let statistics = statistics::of(&trace, &Options { ranks: vec![2], ..Options::default() }).unwrap();
    let text = |id: u32| format!("<{id}>");
    let words = words::of(&trace, &WordOptions::default(), &text).unwrap();
    let checked = checked(&words);
    let training = Training {
        steps: vec![1, 2, 3],
        layers: vec![(1, vec![0.1, 0.2, 0.3], vec![1.0, 0.9, 0.9]), (3, vec![0.1; 3], vec![1.0; 3])],
        saturation: vec![(0, statistics::saturation(&trace, &trace).unwrap())],
    };
    let mut outputs = statistics::Outputs::default();
    outputs.add(2, 2, &[1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 1.0, 0.0]).unwrap();
    let alike = [outputs.finish(1, &[]).unwrap()];
    for (checked, training) in [(None, None), (Some(&checked[..]), Some(&training))] {
        let report = Report {
            model: "a <model>",
            trace: &trace,
            statistics: &statistics,
            words: &words,
            checked,
            alike: if training.is_some() { &alike } else { &[] },
            training,
            token: &text,
        };
        let html = report.page().to_html().unwrap();
        for part in ["overview", "load", "experts", "domains", "together", "text", "machines"] {
            assert!(html.contains(&format!("id=\"{part}\"")), "{part}");
        }
        assert!(html.contains("a &lt;model&gt;") && !html.contains("a <model>"));
        assert_eq!(html.contains("Load CV over training"), training.is_some());
        assert_eq!(html.contains("id=\"alike\""), training.is_some());
        assert_eq!(html.contains("Not checked"), checked.is_none());
    }
}

#[test]
fn layers_are_spread_from_the_first_to_the_last() {
    let layers: Vec<LayerStatistics> =
        (0..20).map(|layer| LayerStatistics { layer, ..LayerStatistics::default() }).collect();
    let shown: Vec<usize> = spread(&layers).map(|layer| layer.layer).collect();
    assert_eq!((shown.len(), shown[0], shown[MATRICES - 1]), (MATRICES, 0, 19));
    assert_eq!(spread(&layers[..1]).count(), 1);
    assert_eq!(spread(&[]).count(), 0);
}
