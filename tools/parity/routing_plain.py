"""Plain loops after the papers, for the routing menu: cases for make_routing.py, which says what a case is.

float64, token by token and expert by expert, by the most literal route; gradients by torch's autograd. Nothing here is
shared with the systems of routing_systems.py but the draws and the names of the config.
"""

import math

import torch

CASES = {}
F64 = torch.float64


class Unfit(Exception):
    """Why a seed will not do."""


def case(name):
    def add(function):
        CASES[name] = function
        return function

    return add


def capacity_of(factor, k, tokens, experts, least=0):
    """C = ceil(factor · kT/E), at least `least`."""
    return max(math.ceil(factor * k * tokens / experts), least)


def config(count, top_k, kind, router, balance, special=None):
    """The tables of a config, with the names of Senmon."""
    return {
        "experts": {"count": count, "top_k": top_k} | (special or {}),
        "router": {"kind": kind} | router,
        "balance": balance,
    }


def draw_logits(g, tokens, experts, spread=1.5):
    return spread * torch.randn(tokens, experts, generator=g)


# Small mathematics, by scalars


def softmax(z):
    """A list of scalars."""
    greatest = max(v.item() for v in z)
    e = [torch.exp(v - greatest) for v in z]
    total = sum(e)
    return [v / total for v in e]


def sigmoid(v):
    return 1 / (1 + torch.exp(-v))


def greatest(scores, k):
    """The places of the k greatest, the greatest first."""
    left = list(range(len(scores)))
    found = []
    for _ in range(k):
        best = left[0]
        for i in left:
            if float(scores[i]) > float(scores[best]):
                best = i
        found.append(best)
        left.remove(best)
    return found


def rows(z):
    """[T, E] as lists of scalars with their graph."""
    return [list(row.unbind()) for row in z.unbind()]


def cv2(values):
    """Squared coefficient of variation, population variance."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return variance / mean**2


def table(picks, scores, experts, kept=None):
    """What `compute` returns. picks: for each token {expert: weight}; kept: pairs that have a place (all, if None)."""
    tokens = len(picks)
    picked = torch.zeros(tokens, experts, dtype=torch.bool)
    placed = torch.zeros(tokens, experts, dtype=torch.bool)
    zero = torch.zeros((), dtype=F64)
    weights = []
    for t, of_token in enumerate(picks):
        line = [zero] * experts
        for e, weight in of_token.items():
            picked[t, e] = True
            if kept is None or (t, e) in kept:
                placed[t, e] = True
                line[e] = weight
        weights.append(torch.stack(line))
    order = torch.tensor([[float(v) for v in line] for line in scores], dtype=F64)
    return {"weights": torch.stack(weights), "picked": picked, "kept": placed, "order": order, "losses": {}}


def over_sum(weights):
    """{expert: weight}, divided by the sum."""
    total = sum(weights.values())
    return {e: w / total for e, w in weights.items()}


def plain(config, inputs, compute, paper, note="", train=True, **rest):
    return {
        "config": config,
        "oracle": f"plain loops after {paper}",
        "note": note,
        "train": train,
        "inputs": inputs,
        "compute": compute,
        "dtype": F64,
    } | rest


# Kinds


@case("plain-dense")
def _(g):
    def compute(x):
        p = [softmax(z) for z in rows(x["logits"])]
        return table([dict(enumerate(line)) for line in p], p, 6)

    return plain(config(6, 6, "dense", {}, {}), {"logits": draw_logits(g, 24, 6)}, compute, "Jordan & Jacobs 1994")


def noisy(g, learned):
    tokens, experts, k = 32, 8, 2
    inputs = {"logits": draw_logits(g, tokens, experts), "noise": torch.randn(tokens, experts, generator=g)}
    if learned:
        inputs["noise_std"] = torch.nn.functional.softplus(torch.randn(tokens, experts, generator=g))
    else:
        inputs["noise_std"] = torch.full((tokens, experts), 1 / experts)

    def compute(x):
        clean, draws, stds = rows(x["logits"]), rows(x["noise"].to(F64)), rows(x["noise_std"].to(F64))
        picks, scores, importance, load = [], [], [0.0] * experts, [0.0] * experts
        for z, n, std in zip(clean, draws, stds):
            h = [z[e] + n[e] * std[e] for e in range(experts)]
            top = greatest(h, k)
            gates = dict(zip(top, softmax([h[e] for e in top])))
            picks.append(gates)
            scores.append(h)
            for e, gate in gates.items():
                importance[e] = importance[e] + gate
            for e in range(experts):
                others = [h[j] for j in range(experts) if j != e]
                threshold = others[greatest(others, k)[k - 1]]
                argument = (z[e] - threshold) / std[e]
                load[e] = load[e] + 0.5 * (1 + torch.erf(argument / math.sqrt(2)))
        return table(picks, scores, experts) | {"losses": {"importance": cv2(importance), "load": cv2(load)}}

    note = """noise_std is softplus(x W_n), an input; grad_noise_std.* are gradients to it. P(x, i) has the clean logit of i,
    and the threshold is the k-th greatest of the noisy logits of the others, with its gradient."""
    if not learned:
        note = """std 1/E for all. V-MoE itself takes softmax over all experts before top-k and does not divide by the sum, its
        importance is of softmax of the clean logits over all experts, and the threshold of its load is the k-th greatest of
        all noisy logits, i's own too: here all three are as Shazeer 2017, which is what `noisy_topk` says."""
    router = {"noise": "learned" if learned else "fixed"}
    return plain(
        config(experts, k, "noisy_topk", router, {"importance": 0.01, "load": 0.01}),
        inputs,
        compute,
        "1701.06538",
        note,
        noise=["noise"],
        leaves=["noise_std"] if learned else [],
    )


