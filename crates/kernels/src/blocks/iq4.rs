//! Four bits that stand for unevenly spaced values, denser around zero: IQ4_NL and IQ4_XS.

use super::floats::half_at;
use super::pairs;
use crate::by_level;

/// What the four bits stand for.
const VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

by_level! {
    /// Scale, 16 bytes of elements.
    pub(super) fn iq4_nl(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<18, 32>(bytes, out) {
            look_up(&VALUES.map(|value| half_at(block, 0) * value), &block[2..], out);
        }
    }
}

by_level! {
    /// Scale of scales, the high two bits of eight scales, their low four bits, 128 bytes of elements.
    pub(super) fn iq4_xs(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<136, 256>(bytes, out) {
            let d = half_at(block, 0);
            let high = u16::from_le_bytes([block[2], block[3]]);
            for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let scale = (block[4 + g / 2] >> (g % 2 * 4) & 15) | ((high >> (g * 2) & 3) << 4) as u8;
                let scale = d * f32::from(scale as i8 - 32);
                look_up(&VALUES.map(|value| scale * value), &block[8 + g * 16..][..16], out);
            }
        }
    }
}

/// 32 elements from a table of what the four bits stand for; of a byte, the low bits are element i and the
/// high bits element i + 16.
#[inline(always)]
fn look_up(table: &[f32; 16], q: &[u8], out: &mut [f32; 32]) {
    for i in 0..16 {
        out[i] = table[usize::from(q[i] & 15)];
        out[i + 16] = table[usize::from(q[i] >> 4)];
    }
}
