"""Holds the container of Senmon against the gguf package, both ways.

    check_container.py write         writes the golden files of the Rust tests, crates/gguf/tests/golden:
                                     package.gguf, whose content the test has in Rust, and a model in three files,
                                     split-0000N-of-00003.gguf
    check_container.py read FILE     reads what the example write_sample wrote, and compares every key and element:
                                     cargo run -p senmon-gguf --example write_sample FILE
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants
from gguf import GGMLQuantizationType as Type

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "crates/gguf/tests/golden"

# Key: type of the value, type of the elements of an array, value.
KEYS = {
    "golden.u8": ("UINT8", None, 255),
    "golden.i8": ("INT8", None, -128),
    "golden.u16": ("UINT16", None, 65535),
    "golden.i16": ("INT16", None, -32768),
    "golden.u32": ("UINT32", None, 4294967295),
    "golden.i32": ("INT32", None, -2147483648),
    "golden.f32": ("FLOAT32", None, 0.15625),
    "golden.bool": ("BOOL", None, True),
    "golden.string": ("STRING", None, "two lines\nand 日本語"),
    "golden.u64": ("UINT64", None, 18446744073709551615),
    "golden.i64": ("INT64", None, -9223372036854775808),
    "golden.f64": ("FLOAT64", None, 0.1),
    "golden.u8s": ("ARRAY", "UINT8", [1, 2, 255]),
    "golden.i8s": ("ARRAY", "INT8", [-1, 127]),
    "golden.u16s": ("ARRAY", "UINT16", [1, 65535]),
    "golden.i16s": ("ARRAY", "INT16", [-32768, 5]),
    "golden.u32s": ("ARRAY", "UINT32", [0, 4294967295]),
    "golden.i32s": ("ARRAY", "INT32", [-1, 1]),
    "golden.f32s": ("ARRAY", "FLOAT32", [0.5, -2.25]),
    "golden.bools": ("ARRAY", "BOOL", [True, False, True]),
    "golden.strings": ("ARRAY", "STRING", ["a", "", "ü"]),
    "golden.u64s": ("ARRAY", "UINT64", [18446744073709551615]),
    "golden.i64s": ("ARRAY", "INT64", [-9223372036854775808, 0]),
    "golden.f64s": ("ARRAY", "FLOAT64", [0.1, 1e300]),
}

# Name: shape, row-major, and type.
TENSORS = {
    "token_embd.weight": ([4, 256], "Q6_K"),
    "blk.0.ffn_gate_exps.weight": ([2, 3, 256], "Q4_K"),
    "blk.0.ffn_up_exps.weight": ([2, 3, 64], "MXFP4"),
    "blk.0.attn_q.weight": ([2, 64], "Q8_0"),
    "blk.0.attn_k.weight": ([5, 32], "Q4_0"),
    "blk.0.attn_v.weight": ([3, 7], "BF16"),
    "blk.0.attn_output.weight": ([2, 2, 2, 3], "F16"),
    "output_norm.weight": ([9], "F32"),
    "blk.0.iq": ([1, 256], "IQ4_XS"),
}

# What write_sample sets; its tensors are those that it can code to, and two more.
SAMPLE = {
    "general.architecture": "sample", "general.alignment": 64, "sample.u8": 200, "sample.i8": -100, "sample.u16": 60000,
    "sample.i16": -30000, "sample.u32": 4_000_000_000, "sample.i32": -2_000_000_000,
    "sample.f32": float(np.float32(0.1)), "sample.bool": True, "sample.string": "mixture of 専門家",
    "sample.u64": 2**64 - 1, "sample.i64": -2**63, "sample.f64": 0.1, "sample.strings": ["a", "", "日本"],
    "sample.floats": [1.5, -2.0], "sample.integers": [-1, 2, 3], "sample.bools": [True, False], "sample.none": [],
}
MATRICES = ["F32", "F16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "BF16", "MXFP4"]
# How far the elements may be off, where the package cannot code to a type itself.
OFF = {"Q4_K": 0.09, "Q6_K": 0.03}


def tensor_bytes(i, shape, name):
    """Bytes of a tensor in the shape that the package takes them in: counted through, from a place of its own."""
    shape = quants.quant_shape_to_byte_shape(shape, Type[name])
    return ((np.arange(np.prod(shape)) * 7 + i) % 251).astype(np.uint8).reshape(shape)


def write_golden():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    path = GOLDEN / "package.gguf"
    writer = GGUFWriter(path, "golden")
    for key, (kind, of, value) in KEYS.items():
        writer.add_key_value(key, value, GGUFValueType[kind], GGUFValueType[of] if of else None)
    writer.add_key_value("golden.nested", [[1, 2], [3]], GGUFValueType.ARRAY)
    for i, (name, (shape, kind)) in enumerate(TENSORS.items()):
        writer.add_tensor(name, tensor_bytes(i, shape, kind), raw_dtype=Type[kind])
    finish(writer)
    writer = GGUFWriter(GOLDEN / "split.gguf", "golden", split_max_tensors=2)
    writer.add_uint32("golden.block_count", 5)
    for i in range(5):
        writer.add_tensor(f"blk.{i}.weight", np.full((2, 3), i, np.float32))
    finish(writer)
    print(f"{GOLDEN}: {sum(path.stat().st_size for path in GOLDEN.iterdir())} bytes")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def element(n):
    """What write_sample fills its tensors with."""
    i = np.arange(n)
    return (((i * 37 + 11) % 101).astype(np.float32) / np.float32(50) - np.float32(1)).astype(np.float32)


def check(condition, what):
    if not condition:
        raise SystemExit(f"FAILED: {what}")


def read_sample(path):
    reader = GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    check(list(keys) == list(SAMPLE), f"keys {list(keys)}")
    for key, value in SAMPLE.items():
        check(keys[key] == value, f"{key} is {keys[key]!r}, not {value!r}")
    want = {f"matrix.{kind}": ([3, 256], kind) for kind in MATRICES}
    want |= {"vector": ([5], "F32"), "cube": ([2, 3, 4], "F16")}
    check([tensor.name for tensor in reader.tensors] == list(want), [tensor.name for tensor in reader.tensors])
    end = int(reader.data_offset)
    for tensor in reader.tensors:
        shape, kind = want[tensor.name]
        check(list(reversed(tensor.shape.tolist())) == shape and tensor.tensor_type.name == kind, tensor.name)
        # llama.cpp takes no gaps but the padding.
        check(tensor.data_offset == -(-end // 64) * 64, f"{tensor.name} is at {tensor.data_offset}")
        end = tensor.data_offset + int(tensor.n_bytes)
        x = element(np.prod(shape)).reshape(shape)
        got = quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        if kind in OFF:
            check(np.abs(got - x).max() <= OFF[kind], f"{tensor.name} is off by {np.abs(got - x).max()}")
        else:
            expected = quants.dequantize(quants.quantize(x, Type[kind]), Type[kind])
            check(got.tobytes() == expected.tobytes(), f"elements of {tensor.name}")
    check(Path(path).stat().st_size == -(-end // 64) * 64, "the length of the file")
    print(f"{path}: {len(keys)} keys and {len(want)} tensors are as they should be")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "read"], help="golden files, or what Senmon wrote")
    parser.add_argument("file", nargs="?", help="for read")
    args = parser.parse_args()
    if args.what == "write":
        write_golden()
    elif args.file:
        read_sample(args.file)
    else:
        parser.error("read needs a file")


if __name__ == "__main__":
    main()
