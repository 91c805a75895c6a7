//! Placement: which rank holds which expert under expert parallelism, what that costs, and a suggestion that costs less.
//!
//! The texts are dealt to the ranks in turn, in the order of their numbers: text i is at home at rank i mod R. A token goes from its home to each rank
//! that holds one of its experts, once, however many of them are there: that is the traffic, and its result comes back the
//! same way. All ranks wait for the one with the most assignments: that is the imbalance.

use super::Options;
use super::numbers::{Figure, apart, expected_greatest, ratio};
use super::view::{Layer, Sets, texts};
use crate::error::{InsightError, Result};
use crate::trace::Trace;
use serde::{Deserialize, Serialize};

/// Passes over all pairs of experts that a suggestion makes at most.
const SWEEPS: usize = 20;

/// Which rank holds each expert of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Placement {
    /// R.
    ranks: usize,
    /// The rank of each expert: \[E\].
    of: Vec<u16>,
}

/// A placement that was read.
#[derive(Deserialize)]
struct Unchecked {
    ranks: usize,
    of: Vec<u16>,
}

impl TryFrom<Unchecked> for Placement {
    type Error = InsightError;

    fn try_from(read: Unchecked) -> Result<Self> {
        Self::new(read.ranks, read.of)
    }
}

impl Placement {
    /// The placement with these ranks of the experts: \[E\], each below `ranks`.
    pub fn new(ranks: usize, of: Vec<u16>) -> Result<Self> {
        Self::check(ranks)?;
        if let Some((expert, rank)) = of.iter().enumerate().find(|(_, rank)| usize::from(**rank) >= ranks) {
            return Err(InsightError::trace(format!("expert {expert} is placed at rank {rank} of {ranks}")));
        }
        Ok(Self { ranks, of })
    }

    /// Experts in their order, as many at each rank as at another but for one: what systems do by default.
    pub fn contiguous(experts: usize, ranks: usize) -> Result<Self> {
        Self::check(ranks)?;
        Ok(Self { ranks, of: (0..experts).map(|e| (e * ranks / experts) as u16).collect() })
    }

    fn check(ranks: usize) -> Result<()> {
        if ranks == 0 || ranks > super::MOST_EXPERTS {
            let most = super::MOST_EXPERTS;
            return Err(InsightError::trace(format!("{ranks} ranks: expected 1 to {most}")));
        }
        Ok(())
    }

    /// R.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The rank of each expert: \[E\].
    pub fn of(&self) -> &[u16] {
        &self.of
    }

    /// Experts at each rank: \[R\].
    fn sizes(&self) -> Vec<usize> {
        let mut sizes = vec![0; self.ranks];
        self.of.iter().for_each(|rank| sizes[usize::from(*rank)] += 1);
        sizes
    }
}

/// What a placement costs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Tokens that were looked at.
    pub tokens: u64,
    /// Pairs of a token and a rank to which it is sent, by the token's home and the rank: \[R, R\]. Those on the diagonal stay.
    pub pairs: Vec<Vec<u64>>,
    /// The traffic: pairs whose rank is not the token's home.
    pub sent: u64,
    /// The traffic of a token. By chance: the mean over tokens of Σ_r (1 - 1/R)·(1 - C(E-m_r, k)/C(E, k)), m_r experts at rank r, k those
    /// of the token: experts drawn at random.
    pub sent_per_token: Figure,
    /// Assignments of each rank: \[R\].
    pub loads: Vec<u64>,
    /// The greatest of `loads` over their mean. By load: what placements at random have, to first order: 1 + z·s/m, where s is
    /// the deviation of the sum of E/R loads drawn of the E and z the expected greatest of R normal values.
    pub imbalance: Figure,
}

