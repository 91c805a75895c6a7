//! How alike a model's experts are: what all of them give for some tokens of a text, and their weights.

use crate::error::Result;
use crate::tracing::windows_of;
use senmon_insight::statistics::{Alike, Mlp, Outputs};
use senmon_insight::{InsightError, Trace};
use senmon_kernels::activation::Activation;
use senmon_models::decoder::{Decoder, Pass};
use senmon_moe::layer::MoeLayer;
use senmon_moe::{Routing, RoutingObserver};
use std::collections::BTreeMap;

/// Texts that are run, at most, from all over the trace.
const TEXTS: usize = 16;
/// Tokens of a text that are looked at, at most.
const TOKENS: usize = 16;
/// Products that comparing outputs of a text in a layer may take; of larger layers fewer tokens are looked at.
const OUTPUT_WORK: usize = 1 << 29;
/// Products that comparing the weights of a layer may take; those of larger ones are not compared.
const WEIGHT_WORK: u128 = 1 << 35;

/// How alike the experts of each MoE layer are, over some tokens of a trace's texts; `None` where `cancelled`. `progress` hears how many
/// of all texts and layers are done.
pub fn of(
    decoder: &Decoder,
    trace: &Trace,
    progress: &mut dyn FnMut(usize, usize),
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Vec<Alike>>> {
    let windows = windows_of(trace)?;
    // The members of an ensemble do not have the same inputs.
    let alone = decoder.moe_layers().filter(|(_, moe)| moe.config().extras.members <= 1);
    let widths = alone.map(|(l, moe)| (l, (moe.config().experts, moe.config().inner()))).collect();
    let mut probe = Probe { widths, seen: BTreeMap::new(), failed: None };
    let texts = windows.len().min(TEXTS);
    let all = texts + decoder.moe_layers().count();
    for text in 0..texts {
        if cancelled() {
            return Ok(None);
        }
        progress(text, all);
        let window = &windows[text * windows.len() / texts];
        let tokens = &window[..window.len() - 1];
        let mut pass = Pass { observer: Some(&mut probe), ..Pass::default() };
        decoder.forward(tokens, 1, &mut pass)?;
    }
    if let Some(error) = probe.failed {
        return Err(error.into());
    }
    let mut found = Vec::new();
    for (done, (l, moe)) in decoder.moe_layers().enumerate() {
        if cancelled() {
            return Ok(None);
        }
        progress(texts + done, all);
        // Of an empty text nothing was seen, and of an ensemble nothing was asked for.
        let Some(seen) = probe.seen.remove(&l) else { continue };
        found.push(with_weights(l, moe, seen)?);
    }
    Ok(Some(found))
}

/// Whether the weights of a layer can be compared in bearable time.
fn is_small(moe: &MoeLayer) -> bool {
    let c = moe.config();
    let (experts, neurons, width) = (c.experts as u128, c.intermediate as u128, c.inner() as u128);
    // Each pair twice: once for chance.
    experts * experts * neurons * neurons * width * if c.gated { 3 } else { 2 } <= WEIGHT_WORK
}

fn with_weights(l: usize, moe: &MoeLayer, seen: Outputs) -> Result<Alike> {
    if !is_small(moe) {
        return Ok(seen.finish(l, &[])?);
    }
    let config = moe.config();
    let size = config.intermediate * config.inner();
    let up_is_factor = config.gated && !matches!(config.activation, Activation::Clamped { .. });
    let mlps = |up: &[f32], down: &[f32]| {
        let of = |e: usize| {
            let first = &up[e * size * if config.gated { 2 } else { 1 }..];
            let (gate, up) = match config.gated {
                true => (Some(&first[..size]), &first[size..2 * size]),
                false => (None, &first[..size]),
            };
            Mlp { gate, up, down: &down[e * size..][..size], hidden: config.inner(), up_is_factor }
        };
        let all: Vec<Mlp> = (0..config.experts).map(of).collect();
        seen.finish(l, &all)
    };
    Ok(moe.params().gate_up.read(|up| moe.params().down.read(|down| mlps(up, down)))???)
}

/// Asks for what experts give.
struct Probe {
    /// Experts and their outputs' width, by layer.
    widths: BTreeMap<usize, (usize, usize)>,
    seen: BTreeMap<usize, Outputs>,
    failed: Option<InsightError>,
}

impl RoutingObserver for Probe {
    fn routed(&mut self, _layer: usize, _routing: &Routing) {}

    fn probes(&mut self, layer: usize, tokens: usize) -> Vec<u32> {
        let Some(&(experts, width)) = self.widths.get(&layer) else { return Vec::new() };
        let most = OUTPUT_WORK / (experts * experts * width).max(1);
        let rows = most.clamp(2, TOKENS).min(tokens);
        (0..rows).map(|row| (row * tokens / rows) as u32).collect()
    }

    fn outputs(&mut self, layer: usize, rows: usize, experts: usize, outputs: &[f32]) {
        if let Err(error) = self.seen.entry(layer).or_default().add(rows, experts, outputs) {
            self.failed.get_or_insert(error);
        }
    }
}
