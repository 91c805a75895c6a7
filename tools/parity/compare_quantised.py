"""How much quantised products cost in quality, in Senmon and in llama.cpp: the logits of one GGUF file beside those of the same weights
decoded to f32 and multiplied in f32.

The model is a random checkpoint (weights of standard deviation 0.2 or more) or any that --model names; for each type `senmon convert`
writes the file. The reference is `senmon logits`, which multiplies in f32 with decoded weights (held to transformers by check_gguf.py);
beside it `senmon logits --packed`, and llama.cpp (the package llama-cpp-python, keys and values in f32). What is printed: the root mean
square of the difference over that of the reference, its median and largest over tokens, and how often the likeliest token differs.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import senmon
from check_gguf import Llama


def logits(args, model, tokens, out, *flags):
    command = [args.senmon, "logits", model, "--tokens", ",".join(map(str, tokens)), "--out", out, *flags]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return load_file(out)["logits"]


def line(name, found, reference):
    difference = np.sqrt(((found - reference) ** 2).mean(axis=1) / (reference**2).mean(axis=1))
    whole = np.sqrt(((found - reference) ** 2).mean() / (reference**2).mean())
    other = (found.argmax(axis=1) != reference.argmax(axis=1)).mean()
    print(f"  {name:<12} {whole:.5f}  median {np.median(difference):.5f}  largest {difference.max():.5f}  likeliest differs {100 * other:.1f} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--senmon", type=Path, default=senmon.ROOT / "target/release/senmon")
    parser.add_argument("--types", nargs="+", default=["bf16", "q8_0", "q4_k"])
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for kind in args.types:
            file = folder / f"{kind}.gguf"
            subprocess.run([str(args.senmon), "convert", str(args.model), str(file), "--type", kind, "--quiet"], check=True)
            llama = Llama(file, args.tokens)
            tokens = np.random.default_rng(1).integers(0, llama.vocab, args.tokens)
            reference = logits(args, file, tokens, folder / "f32.safetensors")
            print(f"{args.model.name}, {kind}, {args.tokens} tokens:")
            line("senmon", logits(args, file, tokens, folder / "packed.safetensors", "--packed"), reference)
            line("llama.cpp", llama.logits(tokens, 0), reference)
            llama.close()
            file.unlink()


if __name__ == "__main__":
    main()