/// A placement of a layer's experts over some ranks, beside the default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Suggestion {
    /// R.
    pub ranks: usize,
    /// The rank of each expert: \[E\].
    pub placement: Vec<u16>,
    /// What experts in their order cost.
    pub contiguous: Cost,
    /// What the suggestion costs.
    pub suggested: Cost,
    /// The same two for a suggestion that was made from one half of the texts, over the other half: what is to be hoped for on new texts.
    /// None where a half has no tokens.
    pub held_out: Option<HeldOut>,
}

/// What placements cost on texts that the suggestion was not made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// Experts in their order.
    pub contiguous: Cost,
    /// The suggestion from the other half.
    pub suggested: Cost,
}

/// The home of each row: \[N\].
pub(crate) fn homes(texts: &[Vec<usize>], rows: usize, ranks: usize) -> Vec<u16> {
    let mut homes = vec![0; rows];
    for (at, text) in texts.iter().enumerate() {
        text.iter().for_each(|row| homes[*row] = (at % ranks.max(1)) as u16);
    }
    homes
}

/// What a placement of a layer's experts costs over a whole trace.
pub fn cost(trace: &Trace, layer: usize, placement: &Placement) -> Result<Cost> {
    trace.validate()?;
    let Some(found) = trace.layers.get(&layer) else {
        let known: Vec<usize> = trace.layers.keys().copied().collect();
        return Err(InsightError::trace(format!("there is no layer {layer}, there are {known:?}")));
    };
    let layer = Layer::new(layer, found)?;
    check_length(placement, layer.experts)?;
    let homes = homes(&texts(trace), trace.len(), placement.ranks);
    Ok(cost_of(&layer.sets, &layer.seen, layer.experts, &homes, placement))
}

/// Refuses a placement of another number of experts.
pub(crate) fn check_length(placement: &Placement, experts: usize) -> Result<()> {
    if placement.of.len() != experts {
        let found = placement.of.len();
        return Err(InsightError::trace(format!("a placement of {found} experts, the layer has {experts}")));
    }
    Ok(())
}

/// What a placement of `experts` costs over these rows.
pub(crate) fn cost_of(
    sets: &Sets,
    rows: &[usize],
    experts: usize,
    homes: &[u16],
    placement: &Placement,
) -> Cost {
    let ranks = placement.ranks;
    let mut pairs = vec![vec![0u64; ranks]; ranks];
    let (mut of_experts, mut by_size) = (vec![0u64; experts], std::collections::BTreeMap::new());
    let mut last = vec![usize::MAX; ranks];
    for row in rows {
        let home = usize::from(homes[*row]);
        for e in sets.each(*row) {
            let rank = usize::from(placement.of[e]);
            of_experts[e] += 1;
            if last[rank] != *row {
                last[rank] = *row;
                pairs[home][rank] += 1;
            }
        }
        *by_size.entry(sets.get(*row).len()).or_insert(0u64) += 1;
    }
    let sent: u64 = pairs.iter().map(|row| row.iter().sum::<u64>()).sum::<u64>()
        - (0..ranks).map(|rank| pairs[rank][rank]).sum::<u64>();
    let mut loads = vec![0u64; ranks];
    placement.of.iter().zip(&of_experts).for_each(|(rank, n)| loads[usize::from(*rank)] += n);
    let (n, total) = (rows.len() as f64, loads.iter().sum::<u64>() as f64);
    let away = 1.0 - 1.0 / ranks as f64;
    let reached = |k: usize| -> f64 {
        placement.sizes().into_iter().map(|m| away * (1.0 - apart(experts, m, k))).sum()
    };
    let chance: f64 = by_size.iter().map(|(k, times)| *times as f64 * reached(*k)).sum();
    // The sum of m loads drawn of E without replacement has the variance m·σ²·(E - m)/(E - 1).
    let (e, m) = (experts as f64, experts as f64 / ranks as f64);
    let mean = total / e;
    let variance = of_experts.iter().map(|n| (*n as f64 - mean).powi(2)).sum::<f64>() / e;
    let deviation = (m * variance * ((e - m) / (e - 1.0)).max(0.0)).sqrt();
    let random = ratio(deviation, m * mean).map(|cv| 1.0 + cv * expected_greatest(ranks));
    let greatest = loads.iter().copied().max().unwrap_or(0) as f64;
    Cost {
        tokens: rows.len() as u64,
        pairs,
        sent,
        sent_per_token: Figure::new(ratio(sent as f64, n), ratio(chance, n), None),
        imbalance: Figure::new(ratio(greatest * ranks as f64, total), None, random),
        loads,
    }
}

