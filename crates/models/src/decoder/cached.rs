//! The decoder over caches of keys and values: sequences that go on, one or several at once.

use super::{Attention, Decoder, Pass, Result};
use crate::error::ModelError;
use crate::ops::{Continued, LayerCache};
use candle_core::Tensor;
use senmon_kernels::rotary::Rope;
use senmon_moe::ops::product_into;
use senmon_moe::tensor::recycle;
use std::sync::Arc;

/// Keys and values of one sequence.
#[derive(Clone, Debug)]
pub struct Cache {
    /// A layer's, one after another; from the first layer of an ensemble on, one for each member.
    layers: Vec<LayerCache>,
    windows: Vec<Option<usize>>,
    len: usize,
    rope: Arc<Rope>,
}

impl Cache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Longest sequence that it was made for.
    pub fn context(&self) -> usize {
        self.rope.positions()
    }

    /// Forgets all but the first `len` tokens; false, and nothing done, where a layer's window has moved on too far.
    pub fn truncate(&mut self, len: usize) -> bool {
        let reached =
            self.layers.iter().zip(&self.windows).all(|(layer, window)| layer.reaches(len, *window));
        if reached {
            self.len = self.len.min(len);
        }
        reached
    }
}

impl Decoder {
    /// A cache for one sequence of at most `context` tokens. Where speeds of rotary positions depend on the length of the
    /// context, they are those of `context`.
    pub fn cache(&self, context: usize) -> Result<Cache> {
        let windows: Vec<_> = (0..self.layers.len())
            .flat_map(|l| self.cache_places(l).map(move |_| self.spec.attention.window_of(l)))
            .collect();
        let layers = vec![LayerCache::default(); windows.len()];
        Ok(Cache { layers, windows, len: 0, rope: self.rope(context)? })
    }

    /// Where the caches of layer `l` are in a [`Cache`].
    fn cache_places(&self, l: usize) -> std::ops::Range<usize> {
        match self.members_from() {
            Some((first, members)) if l >= first => {
                let start = first + (l - first) * members;
                start..start + members
            }
            _ => l..l + 1,
        }
    }

    /// The logits of `tokens` \[S\], which follow what is in the cache: \[S, V\], or those of the last token alone.
    pub fn logits(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        last_only: bool,
        pass: &mut Pass,
    ) -> Result<Vec<f32>> {
        let logits = self.logits_batch(&[tokens], &mut [cache], last_only, pass)?;
        Ok(logits.into_iter().next().unwrap_or_default())
    }

