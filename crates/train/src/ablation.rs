//! What experts are for, by cause: each is switched off in turn, and its label is held against what the loss says.

use crate::error::Result;
use crate::tracing::losses;
use senmon_insight::Trace;
use senmon_insight::words::{Ablation, Checked, LayerWords, confirm};
use senmon_models::decoder::Decoder;
use senmon_moe::rng::Stream;

/// Switches off every expert of a trace's layers in turn: for each layer, by number as in `words`, its experts. `seed` draws the
/// controls; `progress` is told how many of how many passes over the text are done. `None` where `cancelled`.
pub fn check(
    decoder: &Decoder,
    trace: &Trace,
    words: &[LayerWords],
    seed: u64,
    progress: &mut dyn FnMut(usize, usize),
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Vec<Vec<Checked>>>> {
    let passes = 1 + words.iter().map(|layer| layer.experts.len()).sum::<usize>();
    let mut done = 0;
    let mut pass = |off: Option<(usize, u32)>| {
        let found = losses(decoder, trace, off, cancelled)?;
        done += 1;
        progress(done, passes);
        Ok::<_, crate::TrainError>(found)
    };
    let Some(whole) = pass(None)? else { return Ok(None) };
    // What an expert's absence changes is the difference of two passes of one kind, to the last bit.
    let base = Trace {
        about: trace.about.clone(),
        tokens: trace.tokens.clone(),
        sequence: trace.sequence.clone(),
        position: trace.position.clone(),
        targets: trace.targets.clone(),
        predicted: trace.predicted.clone(),
        domains: trace.domains.clone(),
        documents: trace.documents.clone(),
        loss: whole,
        layers: Default::default(),
    };
    let mut checked = Vec::with_capacity(words.len());
    for layer in words {
        let experts = &layer.experts;
        let used: Vec<usize> = (0..experts.len()).filter(|e| experts[*e].tokens > 0).collect();
        let controls: Vec<Option<usize>> =
            (0..experts.len()).map(|e| control(seed, layer.layer, e, &used)).collect();
        // Of each expert without it, and what its label's tokens lose without the control.
        let (mut own, mut other) = (Vec::with_capacity(experts.len()), vec![None; experts.len()]);
        for off in 0..experts.len() {
            let Some(losses) = pass(Some((layer.layer, off as u32)))? else { return Ok(None) };
            let of = |e: usize| Ablation::of(&base, layer.layer, off as u16, &experts[e].label, &losses);
            own.push(of(off)?);
            for e in (0..experts.len()).filter(|e| controls[*e] == Some(off)) {
                other[e] = Some(of(e)?);
            }
        }
        let each = own.into_iter().zip(other).zip(experts).zip(&controls).enumerate();
        checked.push(
            each.map(|(e, (((ablation, other), words), control))| {
                let confirmation = other.map(|other| confirm(&words.label, &ablation, &other));
                Checked {
                    confirmation: confirmation.unwrap_or_default(),
                    control: control.unwrap_or(e) as u16,
                    ablation,
                }
            })
            .collect(),
        );
    }
    Ok(Some(checked))
}

/// Another expert of the layer, by chance, among those that are `used`: one without tokens is no control. None where there is no other.
fn control(seed: u64, layer: usize, expert: usize, used: &[usize]) -> Option<usize> {
    let others: Vec<usize> = used.iter().copied().filter(|other| *other != expert).collect();
    let drawn = Stream::new(&[seed, layer as u64, expert as u64]).uniform(0);
    others.get(((drawn * others.len() as f32) as usize).min(others.len().saturating_sub(1))).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_is_another_expert() {
        for experts in 2..9 {
            let used: Vec<usize> = (0..experts).map(|e| 2 * e).collect();
            let mut seen = vec![0; 2 * experts];
            for expert in 0..2 * experts {
                for seed in 0..50 {
                    let control = control(seed, 3, expert, &used).unwrap();
                    assert!(control != expert && used.contains(&control));
                    seen[control] += 1;
                }
            }
            assert!(used.iter().all(|e| seen[*e] > 0));
        }
        assert_eq!((control(0, 0, 0, &[0]), control(0, 0, 0, &[])), (None, None));
    }
}