/// Suggestions for a layer, for each number of ranks that has no more than its experts.
pub(crate) fn of(
    layer: &Layer,
    texts: &[Vec<usize>],
    rows: usize,
    options: &Options,
) -> Result<Vec<Suggestion>> {
    let mut text_of = vec![0; rows];
    for (at, text) in texts.iter().enumerate() {
        text.iter().for_each(|row| text_of[*row] = at);
    }
    let of_ranks = |ranks: &usize| {
        let (ranks, sets, experts) = (*ranks, &layer.sets, layer.experts);
        let homes = homes(texts, rows, ranks);
        let contiguous = Placement::contiguous(experts, ranks)?;
        let cost = |rows: &[usize], placement: &Placement| cost_of(sets, rows, experts, &homes, placement);
        let suggested = suggest(sets, &layer.seen, experts, &homes, ranks, options)?;
        // Halves in which every rank is the home of as many texts.
        let half = |odd: bool| -> Vec<usize> {
            let of_half = |row: &&usize| (text_of[**row] / ranks % 2 == 1) == odd;
            layer.seen.iter().filter(of_half).copied().collect()
        };
        let (made_from, judged_on) = (half(false), half(true));
        let held_out = match made_from.is_empty() || judged_on.is_empty() {
            true => None,
            false => {
                let made = suggest(sets, &made_from, experts, &homes, ranks, options)?;
                let (contiguous, suggested) = (cost(&judged_on, &contiguous), cost(&judged_on, &made));
                Some(HeldOut { contiguous, suggested })
            }
        };
        Ok(Suggestion {
            ranks,
            contiguous: cost(&layer.seen, &contiguous),
            suggested: cost(&layer.seen, &suggested),
            placement: suggested.of,
            held_out,
        })
    };
    options.ranks.iter().filter(|ranks| **ranks <= layer.experts).map(of_ranks).collect()
}

/// A placement of little traffic and imbalance, with as many experts at each rank as the contiguous one has.
///
/// It minimises sent / (sent by chance) + [`Options::balance`] · imbalance. Two placements are improved by swaps of two experts until none
/// helps, and the better one is taken: experts dealt from the greatest load down to the rank that has the least, and the
/// contiguous. Always the same for the same tokens.
pub(crate) fn suggest(
    sets: &Sets,
    rows: &[usize],
    experts: usize,
    homes: &[u16],
    ranks: usize,
    options: &Options,
) -> Result<Placement> {
    let contiguous = Placement::contiguous(experts, ranks)?;
    // Evenly among the rows: texts follow each other, and all should have their say.
    let count = rows.len().min(options.placement_tokens.max(1));
    let some: Vec<usize> = (0..count).map(|i| rows[i * rows.len() / count]).collect();
    let even = cost_of(sets, &some, experts, homes, &contiguous);
    let scale = even.sent_per_token.chance.unwrap_or(0.0) * count as f64;
    let search = |placement: Placement| {
        let mut search = Search::new(sets, &some, experts, homes, placement, scale, options.balance);
        for _ in 0..SWEEPS {
            if !search.sweep() {
                break;
            }
        }
        search
    };
    let dealt = search(dealt(sets, &some, experts, &contiguous));
    let contiguous = search(contiguous);
    Ok(if contiguous.value() < dealt.value() { contiguous.placement } else { dealt.placement })
}

