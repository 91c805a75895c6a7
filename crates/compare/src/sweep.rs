//! A search for the shape that a budget is best spent on: successive halving over a grid.
//!
//! Every candidate of a rung gets the same training operations; the better half of a rung, and what is within the noise of it, goes on
//! to the next with twice as many, from the start and with a whole schedule, so that losses of a rung can be compared. All rungs
//! cost about the same.

use std::collections::BTreeSet;

use senmon_train::config::RunConfig;
use senmon_train::layers::Layers;
use senmon_train::presets::{Footprint, NAMES};
use senmon_train::setup::configure;
use serde::{Deserialize, Serialize};

use crate::error::{CompareError, Result};
use crate::plan::{Job, hash_of, prepared, whole_steps};
use crate::record::Results;
use crate::run::{self, Place};
use crate::sizes::measure;
use crate::statistics::variance;
use crate::student::two_sided_quantile;

/// A run of the first rung has at least so many steps.
const LEAST_STEPS: u64 = 20;
/// Candidates of a grid, at most.
const MOST: usize = 256;
/// Short names of keys.
const SHORT: &[(&str, &str)] = &[
    ("experts", "experts.count"),
    ("top_k", "experts.top_k"),
    ("width", "experts.intermediate"),
    ("shared", "experts.shared"),
    ("layers", "model.layers"),
    ("hidden", "model.hidden"),
    ("router", "router.kind"),
    ("lr", "optimizer.lr"),
];

/// One `key=a,b,c` of a grid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// As it was said.
    pub name: String,
    /// The values.
    pub values: Vec<String>,
}

/// Reads `key=a,b,c`; keys are `size` (a preset, or a hidden width), short names, or any of the configuration.
pub fn axis(text: &str) -> Result<Axis> {
    let wrong = |why: String| CompareError::Mistake(format!("--sweep {text}: {why}"));
    let short: Vec<&str> = SHORT.iter().map(|(short, _)| *short).collect();
    let known = format!("size, {}, or table.key of the configuration", short.join(", "));
    let (name, values) =
        text.split_once('=').ok_or_else(|| wrong(format!("expected KEY=A,B,… with a key of {known}")))?;
    let name = name.trim().to_owned();
    if name != "size" && !name.contains('.') && !short.contains(&name.as_str()) {
        return Err(wrong(format!("no such key; there are {known}")));
    }
    let values: Vec<String> =
        values.split(',').map(|v| v.trim().to_owned()).filter(|v| !v.is_empty()).collect();
    let full = SHORT.iter().find(|(short, _)| *short == name).map_or(name.as_str(), |(_, full)| full);
    let other = ["train.sequence", "train.eval_tokens", "train.init", "train.batches"];
    if full.starts_with("data.") || other.contains(&full) {
        return Err(wrong("it changes what is measured, so that losses could not be compared".into()));
    }
    if ["train.tokens", "train.steps", "train.minutes", "train.seed"].contains(&full) {
        return Err(wrong("the sweep says that itself (--tokens, --seeds)".into()));
    }
    let different: BTreeSet<&String> = values.iter().collect();
    if values.is_empty() || different.len() != values.len() {
        return Err(wrong("expected different values, separated by commas".into()));
    }
    Ok(Axis { name, values })
}

/// A point of the grid.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its settings, as `experts=8 top_k=2`.
    pub name: String,
    /// The same as `--set` takes them.
    pub sets: Vec<String>,
    /// Its configuration.
    pub config: RunConfig,
    /// What its model has and costs.
    pub footprint: Footprint,
}

