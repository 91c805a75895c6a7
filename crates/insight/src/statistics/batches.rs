//! Batches: how many different experts the tokens of a batch touch when several texts are decoded at once.

use super::numbers::{Figure, ratio};
use super::view::Layer;
use serde::{Deserialize, Serialize};

/// How many experts a batch of decoding touches: what it reads from memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// B, the texts that are decoded at once.
    pub tokens: u64,
    /// Batches that were looked at.
    pub batches: u64,
    /// Different experts of a batch, on average. By chance: E·(1 - (1 - k/E)^B). By load: Σ_e (1 - (1 - p_e)^B), p_e the share of the
    /// tokens that have the expert.
    pub distinct: Figure,
    /// The same over E.
    pub share: Figure,
}

/// The experts of batches of 1, 2, 4, ... tokens of a layer. A batch has the tokens at one place of B texts which follow each other; no
/// text is in two batches of the same place, and texts that are left over are in none.
pub(crate) fn of(layer: &Layer, texts: &[Vec<usize>], rows: usize) -> Vec<Batch> {
    let mut seen = vec![false; rows];
    layer.seen.iter().for_each(|row| seen[*row] = true);
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
    // The tokens at each place: the columns of a table whose rows are texts.
    let mut steps: Vec<Vec<usize>> = vec![Vec::new(); longest];
    for text in texts {
        text.iter().enumerate().filter(|(_, row)| seen[**row]).for_each(|(at, row)| steps[at].push(*row));
    }
    let widest = steps.iter().map(Vec::len).max().unwrap_or(0);
    let (experts, shares) = (layer.experts as f64, layer.shares());
    let sizes = std::iter::successors(Some(1usize), |b| b.checked_mul(2)).take_while(|b| *b <= widest);
    let size = |b: usize| {
        let (mut batches, mut distinct) = (0u64, 0u64);
        let mut last = vec![u64::MAX; layer.experts];
        for batch in steps.iter().flat_map(|step| step.chunks_exact(b)) {
            for e in batch.iter().flat_map(|row| layer.sets.each(*row)) {
                if last[e] != batches {
                    last[e] = batches;
                    distinct += 1;
                }
            }
            batches += 1;
        }
        let touched = |p: f64| 1.0 - (1.0 - p).max(0.0).powf(b as f64);
        let value = ratio(distinct as f64, batches as f64);
        let (even, by_load) =
            (layer.even().map(|p| experts * touched(p)), shares.iter().map(|p| touched(*p)).sum());
        let of_all = |x: Option<f64>| x.and_then(|x| ratio(x, experts));
        Batch {
            tokens: b as u64,
            batches,
            distinct: Figure::new(value, even, Some(by_load)),
            share: Figure::new(of_all(value), of_all(even), of_all(Some(by_load))),
        }
    };
    sizes.map(size).collect()
}
