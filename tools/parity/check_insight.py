"""Computes the statistics of a routing trace with numpy, and compares them with those of senmon-insight.

Counts must be equal, all else within 1e-6 relative. Each function below is a statistic, named as in docs/insight.md; the words
for experts are rules, not numbers, and the search for a placement is ours alone: of a suggestion only the cost is computed again.
Plain loops: minutes for a few thousand tokens.

    senmon inspect RUN --trace TRACE --json > OURS.json
    cargo run --release -p senmon-insight --example statistics -- TRACE > OURS.json    (or so, of any trace)
    python tools/parity/check_insight.py TRACE OURS.json
    python tools/parity/check_insight.py --write      # the golden files of crates/insight/tests/golden

OURS.json has "options" and "statistics", or has them under "routing". Exit 0 if all agree.
"""

import argparse
import json
import math
import sys
from bisect import bisect
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import numpy as np
from safetensors import safe_open

GOLDEN = Path(__file__).resolve().parents[2] / "crates/insight/tests/golden"
RELATIVE, ABSOLUTE = 1e-6, 1e-12
EMPTY, NONE, MASK = 0xFFFF, 0xFFFFFFFF, (1 << 64) - 1
OPTIONS = {"seed": 3, "shuffles": 4, "min_occurrences": 4, "matrices_up_to": 128, "pairs": 6, "path_layers": 2, "paths": 5,
           "ranks": [2, 3], "balance": 1.0, "placement_tokens": 8192}

# The random numbers of senmon_moe::rng, and orders drawn with them.


def mix(z):
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def shuffled(coordinates, n):
    """An order of 0..n, by Fisher and Yates from the highest place down."""
    state, order = 0x5E4D0F5E4D, list(range(n))
    for c in coordinates:
        state = mix(state ^ mix((c + 0x9E3779B97F4A7C15) & MASK))
    for i in range(n - 1, 0, -1):
        draw = mix(state ^ ((i * 0x9E3779B97F4A7C15) & MASK))
        j = (draw * (i + 1)) >> 64
        order[i], order[j] = order[j], order[i]
    return order


# What statistics are made of.


def number(x):
    """A number, or None where it is none."""
    return float(x) if x is not None and np.isfinite(x) else None


def div(a, b):
    return float(a) / float(b) if b else None


def mean(values):
    """The mean of those that are numbers."""
    values = [float(v) for v in values if v is not None]
    return sum(values) / len(values) if values else None


def figure(value, chance=None, by_load=None):
    return {"value": number(value), "chance": number(chance), "by_load": number(by_load)}


def distribution(values):
    x = np.asarray([v for v in values if np.isfinite(v)])
    if not len(x):
        return None
    p = np.percentile(x, [5, 25, 50, 75, 95])
    return {"count": len(x), "mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max(),
            **dict(zip(["p05", "p25", "p50", "p75", "p95"], p))}


def entropy(counts):
    p = np.asarray(counts, float).ravel()
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def nats(table):
    return max(entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table), 0.0) if table.sum() else 0.0


def normalized(table):
    most = math.sqrt(entropy(table.sum(1)) * entropy(table.sum(0))) if table.sum() else 0
    return min(nats(table) / most, 1.0) if most > 1e-9 else None


def information(table, each):
    rows, columns = (table.sum(1) > 0).sum(), (table.sum(0) > 0).sum()
    expected = max(rows - each, 0) * max(columns - 1, 0) / (2 * table.sum()) if table.sum() else 0.0
    return {"nats": nats(table), "normalized": normalized(table), "expected": expected, "shuffled": None,
            "shuffled_normalized": None}


def greatest(n):
    """By how many deviations the greatest of n values of a fixed sum lies above their mean."""
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) * math.sqrt(n / (n - 1)) if n > 1 else 0.0


def apart(e, m, k):
    return math.comb(e - m, k) / math.comb(e, k) if e - m >= k else 0.0


