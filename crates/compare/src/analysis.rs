//! What the runs of a plan say: the comparisons with their intervals, corrected for how many there are.

use senmon_moe::config::Scope;
use senmon_moe::router;
use senmon_train::RunConfig;
use senmon_train::config::Ffn;
use senmon_train::schedule::ScheduleKind;
use serde::{Deserialize, Serialize};

use crate::heldout::{self, bits_per_byte};
use crate::plan::{Arm, Equality, Plan};
use crate::record::{Record, Window};
use crate::run::Outcomes;
use crate::statistics::{Interval, alpha_of_each, crossed, first_at, holm, mean, paired, ratio, value_at};

/// What all intervals of a comparison together may miss.
pub const ALPHA: f64 = 0.05;
/// Blocks that a domain's text is cut into, at most.
const DOMAIN_BLOCKS: usize = 10;
/// A held-out loss that ends so far above its lowest has risen.
const RISEN: f64 = 0.005;
/// Times that differ by less are the same.
const SAME_TIME: f64 = 0.01;

/// All comparisons.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Analysis {
    /// Seeds of each run.
    pub seeds: usize,
    /// Intervals that hold together.
    pub intervals: usize,
    /// What they may miss together.
    pub alpha: f64,
    /// The first arm with each other one, at each equality.
    pub comparisons: Vec<Comparison>,
}

/// Two arms at an equality.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What is equal.
    pub equality: Equality,
    /// The first arm.
    pub subject: Arm,
    /// The other one.
    pub other: Arm,
    /// The first arm's model.
    pub subject_model: String,
    /// The other one's.
    pub other_model: String,
    /// Held-out bits per byte of the first arm minus those of the other, by seed.
    pub by_seed: Vec<f64>,
    /// Its mean.
    pub mean: f64,
    /// Its interval over seeds and held-out text, corrected; none for one seed.
    pub difference: Option<Interval>,
    /// The same over seeds alone.
    pub seeds_only: Option<Interval>,
    /// p of the difference, corrected by Holm's rule over all differences and ratios.
    pub holm_p: Option<f64>,
    /// Arms of which a run is longer than the time that is compared at, and was read before its learning rate had come down.
    pub cut: Vec<Arm>,
    /// When the first arm came to the other's final loss.
    pub reach: Option<Reach>,
    /// The difference by domain.
    pub domains: Vec<DomainDifference>,
    /// Arms whose held-out loss rose again before the end. Where there is one, all runs of the comparison are read at their lowest held-out
    /// loss on the way, as who stops in time would have them.
    pub risen: Vec<Arm>,
    /// Learning rates of the two.
    pub rates: (f64, f64),
    /// Why nothing can be claimed, whatever the numbers are.
    pub unclaimed: Option<String>,
}

/// When one arm came to the final loss of another. Ratios are geometric means over seeds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reach {
    /// Seeds in which it did.
    pub reached: usize,
    /// Seeds.
    pub of: usize,
    /// Its seconds then over those of the other's whole run; none unless all seeds reached it.
    pub time: Option<Interval>,
    /// Its tokens over the other's.
    pub tokens: Option<Interval>,
    /// Its training operations over the other's.
    pub flops: Option<Interval>,
}

/// The difference in one domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainDifference {
    /// Its name.
    pub name: String,
    /// Held-out bytes.
    pub bytes: u64,
    /// Mean difference, bits per byte.
    pub mean: f64,
    /// Its interval, corrected for the number of domains.
    pub interval: Option<Interval>,
}

