"""Writes references for the element types of GGUF: blocks and what the gguf package decodes them to, numbers and what
it codes them to.

A folder, crates/kernels/tests/golden/blocks unless --out says otherwise, gets
    decode-{TYPE}.bin    blocks of random bytes, then what they stand for, f32
    encode-{TYPE}.bin    numbers, f32, then the blocks that they are coded to: by the package; Q4_K and Q6_K, which it
                         cannot code to, by the library of ggml that --ggml names (libggml-base.so of llama.cpp)
    fp8_e4m3.bin         what the bytes 0 to 255 stand for, f32, by ml_dtypes
all little endian, without headers: with the sizes of a block, the length of a file tells how many it has.

Bytes are random but for the scales in half precision, which are finite: of every exponent, of both signs, subnormal and
zero. Numbers are of many magnitudes; some blocks are all zero, or have one element that is not. What has no one right
answer is left out: NaN and infinities to f16, and powers of two with which MXFP4 would leave its range.
"""

import argparse
import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type, quants

ROOT = Path(__file__).resolve().parents[2]

# Type: where halves stand in a block.
DECODED = {
    "F32": [], "F16": [], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
    "MXFP4": [],
}
ENCODED = ["F16", "BF16", "Q4_0", "Q8_0", "MXFP4"]
# Type: function of ggml.
BY_GGML = {"Q4_K": "quantize_row_q4_K_ref", "Q6_K": "quantize_row_q6_K_ref"}


def halves(rng, n):
    """Finite halves of every kind."""
    bits = rng.integers(0, 0x7c00, n, dtype=np.uint16) | rng.integers(0, 2, n, dtype=np.uint16) << np.uint16(15)
    bits[rng.random(n) < 0.1] &= 0x83ff
    bits[rng.random(n) < 0.05] &= 0x8000
    return bits


def blocks(rng, name, n):
    """Blocks [n, bytes] of random content."""
    size = GGML_QUANT_SIZES[Type[name]][1]
    if name == "F32":
        x = (rng.standard_normal(n) * 10.0 ** rng.integers(-40, 38, n)).astype(np.float32)
        return x.view(np.uint8).reshape(n, size)
    if name == "F16":
        return halves(rng, n).view(np.uint8).reshape(n, size)
    raw = rng.integers(0, 256, (n, size), dtype=np.uint8)
    if name == "MXFP4":
        raw[:, 0] = np.arange(n) * 253 // n
    # All bits of the elements the same, twice.
    raw[0], raw[1] = 0, 255
    if name == "MXFP4":
        raw[1, 0] = 130
    if name == "BF16":
        raw[1] = 0
        raw[(raw.view(np.uint16)[:, 0] & 0x7f80) == 0x7f80] = 0
    for at in DECODED[name]:
        raw[:, at:at + 2] = halves(rng, n).view(np.uint8).reshape(n, 2)
    return raw


def numbers(rng, name, n):
    """Numbers [n, elements] to be coded."""
    width = max(GGML_QUANT_SIZES[Type[name]][0], 32)
    x = rng.standard_normal((n, width)) * 10.0 ** rng.integers(-6, 4, (n, 1))
    if name in ("F16", "BF16"):
        x *= 10.0 ** rng.integers(-6, 6, x.shape)
    x = x.astype(np.float32)
    x[0] = 0
    x[1] = -0.0
    x[2, 1:] = 0
    x[3] = -np.abs(x[3])
    x[4, :] = 0.75
    # Halves of a step, where rounding goes one way or the other.
    x[5] = np.arange(width) - width / 2
    x[6] = (np.arange(width) % 16 - 8) / 2
    x[7] = np.float32(8) * (1 - np.float32(2) ** -24 * (np.arange(width) % 7))
    for i, power in enumerate([-20, -3, -1, 0, 1, 3, 20]):
        x[8 + i] = np.clip(x[8 + i], -1, 1) * np.float32(0.4)
        x[8 + i, i] = np.nextafter(np.float32(1), np.float32(i % 2 * 2))
        x[8 + i] *= np.float32(2) ** power
    return x


class InitParams(ctypes.Structure):
    """What ggml_init takes."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def load_ggml(path):
    """The library, with its tables of halves filled."""
    ggml = ctypes.CDLL(path)
    ggml.ggml_init.argtypes, ggml.ggml_init.restype = [InitParams], ctypes.c_void_p
    assert ggml.ggml_init(InitParams(1 << 20, None, False))
    return ggml


def code(ggml, x, name):
    """The blocks that ggml codes numbers [n, elements] to."""
    out = np.zeros((len(x), GGML_QUANT_SIZES[Type[name]][1]), np.uint8)
    pointer = ctypes.c_void_p
    getattr(ggml, BY_GGML[name])(x.ctypes.data_as(pointer), out.ctypes.data_as(pointer), ctypes.c_int64(x.size))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "crates/kernels/tests/golden/blocks", help="the folder")
    parser.add_argument("--ggml", help="a shared library of ggml; without it, encode-Q4_K and encode-Q6_K are left as they are")
    parser.add_argument("--seed", type=int, default=0, help="of the random bytes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in DECODED:
        rng = np.random.default_rng([args.seed, Type[name].value])
        elements = GGML_QUANT_SIZES[Type[name]][0]
        raw = blocks(rng, name, {1: 512, 32: 48, 256: 8}[elements])
        decoded = quants.dequantize(raw.reshape(-1) if elements == 1 else raw, Type[name])
        assert decoded.dtype == np.float32 and np.isfinite(decoded).all(), name
        (args.out / f"decode-{name}.bin").write_bytes(raw.tobytes() + decoded.tobytes())
    for name in ENCODED:
        x = numbers(np.random.default_rng([args.seed, 1, Type[name].value]), name, 40)
        with np.errstate(over="ignore"):
            coded = quants.quantize(x, Type[name])
        (args.out / f"encode-{name}.bin").write_bytes(x.tobytes() + coded.tobytes())
    for name in BY_GGML if args.ggml else []:
        x = numbers(np.random.default_rng([args.seed, 1, Type[name].value]), name, 20)
        # Where a half is too coarse for the scale, all elements mean 0, and what ggml leaves in them means nothing.
        x[np.abs(x).max(axis=1) < 1e-3] *= np.float32(1e4)
        coded = code(load_ggml(args.ggml), x, name)
        (args.out / f"encode-{name}.bin").write_bytes(x.tobytes() + coded.tobytes())
    fp8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    (args.out / "fp8_e4m3.bin").write_bytes(fp8.tobytes())
    total = sum(path.stat().st_size for path in args.out.glob("*.bin"))
    print(f"{args.out}: {total} bytes")


if __name__ == "__main__":
    main()
