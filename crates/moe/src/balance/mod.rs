//! Keeping the load even: the losses over all MoE layers of a pass, each with a name and a coefficient, and what needs no loss but a state.

mod state;

use crate::config::{AuxCounts, BalanceConfig, Convention};
use crate::error::Result;
use crate::layer::Routing;
use candle_core::{D, Device, Tensor};
use senmon_kernels::dispatch::EMPTY;
pub use state::{LEAST_MULTIPLIER, quantile, step_bias, step_multiplier};

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

/// What the losses of a pass go by besides its own routings.
#[derive(Clone, Copy, Debug, Default)]
pub struct Around<'a> {
    /// What the auxiliary loss and `l1` count, by layer, \[E\] each: the picks of all tokens of an optimiser step (`scope = "global"`), not of this pass.
    pub counts: Option<&'a [Vec<u64>]>,
    /// How many tokens those are.
    pub tokens: u64,
    /// The coefficient of `l1` (the kind `relu`).
    pub multiplier: f64,
}

/// What the auxiliary loss counts of a routing: \[E\].
pub fn counted<'a>(routing: &'a Routing, config: &BalanceConfig) -> &'a [u32] {
    if routing.mean_gates.is_some() {
        // Gates are open or shut; none is first.
        return &routing.picked_load;
    }
    let first = match config.convention {
        Convention::Deepspeed => routing.second_by_chance,
        Convention::Fairscale => true,
        _ => false,
    };
    match (config.aux_counts, &routing.unbiased_load) {
        _ if first => &routing.first_load,
        (AuxCounts::Unbiased, Some(load)) => load,
        _ => &routing.picked_load,
    }
}

/// The balance terms of one pass over the layers' routings; those with a coefficient of 0 are left out.
pub fn losses(routings: &[Routing], config: &BalanceConfig) -> Result<Vec<BalanceLoss>> {
    losses_of(routings, config, Around::default())
}

/// The same, for a pass that is part of an optimiser step.
pub fn losses_of(routings: &[Routing], config: &BalanceConfig, around: Around) -> Result<Vec<BalanceLoss>> {
    let mut terms = Vec::new();
    if routings.is_empty() {
        return Ok(terms);
    }
    let mut add = |name, coefficient: f64, value: &dyn Fn() -> Result<Tensor>| -> Result<()> {
        if coefficient != 0.0 {
            terms.push(BalanceLoss { name, coefficient, value: value()? });
        }
        Ok(())
    };
    add("aux", config.aux, &|| aux(routings, config, around.counts))?;
    add("z", config.z, &|| mean(routings, |r| Ok(r.z.clone())))?;
    add("sequence", config.sequence, &|| mean(routings, |r| sequence(r, config)))?;
    add("importance", config.importance, &|| mean(routings, |r| variation(&importance(r)?)))?;
    add("load", config.load, &|| {
        mean(routings, |r| match &r.smooth_load {
            Some(load) => variation(load),
            None => Ok(Tensor::zeros((), r.z.dtype(), r.z.device())?),
        })
    })?;
    add("entropy", config.entropy, &|| mean(routings, entropy))?;
    if routings.iter().all(|r| r.mean_gates.is_some()) {
        add("l1", around.multiplier, &|| by_layer(routings, &|layer, r| l1(r, around, layer)))?;
    }
    for name in ["distill", "predictor"] {
        let coefficient = if name == "distill" { config.distill } else { 1.0 };
        let term = |r: &Routing| r.terms.iter().find(|(of, _)| *of == name).map(|(_, term)| term.clone());
        if routings.iter().all(|r| term(r).is_some()) {
            add(name, coefficient, &|| mean(routings, |r| Ok(term(r).unwrap_or_else(|| r.z.clone()))))?;
        }
    }
    Ok(terms)
}

/// α-less auxiliary loss under the convention asked for.
fn aux(routings: &[Routing], config: &BalanceConfig, global: Option<&[Vec<u64>]>) -> Result<Tensor> {
    let fractions = |layer: usize, r: &Routing| -> Vec<f32> {
        let counts: Vec<f64> = match global.and_then(|global| global.get(layer)) {
            Some(counts) => counts.iter().map(|c| *c as f64).collect(),
            None => counted(r, config).iter().map(|c| f64::from(*c)).collect(),
        };
        let total = counts.iter().sum::<f64>().max(1.0);
        counts.iter().map(|c| (c / total) as f32).collect()
    };
    let one = |layer: usize, r: &Routing| product(&fractions(layer, r), &r.mean_scores);
    let layers = routings.len() as f64;
    match config.convention {
        Convention::Senmon => by_layer(routings, &one),
        Convention::Megatron | Convention::Deepspeed => Ok((by_layer(routings, &one)? * layers)?),
        // E·Σ f·P is E² times the mean of f·P.
        Convention::Fairscale => {
            let of = |layer: usize, r: &Routing| -> Result<Tensor> {
                Ok((one(layer, r)? / (r.picked_load.len() as f64).powi(2))?)
            };
            Ok((by_layer(routings, &of)? * layers)?)
        }
        Convention::Huggingface => {
            // The tokens of all layers count as one set; all layers see the same tokens, so its means are means over
            // layers.
            let first = &routings[0];
            if routings.iter().any(|r| r.load.len() != first.load.len() || r.asked != first.asked) {
                // Layers that differ in E or k have no joint f and P: the mean over layers stands for it.
                return by_layer(routings, &|layer, r| Ok((one(layer, r)? * r.asked as f64)?));
            }
            let all: Vec<Vec<f32>> = routings.iter().enumerate().map(|(l, r)| fractions(l, r)).collect();
            let f: Vec<f32> = (0..first.load.len())
                .map(|e| all.iter().map(|f| f[e]).sum::<f32>() / routings.len() as f32)
                .collect();
            let p = mean(routings, |r| Ok(r.mean_scores.clone()))?;
            Ok((product(&f, &p)? * first.asked as f64)?)
        }
    }
}

