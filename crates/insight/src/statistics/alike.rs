//! How alike the experts of a layer are: what they give for the same tokens, and their weights.

use super::numbers::{Figure, finite};
use super::similarity::{Mlp, dot, expert_similarity};
use crate::error::{InsightError, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How alike the experts of a layer are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Alike {
    /// The layer's number.
    pub layer: usize,
    /// E.
    pub experts: usize,
    /// Tokens of which all experts' outputs were looked at.
    pub tokens: u64,
    /// The mean over tokens of the cosine of what two experts give: \[E, E\]. None where one gave nothing.
    pub outputs: Vec<Vec<Option<f64>>>,
    /// The mean of that over pairs of experts. By chance: the two at different tokens, where only what experts have in common whatever the
    /// token can make them alike.
    pub of_outputs: Figure,
    /// [`expert_similarity`] of each two experts: \[E, E\], where weights were looked at.
    pub weights: Option<Vec<Vec<Option<f64>>>>,
    /// The mean of that over pairs of experts, and of its chance.
    pub of_weights: Figure,
}

/// Sums of cosines over tokens, of what experts give.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    experts: usize,
    tokens: u64,
    /// Of experts i and j: the sum of cosines, and how many there are; the same at different tokens. \[E, E\]
    pairs: Vec<Pair>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Pair {
    sum: f64,
    count: u64,
    strange_sum: f64,
    strange_count: u64,
}

impl Outputs {
    /// More tokens: what each of `experts` gives for each of `rows` tokens, \[rows, E, L\]. The token that one is set against is the
    /// next one, and for the last one the first.
    pub fn add(&mut self, rows: usize, experts: usize, outputs: &[f32]) -> Result<()> {
        if self.tokens == 0 {
            self.experts = experts;
            self.pairs = vec![Pair::default(); experts * experts];
        }
        let vectors = rows * experts;
        if experts != self.experts
            || vectors == 0
            || !outputs.len().is_multiple_of(vectors)
            || outputs.is_empty()
        {
            let what =
                format!("{} outputs are not those of {experts} experts for {rows} tokens", outputs.len());
            return Err(InsightError::trace(what));
        }
        let width = outputs.len() / vectors;
        let of = |row: usize, expert: usize| &outputs[(row * experts + expert) * width..][..width];
        let norms: Vec<f64> = (0..vectors)
            .into_par_iter()
            .map(|v| dot(of(v / experts, v % experts), of(v / experts, v % experts)).sqrt())
            .collect();
        let cosine = |(a_row, a): (usize, usize), (b_row, b): (usize, usize)| {
            finite(
                dot(of(a_row, a), of(b_row, b)) / (norms[a_row * experts + a] * norms[b_row * experts + b]),
            )
        };
        self.tokens += rows as u64;
        self.pairs.par_chunks_mut(experts).enumerate().for_each(|(i, pairs)| {
            // The table is symmetric: the lower half is filled in at the end.
            for (j, pair) in pairs.iter_mut().enumerate().skip(i) {
                for row in 0..rows {
                    if let Some(cosine) = cosine((row, i), (row, j)) {
                        pair.sum += cosine;
                        pair.count += 1;
                    }
                    let other = (row + 1) % rows;
                    if other != row
                        && let Some(cosine) = cosine((row, i), (other, j))
                    {
                        pair.strange_sum += cosine;
                        pair.strange_count += 1;
                    }
                }
            }
        });
        Ok(())
    }

    /// What it comes to for layer `layer`; with the weights of its experts, \[E\] or none, their likeness too.
    pub fn finish(self, layer: usize, weights: &[Mlp]) -> Result<Alike> {
        let experts = self.experts;
        let at = |i: usize, j: usize| &self.pairs[i.min(j) * experts + i.max(j)];
        let mean = |i, j| {
            let pair = at(i, j);
            finite(pair.sum / pair.count as f64)
        };
        let outputs: Vec<Vec<Option<f64>>> =
            (0..experts).map(|i| (0..experts).map(|j| mean(i, j)).collect()).collect();
        let strange = two_of(experts).filter_map(|(i, j)| {
            let pair = at(i, j);
            finite(pair.strange_sum / pair.strange_count as f64)
        });
        let chance = mean_of(strange);
        let of_outputs =
            Figure::new(mean_of(two_of(experts).filter_map(|(i, j)| outputs[i][j])), chance, None);
        let mut alike =
            Alike { layer, experts, tokens: self.tokens, outputs, of_outputs, ..Alike::default() };
        if weights.len() == experts && experts > 0 {
            let found: Vec<((usize, usize), Figure)> = two_of(experts)
                .collect::<Vec<_>>()
                .into_par_iter()
                .map(|(i, j)| Ok(((i, j), expert_similarity(&weights[i], &weights[j], layer as u64)?)))
                .collect::<Result<_>>()?;
            let mut table = vec![vec![None; experts]; experts];
            (0..experts).for_each(|i| table[i][i] = Some(1.0));
            for ((i, j), figure) in &found {
                (table[*i][*j], table[*j][*i]) = (figure.value, figure.value);
            }
            alike.weights = Some(table);
            alike.of_weights = Figure::new(
                mean_of(found.iter().filter_map(|(_, figure)| figure.value)),
                mean_of(found.iter().filter_map(|(_, figure)| figure.chance)),
                None,
            );
        }
        Ok(alike)
    }
}

/// Every two of some experts.
fn two_of(experts: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..experts).flat_map(move |i| (i + 1..experts).map(move |j| (i, j)))
}