    /// The logits of several sequences at once, for each as [`logits`](Self::logits) gives them, bit for bit: products run over
    /// the tokens of all, attention over the cache of each. A sequence may have any number of tokens, and none; an observer sees
    /// the tokens of the sequences one after another.
    pub fn logits_batch(
        &self,
        tokens: &[&[u32]],
        caches: &mut [&mut Cache],
        last_only: bool,
        pass: &mut Pass,
    ) -> Result<Vec<Vec<f32>>> {
        if tokens.len() != caches.len() {
            let what = format!("{} sequences were given {} caches", tokens.len(), caches.len());
            return Err(ModelError::Internal { what });
        }
        for (tokens, cache) in tokens.iter().zip(&*caches) {
            let (length, context) = (cache.len + tokens.len(), cache.context());
            if length > context {
                let what = format!("{length} tokens are more than the context of {context}");
                return Err(ModelError::Option { what });
            }
        }
        let mut all = tokens.concat();
        if all.is_empty() {
            return Ok(vec![Vec::new(); tokens.len()]);
        }
        let mut routings = Vec::new();
        let mut x = self.embed(&all)?;
        let mut turns = tokens.to_vec();
        for (l, layer) in self.layers.iter().enumerate() {
            if let Some((_, members)) = self.members_from().filter(|(first, _)| *first == l) {
                (x, all, turns) = (repeated(&x, members)?, all.repeat(members), turns.repeat(members));
            }
            let places = self.cache_places(l);
            let mut sequences: Vec<(usize, Continued)> = tokens
                .iter()
                .zip(caches.iter_mut())
                .flat_map(|(tokens, cache)| {
                    let Cache { layers, len, rope, .. } = &mut **cache;
                    let (past, rope) = (*len, &*rope);
                    let of_layer = layers[places.clone()].iter_mut().enumerate();
                    of_layer.map(move |(member, cache)| {
                        (member, Continued { cache, tokens: tokens.len(), past, rope })
                    })
                })
                .collect();
            // All sequences of a member, then those of the next.
            sequences.sort_by_key(|(member, _)| *member);
            let mut sequences: Vec<Continued> =
                sequences.into_iter().map(|(_, continued)| continued).collect();
            let seen = match &layer.attention {
                Attention::Heads(block) => block.forward_cached(&x, &mut sequences)?,
                Attention::Latent(block) => block.forward_cached(&x, &mut sequences)?,
            };
            recycle(x)?;
            x = self.ffn(l, &seen, &all, 1, pass, &mut routings)?.detach();
            recycle(seen)?;
        }
        for (tokens, cache) in tokens.iter().zip(caches) {
            cache.len += tokens.len();
        }
        let rows = |tokens: &&[u32]| if last_only { tokens.len().min(1) } else { tokens.len() };
        let mut logits = self.head(&if last_only { last_rows(&x, &turns)? } else { x })?;
        if let Some((_, members)) = self.members_from() {
            logits = averaged(&logits, members, self.spec.vocab);
        }
        let mut each = Vec::with_capacity(tokens.len());
        for tokens in tokens.iter().rev() {
            each.push(logits.split_off(logits.len() - rows(tokens) * self.spec.vocab));
        }
        each.reverse();
        Ok(each)
    }

    /// The logits after the last layer's `x` \[T, H\]: \[T, V\].
    fn head(&self, x: &Tensor) -> Result<Vec<f32>> {
        let vocab = self.spec.vocab;
        let mut logits = vec![0.0; x.dim(0)? * vocab];
        let x = self.final_norm.apply(x)?;
        senmon_moe::tensor::read(&x, |x| product_into(x, &self.head, &mut logits, false))??;
        if let Some(bias) = &self.head_bias {
            bias.read(|bias| {
                for row in logits.chunks_exact_mut(vocab) {
                    row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
                }
            })?;
        }
        if self.spec.scales.logits != 1.0 {
            let scale = self.spec.scales.logits as f32;
            logits.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(logits)
    }
}

/// `x` \[T, H\], so many times: \[M·T, H\].
pub(super) fn repeated(x: &Tensor, times: usize) -> Result<Tensor> {
    Ok(Tensor::cat(&vec![x; times], 0)?)
}

/// The logarithm of the mean of the probabilities of `members` predictions \[M, T, V\]: \[T, V\].
fn averaged(logits: &[f32], members: usize, vocab: usize) -> Vec<f32> {
    let rows = logits.len() / members / vocab.max(1);
    let mut mean = vec![0.0f64; rows * vocab];
    for (at, row) in logits.chunks_exact(vocab).enumerate() {
        let most = f64::from(row.iter().fold(f32::NEG_INFINITY, |m, z| m.max(*z)));
        let sum: f64 = row.iter().map(|z| (f64::from(*z) - most).exp()).sum();
        let into = mean[at % rows * vocab..][..vocab].iter_mut();
        into.zip(row).for_each(|(mean, z)| *mean += (f64::from(*z) - most).exp() / sum / members as f64);
    }
    mean.into_iter().map(|p| p.ln().max(f64::from(f32::MIN)) as f32).collect()
}

/// Of `x` \[T, H\] the row of each sequence's last token.
fn last_rows(x: &Tensor, tokens: &[&[u32]]) -> Result<Tensor> {
    let mut end = 0;
    let mut rows = Vec::with_capacity(tokens.len());
    for tokens in tokens.iter().filter(|tokens| !tokens.is_empty()) {
        end += tokens.len();
        rows.push(x.narrow(0, end - 1, 1)?);
    }
    Ok(Tensor::cat(&rows, 0)?.contiguous()?)
}

#[cfg(test)]
mod tests;
