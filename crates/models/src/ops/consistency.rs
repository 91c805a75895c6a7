//! How far apart two predictions of the same tokens are: linear + symmetric KL divergence in chunks of tokens (THOR, 2110.04260).

use super::{add_gradient, taken};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use senmon_kernels::gemm::{self, View};
use senmon_moe::Param;
use senmon_moe::tensor::{own, read, slice};
use std::sync::{Mutex, PoisonError};

/// Tokens whose logits exist at once.
const CHUNK: usize = 256;

/// Mean over tokens of ½·(KL(p‖q) + KL(q‖p)) = ½·Σ_v (p_v - q_v)(ln p_v - ln q_v), in nats, with p = softmax(`x`·`head`ᵀ), q = softmax(`y`·`head`ᵀ); `x` and `y` \[T, H\],
/// `head` \[V, H\]: a scalar with gradient. As for [`super::lm_loss`] gradients are made in the forward pass, for the factor `upstream`.
pub fn consistency(x: &Tensor, y: &Tensor, head: &Param, upstream: f32) -> Result<Tensor> {
    let op = Consistency { head: head.clone(), upstream, gradients: Mutex::default() };
    x.contiguous()?.apply_op2(&y.contiguous()?, op)
}

struct Consistency {
    head: Param,
    upstream: f32,
    gradients: Mutex<Option<Vec<f32>>>,
}

/// The value of one pair of rows of logits, which become their gradients times `scale`.
fn row(a: &mut [f32], b: &mut [f32], scale: f64) -> f64 {
    let total = |z: &[f32]| {
        let most = f64::from(z.iter().fold(f32::NEG_INFINITY, |m, z| m.max(*z)));
        most + z.iter().map(|z| (f64::from(*z) - most).exp()).sum::<f64>().ln()
    };
    let (of_a, of_b) = (total(a), total(b));
    let at = |a: f32, b: f32| {
        let (l, m) = (f64::from(a) - of_a, f64::from(b) - of_b);
        (l.exp(), m.exp(), l - m)
    };
    let (mut value, mut under_p, mut under_q) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(&*b) {
        let (p, q, gap) = at(*a, *b);
        value += (p - q) * gap;
        under_p += p * gap;
        under_q += q * gap;
    }
    for (a, b) in a.iter_mut().zip(b) {
        let (p, q, gap) = at(*a, *b);
        *a = (0.5 * scale * (p * (gap - under_p) + p - q)) as f32;
        *b = (0.5 * scale * (q * (under_q - gap) + q - p)) as f32;
    }
    0.5 * value
}

impl CustomOp2 for Consistency {
    fn name(&self) -> &'static str {
        "consistency"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        y: &CpuStorage,
        ly: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, hidden) = lx.shape().dims2()?;
        let (x, y) = (slice("x", x, lx)?, slice("y", y, ly)?);
        if x.len() != y.len() {
            bail!("consistency: {:?} and {:?} are not of the same tokens", lx.shape(), ly.shape());
        }
        // Of x, then of y.
        let mut gradients = vec![0.0; 2 * x.len()];
        let scale = f64::from(self.upstream) / tokens.max(1) as f64;
        let mut sum = 0.0;
        let precision = self.head.precision();
        self.head.read(|head| {
            let vocab = head.len() / hidden.max(1);
            let w = View::rows(head, hidden);
            let mut logits = vec![0.0; 2 * CHUNK.min(tokens) * vocab];
            add_gradient(&self.head, |mut dw| {
                let (dx, dy) = gradients.split_at_mut(x.len());
                for first in (0..tokens).step_by(CHUNK) {
                    let rows = CHUNK.min(tokens - first);
                    let part = first * hidden..(first + rows) * hidden;
                    let (a, b) = logits[..2 * rows * vocab].split_at_mut(rows * vocab);
                    for (x, z) in [(&x[part.clone()], &mut *a), (&y[part.clone()], &mut *b)] {
                        gemm::parallel(
                            precision,
                            rows,
                            vocab,
                            hidden,
                            View::rows(x, hidden),
                            w.t(),
                            z,
                            vocab,
                            false,
                        );
                    }
                    for (a, b) in a.chunks_exact_mut(vocab).zip(b.chunks_exact_mut(vocab)) {
                        sum += row(a, b, scale);
                    }
                    for (dz, x, dx) in [
                        (&*a, &x[part.clone()], &mut dx[part.clone()]),
                        (&*b, &y[part.clone()], &mut dy[part.clone()]),
                    ] {
                        let dz = View::rows(dz, vocab);
                        gemm::parallel(precision, rows, hidden, vocab, dz, w, dx, hidden, false);
                        if let Some(dw) = &mut dw {
                            gemm::parallel(
                                precision,
                                vocab,
                                hidden,
                                rows,
                                dz.t(),
                                View::rows(x, hidden),
                                dw,
                                hidden,
                                true,
                            );
                        }
                    }
                }
            });
        })?;
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradients);
        Ok((CpuStorage::F32(vec![(sum / tokens.max(1) as f64) as f32]), ().into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _value: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let found = read(upstream, |d| d[0])?;
        if self.upstream != found {
            bail!("consistency: the gradient is {found}, but the gradients were made for {}", self.upstream);
        }
        let mut dx = taken(&self.gradients, "consistency")?;
        let dy = dx.split_off(x.elem_count());
        Ok((Some(own(dx, x.shape())?), Some(own(dy, y.shape())?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{D, Device, Var};
    use senmon_moe::rng::Stream;

    #[test]
    fn values_and_gradients_are_those_of_stock_ops() {
        let (tokens, hidden, vocab) = (300, 5, 11);
        let make = |seed: u64, dims: &[usize]| {
            let stream = Stream::new(&[seed]);
            let n = dims.iter().product::<usize>() as u64;
            let values: Vec<f32> = (0..n).map(|i| 2.0 * stream.uniform(i) - 1.0).collect();
            Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
        };
        let (x, y) = (make(1, &[tokens, hidden]), make(2, &[tokens, hidden]));
        let w = make(3, &[vocab, hidden]);
        let [x, y] = [x, y].map(|t| Var::from_tensor(&t).unwrap());
        let head =
            Param::trainable("head", w.flatten_all().unwrap().to_vec1().unwrap(), &[vocab, hidden]).unwrap();
        let got = consistency(&x, &y, &head, 0.7).unwrap();
        let grads = got.affine(f64::from(0.7f32), 0.0).unwrap().backward().unwrap();

        let w = Var::from_tensor(&w).unwrap();
        let of = |x: &Var| {
            let z = x.matmul(&w.t().unwrap()).unwrap();
            let total = z.log_sum_exp(D::Minus1).unwrap().unsqueeze(1).unwrap();
            z.broadcast_sub(&total).unwrap()
        };
        let (l, m) = (of(&x), of(&y));
        let gap = (&l - &m).unwrap();
        let p = (l.exp().unwrap() - m.exp().unwrap()).unwrap();
        let want = ((p * gap).unwrap().sum_all().unwrap() * (0.5 / tokens as f64)).unwrap();
        let want_grads = (&want * 0.7).unwrap().backward().unwrap();
        let off = |a: &Tensor, b: &Tensor| {
            (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
        };
        assert!(off(&got, &want) < 1e-6);
        for var in [&x, &y] {
            assert!(off(grads.get(var).unwrap(), want_grads.get(var).unwrap()) < 1e-6);
        }
        let dw =
            Tensor::from_vec(head.sink().unwrap().lock().clone(), (vocab, hidden), &Device::Cpu).unwrap();
        assert!(off(&dw, want_grads.get(&w).unwrap()) < 1e-5);
    }
}
