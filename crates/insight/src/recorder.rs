//! Records a trace while a model runs: the tokens of each pass before it, the routings during it, and the logits after it.

use crate::error::{InsightError, Result};
use crate::trace::{About, EMPTY, LayerTrace, NONE, Trace, name};
use senmon_moe::{Routing, RoutingObserver};
use std::collections::BTreeMap;

/// The id of an empty slot in a routing.
const UNPICKED: u32 = u32::MAX;

/// A trace in the making.
///
/// Before each pass [`pass`](Recorder::pass) says whose tokens it has; as the pass's observer it sees the routings; after it,
/// [`predicted`](Recorder::predicted) gets the logits. What [`follows`](Recorder::follows) the last token of a text is said when
/// it is known.
#[derive(Debug, Default)]
pub struct Recorder {
    trace: Trace,
    router_logits: bool,
    /// The first token of the present pass.
    first: usize,
    texts: BTreeMap<u32, Text>,
    failed: Option<InsightError>,
}

/// A text so far.
#[derive(Debug, Default)]
struct Text {
    /// Tokens before the present pass, and where in the trace those of the present pass are.
    len: u32,
    rows: std::ops::Range<usize>,
    /// The model's logits after its last token, until what follows is known.
    open: Option<Vec<f32>>,
}

impl Recorder {
    /// An empty trace; with `router_logits` it keeps the logits of all routers.
    pub fn new(router_logits: bool) -> Self {
        Self { router_logits, ..Self::default() }
    }

    /// The next pass has these tokens of these texts, in this order; they follow those of earlier passes.
    pub fn pass(&mut self, turns: &[(u32, &[u32])]) {
        self.first = self.trace.len();
        for (sequence, tokens) in turns {
            if let Some(token) = tokens.first() {
                self.follows(*sequence, *token);
            }
            let text = self.texts.entry(*sequence).or_default();
            let start = self.trace.tokens.len();
            for (token, next) in tokens.iter().zip(tokens.iter().skip(1).chain([&NONE])) {
                self.trace.tokens.push(*token);
                self.trace.sequence.push(*sequence);
                self.trace.position.push(text.len);
                self.trace.targets.push(*next);
                text.len += 1;
            }
            text.rows = start..self.trace.tokens.len();
        }
        let n = self.trace.tokens.len();
        self.trace.predicted.resize(n, NONE);
        self.trace.loss.resize(n, f32::NAN);
        self.trace.domains.resize(n, 0);
    }

    /// The model's logits after each of a text's tokens in the present pass: \[S, V\].
    pub fn predicted(&mut self, sequence: u32, logits: &[f32]) {
        let Some(text) = self.texts.get_mut(&sequence) else { return };
        let rows = text.rows.clone();
        if rows.is_empty() {
            return;
        }
        if logits.is_empty() || !logits.len().is_multiple_of(rows.len()) {
            let what = format!("{} logits are not those of {} tokens", logits.len(), rows.len());
            self.failed.get_or_insert(InsightError::trace(what));
            return;
        }
        for (row, logits) in rows.clone().zip(logits.chunks_exact(logits.len() / rows.len())) {
            self.trace.predicted[row] = likeliest(logits);
            let target = self.trace.targets[row];
            if target != NONE {
                self.trace.loss[row] = loss(logits, target);
            }
            if row + 1 == rows.end {
                text.open = Some(logits.to_vec());
            }
        }
    }

    /// `token` follows the last token of a text so far.
    pub fn follows(&mut self, sequence: u32, token: u32) {
        let Some(text) = self.texts.get_mut(&sequence) else { return };
        if let (Some(row), Some(logits)) = (text.rows.end.checked_sub(1), text.open.take()) {
            self.trace.targets[row] = token;
            self.trace.loss[row] = loss(&logits, token);
        }
    }

    /// The trace: texts in the order of their numbers, each from its beginning. `names` gives layers that are called otherwise
    /// than by their numbers what they are called.
    pub fn finish(mut self, about: About, names: impl Fn(usize) -> Option<String>) -> Result<Trace> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let n = self.trace.len();
        for (l, layer) in &mut self.trace.layers {
            layer.name = names(*l);
            pad(layer, n);
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_key(|row| (self.trace.sequence[*row], self.trace.position[*row]));
        let mut trace = if order.is_sorted() { self.trace } else { reordered(&self.trace, &order) };
        trace.about = about;
        trace.validate()?;
        Ok(trace)
    }

