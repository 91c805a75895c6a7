//! `noisy_topk`: noise on the logits while training.
//!
//! z' = z + n·σ with n ~ N(0, 1), σ = softplus(x·W_n) \[T, E\] (`noise = "learned"`) or one number (`"fixed"`, V-MoE: 1/E); then the k
//! greatest z', weights softmax over the picked z'. Without training n = 0. The smooth load of expert i is Σ_t P(x, i), P(x, i) =
//! Φ((z_i - t_i)/σ_i), where t_i is the k-th greatest of the z' of the other experts: the chance that i is picked when its own noise alone is
//! drawn again. Sources: Shazeer et al. 2017 (1701.06538, section 4 and appendix A); V-MoE (2106.05974).

use super::topk::picked_softmax;
use super::{Choice, RouteInput, Router, scaled};
use crate::config::{Noise, RouterConfig};
use crate::error::{MoeError, Result};
use crate::rng::Purpose;
use crate::router::select::{Groups, select};
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

/// What the smooth load divides by at least.
const LEAST_STD: f32 = 1e-6;

#[derive(Debug)]
pub(super) struct Noisy {
    noise: Noise,
    fixed: f64,
    scale: f64,
    groups: Groups,
}

impl Noisy {
    pub(super) fn build(config: &RouterConfig, experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        let fixed = if config.noise_std == 0.0 { 1.0 / experts as f64 } else { config.noise_std };
        Ok(Box::new(Self { noise: config.noise, fixed, scale: config.scale, groups: Groups::new(config, 1) }))
    }

    /// Σ_t P(x, i): \[E\].
    fn smooth_load(
        &self,
        clean: &Tensor,
        noisy: &Tensor,
        std: &Tensor,
        input: &RouteInput,
    ) -> Result<Tensor> {
        let (tokens, experts) = clean.dims2()?;
        let k = input.top_k;
        if k >= experts {
            return Ok(Tensor::full(tokens as f32, experts, clean.device())?);
        }
        // The k-th greatest of the others: that of all if i is not picked, else the one after it. As a gather, it has its gradient.
        let at: Vec<u32> = read(noisy, |noisy| {
            let mut order = Vec::new();
            let mut at = Vec::with_capacity(noisy.len());
            for row in noisy.chunks_exact(experts) {
                order.clear();
                super::top_k(row, k + 1, |_| true, &mut order);
                at.extend(
                    (0..experts as u32)
                        .map(|e| if order[..k].contains(&e) { order[k] } else { order[k - 1] }),
                );
            }
            at
        })?;
        let at = Tensor::from_vec(at, (tokens, experts), clean.device())?;
        let threshold = noisy.gather(&at, 1)?;
        // A learned deviation may go to 0.
        let x = ((clean - threshold)? / std.maximum(LEAST_STD)?)?;
        let chance = ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?.affine(0.5, 0.0)?;
        let counts: Vec<f32> = (0..tokens).map(|t| f32::from(u8::from(input.counts(t)))).collect();
        let counts = Tensor::from_vec(counts, (tokens, 1), clean.device())?;
        Ok(chance.broadcast_mul(&counts)?.sum(0)?)
    }
}

impl Router for Noisy {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let (mut seen, mut std) = (logits.clone(), None);
        if input.train {
            let deviation = match (self.noise, input.noise_std) {
                (Noise::Fixed, _) => Tensor::full(self.fixed as f32, (tokens, experts), logits.device())?,
                (Noise::Learned, Some(std)) => std.clone(),
                (Noise::Learned, None) => {
                    let what =
                        "router.noise = \"learned\" needs a deviation for each logit (`noise_std` [T, E])"
                            .into();
                    return Err(MoeError::Config { what });
                }
            };
            let noise: Vec<f32> = (0..tokens)
                .map(|t| input.draws.row(Purpose::Noise, t, experts))
                .flat_map(|row| (0..experts).map(move |e| row.normal(e)))
                .collect();
            let noise = Tensor::from_vec(noise, (tokens, experts), logits.device())?;
            seen = (logits + (noise * &deviation)?)?;
            std = Some(deviation);
        }
        let picks = match input.forced {
            Some(forced) => forced.to_vec(),
            None => read(&seen, |z| select(z, experts, input.top_k, self.groups))?,
        };
        let weights = scaled(picked_softmax(&seen, &picks, input.top_k)?, self.scale)?;
        let smooth_load = match &std {
            Some(std) => Some(self.smooth_load(logits, &seen, std, input)?),
            None => None,
        };
        Ok(Choice { smooth_load, ..Choice::new(picks, weights, softmax(&seen, D::Minus1)?)? })
    }
}
