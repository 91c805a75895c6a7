//! How products become tasks: blocks of C, large where there is much left to do and smaller towards the end.

use super::{How, MAX_M, MAX_N, Product, micro};

/// A part of a product that one task computes: rows `m0..m1`, columns `n0..n1` (and their twins).
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub product: usize,
    pub m0: usize,
    pub m1: usize,
    pub n0: usize,
    pub n1: usize,
}

/// Cuts products into blocks: as large as the caches like at first, then ever smaller, so that `threads` end close together.
pub(super) fn cut(how: How, products: &[Product], threads: usize) -> Vec<Block> {
    let (mr, nr) = micro::shape(how.level);
    let halves = |p: &Product| 1 + usize::from(p.twin.is_some());
    // Of an element of C.
    let each = |p: &Product| (halves(p) * (p.k + 16)) as f64;
    let total: f64 = products.iter().map(|p| (p.m * p.n) as f64 * each(p)).sum();
    let mut left = total;
    let mut blocks = Vec::new();
    for (product, p) in products.iter().enumerate() {
        if p.m == 0 || p.n == 0 {
            continue;
        }
        let widest = MAX_N / halves(p);
        // Where C is visited once, a block may be as high as it likes; else C should stay in the caches.
        let highest =
            if p.a.k_inner && p.k <= how.for_product(p).steps() { p.m.next_multiple_of(mr) } else { MAX_M };
        let rows = p.m.div_ceil(p.m.div_ceil(highest)).next_multiple_of(mr).min(highest);
        let cols = p.n.div_ceil(p.n.div_ceil(widest)).next_multiple_of(nr).min(widest);
        // Neighbours in the list share rows of A, which are then still in a shared cache.
        let mut todo = Vec::new();
        for m0 in (0..p.m).step_by(rows) {
            for n0 in (0..p.n).step_by(cols) {
                let (m1, n1) = ((m0 + rows).min(p.m), (n0 + cols).min(p.n));
                todo.push(Block { product, m0, m1, n0, n1 });
            }
        }
        todo.reverse();
        while let Some(block) = todo.pop() {
            let cost = block.len() as f64 * each(p);
            // Half of a thread's share at first, so that one of half the speed has time for it; then each thread's share of
            // what is left.
            let most = match threads {
                1 => f64::INFINITY,
                _ => left.min(total / 2.0).max(total / 16.0) / threads as f64,
            };
            match block.split(most / cost, p.a.k_inner, halves(p), mr, nr) {
                Some((first, rest)) => todo.extend([rest, first]),
                None => {
                    left -= cost;
                    blocks.push(block);
                }
            }
        }
    }
    blocks
}

impl Block {
    /// Elements of C (of one half).
    fn len(&self) -> usize {
        (self.m1 - self.m0) * (self.n1 - self.n0)
    }

    /// Two parts, of which the first has `share` of the work, or more where that would be too thin to be packed for; none where
    /// the whole is little more than that, or small already. `along`: k runs along the lines of A.
    fn split(&self, share: f64, along: bool, halves: usize, mr: usize, nr: usize) -> Option<(Self, Self)> {
        if share > 0.75 {
            return None;
        }
        let (m, n) = (self.m1 - self.m0, self.n1 - self.n0);
        // A part of `len` in whole units, four or more, where some are left.
        let part = |len: usize, unit: usize| {
            let part = ((len as f64 * share) as usize).next_multiple_of(unit).max(4 * unit);
            (part + 2 * unit <= len).then_some(part)
        };
        // What packing costs of an element of C: rows of A for each block of columns (along k they are copied as they are),
        // columns of B for each block of rows.
        let price = |rows: usize, cols: usize| {
            (if along { 1.0 } else { 2.0 }) / (cols * halves) as f64 + 2.0 / rows as f64
        };
        let (rows, cols) = (part(m, mr), part(n, nr));
        let by_rows = match (rows, cols) {
            (Some(rows), Some(cols)) => price(rows, n) < price(m, cols),
            (None, None) => return None,
            (rows, _) => rows.is_some(),
        };
        let mut parts = (self.clone(), self.clone());
        if by_rows {
            let at = self.m0 + rows?;
            (parts.0.m1, parts.1.m0) = (at, at);
        } else {
            let at = self.n0 + cols?;
            (parts.0.n1, parts.1.n0) = (at, at);
        }
        Some(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Operand, Precision};
    use super::*;
    use crate::simd::Level;
    use proptest::prelude::*;

    fn product(m: usize, n: usize, k: usize, along: bool, twin: bool) -> Product<'static> {
        let a = if along { Operand::k_inner(&[], k) } else { Operand::k_outer(&[], m) };
        let (b, twin) = (Operand::k_inner(&[], k), twin.then_some(n));
        Product { m, n, k, a, b, c_start: 0, c_stride: n, accumulate: false, twin, twin_b: None }
    }

