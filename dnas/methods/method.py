"""The interface between a method and the rest of dnas. A `Method` is a few functions and a config.

The loop (`dnas.methods.loop`) calls the functions, feeds images, and saves and resumes the search. The result is one
`Arch` inside the budget. Export, training and comparison are the same for all methods.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from dnas.methods.settings import NoConfig
from dnas.nets.supernet import Supernet
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.recipe import Recipe
from dnas.spec.space import Arch
from dnas.training.batches import Batches, Data
from dnas.training.criterion import Criterion, class_weights, make_criterion
from dnas.training.loop import Learner, steps_per_epoch
from dnas.training.teacher import Teacher

HeldOut = Iterator[tuple[Tensor, Tensor]]  # batches of training images that the weights do not learn from


@dataclass(frozen=True)
class Task:
    """The inputs of a method.

    ``tables`` maps every metric with a budget to its cost table. ``budgets`` are absolute. They may be empty in
    ``init`` and in the part of a search that several budgets share: nothing may depend on them there. ``recipe`` says
    how the weights of the supernet are trained. ``config`` is the method's own. If ``keep_weights``, the found net
    starts from the weights of the supernet, so a method should choose no option whose weights were cut off.
    The ``teacher`` of the recipe is built anew when a search is resumed.
    """

    tables: Mapping[str, CostTable]
    budgets: tuple[Budget, ...]
    data: Data
    recipe: Recipe
    config: Any
    seed: int = 0
    keep_weights: bool = False
    teacher: Teacher | None = None

    @cached_property
    def class_weights(self) -> Tensor | None:
        """The weight of each class in every loss of the search, [num_classes]; None if all weigh alike."""
        return class_weights(self.recipe, self.data)

    @cached_property
    def criterion(self) -> Criterion:
        """``(logits, images, labels) -> scalar``: the loss of the weights, without the method's own terms."""
        return make_criterion(self.recipe, self.data, self.teacher)

    @property
    def limits(self) -> dict[str, float]:
        """Metric -> its budget."""
        return {b.metric: b.limit for b in self.budgets}

    def weight_batches(self, fraction: float) -> Batches:
        """The images that weights learn from, when ``fraction`` of the training images are held out."""
        indices = self.data.split(fraction, self.seed)[0] if fraction else None
        return self.data.train_batches(self.recipe.batch_size, seed=self.seed, indices=indices)

    def steps(self, fraction: float) -> int:
        """The number of weight steps of a whole search, when ``fraction`` of the training images are held out."""
        return self.recipe.epochs * steps_per_epoch(self.weight_batches(fraction), self.recipe)

    def held_out_batches(self, fraction: float) -> Batches:
        """The held-out training images. If ``fraction`` is 0, all training images in another order."""
        indices = self.data.split(fraction, self.seed)[1] if fraction else None
        return self.data.train_batches(self.recipe.batch_size, seed=self.seed + 1, indices=indices)


@dataclass
class Search:
    """Everything that changes during a search. A copy (``copy.deepcopy``) can go on to another budget."""

    net: Supernet
    learner: Learner | None  # of the weights; None if the method trains no weights
    own: Any  # the state of the method
    taken: int = 0  # held-out batches so far


def nothing(*_: Any) -> dict[str, Any]:
    """The default for functions that a method leaves out: does nothing and returns an empty dict."""
    return {}


@dataclass(frozen=True)
class Method:
    """One way to choose a network. Functions that are left out do nothing.

    Args:
        summary: what the method decides, and from what, in one line.
        source: the paper.
        needs: what it chooses from, beside the architecture.
        of_classes: it works only with the logits of classes, not with a program's own loss.
        deviations: where it differs from the paper.
        choose: ``(search, task) -> Arch`` inside the budgets of the task. Most methods use
            `dnas.methods.derive.derive`.
        config: a frozen dataclass that checks itself; its fields are the method's flags.
        init: ``(net, task) -> own``, the method's state. Raises UserError if the task gives it nothing to do.
        loss: ``(search, task, images, labels, progress) -> scalar`` of one weight step; progress is in [0, 1). None: no
            weights are trained.
        after_step: ``(search, task, progress, held_out) -> row``, between two weight steps, to learn, score or cut. The
            row goes into the history; its ``events`` lists the options that were cut off.
        held_out: ``config -> share`` of the training images that are the ``held_out`` batches of ``after_step``.
        work: ``config -> (shared, own)``, in trainings of the widest net. ``shared`` is the work that all budgets of a
            sweep share, and also the share of the steps before the first budget plays a part. ``own`` is the work for
            each budget.
        distributions: ``search -> {decision: [options]}``, if the method has probabilities to show.
        state_dict: ``search -> data``: ``own`` as plain data (see `dnas.runtime.checkpoint`).
        load_state_dict: ``(search, data)``: puts this data into a search that has just begun.
    """

    summary: str
    source: str
    choose: Callable[[Search, Task], Arch]
    needs: str = "nothing"
    of_classes: bool = False
    deviations: str = "none"
    config: type = NoConfig
    init: Callable[[Supernet, Task], Any] = nothing
    loss: Callable[[Search, Task, Tensor, Tensor, float], Tensor] | None = None
    after_step: Callable[[Search, Task, float, HeldOut], dict[str, Any]] = nothing
    held_out: Callable[[Any], float] = lambda config: 0.0
    work: Callable[[Any], tuple[float, float]] = lambda config: (0.0, 0.0)
    distributions: Callable[[Search], Mapping[str, Tensor]] = nothing
    state_dict: Callable[[Search], dict[str, Any]] = nothing
    load_state_dict: Callable[[Search, Mapping[str, Any]], Any] = nothing
