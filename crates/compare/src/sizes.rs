//! Models of a wanted size: dense models, whole or as members of an ensemble, with a wanted number of parameters or operations.

use senmon_train::config::Ffn;
use senmon_train::presets::{Footprint, footprint};
use senmon_train::{Layers, RunConfig};

use crate::error::Result;

/// How near a size is near enough to be called equal.
pub const EQUAL: f64 = 0.01;
/// Rounder widths are taken if they are as near as this.
const ROUND: f64 = 0.004;

/// What a configuration's model has and costs at its own length of sequences.
pub fn measure(config: &RunConfig) -> Result<Footprint> {
    Ok(footprint(&config.model_spec()?, config.train.sequence))
}

/// Whether two sizes are equal within [`EQUAL`].
pub fn equal(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() <= EQUAL
}

/// The dense form of a configuration ([`senmon_train::presets`]).
pub fn dense_form(base: &RunConfig) -> Result<RunConfig> {
    Ok(Layers::over(base.clone()).set("model.ffn=dense")?.resolve()?)
}

/// The same with a width of feed-forwards with which `of` its model is `target`, within [`EQUAL`]; none where no width does.
pub fn with_width(dense: &RunConfig, target: f64, of: fn(&Footprint) -> u64) -> Result<Option<RunConfig>> {
    fitted(target, of, |width| {
        let mut config = dense.clone();
        config.model.ffn = Ffn::Dense;
        config.model.intermediate = Some(width);
        config
    })
}

/// The same with a width of experts with which `of` its model is `target`, within [`EQUAL`]; none where no width does.
pub fn with_experts(base: &RunConfig, target: f64, of: fn(&Footprint) -> u64) -> Result<Option<RunConfig>> {
    fitted(target, of, |width| {
        let mut config = base.clone();
        config.experts.intermediate = width;
        config
    })
}

/// Sizes are straight lines over a width.
fn fitted(
    target: f64,
    of: fn(&Footprint) -> u64,
    with: impl Fn(usize) -> RunConfig,
) -> Result<Option<RunConfig>> {
    let at = |width: usize| Ok::<f64, crate::CompareError>(of(&measure(&with(width))?) as f64);
    let (one, slope) = (at(1)?, (at(1001)? - at(1)?) / 1000.0);
    let exact = 1.0 + (target - one) / slope;
    if slope <= 0.0 || exact.is_nan() || !(0.5..1e6).contains(&exact) {
        return Ok(None);
    }
    for step in [16.0, 8.0, 4.0, 2.0, 1.0] {
        let width = ((exact / step).round() * step) as usize;
        let near = if step > 1.0 { ROUND } else { EQUAL };
        if width > 0 && (at(width)? / target - 1.0).abs() <= near {
            let config = with(width);
            config.check()?;
            return Ok(Some(config));
        }
    }
    Ok(None)
}

/// A smaller dense model, of which `of` is `target` within [`EQUAL`]: hidden width, heads and feed-forward are all narrower in about the
/// same proportion, layers and the width of a head stay. None where there is none.
pub fn smaller(dense: &RunConfig, target: f64, of: fn(&Footprint) -> u64) -> Result<Option<RunConfig>> {
    let m = &dense.model;
    let wide = m.intermediate.unwrap_or(1) as f64 / m.hidden as f64;
    let mut best: Option<(f64, RunConfig)> = None;
    for hidden in (1..=m.hidden / 8).map(|n| 8 * n) {
        let mut config = dense.clone();
        let part = hidden as f64 / m.hidden as f64;
        config.model.hidden = hidden;
        config.model.heads = ((m.heads as f64 * part).round() as usize).max(1);
        let kv = ((m.kv_heads as f64 * part).round() as usize).clamp(1, config.model.heads);
        config.model.kv_heads = (1..=kv).rev().find(|kv| config.model.heads.is_multiple_of(*kv)).unwrap_or(1);
        let Some(fit) = with_width(&config, target, of)? else { continue };
        let off = (fit.model.intermediate.unwrap_or(1) as f64 / hidden as f64 / wide).ln().abs();
        if best.as_ref().is_none_or(|(least, _)| off < *least) {
            best = Some((off, fit));
        }
    }
    Ok(best.map(|(_, config)| config))
}

#[cfg(test)]
mod tests {
    use super::*;
    use senmon_train::presets::preset;

    #[test]
    fn sizes_are_what_was_wanted() {
        for name in ["nano", "tiny"] {
            let base = preset(name).unwrap();
            let whole = measure(&base).unwrap();
            let dense = dense_form(&base).unwrap();
            let of: [fn(&Footprint) -> u64; 3] = [|f| f.total, |f| f.active, |f| f.flops_per_token];
            for of in of {
                let wide = with_width(&dense, of(&whole) as f64, of).unwrap().unwrap();
                assert!(equal(of(&measure(&wide).unwrap()) as f64, of(&whole) as f64), "{name}");
                for members in [2, 3, 4] {
                    let target = of(&whole) as f64 / members as f64;
                    let part = smaller(&dense, target, of).unwrap().unwrap();
                    assert!(equal(of(&measure(&part).unwrap()) as f64, target), "{name} {members}");
                    assert!(part.model.hidden <= base.model.hidden && part.model.layers == base.model.layers);
                }
            }
            assert!(with_width(&dense, 10.0, |f| f.total).unwrap().is_none());
            assert!(smaller(&dense, 10.0, |f| f.total).unwrap().is_none());
        }
    }
}
