//! The attention block: `x + out(attention(rope(norm(qkv(norm(x))))))`, one op from residual stream to residual stream in
//! training, the same steps over a cache in generation.
//!
//! Shapes: T = B·S tokens, H hidden, D head width, A = heads·D, C = kv_heads·D, Q = A + 2·C (queries, keys, values
//! side by side).

use super::{add_gradient, taken};
use crate::spec::{AttentionSpec, QkNorm};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use senmon_kernels::attention::{self, Heads};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::gemm::{self, View};
use senmon_kernels::layout::Rows;
use senmon_kernels::rotary::{self, Rope};
use senmon_kernels::{norm, residual};
use senmon_moe::Param;
use senmon_moe::tensor::{own, read, read2, slice};
use std::sync::{Arc, Mutex, PoisonError};

/// The attention of one layer, with the norm before it.
#[derive(Clone, Debug)]
pub struct AttentionBlock {
    /// What it is made of.
    pub spec: AttentionSpec,
    /// H.
    pub hidden: usize,
    /// ε of the norms.
    pub eps: f32,
    /// Rotations of all positions.
    pub rope: Arc<Rope>,
    /// \[H\].
    pub norm: Param,
    /// \[Q, H\].
    pub qkv: Param,
    /// \[Q\].
    pub qkv_bias: Option<Param>,
    /// Norms of queries and keys: \[D\] each, or \[A\] and \[C\].
    pub qk_norm: Option<(Param, Param)>,
    /// \[H, A\].
    pub out: Param,
    /// \[H\].
    pub out_bias: Option<Param>,
}

/// Keys and values of the tokens so far, of one layer and one sequence: \[capacity, C\] each.
#[derive(Clone, Debug, Default)]
pub struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl LayerCache {
    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize, width: usize) {
        self.keys.truncate(len * width);
        self.values.truncate(len * width);
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
            window: self.spec.window,
            scale: 1.0 / (self.spec.head_dim as f32).sqrt(),
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

    /// `x` \[T, H\] at `positions` \[T\] → everything up to the rotated queries, keys and values.
    fn project(&self, x: &[f32], positions: &[u32]) -> Result<Saved> {
        let (tokens, h_width, q) = (positions.len(), self.hidden, self.q());
        let rows = Rows::plain(tokens, h_width);
        let (mut h, mut inv_rms) = (Buffer::stale(x.len()), Buffer::stale(tokens));
        self.norm
            .read(|w| norm::rms_forward(rows, x, h_width, w, self.eps, &mut h, h_width, &mut inv_rms))?;
        let mut qkv = Buffer::stale(tokens * q);
        let accumulate = self.start_from_bias(self.qkv_bias.as_ref(), &mut qkv)?;
        self.qkv.read(|w| {
            let (a, b) = (View::rows(&h, h_width), View::rows(w, h_width).t());
            gemm::parallel(tokens, q, h_width, a, b, &mut qkv, q, accumulate);
        })?;
        let raw_qk = match &self.qk_norm {
            None => None,
            Some((q_norm, k_norm)) => {
                let (a, c) = (self.a(), self.c());
                let mut raw = Buffer::stale(tokens * (a + c));
                residual::copy_rows(&qkv, q, &mut raw, a + c, a + c);
                let (q_rows, k_rows) = self.norm_rows(tokens);
                let (mut q_inv, mut k_inv) = (Buffer::stale(q_rows.count()), Buffer::stale(k_rows.count()));
                q_norm
                    .read(|w| norm::rms_forward(q_rows, &raw, a + c, w, self.eps, &mut qkv, q, &mut q_inv))?;
                k_norm.read(|w| {
                    norm::rms_forward(k_rows, &raw[a..], a + c, w, self.eps, &mut qkv[a..], q, &mut k_inv);
                })?;
                Some((raw, q_inv, k_inv))
            }
        };
        rotary::apply(&self.rope, self.rotated(tokens), &mut qkv, q, positions);
        Ok(Saved { h, inv_rms, raw_qk, qkv, o: Buffer::default(), lse: Buffer::default() })
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
        let (a, h) = (self.a(), self.hidden);
        let tokens = x.len() / h;
        let mut y = Buffer::stale(x.len());
        let accumulate = self.start_from_bias(self.out_bias.as_ref(), &mut y)?;
        self.out.read(|w| {
            gemm::parallel(tokens, h, a, View::rows(o, a), View::rows(w, a).t(), &mut y, h, accumulate);
        })?;
        residual::add_to(&mut y, x);
        Ok(y.into_vec())
    }

    fn positions(batch: usize, queries: usize, first: usize) -> Vec<u32> {
        (0..batch).flat_map(|_| (first..first + queries).map(|p| p as u32)).collect()
    }

    /// The block on `x` \[B·S, H\], each sequence from position 0, with gradients to `x` and to the sinks.
    pub fn forward(&self, x: &Tensor, batch: usize) -> Result<Tensor> {
        x.apply_op1(AttentionOp { block: self.clone(), batch, saved: Mutex::default() })
    }

    /// The block on `x` \[S, H\], which follows the `past` tokens of the cache; appends to the cache. No gradients.
    pub fn forward_cached(&self, x: &Tensor, cache: &mut LayerCache, past: usize) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let (a, c, q) = (self.a(), self.c(), self.q());
        if past + tokens > self.rope.positions() {
            bail!("{} tokens are more than the model's {} positions", past + tokens, self.rope.positions());
        }
        let y = read(x, |x| -> Result<Vec<f32>> {
            let saved = self.project(x, &Self::positions(1, tokens, past))?;
            cache.truncate(past, c);
            for row in saved.qkv.chunks_exact(q) {
                cache.keys.extend_from_slice(&row[a..a + c]);
                cache.values.extend_from_slice(&row[a + c..]);
            }
            let heads = self.heads(1, tokens, past + tokens);
            let (mut o, mut lse) = (Buffer::stale(tokens * a), Buffer::stale(tokens * self.spec.heads));
            attention::forward(heads, &saved.qkv, q, &cache.keys, c, &cache.values, c, &mut o, a, &mut lse);
            self.finish(x, &o)
        })??;
        own(y, x.shape())
    }
}

