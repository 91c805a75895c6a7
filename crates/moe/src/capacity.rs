//! Capacity: how many tokens an expert takes at most, and who is left out when more want it.

use crate::config::Drop;
use crate::rng::{Draws, Purpose};
use senmon_kernels::dispatch::EMPTY;

/// C = ⌈factor·k·T/E⌉, at least `least`.
pub fn places(factor: f64, top_k: usize, tokens: usize, experts: usize, least: usize) -> usize {
    let exact = factor * (top_k * tokens) as f64 / experts.max(1) as f64;
    // A product that is whole but for rounding is whole.
    ((exact - 1e-9).ceil().max(0.0) as usize).max(least)
}

/// How C comes about.
#[derive(Clone, Copy, Debug)]
pub enum Places {
    /// C = ⌈factor·k·T/E⌉ of the tokens that count in a group, at least `least`.
    Share {
        /// The factor.
        factor: f64,
        /// K, whatever slots a token has.
        top_k: usize,
        /// E, those that compute nothing too.
        experts: usize,
        /// C is at least this.
        least: usize,
    },
    /// A number.
    Number(usize),
}

impl Places {
    /// C of `tokens` that count.
    fn of(self, tokens: usize) -> usize {
        match self {
            Places::Share { factor, top_k, experts, least } => places(factor, top_k, tokens, experts, least),
            Places::Number(number) => number,
        }
    }
}

/// The bound on the tokens of each expert.
#[derive(Clone, Copy, Debug)]
pub struct Capacity<'a> {
    /// C.
    pub places: Places,
    /// Tokens of a group; 0 for all.
    pub group: usize,
    /// Random numbers of a token, one for each logit.
    pub width: usize,
    /// Who is left out.
    pub drop: Drop,
    /// Random numbers.
    pub draws: Draws<'a>,
}

impl Capacity<'_> {
    /// Empties the slots of `picks` \[T, slots\] that find their expert of `experts` full, and says how many; `ranks` \[T, slots\] are the
    /// weights or scores that some rules go by. Slots that are empty already take no place, nor do
    /// tokens that `counts` turns down count for C.
    pub fn apply(
        &self,
        picks: &mut [u32],
        ranks: &[f32],
        slots: usize,
        experts: usize,
        counts: impl Fn(usize) -> bool,
    ) -> usize {
        let tokens = picks.len() / slots.max(1);
        let size = if self.group == 0 { tokens.max(1) } else { self.group };
        let mut dropped = 0;
        for start in (0..tokens).step_by(size) {
            let group = start..(start + size).min(tokens);
            let counted = group.clone().filter(|t| counts(*t)).count();
            let places = self.places.of(counted);
            let mut taken = vec![0; experts];
            for slot in self.order(group, picks, ranks, slots, experts) {
                let Some(taken) = taken.get_mut(picks[slot] as usize) else { continue };
                if *taken == places {
                    picks[slot] = EMPTY;
                    dropped += 1;
                } else {
                    *taken += 1;
                }
            }
        }
        dropped
    }

    /// The slots of a group of tokens in the order in which they get their places.
    fn order(
        &self,
        group: std::ops::Range<usize>,
        picks: &[u32],
        ranks: &[f32],
        slots: usize,
        experts: usize,
    ) -> Vec<usize> {
        let falling = |a: f32, b: f32| b.total_cmp(&a);
        let by_rank = |tokens: &[usize]| -> Vec<usize> {
            (0..slots).flat_map(|k| tokens.iter().map(move |t| t * slots + k)).collect()
        };
        let tokens: Vec<usize> = group.clone().collect();
        match self.drop {
            Drop::Position => by_rank(&tokens),
            Drop::Token => (group.start * slots..group.end * slots).collect(),
            Drop::Priority => {
                let greatest = |t: &usize| {
                    let row = &ranks[t * slots..][..slots];
                    row.iter().copied().fold(f32::NEG_INFINITY, f32::max)
                };
                let mut tokens = tokens;
                tokens.sort_by(|a, b| falling(greatest(a), greatest(b)));
                by_rank(&tokens)
            }
            Drop::Gate => {
                let mut order: Vec<usize> = (group.start * slots..group.end * slots).collect();
                order.sort_by(|a, b| falling(ranks[*a], ranks[*b]));
                order
            }
            Drop::Random => {
                let mut order: Vec<usize> = (group.start * slots..group.end * slots).collect();
                let number = |slot: &usize| {
                    let (token, expert) = (slot / slots, picks[*slot] as usize);
                    self.draws.row(Purpose::Drop, token, self.width).uniform(expert.min(experts - 1))
                };
                order.sort_by(|a, b| falling(number(a), number(b)));
                order
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drops(drop: Drop, picks: &[u32], weights: &[f32], factor: f64) -> Vec<u32> {
        let draws = Draws { given: &[(Purpose::Drop, &[0.1, 0.2, 0.9, 0.8, 0.5, 0.4])], ..Draws::default() };
        let places = Places::Share { factor, top_k: 2, experts: 2, least: 0 };
        let capacity = Capacity { places, group: 0, width: 2, drop, draws };
        let mut picks = picks.to_vec();
        capacity.apply(&mut picks, weights, 2, 2, |_| true);
        picks
    }

    #[test]
    fn each_rule_leaves_out_its_own() {
        // Three tokens want experts 0 and 1; two places each.
        let (picks, weights) = ([0, 1, 1, 0, 0, 1], [0.6, 0.4, 0.55, 0.45, 0.9, 0.1]);
        let run = |drop| drops(drop, &picks, &weights, 2.0 / 3.0);
        // First choices: 0 by tokens 0 and 2, 1 by token 1; then 1 by token 0.
        assert_eq!(run(Drop::Position), [0, 1, 1, EMPTY, 0, EMPTY]);
        assert_eq!(run(Drop::Token), [0, 1, 1, 0, EMPTY, EMPTY]);
        assert_eq!(run(Drop::Priority), [0, EMPTY, 1, EMPTY, 0, 1]);
        assert_eq!(run(Drop::Gate), [0, 1, 1, EMPTY, 0, EMPTY]);
        // By falling number: 1 to 0, 1 to 1, 2 to 0, 2 to 1, 0 to 1, 0 to 0.
        assert_eq!(run(Drop::Random), [EMPTY, EMPTY, 1, 0, 0, 1]);
    }

    #[test]
    fn places_are_rounded_up_and_not_by_rounding_errors() {
        assert_eq!(places(1.25, 2, 100, 8, 0), 32);
        assert_eq!(places(1.1, 1, 10, 1, 0), 11);
        assert_eq!((places(0.1, 1, 4, 8, 3), places(0.0, 2, 9, 3, 0)), (3, 0));
    }
}