/// All points of a grid over `layers` (of which `base` came) that make a model, and why others do not.
pub fn grid(layers: &Layers, base: &RunConfig, axes: &[Axis]) -> Result<(Vec<Candidate>, Vec<String>)> {
    if let Some(axis) =
        axes.iter().enumerate().find_map(|(i, axis)| axes[..i].iter().find(|a| a.name == axis.name))
    {
        return Err(CompareError::Mistake(format!("--sweep {}: named twice", axis.name)));
    }
    let mut points: Vec<Vec<(String, String)>> = vec![Vec::new()];
    for axis in axes {
        let longer = |point: &Vec<(String, String)>, value: &String| {
            let mut point = point.clone();
            point.push((axis.name.clone(), value.clone()));
            point
        };
        points = points.iter().flat_map(|p| axis.values.iter().map(move |v| longer(p, v))).collect();
        if points.len() > MOST {
            let what = format!("--sweep has more than {MOST} combinations: name fewer values");
            return Err(CompareError::Mistake(what));
        }
    }
    let (mut candidates, mut skipped) = (Vec::new(), Vec::new());
    for point in points {
        let name: Vec<String> = point.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let name = name.join(" ");
        match made(layers.clone(), base, &point) {
            Ok((config, sets)) => {
                let footprint = measure(&config)?;
                candidates.push(Candidate { name, sets, config, footprint });
            }
            Err(e) => skipped.push(format!("{name}: {e}")),
        }
    }
    if candidates.len() < 2 {
        let why = skipped.first().map_or_else(String::new, |s| format!(" ({s})"));
        return Err(CompareError::Mistake(format!("--sweep has fewer than two models to choose from{why}")));
    }
    Ok((candidates, skipped))
}

fn made(
    mut layers: Layers,
    base: &RunConfig,
    point: &[(String, String)],
) -> Result<(RunConfig, Vec<String>)> {
    let mut sets = Vec::new();
    for (key, value) in point {
        if key == "size" && NAMES.contains(&value.as_str()) {
            // The size of the preset, on the same tokens and batches as all others.
            let t = &base.train;
            sets.extend([
                format!("model.preset={value}"),
                format!("train.batch={}", t.batch),
                format!("train.sequence={}", t.sequence),
                format!("train.accumulate={}", t.accumulate),
                format!("data.vocab={}", base.data.vocab),
            ]);
            sets.extend(base.model.vocab.map(|vocab| format!("model.vocab={vocab}")));
            continue;
        }
        let full = match key.as_str() {
            "size" => "model.hidden",
            key => SHORT.iter().find(|(short, _)| *short == key).map_or(key, |(_, full)| full),
        };
        sets.push(format!("{full}={value}"));
    }
    for set in &sets {
        layers = layers.set(set)?;
    }
    let config = prepared(&configure(layers)?)?;
    config.model_spec()?.validate().map_err(senmon_train::TrainError::from)?;
    Ok((config, sets))
}

/// What came of a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its settings.
    pub name: String,
    /// Parameters.
    pub parameters: u64,
    /// Parameters that a token meets.
    pub active_parameters: u64,
    /// Operations per token of a forward pass.
    pub flops_per_token: u64,
    /// Rungs that it was trained on.
    pub rungs: usize,
    /// Tokens of the last of them.
    pub tokens: u64,
    /// Held-out bits per byte of the last of them; none where it diverged.
    pub bits_per_byte: Option<f64>,
    /// Why it went no further; none for those of the last rung.
    pub dropped: Option<String>,
}

/// A search that is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// Training operations of a run of the last rung.
    pub flops: f64,
    /// Share of them that each rung has.
    pub shares: Vec<f64>,
    /// Standard deviation between seeds, bits per byte, where it was measured.
    pub noise: Option<f64>,
    /// Every candidate, best first: by rungs, then by loss.
    pub rows: Vec<Row>,
    /// The settings that were chosen, as `--set` takes them.
    pub chosen: Vec<String>,
    /// Why.
    pub words: Vec<String>,
    /// Points of the grid that make no model.
    pub skipped: Vec<String>,
}

/// How much a candidate may be worse than the last one that is kept: the standard deviation of a difference of two runs.
fn margin(noise: Option<f64>) -> f64 {
    noise.unwrap_or(0.0) * std::f64::consts::SQRT_2
}

