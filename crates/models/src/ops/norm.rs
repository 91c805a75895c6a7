//! RMSNorm of the residual stream.

use super::{add_gradient, taken};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::layout::Rows;
use senmon_kernels::norm;
use senmon_moe::Param;
use senmon_moe::tensor::{own, read, read2, slice};
use std::sync::{Mutex, PoisonError};

/// `x / rms(x) · weight` over the last dimension: \[T, H\] → \[T, H\].
pub fn rms_norm(x: &Tensor, weight: &Param, eps: f32) -> Result<Tensor> {
    x.apply_op1(RmsNorm { weight: weight.clone(), eps, inv_rms: Mutex::default() })
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
        let rows = Rows::plain(x.len() / width.max(1), width);
        let (mut y, mut inv_rms) = (Buffer::stale(x.len()).into_vec(), Buffer::stale(rows.count()));
        self.weight.read(|weight| {
            norm::rms_forward(rows, x, width, weight, self.eps, &mut y, width, &mut inv_rms)
        })?;
        *self.inv_rms.lock().unwrap_or_else(PoisonError::into_inner) = Some(inv_rms);
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let inv_rms = taken(&self.inv_rms, "rms-norm")?;
        let width = self.weight.tensor().elem_count();
        let rows = Rows::plain(x.elem_count() / width.max(1), width);
        let mut dx = Buffer::stale(x.elem_count()).into_vec();
        read2(x, dy, |x, dy| {
            read(self.weight.tensor(), |weight| {
                add_gradient(&self.weight, |dw| {
                    norm::rms_backward(
                        rows, dy, width, x, width, weight, &inv_rms, &mut dx, width, false, dw,
                    );
                });
            })
        })??;
        Ok(Some(own(dx, x.shape())?))
    }
}
