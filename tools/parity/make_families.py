"""Writes the golden checkpoints that the Rust tests of `senmon-models` compare with.

Each case of families.py becomes a folder with a tiny random checkpoint as transformers saves it, and golden.safetensors:

    tokens       [S] u32      the input
    logits       [S, V] f32   logits of transformers, f32, eager
    greedy       [N] u32      the N likeliest tokens one after the other after `tokens`
    experts.{l}  [S, K] i32   experts of MoE layer l, the largest weight first
    weights.{l}  [S, K] f32   their weights, as the experts' outputs are multiplied with

With an encoder and a decoder, `tokens` [S] are the encoder's, `decoder_tokens` [D] the decoder's, `logits` [D, V] and `greedy` too
(`greedy` after the token that starts a decoder, alone), and {l} is encoder.{l} or decoder.{l}. A token that an expert has no
place for has weight 0; then `greedy_cached` [N] is what comes when each step gives the decoder the new token alone.

A seed whose routing or greedy choice hangs on a near-tie is passed over, so that an implementation that adds in another
order gets the same picks.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import families
import mxfp4

PROMPT, DECODER_PROMPT = 24, 16
GREEDY = 32
PICK, ORDER, ARGMAX = 1e-3, 1e-4, 1e-2  # smallest gaps allowed: selection, order of picks, greedy choice (logits)


class Unfit(Exception):
    """Why a seed will not do."""


def choose(logits, gaps):
    """The likeliest token [1]; its lead goes to `gaps`."""
    best = logits.topk(2)
    gaps.append((best.values[0] - best.values[1]).item())
    if gaps[-1] < ARGMAX:
        raise Unfit(f"greedy gap {gaps[-1]:.1e}")
    return best.indices[:1]


def greedy(model, tokens, gaps, start=None):
    """GREEDY tokens after `tokens`, or after `start` in a decoder; the whole sequence anew for each."""
    text = tokens if start is None else start
    for _ in range(GREEDY):
        inputs = (text,) if start is None else (tokens, text)
        text = torch.cat([text, choose(families.forward(model, *inputs)[0][-1], gaps)])
    return text[-GREEDY:]


@torch.no_grad()
def greedy_cached(model, tokens, gaps, start):
    """As `greedy`, but a decoder sees only its newest token and what it kept of those before."""
    encoded = model.get_encoder()(input_ids=tokens[None].long())
    text, cache = start, None
    for _ in range(GREEDY):
        out = model(encoder_outputs=encoded, decoder_input_ids=text[None, -1:], cache=cache, use_cache=True)
        cache = out.cache
        text = torch.cat([text, choose(out.logits[0, -1], gaps)])
    return text[-GREEDY:]


def check(model, routing):
    """(pick, order) as `families.margins`, if they are wide enough."""
    pick, order = families.margins(model, routing)
    if pick < PICK or order < ORDER:
        raise Unfit(f"gaps {pick:.1e} {order:.1e}")
    return pick, order


def attempt(case, cfg, seed):
    """(model, tensors of golden.safetensors, report); raises Unfit."""
    model = families.build(cfg, seed)
    if "mxfp4" in case:
        mxfp4.round_experts(model)
    return model, *record(model, case, cfg, seed)


def record(model, case, cfg, seed):
    """(tensors of golden.safetensors, report) of a model; raises Unfit."""
    g = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(2, cfg.vocab_size, (PROMPT,), generator=g)
    inputs, start, gaps = (tokens,), None, []
    if families.two_stacks(case):
        start = torch.tensor([cfg.pad_token_id])
        inputs = (tokens, torch.cat([start, torch.randint(2, cfg.vocab_size, (DECODER_PROMPT - 1,), generator=g)]))
    logits, routing = families.forward(model, *inputs)
    check(model, routing)
    if families.unused(routing):
        raise Unfit(f"{families.unused(routing)} experts unused")
    tensors = {"tokens": tokens, "greedy": greedy(model, tokens, gaps, start)}
    if start is None:
        whole = (torch.cat([tokens, tensors["greedy"]]),)  # so that greedy's routing has margins too
    else:
        tensors["decoder_tokens"] = inputs[1]
        whole = (tokens, torch.cat([start, tensors["greedy"]]))
    pick, order = check(model, families.forward(model, *whole)[1])
    drops = {}
    if case.startswith("switch_transformers-drops"):
        drops = {layer: (weights == 0).sum().item() for layer, (_, weights, _) in routing.items()}
        if not all(drops.values()):
            raise Unfit(f"drops {drops}")
        tensors["greedy_cached"] = greedy_cached(model, tokens, gaps, start)
        if torch.equal(tensors["greedy"], tensors["greedy_cached"]):
            raise Unfit("greedy needs no drops")
        cached = (tokens, torch.cat([start, tensors["greedy_cached"]]))
        check(model, families.forward(model, *cached)[1])
    if any(cfg.eos_token_id in text for name, text in tensors.items() if "greedy" in name):
        raise Unfit("an end of text")
    tensors = {name: ids.to(torch.uint32) for name, ids in tensors.items()}
    tensors["logits"] = logits.contiguous()
    for layer, (_, weights, experts) in routing.items():
        if cfg.model_type != "phimoe":  # there in the order of picking, as both weights are often 1
            weights, place = weights.sort(dim=-1, descending=True)
            experts = experts.gather(1, place)
        tensors[f"weights.{layer}"] = weights.contiguous()
        tensors[f"experts.{layer}"] = experts.int().contiguous()
    report = f"pick {pick:.1e}, order {order:.1e}, greedy {min(gaps):.1e}, largest logit {logits.abs().max():.2f}"
    return tensors, report + (f", drops {drops}" if drops else "")


def published_keys(folder):
    """Rewrites config.json as published checkpoints have it, which are older than transformers 5.

    `rope_theta` and `rope_scaling` (its kind is `type`) for `rope_parameters`, a part of the head as a key of its own, the
    windows by rule rather than by layer, `torch_dtype` for `dtype`; whether T5 scales goes by whether it is tied.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if rope := config.pop("rope_parameters", None):
        config["rope_theta"] = rope.pop("rope_theta")
        part = rope.pop("partial_rotary_factor", None)
        if part is not None and "rotary_dim" not in config:
            config["partial_rotary_factor"] = part
        kind = rope.pop("rope_type")
        rope.pop("type", None)
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config.pop("layer_types", None)
    config.pop("scale_decoder_outputs", None)
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def pack(model, folder):
    """Rewrites a saved gpt_oss checkpoint with its experts in MXFP4 and everything else in f32, as published."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, module in model.named_modules():
        if type(module).__name__ == "GptOssExperts":
            for end, tensor in mxfp4.packed(module).items():
                dense = f"{name}.{end.rsplit('_', 1)[0]}"
                tensors.pop(dense, None)
                tensors[f"{name}.{end}"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def unpacked(folder, into):
    """A copy of a `pack`ed checkpoint that transformers loads without kernels for MXFP4."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_blocks")]:
        name = name.removesuffix("_blocks")
        weights = mxfp4.dequantise(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
        tensors[name] = weights.transpose(1, 2).contiguous()
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (into / "config.json").write_text(json.dumps(config))
    return into


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=here / "crates/models/tests/golden")
    parser.add_argument("--case", action="append", choices=list(families.CASES), help="only these")
    parser.add_argument("--tries", type=int, default=4000, help="seeds to try for each case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    total = 0
    for number, case in enumerate(families.CASES):
        if args.case and case not in args.case:
            continue
        cfg = families.config(case, "golden")
        for seed in range(100_000 * number, 100_000 * number + args.tries):
            try:
                model, tensors, report = attempt(case, cfg, seed)
                break
            except Unfit as reason:
                why = reason
        else:
            raise SystemExit(f"{case}: no seed will do; the last: {why}")
        folder = args.out / case
        model.save_pretrained(folder)
        save_file(tensors, folder / "golden.safetensors", metadata={"seed": str(seed)})  # one key: their order is random
        if case in families.PUBLISHED_KEYS:
            published_keys(folder)
        again = folder
        if "mxfp4" in case:
            pack(model, folder)
            temporary = tempfile.TemporaryDirectory()
            again = unpacked(folder, Path(temporary.name))
        auto = AutoModelForSeq2SeqLM if families.two_stacks(case) else AutoModelForCausalLM
        again, info = auto.from_pretrained(
            again, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        assert not any(info.values()), info
        inputs = [tensors[name].long() for name in ("tokens", "decoder_tokens") if name in tensors]
        off = (families.forward(again, *inputs)[0] - tensors["logits"]).abs().max()
        assert off <= 1e-5 * tensors["logits"].abs().max(), f"{case} changed by saving: {off}"
        size = sum(f.stat().st_size for f in folder.iterdir())
        total += size
        print(f"{case}: seed {seed}, {size // 1000} KB, {report}", flush=True)
    print(f"{total // 1000} KB in all")


if __name__ == "__main__":
    main()
