"""Writes crates/compare/tests/golden/statistics.json: Student's t, paired and crossed intervals, ratios and Holm's correction by scipy and
plain numpy, for crates/compare/tests/golden.rs.

    tools/.venv/bin/python tools/parity/make_compare.py
"""

import json
from pathlib import Path

import numpy as np
import scipy
from scipy import stats

GOLDEN = Path(__file__).resolve().parents[2] / "crates/compare/tests/golden/statistics.json"


def interval(estimate, error, df, alpha):
    low, high = stats.t.interval(1 - alpha, df, loc=estimate, scale=error)
    return {"estimate": estimate, "low": low, "high": high, "df": df, "p": 2 * stats.t.sf(abs(estimate / error), df)}


def paired(differences, alpha):
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(1 - alpha)
    return {"estimate": np.mean(differences), "low": low, "high": high, "df": len(differences) - 1.0, "p": test.pvalue}


def crossed(d, weights, alpha):
    """Two crossed random effects by the sums of squares of a two-way analysis of variance without replication."""
    n, g = d.shape
    share = weights / weights.sum()
    estimate = (d @ share).mean()
    z = estimate + g * share * (d - estimate)
    ms_seed = g * np.var(z.mean(1), ddof=1)
    ms_block = n * np.var(z.mean(0), ddof=1)
    rest = z - z.mean(1, keepdims=True) - z.mean(0, keepdims=True) + z.mean()
    ms_rest = (rest**2).sum() / ((n - 1) * (g - 1))
    parts = np.array([ms_seed, ms_block, ms_rest]) / (n * g)
    variance = max(parts[0] + parts[1] - parts[2], parts[0], parts[1])
    return interval(estimate, np.sqrt(variance), min(n, g) - 1.0, alpha)


def holm(p):
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1, p[order] * np.arange(len(p), 0, -1))
    out = np.empty_like(p)
    out[order] = np.maximum.accumulate(steps)
    return out


def plain(value):
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(one) for one in value]
    return float(value)


def main():
    rng = np.random.default_rng(7)
    freedoms = [1, 2, 2.5, 4, 9, 30, 200]
    student = [{"t": t, "df": df, "cdf": stats.t.cdf(t, df)} for df in freedoms for t in [-40, -3.2, -0.5, 0.0, 0.01, 1.0, 2.7, 12.0]]
    quantiles = [{"alpha": a, "df": df, "t": stats.t.isf(a / 2, df)} for df in freedoms for a in [0.5, 0.05, 0.01, 0.05 / 7, 1e-6]]
    pairs, ratios, grids = [], [], []
    for n in [2, 3, 5, 12]:
        d = rng.normal(0.05, 0.1, n)
        pairs.append({"differences": d, "alpha": 0.05, "interval": paired(d, 0.05)})
        r = np.exp(rng.normal(-0.4, 0.2, n))
        without = np.log(r).mean() + rng.normal(0, 0.01, 10)
        jackknife = 9 / 10 * ((without - without.mean()) ** 2).sum()
        i = interval(np.log(r).mean(), np.sqrt(np.var(np.log(r), ddof=1) / n + jackknife), min(n, 10) - 1.0, 0.05 / 3)
        ratios.append({"ratios": r, "without": without, "alpha": 0.05 / 3, "interval": {**i, **{key: np.exp(i[key]) for key in ["estimate", "low", "high"]}}})
    for n, g, seeds, blocks in [(3, 20, 0.1, 0.05), (2, 4, 0.02, 0.2), (5, 10, 0.0, 0.0), (3, 2, 0.3, 0.0)]:
        d = 0.1 + rng.normal(0, seeds, (n, 1)) + rng.normal(0, blocks, (1, g)) + rng.normal(0, 0.05, (n, g))
        weights = rng.integers(500, 2000, g).astype(float)
        grids.append({"differences": d, "weights": weights, "alpha": 0.01, "interval": crossed(d, weights, 0.01)})
    corrections = [{"p": p, "holm": holm(p)} for p in [rng.uniform(0, 0.2, 6), np.array([0.04, 0.01, 0.04, 1.0])]]
    found = {"student": student, "quantiles": quantiles, "paired": pairs, "ratios": ratios, "crossed": grids, "holm": corrections}
    GOLDEN.write_text(json.dumps({"by": f"scipy {scipy.__version__}, numpy {np.__version__}", **{k: plain(v) for k, v in found.items()}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
