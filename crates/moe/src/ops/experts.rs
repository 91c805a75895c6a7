//! The MLPs of experts.
//!
//! A layer of experts is two products, [`gated_up`] and [`down_combine`], with the dispatch inside them, shared; where their weights
//! have sinks, and so are no arguments, [`experts`] has both in one op, and the sum with the residual stream: candle adds every
//! gradient that passes through it into fresh zeros.

use super::{added, weight_gradient};
use crate::param::{Param, Sink};
use crate::tensor::{own, read, read2, recycle, shaped, slice};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape as TensorShape, Tensor, bail,
};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::dispatch::Dispatch;
use senmon_kernels::elements::Matrix;
use senmon_kernels::expert_mlp::{self, Shape};
use senmon_kernels::gemm::Precision;
use senmon_kernels::packed::{self, Expert, MlpBiases};
use senmon_kernels::simd::Level;
use std::sync::{Arc, Mutex, PoisonError};

/// The MLPs of experts: `y` \[T, H\] from `x` \[T, H\], `up` \[E, P, H\], `down` \[E, H, I\], biases \[E, P\] and \[E, H\], which have no
/// gradients, and `weights` \[T, K\] (none: all 1); added to `onto` \[T, H\], if there is one.
pub fn experts(
    x: &Tensor,
    up: &Param,
    down: &Param,
    biases: Option<&(Param, Param)>,
    weights: Option<&Tensor>,
    dispatch: &Arc<Dispatch>,
    shape: Shape,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    if let Some(onto) = onto.filter(|onto| onto.dims() != [dispatch.tokens, shape.hidden]) {
        bail!(
            "experts: what they are added to is {:?}, not {} of {}",
            onto.shape(),
            dispatch.tokens,
            shape.hidden
        );
    }
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
        if let Some(onto) = onto {
            read(onto, |onto| senmon_kernels::residual::add_to(&mut y, onto))?;
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
        let weights = weights.map(Tensor::contiguous).transpose()?;
        return match (&weights, onto) {
            (Some(weights), None) => x.apply_op2(weights, op),
            (Some(weights), Some(onto)) => x.apply_op3(weights, &onto.contiguous()?, Onto(op)),
            (None, None) => x.apply_op1(op),
            (None, Some(onto)) => x.apply_op2(&onto.contiguous()?, Onto(op)),
        };
    }
    let a = gated_up(x, up, biases.map(|b| &b.0), dispatch, shape)?;
    let y = match weights {
        Some(weights) => down_combine(&a, down, biases.map(|b| &b.1), weights, dispatch, shape)?,
        None => self::down(&a, down, biases.map(|b| &b.1), dispatch, shape)?,
    };
    added(y, onto)
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
    biased_mlp(x, w_up, w_down, None, shape, None)
}

/// [`mlp`] with biases \[P\] and \[H\], which have no gradients; added to `onto` \[T, H\], if there is one.
pub fn biased_mlp(
    x: &Tensor,
    w_up: &Param,
    w_down: &Param,
    biases: Option<&(Param, Param)>,
    shape: Shape,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    let tokens = x.elem_count() / shape.hidden.max(1);
    let dispatch = Arc::new(Dispatch::whole(tokens));
    shaped(&experts(x, w_up, w_down, biases, None, &dispatch, shape, onto)?, x.shape())
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
        recycle(da.clone())?;
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

    fn forward(&self, a: &[f32], w: &[f32], weights: Option<&[f32]>) -> Result<(Vec<f32>, TensorShape)> {
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
        Ok((y, (d.tokens, s.hidden).into()))
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
        let (y, shape) = self.forward(slice("a", a, la)?, slice("w", w, lw)?, None)?;
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        a: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (da, dw, _) = read2(a, dy, |a, dy| self.backward(a, w, None, dy))??;
        recycle(dy.clone())?;
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
        let weights = slice("weights", g, lg)?;
        let (y, shape) = self.forward(slice("a", a, la)?, slice("w", w, lw)?, Some(weights))?;
        Ok((CpuStorage::F32(y), shape))
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
        recycle(dy.clone())?;
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
    fn forward(&self, x: &[f32], weights: Option<&[f32]>) -> Result<(Vec<f32>, TensorShape)> {
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

impl Experts {
    /// [`backward`](Self::backward) of tensors.
    fn gradients(
        &self,
        x: &Tensor,
        weights: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, d_weights) = match weights {
            None => read2(x, dy, |x, dy| self.backward(x, None, dy))??,
            Some(weights) => {
                read2(x, dy, |x, dy| read(weights, |weights| self.backward(x, Some(weights), dy)))???
            }
        };
        let d_weights = match (d_weights, weights) {
            (Some(d), Some(weights)) => Some(own(d, weights.shape())?),
            _ => None,
        };
        Ok((Some(own(dx, x.shape())?), d_weights))
    }
}

impl CustomOp1 for Experts {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, TensorShape)> {
        let (y, shape) = self.forward(slice("x", x, lx)?, None)?;
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (dx, _) = self.gradients(x, None, dy)?;
        recycle(dy.clone())?;
        Ok(dx)
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
        let (y, shape) = self.forward(slice("x", x, lx)?, Some(slice("weights", g, lg)?))?;
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weights: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradients = self.gradients(x, Some(weights), dy)?;
        recycle(dy.clone())?;
        Ok(gradients)
    }
}

/// [`Experts`], added to the last argument.
struct Onto(Experts);

impl Onto {
    fn forward(&self, x: &[f32], weights: Option<&[f32]>, onto: &[f32]) -> Result<(CpuStorage, TensorShape)> {
        let (mut y, shape) = self.0.forward(x, weights)?;
        senmon_kernels::residual::add_to(&mut y, onto);
        Ok((CpuStorage::F32(y), shape))
    }
}

impl CustomOp2 for Onto {
    fn name(&self) -> &'static str {
        "mlp-onto"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        onto: &CpuStorage,
        lo: &Layout,
    ) -> Result<(CpuStorage, TensorShape)> {
        self.forward(slice("x", x, lx)?, None, slice("the residual stream", onto, lo)?)
    }

    fn bwd(
        &self,
        x: &Tensor,
        _onto: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.0.gradients(x, None, dy)?.0, Some(dy.clone())))
    }
}

impl CustomOp3 for Onto {
    fn name(&self) -> &'static str {
        "experts-onto"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        g: &CpuStorage,
        lg: &Layout,
        onto: &CpuStorage,
        lo: &Layout,
    ) -> Result<(CpuStorage, TensorShape)> {
        let (weights, onto) = (slice("weights", g, lg)?, slice("the residual stream", onto, lo)?);
        self.forward(slice("x", x, lx)?, Some(weights), onto)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weights: &Tensor,
        _onto: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, d_weights) = self.0.gradients(x, Some(weights), dy)?;
        Ok((dx, d_weights, Some(dy.clone())))
    }
}
