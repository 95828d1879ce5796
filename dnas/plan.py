"""What all budgets of ``dnas search`` have in common, and one network of its space: built, exported, saved."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dnas.export.arch_schema import DATA
from dnas.export.model_file import arch_document, build_net, count_macs, save_weights, write_export
from dnas.export.own_file import write_program
from dnas.methods.method import Method, Task
from dnas.nets.supernet import Supernet
from dnas.spec.budget import Budget
from dnas.spec.cost import CostTable
from dnas.spec.image_size import sides
from dnas.spec.latency_table import LatencyTable
from dnas.spec.recipe import Recipe
from dnas.spec.space import Arch
from dnas.training.batches import Data


@dataclass(frozen=True)
class Plan:
    """What all budgets of a command have in common. ``latency_device``: that of the table, where it is at hand."""

    args: argparse.Namespace
    net: Supernet
    tables: dict[str, CostTable]
    data: Data
    recipe: Recipe
    method: Method
    task: Task  # of the search, without the budgets
    device: torch.device
    info: dict
    latency: LatencyTable | None
    latency_device: torch.device | None


@dataclass(frozen=True)
class BudgetRun:
    """One budget, the networks of it that cost nothing to choose, and where the found one goes."""

    budgets: tuple[Budget, ...]
    rules: Mapping[str, Arch]  # "uniform" and "balanced"
    folder: Path
    name: str


def build(plan: Plan, arch: Arch, drop: bool = False) -> nn.Module:
    """One network of the space, freshly initialised, on the CPU; with the recipe's rates of dropout if ``drop``."""
    recipe, data = plan.recipe, plan.data
    rates = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path} if drop else {}
    net = plan.net.net_of(arch)
    return build_net(net, num_classes=data.num_classes, in_chans=data.in_chans, own=plan.net.own, **rates)


def export_arch(folder: Path, name: str, net: Supernet, arch: Arch, data: Data, tables, budgets, info) -> dict:
    """Write arch.json and model.py. Raises RuntimeError unless the counted costs equal the cost tables' to the unit."""
    shown = {key: getattr(data, key) for key in DATA}
    rows = [
        {
            "metric": b.metric,
            "limit": b.limit if b.metric == "ms" else int(b.limit),
            "reached": tables[b.metric].of(arch),
        }
        for b in budgets
    ]
    document = arch_document(
        name, net.net_of(arch), shown, supernet=net.name, answers=arch, budget=rows, provenance=info, own=net.own
    )
    plain = build_net(document["net"], num_classes=data.num_classes, in_chans=data.in_chans, own=net.own)
    counted = count_macs(plain, data.in_chans, data.img_size)
    if not counted == document["macs"] == tables["macs"].of(arch) or document["params"] != tables["params"].of(arch):
        costs = {metric: (document[metric], table.of(arch)) for metric, table in tables.items()}
        raise RuntimeError(f"fvcore counts {counted} MACs; the net as built and its cost tables say {costs}")
    write_export(folder, document, net.own)
    return document


def save_model(plan: Plan, model: nn.Module, folder: Path) -> None:
    """Write the weights of a trained network; the whole network, too, if only a program can make it again."""
    save_weights(model, folder)
    if plan.net.own and not plan.net.own.file:
        write_program(model, (plan.data.in_chans, *sides(plan.data.img_size)), folder)
