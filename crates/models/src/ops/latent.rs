//! Latent attention (MLA, DeepSeek-V2 2405.04434), in the form that never makes the keys and values of all heads: a query is
//! turned into the space of the narrow vector that the cache holds, meets it there, and what comes out is turned into
//! values. The cache keeps C + R numbers a token. No gradients.

use super::attention::{Continued, Residual, Turns, fitting};
use super::norm::Norm;
use crate::spec::LatentSpec;
use candle_core::{Result, Tensor, bail};
use senmon_kernels::attention::{self, Heads};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::elements::Matrix;
use senmon_kernels::gemm::{self, Operand, Product};
use senmon_kernels::layout::Rows;
use senmon_kernels::rotary::Rope;
use senmon_kernels::simd::Level;
use senmon_moe::Param;
use senmon_moe::ops::product;
use senmon_moe::tensor::{own, read};

/// The latent attention of one layer.
#[derive(Clone, Debug)]
pub struct LatentBlock {
    /// Its widths.
    pub spec: LatentSpec,
    /// Heads.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// What is around it.
    pub residual: Residual,
    /// The way to the queries: one matrix \[heads·(nope + R), H\], or two with a norm between, \[q_rank, H\] and
    /// \[heads·(nope + R), q_rank\].
    pub q: (Param, Option<(Norm, Param)>),
    /// Of the first of them: \[q_rank\].
    pub q_bias: Option<Param>,
    /// \[C + R, H\].
    pub kv_a: Param,
    /// \[C + R\].
    pub kv_bias: Option<Param>,
    /// \[C\].
    pub kv_a_norm: Norm,
    /// \[heads·(nope + value), C\]: of each head the rows of its keys, then those of its values.
    pub kv_b: Param,
    /// \[H, heads·value\].
    pub out: Param,
    /// \[H\].
    pub out_bias: Option<Param>,
}

impl LatentBlock {
    /// C + R, numbers that a token leaves in the cache.
    fn width(&self) -> usize {
        self.spec.kv_rank + self.spec.rope
    }

    /// Calls `f` with `count` rows of `kv_b` for each head, from its row `first` on: what keys or values are made with.
    fn with_rows_of_heads(&self, first: usize, count: usize, f: impl FnOnce(&[Matrix])) -> Result<()> {
        let rows = self.spec.nope + self.spec.value;
        self.kv_b.matrices(|parts| {
            let mut heads = Vec::with_capacity(self.heads);
            for head in 0..self.heads {
                let (mut at, mut rest) = (head * rows + first, parts.iter());
                let found = rest.find(|part| {
                    let here = at < part.rows;
                    at -= if here { 0 } else { part.rows };
                    here
                });
                match found.filter(|part| at + count <= part.rows) {
                    Some(part) => heads.push(part.some(at..at + count)),
                    None => bail!("{}: head {head} is in several parts", self.kv_b.name()),
                }
            }
            f(&heads);
            Ok(())
        })?
    }

    /// `x` \[T, H\] → queries in the space of the cache, \[T, heads, C + R\], and what the cache keeps, \[T, C + R\].
    fn project(&self, x: &[f32], turns: &Turns) -> Result<(Buffer, Buffer)> {
        let (tokens, s, heads) = (turns.positions.len(), &self.spec, self.heads);
        let (c, r, width) = (s.kv_rank, s.rope, self.width());
        let h = self.residual.before(x)?;
        let h = h.as_deref().unwrap_or(x);
        let mut q = biased(product(h, &self.q.0)?, self.q_bias.as_ref())?;
        if let Some((norm, q_b)) = &self.q.1 {
            q = product(&norm.run(&q)?, q_b)?;
        }
        let kv = biased(product(h, &self.kv_a)?, self.kv_bias.as_ref())?;
        let mut latent = Buffer::stale(tokens * c);
        for (to, from) in latent.chunks_exact_mut(c).zip(kv.chunks_exact(width)) {
            to.copy_from_slice(&from[..c]);
        }
        let latent = self.kv_a_norm.run(&latent)?;
        let mut keys = kv;
        let mut turned = Buffer::stale(tokens * r);
        for (t, (key, latent)) in keys.chunks_exact_mut(width).zip(latent.chunks_exact(c)).enumerate() {
            turned[t * r..][..r].copy_from_slice(&key[c..]);
            key[..c].copy_from_slice(latent);
        }
        turns.apply(Rows::plain(tokens, r), &mut turned, r);
        for (key, turned) in keys.chunks_exact_mut(width).zip(turned.chunks_exact(r)) {
            key[c..].copy_from_slice(turned);
        }
        // Queries: what does not turn goes through the keys' rows of kv_b, what turns is copied behind it.
        let head = s.nope + r;
        let mut absorbed = Buffer::stale(tokens * heads * width);
        self.with_rows_of_heads(0, s.nope, |keys| {
            let products: Vec<Product> = (0..heads)
                .map(|n| {
                    let b = Operand::weight_across(keys[n]);
                    let a = Operand::k_inner(&q[(n * head).min(q.len())..], heads * head);
                    one(tokens, c, s.nope, a, b, n * width, heads * width)
                })
                .collect();
            run(&products, &mut absorbed);
        })?;
        let mut turned = Buffer::stale(tokens * heads * r);
        for (to, from) in turned.chunks_exact_mut(r).zip(q.chunks_exact(head)) {
            to.copy_from_slice(&from[s.nope..]);
        }
        turns.apply(Rows { tokens, heads, width: r }, &mut turned, heads * r);
        for (to, from) in absorbed.chunks_exact_mut(width).zip(turned.chunks_exact(r)) {
            to[c..].copy_from_slice(from);
        }
        Ok((absorbed, keys))
    }

