//! The experts composed from stock candle ops: what the kernels are held to, and what runs where there are none.

use candle_core::{Result, Tensor};
use senmon_kernels::activation::Activation;
use senmon_kernels::dispatch::EMPTY;
use senmon_kernels::expert_mlp::Shape;

/// `y` \[T, H\] from `x` \[T, H\], `gate_up` \[E, P, H\], `down` \[E, H, I\], `experts` and `weights` \[T, K\]: every expert
/// on every token, times the weight with which the token chose it (mostly 0).
pub fn experts(
    x: &Tensor,
    gate_up: &Tensor,
    down: &Tensor,
    experts: &[u32],
    weights: &Tensor,
    shape: Shape,
) -> Result<Tensor> {
    let (tokens, top_k) = weights.dims2()?;
    let mut y = x.zeros_like()?;
    for e in 0..gate_up.dim(0)? {
        let mask: Vec<f32> =
            experts.iter().map(|&pick| f32::from(pick != EMPTY && pick as usize == e)).collect();
        let mask = Tensor::from_vec(mask, (tokens, top_k), x.device())?;
        let weight = (weights * mask)?.sum_keepdim(1)?;
        let out = mlp(x, &gate_up.get(e)?, &down.get(e)?, shape)?;
        y = (y + out.broadcast_mul(&weight)?)?;
    }
    Ok(y)
}

/// One MLP on all tokens: `up` \[P, H\], `down` \[H, I\].
pub fn mlp(x: &Tensor, up: &Tensor, down: &Tensor, shape: Shape) -> Result<Tensor> {
    let pre = x.matmul(&up.t()?)?;
    let a = if shape.gated {
        let i = shape.intermediate;
        let up = pre.narrow(1, i, i)?;
        let up = match shape.activation {
            Activation::Clamped { limit, .. } => (up.clamp(-limit, limit)? + 1.0)?,
            _ => up,
        };
        (activate(&pre.narrow(1, 0, i)?, shape.activation)? * up)?
    } else {
        activate(&pre, shape.activation)?
    };
    a.matmul(&down.t()?)
}

fn activate(x: &Tensor, kind: Activation) -> Result<Tensor> {
    match kind {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::Relu => x.relu(),
        Activation::Relu2 => x.relu()?.sqr(),
        Activation::GeluTanh => x.gelu(),
        Activation::Clamped { alpha, limit } => {
            let x = x.minimum(limit)?;
            &x * candle_nn::ops::sigmoid(&(&x * alpha as f64)?)?
        }
    }
}
