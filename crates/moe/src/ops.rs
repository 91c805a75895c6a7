//! The heavy parts of a layer as candle ops with gradients, over `senmon-kernels`.
//!
//! An op has one output and at most three tensor arguments. A layer of experts is two products, [`gated_up`] and
//! [`down_combine`], with the dispatch inside them, shared; where their weights have sinks, and so are no arguments,
//! [`experts`] has both in one op: candle adds every gradient that passes through it into fresh zeros. What forward keeps
//! for backward is freed by the first backward.

use crate::param::{Param, Sink};
use crate::tensor::{own, read, read2, shaped, slice};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape as TensorShape, Tensor, bail,
};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::dispatch::Dispatch;
use senmon_kernels::elements::Matrix;
use senmon_kernels::expert_mlp::{self, Shape};
use senmon_kernels::gemm::{self, Operand, Precision, Product, View};
use senmon_kernels::packed::{self, Expert, MlpBiases};
use senmon_kernels::simd::Level;
use std::sync::{Arc, Mutex, PoisonError};

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

/// The MLPs of experts: `y` \[T, H\] from `x` \[T, H\], `up` \[E, P, H\], `down` \[E, H, I\], biases \[E, P\] and \[E, H\], which have no
/// gradients, and `weights` \[T, K\] (none: all 1).
pub fn experts(
    x: &Tensor,
    up: &Param,
    down: &Param,
    biases: Option<&(Param, Param)>,
    weights: Option<&Tensor>,
    dispatch: &Arc<Dispatch>,
    shape: Shape,
) -> Result<Tensor> {
    if let (Some(up_packed), Some(down_packed)) = (up.as_packed(), down.as_packed()) {
        let (d, s) = (dispatch, shape);
        let slots = weights.map_or(d.tokens * d.slots, Tensor::elem_count);
        if !fits(up, &[d.experts(), s.pre(), s.hidden])
            || !fits(down, &[d.experts(), s.hidden, s.intermediate])
            || x.elem_count() != d.tokens * s.hidden
            || slots != d.tokens * d.slots
        {
            bail!(
                "experts: x {:?}, {} {:?} and {} do not fit {s:?}",
                x.shape(),
                up.name(),
                up.dims(),
                down.name()
            );
        }
        let (up, down) = (up_packed.matrices(), down_packed.matrices());
        let halves = 1 + usize::from(s.gated);
        let experts: Vec<Expert> = up
            .chunks_exact(halves)
            .zip(down)
            .map(|(up, down)| Expert { gate: s.gated.then(|| up[0]), up: up[halves - 1], down })
            .collect();
        let mut y = Buffer::exact(d.tokens * s.hidden).into_vec();
        let mut run = |x: &[f32], weights: Option<&[f32]>| {
            let (up, down) = (biases.map(|b| &b.0), biases.map(|b| &b.1));
            read_optional(up, d.experts() * s.pre(), |up| {
                read_optional(down, d.experts() * s.hidden, |down| {
                    let biases = MlpBiases { up, down };
                    packed::mlp(Level::current(), d, s, x, &experts, biases, weights, &mut y);
                })
            })?
        };
        match weights {
            None => read(&x.contiguous()?, |x| run(x, None))??,
            Some(weights) => read2(&x.contiguous()?, &weights.contiguous()?, |x, g| run(x, Some(g)))??,
        }
        return own(y, (d.tokens, s.hidden));
    }
    // candle asks an op for gradients only where one of its arguments has some; of this one the weights are none.
    let tracked = x.track_op() || weights.is_some_and(Tensor::track_op);
    if tracked && biases.is_none() && up.sink().is_some() && down.sink().is_some() {
        let op = Experts {
            up: GatedUp::new(up, None, dispatch, shape),
            up_weight: up.clone(),
            down: DownCombine::new(down, None, dispatch, shape),
            down_weight: down.clone(),
            a: Mutex::default(),
        };
        let x = x.contiguous()?;
        return match weights {
            Some(weights) => x.apply_op2(&weights.contiguous()?, op),
            None => x.apply_op1(op),
        };
    }
    let a = gated_up(x, up, biases.map(|b| &b.0), dispatch, shape)?;
    match weights {
        Some(weights) => down_combine(&a, down, biases.map(|b| &b.1), weights, dispatch, shape),
        None => self::down(&a, down, biases.map(|b| &b.1), dispatch, shape),
    }
}