/// A difference of two runs that is no chance, at 5 %: `noise` is from so many seeds.
fn told_apart(noise: f64, seeds: usize) -> f64 {
    margin(Some(noise)) * two_sided_quantile(0.05, seeds.saturating_sub(1).max(1) as f64)
}

/// Successive halving. `trial` trains a candidate on so many tokens with a seed (from 0) and tells its held-out bits per byte, infinite
/// where it diverged; `seeds` of the candidate at the cut of the first rung tell the noise.
pub fn halving(
    candidates: &[Candidate],
    flops: f64,
    seeds: usize,
    trial: &mut dyn FnMut(&Candidate, u64, u64) -> Result<f64>,
) -> Result<Sweep> {
    let tokens_of = |c: &Candidate, share: f64| {
        whole_steps(&c.config, share * flops / (3.0 * c.footprint.flops_per_token as f64))
    };
    let steps = |c: &Candidate| tokens_of(c, 1.0) / c.config.tokens_per_step().max(1);
    let least = candidates.iter().map(steps).min().unwrap_or(0);
    let mut rungs = candidates.len().next_power_of_two().trailing_zeros() as usize + 1;
    while rungs > 1 && least >> (rungs - 1) < LEAST_STEPS {
        rungs -= 1;
    }
    let shares: Vec<f64> = (0..rungs).map(|r| 0.5f64.powi((rungs - 1 - r) as i32)).collect();
    let mut rows: Vec<Row> = candidates
        .iter()
        .map(|c| Row {
            name: c.name.clone(),
            parameters: c.footprint.total,
            active_parameters: c.footprint.active,
            flops_per_token: c.footprint.flops_per_token,
            rungs: 0,
            tokens: 0,
            bits_per_byte: None,
            dropped: None,
        })
        .collect();
    let mut alive: Vec<usize> = (0..candidates.len()).collect();
    let mut noise = None;
    let loss = |row: &Row| row.bits_per_byte.unwrap_or(f64::INFINITY);
    for (rung, share) in shares.iter().enumerate() {
        for &c in &alive {
            let tokens = tokens_of(&candidates[c], *share);
            let bits = trial(&candidates[c], tokens, 0)?;
            let row = &mut rows[c];
            (row.rungs, row.tokens, row.bits_per_byte) = (rung + 1, tokens, bits.is_finite().then_some(bits));
        }
        alive.sort_by(|a, b| loss(&rows[*a]).total_cmp(&loss(&rows[*b])));
        // What diverged goes no further, and no place is kept for it.
        alive.retain(|c| {
            let row = &mut rows[*c];
            if row.bits_per_byte.is_none() {
                row.dropped = Some(format!("rung {}: it diverged", rung + 1));
            }
            row.bits_per_byte.is_some()
        });
        if alive.is_empty() {
            return Err(CompareError::Mistake(
                "every model of the sweep diverged: lower optimizer.lr".into(),
            ));
        }
        let half = alive.len().div_ceil(2);
        if rung == 0 && seeds > 1 {
            let c = alive[half - 1];
            let mut bits = vec![loss(&rows[c])];
            for seed in 1..seeds as u64 {
                bits.push(trial(&candidates[c], rows[c].tokens, seed)?);
            }
            noise = Some(variance(&bits).sqrt()).filter(|n| n.is_finite());
        }
        if rung + 1 == rungs {
            break;
        }
        let cut = loss(&rows[alive[half - 1]]);
        let near = alive.iter().filter(|c| loss(&rows[**c]) <= cut + margin(noise)).count();
        // What is within the noise goes on as well, as long as the field becomes smaller.
        let kept = near.clamp(half, half.max(alive.len() * 3 / 4));
        let worst = loss(&rows[alive[kept - 1]]);
        for &c in &alive[kept..] {
            let row = &mut rows[c];
            let bits = loss(row);
            row.dropped = Some(format!(
                "rung {} of {rungs}: {bits:.4} bits per byte after {} tokens, {:.4} more than the last of the {kept} that went on",
                rung + 1,
                row.tokens,
                bits - worst,
            ));
        }
        alive.truncate(kept);
    }
    let best = alive[0];
    let words = explain(&rows, &alive, noise, seeds);
    let chosen = candidates[best].sets.clone();
    rows.sort_by(|a, b| b.rungs.cmp(&a.rungs).then(loss(a).total_cmp(&loss(b))));
    Ok(Sweep { flops, shares, noise, rows, chosen, words, skipped: Vec::new() })
}

