//! Similarity: whether experts are alike, by vectors that stand for them or by the weights of their neurons.
//!
//! An expert's neurons may stand in any order without changing what it computes, so weights are compared after the neurons of
//! the one were matched with those of the other.

use super::numbers::{Figure, finite, shuffled};
use crate::error::{InsightError, Result};
use rayon::prelude::*;
use senmon_moe::rng::Stream;

/// Neurons of an expert up to which matching is the best there is; above it is greedy.
pub const MATCHED_EXACTLY: usize = 512;

/// The cosine of each two vectors: \[E, E\]. All are of one length D, such as an expert's flattened weights or its outputs on
/// the same tokens. None where a vector is zero or not finite. By chance: 0, with a standard deviation of 1/√D where
/// directions are random.
pub fn cosines(vectors: &[&[f32]]) -> Result<Vec<Vec<Option<f64>>>> {
    let length = vectors.first().map_or(0, |vector| vector.len());
    if let Some((at, other)) = vectors.iter().enumerate().find(|(_, vector)| vector.len() != length) {
        let what = format!("vector {at} has {} elements, vector 0 has {length}", other.len());
        return Err(InsightError::trace(what));
    }
    let norms: Vec<f64> = vectors.par_iter().map(|vector| dot(vector, vector).sqrt()).collect();
    let row = |i: usize| -> Vec<Option<f64>> {
        (0..vectors.len())
            .map(|j| {
                // The lower one first, so that the table is symmetric to the bit.
                let (a, b) = (i.min(j), i.max(j));
                finite(dot(vectors[a], vectors[b]) / (norms[a] * norms[b]))
            })
            .collect()
    };
    Ok((0..vectors.len()).into_par_iter().map(row).collect())
}

/// The sum of products, in f64: in lanes, which are added at the end.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_blocks
        .remainder()
        .iter()
        .zip(b_blocks.remainder())
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

/// The weights of an expert that is an MLP: H hidden, I its neurons.
#[derive(Clone, Copy, Debug)]
pub struct Mlp<'a> {
    /// \[I, H\], where it is gated.
    pub gate: Option<&'a [f32]>,
    /// \[I, H\].
    pub up: &'a [f32],
    /// \[H, I\].
    pub down: &'a [f32],
    /// H.
    pub hidden: usize,
    /// Whether `up` enters the output as a factor, so that a neuron with the signs of both `up` and `down` turned is the same one: so
    /// it is where an expert is gated, unless `up` is shifted first, as gpt-oss does.
    pub up_is_factor: bool,
}

impl Mlp<'_> {
    /// I, if the lengths fit.
    fn neurons(&self) -> Result<usize> {
        let i = self.up.len() / self.hidden.max(1);
        let sound = self.hidden > 0 && i * self.hidden == self.up.len() && self.down.len() == self.up.len();
        if !sound || self.gate.is_some_and(|gate| gate.len() != self.up.len()) {
            let gate = self.gate.map_or(0, <[f32]>::len);
            let what = format!(
                "an expert of hidden width {} has {} weights up, {} down, {gate} of a gate: expected I·H of each",
                self.hidden,
                self.up.len(),
                self.down.len(),
            );
            return Err(InsightError::trace(what));
        }
        Ok(i)
    }

    /// A vector of length 1 for each neuron: its row of the gate, its row of `up`, its column of `down`. Each of these is of
    /// equal length, so that none outweighs another by its scale: \[I, 3·H\] or \[I, 2·H\].
    fn vectors(&self, neurons: usize) -> Vec<Vec<f32>> {
        let h = self.hidden;
        let neuron = |i: usize| {
            let column: Vec<f32> = (0..h).map(|row| self.down[row * neurons + i]).collect();
            let rows = self.gate.iter().copied().chain([self.up]).map(|matrix| &matrix[i * h..][..h]);
            let parts: Vec<&[f32]> = rows.chain([&column[..]]).collect();
            let all = (parts.len() as f64).sqrt();
            let scaled = |part: &&[f32]| {
                let norm = dot(part, part).sqrt() * all;
                // A part that is zero stays so, and is like nothing.
                let scale = if norm > 0.0 && norm.is_finite() { 1.0 / norm } else { 0.0 };
                part.iter().map(|x| (f64::from(*x) * scale) as f32).collect::<Vec<_>>()
            };
            parts.iter().flat_map(scaled).collect()
        };
        (0..neurons).map(neuron).collect()
    }
}

