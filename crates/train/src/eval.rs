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

/// Mean loss of the windows, `batch` of them at a time; `cancelled` is asked between batches.
pub fn evaluate(
    decoder: &Decoder,
    text: &EvalText,
    batch: usize,
    step: u64,
    tokens: u64,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<EvalRecord>> {
    let mut sums = vec![Sums::default(); text.domains.len()];
    let mut start = 0;
    while start < text.windows.len() {
        if cancelled() {
            return Ok(None);
        }
        let width = text.windows[start].0.len();
        let same =
            text.windows[start..].iter().take(batch.max(1)).take_while(|(w, _)| w.len() == width).count();
        let group = &text.windows[start..start + same];
        start += same;
        if width < 2 {
            continue;
        }
        let inputs: Vec<u32> = group.iter().flat_map(|(w, _)| &w[..width - 1]).copied().collect();
        let targets: Vec<u32> = group.iter().flat_map(|(w, _)| &w[1..]).copied().collect();
        let (loss, _) = decoder.loss(&inputs, &targets, same, None, &mut Pass::default())?;
        for (row, (losses, (window, domain))) in loss.per_token.chunks_exact(width - 1).zip(group).enumerate()
        {
            let Some(sum) = sums.get_mut(*domain as usize) else {
                let what = format!("window {row} is of domain {domain}, which has no name");
                return Err(TrainError::Conflict(what));
            };
            for (loss, target) in losses.iter().zip(&window[1..]) {
                sum.nats += f64::from(*loss);
                sum.bytes += u64::from(text.bytes_of_token.get(*target as usize).copied().unwrap_or(0));
                sum.tokens += 1;
            }
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
