"""The loop of all methods: it feeds images, takes weight steps, and saves and loads the state of a search."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from dnas.methods.method import HeldOut, Method, Search, Task
from dnas.nets.supernet import Supernet
from dnas.runtime.checkpoint import load_module, module_data
from dnas.runtime.distributed import from_first
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.space import Arch
from dnas.training.loop import batches_of_step, cycle, learner_data, load_learner, make_learner, steps_per_epoch, train


def begin(method: Method, net: Supernet, task: Task) -> Search:
    """A search before its first step.

    Raises UserError if the space has only one network, or if the method has too few steps.
    """
    if net.space.num_archs() < 2:
        raise UserError(f"nothing can be searched: every decision of the space {net.name} has one option only")
    from_first(net.tensors())
    own = method.init(net, task)
    learner = None
    if method.loss:
        per_epoch = steps_per_epoch(task.weight_batches(method.held_out(task.config)), task.recipe)
        learner = make_learner(net, net.weight_parameters(), task.recipe, per_epoch)
    return Search(net, learner, own)


def steps_of(method: Method, task: Task) -> int:
    """The number of weight steps of a whole search; 0 if the method trains no weights."""
    return task.steps(method.held_out(task.config)) if method.loss else 0


def run(
    method: Method, search: Search, task: Task, *, on_row: Callable[[dict], None] = lambda row: None, until: float = 1.0
) -> None:
    """Run a search from its current step to ``until``, a share of all steps. ``on_row`` gets a history row per step.

    Until the share ``method.work(config)[0]`` no budget plays a part. Validation images are not touched. Several
    processes (`dnas.runtime.distributed`) search together. All of them need the same arguments, and all get the same
    result.
    """
    learner, loss_of = search.learner, method.loss
    if learner is None or loss_of is None:
        return
    fraction = method.held_out(task.config)
    batches, held_out = task.weight_batches(fraction), _counted(search, task, fraction)
    total = task.steps(fraction)
    macs = task.tables.get("macs") or CostTable.build(search.net.space, "macs")
    live = search.net.live_cost(macs)
    search.net.train()
    clock = time.perf_counter()
    for loss in train(
        lambda x, y: loss_of(search, task, x, y, learner.update / total), learner, batches, task.recipe
    ):  # fmt: skip
        step = learner.update - 1
        row: dict[str, Any] = {"step": step, "loss": loss}
        if task.recipe.grad_accum_steps > 1:
            row["batches"] = batches_of_step(step, batches, task.recipe)
        if learner.skipped_now:
            row["skipped"] = learner.skipped_now
        row["weight_ms"] = 1e3 * (time.perf_counter() - clock)
        row |= method.after_step(search, task, step / total, held_out)
        if row.get("events"):
            live = search.net.live_cost(macs)
        row["live_macs"] = live
        on_row(row)
        if learner.update / total >= until:
            return
        clock = time.perf_counter()


def _counted(search: Search, task: Task, fraction: float) -> HeldOut:
    """Held-out batches from the search's current place on. It counts them, so that a search can be resumed."""
    for pair in cycle(task.held_out_batches(fraction), search.taken):
        search.taken += 1
        yield pair


def search(
    method: Method, net: Supernet, task: Task, on_row: Callable[[dict], None] = lambda row: None
) -> tuple[Search, Arch]:
    """A whole search of ``net``, which is changed in place. Returns (the search, the arch that it chose)."""
    found = begin(method, net, task)
    run(method, found, task, on_row=on_row)
    return found, method.choose(found, task)


def search_data(method: Method, search: Search) -> dict[str, Any]:
    """A search between two steps as plain data (see `dnas.runtime.checkpoint`)."""
    return {
        "net": module_data(search.net),
        "learner": learner_data(search.learner) if search.learner else {},
        "own": method.state_dict(search),
        "taken": search.taken,
    }


def load_search(method: Method, search: Search, data: Mapping[str, Any]) -> None:
    """Put a search that has just begun into the state that `search_data` returned."""
    load_module(search.net, data["net"])
    if search.learner:
        load_learner(search.learner, data["learner"])
    method.load_state_dict(search, data["own"])
    search.taken = data["taken"]
