"""What Senmon writes as GGUF, run by llama.cpp (the package llama-cpp-python): logits on a golden checkpoint's tokens, and the
tokens that follow greedily.

Each golden checkpoint that GGUF has words for, and each case of gguf_models.py in several types, is converted and run by
llama.cpp on token ids; the reference is transformers in f32. Where llama.cpp computes an architecture otherwise than the family's
authors, that is said and not counted (DIFFERS, and what `convert` notes). Prints a line each; exit 0 if all others are within the bounds.
"""

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from safetensors.numpy import load_file

import families
import gguf_models
import senmon

GOLDEN = senmon.ROOT / "crates/models/tests/golden"
# Largest difference of logits, as a part of the largest. In fewer bits llama.cpp rounds activations too, and a router that is nearly
# undecided chooses otherwise: there it is the median over tokens, and beside what `senmon logits` says of the same file.
BOUND = {"keep": 1e-4, "f32": 1e-4, "f16": 5e-3, "bf16": 3e-2, "q8_0": 5e-2, "q4_k": 5e-2}
DIFFERS = {
    "phimoe": "llama.cpp runs it with RMSNorm, and softmax over the two greatest instead of SparseMixer",
    "gpt_oss": "llama.cpp rounds the ends of YaRN's ramp to whole elements",
}


class Llama:
    """A model in llama.cpp, with keys and values in f32."""

    def __init__(self, path, context):
        llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not load it: " + "; ".join(MESSAGES[-3:]))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = context, context, context, 2, 2
        params.type_k = params.type_v = 0
        params.flash_attn_type = 0
        params.swa_full = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context: " + "; ".join(MESSAGES[-3:]))
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


def run(binary, model, scratch, kind, tokens, logits, greedy):
    """Converts a model, and runs it in llama.cpp: a line for people, and whether it is good; None where GGUF has no word for it."""
    path = scratch / f"{model.name}-{kind}.gguf"
    try:
        said = json.loads(senmon.run(binary, "convert", model, path, "--type", kind, "--json"))
    except SystemExit as e:
        if "cannot say this model" not in str(e):
            raise
        return f"not in GGUF: {str(e).split('cannot say this model: ')[1].strip()}", None
    fields = gguf.GGUFReader(path).fields
    # A window that the architecture has not shortens the context.
    most = next(int(f.contents()) for name, f in fields.items() if name.endswith(".context_length"))
    tokens, expected = tokens[:most], logits[:most]
    llama = Llama(path, 64)
    try:
        found = llama.logits(tokens, 0)
        exact = kind in ("keep", "f32")
        if not exact:
            expected = senmon.logits(binary, path, tokens).numpy()
        by_token = np.abs(found - expected).max(1) / np.abs(expected).max()
        off = float(by_token.max() if exact else np.median(by_token))
        same, past, row = 0, len(tokens), found[-1]
        wanted = greedy if past + len(greedy) <= most and exact else greedy[:0]
        for token in wanted:
            if int(row.argmax()) != int(token):
                break
            same += 1
            row = llama.logits([token], past)[-1]
            past += 1
    finally:
        llama.close()
        path.unlink()
    notes = "".join(f"; {note}" for note in said["notes"])
    tokens = f", greedy {same} of {len(wanted)}" if len(wanted) else ""
    return f"logits {off:.1e}{tokens}{notes}", off <= BOUND[kind] and same == len(wanted)


def differs(name, said):
    """Why llama.cpp computes a model otherwise, if it is known to."""
    known = next((why for prefix, why in DIFFERS.items() if name.startswith(prefix)), None)
    return known or ("of the note" if "llama.cpp takes" in said else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases, by the beginning of their names [all]")
    senmon.add_binary(parser)
    args = parser.parse_args()
    failed = 0

    def report(name, kind, said, good):
        nonlocal failed
        why = None if good in (None, True) else differs(name, said)
        word = {None: "--", True: "ok"}.get(good, "differs" if why else "FAILED")
        failed += word == "FAILED"
        print(f"{word:7} {name} {kind}: {said}" + (f" ({why})" if why else ""), flush=True)

    wanted = lambda name: not args.names or name.startswith(tuple(args.names))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for folder in sorted(GOLDEN.iterdir()):
            if (folder / "config.json").exists() and not folder.name.startswith(("t5", "switch")) and wanted(folder.name):
                golden = load_file(folder / "golden.safetensors")
                values = golden["tokens"], golden["logits"], golden["greedy"]
                report(folder.name, "keep", *run(args.senmon, folder, scratch, "keep", *values))
        # And the architectures' own cases, which all can be said.
        for name in filter(wanted, gguf_models.CASES):
            model = gguf_models.build(name, 0)
            model.save_pretrained(scratch / name)
            g = torch.Generator().manual_seed(1)
            tokens = torch.randint(2, model.config.vocab_size, (24,), generator=g)
            model, how = gguf_models.as_llama_cpp(name, model)
            logits = families.forward(model, tokens)[0].numpy()
            text = tokens
            for _ in range(16):
                text = torch.cat([text, families.forward(model, text)[0][-1:].argmax(-1)])
            kinds = ("f32",) if how else ("f32", "f16", "bf16", "q8_0", "q4_k")
            for kind in kinds:
                said, good = run(args.senmon, scratch / name, scratch, kind, tokens.numpy(), logits, text[24:].numpy())
                report(name, kind, said + (f" {how}" if how and kind == "f32" else ""), bool(good))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
