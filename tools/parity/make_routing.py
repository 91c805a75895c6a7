"""Writes the golden files of the routing menu: crates/train/tests/golden/routing.

Each case of routing_systems.py (what other systems compute) and routing_plain.py (plain loops after the papers) becomes a
file; the README.md there says what its tensors are. A case is a function of a random generator that returns a dict:

    config   dict of the tables experts, router and balance, as Senmon is told of the technique
    oracle   name, version and function
    note     where the system differs from its paper, or how the case was made
    train    whether this is what happens in training
    inputs   tensors: logits [T, E] and what else is looked at
    compute  inputs -> dict of weights [T, E] (with a graph to the logits), picked and kept [T, E] bool (before and after drops),
             order [T, E] (the slots of a token are by falling order) and losses {name: scalar}; or {"tensors": ...}, done
    dtype    of the logits that `compute` is given
    slots    K, where it is not experts.top_k; None: as many as the fullest token has
    noise    names of the inputs that are draws; leaves: further inputs that get gradients
    check    inputs, results -> raises Unfit

A seed is passed over when the choice hangs on a near-tie (it changes when logits, draws or bias move by 1e-4), or when the case
shows nothing: a capacity that drops nothing, groups or a bias that change no choice.

    python tools/parity/make_routing.py [CASE...] [--out FOLDER]
"""

import argparse
import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save

import routing_plain
import routing_systems
from routing_plain import Unfit

OUT = Path(__file__).resolve().parents[2] / "crates/train/tests/golden/routing"
NEAR = 1e-4
MOVES = 24
SEEDS = 400
KINDS = {
    "mask": torch.uint8,
    "token_ids": torch.uint32,
    "sequences": torch.uint32,
    "table": torch.uint32,
    "picked_load": torch.int32,
    "counts": torch.uint32,
}


def toml(config):
    """The config as a TOML text; tables in the order of Senmon's own files."""

    def value(v):
        return str(v).lower() if isinstance(v, bool) else f'"{v}"' if isinstance(v, str) else repr(v)

    tables = [t for t in ("experts", "router", "balance") if config.get(t)]
    return "\n".join(f"[{t}]\n" + "".join(f"{k} = {value(v)}\n" for k, v in config[t].items()) for t in tables)


def run(spec, inputs):
    """What `compute` makes of the inputs, and the leaves that gradients are for."""
    given = dict(inputs)
    names = [n for n in given if n.startswith("logits") or n in spec.get("leaves", ())]
    for name in names:
        given[name] = given[name].detach().clone().to(spec.get("dtype", torch.float32)).requires_grad_()
    return spec["compute"](given), {name: given[name] for name in names}


def slots(spec, out):
    """experts and weights [T, K], and the expert of each slot before drops, -1 where there is none."""
    tokens = out["picked"].shape[0]
    picks = [sorted(out["picked"][t].nonzero()[:, 0].tolist(), key=lambda e: -out["order"][t, e].item()) for t in range(tokens)]
    wide = max(len(p) for p in picks)
    k = spec.get("slots", spec["config"]["experts"]["top_k"]) or wide
    assert wide <= k, f"{wide} picks, {k} slots"
    chosen = torch.full((tokens, k), -1, dtype=torch.int32)
    for t, p in enumerate(picks):
        chosen[t, : len(p)] = torch.tensor(p, dtype=torch.int32)
    kept = out["kept"].gather(1, chosen.clamp(min=0).long()) & (chosen >= 0)
    experts = torch.where(kept, chosen, -1)
    weights = out["weights"].gather(1, chosen.clamp(min=0).long()) * kept
    return experts, weights, chosen


def finish(spec, inputs, g):
    """All tensors of the file but the inputs."""
    out, leaves = run(spec, inputs)
    if "tensors" in out:
        return out["tensors"]
    experts, weights, _ = slots(spec, out)
    tensors = {"experts": experts, "weights": weights, "load": out["kept"].sum(0), "picked_load": out["picked"].sum(0)}
    tensors["dropped"] = (tensors["picked_load"].sum() - tensors["load"].sum())[None]
    assert not (out["kept"] & ~out["picked"]).any()
    assert not (out["weights"] * ~out["kept"]).any(), "a weight without a place"
    upstream = torch.randn(weights.shape, generator=g) * (experts >= 0)
    sums = {f"loss.{name}": loss for name, loss in out.get("losses", {}).items()}
    tensors |= {name: loss.reshape(1) for name, loss in sums.items()}
    if weights.requires_grad:
        tensors["upstream"] = upstream
        sums["weights"] = (upstream.to(weights.dtype) * weights).sum()
    for name, total in sums.items():
        if total.requires_grad:
            grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
            for leaf, grad in zip(leaves, grads):
                if leaf == "logits":
                    tensors[f"grad.{name.removeprefix('loss.')}"] = torch.zeros_like(inputs[leaf]) if grad is None else grad
                elif grad is not None:
                    tensors[f"grad_{leaf}.{name.removeprefix('loss.')}"] = grad
    ints = ("experts", "load", "picked_load", "dropped")
    return {n: t.detach().to(torch.int32 if n in ints else torch.float32).contiguous() for n, t in tensors.items()}


