//! The head and its loss in one: linear + cross-entropy in chunks of tokens, so that the \[T, V\] logits of a batch never
//! exist at once.

use super::{add_gradient, taken};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::cross_entropy::{self, IGNORE};
use senmon_moe::Param;
use senmon_moe::tensor::{own, read, slice};
use std::sync::{Arc, Mutex, PoisonError};

/// The loss of a pass.
#[derive(Clone, Debug)]
pub struct LossTerms {
    /// Mean over the counted tokens, in nats: a scalar with gradient.
    pub mean: Tensor,
    /// Loss of each token, in nats, 0 where the target is ignored: \[T\].
    pub per_token: Arc<[f32]>,
    /// Tokens that count.
    pub counted: usize,
}

impl LossTerms {
    /// The loss of the mean of the probabilities of `members` predictions, of which `per_token` \[M, T\] has the losses.
    pub fn of_mean(self, members: usize) -> Result<Self> {
        let tokens = self.per_token.len() / members.max(1);
        let of = |t: usize| -> f64 {
            let chance = |m: usize| (-f64::from(self.per_token[m * tokens + t])).exp();
            -((0..members).map(chance).sum::<f64>() / members as f64).ln()
        };
        // A token that does not count has 0 from all members, and keeps it.
        let per_token: Vec<f32> = (0..tokens).map(|t| of(t) as f32).collect();
        let counted = self.counted / members.max(1);
        let sum: f64 = per_token.iter().map(|loss| f64::from(*loss)).sum();
        let mean = own(vec![(sum / counted.max(1) as f64) as f32], ())?;
        Ok(Self { mean, per_token: per_token.into(), counted })
    }
}

/// The cross-entropy of softmax(`x`·`head`ᵀ) at `targets` \[T\] ([`IGNORE`] where there is none), with `x` \[T, H\] and `head` \[V, H\].
///
/// Gradients are made in the forward pass, where the logits are: `upstream`, the factor with which the mean enters what
/// is minimised, must be known here (`None`: no gradients are wanted). Backward refuses any other.
pub fn lm_loss(x: &Tensor, head: &Param, targets: &[u32], upstream: Option<f32>) -> Result<LossTerms> {
    let vocab = head.tensor().dim(0)?;
    if let Some(target) = targets.iter().find(|t| **t != IGNORE && **t as usize >= vocab) {
        bail!("target {target} is not in a vocabulary of {vocab}");
    }
    let counted = targets.iter().filter(|t| **t != IGNORE).count();
    let losses = Arc::new(Mutex::new(Vec::new()));
    let op = LmLoss {
        head: head.clone(),
        targets: targets.into(),
        counted,
        upstream,
        losses: losses.clone(),
        dx: Mutex::default(),
    };
    let mean = if upstream.is_some() { x.apply_op1(op)? } else { x.apply_op1_no_bwd(&op)? };
    let per_token = std::mem::take(&mut *losses.lock().unwrap_or_else(PoisonError::into_inner)).into();
    Ok(LossTerms { mean, per_token, counted })
}

struct LmLoss {
    head: Param,
    targets: Vec<u32>,
    counted: usize,
    upstream: Option<f32>,
    losses: Arc<Mutex<Vec<f32>>>,
    dx: Mutex<Option<Vec<f32>>>,
}

impl CustomOp1 for LmLoss {
    fn name(&self) -> &'static str {
        "lm-loss"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, hidden) = l.shape().dims2()?;
        if tokens != self.targets.len() {
            bail!("lm-loss: {tokens} tokens and {} targets", self.targets.len());
        }
        let x = slice("x", x, l)?;
        let mut losses = vec![0.0; tokens];
        let precision = self.head.precision();
        self.head.read(|head| match self.upstream {
            None => cross_entropy::linear_cross_entropy(
                precision,
                x,
                head,
                hidden,
                &self.targets,
                &mut losses,
                None,
            ),
            Some(upstream) => {
                let scale = upstream / self.counted.max(1) as f32;
                let mut dx = Buffer::exact(x.len()).into_vec();
                add_gradient(&self.head, |dw| {
                    let grads = cross_entropy::Grads { scale, dx: &mut dx, dw };
                    cross_entropy::linear_cross_entropy(
                        precision,
                        x,
                        head,
                        hidden,
                        &self.targets,
                        &mut losses,
                        Some(grads),
                    );
                });
                *self.dx.lock().unwrap_or_else(PoisonError::into_inner) = Some(dx);
            }
        })?;
        let sum: f64 = losses.iter().map(|loss| *loss as f64).sum();
        let mean = (sum / self.counted.max(1) as f64) as f32;
        *self.losses.lock().unwrap_or_else(PoisonError::into_inner) = losses;
        Ok((CpuStorage::F32(vec![mean]), ().into()))
    }

    fn bwd(&self, x: &Tensor, _loss: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let found = read(upstream, |d| d[0])?;
        if self.upstream != Some(found) {
            bail!(
                "lm-loss: the gradient of the loss is {found}, but the gradients were made for {:?}",
                self.upstream
            );
        }
        Ok(Some(own(taken(&self.dx, "lm-loss")?, x.shape())?))
    }
}