/// Experts from the greatest load down, each to the rank of the least load that has room; as many at each rank as `like` has.
fn dealt(sets: &Sets, rows: &[usize], experts: usize, like: &Placement) -> Placement {
    let mut loads = vec![0u64; experts];
    rows.iter().flat_map(|row| sets.each(*row)).for_each(|e| loads[e] += 1);
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by_key(|e| (std::cmp::Reverse(loads[*e]), *e));
    let (mut room, mut sums) = (like.sizes(), vec![0u64; like.ranks]);
    let mut of = vec![0; experts];
    for e in order {
        let open = (0..like.ranks).filter(|rank| room[*rank] > 0);
        let Some(rank) = open.min_by_key(|rank| (sums[*rank], *rank)) else { continue };
        room[rank] -= 1;
        sums[rank] += loads[e];
        of[e] = rank as u16;
    }
    Placement { ranks: like.ranks, of }
}

/// A placement that is improved. Sets of tokens are bits, W words of them.
struct Search {
    placement: Placement,
    /// Tokens of each expert: \[E, W\].
    has: Vec<u64>,
    /// Tokens that are sent to each rank for the sake of one expert alone: \[R, W\].
    one: Vec<u64>,
    /// Tokens that would be sent to each rank if they had an expert there, and have none: \[R, W\].
    none: Vec<u64>,
    /// W.
    words: usize,
    /// The home of each token: \[n\].
    homes: Vec<u16>,
    /// Experts of each token at each rank: \[n, R\].
    at_rank: Vec<u16>,
    /// Tokens of each expert: \[E\].
    counts: Vec<u64>,
    /// Assignments of each rank: \[R\].
    loads: Vec<u64>,
    sent: i64,
    /// What `sent` is divided by.
    scale: f64,
    balance: f64,
}

impl Search {
    fn new(
        sets: &Sets,
        rows: &[usize],
        experts: usize,
        homes: &[u16],
        placement: Placement,
        scale: f64,
        balance: f64,
    ) -> Self {
        let (ranks, words) = (placement.ranks, rows.len().div_ceil(64));
        let (mut has, mut at_rank) = (vec![0u64; experts * words], vec![0u16; rows.len() * ranks]);
        let (mut counts, mut loads) = (vec![0; experts], vec![0; ranks]);
        for (token, row) in rows.iter().enumerate() {
            for e in sets.each(*row) {
                let rank = usize::from(placement.of[e]);
                has[e * words + token / 64] |= 1 << (token % 64);
                at_rank[token * ranks + rank] += 1;
                counts[e] += 1;
                loads[rank] += 1;
            }
        }
        let homes: Vec<u16> = rows.iter().map(|row| homes[*row]).collect();
        let away = |(token, home): (usize, &u16)| {
            let of_token = at_rank[token * ranks..][..ranks].iter().enumerate();
            of_token.filter(|(rank, n)| **n > 0 && *rank != usize::from(*home)).count() as i64
        };
        let sent = homes.iter().enumerate().map(away).sum();
        let (one, none) = (vec![0; ranks * words], vec![0; ranks * words]);
        let mut search =
            Self { placement, has, one, none, words, homes, at_rank, counts, loads, sent, scale, balance };
        for token in 0..rows.len() {
            (0..ranks).for_each(|rank| search.note(token, rank));
        }
        search
    }

    /// Sets the bits of a token and a rank by how many of its experts are there.
    fn note(&mut self, token: usize, rank: usize) {
        let (at, bit) = (rank * self.words + token / 64, 1u64 << (token % 64));
        let count = self.at_rank[token * self.loads.len() + rank];
        let away = usize::from(self.homes[token]) != rank;
        for (bits, set) in [(&mut self.one, away && count == 1), (&mut self.none, away && count == 0)] {
            if set { bits[at] |= bit } else { bits[at] &= !bit }
        }
    }