def choice(spec, inputs):
    """(what is whole numbers in the result, weights and losses)."""
    out, _ = run(spec, inputs)
    if "tensors" in out:
        tensors = out["tensors"]
        numbers = [t for n, t in tensors.items() if n.startswith("loss.")]
        return [t for t in tensors.values() if not t.is_floating_point()], numbers
    experts, weights, chosen = slots(spec, out)
    return [experts, chosen], [weights.detach(), *(loss.detach() for loss in out.get("losses", {}).values())]


def same(a, b):
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


def close(a, b):
    """No jump: counts of a loss, masks and thresholds are choices too."""
    return all((x - y).abs().max() < 3 * NEAR * max(1.0, x.abs().max().item()) for x, y in zip(a, b))


def check(spec, inputs, results, g):
    """Raises Unfit where a choice is nearly tied or the case shows nothing."""
    base, numbers = choice(spec, inputs)
    router = spec["config"]["router"]
    moving = [n for n in inputs if n.startswith("logits") or n == "bias" or n in spec.get("noise", ())]
    for _ in range(MOVES):
        moved = dict(inputs)
        for name in moving:
            moved[name] = inputs[name] + NEAR * (2.0 * torch.randint(0, 2, inputs[name].shape, generator=g) - 1.0)
        ints, floats = choice(spec, moved)
        if not same(base, ints) or not close(numbers, floats):
            raise Unfit("near a tie")
    out, _ = run(spec, inputs)
    if "tensors" not in out:
        for row, picked in zip(out["order"], out["picked"]):
            values = row[picked].sort().values
            rest = row[~picked]
            if len(values) > 1 and values.diff().min() < NEAR:
                raise Unfit("slots nearly tied")
            if len(values) and len(rest) and abs(values[0] - rest.max()) < NEAR:
                raise Unfit("picks nearly tied")
        if router.get("groups", 1) > 1:
            free = torch.zeros_like(out["picked"]).scatter(
                1, out["order"].topk(spec["config"]["experts"]["top_k"]).indices, True
            )
            if torch.equal(free, out["picked"]):
                raise Unfit("groups change nothing")
    factor = router.get("capacity" if spec["train"] else "eval_capacity", 0)
    if factor and "dropped" in results and not results["dropped"].item():
        raise Unfit("nothing dropped")
    for name in [n for n in ("bias", *spec.get("noise", ()), "mask") if n in inputs]:
        other = dict(inputs)
        other[name] = torch.zeros_like(inputs[name]) if name == "bias" else inputs[name].flip(0)
        if base and same(base, choice(spec, other)[0]):
            raise Unfit(f"{name} changes nothing")
    spec.get("check", lambda *_: None)(inputs, results)


def sorted_header(file):
    """The same file with the members of its header in a fixed order; safetensors leaves that of the metadata to chance."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def make(name, case, out):
    """Draws until a seed is fit, and writes the file."""
    passed = {}
    for seed in range(SEEDS):
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        spec = case(g)
        try:
            results = finish(spec, spec["inputs"], g)
            check(spec, spec["inputs"], results, g)
        except Unfit as e:
            passed[str(e)] = passed.get(str(e), 0) + 1
            continue
        inputs = {n: t.to(KINDS.get(n, torch.float32)) for n, t in spec["inputs"].items()}
        meta = {"config": toml(spec["config"]), "oracle": spec["oracle"], "note": " ".join(spec.get("note", "").split())}
        meta["train"] = str(spec["train"]).lower()
        tensors = {n: t.contiguous() for n, t in {**inputs, **results}.items()}
        size = (out / f"{name}.safetensors").write_bytes(sorted_header(save(tensors, meta)))
        drops = f", {results['dropped'].item()} dropped" if "dropped" in results else ""
        losses = "".join(f", {n[5:]} {t.item():.6g}" for n, t in results.items() if n.startswith("loss."))
        print(f"{name}: seed {seed}, {size} bytes{drops}{losses}", flush=True)
        return
    raise SystemExit(f"{name}: no seed is fit: {passed}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all if none is named; a part of a name will do")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    cases = {**routing_systems.CASES, **routing_plain.CASES}
    chosen = [n for n in cases if not args.cases or any(c in n for c in args.cases)]
    if not chosen:
        parser.error("no such case")
    for name in chosen:
        make(name, cases[name], args.out)


if __name__ == "__main__":
    main()
