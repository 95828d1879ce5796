"""The set-ups that the benchmarks compare methods on, and what makes one ready in a process."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.supernet import Supernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.budget import Budget, parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.layer_space import EfficientNetSpace
from dnas.spec.recipe import Recipe
from dnas.training.data import Data, load_data
from supernets import SUPERNETS

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setup:
    """All that two nets must have in common to be compared.

    ``num_train`` images, evenly over the classes; ``search`` is the recipe of a supernet's weights; ``seeds`` trainings
    of each random net. ``most_layers`` a stage: two processor cores cannot train a few hundred deep nets. ``ties`` and
    ``most_widths``: see `TimmBase`. Costs are those of images of ``cost_size`` pixels, by default ``img_size``.
    """

    supernet: str  # of `SUPERNETS`, or a network of timm's
    width_mult: float
    divisor: int
    budget: str
    data: str
    num_train: int
    img_size: int
    recipe: Recipe
    search: Recipe
    seeds: int
    most_layers: int = 4
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # of timm's network
    ties: tuple[str, ...] = ()
    most_widths: int = 32
    cost_size: int = 0


ADAMW = Recipe(epochs=12)


SEARCH = Recipe(epochs=24)


SGD = Recipe(epochs=6, opt="sgd", lr=0.3, weight_decay=1e-3, warmup_epochs=1)


LIKE_20 = {"layers": [2, 2, 2, 2], "channels": [16, 32, 48, 64]}  # a ResNet of 18 layers, as narrow as ResNet-20


DILATED = {"output_stride": 8}  # timm's strides leave a map of one pixel of an image of 32


EIGHT = replace(SGD, epochs=8, lr=0.1)
SETUPS = {
    "digits": Setup("prunet", 0.35, 2, "10%", "digits", 1437, 8, ADAMW, SEARCH, 3),
    "digits_by_4": Setup("prunet", 0.35, 4, "10%", "digits", 1437, 8, ADAMW, SEARCH, 3),  # for runtimes that want it
    "mobilenet_v2": Setup("mobilenet_v2", 0.5, 2, "10%", "cifar10", 5000, 12, SGD, SEARCH, 8, most_layers=1),
    "prunet": Setup("prunet", 0.35, 4, "10%", "cifar10", 5000, 12, SGD, SEARCH, 9, most_layers=2),
}
SETUPS |= {f"digits_{percent}": replace(SETUPS["digits"], budget=f"{percent}%") for percent in (25, 50)}
for percent in (20, 30, 50):
    budget = f"{percent}%"
    SETUPS |= {
        f"timm_resnet_{percent}": Setup(
            "resnet18", 1, 2, budget, "cifar10", 5000, 32, EIGHT, SEARCH, 2, kwargs=LIKE_20
        ),
        f"timm_mobilenet_{percent}": Setup(
            "mobilenetv2_035", 1, 4, budget, "cifar10", 5000, 32, EIGHT, SEARCH, 2, kwargs=DILATED
        ),
    }


# ViT-Tiny, narrower and shallower: patches of 4 pixels, heads of 32 channels.
SMALL_VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
SLOWER = {"lr": 1e-3, "warmup_epochs": 3}  # transformers are trained with smaller rates
SETUPS["timm_vit_50"] = Setup(
    "vit_tiny_patch16_224", 1, 4, "50%", "cifar10", 5000, 32, replace(ADAMW, **SLOWER), replace(SEARCH, **SLOWER), 2,
    kwargs=SMALL_VIT,
)  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """A set-up made ready in one process. ``net`` is a supernet that nobody trains: it tells the space."""

    setup: Setup
    data: Data
    net: Supernet
    tables: dict[str, CostTable]
    budgets: tuple[Budget, ...]
    device: torch.device

    def supernet(self, bipath: bool = True) -> Supernet:
        """A fresh supernet of the set-up, on its device."""
        return supernet_of(self.net.outline, bipath).to(self.device)


def supernet_of(outline: EfficientNetSpace | TimmBase, bipath: bool = True) -> Supernet:
    """The supernet of a description, with or without pairs of inner widths."""
    if isinstance(outline, TimmBase):
        return TimmSupernet(outline)
    return MacroSupernet(replace(outline, bipath=outline.bipath and bipath))


def outline_of(setup: Setup, num_classes: int) -> EfficientNetSpace | TimmBase:
    """The description of a set-up's space; it needs no images."""
    fixed = {"num_classes": num_classes, "img_size": setup.cost_size or setup.img_size, "divisor": setup.divisor}
    if setup.supernet in SUPERNETS:
        macro = SUPERNETS[setup.supernet](**fixed, width_mult=setup.width_mult)
        stages = tuple(replace(s, depth=min(s.depth, setup.most_layers)) for s in macro.stages)
        return replace(macro, stages=stages)
    return TimmBase(setup.supernet, **fixed, kwargs=setup.kwargs, ties=setup.ties, most_widths=setup.most_widths)


def open_lab(setup: Setup, data_dir: str, device: str) -> Lab:
    """Load the data and build the space. UserError if the data is not there."""
    if setup.data == "digits":
        data = load_data("digits", img_size=setup.img_size, device=device)
    elif data_dir:
        data = load_data("", data_dir, img_size=setup.img_size, device=device)
    else:
        raise UserError("this set-up needs --data-dir (or DNAS_CIFAR10): a folder or .tar.gz of CIFAR-10's images")
    net = supernet_of(outline_of(setup, data.num_classes))
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    budgets = resolve_budgets(tables, parse_budget(setup.budget))
    return Lab(setup, data.take(setup.num_train), net, tables, budgets, torch.device(device))
