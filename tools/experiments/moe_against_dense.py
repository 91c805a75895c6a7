"""Does a mixture of experts pay on this text? MoE against its dense twin of equal operations per token (the router counted), on the
same batches for the same number of steps.

Each arm's learning rate is chosen from the same small grid: runs of a quarter of the tokens with seed 0 give the best rate of each arm;
both arms are then trained to the end at both rates with seed 0 and keep the better, at which the other seeds follow. Every finished run is a line of --results, an unfinished one is gone on with from its folder in
--work: the script can be ended and called again at any time. Without arguments it does all of it; with --table it only prints.

Needs nothing but Python; the binary is target/release/senmon, or --senmon.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARMS = {"moe": [], "dense": ["--set", "model.ffn=dense"]}
# In steps of two, the best not at an end.
PRESETS = {
    "nano": {"tokens": 8_000_000, "rates": [7.5e-4, 1.5e-3, 3e-3, 6e-3]},
    "tiny": {"tokens": 4_000_000, "rates": [1e-3, 2e-3, 4e-3]},
}
SEEDS = [0, 1, 2]


def read(path):
    """The finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(done, **wanted):
    """The finished run with these values, or none."""
    return next((run for run in done if all(run[key] == value for key, value in wanted.items())), None)


def train(args, preset, arm, rate, seed, tokens):
    """One run to its end; its line in the results."""
    done = read(args.results)
    what = {"preset": preset, "arm": arm, "lr": rate, "seed": seed, "tokens": tokens}
    found = find(done, **what)
    if found:
        return found
    out = args.work / f"{preset}-{arm}-lr{rate}-seed{seed}-{tokens // 1000}k"
    command = [str(args.senmon), "train", "--out", str(out), "--json", "--threads", str(args.threads)]
    if (out / "senmon.toml").exists():
        command.append("--resume")
    else:
        shutil.rmtree(out, ignore_errors=True)
        command += ["--data", *map(str, args.data), "--preset", preset, "--tokens", str(tokens), "--seed", str(seed)]
        command += ["--set", f"optimizer.lr={rate}", "--set", "train.eval_every=0", "--set", "train.keep=1", *ARMS[arm]]
    print(f"{out.name}: {'going on' if '--resume' in command else 'begins'}", file=sys.stderr, flush=True)
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=None if args.verbose else subprocess.DEVNULL, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {ended.returncode}")
    said = json.loads(ended.stdout)
    line = {
        **what,
        "bits_per_byte": said["eval"]["bits_per_byte"],
        "eval_loss": said["eval"]["eval_loss"],
        "domains": {name: domain["bits_per_byte"] for name, domain in said["eval"]["domains"].items()},
        "parameters": said["parameters"],
        "active_parameters": said["active_parameters"],
        "flops_per_token": said["flops_per_token"],
        "seconds": said["seconds"],
        "peak_memory_bytes": said["peak_memory_bytes"],
        "load_cv": [layer["cv"] for layer in said["load"]],
        "text_documents": said["data"]["documents"],
        "text_bytes": said["data"]["bytes"],
        "processor": processor(),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(out, ignore_errors=True)
    print(f"{out.name}: {line['bits_per_byte']:.4f} bits per byte", file=sys.stderr, flush=True)
    return line


def processor():
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def experiment(args, preset):
    """Both arms of a preset: the grid, then the seeds."""
    tokens, rates = PRESETS[preset]["tokens"], PRESETS[preset]["rates"]
    best = {}
    for arm in ARMS:
        grid = [train(args, preset, arm, rate, SEEDS[0], tokens // 4) for rate in rates]
        best[arm] = min(grid, key=lambda run: run["eval_loss"])["lr"]
    candidates = sorted(set(best.values()))
    for arm in ARMS:
        whole = [train(args, preset, arm, rate, SEEDS[0], tokens) for rate in candidates]
        best[arm] = min(whole, key=lambda run: run["eval_loss"])["lr"]
    for seed in SEEDS:
        for arm in ARMS:
            train(args, preset, arm, best[arm], seed, tokens)


def table(done):
    """Markdown: what each arm reached, and the paired difference."""
    rows = ["| preset | arm | learning rate | held-out bits per byte, by seed | mean | parameters, active | minutes a run | peak memory | tokens per parameter |",
            "|---|---|---|---|---|---|---|---|---|"]
    verdicts, others = [], []
    for preset, shape in PRESETS.items():
        reached = {}
        for arm in ARMS:
            whole = [r for r in done if (r["preset"], r["arm"], r["tokens"]) == (preset, arm, shape["tokens"])]
            if not whole:
                continue
            rate = min((r for r in whole if r["seed"] == SEEDS[0]), key=lambda r: r["eval_loss"])["lr"]
            runs = sorted((r for r in whole if r["lr"] == rate), key=lambda r: r["seed"])
            others += [r for r in whole if r["lr"] != rate]
            reached[arm] = {r["seed"]: r["bits_per_byte"] for r in runs}
            bits = [r["bits_per_byte"] for r in runs]
            first = runs[0]
            rows.append(
                f"| {preset} | {arm} | {first['lr']:g} | {', '.join(f'{b:.4f}' for b in bits)} | {statistics.mean(bits):.4f} "
                f"| {first['parameters'] / 1e6:.2f} M, {first['active_parameters'] / 1e6:.2f} M | {statistics.median(r['seconds'] for r in runs) / 60:.1f} "
                f"| {first['peak_memory_bytes'] / 1e9:.2f} GB | {shape['tokens'] / first['parameters']:.2f} |")
        if len(reached) == 2:
            seeds = sorted(set(reached["moe"]) & set(reached["dense"]))
            gaps = [reached["moe"][seed] - reached["dense"][seed] for seed in seeds]
            verdicts.append(f"{preset}: MoE minus dense, by seed: {', '.join(f'{gap:+.4f}' for gap in gaps)} bits per byte.")
    grids = []
    for preset, shape in PRESETS.items():
        for arm in ARMS:
            runs = [find(done, preset=preset, arm=arm, lr=rate, seed=SEEDS[0], tokens=shape["tokens"] // 4) for rate in shape["rates"]]
            if any(runs):
                shown = ", ".join(f"{r['lr']:g}: {r['bits_per_byte']:.4f}" for r in runs if r)
                grids.append(f"{preset}, {arm}, {shape['tokens'] // 4_000_000} M tokens, seed {SEEDS[0]}: {shown}.")
    grids += [f"{r['preset']}, {r['arm']}, {r['tokens'] // 1_000_000} M tokens, seed {r['seed']}: {r['lr']:g}: {r['bits_per_byte']:.4f}."
              for r in others]
    return "\n".join([*rows, "", *verdicts, "", "The grid:", "", *(f"- {grid}" for grid in grids)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="*", help=f"of {', '.join(PRESETS)} [all]")
    parser.add_argument("--data", type=Path, nargs="+", default=[Path.home() / ".cargo/registry/src"])
    parser.add_argument("--results", type=Path, default=ROOT / "docs/experiments/moe_against_dense.jsonl", help="[%(default)s]")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/moe_against_dense", help="where unfinished runs are [%(default)s]")
    parser.add_argument("--senmon", type=Path, default=ROOT / "target/release/senmon", help="the binary [%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="show what the runs say")
    parser.add_argument("--table", action="store_true", help="only print the table of what is done")
    args = parser.parse_args()
    unknown = [name for name in args.preset if name not in PRESETS]
    if unknown:
        parser.error(f"no preset {unknown[0]}; there are {', '.join(PRESETS)}")
    if not args.table:
        for preset in args.preset or PRESETS:
            experiment(args, preset)
    print(table(read(args.results)))


if __name__ == "__main__":
    main()
