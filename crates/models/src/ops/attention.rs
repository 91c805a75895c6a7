//! The attention block: `x + out(attention(rope(norm(qkv(norm(x))))))`, one op from residual stream to residual stream in
//! training, the same steps over a cache in generation.
//!
//! Shapes: T = B·S tokens, H hidden, D head width, A = heads·D, C = kv_heads·D, Q = A + 2·C (queries, keys, values
//! side by side).

use super::norm::Norm;
use super::{add_gradient, taken};
use crate::spec::{AttentionSpec, NormPlace, QkNorm};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use senmon_kernels::attention::{self, Heads};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::gemm::{self, Precision, View};
use senmon_kernels::layout::Rows;
use senmon_kernels::rotary::{self, Rope};
use senmon_kernels::{norm, residual};
use senmon_moe::Param;
use senmon_moe::ops::product_into;
use senmon_moe::tensor::{own, read, read2, recycle, slice};
use std::sync::{Arc, Mutex, PoisonError};

/// What surrounds a block: a norm before or after it, and the sum with the residual stream.
#[derive(Clone, Debug)]
pub struct Residual {
    /// The norm.
    pub norm: Norm,
    /// Where it is.
    pub place: NormPlace,
    /// Factor on what is added.
    pub scale: f32,
}

impl Residual {
    /// What the block sees of `x` \[T, H\]; `None`: `x` itself.
    pub fn before(&self, x: &[f32]) -> Result<Option<Buffer>> {
        match self.place {
            NormPlace::Before => self.norm.run(x).map(Some),
            NormPlace::After => Ok(None),
        }
    }

    /// From the block's result `y` \[T, H\] to the new residual stream, in its place.
    pub fn after(&self, y: &mut Buffer, x: &[f32]) -> Result<()> {
        if self.place == NormPlace::After {
            *y = self.norm.run(y)?;
        }
        if self.scale != 1.0 {
            y.iter_mut().for_each(|y| *y *= self.scale);
        }
        residual::add_to(y, x);
        Ok(())
    }
}

/// The attention of one layer, with the norm before it.
#[derive(Clone, Debug)]
pub struct AttentionBlock {
    /// What it is made of.
    pub spec: AttentionSpec,
    /// A token sees itself and this many minus one before it.
    pub window: Option<usize>,
    /// H.
    pub hidden: usize,
    /// What is around it.
    pub residual: Residual,
    /// \[Q, H\].
    pub qkv: Param,
    /// \[Q\].
    pub qkv_bias: Option<Param>,
    /// Norms of queries and keys: \[D\] each, or \[A\] and \[C\].
    pub qk_norm: Option<(Param, Param)>,
    /// A logit for each head that joins its softmax and has no value: \[heads\].
    pub sinks: Option<Param>,
    /// \[H, A\].
    pub out: Param,
    /// \[H\].
    pub out_bias: Option<Param>,
}

/// Keys and values of the tokens so far, of one layer and one sequence. A layer with a window forgets, from time to time, the
/// tokens that it can no longer see.
#[derive(Clone, Debug, Default)]
pub struct LayerCache {
    /// \[n, C\] each; values may be none.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Tokens before the first of them.
    forgotten: usize,
}

impl LayerCache {
    /// Puts keys and values, of `width` numbers a token each, behind those of the first `past` tokens.
    pub(super) fn append<'a>(
        &mut self,
        past: usize,
        width: usize,
        tokens: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    ) {
        self.keys.truncate((past - self.forgotten) * width);
        self.values.truncate((past - self.forgotten) * width);
        for (key, value) in tokens {
            self.keys.extend_from_slice(key);
            self.values.extend_from_slice(value);
        }
    }

    /// The keys that are kept.
    pub(super) fn keys(&self) -> &[f32] {
        &self.keys
    }

    /// Forgets what a window cannot see any more, in whole tiles: where the tiles of attention begin decides about bits.
    fn forget(&mut self, window: usize, width: usize) {
        let kept = self.keys.len() / width.max(1);
        let tiles = kept.saturating_sub(window) / attention::TILE;
        // Moving what is kept costs: not for every tile.
        if tiles > 3 {
            let gone = tiles * attention::TILE;
            self.keys.drain(..gone * width);
            self.values.drain(..gone * width);
            self.forgotten += gone;
        }
    }

    /// Numbers that are kept.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.keys.len() + self.values.len()
    }

    /// Whether the cache can go on after the first `len` tokens with a window of `window`.
    pub(crate) fn reaches(&self, len: usize, window: Option<usize>) -> bool {
        self.forgotten == 0 || window.is_some_and(|window| len >= self.forgotten + window)
    }
}

