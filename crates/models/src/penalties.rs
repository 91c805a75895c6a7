//! What is done to logits before a token is chosen: penalties for what was said before, and biases of tokens.

use crate::error::{ModelError, Result};
use std::collections::BTreeMap;

/// Penalties and biases; the default does nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Penalties {
    /// Logits of tokens in the prompt or the text so far are divided by it where they are above 0, multiplied where they are
    /// below (CTRL, 1909.05858).
    pub repetition: f32,
    /// Taken from the logits of tokens that the text so far has.
    pub presence: f32,
    /// Taken from the logits of tokens, for each time that the text so far has them.
    pub frequency: f32,
    /// Added to the logits of tokens; -∞ rules one out.
    pub bias: BTreeMap<u32, f32>,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { repetition: 1.0, presence: 0.0, frequency: 0.0, bias: BTreeMap::new() }
    }
}

impl Penalties {
    /// Checks the values for a vocabulary of `vocab`.
    pub fn validate(&self, vocab: usize) -> Result<()> {
        let refuse = |what: String| Err(ModelError::Option { what });
        if !(self.repetition.is_finite() && self.repetition > 0.0) {
            return refuse(format!("repetition-penalty = {} must be above 0", self.repetition));
        }
        for (name, value) in [("presence", self.presence), ("frequency", self.frequency)] {
            if !value.is_finite() {
                return refuse(format!("{name}-penalty = {value} must be a number"));
            }
        }
        for (token, bias) in &self.bias {
            if *token as usize >= vocab {
                return refuse(format!("logit-bias {token}={bias}: the vocabulary has {vocab} tokens"));
            }
            if bias.is_nan() || *bias == f32::INFINITY {
                return refuse(format!("logit-bias {token}={bias} must be a number, or -inf"));
            }
        }
        Ok(())
    }

    /// Changes the logits \[V\] of the token after `prompt` and `text`.
    pub fn apply(&self, logits: &mut [f32], prompt: &[u32], text: &[u32]) {
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        if self.presence != 0.0 || self.frequency != 0.0 || self.repetition != 1.0 {
            text.iter().for_each(|token| *counts.entry(*token).or_default() += 1);
        }
        if self.repetition != 1.0 {
            let said: std::collections::BTreeSet<u32> = prompt.iter().chain(text).copied().collect();
            for token in said {
                if let Some(x) = logits.get_mut(token as usize) {
                    *x = if *x > 0.0 { *x / self.repetition } else { *x * self.repetition };
                }
            }
        }
        for (token, count) in counts {
            if let Some(x) = logits.get_mut(token as usize) {
                *x -= self.presence + self.frequency * count as f32;
            }
        }
        for (token, bias) in &self.bias {
            if let Some(x) = logits.get_mut(*token as usize) {
                *x += bias;
            }
        }
    }
}

/// The natural logarithm of the probability of `token`, and the `most` likeliest tokens with theirs, by the model's own
/// distribution: logits \[V\] before penalties and temperature.
pub fn log_probabilities(logits: &[f32], token: u32, most: usize) -> (f64, Vec<(u32, f64)>) {
    let greatest = logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let sum: f64 = logits.iter().map(|x| f64::from(x - greatest).exp()).sum();
    let of = |token: u32| f64::from(logits[token as usize] - greatest) - sum.ln();
    let falling = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    if most < order.len() {
        order.select_nth_unstable_by(most, falling);
        order.truncate(most);
    }
    order.sort_unstable_by(falling);
    (of(token), order.into_iter().map(|token| (token, of(token))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_penalty_does_what_it_says() {
        let run = |penalties: Penalties| {
            let mut logits = [2.0, -2.0, 1.0, 0.5];
            penalties.apply(&mut logits, &[0, 1], &[2, 2, 9]);
            logits
        };
        assert_eq!(run(Penalties::default()), [2.0, -2.0, 1.0, 0.5]);
        assert_eq!(run(Penalties { repetition: 2.0, ..Penalties::default() }), [1.0, -4.0, 0.5, 0.5]);
        assert_eq!(run(Penalties { presence: 0.25, ..Penalties::default() }), [2.0, -2.0, 0.75, 0.5]);
        assert_eq!(run(Penalties { frequency: 0.25, ..Penalties::default() }), [2.0, -2.0, 0.5, 0.5]);
        let bias = BTreeMap::from([(0, f32::NEG_INFINITY), (3, 1.0)]);
        assert_eq!(run(Penalties { bias, ..Penalties::default() }), [f32::NEG_INFINITY, -2.0, 1.0, 1.5]);
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        let text = |penalties: Penalties| penalties.validate(10).unwrap_err().to_string();
        assert!(text(Penalties { repetition: 0.0, ..Penalties::default() }).contains("repetition"));
        assert!(text(Penalties { presence: f32::NAN, ..Penalties::default() }).contains("presence"));
        let bias =
            |token, value| Penalties { bias: BTreeMap::from([(token, value)]), ..Penalties::default() };
        assert!(text(bias(10, 0.0)).contains("10 tokens"));
        assert!(text(bias(1, f32::INFINITY)).contains("logit-bias 1"));
        assert!(bias(1, f32::NEG_INFINITY).validate(10).is_ok());
    }

    #[test]
    fn probabilities_sum_to_one() {
        let logits = [1.0, 3.0, 2.0, -1.0];
        let (second, all) = log_probabilities(&logits, 2, 9);
        assert_eq!(all.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 2, 0, 3]);
        assert!((all.iter().map(|(_, p)| p.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
        assert_eq!(all[1].1, second);
    }
}