/// `a` \[N, I\] from `x` \[T, H\], `w` \[E, P, H\] and `bias` \[E, P\]: for each row of the dispatch, act(gate) · up. A bias has no
/// gradient.
pub fn gated_up(
    x: &Tensor,
    w: &Param,
    bias: Option<&Param>,
    dispatch: &Arc<Dispatch>,
    shape: Shape,
) -> Result<Tensor> {
    if w.as_stored().is_some() {
        let (d, s) = (dispatch, shape);
        if !fits(w, &[d.experts(), s.pre(), s.hidden]) || x.elem_count() != d.tokens * s.hidden {
            bail!("gated_up: x {:?} and {} {:?} do not fit {s:?}", x.shape(), w.name(), w.dims());
        }
        let mut a = Buffer::exact(d.rows() * s.intermediate).into_vec();
        let mut pre = Buffer::stale(d.rows() * s.pre());
        read(&x.contiguous()?, |x| {
            read_optional(bias, d.experts() * s.pre(), |bias| {
                w.matrices(|w| expert_mlp::up(Level::current(), d, s, x, w, bias, &mut pre, &mut a))
            })
        })???;
        return own(a, (d.rows(), s.intermediate));
    }
    x.contiguous()?.apply_op2(w.tensor(), GatedUp::new(w, bias, dispatch, shape))
}

/// `y` \[T, H\] from `a` \[N, I\], `w` \[E, H, I\], `bias` \[E, H\] and `weights` \[T, K\]: each token's rows through the second
/// product, weighted and summed. A bias has no gradient.
pub fn down_combine(
    a: &Tensor,
    w: &Param,
    bias: Option<&Param>,
    weights: &Tensor,
    dispatch: &Arc<Dispatch>,
    shape: Shape,
) -> Result<Tensor> {
    if w.as_stored().is_some() {
        return down_stored(a, w, bias, Some(weights), dispatch, shape);
    }
    a.apply_op3(w.tensor(), &weights.contiguous()?, DownCombine::new(w, bias, dispatch, shape))
}

/// As [`down_combine`] with all weights 1 (dense MLPs and shared experts).
pub fn down(
    a: &Tensor,
    w: &Param,
    bias: Option<&Param>,
    dispatch: &Arc<Dispatch>,
    shape: Shape,
) -> Result<Tensor> {
    if w.as_stored().is_some() {
        return down_stored(a, w, bias, None, dispatch, shape);
    }
    a.apply_op2(w.tensor(), DownCombine::new(w, bias, dispatch, shape))
}

/// Whether a weight has this shape; that of one expert for all (a dense MLP) may leave out the 1.
fn fits(w: &Param, shape: &[usize; 3]) -> bool {
    w.dims() == shape || shape[0] == 1 && w.dims() == &shape[1..]
}

/// [`down_combine`] or [`down`] over a stored weight.
fn down_stored(
    a: &Tensor,
    w: &Param,
    bias: Option<&Param>,
    weights: Option<&Tensor>,
    dispatch: &Arc<Dispatch>,
    shape: Shape,
) -> Result<Tensor> {
    let (d, s) = (dispatch, shape);
    let slots = weights.map_or(d.tokens * d.slots, Tensor::elem_count);
    let right = a.elem_count() == d.rows() * s.intermediate && slots == d.tokens * d.slots;
    if !right || !fits(w, &[d.experts(), s.hidden, s.intermediate]) {
        bail!("down_combine: a {:?} and {} {:?} do not fit {s:?}", a.shape(), w.name(), w.dims());
    }
    let mut y = Buffer::exact(d.tokens * s.hidden).into_vec();
    let mut run = |a: &[f32], weights: Option<&[f32]>| {
        read_optional(bias, d.experts() * s.hidden, |bias| {
            w.matrices(|w| expert_mlp::down(Level::current(), d, s, a, w, bias, weights, &mut y))
        })
    };
    match weights {
        None => read(a, |a| run(a, None))???,
        Some(weights) => read2(a, &weights.contiguous()?, |a, weights| run(a, Some(weights)))???,
    }
    own(y, (d.tokens, s.hidden))
}

/// An MLP that every token passes: `w_up` \[P, H\] (gate rows, then up rows), `w_down` \[H, I\].
pub fn mlp(x: &Tensor, w_up: &Param, w_down: &Param, shape: Shape) -> Result<Tensor> {
    biased_mlp(x, w_up, w_down, None, shape)
}

/// [`mlp`] with biases \[P\] and \[H\], which have no gradients.
pub fn biased_mlp(
    x: &Tensor,
    w_up: &Param,
    w_down: &Param,
    biases: Option<&(Param, Param)>,
    shape: Shape,
) -> Result<Tensor> {
    let tokens = x.elem_count() / shape.hidden.max(1);
    let dispatch = Arc::new(Dispatch::whole(tokens));
    shaped(&experts(x, w_up, w_down, biases, None, &dispatch, shape)?, x.shape())
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
        let mut y = vec![0.0; rows * outputs];
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
            let mut dx = vec![0.0; rows * inputs];
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
        Ok((Some(own(dx, x.shape())?), dw))
    }
}