/// The part of one sequence in a pass over caches.
pub struct Continued<'a> {
    /// Its keys and values.
    pub cache: &'a mut LayerCache,
    /// Its tokens in the pass; there may be none.
    pub tokens: usize,
    /// Its tokens before.
    pub past: usize,
    /// The rotations of its context.
    pub rope: &'a Rope,
}

/// How the tokens of a pass are turned, sequence after sequence.
pub(super) struct Turns<'a> {
    /// \[T\].
    pub positions: Vec<u32>,
    /// So many tokens, by these rotations.
    ropes: Vec<(usize, &'a Rope)>,
}

impl<'a> Turns<'a> {
    /// `batch` sequences of `queries` tokens, each from position 0.
    pub(super) fn from_start(batch: usize, queries: usize, rope: &'a Rope) -> Self {
        let positions = (0..batch).flat_map(|_| (0..queries).map(|p| p as u32)).collect();
        Self { positions, ropes: vec![(batch * queries, rope)] }
    }

    /// Sequences that go on.
    pub(super) fn of(sequences: &[Continued<'a>]) -> Self {
        let positions =
            sequences.iter().flat_map(|s| (s.past..s.past + s.tokens).map(|p| p as u32)).collect();
        Self { positions, ropes: sequences.iter().map(|s| (s.tokens, s.rope)).collect() }
    }

    /// Turns `x`, whose `rows` are `stride` apart, in its place.
    pub(super) fn apply(&self, rows: Rows, x: &mut [f32], stride: usize) {
        let mut first = 0;
        for (tokens, rope) in &self.ropes {
            let positions = &self.positions[first..][..*tokens];
            rotary::apply(
                rope,
                Rows { tokens: *tokens, ..rows },
                &mut x[first * stride..],
                stride,
                positions,
            );
            first += tokens;
        }
    }
}

/// What forward keeps for backward.
struct Saved {
    /// normed x: \[T, H\], and 1/rms: \[T\].
    h: Buffer,
    inv_rms: Buffer,
    /// Queries and keys as projected, where they are normed afterwards: \[T, A + C\]; 1/rms of each norm.
    raw_qk: Option<(Buffer, Buffer, Buffer)>,
    /// \[T, Q\], normed and rotated.
    qkv: Buffer,
    /// \[T, A\], and its log-sum-exp: \[T·heads\].
    o: Buffer,
    lse: Buffer,
}

impl AttentionBlock {
    fn a(&self) -> usize {
        self.spec.heads * self.spec.head_dim
    }

    fn c(&self) -> usize {
        self.spec.kv_heads * self.spec.head_dim
    }

    fn q(&self) -> usize {
        self.a() + 2 * self.c()
    }

    fn heads(&self, batch: usize, queries: usize, keys: usize) -> Heads {
        Heads {
            batch,
            queries,
            keys,
            heads: self.spec.heads,
            kv_heads: self.spec.kv_heads,
            head_dim: self.spec.head_dim,
            window: self.window,
            scale: self.spec.score_scale(),
        }
    }

    /// How the rows that a norm of queries (then of keys) sees lie in a token: per head, or all heads as one.
    fn norm_rows(&self, tokens: usize) -> (Rows, Rows) {
        let s = &self.spec;
        match s.qk_norm {
            QkNorm::Full => (Rows::plain(tokens, self.a()), Rows::plain(tokens, self.c())),
            _ => (
                Rows { tokens, heads: s.heads, width: s.head_dim },
                Rows { tokens, heads: s.kv_heads, width: s.head_dim },
            ),
        }
    }

    /// Rows of the rotated heads: queries and keys lie side by side.
    fn rotated(&self, tokens: usize) -> Rows {
        Rows { tokens, heads: self.spec.heads + self.spec.kv_heads, width: self.spec.head_dim }
    }

