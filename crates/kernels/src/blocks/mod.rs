//! Weights as they lie in files, GGUF's or safetensors': element types, decoding to f32, coding from f32.
//!
//! Rows are whole blocks, on plain bytes. Decoding gives the same bits at every [`Level`], those of the
//! `gguf` package for Python; no content of a block is an error, at worst it is infinite or not a number.

mod floats;
mod iq4;
mod k;
mod k_quantize;
mod legacy;
mod mxfp4;
mod types;

pub use floats::{bf16_to_f32, e8m0_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, fp8_e4m3_to_f32};
pub(crate) use mxfp4::half_scale;
pub use types::{ElementType, ggml_type_name};

use crate::simd::Level;

/// Decodes whole blocks. Panics where `out` has not as many elements as `bytes` code.
pub fn dequantize(ty: ElementType, bytes: &[u8], out: &mut [f32]) {
    dequantize_by(Level::current(), ty, bytes, out);
}

/// [`dequantize`] with the instructions of a level.
pub fn dequantize_by(level: Level, ty: ElementType, bytes: &[u8], out: &mut [f32]) {
    let expected = ty.row_bytes(out.len());
    assert_eq!(expected, Some(bytes.len()), "{} elements of {ty}", out.len());
    match ty {
        ElementType::F32 => floats::f32(level, bytes, out),
        ElementType::F16 => floats::f16(level, bytes, out),
        ElementType::Bf16 => floats::bf16(level, bytes, out),
        ElementType::Q4_0 => legacy::q4_0(level, bytes, out),
        ElementType::Q4_1 => legacy::q4_1(level, bytes, out),
        ElementType::Q5_0 => legacy::q5_0(level, bytes, out),
        ElementType::Q5_1 => legacy::q5_1(level, bytes, out),
        ElementType::Q8_0 => legacy::q8_0(level, bytes, out),
        ElementType::Q2K => k::q2_k(level, bytes, out),
        ElementType::Q3K => k::q3_k(level, bytes, out),
        ElementType::Q4K => k::q4_k(level, bytes, out),
        ElementType::Q5K => k::q5_k(level, bytes, out),
        ElementType::Q6K => k::q6_k(level, bytes, out),
        ElementType::Iq4Nl => iq4::iq4_nl(level, bytes, out),
        ElementType::Iq4Xs => iq4::iq4_xs(level, bytes, out),
        ElementType::Mxfp4 => mxfp4::mxfp4(level, bytes, out),
    }
}

/// Decodes the elements from `first` on of a row, as many as `out` has. Panics where they are not whole
/// blocks of it.
pub fn dequantize_at(ty: ElementType, row: &[u8], first: usize, out: &mut [f32]) {
    let (start, len) = (ty.row_bytes(first), ty.row_bytes(out.len()));
    let part = start.zip(len).and_then(|(start, len)| row.get(start..)?.get(..len));
    let part = part.unwrap_or_else(|| panic!("{} elements from {first} on in a row of {ty}", out.len()));
    dequantize(ty, part, out);
}

/// True if [`quantize`] can code to the type.
pub fn can_quantize(ty: ElementType) -> bool {
    coder(ty).is_some()
}

/// Codes finite numbers as whole blocks. Panics where `out` has not the bytes for `x`, or the type is not one
/// of those that [`can_quantize`] names. What is not finite, or too large for the scale of a block, comes out
/// as something else.
pub fn quantize(ty: ElementType, x: &[f32], out: &mut [u8]) {
    assert_eq!(ty.row_bytes(x.len()), Some(out.len()), "{} elements of {ty}", x.len());
    let code = coder(ty).unwrap_or_else(|| panic!("nothing codes to {ty}"));
    code(x, out);
}

fn coder(ty: ElementType) -> Option<fn(&[f32], &mut [u8])> {
    match ty {
        ElementType::F32 => Some(floats::to_f32),
        ElementType::F16 => Some(floats::to_f16),
        ElementType::Bf16 => Some(floats::to_bf16),
        ElementType::Q4_0 => Some(legacy::to_q4_0),
        ElementType::Q8_0 => Some(legacy::to_q8_0),
        ElementType::Q4K => Some(|x, out| k_quantize::to_q4_k(Level::current(), x, out)),
        ElementType::Q6K => Some(|x, out| k_quantize::to_q6_k(Level::current(), x, out)),
        ElementType::Mxfp4 => Some(mxfp4::to_mxfp4),
        _ => None,
    }
}

/// Blocks of `B` bytes, each with the `N` elements that it codes.
#[inline(always)]
fn pairs<'a, const B: usize, const N: usize>(
    bytes: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; B], &'a mut [f32; N])> {
    bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0)
}

/// `N` elements, each with the `B` bytes that they are coded in.
#[inline(always)]
fn pairs_mut<'a, const N: usize, const B: usize>(
    x: &'a [f32],
    out: &'a mut [u8],
) -> impl Iterator<Item = (&'a [f32; N], &'a mut [u8; B])> {
    x.as_chunks().0.iter().zip(out.as_chunks_mut().0)
}
