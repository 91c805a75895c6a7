//! The heavy parts of a layer as candle ops with gradients, over `senmon-kernels`.
//!
//! An op has one output and at most three tensor arguments. What forward keeps for backward is freed by the first backward, and the
//! gradient that an op is given is its own to give away when it has read it: candle has added it up for this op alone.

mod experts;

use crate::param::{Param, Sink};
use crate::tensor::{own, read, read2, recycle, slice};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape as TensorShape, Tensor, bail};
pub use experts::{biased_mlp, down, down_combine, experts, gated_up, mlp};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::gemm::{self, Operand, Precision, Product, View};
use senmon_kernels::packed;
use senmon_kernels::simd::Level;

/// `y` \[.., O\] = `x` \[.., I\] · `w`ᵀ, with `w` \[O, I\].
pub fn linear(x: &Tensor, w: &Param) -> Result<Tensor> {
    if w.as_stored().is_some() || w.as_packed().is_some() {
        let (&[.., inputs], &[outputs, cols]) = (x.dims(), w.dims()) else { bail!("linear: {:?}", w.dims()) };
        if inputs != cols {
            bail!("linear: x {:?} does not fit {} {:?}", x.shape(), w.name(), w.dims());
        }
        let mut dims = x.dims().to_vec();
        dims.last_mut().into_iter().for_each(|last| *last = outputs);
        let y = read(&x.contiguous()?, |x| product(x, w))??;
        return own(y.into_vec(), dims);
    }
    x.contiguous()?.apply_op2(w.tensor(), Linear { sink: w.sink().cloned(), precision: w.precision() })
}

/// `x` \[T, I\] · `w`ᵀ with `w` \[O, I\], without gradients: \[T, O\].
pub fn product(x: &[f32], w: &Param) -> Result<Buffer> {
    let &[outputs, inputs] = w.dims() else { bail!("{}: {:?} is no matrix", w.name(), w.dims()) };
    let mut y = Buffer::exact(x.len() / inputs.max(1) * outputs);
    product_into(x, w, &mut y, false)?;
    Ok(y)
}

/// As [`product`], into `y` or added to it.
pub fn product_into(x: &[f32], w: &Param, y: &mut [f32], accumulate: bool) -> Result<()> {
    let &[outputs, inputs] = w.dims() else { bail!("{}: {:?} is no matrix", w.name(), w.dims()) };
    let rows = x.len() / inputs.max(1);
    if x.len() != rows * inputs || y.len() != rows * outputs {
        bail!("{}: {} inputs and {} outputs do not fit {:?}", w.name(), x.len(), y.len(), w.dims());
    }
    if let Some(w) = w.as_packed() {
        packed::linear(Level::current(), packed::Linear { x, weights: &w.matrices(), y, accumulate });
        return Ok(());
    }
    w.matrices(|parts| {
        let mut c_start = 0;
        let products: Vec<Product> = parts
            .iter()
            .map(|part| {
                let (a, b) = (Operand::k_inner(x, inputs), Operand::weight(*part));
                let product = Product {
                    m: rows,
                    n: part.rows,
                    k: inputs,
                    a,
                    b,
                    c_start,
                    c_stride: outputs,
                    accumulate,
                    twin: None,
                    twin_b: None,
                };
                c_start += part.rows;
                product
            })
            .collect();
        gemm::run_all(w.precision(), &products, y, |_: gemm::Tile| {});
    })
}

/// Adds a weight's gradient: into its sink, or else into zeros that are returned when the weight is tracked.
pub fn weight_gradient(
    sink: Option<&Sink>,
    w: &Tensor,
    add: impl FnOnce(Option<&mut [f32]>) -> Result<()>,
) -> Result<Option<Tensor>> {
    match sink {
        Some(sink) => {
            add(Some(&mut sink.lock()))?;
            Ok(None)
        }
        None if w.track_op() => {
            let mut zeros = vec![0.0; w.elem_count()];
            add(Some(&mut zeros))?;
            Ok(Some(own(zeros, w.shape())?))
        }
        None => {
            add(None)?;
            Ok(None)
        }
    }
}

/// The values of a small parameter for stock ops: its gradient goes where that of the kernels' weights goes.
pub fn watched(param: &Param) -> Result<Tensor> {
    match param.sink() {
        None => Ok(param.tensor().clone()),
        Some(sink) => param.tensor().apply_op1(Watched { sink: sink.clone() }),
    }
}

struct Watched {
    sink: Sink,
}

impl CustomOp1 for Watched {
    fn name(&self) -> &'static str {
        "watched"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, TensorShape)> {
        Ok((CpuStorage::F32(slice("a parameter", x, layout)?.to_vec()), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        weight_gradient(Some(&self.sink), x, |dw| match dw {
            None => Ok(()),
            Some(dw) => read(dy, |dy| dw.iter_mut().zip(dy).for_each(|(sum, d)| *sum += d)),
        })
    }
}

/// What a block gives, added to the residual stream `onto` of its shape, if it is to be: in place of candle's sum, on all threads, and
/// gradients are not copied. The memory of `y` is kept.
pub fn added(y: Tensor, onto: Option<&Tensor>) -> Result<Tensor> {
    let Some(onto) = onto else { return Ok(y) };
    let sum = onto.apply_op2(&y, Residual)?;
    recycle(y)?;
    Ok(sum)
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
    ) -> Result<(CpuStorage, TensorShape)> {
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

struct Linear {
    sink: Option<Sink>,
    precision: Precision,
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, TensorShape)> {
        let (outputs, inputs) = lw.shape().dims2()?;
        let mut dims = lx.shape().dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == inputs => *last = outputs,
            _ => bail!("linear: x {:?} does not fit w {:?}", lx.shape(), lw.shape()),
        }
        let (x, w) = (slice("x", x, lx)?, slice("w", w, lw)?);
        let rows = x.len() / inputs.max(1);
        let mut y = Buffer::exact(rows * outputs).into_vec();
        gemm::parallel(
            self.precision,
            rows,
            outputs,
            inputs,
            View::rows(x, inputs),
            View::rows(w, inputs).t(),
            &mut y,
            outputs,
            false,
        );
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = w.dims2()?;
        let rows = x.elem_count() / inputs.max(1);
        let dx = read2(dy, w, |dy, w| {
            let mut dx = Buffer::exact(rows * inputs).into_vec();
            let (a, b) = (View::rows(dy, outputs), View::rows(w, inputs));
            gemm::parallel(self.precision, rows, inputs, outputs, a, b, &mut dx, inputs, false);
            dx
        })?;
        let dw = weight_gradient(self.sink.as_ref(), w, |dw| match dw {
            None => Ok(()),
            Some(dw) => read2(dy, x, |dy, x| {
                let (a, b) = (View::rows(dy, outputs).t(), View::rows(x, inputs));
                gemm::parallel(self.precision, outputs, inputs, rows, a, b, dw, inputs, true);
            }),
        })?;
        recycle(dy.clone())?;
        Ok((Some(own(dx, x.shape())?), dw))
    }
}