impl Analysis {
    /// Compares what a plan's models measured.
    pub fn new(plan: &Plan, outcomes: &Outcomes) -> Self {
        let pairs = plan.pairs();
        let main = |e: Equality| pairs.first().is_some_and(|(a, _)| plan.places[*a].equality == e);
        let reaches = pairs.iter().filter(|(a, _)| main(plan.places[*a].equality)).count();
        // A ratio of times and one of tokens; that of operations is the second times a constant.
        let intervals = pairs.len() + 2 * reaches;
        let alpha = alpha_of_each(ALPHA, intervals);
        let mut comparisons: Vec<Comparison> = pairs
            .iter()
            .map(|&(a, b)| {
                let (p, q) = (&plan.places[a], &plan.places[b]);
                let (m, n) = (&plan.models[p.model], &plan.models[q.model]);
                let decays = m.config.schedule.kind != ScheduleKind::Constant;
                let own = outcomes[p.model].iter().zip(&outcomes[q.model]);
                let pairs: Vec<(&Record, &Record)> = own.collect();
                let mut comparison =
                    compare(&pairs, p.equality, (&p.arm, &q.arm), alpha, decays, main(p.equality));
                comparison.subject_model.clone_from(&m.name);
                comparison.other_model.clone_from(&n.name);
                comparison.rates = (m.config.optimizer.lr, n.config.optimizer.lr);
                comparison.unclaimed = [(&p.arm, m), (&q.arm, n)]
                    .iter()
                    .find_map(|(arm, model)| unclaimed(arm, &model.config, p.equality));
                comparison
            })
            .collect();
        // Over the same intervals that the correction of each counts: differences first, then ratios.
        let of = |interval: Option<Interval>| interval.map_or(1.0, |i| i.p);
        let ratios = comparisons.iter().filter_map(|c| c.reach.as_ref());
        let p: Vec<f64> = comparisons
            .iter()
            .map(|c| of(c.difference))
            .chain(ratios.flat_map(|reach| [of(reach.time), of(reach.tokens)]))
            .collect();
        for (comparison, p) in comparisons.iter_mut().zip(holm(&p)) {
            comparison.holm_p = comparison.difference.map(|_| p);
        }
        Self { seeds: plan.seeds.len(), intervals, alpha: ALPHA, comparisons }
    }
}

/// Why a model's loss says nothing of what is compared.
fn unclaimed(arm: &Arm, config: &RunConfig, equality: Equality) -> Option<String> {
    let kind = router::kind(&config.router.kind).ok().filter(|_| config.model.ffn == Ffn::Moe)?;
    let (words, name) = (arm.words(), kind.name);
    if kind.noncausal.is_some() && !(name == "depth" && config.router.predictor) {
        return Some(format!(
            "{words} looks at later tokens (router {name}), and so knows what it is to predict"
        ));
    }
    let extra = config.balance.scope == Scope::Global && config.train.accumulate > 1;
    match equality == Equality::Flops && (kind.ragged || extra) {
        true if kind.ragged => Some(format!(
            "{words} chooses how many experts a token has (router {name}): its operations are not those that were made equal"
        )),
        true => {
            Some(format!("{words} routes twice (balance.scope = \"global\"), which the operations leave out"))
        }
        false => None,
    }
}

