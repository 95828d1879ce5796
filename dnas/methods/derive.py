"""Derive one arch inside the budget from scores or probabilities.

Of all networks with a cost in [0.98, 1.00] x budget, the arch has the highest sum of log-likelihoods. The result is
exact in small spaces. Most methods end with this step, and so do the rules (`dnas.methods.rules`).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dnas.nets.supernet import Supernet
from dnas.spec.budget import Budget, show
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.space import Arch, Decision, Space

BAND = 0.98
Likelihood = Mapping[str, np.ndarray]  # decision -> log-likelihood of each option


class _Walker:
    """One network that changes, as the index of an option for every decision, with its costs kept up to date."""

    def __init__(self, space: Space, tables: Sequence[CostTable], limits: Sequence[float], like: Likelihood) -> None:
        self.space, self.tables, self.limits, self.like = space, tables, limits, like
        self.at = {d.name: int(np.argmax(like[d.name])) for d in space.decisions}
        self.children: dict[str, list[Decision]] = {d.name: [] for d in space.decisions}
        for d in space.decisions:
            if d.when:
                self.children[d.when[-1][0]].append(d)
        self.whens = {d.name: [(n, space.by_name[n].index(o)) for n, o in d.when] for d in space.decisions}
        self.refresh()

    def refresh(self) -> None:
        arch = self.arch()
        self.costs = [t.of(arch) for t in self.tables]

    def arch(self) -> Arch:
        return self.space.complete({d.name: d.options[self.at[d.name]] for d in self.space.decisions})

    def is_active(self, d: Decision) -> bool:
        return all(self.at[name] == index for name, index in self.whens[d.name])

    def active(self) -> list[Decision]:
        return [d for d in self.space.decisions if self.is_active(d)]

    @property
    def ratio(self) -> float:
        """Cost over limit, of the metric that binds."""
        return max(c / limit for c, limit in zip(self.costs, self.limits, strict=True))

    def ratios(self, d: Decision) -> np.ndarray:
        """The ratio for each option of ``d``, with all other choices fixed."""
        rows = []
        for table, cost, limit in zip(self.tables, self.costs, self.limits, strict=True):
            along = table.along(d, self.at)
            rows.append((cost + along - along[self.at[d.name]]) / limit)
        return np.max(rows, 0)

    def subtree(self, d: Decision, index: int) -> float:
        """Log-likelihood of one option of ``d``, together with the choices that matter because of it."""
        below = [c for c in self.children[d.name] if self.whens[c.name][-1][1] == index]
        return float(self.like[d.name][index]) + sum(self.subtree(c, self.at[c.name]) for c in below)

    def likes(self, d: Decision) -> np.ndarray:
        return np.array([self.subtree(d, k) for k in range(len(d.options))])

    def log_likelihood(self) -> float:
        return sum(float(self.like[d.name][self.at[d.name]]) for d in self.active())

    def move(self, d: Decision, index: int) -> None:
        for k, table in enumerate(self.tables):
            along = table.along(d, self.at)
            self.costs[k] += along[index] - along[self.at[d.name]]
        self.at[d.name] = index

    def ascend(self, multiplier: float) -> None:
        """Coordinate ascent on log-likelihood - multiplier * ratio until no choice changes."""
        for _ in range(50):
            moved = False
            for d in reversed(self.space.decisions):
                own = [(n, i) for n, i in self.whens[d.name] if self.at[n] != i]
                if own:  # no effect now: choose as if it had one, so that the decision above can compare
                    held = dict(self.at)
                    self.at |= dict(own)
                    costs = [t.along(d, self.at) / limit for t, limit in zip(self.tables, self.limits, strict=True)]
                    score = self.likes(d) - multiplier * np.max(costs, 0)
                    self.at = held
                    self.at[d.name] = int(np.argmax(score))
                    continue
                score = self.likes(d) - multiplier * self.ratios(d)
                best = int(np.argmax(score))
                if score[best] > score[self.at[d.name]] + 1e-12:
                    self.move(d, best)
                    moved = True
            if not moved:
                break
        self.refresh()


def in_band(ratio: float) -> bool:
    """Whether ``ratio``, cost over limit, is in [0.98, 1.00]."""
    return BAND <= ratio <= 1.0


def enumerate_archs(space: Space) -> Iterator[Arch]:
    """Every network of a (small) space once."""

    def walk(k: int, answers: dict) -> Iterator[Arch]:
        if k == len(space.decisions):
            yield Arch(answers)
            return
        d = space.decisions[k]
        matters = all(answers.get(name) == option for name, option in d.when)
        for option in d.options if matters else (None,):
            yield from walk(k + 1, {**answers, d.name: option} if matters else answers)

    return walk(0, {})


def derive(
    space: Space,
    tables: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    like: Likelihood,
    exact_below: int = 20_000,
) -> Arch:
    """The most likely `Arch` whose cost keeps every budget and reaches 98 % of at least one.

    ``like`` maps each decision to the log-likelihood of each option. A space of up to ``exact_below`` networks is
    enumerated, and the result is exact. For a larger space, coordinate ascent with a multiplier on the cost finds
    candidates; the multiplier is found by bisection. If no candidate is in the band, single moves, paired moves and
    random moves bring one there. Then single and paired moves inside the band improve it. At the end `widen_for_free`
    raises widths that cost nothing.

    Raises:
        UserError: no network in the band was found. The message has the nearest costs.
    """
    used, limits = [tables[b.metric] for b in budgets], [b.limit for b in budgets]
    if space.num_archs() <= exact_below:
        return widen_for_free(space, used, limits, _exact(space, used, limits, like, budgets))
    walker = _Walker(space, used, limits, like)
    found: list[tuple[float, dict[str, int]]] = []
    nearest = {"below": 0.0, "above": np.inf}
    starts: list[dict[str, int]] = []
    low, high = -1e5, 1e5  # of the multiplier: a large multiplier means a small net
    for _ in range(40):
        middle = float(np.sinh((np.arcsinh(low * 1e3) + np.arcsinh(high * 1e3)) / 2) / 1e3)
        walker.at = {d.name: int(np.argmax(like[d.name])) for d in space.decisions}
        walker.refresh()
        walker.ascend(middle)
        starts.append(dict(walker.at))
        if in_band(walker.ratio):
            found.append((walker.log_likelihood(), dict(walker.at)))
        if walker.ratio <= 1:
            high, nearest["below"] = middle, max(nearest["below"], walker.ratio)
        else:
            low, nearest["above"] = middle, min(nearest["above"], walker.ratio)
    for at in starts[-6:] if not found else []:
        walker.at = dict(at)
        walker.refresh()
        if _enter_band(walker) or _walk_into_band(walker, np.random.default_rng(0)):
            found.append((walker.log_likelihood(), dict(walker.at)))
    if not found:
        raise _out_of_band(budgets, [r for r in nearest.values() if 0 < r < np.inf])
    walker.at = max(found, key=lambda f: f[0])[1]
    walker.refresh()
    _polish(walker)
    return widen_for_free(space, used, limits, walker.arch())


def widen_for_free(space: Space, tables: Sequence[CostTable], limits: Sequence[float], arch: Arch) -> Arch:
    """``arch`` with every width raised as far as no cost rises.

    A latency has steps: there a width is raised to the end of its step. Costs in closed form rise with every width, so
    ``arch`` stays as it is.
    """
    walker = _Walker(space, tables, limits, {d.name: np.zeros(len(d.options)) for d in space.decisions})
    walker.at |= {name: space.by_name[name].index(option) for name, option in arch.items()}
    walker.refresh()
    for d in space.decisions:
        if d.is_width and d.name in arch:
            now, rises = walker.at[d.name], np.zeros(len(d.options))
            for table in tables:
                along = table.along(d, walker.at)
                rises = np.maximum(rises, along - along[now] * (1 + 1e-9))
            fits = [k for k in np.flatnonzero(rises <= 0) if k > now and in_band(float(walker.ratios(d)[k]))]
            if fits:
                walker.move(d, int(fits[-1]))
    return walker.arch()


def _exact(
    space: Space, tables: Sequence[CostTable], limits: Sequence[float], like: Likelihood, budgets: Sequence[Budget]
) -> Arch:
    best: tuple[float, Arch | None] = (-np.inf, None)
    ratios = []
    for arch in enumerate_archs(space):
        ratio = max(t.of(arch) / limit for t, limit in zip(tables, limits, strict=True))
        ratios.append(ratio)
        if in_band(ratio):
            score = sum(float(like[n][space.by_name[n].index(o)]) for n, o in arch.items())
            best = max(best, (score, arch), key=lambda b: b[0])
    if best[1] is None:
        below = max((r for r in ratios if r <= 1), default=None)
        above = min((r for r in ratios if r > 1), default=None)
        raise _out_of_band(budgets, [r for r in (below, above) if r])
    return best[1]


def _out_of_band(budgets: Sequence[Budget], ratios: Sequence[float]) -> UserError:
    """The error with the nearest costs. For several budgets they are shares of the budget that binds."""
    b, alone = budgets[0], len(budgets) == 1
    costs = " and ".join(show(b.metric, r * b.limit) if alone else f"{100 * r:.1f} % of it" for r in ratios)
    asked = ", ".join(map(str, budgets))
    return UserError(f"no network of this space costs 98 to 100 % of {asked}; the nearest found cost {costs}")


def _enter_band(walker: _Walker) -> bool:
    """Move the network into the band by single moves, then by pairs of moves. Returns whether it is in the band.

    A single move is the most likely one that lands in the band; if none does, the one that comes nearest.
    """

    def gap(ratio: np.ndarray | float) -> np.ndarray | float:
        return np.abs(ratio - (1 + BAND) / 2)

    for _ in range(200):
        if in_band(walker.ratio):
            return True
        best: tuple[float, float] | None = None
        move: tuple[Decision, int] | None = None
        for d in walker.active():
            ratios, likes = walker.ratios(d), walker.likes(d)
            for k in np.flatnonzero(np.isfinite(likes)):
                lands = in_band(ratios[k])
                key = (0.0 if lands else float(gap(ratios[k])), float(likes[walker.at[d.name]] - likes[k]))
                if best is None or key < best:
                    best, move = key, (d, int(k))
        if move is None or best is None or best[0] >= gap(walker.ratio) - 1e-12:
            return _pair_into_band(walker)
        walker.move(*move)
        walker.refresh()
    return False


def _pair_into_band(walker: _Walker) -> bool:
    best: tuple[float, dict[str, int]] | None = None
    for d in walker.active():
        here = walker.at[d.name]
        for k in np.flatnonzero(np.isfinite(walker.likes(d))):
            if k == here:
                continue
            walker.move(d, int(k))
            for e in walker.active():
                ratios, likes = walker.ratios(e), walker.likes(e)
                ok = np.flatnonzero((ratios >= BAND) & (ratios <= 1) & np.isfinite(likes))
                for j in ok:
                    loss = walker.log_likelihood() + likes[j] - likes[walker.at[e.name]]
                    if best is None or loss > best[0]:
                        best = (float(loss), {**walker.at, e.name: int(j)})
            walker.move(d, here)
    if best is None:
        return False
    walker.at = best[1]
    walker.refresh()
    return in_band(walker.ratio)


def _polish(walker: _Walker) -> None:
    """Make single moves and pairs of moves, while they raise the likelihood inside the band.

    The first move of a pair goes to a neighbouring width.
    """
    for _ in range(30):
        best, moves = 1e-9, None
        for d in walker.active():
            ratios, likes, here = walker.ratios(d), walker.likes(d), walker.at[d.name]
            gains = np.where((ratios >= BAND) & (ratios <= 1), likes - likes[here], -np.inf)
            if (k := int(np.argmax(gains))) != here and gains[k] > best:
                best, moves = float(gains[k]), [(d, k)]
            for step in (-1, 1) if d.is_width else ():
                if not 0 <= here + step < len(d.options) or not np.isfinite(likes[here + step]):
                    continue
                lost = likes[here + step] - likes[here]
                walker.move(d, here + step)
                for e in walker.active():
                    r, lk = walker.ratios(e), walker.likes(e)
                    gains = np.where((r >= BAND) & (r <= 1), lk - lk[walker.at[e.name]] + lost, -np.inf)
                    if (j := int(np.argmax(gains))) != walker.at[e.name] and gains[j] > best:
                        best, moves = float(gains[j]), [(d, here + step), (e, j)]
                walker.move(d, here)
        if moves is None:
            break
        for d, k in moves:
            walker.move(d, k)
        walker.refresh()


def near(d: Decision, width: float) -> np.ndarray:
    """[number of options]: minus the squared difference of the logarithms of each width of ``d`` and of ``width``."""
    return -(np.log(np.array(d.options, dtype=float) / width) ** 2)


def gate_likelihood(net: Supernet, temperature: float = 1.0, only_present: bool = False) -> dict[str, np.ndarray]:
    """The log-likelihood of each option by the gates: decision -> [number of options].

    Blocks and layers have the log-probabilities of their gates. A width has ``u - u^2``, where u is the logarithm of
    width over expected width. So of networks equally near to the gates' expectation, the one with the largest product
    of widths is the most likely. At the expected width the log-likelihood is 0, so that widths do not speak for or
    against layers.

    Source: expected sampling (DMCP, Guo et al., CVPR 2020), here inside the band. The most likely width of a chain
    cannot be used. If all links of the chain are alike, it is the first or the last width, whatever the expectation is.
    But the search met the budget by the expectation.

    A width that was cut off can be chosen, because the found net is trained from scratch. On a coarse grid the
    remaining widths may meet the band only far from the expectation. A block or layer that was removed is a last
    resort: -1000. With ``only_present`` the same holds for a width whose weights are gone.
    """
    like = {d.name: np.zeros(len(d.options)) for d in net.space.decisions}
    left = net.present_options() if only_present else net.live_options()
    for name, p in net.seen(temperature).items():
        d = net.space.by_name[name]
        if d.is_width:
            u = np.log(np.array(d.options) / (p @ np.array(d.options)))
            like[name] = u - u**2
        else:
            like[name] = np.log(np.maximum(p, 1e-30))
        if only_present or not d.is_width:
            like[name][np.setdiff1d(np.arange(len(p)), left[name])] = -1000
    return like


def _walk_into_band(walker: _Walker, rng: np.random.Generator, most: int = 3000) -> bool:
    """Redraw random decisions so that the cost moves towards the band, until it is inside. Returns whether it is.

    A move from below never crosses the band. If no move is left (a local optimum on a coarse grid), one decision is
    redrawn freely.
    """
    stuck = 0
    for _ in range(most):
        if in_band(walker.ratio):
            return True
        active = walker.active()
        d = active[rng.integers(len(active))]
        ratios, here = walker.ratios(d), walker.ratio
        towards = np.flatnonzero(ratios < here if here > 1 else (ratios > here) & (ratios <= 1))
        possible = np.flatnonzero(np.isfinite(walker.likes(d)))
        towards = np.intersect1d(towards, possible)
        stuck = 0 if len(towards) else stuck + 1
        if stuck > 3 * len(active):
            towards, stuck = possible, 0
        if len(towards):
            walker.move(d, int(rng.choice(towards)))
            walker.refresh()
    return False