/// Calls `f` with the values of a bias of `len` elements, if there is one.
fn read_optional<R>(bias: Option<&Param>, len: usize, f: impl FnOnce(Option<&[f32]>) -> R) -> Result<R> {
    match bias {
        None => Ok(f(None)),
        Some(bias) if bias.tensor().elem_count() != len => {
            bail!("{}: {:?} is not a bias of {len} elements", bias.name(), bias.tensor().shape())
        }
        Some(bias) => bias.read(|bias| f(Some(bias))),
    }
}

/// Refuses a backward that would leave the bias out.
fn no_bias(bias: Option<&Param>) -> Result<()> {
    match bias {
        None => Ok(()),
        Some(bias) => bail!("{}: experts with biases are run, not trained", bias.name()),
    }
}

struct GatedUp {
    dispatch: Arc<Dispatch>,
    shape: Shape,
    bias: Option<Param>,
    sink: Option<Sink>,
    precision: Precision,
    /// The sums before the non-linearity, \[N, P\], from forward to the first backward.
    pre: Mutex<Option<Buffer>>,
}

impl GatedUp {
    fn new(w: &Param, bias: Option<&Param>, dispatch: &Arc<Dispatch>, shape: Shape) -> Self {
        let (bias, sink) = (bias.cloned(), w.sink().cloned());
        Self {
            dispatch: dispatch.clone(),
            shape,
            bias,
            sink,
            precision: w.precision(),
            pre: Mutex::default(),
        }
    }

    fn forward(&self, x: &[f32], w: &[f32]) -> Result<Buffer> {
        let (d, s) = (&self.dispatch, self.shape);
        if x.len() != d.tokens * s.hidden || w.len() != d.experts() * s.pre() * s.hidden {
            bail!(
                "gated_up: x of {} elements and w of {} do not fit T {}, E {}, H {}, I {}",
                x.len(),
                w.len(),
                d.tokens,
                d.experts(),
                s.hidden,
                s.intermediate
            );
        }
        let mut pre = Buffer::stale(d.rows() * s.pre());
        let mut a = Buffer::exact(d.rows() * s.intermediate);
        read_optional(self.bias.as_ref(), d.experts() * s.pre(), |bias| {
            let w = Matrix::each(w, s.pre(), s.hidden);
            expert_mlp::up(self.precision, d, s, x, &w, bias, &mut pre, &mut a);
        })?;
        *self.pre.lock().unwrap_or_else(PoisonError::into_inner) = Some(pre);
        Ok(a)
    }

    /// The gradients of x and, where candle shall have it, of w.
    fn backward(&self, x: &[f32], w: &Tensor, da: &[f32]) -> Result<(Vec<f32>, Option<Tensor>)> {
        no_bias(self.bias.as_ref())?;
        let Some(mut pre) = self.pre.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            bail!("gated_up: backward a second time; the activations were freed by the first");
        };
        let (d, s) = (&self.dispatch, self.shape);
        let mut dx = Buffer::exact(x.len()).into_vec();
        let dw = weight_gradient(self.sink.as_ref(), w, |dw| {
            read(w, |w| expert_mlp::up_backward(self.precision, d, s, x, w, &mut pre, da, &mut dx, dw))
        })?;
        Ok((dx, dw))
    }
}

