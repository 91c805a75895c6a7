//! Evaluation: loss and bits per byte on given sequences, in total and by domain.

use std::collections::BTreeMap;

use senmon_models::decoder::{Decoder, Pass};

use crate::error::{Result, TrainError};
use crate::observer::{DomainEval, EvalRecord};

/// What is evaluated.
#[derive(Clone, Debug)]
pub struct EvalText {
    /// Windows of S + 1 tokens, each of one domain.
    pub windows: Vec<(Vec<u32>, u16)>,
    /// The document that each window is from, or nothing where every window is one of its own.
    pub documents: Vec<u32>,
    /// Names of the domains.
    pub domains: Vec<String>,
    /// Bytes of text that each token stands for: \[V\].
    pub bytes_of_token: Vec<u32>,
}

#[derive(Clone, Copy, Default)]
struct Sums {
    nats: f64,
    tokens: u64,
    bytes: u64,
}

impl Sums {
    fn figures(&self) -> DomainEval {
        let bits = self.nats / std::f64::consts::LN_2;
        DomainEval {
            loss: self.nats / self.tokens.max(1) as f64,
            bits_per_byte: bits / self.bytes.max(1) as f64,
            tokens: self.tokens,
        }
    }
}

/// The loss of each predicted token, nats, one window after another: \[T\]; `batch` windows at a time, so that only their logits
/// are in memory. Nothing if `cancelled`, which is asked between batches.
pub fn losses(
    decoder: &Decoder,
    text: &EvalText,
    batch: usize,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Vec<f32>>> {
    let mut all = Vec::new();
    let mut rest = text.windows.as_slice();
    while let Some((first, _)) = rest.first() {
        if cancelled() {
            return Ok(None);
        }
        let width = first.len();
        let same = rest.iter().take(batch.max(1)).take_while(|(w, _)| w.len() == width).count();
        let (group, after) = rest.split_at(same);
        rest = after;
        if width < 2 {
            continue;
        }
        let inputs: Vec<u32> = group.iter().flat_map(|(w, _)| &w[..width - 1]).copied().collect();
        let targets: Vec<u32> = group.iter().flat_map(|(w, _)| &w[1..]).copied().collect();
        let (loss, _) = decoder.loss(&inputs, &targets, same, None, &mut Pass::default())?;
        all.extend_from_slice(&loss.per_token);
    }
    Ok(Some(all))
}

/// Mean loss of the windows, in total and by domain; as [`losses`].
pub fn evaluate(
    decoder: &Decoder,
    text: &EvalText,
    batch: usize,
    step: u64,
    tokens: u64,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<EvalRecord>> {
    if let Some((_, domain)) = text.windows.iter().find(|(_, domain)| *domain as usize >= text.domains.len())
    {
        return Err(TrainError::Conflict(format!("a window is of domain {domain}, which has no name")));
    }
    let Some(losses) = losses(decoder, text, batch, cancelled)? else { return Ok(None) };
    let mut losses = losses.iter();
    let mut sums = vec![Sums::default(); text.domains.len()];
    for (window, domain) in &text.windows {
        let sum = &mut sums[*domain as usize];
        for (target, loss) in window.iter().skip(1).zip(&mut losses) {
            sum.nats += f64::from(*loss);
            sum.bytes += u64::from(text.bytes_of_token.get(*target as usize).copied().unwrap_or(0));
            sum.tokens += 1;
        }
    }
    let mut all = Sums::default();
    let mut domains = BTreeMap::new();
    for (sum, name) in sums.iter().zip(&text.domains).filter(|(sum, _)| sum.tokens > 0) {
        all.nats += sum.nats;
        all.tokens += sum.tokens;
        all.bytes += sum.bytes;
        domains.insert(name.clone(), sum.figures());
    }
    let total = all.figures();
    Ok(Some(EvalRecord {
        step,
        tokens,
        eval_loss: total.loss,
        bits_per_byte: total.bits_per_byte,
        eval_tokens: total.tokens,
        domains,
    }))
}