/// E · Σ f_i·P_i.
fn product(f: &[f32], p: &Tensor) -> Result<Tensor> {
    let f = Tensor::from_slice(f, f.len(), &Device::Cpu)?;
    Ok((f.mul(p)?.sum_all()? * f.elem_count() as f64)?)
}

/// Σ_e f_e · (mean of the gates of e), f_e = E/(K·T)·(open gates of e): ReMoE's penalty, which is greater where the load is.
fn l1(r: &Routing, around: Around, layer: usize) -> Result<Tensor> {
    let Some(gates) = &r.mean_gates else { return Ok(r.z.clone()) };
    let own = || r.picked_load.iter().map(|n| u64::from(*n)).collect();
    let global = around.counts.and_then(|counts| counts.get(layer));
    let (counts, tokens): (Vec<u64>, u64) = match global {
        Some(counts) => (counts.clone(), around.tokens),
        None => (own(), r.counted as u64),
    };
    let even = counts.len() as f64 / (r.asked as f64 * tokens.max(1) as f64);
    let f: Vec<f32> = counts.iter().map(|n| (even * *n as f64) as f32).collect();
    Ok(gates.mul(&Tensor::from_vec(f, counts.len(), gates.device())?)?.sum_all()?)
}

/// The mean over layers of what has to know which layer it is.
fn by_layer(routings: &[Routing], of: &dyn Fn(usize, &Routing) -> Result<Tensor>) -> Result<Tensor> {
    let mut sum = of(0, &routings[0])?;
    for (layer, routing) in routings.iter().enumerate().skip(1) {
        sum = (sum + of(layer, routing)?)?;
    }
    Ok((sum / routings.len() as f64)?)
}

/// The mean over layers.
fn mean(routings: &[Routing], of: impl Fn(&Routing) -> Result<Tensor>) -> Result<Tensor> {
    by_layer(routings, &|_, routing| of(routing))
}

/// 1 for tokens that count, else 0: \[T, 1\].
fn counts(r: &Routing, tokens: usize) -> Result<Tensor> {
    let ones = match &r.mask {
        None => vec![1.0f32; tokens],
        Some(mask) => mask.iter().map(|counts| f32::from(u8::from(*counts))).collect(),
    };
    Ok(Tensor::from_vec(ones, (tokens, 1), r.scores.device())?)
}

/// Mean over sequences of Σ_i f_i·P_i, f_i = E/(K·S)·(picks of i in the sequence), P_i = mean of its scores there; S counts tokens that count.
fn sequence(r: &Routing, config: &BalanceConfig) -> Result<Tensor> {
    let (tokens, e) = r.scores.dims2()?;
    let picked = match (config.aux_counts, &r.unbiased) {
        (AuxCounts::Unbiased, Some(unbiased)) => unbiased,
        _ => &r.picked,
    };
    let (b, k) = (r.sequences, picked.len() / tokens.max(1));
    let s = tokens / b;
    let counts = counts(r, tokens)?;
    let number = counts.reshape((b, s))?.sum_keepdim(1)?.maximum(1.0f32)?;
    let p = r.scores.broadcast_mul(&counts)?.reshape((b, s, e))?.sum(1)?.broadcast_div(&number)?;
    let mut f = vec![0.0f32; b * e];
    for (slot, pick) in picked.iter().enumerate().filter(|(_, pick)| **pick != EMPTY) {
        f[(slot / k.max(1) / s).min(b - 1) * e + *pick as usize] += e as f32;
    }
    // K is what is picked per token, which may differ from slots where those differ by token.
    let picks: usize = f.iter().map(|f| *f as usize).sum::<usize>() / e.max(1);
    let per_token = picks as f64 / r.counted.max(1) as f64;
    let f =
        Tensor::from_vec(f, (b, e), r.scores.device())?.broadcast_div(&(number * per_token.max(1e-9))?)?;
    Ok(((f * p)?.sum_all()? / b as f64)?)
}

/// Σ_t weight of each expert: \[E\].
fn importance(r: &Routing) -> Result<Tensor> {
    let experts = r.load.len();
    let index: Vec<u32> = r.experts.iter().map(|e| if *e == EMPTY { experts as u32 } else { *e }).collect();
    let index = Tensor::from_vec(index, r.weights.elem_count(), r.weights.device())?;
    // Empty slots go to one more place, which is left out.
    let sums = Tensor::zeros(experts + 1, r.weights.dtype(), r.weights.device())?;
    Ok(sums.index_add(&index, &r.weights.flatten_all()?, 0)?.narrow(0, 0, experts)?)
}

/// CV²: the variance (of the population) over the square of the mean.
fn variation(x: &Tensor) -> Result<Tensor> {
    let mean = x.mean_all()?;
    let variance = x.broadcast_sub(&mean)?.sqr()?.mean_all()?;
    Ok((variance / (mean.sqr()? + 1e-10)?)?)
}

/// Mean over tokens of the entropy of their scores, in nats.
fn entropy(r: &Routing) -> Result<Tensor> {
    let (tokens, _) = r.scores.dims2()?;
    let log = r.scores.maximum(f32::MIN_POSITIVE)?.log()?;
    let per_token = (&r.scores * log)?.sum_keepdim(D::Minus1)?.neg()?;
    Ok((per_token.mul(&counts(r, tokens)?)?.sum_all()? / r.counted.max(1) as f64)?)
}