class Layer:
    """A layer of a trace: slots [N, K]; has [N, E], whether a token has an expert; sets, its experts in order."""

    def __init__(self, tensors, number, experts, name):
        self.number, self.name = number, name
        part = lambda what: tensors.get(f"{what}.{number}")
        self.slots, self.weights, self.dropped, self.logits = (part(w) for w in ("experts", "weights", "dropped", "logits"))
        ids = self.slots[self.slots != EMPTY]
        self.e = experts if experts is not None else int(ids.max(initial=-1)) + 1
        self.k = self.slots.shape[1]
        self.sets = [list(dict.fromkeys(int(e) for e in row if e < self.e)) for row in self.slots]
        self.has = np.zeros((len(self.slots), self.e), bool)
        for row, experts in enumerate(self.sets):
            self.has[row, experts] = True
        self.first = np.array([s[0] if s else -1 for s in self.sets])
        self.seen = np.flatnonzero((self.slots != EMPTY).any(1) | self.dropped.any(1))
        self.n, self.counts = len(self.seen), self.has.sum(0)
        self.mean_k = self.counts.sum() / self.n if self.n else 0.0
        self.even = div(self.mean_k, self.e)


class Trace:
    def __init__(self, path):
        with safe_open(path, "numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            about = file.metadata()
        self.about, self.domain_names = about, json.loads(about["domains"])
        for column in ("tokens", "sequence", "position", "targets", "predicted", "loss", "domains"):
            setattr(self, column, tensors[column])
        self.document = tensors.get("documents", self.sequence)
        numbers = json.loads(about["layers"])
        experts = json.loads(about["experts"]) if "experts" in about else [None] * len(numbers)
        names = json.loads(about["names"]) if "names" in about else [str(n) for n in numbers]
        names = [None if name == str(n) else name for n, name in zip(numbers, names)]
        self.layers = [Layer(tensors, *of) for of in zip(numbers, experts, names)]
        self.n = len(self.tokens)
        by = np.lexsort((self.position, self.sequence))
        self.texts = [by[self.sequence[by] == s] for s in np.unique(self.sequence)]
        self.neighbours = [(a, b) for rows in self.texts for a, b in zip(rows, rows[1:])
                           if int(self.position[a]) + 1 == int(self.position[b])]


# The statistics.


def load(layer, _trace, _options):
    slots, w, e, n = layer.slots.ravel(), layer.weights.ravel().astype(float), layer.e, layer.n
    real = slots < e
    counts = np.bincount(slots[real], minlength=e)
    importance, total, p = np.bincount(slots[real], w[real], minlength=e), counts.sum(), layer.even
    cv = math.sqrt(max(1 - p, 0) / (n * p)) if p else None
    dead = [i for i in range(e) if counts[i] < 0.001 * total / e] if total else []
    return {"tokens": n, "assignments": total, "idle": ((slots != EMPTY) & ~real).sum(), "dropped": layer.dropped.sum(),
            "experts_per_token": div(total, n), "counts": counts, "shares": [div(c, total) for c in counts],
            "importance": importance, "mean_weights": [div(a, b) for a, b in zip(importance, counts)],
            "cv": figure(div(counts.std(), counts.mean()), cv), "dead": dead,
            "importance_cv": figure(importance.std() / importance.mean(), cv),
            "max_over_mean": figure(counts.max() / counts.mean(), 1 + cv * greatest(e)),
            "entropy": figure(entropy(counts) / math.log(e), max(1 - cv**2 / (2 * math.log(e)), 0)),
            "dead_count": figure(len(dead), e * (1 - p) ** n)}


def confidence(layer, _trace, _options):
    filled = [layer.weights[r][layer.slots[r] != EMPTY].astype(float) for r in layer.seen]
    top, alike = [w.max() for w in filled if len(w)], [w.mean() for w in filled if len(w)]
    margin = [np.sort(w)[-1] - np.sort(w)[-2] for w in filled if len(w) > 1]
    p, nats = np.zeros((0, layer.e)), []
    if layer.logits is not None:
        z = layer.logits[layer.seen].astype(float)
        p = -np.sort(-np.exp(z - z.max(1, keepdims=True)), 1)
        p /= p.sum(1, keepdims=True)
        picked = [((layer.slots[r] != EMPTY) | (layer.dropped[r] == 1)).sum() for r in layer.seen]
        margin = [row[k - 1] - row[k] for row, k in zip(p, picked) if 0 < k < layer.e]
        nats = [entropy(row) / math.log(layer.e) for row in p]
    found = {"weight": top, "probability": p.max(1), "margin": margin, "entropy": nats}
    found = {key: distribution(values) for key, values in found.items()}
    chance = {"weight": mean(alike), "probability": 1 / layer.e, "margin": 0.0, "entropy": 1.0}
    return found | {f"mean_{key}": figure(of and of["mean"], of and chance[key]) for key, of in found.items()}


def coactivation(layer, _trace, options):
    n = layer.has.T.astype(int) @ layer.has
    e, own = layer.e, n.diagonal()
    partners = n.sum(1) - own
    pull = [partners[i] / own[i] / (own.sum() - own[i]) if own[i] and own.sum() > own[i] else None for i in range(e)]
    by_load = [[(1.0 if own[i] else None) if i == j else pull[i] and pull[i] * own[j] for j in range(e)] for i in range(e)]
    by_load = [[0.0 if pull[i] == 0 and i != j else x for j, x in enumerate(row)] for i, row in enumerate(by_load)]
    even = max((layer.mean_k - 1) / (e - 1), 0)
    expected = lambda i, j: ((by_load[i][j] or 0) * own[i] + (by_load[j][i] or 0) * own[j]) / 2
    pairs = [(i, j, expected(i, j)) for i in range(e) for j in range(i + 1, e)]
    pairs = sorted((p for p in pairs if n[p[0], p[1]] > p[2] > 0), key=lambda p: (p[2] - n[p[0], p[1]]) / p[2] ** 0.5)
    pair = lambda i, j, x: {"experts": [i, j], "tokens": figure(n[i, j], even * layer.even * layer.n, x), "lift": n[i, j] / x}
    return {"counts": n, "shares": [[div(x, own[i]) for x in row] for i, row in enumerate(n)], "even": even,
            "by_load": by_load, "pairs": [pair(*p) for p in pairs[: options["pairs"]]]}


def table(layer, classes, count):
    """Tokens of each class at each expert: [E, C]."""
    out = np.zeros((layer.e, count), int)
    for row in layer.seen:
        out[layer.sets[row], classes[row]] += 1
    return out


def specialization(layer, classes, count):
    t, size = table(layer, classes, count), np.bincount(classes[layer.seen], minlength=count)
    return {"tokens": size, "counts": t, "of_class": [[div(x, size[c]) for c, x in enumerate(row)] for row in t],
            "even": layer.even, "by_load": [div(x, layer.n) for x in layer.counts],
            "of_expert": [[div(x, layer.counts[i]) for x in row] for i, row in enumerate(t)],
            "by_size": [div(x, layer.n) for x in size], "information": information(t, layer.mean_k)}


def domains(layer, trace, options):
    count, found = len(trace.domain_names), specialization(layer, trace.domains.astype(int), len(trace.domain_names))
    rows = np.concatenate(trace.texts)
    kinds = np.stack([trace.document[rows], trace.domains[rows]]).astype(int)
    blocks = np.split(rows, np.flatnonzero(np.diff(kinds).any(0)) + 1)
    drawn = []
    for round in range(options["shuffles"]):
        moved = np.zeros(trace.n, int)
        for rows, source in zip(blocks, shuffled([options["seed"], 0x646F6D61, round], len(blocks))):
            moved[rows] = trace.domains[blocks[source][0]]
        drawn.append(table(layer, moved, count))
    found["information"]["shuffled"] = mean(nats(t) for t in drawn)
    found["information"]["shuffled_normalized"] = mean(normalized(t) for t in drawn)
    return found


def positions(layer, trace, _options):
    classes = np.array([(int(p) + 1).bit_length() - 1 for p in trace.position])
    count = classes.max() + 1
    return {"from": [(1 << c) - 1 for c in range(count)], "experts": specialization(layer, classes, count)}


def by_ids(layer, ids, kind, options):
    rows = sorted((r for r in layer.seen if ids[r] != NONE), key=lambda r: (ids[r], r))
    groups, k = Counter(int(ids[r]) for r in rows), max(math.floor(layer.mean_k + 0.5), 1)
    ends = np.cumsum([groups[i] for i in sorted(groups)])
    spans = [(end - groups[i], end) for i, end in zip(sorted(groups), ends) if groups[i] >= options["min_occurrences"]]

    def sums(rows):
        counts = [(-np.sort(-layer.has[rows[a:b]].sum(0)), b - a) for a, b in spans]
        return np.array([sum(c[0] / n for c, n in counts), sum(c[0] for c, _ in counts),
                         sum(c[:k].sum() / c.sum() for c, _ in counts)])

    if not spans:
        return {"ids": 0, "occurrences": 0} | dict.fromkeys(["favourite", "favourite_by_occurrence", "favourites"], figure(None))
    over = [len(spans), sum(b - a for a, b in spans), len(spans)]
    seeds = [[options["seed"], 0x766F6361, layer.number, kind, round] for round in range(options["shuffles"])]
    chance = np.mean([sums([rows[i] for i in shuffled(seed, len(rows))]) for seed in seeds], 0)
    names = ["favourite", "favourite_by_occurrence", "favourites"]
    return {"ids": over[0], "occurrences": over[1]} | {
        name: figure(a / n, b / n) for name, a, b, n in zip(names, sums(rows), chance, over)}


def vocabulary(layer, trace, options):
    kinds = enumerate([("input", trace.tokens), ("target", trace.targets), ("predicted", trace.predicted)])
    return {name: by_ids(layer, ids, kind, options) for kind, (name, ids) in kinds}


def repeat(layer, pairs, salt, options):
    n, e = len(pairs), layer.e
    common = lambda a, b: bool(set(layer.sets[a]) & set(layer.sets[b]))
    same = sum(layer.first[a] == layer.first[b] >= 0 for a, b in pairs)
    shared = sum(common(a, b) for a, b in pairs)
    left, right = (np.bincount([layer.first[p[i]] for p in pairs if layer.first[p[i]] >= 0], minlength=e) for i in (0, 1))
    even = mean(1 - apart(e, len(layer.sets[a]), len(layer.sets[b])) for a, b in pairs)
    orders = [shuffled([options["seed"], 0x72657065, layer.number, salt, r], n) for r in range(options["shuffles"])]
    drawn = mean(common(a, pairs[to][1]) for order in orders for (a, _), to in zip(pairs, order))
    return {"pairs": n, "same_first": same, "common": shared,
            "first_rate": figure(div(same, n), 1 / e if n else None, div((left * right).sum(), n**2)),
            "common_rate": figure(div(shared, n), even, drawn)}


def repeats(layer, trace, options):
    seen = set(layer.seen)
    pairs = [(a, b) for a, b in trace.neighbours if a in seen and b in seen]
    of = lambda d: [(a, b) for a, b in pairs if trace.domains[a] == d]
    every = range(len(trace.domain_names))
    return {"all": repeat(layer, pairs, 0, options), "domains": [repeat(layer, of(d), d + 1, options) for d in every]}


def batches(layer, trace, _options):
    longest, seen = max(len(rows) for rows in trace.texts), set(layer.seen)
    steps = [[rows[s] for rows in trace.texts if s < len(rows) and rows[s] in seen] for s in range(longest)]
    out, b = [], 1
    while b <= max(len(step) for step in steps):
        groups = [step[i : i + b] for step in steps for i in range(0, len(step) - b + 1, b)]
        value = np.mean([layer.has[group].any(0).sum() for group in groups])
        found = [value, layer.e * (1 - (1 - layer.even) ** b), (1 - (1 - layer.counts / layer.n) ** b).sum()]
        shares = [x / layer.e for x in found]
        out.append({"tokens": b, "batches": len(groups), "distinct": figure(*found), "share": figure(*shares)})
        b *= 2
    return out


def hits(sets, size, keep):
    """Hits of a cache that holds the `size` experts of which keep(time, expert) is least."""
    held, found = set(), 0
    for t, experts in enumerate(sets):
        found += len(held & set(experts))
        held = set(sorted(held | set(experts), key=lambda e: keep(t, e))[:size])
    return found


def uses(sets):
    """When each expert is used, and as which of a token's choices."""
    found = {}
    for t, experts in enumerate(sets):
        for at, e in enumerate(experts):
            times, places = found.setdefault(e, ([], []))
            times.append(t), places.append(at)
    return found


def lru_hits(sets, e):
    used = uses(sets)
    last = lambda t, x: bisect(used[x][0], t) - 1
    # Later is better; of one token's experts the first choice is the latest.
    keep = lambda t, x: (-used[x][0][last(t, x)], used[x][1][last(t, x)])
    return [hits(sets, size, keep) for size in range(1, e + 1)]


def best_hits(sets, e):
    used = uses(sets)
    keep = lambda t, x: ((used[x][0] + [math.inf])[bisect(used[x][0], t)], x)
    return [hits(sets, size, keep) for size in range(1, e + 1)]


def cache(layer, trace, options):
    seen = set(layer.seen)
    rows = [r for text in trace.texts for r in text if r in seen]
    sets, total = [layer.sets[r] for r in rows], int(layer.counts.sum())
    order = shuffled([options["seed"], 0x63616368, layer.number], len(rows))
    lru, best, rates = lru_hits(sets, layer.e), best_hits(sets, layer.e), lambda x: [div(n, total) for n in x]
    return {"requests": total, "lru_hits": lru, "lru": rates(lru), "chance": [s / layer.e for s in range(1, layer.e + 1)],
            "shuffled": rates(lru_hits([sets[i] for i in order], layer.e)),
            "fixed": rates(np.cumsum(-np.sort(-layer.counts))), "best_hits": best, "best": rates(best)}


def cost(trace, e, sets, rows, ranks, of):
    home = {r: i % ranks for i, text in enumerate(trace.texts) for r in text}
    pairs, used = np.zeros((ranks, ranks), int), np.bincount([x for r in rows for x in sets[r]], minlength=e)
    for r in rows:
        pairs[home[r], list({of[x] for x in sets[r]})] += 1
    sent, n, sizes = pairs.sum() - pairs.trace(), len(rows), np.bincount(of, minlength=ranks)
    even = np.mean([sum((1 - 1 / ranks) * (1 - apart(e, int(m), len(sets[r]))) for m in sizes) for r in rows])
    loads, m = np.bincount(of, used, minlength=ranks).astype(int), e / ranks
    spread = math.sqrt(m * used.var() * (e - m) / (e - 1)) / (m * used.mean())
    return {"tokens": n, "pairs": pairs, "sent": sent, "sent_per_token": figure(sent / n, even), "loads": loads,
            "imbalance": figure(loads.max() / loads.mean(), None, 1 + spread * greatest(ranks))}


def contiguous(e, ranks):
    return [i * ranks // e for i in range(e)]


def placement(layer, trace, options, ours=None):
    each = [{"ranks": r, "contiguous": cost(trace, layer.e, layer.sets, layer.seen, r, contiguous(layer.e, r))}
            for r in options["ranks"] if r <= layer.e]
    for found, said in zip(each, ours or []):
        found["suggested"] = cost(trace, layer.e, layer.sets, layer.seen, found["ranks"], said["placement"])
    return each


def elsewhere(made, tried):
    if not made.sum() or not tried.sum():
        return figure(None)
    busiest = made.sum(0).argmax()
    guesses = [row.argmax() if row.any() else busiest for row in made]
    return figure(tried[range(len(tried)), guesses].sum() / tried.sum(), 1 / made.shape[1], tried[:, busiest].sum() / tried.sum())


def transition(a, b, trace):
    halves = np.zeros((2, a.e, b.e), int)
    for x, y, document in zip(a.first, b.first, trace.document):
        halves[document % 2, x, y] += x >= 0 and y >= 0
    t = halves.sum(0)
    n, guess = t.sum(), t.max(1).sum()
    return {"layers": [a.number, b.number], "tokens": n, "counts": t, "shares": [[div(x, row.sum()) for x in row] for row in t],
            "by_load": t.sum(0) / n, "information": information(t, 1), "guess": figure(guess / n, 1 / b.e, t.sum(0).max() / n),
            "guess_elsewhere": elsewhere(*halves)}


def paths(layers, options):
    rows = [row for row in zip(*(layer.first for layer in layers)) if min(row) >= 0]
    n, loads = len(rows), [np.bincount([row[i] for row in rows], minlength=layer.e) for i, layer in enumerate(layers)]
    found = sorted(Counter(rows).items(), key=lambda of: (-of[1], of[0]))
    by_load = lambda path: math.prod(load[e] / n for load, e in zip(loads, path))
    path = lambda p, c: {"experts": list(p), "tokens": c, "share": figure(c / n, 1 / math.prod(x.e for x in layers), by_load(p))}
    return {"layers": [x.number for x in layers], "tokens": n, "distinct": len(found),
            "frequent": [path(*of) for of in found[: options["paths"]]]}


def saturation(then, end):
    out = []
    for a, b in zip(then.layers, end.layers):
        rows = [r for r in range(then.n) if a.sets[r] and b.sets[r]]
        p = a.has[rows].mean(0)
        same = np.mean([len(set(a.sets[r]) & set(b.sets[r])) / len(b.sets[r]) for r in rows])
        even, by_load = np.mean([len(a.sets[r]) / a.e for r in rows]), np.mean([p[b.sets[r]].mean() for r in rows])
        first = np.mean(a.first[rows] == b.first[rows])
        q = [np.bincount(x.first[rows], minlength=a.e) / len(rows) for x in (a, b)]
        out.append({"layer": a.number, "tokens": len(rows), "experts": figure(same, even, by_load),
                    "first": figure(first, 1 / a.e, (q[0] * q[1]).sum())})
    return out


def choices(layer, k):
    """Slots and what ranks them under another K: [N, K]."""
    if k <= layer.k:
        return layer.slots[:, :k].copy(), layer.weights[:, :k].astype(np.float32)
    slots, ranks = np.full((len(layer.slots), k), EMPTY), np.zeros((len(layer.slots), k), np.float32)
    for r in layer.seen:
        z = layer.logits[r].astype(float)
        more = [e for e in np.argsort(-z, kind="stable") if e not in layer.slots[r]][: k - layer.k]
        slots[r, : layer.k + len(more)] = [*layer.slots[r], *more]
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        ranks[r] = [p[e] if e < layer.e else 0 for e in slots[r]]
    return slots, ranks


def dropped(layer, slots, ranks, capacity):
    """Empties the slots that find their expert full; the share that chance drops."""
    n, k = slots.shape
    size, p, over = capacity["batch"] or n, min(k / layer.e, 1), 0.0
    for start in range(0, n, size):
        rows = range(start, min(start + size, n))
        t = len(set(rows) & set(layer.seen))
        room = Counter({e: max(math.ceil(capacity["factor"] * k * t / layer.e - 1e-9), 0) for e in range(layer.e)})
        over += layer.e * sum(max(x - room[0], 0) * math.comb(t, x) * p**x * (1 - p) ** (t - x) for x in range(t + 1))
        if capacity["drop"] == "priority":
            rows = sorted(rows, key=lambda r: -ranks[r].max())
        for s, r in ((s, r) for s in range(k) for r in rows):
            if slots[r, s] < layer.e:
                room[slots[r, s]] -= 1
                slots[r, s] = EMPTY if room[slots[r, s]] < 0 else slots[r, s]
    return over / (p * layer.e * layer.n)


def replay(trace, scenario):
    out = []
    for layer in trace.layers:
        k, e = scenario.get("top_k") or layer.k, layer.e
        slots, ranks = choices(layer, k)
        before = (slots != EMPTY).sum()
        chance = dropped(layer, slots, ranks, scenario["capacity"]) if "capacity" in scenario else None
        after, counts = (slots != EMPTY).sum(), np.bincount(slots[slots < e], minlength=e)
        sets = [list(dict.fromkeys(int(x) for x in row if x < e)) for row in slots]
        found = {"layer": layer.number, "name": layer.name, "experts": e, "top_k": k, "tokens": layer.n,
                 "assignments": counts.sum(), "idle": after - counts.sum(), "dropped_before": layer.dropped[:, :k].sum(),
                 "dropped": before - after, "dropped_rate": figure(div(before - after, before), chance),
                 "without": (slots[layer.seen] == EMPTY).all(1).sum(), "counts": counts, "ranks": None, "cache": None}
        p = min(sum(map(len, sets)) / layer.n / e, 1)
        cv = math.sqrt((1 - p) / p / layer.n)
        found["max_over_mean"] = figure(counts.max() / counts.mean(), 1 + cv * greatest(e))
        if "ranks" in scenario:
            r = scenario["ranks"]["ranks"]
            of = scenario["ranks"]["placements"].get(str(layer.number), {"of": contiguous(e, r)})["of"]
            found["ranks"] = cost(trace, e, sets, layer.seen, r, of)
        if "cache" in scenario:
            size, rows = scenario["cache"], [r for text in trace.texts for r in text if r in set(layer.seen)]
            used, total = lru_hits([sets[r] for r in rows], e)[min(size, e) - 1], sum(map(len, sets))
            found["cache"] = {"size": size, "requests": total, "hits": used, "rate": figure(used / total, min(size, e) / e)}
        out.append(found)
    return out


LAYER = {"load": load, "confidence": confidence, "coactivation": coactivation, "domains": domains, "vocabulary": vocabulary,
         "positions": positions, "repeats": repeats, "batches": batches, "cache": cache}


def statistics(trace, options, ours=None):
    """All of one trace. `ours` says which placements were suggested."""
    out, w = [], min(max(options["path_layers"], 1), len(trace.layers))
    for at, layer in enumerate(trace.layers):
        found = {"layer": layer.number, "name": layer.name, "experts": layer.e, "top_k": layer.k}
        found |= {name: of(layer, trace, options) for name, of in LAYER.items()}
        found["placement"] = placement(layer, trace, options, ours and ours["layers"][at]["placement"])
        out.append(found)
    windows = [trace.layers[i : i + w] for i in range(len(trace.layers) - w + 1)]
    windows += [trace.layers] if w < len(trace.layers) else []
    return {"model": trace.about["model"], "router": trace.about["router"], "domains": trace.domain_names, "tokens": trace.n,
            "texts": len(trace.texts), "loss": number(trace.loss[np.isfinite(trace.loss)].astype(float).mean()), "layers": out,
            "transitions": [transition(a, b, trace) for a, b in zip(trace.layers, trace.layers[1:])],
            "paths": [p for p in (paths(of, options) for of in windows) if p["tokens"]]}


# The golden files, and comparing.


def plain(x):
    """As JSON has it."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [plain(value) for value in x]
    if isinstance(x, (np.integer, np.bool_)):
        return int(x)
    return float(x) if isinstance(x, np.floating) else x


def differences(ours, theirs, where=""):
    """What of numpy's is otherwise in ours, line by line."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key, value in theirs.items():
            yield from differences(ours.get(key, "missing"), value, f"{where}.{key}")
    elif isinstance(theirs, list) and isinstance(ours, list) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs)):
            yield from differences(a, b, f"{where}[{i}]")
    elif isinstance(theirs, float) and isinstance(ours, (int, float)):
        if abs(ours - theirs) > max(RELATIVE * abs(theirs), ABSOLUTE):
            yield f"{where}: {ours}, numpy {theirs}"
    elif ours != theirs:
        yield f"{where}: {ours}, numpy {theirs}"


