//! Element types against what the `gguf` package for Python, and ggml, make of the same bytes and numbers,
//! bit for bit.

use std::path::Path;

use senmon_kernels::blocks::{
    ElementType, can_quantize, dequantize, dequantize_at, dequantize_by, fp8_e4m3_to_f32, quantize,
};
use senmon_kernels::simd::Level;

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/blocks").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// How many blocks a golden file has.
fn blocks(ty: ElementType, file: &[u8]) -> usize {
    let both = ty.block_bytes() + 4 * ty.block_len();
    assert!(!file.is_empty() && file.len().is_multiple_of(both), "{ty}: {} bytes", file.len());
    file.len() / both
}

fn assert_same_bits(ty: ElementType, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{ty}: element {i} is {got}, not {want}");
    }
}

#[test]
fn every_type_decodes_to_the_bits_of_the_package_at_every_level() {
    for ty in ElementType::ALL {
        let file = golden(&format!("decode-{ty}.bin"));
        let (bytes, want) = file.split_at(blocks(ty, &file) * ty.block_bytes());
        let want = floats(want);
        for level in Level::available() {
            let mut got = vec![f32::NAN; want.len()];
            dequantize_by(level, ty, bytes, &mut got);
            assert_same_bits(ty, &got, &want);
        }
        // The same from any block on.
        let unit = ty.block_len();
        for (first, len) in [(0, 0), (unit, unit), (3 * unit, 4 * unit), (want.len(), 0)] {
            let mut got = vec![f32::NAN; len];
            dequantize_at(ty, bytes, first, &mut got);
            assert_same_bits(ty, &got, &want[first..first + len]);
        }
    }
}

#[test]
fn numbers_are_coded_to_the_bytes_of_the_package_and_of_ggml() {
    use ElementType::*;
    for ty in [F16, Bf16, Q4_0, Q8_0, Mxfp4, Q4K, Q6K] {
        let file = golden(&format!("encode-{ty}.bin"));
        let (x, want) = file.split_at(blocks(ty, &file) * ty.block_len() * 4);
        let x = floats(x);
        let (mut got, mut same) = (vec![0xaa; want.len()], 0);
        quantize(ty, &x, &mut got);
        let (mut means, mut should) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
        dequantize(ty, &got, &mut means);
        dequantize(ty, want, &mut should);
        let unit = ty.block_len();
        for (i, (got, want)) in got.chunks(ty.block_bytes()).zip(want.chunks(ty.block_bytes())).enumerate() {
            // Where the scale of a group is 0, ggml leaves in its elements what means nothing.
            let idle = [Q4K, Q6K].contains(&ty) && means[i * unit..][..unit] == should[i * unit..][..unit];
            assert!(got == want || idle, "{ty}: block {i} is {got:?}, not {want:?}");
            same += usize::from(got == want);
        }
        assert!(same * 4 >= means.len() / unit * 3, "{ty}: {same} blocks");
    }
}

#[test]
fn fp8_is_what_ml_dtypes_says() {
    for (bits, want) in floats(&golden("fp8_e4m3.bin")).into_iter().enumerate() {
        let got = fp8_e4m3_to_f32(bits as u8);
        assert!(
            got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
            "{bits:#x}: {got}, not {want}"
        );
    }
}

/// Pseudo-random numbers around zero, of a bell-like shape.
fn bell(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..6).map(|_| uniform()).sum()).collect()
}

/// √(Σ (a - b)² / Σ a²).
fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let off: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let all: f64 = a.iter().map(|a| f64::from(*a).powi(2)).sum();
    (off / all).sqrt()
}

/// There and back.
fn coded(ty: ElementType, x: &[f32]) -> Vec<f32> {
    let mut bytes = vec![0; ty.row_bytes(x.len()).unwrap()];
    quantize(ty, x, &mut bytes);
    let mut back = vec![f32::NAN; x.len()];
    dequantize(ty, &bytes, &mut back);
    back
}

/// Each group rounded to `levels` steps from its least to its greatest element, scales and minima exact.
fn min_max(x: &[f32], group: usize, levels: f32) -> Vec<f32> {
    let round = |x: &[f32]| {
        let (low, high) = x.iter().fold((0.0f32, f32::MIN), |m, x| (m.0.min(*x), m.1.max(*x)));
        let step = (high - low) / levels;
        x.iter().map(|x| low + step * ((x - low) / step).round()).collect::<Vec<_>>()
    };
    x.chunks(group).flat_map(round).collect()
}

#[test]
fn coding_loses_no_more_than_its_bits_explain() {
    let x = bell(256 * 64, 7);
    for (ty, at_most) in [
        (ElementType::F32, 0.0),
        (ElementType::F16, 3e-4),
        (ElementType::Bf16, 2e-3),
        (ElementType::Q8_0, 6e-3),
        (ElementType::Q6K, 0.02),
        (ElementType::Q4K, 0.075),
        (ElementType::Q4_0, 0.10),
        (ElementType::Mxfp4, 0.13),
    ] {
        assert!(can_quantize(ty));
        let error = relative_error(&x, &coded(ty, &x));
        assert!(error <= at_most && error >= at_most / 2.0, "{ty}: {error}");
    }
    // A search for the scales is worth it, though they are coded in few bits.
    let (q4, plain) =
        (relative_error(&x, &coded(ElementType::Q4K, &x)), relative_error(&x, &min_max(&x, 32, 15.0)));
    assert!(q4 < plain, "Q4_K {q4}, min-max {plain}");
    let (q6, plain) =
        (relative_error(&x, &coded(ElementType::Q6K, &x)), relative_error(&x, &min_max(&x, 16, 63.0)));
    assert!(q6 < 1.15 * plain, "Q6_K {q6}, min-max {plain}");
}

#[test]
fn rows_of_one_value_come_back() {
    for ty in ElementType::ALL.into_iter().filter(|ty| can_quantize(*ty)) {
        for value in [0.0f32, 1.0, -3.0] {
            let x = [value; 512];
            let error = coded(ty, &x).iter().fold(0.0f32, |m, y| m.max((y - value).abs()));
            assert!(error <= 0.02 * value.abs(), "{ty} of {value}: {error}");
        }
        // Groups of nothing among others, and numbers of which halves have no notion.
        let mut x = bell(512, 3);
        x[32..96].fill(0.0);
        x[256..].fill(1e-30);
        let back = coded(ty, &x);
        assert!(back.iter().all(|y| y.is_finite()) && back[32..96].iter().all(|y| *y == 0.0), "{ty}");
    }
}

#[test]
fn any_numbers_can_be_coded() {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45, -1e-45, -0.0, 1.0];
    for ty in ElementType::ALL.into_iter().filter(|ty| can_quantize(*ty)) {
        for some in 0..odd.len() {
            let x: Vec<f32> =
                (0..256).map(|i| if i % 7 < 3 { odd[(some + i) % odd.len()] } else { odd[some] }).collect();
            coded(ty, &x);
        }
    }
    assert!(!can_quantize(ElementType::Q2K));
}