/// How alike two experts are: the mean cosine of their neurons, matched one to one so that it is as great as can be (greedily,
/// from the most alike down, for more than [`MATCHED_EXACTLY`] neurons). 1 for an expert and the same with its neurons in
/// another order, or scaled or turned in ways that cancel out. By chance: the same after the coordinates of the second expert's neurons were shuffled, all in the same way:
/// matching alone makes strangers look alike, the more the more neurons there are.
pub fn expert_similarity(a: &Mlp, b: &Mlp, seed: u64) -> Result<Figure> {
    let (neurons, others) = (a.neurons()?, b.neurons()?);
    let kind = |mlp: &Mlp| (mlp.hidden, mlp.gate.is_some(), mlp.up_is_factor);
    if neurons != others || kind(a) != kind(b) {
        return Err(InsightError::trace(format!(
            "an expert of {neurons} neurons of width {} is not comparable with one of {others} of width {}",
            a.hidden, b.hidden
        )));
    }
    let (of_a, of_b) = (a.vectors(neurons), b.vectors(neurons));
    let width = of_b.first().map_or(0, Vec::len);
    let order = shuffled(Stream::new(&[seed, 0x7369_6d69]), width);
    let strange: Vec<Vec<f32>> =
        of_b.iter().map(|neuron| order.iter().map(|at| neuron[*at]).collect()).collect();
    // Up to here a neuron's sign counts.
    let signed = if a.up_is_factor { width - 2 * a.hidden } else { width };
    Ok(Figure::new(matched(&of_a, &of_b, signed), matched(&of_a, &strange, signed), None))
}

/// The mean cosine of neurons matched one to one; of elements from `signed` on with the sign that suits best.
fn matched(a: &[Vec<f32>], b: &[Vec<f32>], signed: usize) -> Option<f64> {
    let n = a.len();
    let cosine = |a: &[f32], b: &[f32]| {
        let ((a, a_turned), (b, b_turned)) = (a.split_at(signed), b.split_at(signed));
        dot(a, b) + dot(a_turned, b_turned).abs()
    };
    let table: Vec<f64> = a.par_iter().flat_map_iter(|a| b.iter().map(move |b| cosine(a, b))).collect();
    if n == 0 || table.iter().any(|x| !x.is_finite()) {
        return None;
    }
    let to = if n <= MATCHED_EXACTLY { assign(&table, n) } else { greedy(&table, n) };
    Some(to.iter().enumerate().map(|(i, j)| table[i * n + j]).sum::<f64>() / n as f64)
}

/// The column of each row of \[n, n\] with the greatest sum: shortest augmenting paths, row by row (Jonker and Volgenant 1987).
fn assign(table: &[f64], n: usize) -> Vec<usize> {
    // Columns are counted from 1: 0 stands for the row that is to be placed.
    let (mut of_row, mut of_column) = (vec![0.0; n], vec![0.0; n + 1]);
    let mut row_of = vec![usize::MAX; n + 1];
    for new in 0..n {
        row_of[0] = new;
        let (mut least, mut before) = (vec![f64::INFINITY; n + 1], vec![0; n + 1]);
        let mut done = vec![false; n + 1];
        let mut at = 0;
        while row_of[at] != usize::MAX {
            done[at] = true;
            let (row, mut step, mut next) = (row_of[at], f64::INFINITY, 0);
            for column in (1..=n).filter(|column| !done[*column]) {
                let cost = -table[row * n + column - 1] - of_row[row] - of_column[column];
                if cost < least[column] {
                    (least[column], before[column]) = (cost, at);
                }
                if least[column] < step {
                    (step, next) = (least[column], column);
                }
            }
            for column in 0..=n {
                if done[column] {
                    of_row[row_of[column]] += step;
                    of_column[column] -= step;
                } else {
                    least[column] -= step;
                }
            }
            at = next;
        }
        while at != 0 {
            row_of[at] = row_of[before[at]];
            at = before[at];
        }
    }
    let mut column_of = vec![0; n];
    (1..=n).for_each(|column| column_of[row_of[column]] = column - 1);
    column_of
}

