//! Held-out losses token by token: of an ensemble from those of its members, and their sums by window and block.

use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use senmon_train::TrainError;
use senmon_train::eval::EvalText;

use crate::error::{CompareError, Result};
use crate::record::Window;

/// Blocks that held-out text is cut into, at most.
pub const BLOCKS: usize = 20;
const NAME: &str = "losses";

/// The losses of the mean of the members' probabilities, each with its losses \[T\]: -ln(Σ exp(-loss) / M).
pub fn averaged(members: &[Vec<f32>]) -> Vec<f32> {
    let tokens = members.iter().map(Vec::len).min().unwrap_or(0);
    let of = |t: usize| {
        // Beside the least loss, so that no exponential is lost.
        let least = members.iter().map(|m| m[t]).fold(f32::INFINITY, f32::min);
        let sum: f64 = members.iter().map(|m| f64::from(least - m[t]).exp()).sum();
        (f64::from(least) - (sum / members.len() as f64).ln()) as f32
    };
    (0..tokens).map(of).collect()
}

/// The windows with the bytes that they stand for, without losses.
pub fn windows(text: &EvalText) -> Vec<Window> {
    let bytes = |token: &u32| text.bytes_of_token.get(*token as usize).copied().unwrap_or(0);
    let long = text.windows.iter().filter(|(window, _)| window.len() > 1);
    long.map(|(window, domain)| Window {
        domain: *domain,
        tokens: window.len() as u32 - 1,
        bytes: window[1..].iter().map(bytes).sum(),
        nats: 0.0,
    })
    .collect()
}

/// The windows with the sums of their losses.
pub fn summed(windows: &[Window], losses: &[f32]) -> Vec<Window> {
    let mut rest = losses;
    windows
        .iter()
        .map(|window| {
            let (own, after) = rest.split_at((window.tokens as usize).min(rest.len()));
            rest = after;
            Window { nats: own.iter().map(|loss| f64::from(*loss)).sum(), ..*window }
        })
        .collect()
}

/// The block of window `number` of `count`: blocks are runs of windows of about equal number.
pub fn block(number: usize, count: usize, blocks: usize) -> usize {
    number * blocks.min(count) / count.max(1)
}

/// Sums over windows by block: nats and bytes, \[G\] each.
pub fn by_block(windows: &[Window], blocks: usize) -> (Vec<f64>, Vec<u64>) {
    let count = blocks.min(windows.len());
    let (mut nats, mut bytes) = (vec![0.0; count], vec![0; count]);
    for (i, window) in windows.iter().enumerate() {
        let b = block(i, windows.len(), blocks);
        nats[b] += window.nats;
        bytes[b] += u64::from(window.bytes);
    }
    (nats, bytes)
}

/// Bits per byte of some windows.
pub fn bits_per_byte<'a>(windows: impl IntoIterator<Item = &'a Window>) -> f64 {
    let (nats, bytes) =
        windows.into_iter().fold((0.0, 0.0), |(n, b), w| (n + w.nats, b + f64::from(w.bytes)));
    nats / std::f64::consts::LN_2 / f64::max(bytes, 1.0)
}

/// Writes losses \[T\] as tensor `losses` of a safetensors file, whole or not at all.
pub fn write(path: &Path, losses: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = losses.iter().flat_map(|loss| loss.to_le_bytes()).collect();
    let bad = |reason: String| CompareError::File { path: path.to_owned(), reason };
    let view = TensorView::new(Dtype::F32, vec![losses.len()], &bytes).map_err(|e| bad(e.to_string()))?;
    let file = safetensors::serialize([(NAME, view)], None).map_err(|e| bad(e.to_string()))?;
    senmon_files::write_whole(path, |to| to.write_all(&file)).map_err(CompareError::io("write", path))
}

/// Reads what [`write`](fn@write) wrote.
pub fn read(path: &Path) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path).map_err(CompareError::io("read", path))?;
    let bad = |reason: String| CompareError::File { path: path.to_owned(), reason };
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
    let view = file.tensor(NAME).map_err(|e| bad(e.to_string()))?;
    if view.dtype() != Dtype::F32 {
        return Err(bad(format!("`{NAME}` is {:?}, expected F32", view.dtype())));
    }
    Ok(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// A loss that is not finite, as the trainer says it.
pub(crate) fn finite(losses: &[f32], step: u64) -> senmon_train::Result<()> {
    match losses.iter().all(|loss| loss.is_finite()) {
        true => Ok(()),
        false => {
            let advice = "lower optimizer.lr or optimizer.clip".to_owned();
            Err(TrainError::NonFinite { step, what: "the held-out loss".into(), advice })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_averaged_not_losses() {
        let members = [vec![0.5f32.ln().abs(), 200.0], vec![0.25f32.ln().abs(), 200.0]];
        let mean = averaged(&members);
        assert!((mean[0] - (-(0.375f32.ln()))).abs() < 1e-6);
        // A probability that f32 cannot hold.
        assert!((mean[1] - 200.0).abs() < 1e-4);
        assert!(averaged(&[]).is_empty());
    }

    #[test]
    fn sums_go_by_window_and_block() {
        let text = EvalText {
            documents: Vec::new(),
            windows: vec![(vec![0, 1, 1], 0), (vec![1, 0, 0], 1), (vec![1, 1, 0], 1)],
            domains: vec!["a".into(), "b".into()],
            bytes_of_token: vec![1, 4],
        };
        let of = summed(&windows(&text), &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(
            of.iter().map(|w| (w.domain, w.bytes, w.nats)).collect::<Vec<_>>(),
            [(0, 8, 3.0), (1, 2, 7.0), (1, 5, 11.0)]
        );
        assert_eq!(by_block(&of, 2), (vec![10.0, 11.0], vec![10, 5]));
        assert_eq!(by_block(&of, 20).0.len(), 3);
        assert!((bits_per_byte(&of) - 21.0 / std::f64::consts::LN_2 / 15.0).abs() < 1e-12);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l.safetensors");
        write(&path, &[1.5, -2.0]).unwrap();
        assert_eq!(read(&path).unwrap(), [1.5, -2.0]);
        std::fs::write(&path, "no").unwrap();
        assert!(read(&path).unwrap_err().is_users_mistake());
    }
}