def made(seed, later=False):
    """A small trace in which experts have to do with domains, ids, places and earlier layers; rows in no order."""
    rng, lengths = np.random.default_rng(seed), [18, 25, 9, 31, 14, 22, 17, 28, 12, 20, 16, 23]
    sequence = np.repeat(np.arange(len(lengths)) * 3 + 1, lengths)
    n, position = len(sequence), np.concatenate([np.arange(x) for x in lengths])
    domains = np.repeat([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1], lengths)
    domains[(sequence == 10) & (position > 15)] = 1
    tokens = np.minimum(rng.geometric(0.12, n) + 3 * domains, 30).astype(np.uint32)
    follows = np.append((sequence[1:] == sequence[:-1]), False)
    targets = np.where(follows, np.append(tokens[1:], 0), NONE).astype(np.uint32)
    columns = {"tokens": tokens, "targets": targets,
               "sequence": sequence.astype(np.uint32), "position": position.astype(np.uint32),
               "predicted": np.where(rng.random(n) < 0.4, targets, rng.integers(0, 30, n)).astype(np.uint32),
               "loss": np.where(follows, rng.exponential(2, n), np.nan).astype(np.float32), "domains": domains.astype(np.uint16)}
    before, shift = np.zeros((n, 8)), np.random.default_rng(2).normal(0, 0.6 if later else 0, (3, n, 8))
    for l, e, k in ((0, 8, 2), (2, 6, 1), (3, 7, 3)):
        z = rng.normal(0, 1, (n, e)) + shift[min(l, 2), :, :e] + 1.5 * rng.normal(0, 1, (31, e))[tokens]
        z += rng.normal(0, 1, (3, e))[domains] + 0.8 * before[:, :e]
        z += (position[:, None] < 2) * (np.arange(e) == 1) - 1.2 * (np.arange(e) == 5)
        z = z.astype(np.float32)
        experts = np.argsort(-z, 1, kind="stable")[:, :k].astype(np.uint16)
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        weights, dropped = np.take_along_axis(p, experts.astype(int), 1).astype(np.float32), np.zeros((n, k), np.uint8)
        if l == 3:
            # An expert that computes nothing, drops, tokens with fewer experts, tokens that the layer did not see.
            experts[rng.random((n, k)) < 0.08] = 7
            for chance, sort in ((0.07, 1), (0.07, 0)):
                out = rng.random((n, k)) < chance
                experts[out], weights[out], dropped[out] = EMPTY, 0, sort
            out = rng.random(n) < 0.05
            experts[out], weights[out], dropped[out] = EMPTY, 0, 0
        else:
            columns[f"logits.{l}"] = z
        columns |= {f"experts.{l}": experts, f"weights.{l}": weights, f"dropped.{l}": dropped}
        before = np.pad(np.roll(z, 1, 1), ((0, 0), (0, 2)))
    order = np.random.default_rng(1).permutation(n)
    return {key: np.ascontiguousarray(values[order]) for key, values in columns.items()}