fn mean_of(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    finite(sum / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use senmon_moe::rng::Stream;

    /// Outputs of three experts for some tokens: the second gives twice what the first does, the third something of its own.
    fn outputs(rows: usize, width: usize, seed: u64) -> Vec<f32> {
        let mut out = Vec::new();
        for row in 0..rows as u64 {
            let vector =
                |who: u64| (0..width as u64).map(move |i| Stream::new(&[seed, row, who]).normal(i) as f32);
            out.extend(vector(0));
            out.extend(vector(0).map(|x| 2.0 * x));
            out.extend(vector(1));
        }
        out
    }

    #[test]
    fn experts_that_give_the_same_are_alike_and_strangers_are_not() {
        let (rows, width) = (40, 64);
        let mut seen = Outputs::default();
        seen.add(rows, 3, &outputs(rows, width, 1)).unwrap();
        seen.add(rows, 3, &outputs(rows, width, 2)).unwrap();
        let alike = seen.finish(5, &[]).unwrap();
        assert_eq!((alike.layer, alike.experts, alike.tokens), (5, 3, 80));
        let of = |i: usize, j: usize| alike.outputs[i][j].unwrap();
        assert!((of(0, 1) - 1.0).abs() < 1e-6 && (of(2, 2) - 1.0).abs() < 1e-6 && of(0, 1) == of(1, 0));
        assert!(of(0, 2).abs() < 0.1 && (of(0, 2) - of(1, 2)).abs() < 1e-6);
        // One pair of three is alike; at different tokens none is.
        assert!((alike.of_outputs.value.unwrap() - (1.0 + 2.0 * of(0, 2)) / 3.0).abs() < 1e-6);
        assert!(alike.of_outputs.chance.unwrap().abs() < 0.1 && alike.weights.is_none());
    }

    #[test]
    fn what_all_experts_always_give_is_chance() {
        let (rows, experts, width) = (20, 4, 16);
        let out: Vec<f32> = (0..rows * experts)
            .flat_map(|v| (0..width).map(move |i| 3.0 + Stream::new(&[v as u64]).normal(i) as f32))
            .collect();
        let mut seen = Outputs::default();
        seen.add(rows, experts, &out).unwrap();
        let alike = seen.finish(0, &[]).unwrap();
        let (value, chance) = (alike.of_outputs.value.unwrap(), alike.of_outputs.chance.unwrap());
        assert!(value > 0.8 && (value - chance).abs() < 0.02, "{value} {chance}");
    }

    #[test]
    fn an_expert_that_gives_nothing_is_like_none_and_bad_shapes_are_refused() {
        let mut seen = Outputs::default();
        seen.add(1, 2, &[0.0, 0.0, 1.0, 1.0]).unwrap();
        assert!(seen.add(1, 3, &[0.0; 6]).is_err() && seen.add(2, 2, &[0.0; 7]).is_err());
        assert!(seen.add(0, 2, &[]).is_err());
        let (h, i) = (6, 3);
        let weights: Vec<Vec<f32>> = (0..4)
            .map(|m| (0..(h * i) as u64).map(|x| Stream::new(&[m]).normal(x) as f32).collect())
            .collect();
        let mlp = |a: usize, b: usize| Mlp {
            gate: None,
            up: &weights[a],
            down: &weights[b],
            hidden: h,
            up_is_factor: false,
        };
        let alike = seen.finish(0, &[mlp(0, 1), mlp(2, 3)]).unwrap();
        assert_eq!(alike.outputs[0], [None, None]);
        // One token has no other to be set against.
        assert_eq!((alike.of_outputs.value, alike.of_outputs.chance), (None, None));
        let direct = expert_similarity(&mlp(0, 1), &mlp(2, 3), 0).unwrap();
        assert_eq!(alike.weights.unwrap()[1][0], direct.value);
        assert_eq!(alike.of_weights, direct);
    }
}
