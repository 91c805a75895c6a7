//! The sum of the residual stream and what a block adds to it.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use senmon_kernels::buffers::Buffer;
use senmon_moe::tensor::slice;

/// `x + y`, both \[T, H\].
pub fn residual(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    x.apply_op2(y, Residual)
}

struct Residual;

impl CustomOp2 for Residual {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        y: &CpuStorage,
        ly: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if lx.shape() != ly.shape() {
            bail!("residual: {:?} and {:?} differ", lx.shape(), ly.shape());
        }
        let (x, y) = (slice("x", x, lx)?, slice("y", y, ly)?);
        let mut sum = Buffer::exact(x.len()).into_vec();
        senmon_kernels::residual::add(x, y, &mut sum);
        Ok((CpuStorage::F32(sum), lx.shape().clone()))
    }

    fn bwd(
        &self,
        _x: &Tensor,
        _y: &Tensor,
        _sum: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(d.clone()), Some(d.clone())))
    }
}