SCENARIOS = [
    {},
    {"top_k": 1, "cache": 3},
    {"capacity": {"factor": 1.0, "batch": 64, "drop": "position"},
     "ranks": {"ranks": 3, "placements": {"2": {"ranks": 3, "of": [2, 0, 1, 1, 0, 2]}}}},
    {"capacity": {"factor": 0.8, "batch": 0, "drop": "priority"}, "cache": 20},
    {"layers": [0, 2], "top_k": 4, "capacity": {"factor": 0.75, "batch": 50, "drop": "priority"},
     "ranks": {"ranks": 2, "placements": {}}},
]


def saved(tensors, about):
    """The bytes of a safetensors file, always the same: the package's own `save` has metadata in any order."""
    names = {np.dtype(x): y for x, y in ((np.uint8, "U8"), (np.uint16, "U16"), (np.uint32, "U32"), (np.float32, "F32"))}
    header, at, ordered = {"__metadata__": about}, 0, sorted(tensors.items(), key=lambda of: -of[1].itemsize)
    for name, x in ordered:
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [at, at := at + x.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(x.astype(x.dtype.newbyteorder("<")).tobytes() for _, x in ordered)


def write():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    about = {"model": "made", "router": "topk_pre", "domains": json.dumps(["prose", "code", "lists"]), "layers": "[0, 2, 3]",
             "names": json.dumps(["0", "2", "last"]), "experts": "[8, 6, 7]"}
    for name, later in (("trace", False), ("later", True)):
        (GOLDEN / f"{name}.safetensors").write_bytes(saved(made(7, later), about))
    trace, later = Trace(GOLDEN / "trace.safetensors"), Trace(GOLDEN / "later.safetensors")
    replays = []
    for scenario in SCENARIOS:
        # `layers` are those that have what the scenario needs.
        numbers = scenario.get("layers", [0, 2, 3])
        some, asked = Trace(GOLDEN / "trace.safetensors"), {k: v for k, v in scenario.items() if k != "layers"}
        some.layers = [layer for layer in some.layers if layer.number in numbers]
        replays.append({"layers": numbers, "scenario": asked, "replayed": replay(some, asked)})
    golden = {"options": OPTIONS, "statistics": statistics(trace, OPTIONS), "saturation": saturation(trace, later)}
    golden["replays"] = replays
    (GOLDEN / "statistics.json").write_text(json.dumps(plain(golden), allow_nan=False) + "\n")
    print(f"wrote {GOLDEN}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("ours", nargs="?", type=Path, help="JSON of `senmon inspect`, or of the example `statistics`")
    parser.add_argument("--write", action="store_true", help="write the golden files")
    args = parser.parse_args()
    if args.write:
        return write()
    if not args.trace or not args.ours:
        parser.error("TRACE and OURS.json, or --write")
    said = json.loads(args.ours.read_text())
    said = said.get("routing", said)
    found = list(differences(said["statistics"], plain(statistics(Trace(args.trace), said["options"], said["statistics"]))))
    print("\n".join(found[:40]) or "all agree")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