    fn how(level: Level) -> How {
        How::of(super::super::Arithmetic { level, precision: Precision::F32 })
    }

    proptest! {
        #[test]
        fn blocks_cover_each_element_once(
            sizes in prop::collection::vec((0usize..1200, 0usize..1200, 1usize..1500, any::<bool>(), any::<bool>()), 1..4),
            threads in 1usize..40,
        ) {
            let products: Vec<_> = sizes.iter().map(|&(m, n, k, along, twin)| product(m, n, k, along, twin)).collect();
            for level in Level::ALL {
                let (mr, nr) = micro::shape(level.min(Level::detected()));
                let mut times: Vec<Vec<u8>> = products.iter().map(|p| vec![0; p.m * p.n]).collect();
                for block in cut(how(level), &products, threads) {
                    let p = &products[block.product];
                    prop_assert!(block.m0 < block.m1 && block.m1 <= p.m && block.n0 < block.n1 && block.n1 <= p.n);
                    // What the panels of a thread have room for, from whole units on.
                    let widest = if p.twin.is_some() { MAX_N / 2 } else { MAX_N };
                    prop_assert!(block.n1 - block.n0 <= widest);
                    prop_assert!(block.m1 - block.m0 <= MAX_M || p.a.k_inner && p.k <= how(level).steps());
                    prop_assert!(block.m0.is_multiple_of(mr) && block.n0.is_multiple_of(nr));
                    for i in block.m0..block.m1 {
                        times[block.product][i * p.n + block.n0..i * p.n + block.n1].iter_mut().for_each(|t| *t += 1);
                    }
                }
                prop_assert!(times.iter().flatten().all(|t| *t == 1));
            }
        }
    }

    /// The time of all, where each thread takes the next block when it is done, over that of the work spread evenly.
    fn lateness(products: &[Product], speeds: &[f64]) -> f64 {
        let mut ends = vec![0.0; speeds.len()];
        let mut work = 0.0;
        for block in cut(how(Level::Avx2), products, speeds.len()) {
            let p = &products[block.product];
            let cost = (block.len() * p.k) as f64 * if p.twin.is_some() { 2.0 } else { 1.0 };
            work += cost;
            let first = (0..ends.len()).min_by(|a, b| f64::total_cmp(&ends[*a], &ends[*b])).unwrap();
            ends[first] += cost / speeds[first];
        }
        ends.iter().copied().fold(0.0, f64::max) * speeds.iter().sum::<f64>() / work
    }

    #[test]
    fn threads_end_close_together() {
        let one = |m, n, k, along| vec![product(m, n, k, along, false)];
        let experts = |count, m, n, k, twin| vec![product(m, n, k, true, twin); count];
        for products in [
            one(2048, 768, 256, true),
            one(768, 256, 2048, false),
            one(2048, 4096, 512, true),
            experts(8, 512, 512, 256, true),
            experts(64, 128, 512, 256, true),
            experts(3, 700, 300, 512, false),
        ] {
            for threads in [2, 4, 16] {
                let even = lateness(&products, &vec![1.0; threads]);
                assert!(even < 1.15, "{threads} threads: {even}");
                // Half of the processors have half the speed.
                let speeds: Vec<f64> = (0..threads).map(|t| if t % 2 == 0 { 1.0 } else { 0.5 }).collect();
                let uneven = lateness(&products, &speeds);
                assert!(uneven < 1.25, "{threads} threads of two kinds: {uneven}");
            }
        }
    }
}
