//! `hash`: the token's id says its experts.
//!
//! A table \[V, K\] names the experts of every id; all weights are 1/K (1 for K = 1), or with `hash_score` a score of their logits. The table is state of
//! the model: [`balanced_table`] makes one in which experts see as many tokens each. Sources: Hash Layers (2106.04426), "balanced hash"; with scores
//! DeepSeek-V4 (transformers' `deepseek_v4`).

use super::scored::sqrt_softplus;
use super::{Choice, RouteInput, Router, TINY, gather, normalized, scaled};
use crate::config::{HashScore, RouterConfig};
use crate::error::{MoeError, Result};
use candle_core::{D, Tensor};
use candle_nn::ops::{sigmoid, softmax};
use senmon_kernels::dispatch::EMPTY;

#[derive(Debug)]
pub(super) struct Hash {
    score: HashScore,
    normalize: bool,
    scale: f64,
}

impl Hash {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Ok(Box::new(Self { score: config.hash_score, normalize: config.normalize, scale: config.scale }))
    }
}

impl Router for Hash {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let k = input.top_k;
        let picks = match (input.forced, input.token_ids, input.table) {
            (Some(forced), ..) => forced.to_vec(),
            (None, Some(ids), Some(table)) if ids.len() == tokens => {
                let mut picks = Vec::with_capacity(tokens * k);
                for &id in ids {
                    let Some(row) = table.get(id as usize * k..(id as usize + 1) * k) else {
                        let what = format!(
                            "router.kind = \"hash\": token {id} is beyond the table of {}",
                            table.len() / k
                        );
                        return Err(MoeError::Config { what });
                    };
                    picks.extend(row.iter().map(|e| *e as u32));
                }
                picks
            }
            _ => {
                let what = "router.kind = \"hash\" goes by token ids: the layer was given none".into();
                return Err(MoeError::Config { what });
            }
        };
        if let Some(expert) = picks.iter().find(|e| **e != EMPTY && **e as usize >= experts) {
            let what = format!("router.kind = \"hash\": the table names expert {expert} of {experts}");
            return Err(MoeError::Config { what });
        }
        let scores = softmax(logits, D::Minus1)?;
        let scored = match self.score {
            HashScore::None => None,
            HashScore::Softmax => Some(scores.clone()),
            HashScore::Sigmoid => Some(sigmoid(logits)?),
            HashScore::SqrtSoftplus => Some(sqrt_softplus(logits)?),
        };
        let weights = match scored {
            None => {
                let share = |e: &u32| if *e == EMPTY { 0.0 } else { 1.0 / k as f32 };
                Tensor::from_vec(picks.iter().map(share).collect::<Vec<f32>>(), (tokens, k), logits.device())?
            }
            Some(scored) if self.normalize => normalized(gather(&scored, &picks, k)?, TINY)?,
            Some(scored) => gather(&scored, &picks, k)?,
        };
        Choice::new(picks, scaled(weights, self.scale)?, scores)
    }
}

/// A table \[V, K\] for token ids that occur `counts` \[V\] times: the commonest id first, each goes to the K experts that have had the
/// fewest tokens so far, ties to the lowest.
pub fn balanced_table(counts: &[u64], experts: usize, top_k: usize) -> Vec<f32> {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|id| (std::cmp::Reverse(counts[*id]), *id));
    let mut table = vec![0.0; counts.len() * top_k];
    // (tokens so far, ids so far): ids that never occur are spread evenly too.
    let mut load = vec![(0u64, 0u64); experts];
    let mut by_load: Vec<usize> = (0..experts).collect();
    for id in order {
        by_load.sort_by_key(|e| (load[*e], *e));
        for (slot, &e) in by_load[..top_k].iter().enumerate() {
            table[id * top_k + slot] = e as f32;
            load[e].0 += counts[id];
            load[e].1 += 1;
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balanced_table_is_balanced_and_names_different_experts() {
        let counts: Vec<u64> = (0..500).map(|i| 10_000 / (i + 1)).collect();
        for top_k in [1, 2] {
            let table = balanced_table(&counts, 5, top_k);
            let mut load = [0; 5];
            for (row, count) in table.chunks_exact(top_k).zip(&counts) {
                row.iter().for_each(|e| load[*e as usize] += count);
                assert!(top_k == 1 || row[0] != row[1]);
            }
            let (least, most) = (load.iter().min().unwrap(), load.iter().max().unwrap());
            assert!(*most as f64 <= *least as f64 * 1.01, "{load:?}");
        }
    }
}