/// The choice in words.
fn explain(rows: &[Row], last: &[usize], noise: Option<f64>, seeds: usize) -> Vec<String> {
    let best = &rows[last[0]];
    let bits = |row: &Row| row.bits_per_byte.unwrap_or(f64::INFINITY);
    let mut words = vec![format!(
        "{} is chosen: {:.4} held-out bits per byte after {} tokens at {} operations per token, the lowest of the {} of {} candidates \
         that came to the last rung",
        best.name,
        bits(best),
        best.tokens,
        best.flops_per_token,
        last.len(),
        rows.len()
    )];
    let apart = noise.map(|noise| told_apart(noise, seeds));
    let near: Vec<&Row> = last[1..]
        .iter()
        .map(|c| &rows[*c])
        .filter(|r| apart.is_some_and(|apart| bits(r) - bits(best) <= apart))
        .collect();
    words.push(match (noise, apart) {
        (Some(noise), Some(apart)) => format!(
            "between {seeds} seeds, losses of a short run differ by {noise:.4} (standard deviation): differences of two runs below {apart:.4} \
             may be chance (5 %)"
        ),
        _ if seeds > 1 => "how much of the differences is chance could not be measured: a seed diverged".into(),
        _ => "one seed: how much of the differences is chance is not known".into(),
    });
    for row in near {
        let cheaper = match row.flops_per_token as f64 / best.flops_per_token as f64 {
            r if r < 0.99 => format!(", and a token costs {r:.2} times as much there"),
            _ => String::new(),
        };
        let gap = bits(row) - bits(best);
        words.push(format!("{} is not to be told from it ({gap:+.4}){cheaper}", row.name));
    }
    let gone = rows.iter().filter(|row| row.dropped.is_some()).count();
    if gone > 0 {
        words.push(format!(
            "{gone} were dropped on the way, each at the rung and for the loss that the table has"
        ));
    }
    words
}