    /// `queries` \[B·Sq, heads, C + R\] over `keys` \[B·Sk, C + R\], which are the values too: `o` \[B·Sq, heads, C + R\].
    fn attend(&self, batch: usize, queries: &[f32], keys: &[f32], o: &mut [f32]) {
        let (heads, width) = (self.heads, self.width());
        let (rows, key_rows) = (queries.len() / (heads * width), keys.len() / width);
        let h = Heads {
            batch,
            queries: rows / batch,
            keys: key_rows / batch,
            heads,
            kv_heads: 1,
            head_dim: width,
            window: None,
            scale: self.scale,
        };
        let mut lse = Buffer::stale(rows * heads);
        let stride = heads * width;
        let how = self.kv_a.precision_of_activations();
        attention::forward_at(how, h, queries, stride, keys, width, keys, width, o, stride, &mut lse);
    }

    /// What comes of `o` \[T, heads, C + R\], turned into values: \[T, heads·value\].
    fn values(&self, o: &[f32]) -> Result<Buffer> {
        let (s, heads, width) = (&self.spec, self.heads, self.width());
        let rows = o.len() / (heads * width);
        let mut values = Buffer::stale(rows * heads * s.value);
        self.with_rows_of_heads(s.nope, s.value, |each| {
            let products: Vec<Product> = (0..heads)
                .map(|n| {
                    let b = Operand::weight(each[n]);
                    let a = Operand::k_inner(&o[(n * width).min(o.len())..], heads * width);
                    one(rows, s.value, s.kv_rank, a, b, n * s.value, heads * s.value)
                })
                .collect();
            run(&products, &mut values);
        })?;
        Ok(values)
    }

    fn finish(&self, x: &[f32], values: &[f32]) -> Result<Vec<f32>> {
        let mut y = biased(product(values, &self.out)?, self.out_bias.as_ref())?;
        self.residual.after(&mut y, x)?;
        Ok(y.into_vec())
    }

    /// The block on `x` \[B·S, H\], each sequence from position 0.
    pub fn forward(&self, x: &Tensor, batch: usize, rope: &Rope) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        if batch == 0 || !tokens.is_multiple_of(batch) {
            bail!("attention: {tokens} tokens are not {batch} sequences");
        }
        let turns = Turns::from_start(batch, tokens / batch, rope);
        let y = read(x, |x| -> Result<Vec<f32>> {
            let (queries, keys) = self.project(x, &turns)?;
            let mut o = Buffer::stale(queries.len());
            self.attend(batch, &queries, &keys, &mut o);
            self.finish(x, &self.values(&o)?)
        })??;
        own(y, x.shape())
    }

    /// The block on `x` \[T, H\], the tokens of sequences one after another, each following what is in its cache; appends to
    /// the caches. A sequence gets the bits that it gets alone.
    pub fn forward_cached(&self, x: &Tensor, sequences: &mut [Continued]) -> Result<Tensor> {
        let turns = Turns::of(sequences);
        fitting(x, &turns)?;
        let (width, row) = (self.width(), self.heads * self.width());
        let y = read(x, |x| -> Result<Vec<f32>> {
            let (queries, keys) = self.project(x, &turns)?;
            let mut o = Buffer::stale(queries.len());
            let mut first = 0;
            for Continued { cache, tokens, past, .. } in sequences.iter_mut().filter(|s| s.tokens > 0) {
                let keys = &keys[first * width..][..*tokens * width];
                cache.append(*past, width, std::iter::once((keys, &[][..])));
                let rows = first * row..(first + *tokens) * row;
                self.attend(1, &queries[rows.clone()], cache.keys(), &mut o[rows]);
                first += *tokens;
            }
            self.finish(x, &self.values(&o)?)
        })??;
        own(y, x.shape())
    }
}

/// Each row of `y` with the bias added.
fn biased(mut y: Buffer, bias: Option<&Param>) -> Result<Buffer> {
    if let Some(bias) = bias {
        bias.read(|bias| {
            for row in y.chunks_exact_mut(bias.len().max(1)) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        })?;
    }
    Ok(y)
}

fn one<'a>(
    m: usize,
    n: usize,
    k: usize,
    a: Operand<'a>,
    b: Operand<'a>,
    c_start: usize,
    c_stride: usize,
) -> Product<'a> {
    Product { m, n, k, a, b, c_start, c_stride, accumulate: false, twin: None, twin_b: None }
}

fn run(products: &[Product], c: &mut [f32]) {
    senmon_kernels::gemm::run_all(Level::current(), products, c, |_: gemm::Tile| {});
}
