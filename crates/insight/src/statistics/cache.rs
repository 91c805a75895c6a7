//! Caches: how often a token finds its experts among those in fast memory, by how many have room there.
//!
//! Texts are decoded one after another, token by token, and the cache stays between them. A hit is an expert that is there
//! when the token comes to the layer; then all its experts are read, the first choice last.

use super::Options;
use super::numbers::{ratio, shuffled};
use super::view::{Layer, Sets};
use senmon_moe::rng::Stream;
use serde::{Deserialize, Serialize};

/// Hit rates of a cache of 1, 2, ... E experts of a layer: \[E\] each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cache {
    /// Experts that were asked for.
    pub requests: u64,
    /// Hits of a cache that evicts what was used least recently, by its size: \[E\].
    pub lru_hits: Vec<u64>,
    /// The same over the requests.
    pub lru: Vec<Option<f64>>,
    /// What that is if all experts are alike and no token depends on another: size / E.
    pub chance: Vec<Option<f64>>,
    /// The hit rate of the same cache after the tokens were shuffled (seeded): what the loads alone give.
    pub shuffled: Vec<Option<f64>>,
    /// The hit rate if the experts of the greatest load are always there, and no other.
    pub fixed: Vec<Option<f64>>,
    /// Hits that no cache can exceed, even one that knows the future: it keeps what is needed next soonest (Belady 1966), and need
    /// not keep what it reads.
    pub best_hits: Vec<u64>,
    /// The same over the requests.
    pub best: Vec<Option<f64>>,
}

/// Hits of LRU caches of all sizes 1..=E over tokens in this order: the depth of an expert in the list of the most recent is the
/// size from which on it is a hit (Mattson et al. 1970).
pub(crate) fn lru(sets: &Sets, rows: impl Iterator<Item = usize>, experts: usize) -> Vec<u64> {
    let mut recent: Vec<u16> = Vec::with_capacity(experts);
    let mut hits = vec![0u64; experts];
    for row in rows {
        let set = sets.get(row);
        for (depth, _) in recent.iter().enumerate().filter(|(_, id)| set.contains(id)) {
            hits[depth] += 1;
        }
        for id in set.iter().rev() {
            let at = recent.iter().position(|known| known == id).unwrap_or(recent.len());
            if at == recent.len() {
                recent.push(*id);
            }
            recent[..=at].rotate_right(1);
        }
    }
    added_up(hits)
}

/// Hits of the best caches of all sizes 1..=E. A cache of one more expert holds all that the smaller one holds, so one list says
/// what caches of all sizes hold.
pub(crate) fn best(sets: &Sets, rows: &[usize], experts: usize) -> Vec<u64> {
    // When each expert of a token is needed next: the number of the token in `rows`, from behind.
    let mut next = vec![usize::MAX; experts];
    let mut after: Vec<usize> = Vec::new();
    for (at, row) in rows.iter().enumerate().rev() {
        for e in sets.each(*row) {
            after.push(std::mem::replace(&mut next[e], at));
        }
    }
    let (mut kept, mut hits): (Vec<usize>, _) = (Vec::with_capacity(experts), vec![0u64; experts]);
    let mut spare: Vec<usize> = Vec::new();
    for row in rows {
        let set = sets.get(*row);
        // The last of `after` are those of this token, since it was filled from behind.
        let mine = after.len() - set.len();
        sets.each(*row).zip(&after[mine..]).for_each(|(e, time)| next[e] = *time);
        after.truncate(mine);
        spare.clear();
        spare.extend(sets.each(*row));
        // A cache of one more expert has one more to choose from: what it held beyond the smaller one, before.
        for (depth, place) in kept.iter_mut().enumerate() {
            let held = *place;
            if set.contains(&(held as u16)) {
                hits[depth] += 1;
            } else {
                spare.push(held);
            }
            *place = take_soonest(&mut spare, &next);
        }
        while !spare.is_empty() {
            kept.push(take_soonest(&mut spare, &next));
        }
    }
    added_up(hits)
}

/// Takes out the expert that is needed next soonest; of several the lowest.
fn take_soonest(spare: &mut Vec<usize>, next: &[usize]) -> usize {
    let soonest = (0..spare.len()).min_by_key(|at| (next[spare[*at]], spare[*at])).unwrap_or(0);
    spare.swap_remove(soonest)
}

