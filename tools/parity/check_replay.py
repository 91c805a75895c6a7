"""Trains with `senmon train` on the batches of a replay case, and compares every step and every tensor with torch.

Bounds: the loss of each step within 1e-4 relative, ‖W - W_ref‖ / ‖W_ref - W_init‖ ≤ 1e-3 for every tensor. Prints a line for each
case; exit 0 if all hold.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

import senmon

LOSS, WEIGHTS = 1e-4, 1e-3


def settings(said):
    """The --set arguments of a replay.json."""
    return [
        f"optimizer.lr={said['lr']}", f"optimizer.betas={said['betas']}", f"optimizer.eps={said['eps']}",
        f"optimizer.weight_decay={said['weight_decay']}", f"optimizer.clip={said['clip']}",
        "schedule.kind=constant", "schedule.warmup=0",
        f"balance.aux={said['aux']}", "balance.convention=huggingface", "balance.z=0",
    ]


def steps(path):
    """The lines of metrics.jsonl that are training steps, in order."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [line for line in lines if "loss" in line]


def relative(ours, reference):
    """The largest |a - b| / |b| of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))


def check(case, binary, out, more):
    """True if the case holds; prints a line, and more where it does not."""
    said = json.loads((case / "replay.json").read_text())
    initial, reference = load_file(case / "model.safetensors"), load_file(case / "reference.safetensors")
    sets = [arg for value in settings(said) + more for arg in ("--set", value)]
    senmon.run(binary, "train", "--init", case, "--batches", case / "batches.safetensors", "--out", out, "--quiet", *sets)
    lines = steps(out / "metrics.jsonl")
    if len(lines) != said["steps"]:
        print(f"FAILED: {case.name}: {len(lines)} steps, not {said['steps']}")
        return False
    off = {
        "loss": relative([line["loss"] for line in lines], reference["losses"].tolist()),
        "gradient norm": relative([line["grad_norm"] for line in lines], reference["grad_norm"].tolist()),
    }
    if all("aux" in line.get("losses", {}) for line in lines):
        off["aux"] = relative([line["losses"]["aux"] for line in lines], reference["aux"].tolist())
    final = {}
    for path in sorted(out.glob("model*.safetensors")):
        final.update(load_file(path))
    wanted = {name.removeprefix("final."): t.double() for name, t in reference.items() if name.startswith("final.")}
    if final.keys() != wanted.keys():
        print(f"FAILED: {case.name}: other tensors: {sorted(final.keys() ^ wanted.keys())}")
        return False
    drift = {
        name: ((final[name].double() - ref).norm() / (ref - initial[name].double()).norm()).item()
        for name, ref in wanted.items()
    }
    worst = max(drift, key=drift.get)
    good = off["loss"] <= LOSS and drift[worst] <= WEIGHTS
    curves = ", ".join(f"{name} {value:.1e}" for name, value in off.items())
    print(f"{'ok' if good else 'FAILED'}: {case.name}: {curves}, weights {drift[worst]:.1e} ({worst})", flush=True)
    if not good:
        for name in sorted(drift, key=drift.get, reverse=True)[:12]:
            print(f"    {name}: {drift[name]:.1e}")
        for n, (line, ref) in enumerate(zip(lines, reference["losses"].tolist())):
            print(f"    step {n + 1}: loss {line['loss']:.6f}, reference {ref:.6f}")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    golden = senmon.ROOT / "crates/train/tests/golden"
    parser.add_argument("case", nargs="*", type=Path, help="folders by make_replay.py [all in crates/train/tests/golden]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more for senmon train")
    senmon.add_binary(parser)
    args = parser.parse_args()
    good = True
    for case in args.case or sorted(golden.glob("replay-*")):
        if not (case / "replay.json").exists():
            raise SystemExit(f"{case} has no replay.json; make_replay.py makes such folders")
        with tempfile.TemporaryDirectory() as folder:
            good &= check(case, args.senmon, Path(folder) / "run", args.set)
    sys.exit(not good)


if __name__ == "__main__":
    main()
