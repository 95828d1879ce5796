"""A supernet around a network of timm's or a user's: a width gate on every group of channels that may get narrower.

Nothing is added to the network. A gate acts where its channels are read: the factor f of a channel scales the weights w
of the convolutions and linear layers that read it, ``conv(x * f, w) = conv(x, w * f)``. This is a product with weights
and not with feature maps. Each gate is applied exactly once on every path, and no norm behind it can undo it.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from dnas.nets.bipath_block import prefix_mask
from dnas.nets.channels import Axis, ChannelAxis, Channels, is_inside
from dnas.nets.cut_tensors import remove_channels
from dnas.nets.layer_choice import Answers
from dnas.nets.markov_gate import MarkovGate
from dnas.nets.residual_blocks import ResidualBlock, residual_blocks, scaled_blocks
from dnas.nets.supernet import Gate, Supernet
from dnas.nets.timm_space import Base, protected, space_of_channels
from dnas.nets.tracing import leaves, trace
from dnas.nets.weighted_norms import weighted_norms
from dnas.spec.checks import UserError, first_line
from dnas.spec.image_size import sides
from dnas.spec.space import DROP, KEEP, Option

Factors = Mapping[str, Tensor]  # group -> the factor of each of its units
Reads = Mapping[Axis, tuple[frozenset[str], Tensor]]  # axis that reads -> its groups; place of each channel's factor


def read_by(model: nn.Module, channels: Channels) -> Reads:
    """For every weight that reads channels, and every layer norm: the place of each channel's factor.

    It is a place in a vector that holds a 1 and then the factors of all units, group by group.
    """
    ends = np.cumsum([1, *(g.size for g in channels.groups)])
    starts = {g.name: end for g, end in zip(channels.groups, ends[:-1], strict=True)}
    found: dict[Axis, tuple[frozenset[str], Tensor]] = {}
    for name, dim in [op.reads for op in channels.ops if op.reads] + [(f"{n}.weight", 0) for n in channels.norms]:
        path, _, own = name.rpartition(".")
        weight: Tensor = getattr(model.get_submodule(path), own)  # no parameter inside torch's functional_call
        index = np.zeros(weight.shape[dim], dtype=np.int64)
        groups = [g for g in channels.groups if (name, dim) in g.places]
        for g in groups:
            index[g.places[name, dim]] = starts[g.name] + np.arange(g.size)[:, None]
        if groups:
            found[name, dim] = frozenset(g.name for g in groups), torch.from_numpy(index).to(weight.device)
    return found


def gated(model: nn.Module, channels: Channels, reads: Reads, factors: Factors, x: Tensor) -> Any:
    """``model(x)`` with every channel scaled by the factor of its unit wherever it is read."""
    if not factors:
        return model(x)
    scaled, norms, like = {}, {}, next(model.parameters())
    every = torch.cat(
        [like.new_ones(1), *(factors[g.name] if g.name in factors else like.new_ones(g.size) for g in channels.groups)]
    )
    for (name, dim), (groups, index) in reads.items():
        if groups.isdisjoint(factors):
            continue
        path, _, own = name.rpartition(".")
        weight, factor = getattr(model.get_submodule(path), own), every[index]  # a buffer may convolve, too
        if name.rpartition(".")[0] not in channels.norms:
            spread = factor.reshape([-1 if d == dim else 1 for d in range(weight.ndim)])
            # A convolution that standardises its weights does so over the channels that it reads. So mean and deviation
            # are weighted by the factors: this equals a narrower convolution if factors are 0 and 1.
            if name.rpartition(".")[0] in channels.standardised:
                mean = (weight * spread).mean((1, 2, 3), keepdim=True) / spread.mean()
                scaled[name] = (weight - mean) * spread / spread.mean().sqrt()
            else:
                scaled[name] = weight * spread
        else:
            norms[name] = factor
    with weighted_norms(model, norms) if norms else nullcontext():
        return functional_call(model, scaled, (x,))


def safe_channels(model: nn.Module, image: Sequence[int], tied: frozenset[str] = frozenset()) -> Channels:
    """The channels of ``model``, without the groups that must keep their width for the network to work.

    One pass does not show everything that a network does with numbers of channels that it computes or keeps elsewhere.
    So all groups are cut, and the logits are compared with those of the masked network. Sizes are random and, if there
    are more than 8 units, odd. So numbers that must be equal in the network (an embedding and all heads together) are
    not equal by chance. The comparison uses double precision, and random weights that hide no channel. If the logits
    differ or the network fails, the set of groups is split in halves and each half is tried. Groups that break the
    network keep their widths. If heads of attention are among them, all is tried again with these modules ``tied``
    (see `trace`), and the result with more channels counts.
    """
    channels = trace(model, image, tied)
    found, model = channels, copy.deepcopy(model).double().eval()
    draws = torch.Generator().manual_seed(0)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.ndim == 1 and t.is_floating_point():  # many are 0 or 1 at first, and a branch times 0 shows nothing
            low = 0.5 if "var" in name or "weight" in name or "gamma" in name else -0.5
            t.data.copy_(torch.rand(t.shape, generator=draws) + low)
        elif isinstance(t, nn.Parameter) and float(t.detach().abs().max()) < 1e-3:  # many tables, heads of classes
            t.data.normal_(0, 0.1, generator=draws)
    x = torch.randn(1, *image, generator=draws, dtype=torch.double)
    spans = {g.name: (g.size // 4 + 1, g.size - g.size // 4) for g in channels.groups}  # about the middle half
    drawn = {name: int(torch.randint(*span, (), generator=draws)) for name, span in spans.items()}
    tried = {g.name: drawn[g.name] | (g.size > 8) for g in channels.groups}

    def fails(names: Sequence[str]) -> str:
        """Why the network does not work with fewer channels of these groups; empty if it does."""
        sizes = {name: tried[name] for name in names}
        factors = {g.name: (torch.arange(g.size) < sizes[g.name]).double() for g in channels.groups if g.name in sizes}
        masked, cut = gated(model, channels, read_by(model, channels), factors, x), copy.deepcopy(model)
        remove_channels(cut, channels.cut(sizes)[1])
        try:
            pairs = zip(leaves(cut(x)), leaves(masked), strict=True)
            errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs if isinstance(b, Tensor)]
            error = torch.stack(errors).max()  # NaN if one of them is
        except Exception as problem:  # any error of the network's own code
            return first_line(problem)
        return "" if float(error) < 1e-9 else f"the logits differ by {float(error):.1e}"

    with torch.no_grad():
        good: list[str] = []

        def sort_out(names: list[str]) -> None:
            nonlocal channels
            if why := fails([*good, *names]):
                if len(names) == 1:
                    channels = channels.without(names, why)
                    return
                sort_out(names[: len(names) // 2])
                sort_out(names[len(names) // 2 :])
            else:
                good.extend(names)

        sort_out([g.name for g in channels.groups])
    broken = found.products_of({g.name for g in found.groups} - {*good}) - tied
    other = safe_channels(model, image, tied | broken) if broken else channels
    return max(channels, other, key=lambda c: sum(at.size for g in c.groups for at in g.places.values()))


def sizes_on(model: nn.Module, axes: Iterable[Axis]) -> dict[str, dict[str, Any]]:
    """Module -> {name: size} of what lies on these axes, as `dnas.export.narrowed.narrow` reads it.

    The size of a tensor or list is a list; its entries are None on other axes.
    """
    modules: dict[str, dict[str, Any]] = {}
    for full, index in axes:
        path, _, name = full.rpartition(".")
        value, sizes = getattr(model.get_submodule(path), name), modules.setdefault(path, {})
        if isinstance(value, (int, float)):
            sizes[name] = value
        else:
            lengths = value.shape if isinstance(value, Tensor) else value
            sizes.setdefault(name, [None] * len(lengths))[index] = lengths[index]
    return modules


class TracedSupernet(Supernet):
    """All narrower versions of a network.

    Args:
        base: what the network is, and the widths that its groups of channels may have.
        model: the network with the weights to start from. It is the widest net of the space, and belongs to the
            supernet from now on.

    Raises UserError if the network cannot be run on an image of its size, or has no channels that can be cut.
    """

    def __init__(self, base: Base, model: nn.Module) -> None:
        super().__init__()
        self.outline, self.model = base, model
        image = (base.in_chans, *sides(base.img_size))
        try:
            channels = protected(safe_channels(self.model, image), self.model, base.keep)
            blocks, self.blocks_fixed = self._blocks(channels, image) if base.depth else ([], [])
        except UserError:
            raise
        except Exception as error:  # of the network's own code, or of an operation that no rule knows
            reason = first_line(error)
            raise UserError(f"{base} cannot be run on an image of {' x '.join(map(str, image))}: {reason}") from None
        if not channels.groups:
            reason = "; ".join(channels.fixed[:2]) or "it has no convolutions one after the other"
            raise UserError(f"{base} has no channels that can be cut: {reason}")
        if base.depth and not blocks:
            reason = "; ".join(["", *self.blocks_fixed[:2]])
            raise UserError(f"--depth: {base} has no residual block that can be dropped{reason}")
        self.channels = self.whole = channels
        self.droppable, self.layers = blocks, nn.ModuleList(map(ResidualBlock, blocks))
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        filters = {name: b.shape for name, b in self.model.named_buffers() if b.ndim > 1}
        self.space, self.decision_of = space_of_channels(self.channels, shapes, filters, base, blocks)
        self.widths = nn.ModuleList(MarkovGate(d.options) for d in self.space.decisions if d.is_width)
        self.steps = {g.name: g.step for g in self.channels.groups if g.name in self.decision_of}
        self.reads: Reads = {}

    def _blocks(self, channels: Channels, image: Sequence[int]) -> tuple[list[str], list[str]]:
        """The residual blocks that may be dropped, and why others stay. A block with a protected module stays."""
        blocks, why = residual_blocks(self.model, image, [op.module for op in channels.ops])
        modules = [name for name, _ in self.model.named_modules()]
        kept = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in self.outline.keep)]
        stay = [block for block in blocks if any(is_inside(name, block) for name in kept)]
        return [b for b in blocks if b not in stay], [*why, *(f"{block}: --keep" for block in stay)]

    def dropped(self, answers: Answers) -> list[str]:
        """The blocks that these answers drop."""
        found = {name: answers[f"{name}/keep"] for name in self.droppable}
        return [name for name, answer in found.items() if isinstance(answer, str) and answer == DROP]

    def forward(self, x: Tensor, answers: Answers) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_classes]."""
        like, factors = next(self.model.parameters()), {}
        dropped = self.dropped(answers)
        learnt = {name: s for name in self.droppable if isinstance(s := answers[f"{name}/keep"], Tensor)}
        if not self.reads or next(iter(self.reads.values()))[1].device != like.device:
            self.reads = read_by(self.model, self.channels)
        gates = self.gates()
        for group, name in self.decision_of.items():
            if name not in gates or self._block_of(name) in dropped:
                continue
            answer, step, widest = answers[name], self.steps[group], gates[name].widest()
            if isinstance(answer, Tensor):
                factors[group] = answer[::step]
            elif answer < widest:
                factors[group] = prefix_mask(widest // step, answer // step, like)
        with scaled_blocks(self.model, learnt, dropped):
            return gated(self.model, self.channels, self.reads, factors, x)

    def _block_of(self, decision: str) -> str:
        """The block that may be dropped and that all channels of a width are in; empty if there is none."""
        return "".join(name.removesuffix("/keep") for name, _ in self.space.by_name[decision].when)

    def gates(self) -> dict[str, Gate]:
        """Decision -> its gate, for every decision that is still part of the net."""
        found: dict[str, Any] = {f"{layer.name}/keep": layer.skip for layer in self.layers}
        gone = {(f"{layer.name}/keep", KEEP) for layer in self.layers if layer.skip.is_removed}
        widths = [d for d in self.space.decisions if d.is_width]
        pairs = zip(widths, self.widths, strict=True)
        return found | {d.name: gate for d, gate in pairs if gone.isdisjoint(d.when)}

    def fit(self, optimizers: Sequence[Optimizer] = ()) -> None:
        """Cut every module to what the live gates need, and remove the blocks that were dropped for good."""
        for name, layer in zip(self.droppable, self.layers, strict=True):
            if layer.skip.is_removed and not isinstance(self.model.get_submodule(name), nn.Identity):
                self.model.set_submodule(name, nn.Identity())
                self.channels = self.channels.without_blocks([name])
        left = self.gates()
        for k, d in enumerate(d for d in self.space.decisions if d.is_width):
            if d.name not in left:
                self.widths[k] = nn.Identity()
        self.channels, goes = self.channels.cut(self.sizes({n: gate.widest() for n, gate in left.items()}))
        remove_channels(self.model, goes, optimizers)
        self.reads = {}  # computed again in the next step

    def sizes(self, widths: Mapping[str, Option]) -> dict[str, int]:
        """Group -> its number of units, for the widths of decisions."""
        of = self.decision_of.items()
        return {group: int(widths[name]) // self.steps[group] for group, name in of if name in widths}

    def channel_axes(self) -> dict[str, list[ChannelAxis]]:
        """Width decision -> the tensor axes that hold its channels."""
        writes, reads = {op.writes for op in self.channels.ops}, {op.reads for op in self.channels.ops}
        axes: dict[str, list[ChannelAxis]] = {}
        for group in self.channels.groups:
            if group.name not in self.decision_of:
                continue
            own = axes.setdefault(self.decision_of[group.name], [])
            for (full, dim), index in group.places.items():
                path, _, name = full.rpartition(".")
                module = self.model.get_submodule(path)
                if isinstance(getattr(module, name), Tensor):  # modules keep numbers of channels, too
                    role = "out" if (full, dim) in writes else "in" if (full, dim) in reads else "norm"
                    own.append(ChannelAxis(module, name, dim, role, index))
        return axes

    def layer_weights(self) -> dict[str, list[nn.Parameter]]:
        """Decision on whether a block stays -> the weights of this block."""
        blocks = {name: self.model.get_submodule(name) for name in self.droppable}
        return {f"{name}/keep": [p for p in m.parameters() if p.ndim > 1] for name, m in blocks.items()}

    def plain_state(self) -> dict[str, Tensor]:
        """The weights under the names of the plain network."""
        return self.model.state_dict()
