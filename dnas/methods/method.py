"""The seam between the ways to choose a network and everything around them: a `Method` is a few functions and a config.

A method is asked by the loop of `dnas.methods.loop`, which feeds it images, saves it, and resumes it. What it decides
ends as one `Arch` inside the budget; export, training and comparison are the same for all methods.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dnas.methods.settings import NoConfig
from dnas.nets.supernet import Supernet
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.recipe import Recipe
from dnas.spec.space import Arch
from dnas.training.batches import Batches, Data
from dnas.training.loop import Learner

HeldOut = Iterator[tuple[Tensor, Tensor]]  # batches of training images that the weights do not learn from


@dataclass(frozen=True)
class Task:
    """What a method is asked.

    ``tables`` has the cost table of every metric that a budget is in; ``budgets`` are absolute, and empty in ``init``
    and in the part of a search that several budgets share: nothing may depend on them there. ``recipe`` says how the
    weights of the supernet are trained, ``config`` is the method's own. ``keep_weights``: the network will start from
    the weights of the supernet, so that nothing should be chosen that has been cut off.
    """

    tables: Mapping[str, CostTable]
    budgets: tuple[Budget, ...]
    data: Data
    recipe: Recipe
    config: Any
    seed: int = 0
    keep_weights: bool = False

    @property
    def limits(self) -> dict[str, float]:
        """Metric -> its budget."""
        return {b.metric: b.limit for b in self.budgets}

    def weight_batches(self, fraction: float) -> Batches:
        """The images that weights learn from, when ``fraction`` of the training images are held out."""
        indices = self.data.split(fraction, self.seed)[0] if fraction else None
        return self.data.train_batches(self.recipe.batch_size, seed=self.seed, indices=indices)

    def held_out_batches(self, fraction: float) -> Batches:
        """The other training images; all of them (in another order) where ``fraction`` is 0."""
        indices = self.data.split(fraction, self.seed)[1] if fraction else None
        return self.data.train_batches(self.recipe.batch_size, seed=self.seed + 1, indices=indices)


@dataclass
class Search:
    """All that changes while a search goes on. A copy of it (``copy.deepcopy``) can go on to another budget."""

    net: Supernet
    learner: Learner | None  # of the weights; None where the method trains none
    own: Any  # what the method keeps
    taken: int = 0  # held-out batches so far


def nothing(*_: Any) -> dict[str, Any]:
    """The hook of a method that has nothing to do there."""
    return {}


@dataclass(frozen=True)
class Method:
    """One way to choose a network. Functions that are left out do nothing.

    Args:
        summary: what it decides, and from what, in a line; ``source`` the paper.
        choose: ``(search, task) -> Arch`` inside the budgets of the task; mostly `dnas.methods.derive.derive`.
        config: a frozen dataclass that checks itself; its fields are the method's flags.
        init: ``(net, task) -> own``, the method's state. Raises UserError if the task gives it nothing to do.
        loss: ``(search, task, images, labels, progress) -> scalar`` of one weight step; progress is in [0, 1). None:
            no weights are trained.
        after_step: ``(search, task, progress, held_out) -> row``, between two weight steps: learn, score, cut. What it
            returns goes into the history; ``events`` lists what was cut off.
        held_out: the share of the training images that ``held_out`` of ``after_step`` has, from the config.
        work: ``config -> (shared, own)``: the work that all budgets of a sweep share, which is also the share of the
            steps until the first budget plays a part, and that of each budget, in trainings of the widest net.
        distributions: ``search -> {decision: [options]}``, where the method has probabilities to show.
        state_dict, load_state_dict: ``own`` as plain data (see `dnas.runtime.checkpoint`), and back into a fresh one.
    """

    summary: str
    source: str
    choose: Callable[[Search, Task], Arch]
    config: type = NoConfig
    init: Callable[[Supernet, Task], Any] = nothing
    loss: Callable[[Search, Task, Tensor, Tensor, float], Tensor] | None = None
    after_step: Callable[[Search, Task, float, HeldOut], dict[str, Any]] = nothing
    held_out: Callable[[Any], float] = lambda config: 0.0
    work: Callable[[Any], tuple[float, float]] = lambda config: (0.0, 0.0)
    distributions: Callable[[Search], Mapping[str, Tensor]] = nothing
    state_dict: Callable[[Search], dict[str, Any]] = nothing
    load_state_dict: Callable[[Search, Mapping[str, Any]], Any] = nothing
