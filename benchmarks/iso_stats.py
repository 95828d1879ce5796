"""What a table of trainings says: noise, spread of architectures, where a net lies, differences with intervals.

A table is a list of rows as `iso_flops.py` writes them. ``Scores`` maps a net's name to {training seed: top-1 in %}.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, variance

import scipy.stats

from dnas.methods.rules import RULES
from dnas.report.metrics import interval

Scores = Mapping[str, Mapping[int, float]]
Interval = tuple[float, float, float]  # mean, and the ends of its 95 % interval


def scores_of(rows: Iterable[dict]) -> dict[str, dict[int, float]]:
    """Net -> {training seed: top-1}, from the rows of kind ``training``."""
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "training":
            scores[row["net"]][row["seed"]] = row["top1"]
    return dict(scores)


def of_method(scores: Scores, method: str) -> dict[str, Mapping[int, float]]:
    """The nets ``method/0``, ``method/1``, ... in that order; a rule (``uniform``) is a net and a method."""
    names = [name for name in scores if name.split("/")[0] == method]
    return {name: scores[name] for name in sorted(names, key=lambda n: int(n.split("/")[1]) if "/" in n else 0)}


def methods(scores: Scores) -> list[str]:
    """All that chose nets, the default search first."""
    chose = {name.split("/")[0] for name in scores} - {"random", "full", *RULES}
    return sorted(chose, key=lambda m: (m != "default", m))


def noise(scores: Scores) -> float:
    """Standard deviation of one training over seeds, pooled over all nets with at least two. NaN if there are none."""
    groups = [list(s.values()) for s in scores.values() if len(s) > 1]
    freedom = sum(len(g) - 1 for g in groups)
    return math.sqrt(sum(variance(g) * (len(g) - 1) for g in groups) / freedom) if freedom else math.nan


def spread(scores: Scores, training_noise: float) -> float:
    """Standard deviation over nets of what more seeds would converge to: the noise of the means is taken out."""
    if len(scores) < 2 or math.isnan(training_noise):
        return math.nan
    of_means = variance(fmean(s.values()) for s in scores.values())
    return math.sqrt(max(0.0, of_means - training_noise**2 * fmean(1 / len(s) for s in scores.values())))


def percentile(value: float, others: Sequence[float]) -> float:
    """Share of ``others`` below ``value``, in percent; ties count half."""
    return 100 * fmean((other < value) + (other == value) / 2 for other in others)


def minus_paired(found: Scores, other: Mapping[int, float]) -> Interval:
    """Found nets minus one other net, paired by training seed. NaN if that net lacks one of the seeds.

    Each found net gives one value, the mean over its seeds. Nets of different searches have different training seeds,
    so that these values share neither search nor training and are independent.
    """
    if any(seed not in other for net in found.values() for seed in net):
        return math.nan, math.nan, math.nan
    return interval([fmean(top1 - other[seed] for seed, top1 in net.items()) for net in found.values()])


def minus_method(found: Scores, other: Scores) -> Interval:
    """Found nets of one method minus another's, paired by the search's seed; NaN without common seeds."""
    means = [{name.split("/")[1]: fmean(s.values()) for name, s in group.items()} for group in (found, other)]
    common = [value - means[1][k] for k, value in means[0].items() if k in means[1]]
    return interval(common) if common else (math.nan, math.nan, math.nan)


def minus_mean(found: Scores, others: Scores) -> Interval:
    """Found nets minus the mean of others, Welch's interval over nets."""
    a, b = ([fmean(s.values()) for s in group.values()] for group in (found, others))
    if len(a) < 2 or len(b) < 2:
        return fmean(a) - fmean(b), -math.inf, math.inf
    ends = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return fmean(a) - fmean(b), float(ends.low), float(ends.high)


def best_of(scores: Scores, n: int) -> float:
    """Expected top-1 of the best of ``n`` random nets: chosen by one training, reported by the mean of its others.

    Exact over all subsets of the nets that have two trainings or more; NaN if there is none. The choice looks at the
    images that the report uses, which a search must not: this favours the opponent a little.
    """
    pairs = sorted(
        ((s[min(s)], fmean(v for k, v in s.items() if k != min(s))) for s in scores.values() if len(s) > 1),
        reverse=True,
    )
    if not pairs:
        return math.nan
    total = len(pairs)
    n = min(n, total)
    chosen = [math.comb(total - 1 - rank, n - 1) / math.comb(total, n) for rank in range(total)]
    return sum(p * again for p, (_, again) in zip(chosen, pairs, strict=True))


def rank_correlation(judged: Mapping[str, float], scores: Scores) -> float:
    """Spearman's correlation between another judge of nets and their mean top-1 from scratch."""
    names = [name for name in judged if name in scores]
    if len(names) < 3:
        return math.nan
    truth = [fmean(scores[name].values()) for name in names]
    return float(scipy.stats.spearmanr([judged[name] for name in names], truth).statistic)


def ranged(values: Sequence[float]) -> str:
    """Median [least, most]; a dash if there is none."""
    return f"{median(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "-"
