"""Torch-Pruning as a way to choose widths: magnitudes of groups (DepGraph, Fang et al., CVPR 2023).

Blocks and depth, which it does not choose, are those of the base network. It is an extra: pip install -e '.[peers]'.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from opponents import train_shared
from timm.utils import random_seed
from torch import Tensor, nn

from dnas.export.model_file import build_net
from dnas.methods.settings import GatesConfig
from dnas.nets.timm_space import TimmBase
from dnas.spec.checks import UserError
from dnas.spec.space import KEEP, Arch
from dnas.training.loop import cycle

if TYPE_CHECKING:
    from iso_setups import Lab

STEPS = 400  # from the whole network to none
Found = tuple[Arch, int]  # a net, and the training images that it took; one that is only looked at counts a third


def widest_base(lab: "Lab") -> Arch:
    """The base network at full width: base blocks, all layers."""
    return lab.net.space.complete(
        {
            d.name: d.options[-1] if d.is_width else KEEP if KEEP in d.options else d.base
            for d in lab.net.space.decisions
        }
    )


def plain_net(lab: "Lab", arch: Arch) -> nn.Module:
    """A network of the space as it is trained from scratch."""
    return build_net(lab.net.net_of(arch), num_classes=lab.data.num_classes, in_chans=lab.data.in_chans)


def layers_of(lab: "Lab") -> dict[str, str]:
    """Width of the base network -> the first layer that it is the number of output channels of.

    In a network of timm's it has the width's name. In a space of layers it is found by narrowing one width at a time.
    """
    if isinstance(lab.net.outline, TimmBase):
        return {d.name: d.name for d in lab.net.space.decisions}
    base, layers = widest_base(lab), {}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in plain_net(lab, base).named_parameters()}
    for name, width in base.items():
        d = lab.net.space.by_name[name]
        if d.is_width and len(d.options) > 1:
            other = lab.net.space.complete({**base, name: d.options[-2]})
            with torch.device("meta"):
                narrower = plain_net(lab, other).named_parameters()
            layers[name] = next(
                n.rpartition(".")[0]
                for n, p in narrower
                if p.ndim > 1 and (p.shape[0], shapes[n][0]) == (d.options[-2], width)
            )
    return layers


def trained(lab: "Lab", seed: int, prepare: Callable[[nn.Module], Callable[[], None]] | None = None) -> tuple:
    """The widest base net, trained as long as a search's supernet; held-out images, labels; how many images it saw.

    ``prepare(model)`` returns what is to be called between the gradients and the step.
    """
    random_seed(seed)
    outline = lab.net.outline
    model = outline.create() if isinstance(outline, TimmBase) else plain_net(lab, widest_base(lab))
    model.to(lab.device)
    rest, held_out = lab.data.split(GatesConfig.gate_fraction, seed)
    between = prepare(model) if prepare else None
    seen = train_shared(lab, model, list(model.parameters()), model, rest, seed, between)
    x, y = next(cycle(lab.data.train_batches(min(len(held_out), 500), seed=seed, indices=held_out)))
    return model, x, y, seen


def arch_of(lab: "Lab", model: nn.Module, layers: dict[str, str]) -> Arch:
    """The architecture of a base network that was cut; widths off the grid become the nearest ones on it."""
    space, found = lab.net.space, dict(widest_base(lab))
    for name, layer in layers.items():
        width = model.get_submodule(layer).out_channels
        found[name] = min(space.by_name[name].options, key=lambda w, width=width: abs(int(w) - width))
    return space.complete(found)


def example(lab: "Lab") -> Tensor:
    """One image."""
    return torch.zeros(1, lab.data.in_chans, lab.setup.img_size, lab.setup.img_size, device=lab.device)


def cut(lab: "Lab", model: nn.Module, pruner) -> Arch:
    """The first network within the budget. Raises UserError if there is none."""
    layers = layers_of(lab)
    for _ in range(STEPS):
        arch = arch_of(lab, model, layers)
        if lab.tables["macs"].of(arch) <= lab.budgets[0].limit:
            return arch
        pruner.step()
    raise UserError(f"{STEPS} steps did not reach {lab.budgets[0]}")


def pruner_of(kind: Callable, lab: "Lab", model: nn.Module):
    """Torch-Pruning's pruner of a global rank of magnitudes; the classifier and squeezed widths stay."""
    import torch_pruning as tp

    squeezed = [module for name, module in model.named_modules() if name.endswith("se.conv_reduce")]
    return kind(
        model,
        example(lab),
        importance=tp.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,  # the space ends there, too
        iterative_steps=STEPS,
        round_to=lab.setup.divisor,
        ignored_layers=[model.get_classifier(), *squeezed],  # type: ignore[operator]
    )


def torch_pruning(lab: "Lab", seed: int) -> Found:
    """Importance of a trained net."""
    import torch_pruning as tp

    model, _, _, seen = trained(lab, seed)
    return cut(lab, model, pruner_of(tp.pruner.BasePruner, lab, model)), seen


def torch_pruning_sparse(lab: "Lab", seed: int) -> Found:
    """Importance of a net that is trained to be sparse."""
    import torch_pruning as tp

    pruners = []

    def prepare(model: nn.Module) -> Callable[[], None]:
        pruners.append(pruner_of(tp.pruner.GroupNormPruner, lab, model))
        return partial(pruners[0].regularize, model)

    model, _, _, seen = trained(lab, seed, prepare)
    return cut(lab, model, pruners[0]), seen
