"""Runs the binary `senmon`, and says how far two arrays of logits are apart."""

import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
BOUND = 1e-4  # of the largest logit


def add_binary(parser):
    """The flag --senmon."""
    parser.add_argument("--senmon", type=Path, default=ROOT / "target/release/senmon", help="the binary [%(default)s]")


def run(binary, *args):
    """Runs a command to its end; SystemExit with what it said if it fails."""
    command = [str(binary), *map(str, args)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise SystemExit(f"{binary}: {e.strerror}; build it with cargo build --release, or say --senmon PATH")
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ...: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def logits(binary, model, tokens):
    """Logits [S, V] f32 of token ids."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.safetensors"
        run(binary, "logits", model, "--tokens", ",".join(str(int(t)) for t in tokens), "--out", out)
        return load_file(out)["logits"]


def difference(ours, reference):
    """max |ours - reference| / max |reference|; infinite where shapes differ or a number is not finite."""
    if ours.shape != reference.shape or not torch.isfinite(ours).all():
        return float("inf")
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()
