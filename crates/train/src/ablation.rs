//! What experts are for, by cause: each is switched off in turn, and its label is held against what the loss says.

use crate::error::Result;
use crate::tracing::losses;
use senmon_insight::Trace;
use senmon_insight::words::{Ablation, Checked, Confirmation, Label, LayerWords, confirm};
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
        loss: whole,
        layers: Default::default(),
    };
    let mut checked = Vec::with_capacity(words.len());
    for layer in words {
        let mut off = Vec::with_capacity(layer.experts.len());
        for e in 0..layer.experts.len() {
            let Some(losses) = pass(Some((layer.layer, e as u32)))? else { return Ok(None) };
            off.push(losses);
        }
        let of = |expert: usize, label: &Label| {
            Ablation::of(&base, layer.layer, expert as u16, label, &off[expert])
        };
        let experts = layer.experts.iter().enumerate().map(|(e, words)| {
            let control = control(seed, layer.layer, e, layer.experts.len());
            let ablation = of(e, &words.label)?;
            let confirmation = match control == e {
                true => Confirmation::default(),
                false => confirm(&words.label, &ablation, &of(control, &words.label)?),
            };
            Ok(Checked { ablation, control: control as u16, confirmation })
        });
        checked.push(experts.collect::<Result<Vec<Checked>>>()?);
    }
    Ok(Some(checked))
}

/// Another expert of the layer, by chance; the same where there is no other.
fn control(seed: u64, layer: usize, expert: usize, experts: usize) -> usize {
    if experts < 2 {
        return expert;
    }
    let drawn = Stream::new(&[seed, layer as u64, expert as u64]).uniform(0);
    let other = (drawn * (experts - 1) as f32) as usize;
    let other = other.min(experts - 2);
    other + usize::from(other >= expert)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_is_another_expert() {
        for experts in 2..9 {
            let mut seen = vec![false; experts];
            for expert in 0..experts {
                for seed in 0..50 {
                    let control = control(seed, 3, expert, experts);
                    assert!(control != expert && control < experts);
                    seen[control] = true;
                }
            }
            assert!(seen.iter().all(|seen| *seen));
        }
        assert_eq!(control(0, 0, 0, 1), 0);
    }
}
