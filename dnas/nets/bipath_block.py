"""The bi-path block over inner widths (PruNet's Prunode, arXiv 2209.11785), around timm's own blocks.

The block has two copies, at the inner widths ``small < large``. They share one bank of weights; the small copy is the
prefix of this bank. Each channel before the squeeze-excite is computed without the other hidden channels. So this part
is computed once, and its batch statistics are the same in both copies. The last norm gets other sums in each copy and
is kept per copy. Time and memory are at most those of two paths, for any number of widths in the grid: O(1).

The candidates of one layer share their common parts, too (`share`). With a separate bank of weights, each of eight
random candidates would give the next layer other features, and a short search would train none of them.

Source: the paper's abstract has the bi-path block and its O(1) cost. The bracketing rule of `PairGate.update` is ours;
it realises "the candidates are changed according to the current architecture weights". Deviation: the copies and the
candidates share weights.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from torch import Tensor, nn
from torch.nn import functional as F

from dnas.nets.gate import Gate, gumbel_softmax, split_like
from dnas.nets.markov_gate import MarkovGate
from dnas.spec.space import Option

TimmBlock = InvertedResidual | EdgeResidual | DepthwiseSeparableConv


def parts(block: TimmBlock) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], nn.Conv2d, str]:
    """A timm block as (convolutions and norms up to the hidden map, last convolution, name of the last norm)."""
    if isinstance(block, InvertedResidual):
        return [(block.conv_pw, block.bn1), (block.conv_dw, block.bn2)], block.conv_pwl, "bn3"
    if isinstance(block, EdgeResidual):
        return [(block.conv_exp, block.bn1)], block.conv_pwl, "bn2"
    return [(block.conv_dw, block.bn1)], block.conv_pw, "bn2"


# Modules applied to a prefix of their channels. For all channels the module itself runs, so that the result is bit for
# bit that of plain timm.


def _conv(conv: nn.Conv2d, x: Tensor, width: int) -> Tensor:
    if width == conv.out_channels:
        return conv(x)
    groups = width if conv.groups > 1 else 1  # depthwise, or dense
    bias = None if conv.bias is None else conv.bias[:width]
    return F.conv2d(x, conv.weight[:width], bias, conv.stride, conv.padding, conv.dilation, groups)


def _norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    width = x.shape[1]
    return norm(x) if width == norm.num_features else _batch_norm(norm, x, norm.weight[:width], norm.bias[:width])


def _batch_norm(norm: nn.BatchNorm2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if norm.training:
        norm.num_batches_tracked.add_(1)
    mean, var = norm.running_mean[: x.shape[1]], norm.running_var[: x.shape[1]]  # views: they are updated in place
    return norm.act(F.batch_norm(x, mean, var, weight, bias, norm.training, norm.momentum, norm.eps))


def channel_factors(by: Tensor | Option, length: int, like: Tensor) -> Tensor:
    """The answer ``by`` of a width gate as a factor for each channel, [length].

    The answer is this tensor already, or it is the number of channels that stay.
    """
    return by if isinstance(by, Tensor) else prefix_mask(length, int(by), like)


def scaled_norm(norm: nn.BatchNorm2d, x: Tensor, by: Tensor | Option, times: Tensor | None = None) -> Tensor:
    """A norm of timm's, times the answer ``by`` of a width gate (see `channel_factors`) and the number ``times``.

    The norm's weight and bias are multiplied by both factors, so that no pass over the map is needed. For a norm with
    an activation (all of timm's give 0 for 0) the factors must be 0 or 1. Widths are masked and not sliced: even draws
    have other shapes in every step, and for each shape a CPU makes new kernels and a GPU selects kernels. A channel
    that stays unlikely is cut off for good (`dnas.nets.shrink`).
    """
    if times is None and not isinstance(by, Tensor) and by == norm.num_features:
        return norm(x)
    factor = channel_factors(by, norm.num_features, norm.weight)
    factor = factor if times is None else factor * times
    return _batch_norm(norm, x, norm.weight * factor, norm.bias * factor)


def _norms_of_both(y: Tensor, norms: Sequence[nn.BatchNorm2d], factors: Sequence[Tensor]) -> Tensor:
    """The sum of the two copies' last norms, each times its factor [out]: [B, 2 * out, H, W] -> [B, out, H, W].

    It is one norm without weights, and a 1x1 convolution with the weights of both norms. The reason: half of the
    channels of a channels_last map are not dense in memory, and slow to normalise.
    """
    first = norms[0]
    mean, var = (torch.cat([getattr(n, name) for n in norms]) for name in ("running_mean", "running_var"))
    y = F.batch_norm(y, mean, var, None, None, first.training, first.momentum, first.eps)
    if first.training:
        for norm, own_mean, own_var in zip(norms, mean.chunk(2), var.chunk(2), strict=True):
            norm.running_mean.copy_(own_mean)
            norm.running_var.copy_(own_var)
            norm.num_batches_tracked.add_(1)
    scales = torch.cat([torch.diag(n.weight * f) for n, f in zip(norms, factors, strict=True)], 1)
    return F.conv2d(y, scales[:, :, None, None], sum(n.bias * f for n, f in zip(norms, factors, strict=True)))


def prefix_mask(length: int, width: int, like: Tensor) -> Tensor:
    """[length]: 1 for the first ``width``, 0 after."""
    return (torch.arange(length, device=like.device) < width).to(like.dtype)


def _squeeze_excite(se: nn.Module, h: Tensor, width: int | None = None) -> Tensor:
    """Squeeze-excite that reads only the first ``width`` channels (default: all channels of ``h``)."""
    width = width or h.shape[1]
    if isinstance(se, nn.Identity) or width == se.conv_reduce.in_channels:
        return se(h)
    mean = h.mean((2, 3), keepdim=True)
    s = F.conv2d(mean[:, :width], se.conv_reduce.weight[:, :width], se.conv_reduce.bias)
    s = F.conv2d(se.act1(s), se.conv_expand.weight[: h.shape[1]], se.conv_expand.bias[: h.shape[1]])
    return h * se.gate(s)


Made = dict[tuple[nn.Module, int], Tensor]  # (convolution, width) -> the result after its norm and activation


def expand(block: TimmBlock, x: Tensor, width: int, made: Made | None = None) -> Tensor:
    """The first ``width`` channels of the hidden map before squeeze-excite: [B, in, H, W] -> [B, width, H', W'].

    ``made`` keeps the results for this ``x`` of convolutions that the candidates of a layer share.
    """
    made = {} if made is None else made
    for conv, norm in parts(block)[0]:
        if (conv, width) not in made:
            if conv.groups > 1:  # depthwise: it reads hidden channels
                x = x[:, :width]
            made[conv, width] = _norm(norm, _conv(conv, x, width))
        x = made[conv, width]
    return x


def project(block: TimmBlock, norm: nn.BatchNorm2d, h: Tensor, out: Tensor | Option, times: Tensor | None) -> Tensor:
    """The residual branch from a prefix of the hidden map: [B, width, H', W'] -> [B, out, H', W'].

    ``norm`` is the last norm of the block, or another one in its place. ``out`` and ``times`` scale it (`scaled_norm`).
    """
    conv = parts(block)[1]
    h = _squeeze_excite(block.se, h)
    h = conv(h) if h.shape[1] == conv.in_channels else F.conv2d(h, conv.weight[:, : h.shape[1]])
    return scaled_norm(norm, h, out, times)


@torch.no_grad()
def share(blocks: Sequence[TimmBlock]) -> None:
    """Let the candidates of one layer share equal modules, and start alike with the others. The blocks change in place.

    All inverted residuals share the expansion. Those with the same kernel size also share the depthwise convolution.
    All candidates except depthwise separable blocks share the projection; a narrower one uses its prefix. A larger
    depthwise kernel starts as the smaller kernel with a rim of zeros. A fused convolution starts as the product of
    expansion and depthwise kernel.
    """
    widest_first = sorted(blocks, key=lambda b: -parts(b)[1].in_channels)
    plain = [b for b in widest_first if isinstance(b, InvertedResidual)]
    by_kernel: dict[int, InvertedResidual] = {}
    for b in plain:
        b.conv_pw, b.bn1 = plain[0].conv_pw, plain[0].bn1
        like = by_kernel.setdefault(b.conv_dw.kernel_size[0], b)
        b.conv_dw, b.bn2 = like.conv_dw, like.bn2
    for size, b in by_kernel.items():
        smallest = by_kernel[min(by_kernel)].conv_dw.weight
        if rim := (size - min(by_kernel)) // 2:
            width = min(len(smallest), b.conv_dw.out_channels)
            b.conv_dw.weight[:width] = F.pad(smallest[:width], (rim,) * 4)
    for e in [b for b in widest_first if isinstance(b, EdgeResidual)] if plain else []:
        width = min(e.conv_exp.out_channels, *(p.conv_dw.out_channels for p in plain))
        product = plain[0].conv_pw.weight[:width] * by_kernel[min(by_kernel)].conv_dw.weight[:width]
        rim = (e.conv_exp.kernel_size[0] - product.shape[-1]) // 2
        if rim >= 0:
            e.conv_exp.weight[:width] = F.pad(product, (rim,) * 4)
    inverted = [block for block in widest_first if not isinstance(block, DepthwiseSeparableConv)]
    for block in inverted:
        block.conv_pwl = inverted[0].conv_pwl


class PairGate(Gate):
    """A gate over two inner widths at a time: two logits, and the rule that moves the pair over its grid.

    Args:
        widths: the ascending grid. The pair starts with the last width and the width at a quarter of the grid.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.options = self.widths = tuple(widths)
        self.low, self.high = max(0, len(widths) // 4 - 1), len(widths) - 1  # grid indices of the pair
        self.logits = nn.Parameter(torch.zeros(2 if self.high > self.low else 0))
        self.average = 0.5  # moving average of the larger width's probability

    @property
    def small(self) -> int:
        return self.widths[self.low]

    @property
    def large(self) -> int:
        return self.widths[self.high]

    def live(self) -> list[int]:
        """Indices of the pair, or of the one width that is left."""
        return sorted({self.low, self.high})

    def reachable(self) -> list[int]:
        """All indices, because the pair moves both ways."""
        return list(range(len(self.options)))

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """[number of options], zero for widths outside the pair."""
        return pair_distributions([self], temperature)[0]

    def soft(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """A Gumbel-softmax sample of the weights (q_small, q_large), [2]."""
        return gumbel_softmax(self.logits, temperature, generator)

    def update(self, p_large: float, threshold: float, decay: float = 0.8) -> tuple[int, int] | None:
        """Update the average of the larger width's probability, and return where the pair moves.

        ``p_large`` is this probability now. If the average of one width is above ``threshold``, the result is the new
        (low, high) grid indices. It is None if the pair stays: below the threshold, at the end of the grid, or with
        only one width left. The caller moves the gate and resizes the block (`dnas.nets.remove_options.move_pair`).

        The rule is a bracketing search on the grid. While the gap is wider than one step, the less likely width moves
        half-way to the other one (the optimum is below, between or above the two). At the smallest gap the pair slides
        by one step, so that a wrong early step can be corrected. The gap never grows.
        """
        if self.settled:
            return None
        self.average += (1 - decay) * (p_large - self.average)
        gap = self.high - self.low
        half, low, high = max(1, gap // 2), self.low, self.high
        if self.average > threshold:
            low, high = (high - half, high) if gap > 1 else (low + 1, high + 1)
        elif 1 - self.average > threshold:
            low, high = (low, low + half) if gap > 1 else (low - 1, high - 1)
        if (low, high) == (self.low, self.high) or low < 0 or high >= len(self.widths):
            return None
        return low, high

    @torch.no_grad()
    def move(self, low: int, high: int) -> None:
        """Set the pair to these grid indices. The logits and their average start again."""
        self.low, self.high, self.average = low, high, 0.5
        self.logits.zero_()


def pair_distributions(gates: Sequence[PairGate], temperature: float = 1.0) -> list[Tensor]:
    """The distributions of all gates over all their options, [number of options] each; 1 for the only option of a gate.

    A few operations compute all gates together.
    """
    learning = [g for g in gates if len(g.logits)]
    flat = gates[0].logits.new_zeros(sum(len(g.options) for g in gates))
    ends = np.cumsum([0, *(len(g.options) for g in gates)])
    start = dict(zip(gates, ends.tolist(), strict=False))
    if learning:
        places = [start[g] + k for g in learning for k in (g.low, g.high)]
        pairs = torch.softmax(torch.stack([g.logits for g in learning]) / temperature, 1)
        flat = flat.index_add(0, torch.tensor(places, device=flat.device), pairs.flatten())
    if certain := [start[g] for g in gates if not len(g.logits)]:
        flat = flat.index_fill(0, torch.tensor(certain, device=flat.device), 1.0)
    return split_like(flat, gates)


class Prunode(nn.Module):
    """A timm block with a pair of inner widths. ``forward`` gives the residual branch, without the shortcut.

    ``mid`` names the decision on the inner width.
    """

    def __init__(self, block: TimmBlock, mid: str, gate: PairGate) -> None:
        super().__init__()
        self.block, self.mid, self.gate = block, mid, gate
        self.norm_small = copy.deepcopy(getattr(block, parts(block)[2]))

    def forward(
        self, x: Tensor, mid: Tensor | int, out: Tensor | Option, times: Tensor | None = None, made: Made | None = None
    ) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']; ``mid``: a width, or the weights (q_small, q_large) of the two copies.

        ``out`` and the scalar ``times`` scale the result (see `scaled_norm`); ``made``: see `expand`.
        """
        small, large = self.gate.small, self.gate.large
        _, conv, last = parts(self.block)
        norms = self.norm_small, getattr(self.block, last)
        if isinstance(mid, int):
            norm = norms[0] if mid == small < large else norms[1]
            return project(self.block, norm, expand(self.block, x, mid, made), out, times)
        h = expand(self.block, x, large, made)
        factors = [q if times is None else q * times for q in mid]
        whole = conv.weight[:, :large]  # another candidate may have made the bank wider
        # The hidden map is never sliced, because a slice of a channels_last map is slow. The small copy reads the whole
        # map with weights that are zero beyond the prefix, so both copies are one convolution.
        inside = whole * prefix_mask(large, small, whole)[:, None, None]
        if isinstance(self.block.se, nn.Identity):
            channels = channel_factors(out, len(whole), whole)
            return _norms_of_both(F.conv2d(h, torch.cat([inside, whole])), norms, [q * channels for q in factors])
        y_small = F.conv2d(_squeeze_excite(self.block.se, h, small), inside)
        y_large = F.conv2d(self.block.se(h), whole)
        return scaled_norm(norms[0], y_small, out, factors[0]) + scaled_norm(norms[1], y_large, out, factors[1])


class GatedBlock(nn.Module):
    """A timm block with a Markov gate on its inner width (as in DMCP), without the shortcut.

    ``gate`` is the block's own gate. A depthwise separable block has none: it shares the width and the gate of its
    input stream.
    """

    def __init__(self, block: TimmBlock, mid: str, gate: MarkovGate | None = None) -> None:
        super().__init__()
        self.block, self.mid, self.gate = block, mid, gate

    def forward(
        self, x: Tensor, mid: Tensor | int, out: Tensor | Option, times: Tensor | None = None, made: Made | None = None
    ) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']; ``mid``: a width, or the factor of each hidden channel.

        The factor is applied once, after the last norm and activation of the hidden map, where no norm can undo it (the
        released DMCP code applies it twice and so squares it). ``out``, ``times`` and ``made`` are as in `Prunode`.
        """
        h = expand(self.block, x, mid if isinstance(mid, int) else len(mid), made)
        if isinstance(mid, Tensor):
            h = h * mid.to(h.dtype)[:, None, None]
        return project(self.block, getattr(self.block, parts(self.block)[2]), h, out, times)
