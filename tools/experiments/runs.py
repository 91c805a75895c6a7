"""Training runs of an experiment: each finished one is a line of a results file, an unfinished one is gone on with.

Needs nothing but Python's standard library.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CRATES = Path(__file__).with_name("crates.txt")
REGISTRY = Path.home() / ".cargo/registry/src"
# Runs side by side write one file.
LOCK = threading.Lock()


def arguments(doc, results, work):
    """A parser with what all experiments take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="text [the crates of crates.txt in Cargo's registry]")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/experiments" / results, help="[%(default)s]")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / work, help="where unfinished runs are [%(default)s]")
    parser.add_argument("--senmon", type=Path, default=ROOT / "target/release/senmon", help="the binary [%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; best with --threads 1 [%(default)s]")
    parser.add_argument("--verbose", action="store_true", help="show what the runs say")
    parser.add_argument("--table", action="store_true", help="only print the table of what is done")
    return parser


def text(args):
    """The text to train on: what was given, or a folder of links to the crates that the results were made with."""
    if args.data:
        return args.data
    folder = args.work / "text"
    names = CRATES.read_text().split()
    found = {path.name: path for registry in REGISTRY.glob("*") for path in registry.iterdir()}
    missing = [name for name in names if name not in found]
    if missing:
        raise SystemExit(f"{len(missing)} crates of {CRATES.name} are not in {REGISTRY}, {missing[0]} for one: run cargo fetch")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            shutil.copytree(found[name], folder / name)
    return [folder]


def unknown(parser, what, given, known):
    """Ends with a line about the first of `given` that is not known."""
    odd = [name for name in given if name not in known]
    if odd:
        parser.error(f"no {what} {odd[0]!r}; there are {', '.join(map(repr, known))}")


def put_table(page, name, found):
    """Writes a table between its marks in a page, and prints it."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text()
    if begin in text and end in text:
        page.write_text(f"{text.split(begin)[0]}{begin}\n{found}\n{end}{text.split(end)[1]}")
    else:
        print(f"{page.name} has no place for the table", file=sys.stderr)
    print(found)


def read(path):
    """The finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(done, **wanted):
    """The finished run with these values, or none."""
    return next((run for run in done if all(run.get(key) == value for key, value in wanted.items())), None)


def processor():
    """The processor's name, with family and model: a name such as "AMD EPYC" is that of many."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    first = {key.strip(): value.strip() for key, colon, value in reversed([line.partition(":") for line in lines]) if colon}
    known = [name for name in ("cpu family", "model") if name in first]
    return ", ".join([first.get("model name", "unknown"), *(f"{name.removeprefix('cpu ')} {first[name]}" for name in known)])


def of_one_processor(done):
    """Of these runs those of the processor that most were made on: speeds of others are not compared with them."""
    counts = Counter(run["processor"] for run in done)
    return [run for run in done if run["processor"] == counts.most_common(1)[0][0]] if done else []


def train(args, name, what, settings):
    """One run to its end; its line in the results. `what` tells it apart, `settings` are its flags."""
    found = find(read(args.results), **what)
    if found:
        return found
    out = args.work / name
    command = [str(args.senmon), "train", "--out", str(out), "--json", "--threads", str(args.threads)]
    if (out / "senmon.toml").exists():
        command.append("--resume")
    else:
        shutil.rmtree(out, ignore_errors=True)
        command += ["--data", *map(str, text(args)), *settings]
    print(f"{name}: {'going on' if '--resume' in command else 'begins'}", file=sys.stderr, flush=True)
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=None if args.verbose else subprocess.DEVNULL, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {ended.returncode}")
    said = json.loads(ended.stdout)
    rates = [rate for step in read(out / "metrics.jsonl") if (rate := step.get("tokens_per_second"))]
    dead = [sum(share < 1e-3 / len(layer["load"]) for share in layer["load"]) for layer in said["load"]]
    line = {
        **what,
        "bits_per_byte": said["eval"]["bits_per_byte"],
        "eval_loss": said["eval"]["eval_loss"],
        "domains": {domain: figures["bits_per_byte"] for domain, figures in said["eval"]["domains"].items()},
        "parameters": said["parameters"],
        "active_parameters": said["active_parameters"],
        "flops_per_token": said["flops_per_token"],
        "seconds": said["seconds"],
        # Of the median step: what else the machine did, and whether the run was interrupted, plays no part.
        "tokens_per_second": statistics.median(rates),
        "peak_memory_bytes": said["peak_memory_bytes"],
        "load_cv": [layer["cv"] for layer in said["load"]],
        "dead": dead,
        "drops": [layer.get("drops", 0) for layer in said["load"]],
        "text_documents": said["data"]["documents"],
        "text_bytes": said["data"]["bytes"],
        "processor": processor(),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with LOCK, args.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(out, ignore_errors=True)
    print(f"{name}: {line['bits_per_byte']:.4f} bits per byte", file=sys.stderr, flush=True)
    return line


def train_all(args, wanted):
    """Runs that do not wait for each other, each as `train` has it: (name, what, settings). Their lines, in order."""
    text(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        return [ended.result() for ended in [pool.submit(train, args, *one) for one in wanted]]
