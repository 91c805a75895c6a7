"""What Senmon writes as GGUF, run by llama.cpp (the package llama-cpp-python): logits on a golden checkpoint's tokens, and the
tokens that follow greedily.

Each golden checkpoint that GGUF has words for is converted in f32 and loaded by llama.cpp, on token ids alone. Where llama.cpp
computes an architecture otherwise than the family's authors, that is said and not counted (DIFFERS). Prints a line each; exit 0 if
all others are within the bound.
"""

import argparse
import ctypes
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

import senmon

GOLDEN = senmon.ROOT / "crates/models/tests/golden"
# llama.cpp's products of f32 are those of f32; its softmax, SiLU and exponentials are tables or approximations.
BOUND = 2e-3
DIFFERS = {
    "phimoe": "llama.cpp runs it with RMSNorm, and softmax over the two greatest instead of SparseMixer",
    "gpt_oss": "llama.cpp rounds the ends of YaRN's ramp to whole elements",
    "deepseek_v2-groups": "llama.cpp ranks groups by their two best scores, version 2 by the best",
}


def refused(text):
    """The field that GGUF has no word for."""
    return text.split("cannot say this model: ")[-1].strip() if "cannot say" in text else None


class Llama:
    """A model in llama.cpp, with keys and values in f32."""

    def __init__(self, path, context):
        llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not load it: " + MESSAGES[-1] if MESSAGES else "")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = context, context, context, 2, 2
        params.type_k = params.type_v = 0
        params.flash_attn_type = 0
        params.swa_full = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context: " + MESSAGES[-1] if MESSAGES else "")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def logits(self, tokens, past):
        """Logits [S, V] of tokens that follow `past` others."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = int(token), past + i, 1, 0, 1
        batch.n_tokens = len(tokens)
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), shape=(self.vocab,)).copy()
                for i in range(len(tokens))]
        llama_cpp.llama_batch_free(batch)
        return np.stack(rows)

    def close(self):
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


MESSAGES = []


@llama_cpp.llama_log_callback
def QUIET(level, text, _):
    """Keeps llama.cpp's errors."""
    if level >= 3:
        MESSAGES.append(text.decode(errors="replace").strip())


def check(binary, folder, scratch, extra):
    """Distance of the logits, and how many of the greedy tokens are the same; or why there is neither."""
    path = scratch / f"{folder.name}.gguf"
    senmon.run(binary, "convert", folder, path, *extra)
    golden = load_file(folder / "golden.safetensors")
    tokens, greedy = golden["tokens"], golden["greedy"]
    # A window that the architecture has not shortens the context.
    import gguf
    fields = gguf.GGUFReader(path).fields
    most = next(int(f.contents()) for name, f in fields.items() if name.endswith(".context_length"))
    tokens = tokens[:most]
    model = Llama(path, 64)
    try:
        found, expected = model.logits(tokens, 0), golden["logits"][: len(tokens)]
        off = float(np.abs(found - expected).max() / np.abs(expected).max())
        same, past, row = 0, len(tokens), found[-1]
        if len(tokens) == len(golden["tokens"]):
            for token in greedy:
                if int(row.argmax()) != int(token):
                    break
                same += 1
                row = model.logits([token], past)[-1]
                past += 1
        return off, same, len(greedy) if len(tokens) == len(golden["tokens"]) else 0
    finally:
        model.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="golden checkpoints, by the beginning of their names [all]")
    senmon.add_binary(parser)
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for folder in sorted(GOLDEN.iterdir()):
            if not (folder / "config.json").exists() or folder.name.startswith(("t5", "switch")):
                continue
            if args.names and not folder.name.startswith(tuple(args.names)):
                continue
            differs = next((why for name, why in DIFFERS.items() if folder.name.startswith(name)), None)
            try:
                off, same, of = check(args.senmon, folder, Path(scratch), [])
            except SystemExit as e:
                why = refused(str(e))
                print(f"{'--' if why else 'FAILED'}      {folder.name}: {'not in GGUF: ' + why if why else e}")
                failed += not why
                continue
            except RuntimeError as e:
                print(f"FAILED  {folder.name}: {e}")
                failed += 1
                continue
            good = off <= BOUND and same == of
            word = "ok" if good else "differs" if differs else "FAILED"
            failed += word == "FAILED"
            print(f"{word:7} {folder.name}: logits {off:.1e}, greedy {same} of {of}" + (f" ({differs})" if word == "differs" else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
