//! Selection on plain slices: the k greatest of a row, ties to the lowest index.

use super::RouteInput;
use crate::config::{GroupMask, RouterConfig};
use crate::error::Result;
use crate::tensor::read;
use candle_core::Tensor;
use std::cmp::Ordering;

/// The indices of the `k` greatest of `row`, greatest first, ties to the lowest index; NaN counts as least. Entries
/// that `allowed` turns down are passed over; fewer than `k` are returned when too few are allowed.
pub fn top_k(row: &[f32], k: usize, allowed: impl Fn(usize) -> bool, into: &mut Vec<u32>) {
    let start = into.len();
    let better = |a: f32, b: f32| match a.partial_cmp(&b) {
        Some(order) => order == Ordering::Greater,
        None => b.is_nan() && !a.is_nan(),
    };
    for (i, &value) in row.iter().enumerate() {
        if !allowed(i) {
            continue;
        }
        let picked = &into[start..];
        if picked.len() == k && !better(value, row[picked[k - 1] as usize]) {
            continue;
        }
        let at = picked.iter().position(|&p| better(value, row[p as usize])).unwrap_or(picked.len());
        into.insert(start + at, i as u32);
        into.truncate(start + k);
    }
}

/// Which groups of experts a token may use: the `top` of `groups` by the sum of each group's `best` greatest scores.
pub fn allowed_groups(row: &[f32], groups: usize, top: usize, best: usize, into: &mut Vec<bool>) {
    let size = row.len() / groups;
    let mut picked = Vec::with_capacity(best + 1);
    let scores: Vec<f32> = row
        .chunks(size)
        .map(|group| {
            picked.clear();
            top_k(group, best.min(size), |_| true, &mut picked);
            picked.iter().map(|&i| group[i as usize]).sum()
        })
        .collect();
    picked.clear();
    top_k(&scores, top, |_| true, &mut picked);
    into.clear();
    into.resize(groups, false);
    for &group in &picked {
        into[group as usize] = true;
    }
}

/// Groups of experts, of which a token may use some.
#[derive(Clone, Copy, Debug)]
pub(super) struct Groups {
    groups: usize,
    top: usize,
    /// How many of its greatest scores make the rank of a group.
    best: usize,
    mask: GroupMask,
}

impl Groups {
    pub(super) fn new(config: &RouterConfig, best: usize) -> Self {
        Self { groups: config.groups, top: config.top_groups, best, mask: config.group_mask }
    }
}

/// [`top_k`] for every row of `scores` \[T, E\], within the best groups when there are several: \[T, K\].
pub(super) fn select(scores: &[f32], experts: usize, k: usize, groups: Groups) -> Vec<u32> {
    let mut picks = Vec::with_capacity(scores.len() / experts.max(1) * k + 1);
    let (mut allowed, mut masked) = (Vec::new(), Vec::new());
    for row in scores.chunks_exact(experts) {
        if groups.top >= groups.groups {
            top_k(row, k, |_| true, &mut picks);
            continue;
        }
        allowed_groups(row, groups.groups, groups.top, groups.best, &mut allowed);
        let is_allowed = |e: usize| allowed[e * groups.groups / experts];
        match groups.mask {
            GroupMask::Inf => top_k(row, k, is_allowed, &mut picks),
            GroupMask::Zero => {
                masked.clear();
                masked.extend(row.iter().enumerate().map(|(e, x)| if is_allowed(e) { *x } else { 0.0 }));
                top_k(&masked, k, |_| true, &mut picks);
            }
        }
    }
    picks
}

/// What `scores` \[T, E\] pick with the input's bias added, or its forced picks; and what they pick without, where there is
/// a bias.
pub(super) fn select_biased(
    scores: &Tensor,
    input: &RouteInput,
    groups: Groups,
) -> Result<(Vec<u32>, Option<Vec<u32>>)> {
    let (_, experts) = scores.dims2()?;
    let pick = |scores: &[f32]| select(scores, experts, input.top_k, groups);
    // Of all experts, whatever the groups (DeepSeek-V3, equation 18).
    let unbiased =
        |scores: &[f32]| select(scores, experts, input.top_k, Groups { top: groups.groups, ..groups });
    Ok(match (input.forced, input.bias) {
        (Some(forced), _) => (forced.to_vec(), None),
        (None, Some(bias)) => read(scores, |scores| {
            let rows = scores.chunks_exact(experts);
            let biased: Vec<f32> = rows.flat_map(|row| row.iter().zip(bias).map(|(s, b)| s + b)).collect();
            (pick(&biased), Some(unbiased(scores)))
        })?,
        (None, None) => (read(scores, pick)?, None),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_stable_sort(row in prop::collection::vec(-3i32..3, 1..20), k in 1usize..8) {
            let row: Vec<f32> = row.iter().map(|x| *x as f32 * 0.5).collect();
            let mut order: Vec<u32> = (0..row.len() as u32).collect();
            order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
            let mut got = vec![99];
            top_k(&row, k, |_| true, &mut got);
            prop_assert_eq!(&got[1..], &order[..k.min(row.len())]);
        }
    }

    #[test]
    fn not_a_number_is_picked_last() {
        let mut got = Vec::new();
        top_k(&[f32::NAN, -1.0, f32::NAN, f32::NEG_INFINITY], 3, |_| true, &mut got);
        assert_eq!(got, [1, 3, 0]);
    }

    #[test]
    fn groups_are_ranked_by_their_best() {
        // Group 0 has the greatest single score, group 1 the greatest pair.
        let row = [0.9, 0.0, 0.6, 0.5, 0.1, 0.2];
        let mut allowed = Vec::new();
        allowed_groups(&row, 3, 1, 2, &mut allowed);
        assert_eq!(allowed, [false, true, false]);
        allowed_groups(&row, 3, 1, 1, &mut allowed);
        assert_eq!(allowed, [true, false, false]);
        let groups = |top| Groups { groups: 3, top, best: 2, mask: GroupMask::Inf };
        assert_eq!(select(&row, 6, 2, groups(1)), [2, 3]);
        assert_eq!(select(&row, 6, 2, groups(2)), [0, 2]);
        assert_eq!(select(&row, 6, 2, groups(3)), [0, 2]);
        // Scores below 0 lose to the masked ones.
        let row = [-0.1, -0.2, -0.4, -0.6, -0.7, -0.8];
        assert_eq!(select(&row, 6, 2, groups(1)), [0, 1]);
        assert_eq!(select(&row, 6, 2, Groups { mask: GroupMask::Zero, ..groups(1) }), [2, 3]);
    }
}