impl CustomOp2 for GatedUp {
    fn name(&self) -> &'static str {
        "gated-up"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, TensorShape)> {
        let a = self.forward(slice("x", x, lx)?, slice("w", w, lw)?)?;
        Ok((CpuStorage::F32(a.into_vec()), (self.dispatch.rows(), self.shape.intermediate).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _a: &Tensor,
        da: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = read2(x, da, |x, da| self.backward(x, w, da))??;
        Ok((Some(own(dx, x.shape())?), dw))
    }
}

struct DownCombine {
    dispatch: Arc<Dispatch>,
    shape: Shape,
    bias: Option<Param>,
    sink: Option<Sink>,
    precision: Precision,
}

/// What [`DownCombine::backward`] gives: the gradients of a, of w where candle shall have it, and of the weights of slots.
type DownGradients = (Buffer, Option<Tensor>, Option<Vec<f32>>);

impl DownCombine {
    fn new(w: &Param, bias: Option<&Param>, dispatch: &Arc<Dispatch>, shape: Shape) -> Self {
        let (bias, sink) = (bias.cloned(), w.sink().cloned());
        Self { dispatch: dispatch.clone(), shape, bias, sink, precision: w.precision() }
    }

    fn forward(&self, a: &[f32], w: &[f32], weights: Option<&[f32]>) -> Result<(CpuStorage, TensorShape)> {
        let (d, s) = (&self.dispatch, self.shape);
        let slots = weights.map_or(d.tokens * d.slots, <[f32]>::len);
        if a.len() != d.rows() * s.intermediate
            || w.len() != d.experts() * s.hidden * s.intermediate
            || slots != d.tokens * d.slots
        {
            bail!(
                "down_combine: a, w or weights do not fit T {}, N {}, E {}",
                d.tokens,
                d.rows(),
                d.experts()
            );
        }
        let mut y = Buffer::exact(d.tokens * s.hidden).into_vec();
        read_optional(self.bias.as_ref(), d.experts() * s.hidden, |bias| {
            let w = Matrix::each(w, s.hidden, s.intermediate);
            expert_mlp::down(self.precision, d, s, a, &w, bias, weights, &mut y);
        })?;
        Ok((CpuStorage::F32(y), (d.tokens, s.hidden).into()))
    }

    fn backward(&self, a: &[f32], w: &Tensor, weights: Option<&[f32]>, dy: &[f32]) -> Result<DownGradients> {
        no_bias(self.bias.as_ref())?;
        let (d, s) = (&self.dispatch, self.shape);
        let mut da = Buffer::exact(a.len());
        let mut d_weights = weights.map(|weights| vec![0.0; weights.len()]);
        let dw = weight_gradient(self.sink.as_ref(), w, |dw| {
            read(w, |w| {
                let d_weights = d_weights.as_deref_mut();
                expert_mlp::down_backward(self.precision, d, s, a, w, weights, dy, &mut da, d_weights, dw);
            })
        })?;
        Ok((da, dw, d_weights))
    }
}

impl CustomOp2 for DownCombine {
    fn name(&self) -> &'static str {
        "down"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, TensorShape)> {
        self.forward(slice("a", a, la)?, slice("w", w, lw)?, None)
    }

    fn bwd(
        &self,
        a: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (da, dw, _) = read2(a, dy, |a, dy| self.backward(a, w, None, dy))??;
        Ok((Some(own(da.into_vec(), a.shape())?), dw))
    }
}

impl CustomOp3 for DownCombine {
    fn name(&self) -> &'static str {
        "down-combine"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, TensorShape)> {
        self.forward(slice("a", a, la)?, slice("w", w, lw)?, Some(slice("weights", g, lg)?))
    }

    fn bwd(
        &self,
        a: &Tensor,
        w: &Tensor,
        weights: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (da, dw, d_weights) =
            read2(a, dy, |a, dy| read(weights, |g| self.backward(a, w, Some(g), dy)))???;
        let d_weights = d_weights.map(|d| own(d, weights.shape())).transpose()?;
        Ok((Some(own(da.into_vec(), a.shape())?), dw, d_weights))
    }
}

/// [`GatedUp`] and [`DownCombine`], with weights that have sinks.
struct Experts {
    up: GatedUp,
    up_weight: Param,
    down: DownCombine,
    down_weight: Param,
    /// What lies between them, \[N, I\], from forward to the first backward.
    a: Mutex<Option<Buffer>>,
}

impl Experts {
    fn forward(&self, x: &[f32], weights: Option<&[f32]>) -> Result<(CpuStorage, TensorShape)> {
        let a = self.up_weight.read(|w| self.up.forward(x, w))??;
        let y = self.down_weight.read(|w| self.down.forward(&a, w, weights))??;
        *self.a.lock().unwrap_or_else(PoisonError::into_inner) = Some(a);
        Ok(y)
    }

    /// The gradients of x and of the weights of slots.
    fn backward(
        &self,
        x: &[f32],
        weights: Option<&[f32]>,
        dy: &[f32],
    ) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
        let Some(a) = self.a.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            bail!("experts: backward a second time; the activations were freed by the first");
        };
        let (da, _, d_weights) = self.down.backward(&a, self.down_weight.tensor(), weights, dy)?;
        drop(a);
        let (dx, _) = self.up.backward(x, self.up_weight.tensor(), &da)?;
        Ok((dx, d_weights))
    }
}

impl CustomOp1 for Experts {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, TensorShape)> {
        self.forward(slice("x", x, lx)?, None)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (dx, _) = read2(x, dy, |x, dy| self.backward(x, None, dy))??;
        Ok(Some(own(dx, x.shape())?))
    }
}

impl CustomOp2 for Experts {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, TensorShape)> {
        self.forward(slice("x", x, lx)?, Some(slice("weights", g, lg)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weights: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, d_weights) = read2(x, dy, |x, dy| read(weights, |g| self.backward(x, Some(g), dy)))???;
        let d_weights = d_weights.map(|d| own(d, weights.shape())).transpose()?;
        Ok((Some(own(dx, x.shape())?), d_weights))
    }
}
