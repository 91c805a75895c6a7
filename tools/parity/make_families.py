"""Writes the golden checkpoints that the Rust tests of `senmon-models` compare with.

Each case of families.py becomes a folder with a tiny random checkpoint as transformers saves it, and golden.safetensors:

    tokens       [S] u32      the input
    logits       [S, V] f32   logits of transformers, f32, eager
    greedy       [N] u32      the N likeliest tokens one after the other after `tokens`
    experts.{l}  [S, K] i32   experts of MoE layer l, the largest weight first
    weights.{l}  [S, K] f32   their weights, as the experts' outputs are multiplied with

A seed whose routing or greedy choice hangs on a near-tie is passed over, so that an implementation that adds in another
order gets the same picks.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import families

PROMPT, GREEDY = 24, 16
PICK, ORDER, ARGMAX = 1e-3, 1e-4, 1e-2  # smallest gaps allowed: selection, order of picks, greedy choice (logits)


@torch.no_grad()
def attempt(cfg, seed):
    """(model, tensors of golden.safetensors, report), or the reason why this seed will not do."""
    model = families.build(cfg, seed)
    g = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(2, cfg.vocab_size, (PROMPT,), generator=g)
    text, argmax = tokens, float("inf")
    for _ in range(GREEDY):
        logits, _ = families.forward(model, text)
        best = logits[-1].topk(2)
        argmax = min(argmax, (best.values[0] - best.values[1]).item())
        text = torch.cat([text, best.indices[:1]])
    greedy = text[PROMPT:]
    if argmax < ARGMAX:
        return None, f"greedy gap {argmax:.1e}"
    if cfg.eos_token_id in greedy:
        return None, "an end of text"
    logits, routing = families.forward(model, text)  # of the whole, so that greedy's routing has margins too
    pick, order = families.margins(model, routing)
    if pick < PICK or order < ORDER:
        return None, f"gaps {pick:.1e} {order:.1e}"
    logits, routing = families.forward(model, tokens)
    if families.unused(routing):
        return None, f"{families.unused(routing)} experts unused"
    tensors = {"tokens": tokens.to(torch.uint32), "greedy": greedy.to(torch.uint32), "logits": logits.contiguous()}
    for layer, (_, weights, experts) in routing.items():
        weights, place = weights.sort(dim=-1, descending=True)
        tensors[f"weights.{layer}"] = weights.contiguous()
        tensors[f"experts.{layer}"] = experts.gather(1, place).int().contiguous()
    report = f"pick {pick:.1e}, order {order:.1e}, greedy {argmax:.1e}, largest logit {logits.abs().max():.2f}"
    return (model, tensors, report), None


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
            made, why = attempt(cfg, seed)
            if made:
                break
        else:
            raise SystemExit(f"{case}: no seed will do; the last: {why}")
        model, tensors, report = made
        folder = args.out / case
        model.save_pretrained(folder)
        save_file(tensors, folder / "golden.safetensors", metadata={"seed": str(seed)})  # one key: their order is random
        again, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        assert not any(info.values()), info
        off = (families.forward(again, tensors["tokens"].long())[0] - tensors["logits"]).abs().max()
        assert off <= 1e-5 * tensors["logits"].abs().max(), f"{case} changed by saving: {off}"
        size = sum(f.stat().st_size for f in folder.iterdir())
        total += size
        print(f"{case}: seed {seed}, {size // 1000} KB, {report}", flush=True)
    print(f"{total // 1000} KB in all")


if __name__ == "__main__":
    main()
