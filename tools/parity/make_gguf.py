"""Writes the golden GGUF files that the Rust tests of `senmon-models` compare with: crates/models/tests/golden/gguf.

Each case of gguf_models.py becomes NAME.gguf, written by the package `gguf` (one in two files), and NAME.safetensors as
make_families.py has it, from transformers with the values that the types of the file hold.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

import gguf_models
import make_families

OUT = Path(__file__).resolve().parents[2] / "crates/models/tests/golden/gguf"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.cases or gguf_models.CASES:
        cfg = gguf_models.config(name)
        why = []
        for seed in range(400):
            model = gguf_models.build(name, seed)
            for old in args.out.glob(f"{name}*.gguf"):
                old.unlink()
            split = 20 if "split" in name else None
            written = gguf_models.write(name, model, args.out / f"{name}.gguf", split)
            gguf_models.put_back(name, model, written)
            try:
                tensors, report = make_families.record(model, name, cfg, seed)
            except make_families.Unfit as e:
                why.append(str(e))
                continue
            save_file(tensors, args.out / f"{name}.safetensors")
            print(f"{name}: seed {seed}, {report}", flush=True)
            break
        else:
            raise SystemExit(f"{name}: no seed will do: {why[-3:]}")


if __name__ == "__main__":
    main()
