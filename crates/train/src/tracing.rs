//! Text run through a model while its routing is recorded; and run again with experts switched off, to see what they are for.

use crate::error::{Result, TrainError};
use crate::eval::EvalText;
use senmon_insight::replay::Choice;
use senmon_insight::{About, EMPTY, Recorder, Trace};
use senmon_models::decoder::{Cache, Decoder, Pass};
use senmon_moe::router;
use std::collections::{BTreeMap, HashMap};

/// Logits that exist at once, at most, about.
const LOGITS: usize = 1 << 25;
/// Tokens of a pass, at most, unless a window is longer.
const TOKENS: usize = 4096;

/// The routing of the windows of a text, each a sequence of its own; `None` where `cancelled`. With `router_logits` the logits of
/// all routers are kept.
pub fn record(
    decoder: &Decoder,
    text: &EvalText,
    about: About,
    router_logits: bool,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Trace>> {
    let domains: Vec<u16> = text.windows.iter().map(|(_, domain)| *domain).collect();
    let windows: Vec<&[u32]> = text.windows.iter().map(|(tokens, _)| tokens.as_slice()).collect();
    let about = About { domains: text.domains.clone(), ..about };
    let mut trace = recorded(decoder, &windows, &domains, about, router_logits, None, cancelled)?;
    if let Some(trace) = trace.as_mut().filter(|_| !text.documents.is_empty()) {
        let of = |sequence: &u32| text.documents.get(*sequence as usize).copied().unwrap_or(u32::MAX);
        trace.documents = trace.sequence.iter().map(of).collect();
    }
    Ok(trace)
}

/// The texts of a trace run through the model again, with these experts in its layers: what another choice costs. Experts that are
/// left out weigh nothing, and the others what the model's router says.
pub fn replayed(
    decoder: &Decoder,
    trace: &Trace,
    choices: &BTreeMap<usize, Choice>,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Trace>> {
    if let Some((l, choice)) = choices.iter().find(|(_, c)| c.experts.len() != c.top_k * trace.len()) {
        let (found, tokens) = (choice.experts.len(), trace.len());
        return Err(TrainError::Conflict(format!("layer {l} has {found} slots for {tokens} tokens")));
    }
    let windows = windows_of(trace)?;
    let starts = (0..trace.len()).filter(|row| trace.position[*row] == 0);
    let domains: Vec<u16> = starts.map(|row| trace.domains[row]).collect();
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    recorded(decoder, &windows, &domains, trace.about.clone(), false, Some(choices), cancelled)
}

/// The loss of each token of a trace, as [`Trace::loss`], but with an expert of a layer switched off (`None`: with all): what it
/// gave is left out, and the rest of a token's experts weigh more. `None` where `cancelled`.
pub fn losses(
    decoder: &Decoder,
    trace: &Trace,
    off: Option<(usize, u32)>,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Vec<f32>>> {
    let windows = windows_of(trace)?;
    let mut losses = Vec::with_capacity(trace.len());
    let mut start = 0;
    while start < windows.len() {
        if cancelled() {
            return Ok(None);
        }
        let width = windows[start].len();
        let most = if mixes(decoder) { 1 } else { (TOKENS / width.max(1)).max(1) };
        let same = windows[start..].iter().take(most).take_while(|window| window.len() == width).count();
        let group = &windows[start..start + same];
        start += same;
        let inputs: Vec<u32> = group.iter().flat_map(|window| &window[..width - 1]).copied().collect();
        let targets: Vec<u32> = group.iter().flat_map(|window| &window[1..]).copied().collect();
        let mut pass = Pass { off, ..Pass::default() };
        let (loss, _) = decoder.loss(&inputs, &targets, same, None, &mut pass)?;
        losses.extend_from_slice(&loss.per_token);
    }
    Ok(Some(losses))
}

/// Whether tokens of one pass have to do with each other's experts: then each text is run alone, as the others are none of its business.
fn mixes(decoder: &Decoder) -> bool {
    let noncausal = |kind: &str| router::kind(kind).is_ok_and(|kind| kind.noncausal.is_some());
    decoder.moe_layers().any(|(_, moe)| noncausal(&moe.config().router.kind))
}

/// The texts of a trace, each with what follows its last token.
pub(crate) fn windows_of(trace: &Trace) -> Result<Vec<Vec<u32>>> {
    let mut windows: Vec<Vec<u32>> = Vec::new();
    for row in 0..trace.len() {
        match (trace.position[row], windows.last_mut()) {
            (0, _) => windows.push(vec![trace.tokens[row], trace.targets[row]]),
            (position, Some(window)) if window.len() == position as usize + 1 => {
                if window[position as usize] != trace.tokens[row] {
                    let what = format!("row {row} of the trace is not what followed the one before");
                    return Err(TrainError::Conflict(what));
                }
                window.push(trace.targets[row]);
            }
            _ => {
                let what = format!("row {row} of the trace goes on with no text: its texts are not whole");
                return Err(TrainError::Conflict(what));
            }
        }
    }
    match windows.iter().any(|window| window.last() == Some(&senmon_insight::NONE)) {
        true => {
            Err(TrainError::Conflict("a text of the trace does not say what follows its last token".into()))
        }
        false => Ok(windows),
    }
}

/// Runs windows of S + 1 tokens; `forced` has the experts for each.
fn recorded(
    decoder: &Decoder,
    windows: &[&[u32]],
    domains: &[u16],
    about: About,
    router_logits: bool,
    forced: Option<&BTreeMap<usize, Choice>>,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Trace>> {
    let vocab = decoder.spec().vocab;
    let mut recorder = Recorder::new(router_logits);
    let (mut first, mut row) = (0, 0);
    let most = if mixes(decoder) { 1 } else { usize::MAX };
    while first < windows.len() {
        if cancelled() {
            return Ok(None);
        }
        // As many as fit, at least one.
        let (mut group, mut tokens) = (0, 0);
        for window in &windows[first..] {
            let next = tokens + window.len().saturating_sub(1);
            if group > 0 && (group == most || next > TOKENS || next * vocab > LOGITS) {
                break;
            }
            (group, tokens) = (group + 1, next);
        }
        let inputs: Vec<&[u32]> = windows[first..first + group]
            .iter()
            .map(|window| &window[..window.len().saturating_sub(1)])
            .collect();
        let turns: Vec<(u32, &[u32])> =
            inputs.iter().enumerate().map(|(i, tokens)| ((first + i) as u32, *tokens)).collect();
        recorder.pass(&turns);
        let mut caches: Vec<Cache> =
            inputs.iter().map(|tokens| decoder.cache(tokens.len())).collect::<senmon_models::Result<_>>()?;
        let mut caches: Vec<&mut Cache> = caches.iter_mut().collect();
        let experts = forced.map(|choices| experts_of(choices, row..row + tokens));
        let mut pass = Pass { observer: Some(&mut recorder), forced: experts.as_ref(), ..Pass::default() };
        let logits = decoder.logits_batch(&inputs, &mut caches, false, &mut pass)?;
        for (i, logits) in logits.iter().enumerate() {
            recorder.predicted((first + i) as u32, logits);
            if let Some(last) = windows[first + i].last() {
                recorder.follows((first + i) as u32, *last);
            }
        }
        (first, row) = (first + group, row + tokens);
    }
    let mut trace = recorder.finish(about, |_| None)?;
    for (domain, sequence) in trace.domains.iter_mut().zip(&trace.sequence) {
        *domain = domains.get(*sequence as usize).copied().unwrap_or(0);
    }
    trace.validate()?;
    Ok(Some(trace))
}

/// The experts of some rows, as a pass takes them.
fn experts_of(choices: &BTreeMap<usize, Choice>, rows: std::ops::Range<usize>) -> HashMap<usize, Vec<u32>> {
    let slots = |choice: &Choice| {
        let picks = &choice.experts[rows.start * choice.top_k..rows.end * choice.top_k];
        picks.iter().map(|pick| if *pick == EMPTY { u32::MAX } else { u32::from(*pick) }).collect()
    };
    choices.iter().map(|(l, choice)| (*l, slots(choice))).collect()
}
