"""The networks of two public tables as networks of timm's, which a supernet can be built around.

The decisions of a supernet around one of them are, in this order, the widths of its table.
"""

from collections.abc import Sequence

from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNormAfterReLU(nn.Sequential):
    """NATS-Bench's ReLU, 3x3 convolution, batch norm."""

    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs))


class Cell(nn.Module):
    """NATS-Bench's best cell for CIFAR-10: three 3x3 convolutions beside each other and after each other."""

    def __init__(self, ins: int, outs: int, project: bool) -> None:
        super().__init__()
        self.first, self.second = ConvNormAfterReLU(ins, outs), ConvNormAfterReLU(ins, outs)
        self.first_to_second, self.first_to_third = ConvNormAfterReLU(outs, outs), ConvNormAfterReLU(outs, outs)
        self.second_to_third = ConvNormAfterReLU(outs, outs)
        projection = nn.Sequential(nn.Conv2d(ins, outs, 1, bias=False), nn.BatchNorm2d(outs))
        self.skip = projection if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, ins, H, W] -> [B, outs, H, W]."""
        one = self.first(x)
        two = self.second(x) + self.first_to_second(one)
        return self.skip(x) + self.first_to_third(one) + self.second_to_third(two)


class Halve(nn.Module):
    """NATS-Bench's residual block between two cells, with stride 2."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.first, self.second = ConvNormAfterReLU(ins, outs, 2), ConvNormAfterReLU(outs, outs)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(ins, outs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, ins, H, W] -> [B, outs, H / 2, W / 2]."""
        return self.shortcut(x) + self.second(self.first(x))


class InvertedResidual(nn.Sequential):
    """MobileNetV2's block with a depthwise 3x3 convolution."""

    def __init__(self, ins: int, hidden: int, outs: int, stride: int) -> None:
        super().__init__(
            *(nn.Conv2d(ins, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, outs, 1, bias=False), nn.BatchNorm2d(outs)),
        )
        self.is_residual = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        """[B, ins, H, W] -> [B, outs, H / stride, W / stride]."""
        out = super().forward(x)
        return x + out if self.is_residual else out


class TableNetwork(nn.Module):
    """Feature maps, their mean over pixels, and a linear classifier; torch's default initialisation, as the tables."""

    def __init__(self, features: nn.Sequential, width: int, num_classes: int) -> None:
        super().__init__()
        self.features, self.classifier = features, nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, num_classes]."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def nats(num_classes: int = 10, widths: Sequence[int] = (64,) * 5, for_search: bool = False) -> TableNetwork:
    """NATS-Bench's size space (Dong et al., TPAMI 2021, arXiv 2009.00437): the network of five widths.

    Deviation ``for_search``: where the two widths of a cell happen to be equal the skip of the table's network is an
    identity. A supernet has one form for all widths, the projection.
    """
    a, b, c, d, e = widths
    features = nn.Sequential()
    features.stem = nn.Sequential(nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a))
    features.cell0, features.halve1 = Cell(a, a, project=False), Halve(a, b)
    features.cell2, features.halve3 = Cell(b, c, project=for_search or b != c), Halve(c, d)
    features.cell4 = Cell(d, e, project=for_search or d != e)
    features.norm = nn.Sequential(nn.BatchNorm2d(e), nn.ReLU())
    return TableNetwork(features, e, num_classes)


MOBILENET_WIDTHS = (128, 768, 768, 768, 256, 1536, 1024)


def bench_mobilenet(num_classes: int = 10, widths: Sequence[int] = MOBILENET_WIDTHS) -> TableNetwork:
    """Channel-Bench-Macro's MobileNet (Su et al., BCNet, TPAMI 2022): the network of seven widths."""
    a, b, c, d, e, f, g = widths
    features = nn.Sequential()
    features.stem = nn.Sequential(nn.Conv2d(3, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU6())
    features.block0, features.block1 = InvertedResidual(a, b, a, 1), InvertedResidual(a, c, a, 1)
    features.block2, features.block3 = InvertedResidual(a, d, e, 2), InvertedResidual(e, f, e, 1)
    features.head = nn.Sequential(nn.Conv2d(e, g, 1, bias=False), nn.BatchNorm2d(g), nn.ReLU6())
    return TableNetwork(features, g, num_classes)


# The groups of channels that share a width in NATS-Bench's table. Channel-Bench-Macro's are tied by residuals alone.
NATS_TIES = (
    "features.stem.*,features.cell0.*",
    *(f"features.{part}.*" for part in ("halve1", "cell2", "halve3", "cell4")),
)


@register_model
def nats_size(pretrained: bool = False, num_classes: int = 10, in_chans: int = 3, **kwargs: object) -> nn.Module:
    """timm's entry point of `nats` at its widest. ValueError for arguments that it does not have."""
    return _entry(nats(num_classes, for_search=True), pretrained, in_chans, kwargs)


@register_model
def channel_bench_mobilenet(
    pretrained: bool = False, num_classes: int = 10, in_chans: int = 3, **kwargs: object
) -> nn.Module:
    """timm's entry point of `bench_mobilenet` at its widest. ValueError for arguments that it does not have."""
    return _entry(bench_mobilenet(num_classes), pretrained, in_chans, kwargs)


def _entry(model: nn.Module, pretrained: bool, in_chans: int, kwargs: dict[str, object]) -> nn.Module:
    if pretrained or in_chans != 3 or any(value is not None for value in kwargs.values()):
        raise ValueError(f"pretrained={pretrained}, in_chans={in_chans}, {kwargs}: none of these can be changed")
    return model