/// Hits by depth to hits by size.
fn added_up(mut hits: Vec<u64>) -> Vec<u64> {
    let mut sum = 0;
    hits.iter_mut().for_each(|n| {
        sum += *n;
        *n = sum;
    });
    hits
}

/// The rows of a layer in the order of decoding: text after text.
pub(crate) fn decoded(layer: &Layer, texts: &[Vec<usize>], rows: usize) -> Vec<usize> {
    let mut seen = vec![false; rows];
    layer.seen.iter().for_each(|row| seen[*row] = true);
    texts.iter().flatten().copied().filter(|row| seen[*row]).collect()
}

/// The caches of a layer.
pub(crate) fn of(layer: &Layer, texts: &[Vec<usize>], rows: usize, options: &Options) -> Cache {
    let (sets, experts) = (&layer.sets, layer.experts);
    let rows = decoded(layer, texts, rows);
    let requests = sets.total() as u64;
    let rates = |hits: &[u64]| hits.iter().map(|n| ratio(*n as f64, requests as f64)).collect();
    let order = shuffled(Stream::new(&[options.seed, 0x6361_6368, layer.number as u64]), rows.len());
    let mut greatest = layer.counts.clone();
    greatest.sort_unstable_by(|a, b| b.cmp(a));
    let lru_hits = lru(sets, rows.iter().copied(), experts);
    let best_hits = best(sets, &rows, experts);
    Cache {
        requests,
        lru: rates(&lru_hits),
        chance: (1..=experts).map(|size| (requests > 0).then(|| size as f64 / experts as f64)).collect(),
        shuffled: rates(&lru(sets, order.iter().map(|at| rows[*at]), experts)),
        fixed: rates(&added_up(greatest)),
        best: rates(&best_hits),
        lru_hits,
        best_hits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets of two experts of five for each token, by chance but for the first, which often stays.
    fn sets(seed: u64, tokens: u64) -> Sets {
        let stream = Stream::new(&[seed]);
        let mut first = 0;
        let pick = |t: u64| {
            if stream.bits(3 * t).is_multiple_of(3) {
                first = (stream.bits(3 * t + 1) % 5) as u16;
            }
            [first, (stream.bits(3 * t + 2) % 5) as u16]
        };
        Sets::of(&(0..tokens).flat_map(pick).collect::<Vec<_>>(), 2, 5)
    }

    /// The most hits that a cache of `size` can have, over all it could keep: sets of experts are bits.
    fn exhaustive(sets: &Sets, tokens: usize, size: u32) -> u64 {
        let mut hits = vec![None; 32];
        hits[0] = Some(0u64);
        for row in 0..tokens {
            let asked: usize = sets.each(row).map(|e| 1 << e).sum();
            let mut then = vec![None; 32];
            for (held, before) in hits.iter().enumerate() {
                let Some(before) = before else { continue };
                let now = before + u64::from((held & asked).count_ones());
                for kept in
                    (0..32usize).filter(|kept| kept & !(held | asked) == 0 && kept.count_ones() <= size)
                {
                    then[kept] = then[kept].max(Some(now));
                }
            }
            hits = then;
        }
        hits.into_iter().flatten().max().unwrap()
    }

    #[test]
    fn no_cache_is_better_than_the_best_and_some_cache_is_as_good() {
        for seed in 0..10 {
            let (sets, rows) = (sets(seed, 40), (0..40).collect::<Vec<_>>());
            let (best, lru) = (best(&sets, &rows, 5), lru(&sets, 0..40, 5));
            for size in 1..=5 {
                assert_eq!(best[size - 1], exhaustive(&sets, 40, size as u32), "size {size}");
                assert!(lru[size - 1] <= best[size - 1]);
            }
            assert_eq!(lru[4], best[4]);
        }
    }

    #[test]
    fn hits_of_all_sizes_are_those_of_caches_of_each_size() {
        let sets = sets(3, 200);
        let all = lru(&sets, 0..200, 5);
        for size in 1..=5 {
            // The most recent last.
            let (mut cache, mut hits): (Vec<u16>, u64) = (Vec::new(), 0);
            for row in 0..200 {
                hits += sets.get(row).iter().filter(|id| cache.contains(id)).count() as u64;
                for id in sets.get(row).iter().rev() {
                    cache.retain(|known| known != id);
                    cache.push(*id);
                    if cache.len() > size {
                        cache.remove(0);
                    }
                }
            }
            assert_eq!(all[size - 1], hits);
        }
    }
}