CASES["plain-noisy_topk-learned"] = lambda g: noisy(g, True)
CASES["plain-noisy_topk-fixed"] = lambda g: noisy(g, False)


def gshard(g, factor):
    tokens, experts = 32, 8
    inputs = {"logits": draw_logits(g, tokens, experts), "noise": torch.rand(tokens, experts, generator=g)}
    places = capacity_of(factor, 2, tokens, experts) if factor else tokens

    def route(z, u, refused_take_place):
        picks, scores, kept, used = [], [], set(), [0] * experts
        for line in z:
            p = softmax(line)
            first, second = greatest(p, 2)
            total = p[first] + p[second]
            picks.append({first: p[first] / total, second: p[second] / total})
            scores.append(p)
        for t, of_token in enumerate(picks):
            first = next(iter(of_token))
            if used[first] < places:
                kept.add((t, first))
            used[first] += 1
        for t, of_token in enumerate(picks):
            second = list(of_token)[1]
            wanted = 2 * float(of_token[second]) > float(u[t, 0])
            if wanted and used[second] < places:
                kept.add((t, second))
            if wanted or refused_take_place:
                used[second] += 1
            if not wanted:
                del of_token[second]
        return picks, scores, kept

    def compute(x):
        z = rows(x["logits"])
        picks, scores, kept = route(z, x["noise"], False)
        if kept != route(z, x["noise"], True)[2]:
            raise Unfit("a second that is left out may take a place")
        first = [0.0] * experts
        mean = [0.0] * experts
        for p in scores:
            first[greatest(p, 1)[0]] += 1 / tokens
            for e in range(experts):
                mean[e] = mean[e] + p[e] / tokens
        aux = sum(f * p for f, p in zip(first, mean)) / experts
        return table(picks, scores, experts, kept) | {"losses": {"aux": aux}}

    def check(inputs, results):
        if not (results["experts"] < 0).any():
            raise Unfit("every second is kept")

    note = """noise[t, 0] is u; the second is kept where 2 g2 > u, g1 stays as it is. aux is the paper's 1/E · sum (c/S) m, c
    counting first choices before drops. Implementations differ in whether a second that is left out takes one of its expert's
    places (in Mesh TF it does not); this draw is one where that makes no difference."""
    router = {"second": "threshold", "second_threshold": 0.5} | ({"capacity": factor, "drop": "position"} if factor else {})
    return plain(
        config(experts, 2, "gshard", router, {"aux": 0.01, "convention": "fairscale"}),
        inputs,
        compute,
        "2006.16668",
        note,
        noise=["noise"],
        check=check,
    )


CASES["plain-gshard-threshold"] = lambda g: gshard(g, 0.0)
CASES["plain-gshard-threshold-capacity"] = lambda g: gshard(g, 0.6)