/// One comparison of records that are paired by seed, `alpha` for each of its intervals.
pub fn compare(
    pairs: &[(&Record, &Record)],
    equality: Equality,
    arms: (&Arm, &Arm),
    alpha: f64,
    decays: bool,
    with_reach: bool,
) -> Comparison {
    let risen = |of: fn(&(&Record, &Record)) -> (f64, f64)| {
        let (ends, bests): (Vec<f64>, Vec<f64>) = pairs.iter().map(of).unzip();
        mean(&ends) > mean(&bests) * (1.0 + RISEN)
    };
    let first = risen(|p| (p.0.bits_per_byte, p.0.best())).then(|| arms.0.clone());
    let second = risen(|p| (p.1.bits_per_byte, p.1.best())).then(|| arms.1.clone());
    let at_best = first.is_some() || second.is_some();
    // Tokens at which a run is read: its end, its lowest loss, or the end of the other's time.
    let read_at = |of: &Record, other: &Record| {
        let until = match equality {
            Equality::Time => of.seconds.min(other.seconds) / of.seconds * of.tokens as f64,
            _ => of.tokens as f64,
        };
        if at_best { of.best_until(until) } else { until }
    };
    let rows: Vec<Vec<f64>> = pairs
        .iter()
        .map(|(a, b)| {
            let (x, y) = (bits_by_block(a, read_at(a, b)), bits_by_block(b, read_at(b, a)));
            x.iter().zip(&y).map(|(x, y)| x - y).collect()
        })
        .collect();
    let weights: Vec<f64> =
        pairs.first().map_or_else(Vec::new, |(a, _)| a.block_bytes.iter().map(|b| *b as f64).collect());
    let total: f64 = weights.iter().sum();
    let by_seed: Vec<f64> = rows
        .iter()
        .map(|row| row.iter().zip(&weights).map(|(d, w)| d * w).sum::<f64>() / total.max(1.0))
        .collect();
    // With any seed: each is read at a time of its own.
    let longer = |of: fn(&(&Record, &Record)) -> (f64, f64)| {
        let is_longer = |(own, other): (f64, f64)| own > other * (1.0 + SAME_TIME);
        equality == Equality::Time && decays && pairs.iter().map(of).any(is_longer)
    };
    let cut = [
        longer(|p| (p.0.seconds, p.1.seconds)).then(|| arms.0.clone()),
        longer(|p| (p.1.seconds, p.0.seconds)).then(|| arms.1.clone()),
    ];
    Comparison {
        equality,
        subject: arms.0.clone(),
        other: arms.1.clone(),
        subject_model: String::new(),
        other_model: String::new(),
        mean: mean(&by_seed),
        difference: crossed(&rows, &weights, alpha),
        seeds_only: paired(&by_seed, alpha),
        by_seed,
        holm_p: None,
        cut: cut.into_iter().flatten().collect(),
        reach: with_reach.then(|| reach(pairs, alpha)),
        domains: if equality == Equality::Time || at_best { Vec::new() } else { domains(pairs) },
        risen: first.into_iter().chain(second).collect(),
        rates: (f64::NAN, f64::NAN),
        unclaimed: None,
    }
}

/// Bits per byte of each block after so many tokens.
fn bits_by_block(record: &Record, at: f64) -> Vec<f64> {
    (0..record.block_bytes.len())
        .map(|g| {
            let of = |p: &crate::record::Point| p.blocks.get(g).copied().unwrap_or(f64::NAN);
            let curve: Vec<(f64, f64)> = record.curve.iter().map(|p| (p.tokens as f64, of(p))).collect();
            value_at(&curve, at) / std::f64::consts::LN_2 / record.block_bytes[g].max(1) as f64
        })
        .collect()
}

/// When the first of each pair came to the final loss of the second.
pub fn reach(pairs: &[(&Record, &Record)], alpha: f64) -> Reach {
    // Of the text without block `left_out`.
    let of = |(a, b): &(&Record, &Record), left_out: Option<usize>| -> Option<f64> {
        let (ours, theirs) = (a.by_tokens_without(left_out), b.by_tokens_without(left_out));
        // One that overfits is held to its lowest loss. When it came to its level itself counts, not when its run ended.
        let level = theirs.iter().map(|(_, bits)| *bits).fold(f64::INFINITY, f64::min);
        let end = theirs.last().map_or(level, |(_, bits)| *bits);
        let level = if end > level * (1.0 + RISEN) { level } else { end };
        Some(first_at(&ours, level)? / first_at(&theirs, level)?)
    };
    let tokens: Vec<f64> = pairs.iter().filter_map(|pair| of(pair, None)).collect();
    let blocks = pairs.iter().map(|(a, _)| a.block_bytes.len()).min().unwrap_or(0);
    let without: Vec<f64> = (0..if blocks > 1 { blocks } else { 0 })
        .map(|g| {
            let logs: Vec<f64> = pairs.iter().filter_map(|pair| of(pair, Some(g))).map(f64::ln).collect();
            if logs.len() == pairs.len() { mean(&logs) } else { f64::NAN }
        })
        .collect();
    let mut found = Reach { reached: tokens.len(), of: pairs.len(), ..Reach::default() };
    if found.reached < found.of {
        return found;
    }
    let scaled = |by: fn(&Record) -> f64| -> Vec<f64> {
        tokens.iter().zip(pairs).map(|(t, (a, b))| t * by(a) / by(b)).collect()
    };
    // What a token costs is no matter of the text: logarithms without a block differ among themselves as those of tokens.
    found.tokens = ratio(&tokens, &without, alpha);
    found.time = ratio(&scaled(|r| r.seconds / r.tokens as f64), &without, alpha);
    found.flops = ratio(&scaled(|r| r.flops_per_token as f64), &without, alpha);
    found
}

