//! Keeping the load even: the losses over all MoE layers of a pass, each with a name and a coefficient, and the bias
//! that needs no loss.

use crate::config::{AuxCounts, BalanceConfig, Convention};
use crate::error::Result;
use crate::layer::Routing;
use candle_core::{Device, Tensor};

/// One term of what is minimised.
#[derive(Debug)]
pub struct BalanceLoss {
    /// The name in the log.
    pub name: &'static str,
    /// The factor on `value` in the total.
    pub coefficient: f64,
    /// A scalar with gradient, before its coefficient.
    pub value: Tensor,
}

/// The balance terms of one pass over the layers' routings; those with a coefficient of 0 are left out.
pub fn losses(routings: &[Routing], config: &BalanceConfig) -> Result<Vec<BalanceLoss>> {
    let mut terms = Vec::new();
    if routings.is_empty() {
        return Ok(terms);
    }
    if config.aux != 0.0 {
        terms.push(BalanceLoss { name: "aux", coefficient: config.aux, value: aux(routings, config)? });
    }
    if config.z != 0.0 {
        terms.push(BalanceLoss {
            name: "z",
            coefficient: config.z,
            value: mean(routings, |r| Ok(r.z.clone()))?,
        });
    }
    Ok(terms)
}

/// α-less auxiliary loss under the convention asked for.
fn aux(routings: &[Routing], config: &BalanceConfig) -> Result<Tensor> {
    let fractions = |r: &Routing| -> Vec<f32> {
        let counts = match (config.aux_counts, &r.unbiased_load) {
            (AuxCounts::Unbiased, Some(load)) => load,
            _ => &r.load,
        };
        let total = counts.iter().map(|c| *c as f64).sum::<f64>().max(1.0);
        counts.iter().map(|c| (*c as f64 / total) as f32).collect()
    };
    let one = |r: &Routing| product(&fractions(r), &r.mean_scores);
    match config.convention {
        Convention::Senmon => mean(routings, one),
        Convention::Megatron => Ok((mean(routings, one)? * routings.len() as f64)?),
        Convention::Huggingface => {
            // The tokens of all layers count as one set; all layers see the same tokens, so its means are means over
            // layers.
            let first = &routings[0];
            if routings.iter().any(|r| r.load.len() != first.load.len() || r.top_k != first.top_k) {
                // Layers that differ in E or k have no joint f and P: the mean over layers stands for it.
                return mean(routings, |r| Ok((one(r)? * r.top_k as f64)?));
            }
            let all: Vec<Vec<f32>> = routings.iter().map(fractions).collect();
            let f: Vec<f32> = (0..first.load.len())
                .map(|e| all.iter().map(|f| f[e]).sum::<f32>() / routings.len() as f32)
                .collect();
            let p = mean(routings, |r| Ok(r.mean_scores.clone()))?;
            Ok((product(&f, &p)? * first.top_k as f64)?)
        }
    }
}

/// E · Σ f_i·P_i.
fn product(f: &[f32], p: &Tensor) -> Result<Tensor> {
    let f = Tensor::from_slice(f, f.len(), &Device::Cpu)?;
    Ok((f.mul(p)?.sum_all()? * f.elem_count() as f64)?)
}

/// The mean over layers.
fn mean(routings: &[Routing], of: impl Fn(&Routing) -> Result<Tensor>) -> Result<Tensor> {
    let mut sum = of(&routings[0])?;
    for routing in &routings[1..] {
        sum = (sum + of(routing)?)?;
    }
    Ok((sum / routings.len() as f64)?)
}

/// One step of the selection bias: b_i += rate · sign(mean(c) - c_i), from the counts `load` of a whole global batch; with
/// `recentre` the mean of b goes back to 0 (2408.15664).
pub fn step_bias(bias: &mut [f32], load: &[u64], rate: f64, recentre: bool) {
    let mean = load.iter().sum::<u64>() as f64 / load.len().max(1) as f64;
    for (b, &count) in bias.iter_mut().zip(load) {
        let gap = mean - count as f64;
        if gap != 0.0 {
            *b += (rate * gap.signum()) as f32;
        }
    }
    if recentre && !bias.is_empty() {
        let mean = bias.iter().map(|b| *b as f64).sum::<f64>() / bias.len() as f64;
        for b in bias.iter_mut() {
            *b -= mean as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bias_goes_up_where_the_load_is_low() {
        let mut bias = vec![0.5, 0.0, 0.0];
        step_bias(&mut bias, &[10, 1, 4], 0.25, false);
        assert_eq!(bias, [0.25, 0.25, 0.25]);
        step_bias(&mut bias, &[10, 1, 1], 0.25, true);
        assert!(bias.iter().sum::<f32>().abs() < 1e-6 && bias[1] > bias[0]);
        step_bias(&mut bias, &[2, 2, 2], 0.25, false);
        assert!(bias[1] > bias[0]);
    }
}