    /// Takes over what a layer did with the present pass.
    fn take(&mut self, l: usize, routing: &Routing) -> Result<()> {
        let (count, k) = (routing.real, routing.top_k);
        let failed = |what: String| InsightError::tensor(&name("experts", l), what);
        let passed = self.trace.len() - self.first;
        if k == 0 || routing.experts.len() != passed * k {
            let slots = routing.experts.len();
            return Err(failed(format!("{slots} slots of {k} a token are not those of {passed} tokens")));
        }
        let ids = routing.load.len();
        if ids >= usize::from(EMPTY) {
            return Err(failed(format!("{ids} experts are more than a trace has ids for, {EMPTY}")));
        }
        let read = |tensor: &senmon_moe::candle_core::Tensor| {
            senmon_moe::tensor::read(tensor, <[f32]>::to_vec).map_err(|e| failed(e.to_string()))
        };
        let weights = read(&routing.weights)?;
        let layer = self.trace.layers.entry(l).or_insert_with(|| LayerTrace {
            count: Some(count),
            top_k: k,
            logits: self.router_logits.then(Vec::new),
            ..LayerTrace::default()
        });
        if layer.count != Some(count) {
            return Err(failed(format!("{count} experts, {:?} before", layer.count)));
        }
        pad(layer, self.first);
        // Tokens of some routers have as many experts as they need.
        widen(layer, k);
        let slots = routing.experts.iter().zip(weights).zip(&routing.picked);
        for (slot, ((expert, weight), picked)) in slots.enumerate() {
            let empty = *expert == UNPICKED;
            layer.experts.push(if empty { EMPTY } else { *expert as u16 });
            layer.weights.push(if empty { 0.0 } else { weight });
            layer.dropped.push(u8::from(empty && *picked != UNPICKED));
            if (slot + 1).is_multiple_of(k) {
                for _ in k..layer.top_k {
                    layer.experts.push(EMPTY);
                    layer.weights.push(0.0);
                    layer.dropped.push(0);
                }
            }
        }
        if let Some(logits) = &mut layer.logits {
            // A router with other columns than experts has its scores, as logarithms.
            let by_expert = routing.logits.dim(1).is_ok_and(|columns| columns == ids);
            let of = if by_expert { routing.logits.clone() } else { routing.scores.clone() };
            // Of experts that compute nothing there are none.
            let rows = read(&of)?;
            let values = rows.chunks_exact(ids.max(1)).flat_map(|row| &row[..count]);
            logits.extend(values.map(|x| if by_expert { *x } else { x.ln() }));
        }
        Ok(())
    }
}

impl RoutingObserver for Recorder {
    fn routed(&mut self, layer: usize, routing: &Routing) {
        if self.failed.is_none() {
            self.failed = self.take(layer, routing).err();
        }
    }
}

/// Fills a layer up to `tokens` tokens with such as it did not see.
fn pad(layer: &mut LayerTrace, tokens: usize) {
    let slots = tokens * layer.top_k;
    layer.experts.resize(slots, EMPTY);
    layer.weights.resize(slots, 0.0);
    layer.dropped.resize(slots, 0);
    if let (Some(logits), Some(count)) = (&mut layer.logits, layer.count) {
        logits.resize(tokens * count, f32::NAN);
    }
}

/// Gives every token of a layer at least `slots` slots.
fn widen(layer: &mut LayerTrace, slots: usize) {
    fn rows<T: Copy>(values: &mut Vec<T>, from: usize, to: usize, fill: T) {
        let wide = values
            .chunks_exact(from)
            .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(fill, to - from)));
        *values = wide.collect();
    }
    let before = layer.top_k;
    if slots > before {
        rows(&mut layer.experts, before, slots, EMPTY);
        rows(&mut layer.weights, before, slots, 0.0);
        rows(&mut layer.dropped, before, slots, 0);
        layer.top_k = slots;
    }
}

/// The tokens of a trace in another order.
fn reordered(trace: &Trace, order: &[usize]) -> Trace {
    fn rows<T: Copy>(values: &[T], width: usize, order: &[usize]) -> Vec<T> {
        order.iter().flat_map(|row| &values[row * width..][..width]).copied().collect()
    }
    let layer = |(l, layer): (&usize, &LayerTrace)| {
        let k = layer.top_k;
        let logits = layer.logits.as_ref().zip(layer.count).map(|(x, count)| rows(x, count, order));
        let layer = LayerTrace {
            name: layer.name.clone(),
            count: layer.count,
            top_k: k,
            experts: rows(&layer.experts, k, order),
            weights: rows(&layer.weights, k, order),
            dropped: rows(&layer.dropped, k, order),
            logits,
        };
        (*l, layer)
    };
    Trace {
        about: trace.about.clone(),
        tokens: rows(&trace.tokens, 1, order),
        sequence: rows(&trace.sequence, 1, order),
        position: rows(&trace.position, 1, order),
        targets: rows(&trace.targets, 1, order),
        predicted: rows(&trace.predicted, 1, order),
        loss: rows(&trace.loss, 1, order),
        domains: rows(&trace.domains, 1, order),
        documents: match trace.documents.is_empty() {
            true => Vec::new(),
            false => rows(&trace.documents, 1, order),
        },
        layers: trace.layers.iter().map(layer).collect(),
    }
}

/// The greatest of the logits \[V\], the lowest id of several.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = (NONE, f32::NEG_INFINITY);
    for (token, x) in logits.iter().enumerate() {
        if best.0 == NONE && !x.is_nan() || *x > best.1 {
            best = (token as u32, *x);
        }
    }
    best.0
}

