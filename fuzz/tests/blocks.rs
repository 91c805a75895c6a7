//! Blocks of every element type: any bytes are decoded, to the same at every instruction set, whole or in
//! pieces; any numbers are coded.

use senmon_fuzz::fuzz;
use senmon_kernels::blocks::{ElementType, can_quantize, dequantize_at, dequantize_by, quantize};
use senmon_kernels::simd::Level;

fn same(a: f32, b: f32) -> bool {
    // Which of two NaN comes out of a product is the processor's choice.
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

/// The first byte says which type, the others are blocks of it, and numbers.
fn decode_and_code(input: &[u8]) -> String {
    let Some((which, rest)) = input.split_first() else {
        return "empty".to_owned();
    };
    let ty = ElementType::ALL[usize::from(*which) % ElementType::ALL.len()];
    let blocks = rest.len() / ty.block_bytes();
    let bytes = &rest[..blocks * ty.block_bytes()];
    let mut want = vec![0.5; blocks * ty.block_len()];
    dequantize_by(Level::Portable, ty, bytes, &mut want);
    for level in Level::available() {
        let mut got = vec![-0.5; want.len()];
        dequantize_by(level, ty, bytes, &mut got);
        assert!(got.iter().zip(&want).all(|(a, b)| same(*a, *b)), "{ty} at {}", level.name());
    }
    let first = blocks / 3 * ty.block_len();
    let mut got = vec![-0.5; want.len() - first];
    dequantize_at(ty, bytes, first, &mut got);
    assert!(got.iter().zip(&want[first..]).all(|(a, b)| same(*a, *b)), "{ty} from {first} on");
    // What was decoded, and what the bytes are as numbers, coded; there and back it is finite where it was.
    let plain = rest.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    for mut x in [want.clone(), plain] {
        x.truncate(2048);
        x.resize(x.len().next_multiple_of(256), 0.0);
        for ty in ElementType::ALL.into_iter().filter(|ty| can_quantize(*ty)) {
            let mut bytes = vec![0; ty.row_bytes(x.len()).unwrap_or(0)];
            quantize(ty, &x, &mut bytes);
            let mut back = vec![f32::NAN; x.len()];
            dequantize_by(Level::current(), ty, &bytes, &mut back);
            let small = |x: &f32| x.abs() < 1e4;
            assert!(!x.iter().all(small) || back.iter().all(|y| y.is_finite()), "{ty} of {x:?}");
        }
    }
    let kinds = want.iter().fold(0, |kinds, x| kinds | 1 << (x.classify() as u8));
    format!("{ty} {kinds:b} {}", blocks.min(8))
}

#[test]
fn any_bytes_are_decoded_and_any_numbers_coded() {
    // Of each type two blocks of zeros, of ones, and of counted bytes.
    let seeds: Vec<Vec<u8>> = (0..ElementType::ALL.len() as u8)
        .flat_map(|which| {
            let n = 2 * ElementType::ALL[usize::from(which)].block_bytes();
            let filled = |byte: fn(usize) -> u8| [vec![which], (0..n).map(byte).collect()].concat();
            [filled(|_| 0), filled(|_| 0x3c), filled(|i| (i * 37) as u8)]
        })
        .collect();
    fuzz("blocks", &seeds, 15_000, decode_and_code);
}