    /// What is made small.
    fn value(&self) -> f64 {
        self.value_of(self.sent, &self.loads)
    }

    fn value_of(&self, sent: i64, loads: &[u64]) -> f64 {
        let greatest = loads.iter().copied().max().unwrap_or(0) as f64;
        let total: u64 = loads.iter().sum();
        let part = |x: f64, of: f64| if of > 0.0 { x / of } else { 0.0 };
        part(sent as f64, self.scale) + self.balance * part(greatest * loads.len() as f64, total as f64)
    }

    /// Swaps pairs that gain, in their order; says whether there were any.
    fn sweep(&mut self) -> bool {
        let mut any = false;
        for a in 0..self.counts.len() {
            for b in a + 1..self.counts.len() {
                if self.placement.of[a] == self.placement.of[b] {
                    continue;
                }
                let (sent, loads) = self.swapped(a, b);
                if self.value_of(sent, &loads) < self.value() - 1e-12 {
                    self.swap(a, b);
                    (self.sent, self.loads, any) = (sent, loads, true);
                }
            }
        }
        any
    }

    /// The words of an expert or a rank.
    fn row<'a>(&self, bits: &'a [u64], of: usize) -> &'a [u64] {
        &bits[of * self.words..][..self.words]
    }

    /// Traffic and loads with two experts of different ranks swapped.
    fn swapped(&self, a: usize, b: usize) -> (i64, Vec<u64>) {
        let rank = |e: usize| usize::from(self.placement.of[e]);
        let mut sent = self.sent;
        for (moved, other) in [(a, b), (b, a)] {
            let (mine, theirs) = (self.row(&self.has, moved), self.row(&self.has, other));
            let (left, met) = (self.row(&self.one, rank(moved)), self.row(&self.none, rank(other)));
            for (((mine, theirs), left), met) in mine.iter().zip(theirs).zip(left).zip(met) {
                // A token of both goes where it went.
                let only = mine & !theirs;
                sent += i64::from((only & met).count_ones()) - i64::from((only & left).count_ones());
            }
        }
        let mut loads = self.loads.clone();
        loads[rank(a)] = loads[rank(a)] - self.counts[a] + self.counts[b];
        loads[rank(b)] = loads[rank(b)] - self.counts[b] + self.counts[a];
        (sent, loads)
    }

    /// Swaps two experts of different ranks; traffic and loads are the caller's.
    fn swap(&mut self, a: usize, b: usize) {
        let ranks = self.loads.len();
        let (at_a, at_b) = (usize::from(self.placement.of[a]), usize::from(self.placement.of[b]));
        for token in 0..self.homes.len() {
            let has = |e: usize| self.has[e * self.words + token / 64] >> (token % 64) & 1 == 1;
            let (from, to) = match (has(a), has(b)) {
                (true, false) => (at_a, at_b),
                (false, true) => (at_b, at_a),
                _ => continue,
            };
            self.at_rank[token * ranks + from] -= 1;
            self.at_rank[token * ranks + to] += 1;
            self.note(token, from);
            self.note(token, to);
        }
        self.placement.of.swap(a, b);
    }
}

#[cfg(test)]
mod tests {
    use super::super::numbers::shuffled;
    use super::*;
    use senmon_moe::rng::Stream;

    /// Experts of four pairs that are always together, in an order that puts no pair at one rank.
    fn paired(tokens: u64) -> Sets {
        let stream = Stream::new(&[5]);
        let slots: Vec<u16> = (0..tokens)
            .flat_map(|t| {
                let pair = (stream.bits(t) % 4) as u16;
                [pair, pair + 4]
            })
            .collect();
        Sets::of(&slots, 2, 8)
    }