/// -ln p(target) by the logits \[V\].
fn loss(logits: &[f32], target: u32) -> f32 {
    let Some(x) = logits.get(target as usize) else { return f32::NAN };
    let greatest = f64::from(logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x)));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - greatest).exp()).sum();
    (greatest + sum.ln() - f64::from(*x)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use senmon_moe::candle_core::{Device, Tensor};

    fn routing(experts: &[u32], k: usize, dropped: usize) -> Routing {
        let tokens = experts.len() / k;
        let tensor =
            |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        let weights = (0..experts.len()).map(|i| 0.5 + i as f32).collect();
        let logits = tensor((0..3 * tokens).map(|i| i as f32).collect(), &[tokens, 3]);
        let routing = Routing::new(experts.to_vec(), tensor(weights, &[tokens, k]), logits).unwrap();
        let picked = |e: &u32| if dropped > 0 && *e == UNPICKED { 0 } else { *e };
        Routing { dropped, picked: experts.iter().map(picked).collect(), ..routing }
    }

    #[test]
    fn tokens_have_as_many_slots_as_the_widest_and_drops_are_told_from_empty_slots() {
        let mut recorder = Recorder::new(true);
        recorder.pass(&[(0, &[5, 6])]);
        recorder.routed(0, &routing(&[0, 1], 1, 0));
        recorder.pass(&[(0, &[7])]);
        let mut wide = routing(&[2, 1, UNPICKED, UNPICKED], 4, 0);
        wide.picked[2] = 0;
        recorder.routed(0, &wide);
        recorder.pass(&[(0, &[8])]);
        recorder.routed(0, &routing(&[2, 0], 2, 0));
        let about = About { domains: vec!["text".into()], ..About::default() };
        let trace = recorder.finish(about, |_| None).unwrap();
        let layer = &trace.layers[&0];
        let e = EMPTY;
        assert_eq!(layer.top_k, 4);
        assert_eq!(layer.experts, [0, e, e, e, 1, e, e, e, 2, 1, e, e, 2, 0, e, e]);
        assert_eq!(layer.dropped, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn texts_of_a_batch_are_put_in_order_and_what_follows_is_known() {
        let mut recorder = Recorder::new(true);
        recorder.pass(&[(1, &[7, 8]), (0, &[5])]);
        recorder.routed(2, &routing(&[0, 1, 2], 1, 0));
        recorder.predicted(1, &[0.0, 1.0, 3.0, 3.0]);
        recorder.predicted(0, &[0.0, 0.0]);
        recorder.follows(1, 0);
        recorder.pass(&[(0, &[1]), (1, &[0])]);
        // Another layer, which did not see the first pass.
        recorder.routed(3, &routing(&[0, 1, u32::MAX, 2], 2, 1));
        recorder.predicted(1, &[1.0, 0.0]);
        let about = About { domains: vec!["text".into()], ..About::default() };
        let trace = recorder.finish(about, |_| None).unwrap();
        assert_eq!(trace.sequence, [0, 0, 1, 1, 1]);
        assert_eq!(trace.position, [0, 1, 0, 1, 2]);
        assert_eq!(trace.tokens, [5, 1, 7, 8, 0]);
        assert_eq!(trace.targets, [1, NONE, 8, 0, NONE]);
        assert_eq!(trace.predicted, [0, NONE, 1, 0, 0]);
        // The target 8 is no token of these two: it has no probability.
        assert!(trace.loss[1].is_nan() && trace.loss[2].is_nan() && trace.loss[4].is_nan());
        assert!((trace.loss[0] - 2f32.ln()).abs() < 1e-6 && (trace.loss[3] - 2f32.ln()).abs() < 1e-6);
        assert_eq!(trace.layers[&2].experts, [2, EMPTY, 0, 1, EMPTY]);
        assert_eq!(trace.layers[&2].weights, [2.5, 0.0, 0.5, 1.5, 0.0]);
        assert_eq!(trace.layers[&2].dropped, [0; 5]);
        assert_eq!(trace.layers[&2].logits.as_ref().unwrap()[..3], [6.0, 7.0, 8.0]);
        assert!(trace.layers[&2].logits.as_ref().unwrap()[3].is_nan());
        assert_eq!(trace.layers[&3].experts[2..4], [0, 1]);
        assert_eq!(trace.layers[&3].experts[8..], [EMPTY, 2]);
        assert_eq!(trace.layers[&3].dropped[8..], [1, 0]);
    }

    #[test]
    fn a_routing_that_is_not_of_the_pass_is_refused() {
        let mut recorder = Recorder::new(false);
        recorder.pass(&[(0, &[1, 2])]);
        recorder.routed(0, &routing(&[0, 1, 2], 1, 0));
        let error = recorder.finish(About::default(), |_| None).unwrap_err().to_string();
        assert!(error.contains("experts.0") && error.contains("2 tokens"), "{error}");
    }
}
