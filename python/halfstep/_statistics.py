"""What paired runs say: the difference with its confidence, a verdict by two one-sided tests, and how many runs are missing. Formulas: docs/compare.md."""

import math

from ._extras import need

ALPHA, BETA = 0.05, 0.10  # of each one-sided test; of missing an equivalence that is there
RESAMPLES = 10_000
MOST = 10_000  # runs that anyone would be sent for
EQUIVALENT, WORSE, BETTER, UNDECIDED = "equivalent", "worse", "better", "cannot tell"


def _t(p, df):
    return float(need("scipy.stats").t.ppf(p, df))


def mean_and_sd(values):
    """(mean, sample standard deviation or None for fewer than two)."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None


def interval(values, confidence=0.95):
    """The confidence interval of the mean by Student's t, or None for fewer than two values."""
    mean, sd = mean_and_sd(values)
    if sd is None:
        return None
    half = _t((1 + confidence) / 2, len(values) - 1) * sd / math.sqrt(len(values))
    return [mean - half, mean + half]


def runs_needed(sd, margin, at_least=2, power=1 - BETA / 2):
    """The fewest n with (t(1 - alpha, n - 1) + t(power, n - 1)) sd / sqrt(n) <= margin, or None beyond MOST.

    With the default power that many pairs find two equal arms equivalent within `margin` nine times out of ten; for large n
    it is (3.29 sd / margin)^2.
    """
    enough = lambda n: (_t(1 - ALPHA, n - 1) + _t(power, n - 1)) * sd <= margin * math.sqrt(n)
    low, high = max(at_least, 2), max(at_least, 2)
    while not enough(high):
        low, high = high + 1, 2 * high
        if low > MOST:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def _bootstrap(values):
    """The 95 % percentile interval of the mean; the same bits each time."""
    numpy = need("numpy")
    rng = numpy.random.Generator(numpy.random.PCG64(0))
    means = numpy.asarray(values)[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    return [float(x) for x in numpy.percentile(means, [2.5, 97.5])]


def paired(differences, delta, resolution=0.0):
    """The verdict on `differences` (arm - first arm, one a seed, larger is better) for a margin of `delta` in the same unit.

    Two one-sided t tests at 95 %, which is the 90 % interval of the mean against [-delta, delta]: inside it is "equivalent", wholly
    below "worse", wholly above "better", anything else "cannot tell". `resolution`: the step in which the measured value can
    move (1 / test items); few runs that agree by chance then do not pass for a spread of nothing: sd is at least resolution / sqrt(6),
    that of the difference of two roundings.

    Returns n, mean, sd, interval90, interval95, p_lower, p_upper, verdict, needed (runs in all; None when that cannot be said),
    more, note, bootstrap95.
    """
    if not delta > 0:
        raise ValueError(f"delta is {delta}; expected a number above 0")
    n = len(differences)
    mean, sd = mean_and_sd(differences)
    found = {"n": n, "mean": mean, "sd": sd, "interval90": None, "interval95": None, "p_lower": None, "p_upper": None, "verdict": UNDECIDED,
             "needed": None, "more": None, "note": None, "bootstrap95": _bootstrap(differences) if n > 2 else None}
    if sd is None:
        found.update(needed=3, more=2, note="one run has no spread: how many are needed is known after three")
        return found
    sd = max(sd, resolution / math.sqrt(6))
    error = sd / math.sqrt(n)
    for name, tail in (("interval90", 1 - ALPHA), ("interval95", 1 - ALPHA / 2)):
        half = _t(tail, n - 1) * error
        found[name] = [mean - half, mean + half]
    if error > 0:
        tail = need("scipy.stats").t.sf
        found["p_lower"], found["p_upper"] = float(tail((mean + delta) / error, n - 1)), float(tail((delta - mean) / error, n - 1))
    else:
        found["p_lower"], found["p_upper"] = float(mean <= -delta), float(mean >= delta)
    low, high = found["interval90"]
    if error == 0 and n < 3:
        found.update(needed=3, more=3 - n, note="two runs that agree exactly have no spread to judge by")
        return found
    found["verdict"] = EQUIVALENT if -delta < low and high < delta else WORSE if high < -delta else BETTER if low > delta else UNDECIDED
    if found["verdict"] == UNDECIDED:
        _ask_for_more(found, sd, delta)
    return found


def _ask_for_more(found, sd, delta):
    """How many runs would decide: if the arms are equal, or where that many were run, if the difference is what it seems to be."""
    n, needed = found["n"], runs_needed(sd, delta)
    if needed is not None and needed <= n:
        distance = abs(abs(found["mean"]) - delta)
        needed = runs_needed(sd, distance, n + 1, 1 - BETA) if distance > 0 else None
        found["note"] = "the difference lies close to delta"
    found["needed"], found["more"] = needed, None if needed is None else needed - n
    if needed is None:
        found["note"] = (f"{found['note']}: " if found["note"] else "") + f"more than {MOST:,} runs would be needed; take a larger delta"


def mcnemar(first, other):
    """Exact McNemar test of two lists of right (1) and wrong (0) on the same items."""
    if len(first) != len(other):
        raise ValueError(f"McNemar: {len(first)} items of the first arm, {len(other)} of the other")
    lost, won = sum(a and not b for a, b in zip(first, other)), sum(b and not a for a, b in zip(first, other))
    return {"lost": lost, "won": won, "p": float(need("scipy.stats").binomtest(won, lost + won).pvalue) if lost + won else 1.0}


def items(firsts, others):
    """The same over several seeds: per seed, and all together with each item's mean difference as one value, since the seeds share the items.

    p of all: two-sided, of z = mean / standard error over the items; with one seed z^2 is McNemar's statistic but for a term of 1 / items.
    """
    seeds = [mcnemar(a, b) for a, b in zip(firsts, others)]
    means = [math.fsum(b[i] - a[i] for a, b in zip(firsts, others)) / len(firsts) for i in range(len(firsts[0]))]
    mean, sd = mean_and_sd(means)
    p = 1.0 if not sd else math.erfc(abs(mean) / (sd / math.sqrt(len(means))) / math.sqrt(2))
    return {"items": len(means), "lost": sum(s["lost"] for s in seeds), "won": sum(s["won"] for s in seeds), "p": p, "seeds": seeds}


def worst_class(firsts, others, labels):
    """The class whose share of right answers fell most, averaged over the seeds."""
    change = {}
    for label in sorted(set(labels), key=str):
        at = [i for i, other in enumerate(labels) if other == label]
        change[label] = math.fsum(b[i] - a[i] for a, b in zip(firsts, others) for i in at) / (len(at) * len(firsts))
    label = min(change, key=change.get)
    return {"label": label, "change": change[label], "items": sum(x == label for x in labels)}