    /// `x` \[T, H\] → everything up to the rotated queries, keys and values.
    fn project(&self, x: &[f32], turns: &Turns) -> Result<Saved> {
        let (tokens, q) = (turns.positions.len(), self.q());
        let norm = &self.residual.norm;
        let (mut h, mut inv_rms) = (Buffer::default(), Buffer::default());
        match self.residual.place {
            NormPlace::Before if norm.bias.is_none() => {
                h = Buffer::stale(x.len());
                inv_rms = norm.forward(x, &mut h)?;
            }
            NormPlace::Before => h = norm.run(x)?,
            NormPlace::After => {}
        }
        let seen = if self.residual.place == NormPlace::Before { &h[..] } else { x };
        let mut qkv = Buffer::stale(tokens * q);
        let accumulate = self.start_from_bias(self.qkv_bias.as_ref(), &mut qkv)?;
        product_into(seen, &self.qkv, &mut qkv, accumulate)?;
        let after = self.spec.qk_norm == QkNorm::HeadAfter;
        if after {
            turns.apply(self.rotated(tokens), &mut qkv, q);
        }
        let raw_qk = match &self.qk_norm {
            None => None,
            Some((q_norm, k_norm)) => {
                let (a, c, eps) = (self.a(), self.c(), norm.eps);
                let mut raw = Buffer::stale(tokens * (a + c));
                residual::copy_rows(&qkv, q, &mut raw, a + c, a + c);
                let (q_rows, k_rows) = self.norm_rows(tokens);
                let (mut q_inv, mut k_inv) = (Buffer::stale(q_rows.count()), Buffer::stale(k_rows.count()));
                q_norm.read(|w| norm::rms_forward(q_rows, &raw, a + c, w, eps, &mut qkv, q, &mut q_inv))?;
                k_norm.read(|w| {
                    norm::rms_forward(k_rows, &raw[a..], a + c, w, eps, &mut qkv[a..], q, &mut k_inv);
                })?;
                Some((raw, q_inv, k_inv))
            }
        };
        if !after {
            turns.apply(self.rotated(tokens), &mut qkv, q);
        }
        Ok(Saved { h, inv_rms, raw_qk, qkv, o: Buffer::default(), lse: Buffer::default() })
    }

    /// Takes the share of the sinks from `o` \[T, A\], with the log-sum-exp of `heads` without them.
    fn sink(&self, heads: Heads, o: &mut [f32], lse: &[f32]) -> Result<()> {
        let Some(sinks) = &self.sinks else { return Ok(()) };
        sinks.read(|sinks| {
            for (row, o) in o.chunks_exact_mut(heads.head_dim.max(1)).enumerate() {
                let (t, head) = (row / heads.heads, row % heads.heads);
                let (b, i) = (t / heads.queries, t % heads.queries);
                let lse = lse[(b * heads.heads + head) * heads.queries + i];
                let kept = 1.0 / (1.0 + (sinks[head] - lse).exp());
                o.iter_mut().for_each(|o| *o *= kept);
            }
        })
    }

    /// Fills each row of `y` with the bias, if there is one; returns whether the product then adds to it.
    fn start_from_bias(&self, bias: Option<&Param>, y: &mut [f32]) -> Result<bool> {
        match bias {
            None => Ok(false),
            Some(bias) => bias.read(|bias| {
                y.chunks_exact_mut(bias.len().max(1)).for_each(|row| row.copy_from_slice(bias));
                true
            }),
        }
    }

    /// `x` \[T, H\] + out(`o` \[T, A\]).
    fn finish(&self, x: &[f32], o: &[f32]) -> Result<Vec<f32>> {
        let mut y = Buffer::exact(x.len());
        let accumulate = self.start_from_bias(self.out_bias.as_ref(), &mut y)?;
        product_into(o, &self.out, &mut y, accumulate)?;
        self.residual.after(&mut y, x)?;
        Ok(y.into_vec())
    }

    /// The block on `x` \[B·S, H\], each sequence from position 0, with gradients to `x` and to the sinks of its parameters.
    pub fn forward(&self, x: &Tensor, batch: usize, rope: &Arc<Rope>) -> Result<Tensor> {
        x.apply_op1(AttentionOp { block: self.clone(), batch, rope: rope.clone(), saved: Mutex::default() })
    }