/// Searches a grid: every run is a result of the comparison's folder, and is not trained again.
pub fn search(
    candidates: &[Candidate],
    flops: f64,
    seeds: usize,
    results: &mut Results,
    place: &mut Place,
) -> Result<Sweep> {
    let (mut number, all) = (0, 2 * candidates.len() + seeds.saturating_sub(1));
    halving(candidates, flops, seeds, &mut |candidate, tokens, seed| {
        let mut config = candidate.config.clone();
        config.train.tokens = Some(tokens);
        config.train.seed = config.train.seed.wrapping_add(seed);
        let hash = hash_of(&config)?;
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._=".contains(c) { c } else { '-' };
        let name: String = candidate.name.chars().map(plain).take(80).collect();
        let name = format!("{name}-{}-seed{}", &hash[..6], config.train.seed);
        let job = Job { hash, name, seed: config.train.seed, config, model: 0, member: 0 };
        let record = run::one(&job, results, place, (number, all.max(number + 1)))?;
        number += 1;
        Ok(if record.failed.is_some() { f64::INFINITY } else { record.bits_per_byte })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use senmon_train::presets::preset;

    fn candidates(axes: &[&str]) -> (Vec<Candidate>, Vec<String>) {
        let layers = Layers::new().set_value("data.paths", vec!["text".to_owned()]).unwrap();
        let axes: Vec<Axis> = axes.iter().map(|a| axis(a).unwrap()).collect();
        grid(&layers, &preset("nano").unwrap(), &axes).unwrap()
    }

    #[test]
    fn a_grid_has_all_that_make_a_model() {
        let (found, skipped) = candidates(&["experts=2,4,8", "top_k=1,4", "size=nano,64"]);
        assert_eq!((found.len(), skipped.len()), (10, 2));
        assert!(skipped[0].starts_with("experts=2 top_k=4"), "{skipped:?}");
        assert!(found.iter().any(|c| c.name == "experts=8 top_k=1 size=64" && c.config.model.hidden == 64));
        assert!(
            found
                .iter()
                .filter(|c| c.name.ends_with("size=nano"))
                .all(|c| c.sets.contains(&"model.preset=nano".to_owned()))
        );
        for wrong in [
            "experts",
            "size=",
            "no=1,2",
            "experts=4,4",
            "experts=4,8,4",
            "data.vocab=1,2",
            "train.sequence=32,64",
            "train.seed=1,2",
        ] {
            let error = axis(wrong).unwrap_err();
            assert!(error.is_users_mistake() && !error.to_string().contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_planted_better_shape_is_found_at_a_part_of_the_cost() {
        let (found, _) = candidates(&["experts=4,8,16,32", "top_k=1,2"]);
        let flops = 3.0 * found[0].footprint.flops_per_token as f64 * 4_000_000.0;
        let mut spent = 0.0;
        let mut trials = |c: &Candidate, tokens: u64, seed: u64| {
            spent += 3.0 * c.footprint.flops_per_token as f64 * tokens as f64;
            // 16 experts with two a token are best by 0.1, beside noise of 0.01 and what more training gives.
            let planted = if c.name == "experts=16 top_k=2" { 0.0 } else { 0.1 };
            let hash = c.name.bytes().map(u64::from).sum::<u64>() + tokens + seed * 7;
            Ok(2.0 + planted + 0.01 * ((hash % 11) as f64 / 11.0) + 1e5 / tokens as f64)
        };
        let sweep = halving(&found, flops, 3, &mut trials).unwrap();
        assert_eq!(sweep.chosen, ["experts.count=16", "experts.top_k=2"]);
        assert_eq!(sweep.rows[0].name, "experts=16 top_k=2");
        assert_eq!(sweep.shares, [0.125, 0.25, 0.5, 1.0]);
        assert!(sweep.noise.unwrap() > 0.0 && sweep.rows.iter().filter(|r| r.dropped.is_some()).count() >= 4);
        assert!(spent < 0.85 * flops * found.len() as f64, "{}", spent / flops);
        assert!(sweep.words[0].contains("experts=16 top_k=2 is chosen"), "{:?}", sweep.words);
        assert!(sweep.words[1].contains("may be chance"), "{:?}", sweep.words);
    }

    #[test]
    fn what_diverges_is_dropped_and_all_of_it_is_a_mistake() {
        let (found, _) = candidates(&["lr=0.001,0.003,10"]);
        let flops = 3.0 * found[0].footprint.flops_per_token as f64 * 4_000_000.0;
        let mut one = |c: &Candidate, _, _| Ok(if c.name == "lr=10" { f64::INFINITY } else { 2.0 });
        let sweep = halving(&found, flops, 1, &mut one).unwrap();
        assert!(sweep.rows[2].dropped.as_ref().unwrap().contains("diverged"));
        // Of four, three diverge: the one that is left is chosen, and nobody else is trained again.
        let (found, _) = candidates(&["lr=0.001,0.003,10,20"]);
        let mut trained = 0;
        let mut three = |c: &Candidate, _, _| {
            trained += 1;
            Ok(if c.name == "lr=0.003" { 2.0 } else { f64::INFINITY })
        };
        let sweep = halving(&found, flops, 1, &mut three).unwrap();
        assert_eq!(
            (sweep.rows[0].name.as_str(), sweep.rows.iter().filter(|r| r.dropped.is_some()).count()),
            ("lr=0.003", 3)
        );
        assert_eq!(trained, 4 + sweep.shares.len() - 1);
        assert!(halving(&found, flops, 1, &mut |_, _, _| Ok(f64::INFINITY)).unwrap_err().is_users_mistake());
    }
}