def scored(g, kind, score, normalize, scale, paper, note="", least_sum=None, k=3):
    experts = 8
    inputs = {"logits": draw_logits(g, 32, experts), "bias": 0.3 * torch.randn(experts, generator=g)}

    def compute(x):
        picks, scores = [], []
        for z in rows(x["logits"]):
            s = score(z)
            biased = [float(s[e]) + float(x["bias"][e]) for e in range(experts)]
            chosen = {e: s[e] for e in greatest(biased, k)}
            total = sum(chosen.values()) + 1e-20
            if least_sum is not None and float(total) < least_sum:
                total = torch.tensor(least_sum, dtype=F64)
            picks.append({e: scale * (w / total if normalize else w) for e, w in chosen.items()})
            scores.append(biased)
        return table(picks, scores, experts)

    router = {"normalize": normalize, "scale": scale} | ({"least_sum": least_sum} if least_sum is not None else {})
    return plain(config(experts, k, kind, router, {}), inputs, compute, paper, note)


def sqrt_softplus(z):
    return [torch.sqrt(torch.log(1 + torch.exp(v))) for v in z]


V3, V4 = "DeepSeek-V3, 2412.19437", "DeepSeek-V4"
CASES["plain-softmax_bias"] = lambda g: scored(g, "softmax_bias", softmax, True, 1.0, "Ernie 4.5", "", 0.7)
CASES["plain-sqrt_softplus"] = lambda g: scored(g, "sqrt_softplus", sqrt_softplus, True, 2.0, V4)
CASES["plain-sqrt_softplus-raw"] = lambda g: scored(g, "sqrt_softplus", sqrt_softplus, False, 1.0, V4)
CASES["plain-sigmoid_bias"] = lambda g: scored(g, "sigmoid_bias", lambda z: [sigmoid(v) for v in z], True, 2.5, V3)
CASES["plain-sigmoid_bias-k1"] = lambda g: scored(
    g,
    "sigmoid_bias",
    lambda z: [sigmoid(v) for v in z],
    True,
    2.5,
    V3,
    "Normalised, the weight is always scale: no gradient.",
    k=1,
)


def sigmoid_input(g, k):
    def compute(x):
        z = rows(x["logits"])
        return table([{e: sigmoid(line[e]) for e in greatest(line, k)} for line in z], z, 8)

    return plain(
        config(8, k, "sigmoid_input", {}, {}),
        {"logits": draw_logits(g, 32, 8)},
        compute,
        "Llama 4",
        "The weight multiplies the expert's input.",
    )


CASES["plain-sigmoid_input-k1"] = lambda g: sigmoid_input(g, 1)
CASES["plain-sigmoid_input-k2"] = lambda g: sigmoid_input(g, 2)


@case("plain-expert_choice")
def _(g):
    tokens, experts, k = 32, 8, 2
    places = k * tokens // experts

    def compute(x):
        p = [softmax(z) for z in rows(x["logits"])]
        picks = [{} for _ in range(tokens)]
        for e in range(experts):
            for t in greatest([p[t][e] for t in range(tokens)], places):
                picks[t][e] = p[t][e]
        return table(picks, p, experts)

    def check(inputs, results):
        if not (results["experts"] >= 0).any(1).logical_not().any():
            raise Unfit("no token without an expert")

    note = """Every expert takes its C = kT/E greatest p; weights are p, not divided by a sum. K is the most that a token got;
    some got none."""
    router = {"normalize": False, "allow_noncausal": True}
    return plain(
        config(experts, k, "expert_choice", router, {}),
        {"logits": draw_logits(g, tokens, experts)},
        compute,
        "2202.09368",
        note,
        slots=None,
        check=check,
    )