    /// The block on `x` \[T, H\], the tokens of sequences one after another, each following what is in its cache; appends to
    /// the caches. A sequence gets the bits that it gets alone. No gradients.
    pub fn forward_cached(&self, x: &Tensor, sequences: &mut [Continued]) -> Result<Tensor> {
        let (a, c, q) = (self.a(), self.c(), self.q());
        let turns = Turns::of(sequences);
        let tokens = fitting(x, &turns)?;
        let y = read(x, |x| -> Result<Vec<f32>> {
            let saved = self.project(x, &turns)?;
            let mut o = Buffer::stale(tokens * a);
            let mut first = 0;
            for Continued { cache, tokens, past, .. } in sequences.iter_mut().filter(|s| s.tokens > 0) {
                let qkv = &saved.qkv[first * q..][..*tokens * q];
                cache.append(*past, c, qkv.chunks_exact(q).map(|row| row[a..].split_at(c)));
                let heads = self.heads(1, *tokens, *past + *tokens - cache.forgotten);
                let (o, mut lse) =
                    (&mut o[first * a..][..*tokens * a], Buffer::stale(*tokens * self.spec.heads));
                let how = self.qkv.precision_of_activations();
                attention::forward_at(how, heads, qkv, q, &cache.keys, c, &cache.values, c, o, a, &mut lse);
                self.sink(heads, o, &lse)?;
                if let Some(window) = self.window {
                    cache.forget(window, c);
                }
                first += *tokens;
            }
            self.finish(x, &o)
        })??;
        own(y, x.shape())
    }
}

/// T of `x` \[T, H\], which must be the tokens of `turns`.
pub(super) fn fitting(x: &Tensor, turns: &Turns) -> Result<usize> {
    let (tokens, expected) = (x.dim(0)?, turns.positions.len());
    if tokens != expected {
        bail!("attention: {tokens} tokens, those of the sequences are {expected}");
    }
    Ok(tokens)
}

struct AttentionOp {
    block: AttentionBlock,
    batch: usize,
    rope: Arc<Rope>,
    saved: Mutex<Option<Saved>>,
}

impl CustomOp1 for AttentionOp {
    fn name(&self) -> &'static str {
        "attention-block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (block, (tokens, hidden)) = (&self.block, l.shape().dims2()?);
        if hidden != block.hidden || self.batch == 0 || !tokens.is_multiple_of(self.batch) {
            bail!("attention: {:?} is not {} sequences of width {}", l.shape(), self.batch, block.hidden);
        }
        let queries = tokens / self.batch;
        let x = slice("x", x, l)?;
        let (a, c, q) = (block.a(), block.c(), block.q());
        let mut saved = block.project(x, &Turns::from_start(self.batch, queries, &self.rope))?;
        saved.o = Buffer::stale(tokens * a);
        saved.lse = Buffer::stale(tokens * block.spec.heads);
        let heads = block.heads(self.batch, queries, queries);
        let (keys, values) =
            (&saved.qkv[a.min(saved.qkv.len())..], &saved.qkv[(a + c).min(saved.qkv.len())..]);
        let (how, o) = (block.qkv.precision_of_activations(), &mut saved.o);
        attention::forward_at(how, heads, &saved.qkv, q, keys, q, values, q, o, a, &mut saved.lse);
        block.sink(heads, &mut saved.o, &saved.lse)?;
        let y = block.finish(x, &saved.o)?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let saved = taken(&self.saved, "attention")?;
        let dx = read2(x, dy, |x, dy| self.backward(x, dy, saved))??;
        recycle(dy.clone())?;
        Ok(Some(own(dx, x.shape())?))
    }
}