/// The differences by domain, at the end of the runs.
fn domains(pairs: &[(&Record, &Record)]) -> Vec<DomainDifference> {
    let Some((first, _)) = pairs.first() else { return Vec::new() };
    let of = |record: &Record, d: usize| -> Vec<Window> {
        record.windows.iter().filter(|w| w.domain as usize == d).copied().collect()
    };
    let there = (0..first.domains.len()).filter(|d| !of(first, *d).is_empty()).count();
    let alpha = alpha_of_each(ALPHA, there);
    let one = |(d, name): (usize, &String)| {
        let own = of(first, d);
        if own.is_empty() {
            return None;
        }
        let (_, bytes) = heldout::by_block(&own, DOMAIN_BLOCKS);
        let bits = |record: &Record| -> Vec<f64> {
            let (nats, bytes) = heldout::by_block(&of(record, d), DOMAIN_BLOCKS);
            nats.iter().zip(bytes).map(|(n, b)| n / std::f64::consts::LN_2 / b.max(1) as f64).collect()
        };
        let rows: Vec<Vec<f64>> =
            pairs.iter().map(|(a, b)| bits(a).iter().zip(bits(b)).map(|(x, y)| x - y).collect()).collect();
        let whole: Vec<f64> =
            pairs.iter().map(|(a, b)| bits_per_byte(&of(a, d)) - bits_per_byte(&of(b, d))).collect();
        let weights: Vec<f64> = bytes.iter().map(|b| *b as f64).collect();
        Some(DomainDifference {
            name: name.clone(),
            bytes: bytes.iter().sum(),
            mean: mean(&whole),
            interval: crossed(&rows, &weights, alpha),
        })
    };
    first.domains.iter().enumerate().filter_map(one).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::record::Point;

    /// A record whose curve goes straight from 4 bits to `end` in ten evaluations, with four blocks that differ a little.
    pub(crate) fn made(end: f64, seconds: f64, seed: u64) -> Record {
        let point = |i: u64| {
            let bits = 4.0 + (end - 4.0) * i as f64 / 10.0;
            let blocks = (0..4).map(|g| (bits + 0.001 * g as f64 - 0.0015) * std::f64::consts::LN_2 * 100.0);
            Point { step: i, tokens: 100 * i, bits_per_byte: bits, blocks: blocks.collect() }
        };
        let nats = |bits: f64| bits * std::f64::consts::LN_2 * 100.0;
        Record {
            seed,
            members: 1,
            tokens: 1000,
            steps: 10,
            flops_per_token: 7,
            seconds,
            bits_per_byte: end,
            curve: (1..=10).map(point).collect(),
            block_bytes: vec![100; 4],
            domains: vec!["rs".into(), "md".into()],
            windows: (0..4)
                .map(|w| Window { domain: w % 2, tokens: 30, bytes: 100, nats: nats(end) })
                .collect(),
            ..Record::default()
        }
    }

    pub(crate) fn compared(ends: &[(f64, f64)], seconds: (f64, f64), equality: Equality) -> Comparison {
        let records: Vec<(Record, Record)> = ends
            .iter()
            .zip(0..)
            .map(|((a, b), s)| (made(*a, seconds.0, s), made(*b, seconds.1, s)))
            .collect();
        let pairs: Vec<(&Record, &Record)> = records.iter().map(|(a, b)| (a, b)).collect();
        compare(&pairs, equality, (&Arm::Moe, &Arm::Dense), 0.05, true, equality == Equality::Flops)
    }

    #[test]
    fn a_difference_and_when_it_was_reached() {
        let c = compared(&[(1.0, 2.0), (1.1, 2.1), (0.9, 1.95)], (10.0, 10.0), Equality::Flops);
        assert!((c.mean - (-1.016_666_666_666)).abs() < 1e-9);
        let d = c.difference.unwrap();
        assert!(d.high < 0.0 && (d.estimate - c.mean).abs() < 1e-12);
        // From 4 to 1 the level 2 is at two thirds.
        let reach = c.reach.unwrap();
        assert_eq!((reach.reached, reach.of), (3, 3));
        let by_hand = [2.0 / 3.0, 1.9 / 2.9, 2.05 / 3.1];
        let expected = by_hand.iter().map(|r: &f64| r.ln()).sum::<f64>() / 3.0;
        assert!((reach.time.unwrap().estimate - expected.exp()).abs() < 1e-9);
        assert_eq!(c.domains.len(), 2);
        assert!((c.domains[0].mean - c.mean).abs() < 1e-9 && c.domains[0].bytes == 200);
    }

    #[test]
    fn a_seed_that_never_reached_it_leaves_no_ratio() {
        let c = compared(&[(1.0, 2.0), (2.2, 2.1), (0.9, 1.95)], (10.0, 10.0), Equality::Flops);
        let reach = c.reach.unwrap();
        assert_eq!((reach.reached, reach.of, reach.time), (2, 3, None));
    }

    #[test]
    fn at_equal_time_the_longer_run_is_read_before_its_end() {
        let c = compared(&[(1.0, 2.0), (1.0, 2.0)], (20.0, 10.0), Equality::Time);
        // Half of the way from 4 to 1 is 2.5.
        assert!((c.mean - 0.5).abs() < 1e-9, "{}", c.mean);
        assert_eq!(c.cut, [Arm::Moe]);
        assert!(c.domains.is_empty());
    }

    #[test]
    fn an_arm_that_overfits_is_read_at_its_lowest() {
        // Dense comes down to 1.0 at half of its run and rises again; experts come to 1.5 at the end.
        let (moe, mut dense) = (made(1.5, 10.0, 0), made(2.0, 10.0, 0));
        for point in &mut dense.curve {
            let bits =
                1.0 + 3.0 * (point.step as f64 - 5.0).abs() / 5.0 * if point.step > 5 { 0.3 } else { 1.0 };
            point
                .blocks
                .iter_mut()
                .for_each(|nats| *nats += (bits - point.bits_per_byte) * std::f64::consts::LN_2 * 100.0);
            point.bits_per_byte = bits;
        }
        dense.bits_per_byte = 1.9;
        let pairs = [(&moe, &dense), (&moe, &dense)];
        let c = compare(&pairs, Equality::Flops, (&Arm::Moe, &Arm::Dense), 0.05, true, true);
        assert_eq!(c.risen, [Arm::Dense]);
        assert!((c.mean - 0.5).abs() < 1e-9, "{}", c.mean);
        // Never down to dense's lowest: no ratio.
        assert_eq!(c.reach.unwrap().reached, 0);
    }

    #[test]
    fn times_are_compared_seed_by_seed() {
        let records = [(made(1.0, 12.0, 0), made(2.0, 10.0, 0)), (made(1.0, 10.0, 1), made(2.0, 12.0, 1))];
        let pairs: Vec<(&Record, &Record)> = records.iter().map(|(a, b)| (a, b)).collect();
        let c = compare(&pairs, Equality::Time, (&Arm::Moe, &Arm::Dense), 0.05, true, false);
        assert_eq!(c.cut, [Arm::Moe, Arm::Dense]);
    }

    #[test]
    fn one_seed_has_no_interval() {
        let c = compared(&[(1.0, 2.0)], (10.0, 10.0), Equality::Flops);
        assert!(c.difference.is_none() && c.seeds_only.is_none());
    }
}
