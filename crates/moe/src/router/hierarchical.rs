//! `hierarchical`: first a group, then experts of it.
//!
//! Logits \[T, G + E\]: those of the G groups, then those of the experts. The `top_groups` greatest of the group softmax, and in each the
//! K / `top_groups` greatest of the softmax within the group; weight p(group) · p(expert | group), over the sum of the picked when
//! `normalize`. Sources: Shazeer et al. 2017 (1701.06538, appendix B); Mesh TensorFlow's hierarchical MoE.

use super::{Choice, RouteInput, Router, TINY, gather, normalized, scaled};
use crate::config::RouterConfig;
use crate::error::{MoeError, Result};
use crate::tensor::read2;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Debug)]
pub(super) struct Hierarchical {
    groups: usize,
    top_groups: usize,
    normalize: bool,
    scale: f64,
}

impl Hierarchical {
    pub(super) fn build(config: &RouterConfig, experts: usize, top_k: usize) -> Result<Box<dyn Router>> {
        let refuse = |what: String| Err(MoeError::Config { what });
        if config.groups < 2 {
            return refuse("router.kind = \"hierarchical\" needs router.groups of 2 or more".into());
        }
        if !top_k.is_multiple_of(config.top_groups) || top_k / config.top_groups > experts / config.groups {
            return refuse(format!(
                "router.kind = \"hierarchical\" picks as many experts in each of router.top_groups = {} groups of {}: \
                 experts.top_k = {top_k} does not fit",
                config.top_groups,
                experts / config.groups
            ));
        }
        Ok(Box::new(Self {
            groups: config.groups,
            top_groups: config.top_groups,
            normalize: config.normalize,
            scale: config.scale,
        }))
    }
}

impl Router for Hierarchical {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, columns) = logits.dims2()?;
        let (g, experts) = (self.groups, columns - self.groups);
        let size = experts / g;
        let of_group = softmax(&logits.narrow(1, 0, g)?, D::Minus1)?;
        let within = softmax(&logits.narrow(1, g, experts)?.reshape((tokens, g, size))?, D::Minus1)?;
        let scores = within.broadcast_mul(&of_group.unsqueeze(2)?)?.reshape((tokens, experts))?;
        let picks = match input.forced {
            Some(forced) => forced.to_vec(),
            None => read2(&of_group, &within.flatten_all()?, |of_group, within| {
                let (mut picks, mut groups, mut best) = (Vec::new(), Vec::new(), Vec::new());
                for (groups_row, row) in of_group.chunks_exact(g).zip(within.chunks_exact(experts)) {
                    groups.clear();
                    super::top_k(groups_row, self.top_groups, |_| true, &mut groups);
                    for &group in &groups {
                        let first = group as usize * size;
                        best.clear();
                        super::top_k(
                            &row[first..][..size],
                            input.top_k / self.top_groups,
                            |_| true,
                            &mut best,
                        );
                        picks.extend(best.iter().map(|e| first as u32 + e));
                    }
                }
                picks
            })?,
        };
        let mut weights = gather(&scores, &picks, input.top_k)?;
        if self.normalize {
            weights = normalized(weights, TINY)?;
        }
        Choice::new(picks, scaled(weights, self.scale)?, scores)
    }
}