impl AttentionOp {
    /// The gradient of `x` \[T, H\]; those of the weights go to their sinks.
    fn backward(&self, x: &[f32], dy: &[f32], saved: Saved) -> Result<Vec<f32>> {
        let block = &self.block;
        let (h, a, c, q) = (block.hidden, block.a(), block.c(), block.q());
        let tokens = x.len() / h;
        // out: y = x + o·Woutᵀ + b.
        let mut d_o = Buffer::stale(tokens * a);
        block.out.read(|w| {
            gemm::parallel(
                block.out.precision(),
                tokens,
                a,
                h,
                View::rows(dy, h),
                View::rows(w, a),
                &mut d_o,
                a,
                false,
            );
        })?;
        self.linear_gradients(&block.out, block.out_bias.as_ref(), dy, h, &saved.o, a);
        // attention
        let mut d_qkv = Buffer::stale(tokens * q);
        let heads = block.heads(self.batch, tokens / self.batch, tokens / self.batch);
        {
            let (keys, values) = (&saved.qkv[a..], &saved.qkv[a + c..]);
            attention::backward_at(
                block.qkv.precision(),
                heads,
                &saved.qkv,
                q,
                keys,
                q,
                values,
                q,
                &saved.o,
                a,
                &saved.lse,
                &d_o,
                a,
                &mut d_qkv,
                q,
                a,
                a + c,
            );
        }
        drop(d_o);
        // rotation, then the norms of queries and keys
        let turns = Turns::from_start(self.batch, tokens / self.batch, &self.rope);
        rotary::apply_backward(&self.rope, block.rotated(tokens), &mut d_qkv, q, &turns.positions);
        if let (Some((raw, q_inv, k_inv)), Some((q_norm, k_norm))) = (&saved.raw_qk, &block.qk_norm) {
            let mut d_normed = Buffer::stale(tokens * (a + c));
            residual::copy_rows(&d_qkv, q, &mut d_normed, a + c, a + c);
            let (q_rows, k_rows) = block.norm_rows(tokens);
            q_norm.read(|w| {
                add_gradient(q_norm, |dw| {
                    norm::rms_backward(
                        q_rows,
                        &d_normed,
                        a + c,
                        raw,
                        a + c,
                        w,
                        q_inv,
                        &mut d_qkv,
                        q,
                        false,
                        dw,
                    );
                });
            })?;
            k_norm.read(|w| {
                add_gradient(k_norm, |dw| {
                    let (dy, x, dx) = (&d_normed[a..], &raw[a..], &mut d_qkv[a..]);
                    norm::rms_backward(k_rows, dy, a + c, x, a + c, w, k_inv, dx, q, false, dw);
                });
            })?;
        }
        // qkv and the norm before it
        self.linear_gradients(&block.qkv, block.qkv_bias.as_ref(), &d_qkv, q, &saved.h, h);
        let mut d_h = Buffer::stale(tokens * h);
        block.qkv.read(|w| {
            gemm::parallel(
                block.qkv.precision(),
                tokens,
                h,
                q,
                View::rows(&d_qkv, q),
                View::rows(w, h),
                &mut d_h,
                h,
                false,
            );
        })?;
        let mut dx = Buffer::exact(dy.len());
        dx.copy_from_slice(dy);
        let norm = &block.residual.norm.weight;
        norm.read(|w| {
            add_gradient(norm, |dw| {
                norm::rms_backward(
                    Rows::plain(tokens, h),
                    &d_h,
                    h,
                    x,
                    h,
                    w,
                    &saved.inv_rms,
                    &mut dx,
                    h,
                    true,
                    dw,
                );
            });
        })?;
        Ok(dx.into_vec())
    }

    /// Of y = x·Wᵀ + b with `dy` \[T, O\] and `x` \[T, I\]: W's gradient and b's, into their sinks.
    fn linear_gradients(&self, w: &Param, bias: Option<&Param>, dy: &[f32], o: usize, x: &[f32], i: usize) {
        let tokens = dy.len() / o;
        add_gradient(w, |dw| {
            if let Some(dw) = dw {
                gemm::parallel(
                    w.precision(),
                    o,
                    i,
                    tokens,
                    View::rows(dy, o).t(),
                    View::rows(x, i),
                    dw,
                    i,
                    true,
                );
            }
        });
        if let Some(bias) = bias {
            add_gradient(bias, |db| {
                if let Some(db) = db {
                    // A product with ones: each sum is one chain over the tokens.
                    let ones = vec![1.0; tokens];
                    gemm::parallel(
                        Precision::F32,
                        1,
                        o,
                        tokens,
                        View::rows(&ones, tokens),
                        View::rows(dy, o),
                        db,
                        o,
                        true,
                    );
                }
            });
        }
    }
}