struct AttentionOp {
    block: AttentionBlock,
    batch: usize,
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
        if queries > block.rope.positions() {
            bail!("{queries} tokens are more than the model's {} positions", block.rope.positions());
        }
        let x = slice("x", x, l)?;
        let (a, c, q) = (block.a(), block.c(), block.q());
        let mut saved = block.project(x, &AttentionBlock::positions(self.batch, queries, 0))?;
        saved.o = Buffer::stale(tokens * a);
        saved.lse = Buffer::stale(tokens * block.spec.heads);
        let heads = block.heads(self.batch, queries, queries);
        let (keys, values) =
            (&saved.qkv[a.min(saved.qkv.len())..], &saved.qkv[(a + c).min(saved.qkv.len())..]);
        attention::forward(heads, &saved.qkv, q, keys, q, values, q, &mut saved.o, a, &mut saved.lse);
        let y = block.finish(x, &saved.o)?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let saved = taken(&self.saved, "attention")?;
        let dx = read2(x, dy, |x, dy| self.backward(x, dy, saved))??;
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
            gemm::parallel(tokens, a, h, View::rows(dy, h), View::rows(w, a), &mut d_o, a, false);
        })?;
        self.linear_gradients(&block.out, block.out_bias.as_ref(), dy, h, &saved.o, a);
        // attention
        let mut d_qkv = Buffer::stale(tokens * q);
        let heads = block.heads(self.batch, tokens / self.batch, tokens / self.batch);
        {
            let (keys, values) = (&saved.qkv[a..], &saved.qkv[a + c..]);
            attention::backward(
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
        let positions = AttentionBlock::positions(self.batch, tokens / self.batch, 0);
        rotary::apply_backward(&block.rope, block.rotated(tokens), &mut d_qkv, q, &positions);
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
            gemm::parallel(tokens, h, q, View::rows(&d_qkv, q), View::rows(w, h), &mut d_h, h, false);
        })?;
        let mut dx = Buffer::stale(dy.len());
        dx.copy_from_slice(dy);
        block.norm.read(|w| {
            add_gradient(&block.norm, |dw| {
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
                gemm::parallel(o, i, tokens, View::rows(dy, o).t(), View::rows(x, i), dw, i, true);
            }
        });
        if let Some(bias) = bias {
            add_gradient(bias, |db| {
                if let Some(db) = db {
                    // A product with ones: each sum is one chain over the tokens.
                    let ones = vec![1.0; tokens];
                    gemm::parallel(1, o, tokens, View::rows(&ones, tokens), View::rows(dy, o), db, o, true);
                }
            });
        }
    }
}
