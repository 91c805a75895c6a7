//! The norms of the residual stream.

use super::{add_gradient, taken};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::layout::Rows;
use senmon_kernels::norm;
use senmon_moe::Param;
use senmon_moe::tensor::{own, read, read2, recycle, slice};
use std::sync::{Mutex, PoisonError};

/// A norm over the last dimension: RMSNorm, or LayerNorm where it has a bias.
#[derive(Clone, Debug)]
pub struct Norm {
    /// \[H\].
    pub weight: Param,
    /// \[H\].
    pub bias: Option<Param>,
    /// ε.
    pub eps: f32,
}

impl Norm {
    /// \[.., H\] → \[.., H\]. LayerNorm has no gradients.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if self.bias.is_some() {
            return own(read(x, |x| self.run(x))??.into_vec(), x.shape());
        }
        x.apply_op1(RmsNorm { weight: self.weight.clone(), eps: self.eps, inv_rms: Mutex::default() })
    }

    /// \[T, H\] → \[T, H\], without gradients.
    pub fn run(&self, x: &[f32]) -> Result<Buffer> {
        let mut y = Buffer::exact(x.len());
        match &self.bias {
            None => {
                self.forward(x, &mut y)?;
            }
            Some(bias) => {
                let width = self.weight.tensor().elem_count();
                let rows = Rows::plain(x.len() / width.max(1), width);
                let (mut mean, mut inv_std) = (Buffer::stale(rows.count()), Buffer::stale(rows.count()));
                self.weight.read(|w| {
                    bias.read(|b| {
                        let b = Some(b);
                        norm::layer_forward(
                            rows,
                            x,
                            width,
                            w,
                            b,
                            self.eps,
                            &mut y,
                            width,
                            &mut mean,
                            &mut inv_std,
                        );
                    })
                })??;
            }
        }
        Ok(y)
    }

    /// RMSNorm of `x` into `y`; 1/rms of each row, for its backward.
    pub fn forward(&self, x: &[f32], y: &mut [f32]) -> Result<Buffer> {
        let width = self.weight.tensor().elem_count();
        let rows = Rows::plain(x.len() / width.max(1), width);
        let mut inv_rms = Buffer::stale(rows.count());
        self.weight.read(|w| norm::rms_forward(rows, x, width, w, self.eps, y, width, &mut inv_rms))?;
        Ok(inv_rms)
    }
}

struct RmsNorm {
    weight: Param,
    eps: f32,
    /// \[T\], from forward to the first backward.
    inv_rms: Mutex<Option<Buffer>>,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice("x", x, lx)?;
        let width = self.weight.tensor().elem_count();
        if lx.shape().dims().last() != Some(&width) {
            bail!("rms-norm: x {:?} does not end in {width}", lx.shape());
        }
        let mut y = Buffer::exact(x.len()).into_vec();
        let norm = Norm { weight: self.weight.clone(), bias: None, eps: self.eps };
        *self.inv_rms.lock().unwrap_or_else(PoisonError::into_inner) = Some(norm.forward(x, &mut y)?);
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let inv_rms = taken(&self.inv_rms, "rms-norm")?;
        let width = self.weight.tensor().elem_count();
        let rows = Rows::plain(x.elem_count() / width.max(1), width);
        let mut dx = Buffer::exact(x.elem_count()).into_vec();
        read2(x, dy, |x, dy| {
            read(self.weight.tensor(), |weight| {
                add_gradient(&self.weight, |dw| {
                    norm::rms_backward(
                        rows, dy, width, x, width, weight, &inv_rms, &mut dx, width, false, dw,
                    );
                });
            })
        })??;
        recycle(dy.clone())?;
        Ok(Some(own(dx, x.shape())?))
    }
}