def base(g, train):
    tokens, experts = 32, 8

    def compute(x):
        z = rows(x["logits"])
        if train:
            from scipy.optimize import linear_sum_assignment

            places = tokens // experts
            value = [[float(z[t][place // places]) for place in range(tokens)] for t in range(tokens)]
            who, where = linear_sum_assignment(value, maximize=True)
            chosen = {int(t): int(place) // places for t, place in zip(who, where)}
        else:
            chosen = {t: greatest(line, 1)[0] for t, line in enumerate(z)}
        return table([{chosen[t]: sigmoid(z[t][chosen[t]])} for t in range(tokens)], z, experts)

    def check(inputs, results):
        greedy = inputs["logits"].argmax(1, keepdim=True).int()
        if train and (results["experts"] == greedy).all():
            raise Unfit("greedy is balanced")

    note = "The optimum by scipy's linear_sum_assignment: T/E places an expert, the sum of logits greatest."
    return plain(
        config(experts, 1, "base", {}, {}),
        {"logits": draw_logits(g, tokens, experts)},
        compute,
        "2103.16716",
        note if train else "Greedy.",
        train,
        check=check,
    )


CASES["plain-base-train"] = lambda g: base(g, True)
CASES["plain-base-eval"] = lambda g: base(g, False)


def top_p(g, normalize):
    tokens, experts, cap, least = 32, 8, 3, 0.7

    def compute(x):
        picks, scores, entropy = [], [], 0.0
        for z in rows(x["logits"]):
            p = softmax(z)
            chosen, total = {}, 0.0
            for e in greatest(p, experts):
                if total >= least or len(chosen) == cap:
                    break
                chosen[e] = p[e]
                total += float(p[e])
            picks.append(over_sum(chosen) if normalize else chosen)
            scores.append(p)
            entropy = entropy - sum(v * torch.log(v) for v in p) / tokens
        return table(picks, scores, experts) | {"losses": {"entropy": entropy}}

    def check(inputs, results):
        count = (results["experts"] >= 0).sum(1)
        p = inputs["logits"].softmax(1).topk(cap).values.sum(1)
        if len(count.unique()) < cap or p.min() > least - 0.01:
            raise Unfit("the cap or the sum does not count")

    note = f"""Experts by falling p until their sum is {least} or more, at most top_k = {cap} of them. The paper does not
    divide by the sum. entropy is the mean over tokens of -sum p log p, over all experts."""
    router = {"p": least, "normalize": normalize}
    return plain(
        config(experts, cap, "top_p", router, {"entropy": 1e-4}),
        {"logits": draw_logits(g, tokens, experts)},
        compute,
        "ACL 2024.acl-long.696",
        note,
        check=check,
    )


CASES["plain-top_p"] = lambda g: top_p(g, True)
CASES["plain-top_p-raw"] = lambda g: top_p(g, False)


@case("plain-relu")
def _(g):
    tokens, experts, k = 32, 8, 2

    def compute(x):
        z = rows(x["logits"])
        picks = [{e: v for e, v in enumerate(line) if float(v) > 0} for line in z]
        count = [sum(1 for of_token in picks if e in of_token) for e in range(experts)]
        f = [experts / (k * tokens) * c for c in count]
        l1 = sum(f[e] * gate for of_token in picks for e, gate in of_token.items()) / tokens
        return table(picks, z, experts) | {"losses": {"l1": l1}}

    def check(inputs, results):
        if not (results["experts"] < 0).all(1).any():
            raise Unfit("no token without an expert")
        if inputs["logits"].abs().min() < 1e-4:
            raise Unfit("near 0")

    note = """g = ReLU(z); K is the most positive gates of a token. l1 is the mean over tokens of sum f_e g_te, f_e constant,
    before lambda."""
    inputs = {"logits": draw_logits(g, tokens, experts) - 1.0}
    return plain(config(experts, k, "relu", {}, {}), inputs, compute, "2412.14711", note, slots=None, check=check)


def hierarchical(g, normalize):
    tokens, experts, groups, top, k = 32, 16, 4, 2, 4
    size, each = experts // groups, k // top

    def compute(x):
        picks, scores = [], []
        for line in rows(x["logits"]):
            of_group = softmax(line[:groups])
            within = [softmax(line[groups + n * size : groups + (n + 1) * size]) for n in range(groups)]
            joint = [of_group[e // size] * within[e // size][e % size] for e in range(experts)]
            chosen = {}
            for n in greatest(of_group, top):
                for e in greatest(within[n], each):
                    chosen[n * size + e] = joint[n * size + e]
            picks.append(over_sum(chosen) if normalize else chosen)
            scores.append(joint)
        return table(picks, scores, experts)

    note = f"""logits [T, {groups} + {experts}]: groups first. {top} groups by softmax over the groups, {each} experts in each
    by softmax within it; weight p of the group times p within. Slots by falling product."""
    router = {"groups": groups, "top_groups": top, "normalize": normalize}
    return plain(
        config(experts, k, "hierarchical", router, {}),
        {"logits": draw_logits(g, tokens, groups + experts)},
        compute,
        "1701.06538, appendix B",
        note,
    )


CASES["plain-hierarchical"] = lambda g: hierarchical(g, True)
CASES["plain-hierarchical-raw"] = lambda g: hierarchical(g, False)


@case("plain-special")
def _(g):
    columns, k = 11, 3

    def compute(x):
        p = [softmax(z) for z in rows(x["logits"])]
        return table([over_sum({e: line[e] for e in greatest(line, k)}) for line in p], p, columns)

    def check(inputs, results):
        if len(set(results["experts"].flatten().tolist())) < columns:
            raise Unfit("an expert unused")

    note = """Ids from 8: 1 zero expert, then 1 identity expert, then 1 constant expert. They are picked and weighted as the
    others."""
    special = {"zero": 1, "identity": 1, "constant": 1}
    return plain(
        config(columns - 3, k, "topk_pre", {"normalize": True}, {}, special),
        {"logits": draw_logits(g, 32, columns)},
        compute,
        "MoE++, 2410.07348",
        note,
        check=check,
    )


@case("plain-hash")
def _(g):
    tokens, experts, vocab = 32, 4, 24
    counts = torch.randperm(1000, generator=g)[:vocab] + 1
    inputs = {"token_ids": torch.randint(0, vocab, (tokens,), generator=g), "counts": counts}
    inputs["logits"] = draw_logits(g, tokens, experts)

    def compute(x):
        load, where = [0] * experts, {}
        for token in greatest(x["counts"].tolist(), vocab):
            emptiest = 0
            for e in range(experts):
                if load[e] < load[emptiest]:
                    emptiest = e
            where[token] = emptiest
            load[emptiest] += int(x["counts"][token])
        one = torch.ones((), dtype=F64)
        picks = [{where[int(i)]: one} for i in x["token_ids"]]
        return table(picks, [[float(e in of_token) for e in range(experts)] for of_token in picks], experts)

    def check(inputs, results):
        load, where = [0] * experts, []
        for token in greatest(inputs["counts"].tolist(), vocab):
            where.append((token, load.index(min(load))))
            load[where[-1][1]] += int(inputs["counts"][token])
        results["table"] = torch.tensor([[e] for _, e in sorted(where)], dtype=torch.int32)

    note = """counts [V]: how often each token id is in the training text. table [V, 1]: ids by falling count, each to the
    expert with the least so far (the lowest of equals). The logits do not count."""
    return plain(config(experts, 1, "hash", {}, {}), inputs, compute, "2106.04426, balanced assignment", note, check=check)


# Capacity


def places(picks, p, drop, c, order=None, draws=None, live=None):
    """Pairs (token, expert) that have a place. picks: experts of each token by falling p; order: the tokens of the group."""
    tokens = list(range(len(picks))) if order is None else order
    tokens = [t for t in tokens if live is None or live[t]]
    kept, used = set(), {}
    if drop in ("position", "priority"):
        if drop == "priority":
            tokens = sorted(tokens, key=lambda t: -max(float(v) for v in p[t]))
        for choice in range(max(len(x) for x in picks)):
            for t in tokens:
                if choice < len(picks[t]):
                    e = picks[t][choice]
                    if used.get(e, 0) < c:
                        kept.add((t, e))
                    used[e] = used.get(e, 0) + 1
        return kept
    for e in range(len(p[0])):
        wanting = [t for t in tokens if e in picks[t]]
        rank = [float(p[t][e]) if drop == "gate" else float(draws[t][e]) for t in wanting]
        kept |= {(wanting[n], e) for n in greatest(rank, min(c, len(wanting)))}
    return kept


def capacity(g, drop, after=False, masked=False, group=0, k=2):
    tokens, experts, factor = 48 if group else 32, 8, 0.7
    inputs = {"logits": draw_logits(g, tokens, experts)}
    if drop == "random":
        inputs["noise"] = torch.rand(tokens, experts, generator=g)
    if masked:
        inputs["mask"] = (torch.rand(tokens, generator=g) < 0.8).to(torch.uint8)
    span = group or tokens

    def compute(x):
        p = [softmax(z) for z in rows(x["logits"])]
        live = [bool(v) for v in x["mask"]] if masked else [True] * tokens
        picks = [greatest(line, k) if live[t] else [] for t, line in enumerate(p)]
        normal = [over_sum({e: line[e] for e in chosen}) for line, chosen in zip(p, picks)]
        shares = [[float(of.get(e, 0.0)) for e in range(experts)] for of in normal]
        kept, other = set(), set()
        for start in range(0, tokens, span):
            order = list(range(start, start + span))
            c = capacity_of(factor, k, span, experts)
            if c != capacity_of(factor, k, sum(live[start : start + span]), experts):
                raise Unfit("capacity with and without padding")
            kept |= places(picks, p, drop, c, order, x.get("noise"), live)
            other |= places(picks, shares if drop == "gate" else p, drop, c, order, x.get("noise"), live)
        if kept != other:
            raise Unfit("p and the weights rank otherwise")
        weights = []
        for t, chosen in enumerate(picks):
            if after:
                left = {e: p[t][e] for e in chosen if (t, e) in kept}
                weights.append({e: normal[t][e] for e in chosen} | (over_sum(left) if left else {}))
            else:
                weights.append(normal[t])
        return table(weights, p, experts, kept)

    note = {
        "position": "All first choices before any second, then token order.",
        "priority": """All first choices before any second, and within each the tokens by falling greatest p, as in V-MoE's
        code (an order by token alone, with both choices of the best token first, is another rule).""",
        "gate": "Each expert keeps its C greatest; by p and by the weight is the same in this draw.",
        "random": "noise[t, e] is the priority of the pair, the greatest are kept.",
    }[drop]
    note += (
        " Weights are divided by the sum of what is left, after drops." if after else " Weights stay as they were before drops."
    )
    if masked:
        note += " Padding picks nothing; C is the same for all tokens and for those that count."
    if group:
        note += f" C is for each {group} tokens."
    router = {"normalize": True, "normalize_after_drop": after, "capacity": factor, "drop": drop}
    if group:
        router["group_size"] = group
    paper = {"position": "2006.16668", "priority": "2106.05974", "gate": "Megatron-Core's probs", "random": "DeepSpeed"}[drop]
    return plain(
        config(experts, k, "topk_pre", router, {}), inputs, compute, paper, note, noise=["noise"] if drop == "random" else []
    )


for _drop in ("position", "priority", "gate", "random"):
    CASES[f"plain-capacity-{_drop}"] = lambda g, drop=_drop: capacity(g, drop)
    CASES[f"plain-capacity-{_drop}-mask"] = lambda g, drop=_drop: capacity(g, drop, masked=True)
CASES["plain-capacity-position-after"] = lambda g: capacity(g, "position", after=True)
CASES["plain-capacity-position-groups"] = lambda g: capacity(g, "position", group=16)
CASES["plain-capacity-priority-groups"] = lambda g: capacity(g, "priority", group=16)


# Losses


def aux(g, convention, kind, k, masked=False):
    tokens, experts, layers = 32, 8, 3
    inputs = {f"logits.{n}": draw_logits(g, tokens, experts) for n in range(layers)}
    if masked:
        inputs["mask"] = (torch.rand(tokens, generator=g) < 0.75).to(torch.uint8)
    first_only = kind == "gshard"

    def compute(x):
        live = [bool(v) for v in x["mask"]] if masked else [True] * tokens
        count, mean = [], []
        for n in range(layers):
            c, m = [0] * experts, [0.0] * experts
            for t, line in enumerate(rows(x[f"logits.{n}"])):
                if live[t]:
                    p = softmax(line)
                    for e in greatest(p, 1 if first_only else k):
                        c[e] += 1
                    for e in range(experts):
                        m[e] = m[e] + p[e] / sum(live)
            count.append(c)
            mean.append(m)
        of_layer = []
        for c, m in zip(count, mean):
            f = [v / sum(c) for v in c]
            of_layer.append(experts * sum(a * b for a, b in zip(f, m)))
        if convention == "senmon":
            loss = sum(of_layer) / layers
        elif convention in ("megatron", "deepspeed"):
            loss = sum(of_layer)
        elif convention == "fairscale":
            loss = sum(v / experts**2 for v in of_layer)
        else:
            f = [sum(c[e] for c in count) / (layers * sum(live)) for e in range(experts)]
            m = [sum(m[e] for m in mean) / layers for e in range(experts)]
            loss = experts * sum(a * b for a, b in zip(f, m))
        leaves = [x[f"logits.{n}"] for n in range(layers)]
        grads = torch.autograd.grad(loss, leaves)
        tensors = {"loss.aux": loss.detach().reshape(1).float()}
        return {"tensors": tensors | {f"grad.aux.{n}": grad.float() for n, grad in enumerate(grads)}}

    note = "Three layers: logits.N [T, E] of layer N, grad.aux.N. "
    note += {
        "senmon": "Mean over layers.",
        "megatron": "Sum over layers.",
        "deepspeed": "Sum over layers. " + ("f counts first choices only." if first_only else "f counts all k, over k."),
        "huggingface": "The tokens of all layers joined into one f and one P, times k.",
        "fairscale": """mean over experts of me · ce, ce of first choices; summed over layers, which fairscale leaves to its
        caller.""",
    }[convention]
    router = {"second": "greedy"} if first_only else {}
    return plain(
        config(experts, k, kind, router, {"aux": 0.01, "convention": convention}),
        inputs,
        compute,
        "Switch Transformer, 2101.03961, and the code of the convention",
        note,
    )


CASES["plain-aux-senmon"] = lambda g: aux(g, "senmon", "topk_pre", 2)
CASES["plain-aux-senmon-mask"] = lambda g: aux(g, "senmon", "topk_pre", 2, True)
CASES["plain-aux-megatron"] = lambda g: aux(g, "megatron", "topk_pre", 2)
CASES["plain-aux-deepspeed"] = lambda g: aux(g, "deepspeed", "gshard", 2)
CASES["plain-aux-deepspeed-k3"] = lambda g: aux(g, "deepspeed", "topk_pre", 3)
CASES["plain-aux-huggingface"] = lambda g: aux(g, "huggingface", "topk_pre", 2)
CASES["plain-aux-fairscale"] = lambda g: aux(g, "fairscale", "gshard", 2)


def sequence(g, masked):
    tokens, experts, k, sequences = 64, 8, 2, 4
    length = tokens // sequences
    inputs = {"logits": draw_logits(g, tokens, experts), "bias": 0.3 * torch.randn(experts, generator=g)}
    inputs["sequences"] = torch.tensor([sequences])
    if masked:
        inputs["mask"] = (torch.rand(tokens, generator=g) < 0.75).to(torch.uint8)

    def compute(x):
        live = [bool(v) for v in x["mask"]] if masked else [True] * tokens
        picks, scores, loss = [], [], 0.0
        s = [[sigmoid(v) for v in line] for line in rows(x["logits"])]
        for t, line in enumerate(s):
            biased = [float(line[e]) + float(x["bias"][e]) for e in range(experts)]
            picks.append(over_sum({e: line[e] for e in greatest(biased, k)}) if live[t] else {})
            scores.append(biased)
        for n in range(sequences):
            own = [t for t in range(n * length, (n + 1) * length) if live[t]]
            f, share = [0.0] * experts, [0.0] * experts
            for t in own:
                for e in greatest(s[t], k):
                    f[e] += experts / (k * len(own))
                for e in range(experts):
                    share[e] = share[e] + s[t][e] / sum(s[t]) / len(own)
            loss = loss + sum(a * b for a, b in zip(f, share)) / sequences
        return table(picks, scores, experts) | {"losses": {"sequence": loss}}

    note = "Equations 17 to 20 for each sequence, averaged over sequences; f counts the top-k of s without bias."
    if masked:
        note += """ Padding counts nowhere: T is a sequence's tokens that count. Every sequence has the same say, however long
        it is."""
    return plain(
        config(experts, k, "sigmoid_bias", {}, {"sequence": 1e-4, "aux_counts": "unbiased"}), inputs, compute, V3, note
    )


CASES["plain-sequence"] = lambda g: sequence(g, False)
CASES["plain-sequence-mask"] = lambda g: sequence(g, True)


@case("plain-losses-mask")
def _(g):
    tokens, experts, k = 48, 8, 2
    inputs = {"logits": draw_logits(g, tokens, experts), "mask": (torch.rand(tokens, generator=g) < 0.7).to(torch.uint8)}

    def compute(x):
        live = [bool(v) for v in x["mask"]]
        z = rows(x["logits"])
        p = [softmax(line) for line in z]
        picks = [over_sum({e: p[t][e] for e in greatest(p[t], k)}) if live[t] else {} for t in range(tokens)]
        f, mean, square, importance = [0.0] * experts, [0.0] * experts, 0.0, [0.0] * experts
        for t in range(tokens):
            for e, weight in picks[t].items():
                f[e] += 1 / (k * sum(live))
                importance[e] = importance[e] + weight
            if live[t]:
                square = square + torch.log(sum(torch.exp(v) for v in z[t])) ** 2 / sum(live)
                for e in range(experts):
                    mean[e] = mean[e] + p[t][e] / sum(live)
        losses = {"aux": experts * sum(a * b for a, b in zip(f, mean)), "z": square, "importance": cv2(importance)}
        return table(picks, p, experts) | {"losses": losses}

    note = "Padding picks nothing and counts nowhere."
    balance = {"aux": 0.01, "z": 1e-3, "importance": 0.01, "convention": "senmon"}
    return plain(
        config(experts, k, "topk_pre", {"normalize": True}, balance),
        inputs,
        compute,
        "2101.03961, 2202.08906 and 1701.06538",
        note,
    )


@case("plain-quantile")
def _(g):
    tokens, experts, k = 64, 8, 2
    scores = draw_logits(g, tokens, experts).sigmoid()
    beta = 0.2 * torch.randn(experts, generator=g)
    target = k * tokens // experts

    def compute(x):
        s, b = x["scores"].double(), x["beta"].double()
        picks, alpha = [], []
        for t in range(tokens):
            line = [float(s[t, e] - b[e]) for e in range(experts)]
            best = greatest(line, k + 1)
            picks.append(best[:k])
            alpha.append(line[best[k]])
        new = []
        for e in range(experts):
            column = [float(s[t, e]) - alpha[t] for t in range(tokens)]
            new.append(column[greatest(column, target + 1)[target]])
        out = {"alpha": torch.tensor(alpha), "beta_out": torch.tensor(new), "experts": torch.tensor(picks, dtype=torch.int32)}
        load = torch.zeros(experts, dtype=torch.int32)
        for line in picks:
            for e in line:
                load[e] += 1
        return {"tensors": out | {"load": load}}

    def check(inputs, results):
        next_load = torch.zeros(experts)
        for e in (inputs["scores"] - results["beta_out"]).topk(k).indices.flatten():
            next_load[e] += 1
        if next_load.max() >= results["load"].max():
            raise Unfit("no better balance")

    note = """scores [T, E] of the global batch, beta [E] before; experts [T, K] picked by scores - beta, alpha [T] the
    (k+1)-th of each row, beta_out [E] the (kT/E + 1)-th greatest of each column of scores - alpha. Megatron-Core's development
    branch (qb_dual_update; not in 0.16.1) averages beta_out over micro-batches and ranks, may blend it with the old one, and
    moves its mean to 0 after that."""
    return plain(
        config(experts, k, "sigmoid_bias", {}, {"quantile": True}),
        {"scores": scores, "beta": beta},
        compute,
        "quantile balancing, Megatron-Core qb",
        note,
        check=check,
    )


@case("plain-soft")
def _(g):
    batch, tokens, dim, experts, slots, inner = 2, 10, 6, 3, 2, 5
    inputs = {
        "x": torch.randn(batch, tokens, dim, generator=g),
        "phi": torch.randn(experts, slots, dim, generator=g),
        "scale": torch.tensor([2.5]),
        "gate_up": 0.5 * torch.randn(experts, 2 * inner, dim, generator=g),
        "down": 0.5 * torch.randn(experts, dim, inner, generator=g),
    }
    upstream = torch.randn(batch, tokens, dim, generator=g)

    def unit(v):
        return v / torch.sqrt((v * v).sum())

    def compute(given):
        leaves = {n: given[n].to(F64).requires_grad_() for n in ("x", "phi", "scale", "gate_up", "down")}
        x, phi, scale, gate_up, down = leaves.values()
        y, dispatch, combine = [], [], []
        for b in range(batch):
            logit = [
                [[scale[0] * (unit(x[b, t]) * unit(phi[e, s])).sum() for s in range(slots)] for e in range(experts)]
                for t in range(tokens)
            ]
            to = [[softmax([logit[t][e][s] for t in range(tokens)]) for s in range(slots)] for e in range(experts)]
            back = [softmax([logit[t][e][s] for e in range(experts) for s in range(slots)]) for t in range(tokens)]
            made = []
            for e in range(experts):
                for s in range(slots):
                    slot = sum(to[e][s][t] * x[b, t] for t in range(tokens))
                    gate, up = gate_up[e, :inner] @ slot, gate_up[e, inner:] @ slot
                    made.append(down[e] @ (gate / (1 + torch.exp(-gate)) * up))
            y.append(torch.stack([sum(w * v for w, v in zip(back[t], made)) for t in range(tokens)]))
            dispatch.append([[[float(to[e][s][t]) for s in range(slots)] for e in range(experts)] for t in range(tokens)])
            combine.append(
                [[[float(back[t][e * slots + s]) for s in range(slots)] for e in range(experts)] for t in range(tokens)]
            )
        y = torch.stack(y)
        grads = torch.autograd.grad((upstream.to(F64) * y).sum(), list(leaves.values()))
        tensors = {
            "y": y.detach().float(),
            "dispatch": torch.tensor(dispatch),
            "combine": torch.tensor(combine),
            "upstream": upstream,
        }
        return {"tensors": tensors | {f"grad.{n}": grad.float() for n, grad in zip(leaves, grads)}}

    note = """Tensors as in soft_moe_pytorch: logits are scale times the cosine of x and phi; slots are of x as it is; dispatch
    sums to 1 over tokens, combine over all slots; a batch's sequences are apart."""
    return plain(config(experts, 1, "soft", {"allow_noncausal": True}, {}), inputs, compute, "2308.00951, algorithm 1", note)