    #[test]
    fn a_suggestion_puts_together_what_is_used_together_and_is_even() {
        let (sets, rows) = (paired(400), (0..400).collect::<Vec<_>>());
        let homes: Vec<u16> = (0..400).map(|t| (t % 4) as u16).collect();
        let options = Options::default();
        let contiguous = Placement::contiguous(8, 4).unwrap();
        let suggested = suggest(&sets, &rows, 8, &homes, 4, &options).unwrap();
        for pair in 0..4 {
            assert_eq!(suggested.of[pair], suggested.of[pair + 4], "{suggested:?}");
        }
        let (before, after) =
            (cost_of(&sets, &rows, 8, &homes, &contiguous), cost_of(&sets, &rows, 8, &homes, &suggested));
        // One rank of a token instead of two.
        assert!(after.sent * 10 < before.sent * 6, "{} against {}", after.sent, before.sent);
        assert_eq!(after.loads.iter().sum::<u64>(), 800);
        assert_eq!(suggested.sizes(), [2; 4]);
    }

    #[test]
    fn what_a_search_adds_up_is_what_the_placement_costs() {
        let stream = Stream::new(&[6]);
        let slots: Vec<u16> = (0..600).map(|i| (stream.bits(i) % 7) as u16).collect();
        let (sets, rows) = (Sets::of(&slots, 3, 7), (0..200).collect::<Vec<_>>());
        let homes: Vec<u16> = (0..200).map(|t| (t % 3) as u16).collect();
        let placement = Placement::contiguous(7, 3).unwrap();
        let mut search = Search::new(&sets, &rows, 7, &homes, placement, 100.0, 1.0);
        while search.sweep() {}
        let cost = cost_of(&sets, &rows, 7, &homes, &search.placement);
        assert_eq!((search.sent as u64, &search.loads), (cost.sent, &cost.loads));
    }

    #[test]
    fn chance_is_what_random_experts_and_random_placements_cost() {
        let (experts, ranks, n) = (12, 3, 20_000);
        let slots: Vec<u16> = (0..n as u64)
            .flat_map(|t| {
                shuffled(Stream::new(&[t]), experts)[..2].iter().map(|e| *e as u16).collect::<Vec<_>>()
            })
            .collect();
        let (sets, rows) = (Sets::of(&slots, 2, experts), (0..n).collect::<Vec<_>>());
        let homes: Vec<u16> = rows.iter().map(|t| (t % ranks) as u16).collect();
        let cost = cost_of(&sets, &rows, experts, &homes, &Placement::contiguous(experts, ranks).unwrap());
        let (found, chance) = (cost.sent_per_token.value.unwrap(), cost.sent_per_token.chance.unwrap());
        assert!((found / chance - 1.0).abs() < 0.02, "{found} against {chance}");

        // Loads 1, 2, ... 12: the mean imbalance of many random placements.
        let slots: Vec<u16> = (0..12u16).flat_map(|e| vec![e; usize::from(e) + 1]).collect();
        let (sets, rows) = (Sets::of(&slots, 1, experts), (0..slots.len()).collect::<Vec<_>>());
        let homes = vec![0; slots.len()];
        let imbalance = |seed: u64| {
            let order = shuffled(Stream::new(&[seed]), experts);
            let placement =
                Placement::new(ranks, order.iter().map(|e| (e % ranks) as u16).collect()).unwrap();
            cost_of(&sets, &rows, experts, &homes, &placement).imbalance
        };
        let mean = (0..500).map(|seed| imbalance(seed).value.unwrap()).sum::<f64>() / 500.0;
        let wanted = imbalance(0).by_load.unwrap();
        assert!((mean - wanted).abs() < 0.03, "{mean} against {wanted}");
    }

    #[test]
    fn ranks_that_are_none_are_refused() {
        assert!(Placement::contiguous(4, 0).is_err() && Placement::new(2, vec![0, 2]).is_err());
        assert_eq!(Placement::contiguous(5, 2).unwrap().of, [0, 0, 0, 1, 1]);
        assert!(Placement::contiguous(0, 2).unwrap().of.is_empty());
    }
}