/// The column of each row of \[n, n\], the greatest pairs first; of equal ones the lowest row, then the lowest column.
fn greedy(table: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n * n).collect();
    order.sort_by(|a, b| table[*b].total_cmp(&table[*a]));
    let (mut column_of, mut taken) = (vec![usize::MAX; n], vec![false; n]);
    for (row, column) in order.into_iter().map(|at| (at / n, at % n)) {
        if column_of[row] == usize::MAX && !taken[column] {
            (column_of[row], taken[column]) = (column, true);
        }
    }
    column_of
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| Stream::new(&[seed]).normal(i) as f32).collect()
    }

    #[test]
    fn cosines_are_those_of_angles() {
        let (a, b, zero) = ([1.0, 0.0], [3.0, 3.0], [0.0, 0.0]);
        let found = cosines(&[&a, &b, &zero]).unwrap();
        assert!((found[0][1].unwrap() - 0.5f64.sqrt()).abs() < 1e-12 && found[0][1] == found[1][0]);
        assert!((found[1][1].unwrap() - 1.0).abs() < 1e-12 && found[2] == [None; 3]);
        assert!(cosines(&[&a, &[1.0]]).unwrap_err().to_string().contains("vector 1"));
        assert!(cosines(&[]).unwrap().is_empty());
    }

    #[test]
    fn an_expert_is_like_itself_in_any_order_of_neurons_and_unlike_a_stranger() {
        let (h, i) = (24, 12);
        let (gate, up, down) = (numbers(1, h * i), numbers(2, h * i), numbers(3, h * i));
        let order = shuffled(Stream::new(&[9]), i);
        let rows = |m: &[f32]| order.iter().flat_map(|n| m[n * h..][..h].to_vec()).collect::<Vec<_>>();
        // Other scales and signs of neurons that cancel out change nothing.
        let factor = |neuron: usize| if neuron.is_multiple_of(3) { -2.0 } else { 2.0 };
        let (gate_too, mut up_too) = (rows(&gate), rows(&up));
        for (neuron, row) in order.iter().zip(up_too.chunks_exact_mut(h)) {
            row.iter_mut().for_each(|x| *x *= factor(*neuron));
        }
        let down_too: Vec<f32> = (0..h)
            .flat_map(|row| order.iter().map(move |n| (row, *n)))
            .map(|(r, n)| down[r * i + n] / factor(n))
            .collect();
        let a = Mlp { gate: Some(&gate), up: &up, down: &down, hidden: h, up_is_factor: true };
        let b = Mlp { gate: Some(&gate_too), up: &up_too, down: &down_too, ..a };
        let same = expert_similarity(&a, &b, 0).unwrap();
        assert!((same.value.unwrap() - 1.0).abs() < 1e-6 && same.chance.unwrap() < 0.5, "{same:?}");
        // Where signs count, a neuron that was turned is another one.
        let shifted = |mlp| Mlp { up_is_factor: false, ..mlp };
        let turned = expert_similarity(&shifted(a), &shifted(b), 0).unwrap();
        assert!(turned.value.unwrap() < 0.8, "{turned:?}");
        assert!(expert_similarity(&a, &shifted(b), 0).is_err());
        let (x, y, z) = (numbers(4, h * i), numbers(5, h * i), numbers(6, h * i));
        let stranger = Mlp { gate: Some(&x), up: &y, down: &z, ..a };
        let other = expert_similarity(&a, &stranger, 0).unwrap();
        assert!((other.value.unwrap() - other.chance.unwrap()).abs() < 0.1, "{other:?}");
        let short = Mlp { gate: None, down: &down[1..], ..a };
        assert!(expert_similarity(&a, &short, 0).is_err());
        let ungated = Mlp { gate: None, ..a };
        assert!(expert_similarity(&a, &ungated, 0).is_err());
    }

    #[test]
    fn the_best_matching_is_no_worse_than_any_other() {
        for seed in 0..20 {
            let n = 5;
            let table: Vec<f64> = numbers(seed, n * n).into_iter().map(f64::from).collect();
            let sum = |to: &[usize]| to.iter().enumerate().map(|(i, j)| table[i * n + j]).sum::<f64>();
            let best = sum(&assign(&table, n));
            // All orders of five, as numbers of base five.
            let mut most = f64::NEG_INFINITY;
            for code in 0..n.pow(n as u32) {
                let to: Vec<usize> = (0..n).map(|i| code / n.pow(i as u32) % n).collect();
                let mut sorted = to.clone();
                sorted.sort_unstable();
                if sorted.into_iter().eq(0..n) {
                    most = most.max(sum(&to));
                }
            }
            assert!((best - most).abs() < 1e-9 && sum(&greedy(&table, n)) <= best + 1e-9);
        }
    }
}
