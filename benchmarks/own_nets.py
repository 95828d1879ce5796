"""Networks that are not timm's, as users write them, and torchvision's. As a file, it is what ``--model-file`` gets."""

import torch
from torch import nn
from torchvision import models
from torchvision.models import (
    convnext_tiny,
    densenet121,
    efficientnet_b0,
    mnasnet0_5,
    mobilenet_v3_large,
    mobilenet_v3_small,
    regnet_y_400mf,
    resnet18,
    resnet50,
    shufflenet_v2_x0_5,
    squeezenet1_1,
    vgg11_bn,
)
from torchvision.models.video import r3d_18


class Plain(nn.Module):
    """Two convolutions and a linear layer, for images of 3 channels."""

    def __init__(self, first=32, second=64, classes=10):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, first, 3, padding=1, stride=2), nn.BatchNorm2d(first)
        self.b, self.fc = nn.Conv2d(first, second, 3, padding=1), nn.Linear(second, classes)

    def forward(self, x):
        return self.fc(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


def double(i, o):
    """Two convolutions, each with its norm and activation."""
    layers = (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Maps of classes: transposed convolutions, concatenations with earlier maps."""

    def __init__(self, width=16, classes=3):
        super().__init__()
        self.down1, self.down2, self.down3 = double(3, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2, self.merge1 = double(4 * width, 2 * width), double(2 * width, width)
        self.head, self.pool = nn.Conv2d(width, classes, 1), nn.MaxPool2d(2)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(self.pool(a))
        b = self.merge2(torch.cat([b, self.up2(self.down3(self.pool(b)))], 1))
        return self.head(self.merge1(torch.cat([a, self.up1(b)], 1)))


class Recurrent(nn.Module):
    """A residual block that is used three times, and two convolutions with one weight."""

    def __init__(self, width=32, classes=10):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.outer, self.fc = nn.Conv2d(2 * width, width, 1), nn.Linear(width, classes)
        self.one, self.other = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = self.stem(x).relu()
        for _ in range(3):
            x = x + self.outer(self.inner(x).relu())
        return self.fc(self.other(self.one(x).relu()).relu().mean((2, 3)))


def signals(classes=4):
    """For [B, 2, length]."""
    first = (nn.Conv1d(2, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2))
    second = (nn.Conv1d(16, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(32, 32, 3))
    return nn.Sequential(*first, *second, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, classes))


def volumes(classes=4):
    """For [B, 1, depth, height, width]."""
    first = (nn.Conv3d(1, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2))
    second = (nn.Conv3d(16, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU(), nn.AvgPool3d(2))
    third = (nn.Conv3d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1))
    return nn.Sequential(*first, *second, *third, nn.Flatten(), nn.Linear(32, classes))


def rows(classes=4):
    """A multilayer perceptron for [B, 20]."""
    first, second = (nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU()), (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())
    return nn.Sequential(*first, nn.Dropout(0.1), *second, nn.Linear(64, classes))


class Several(nn.Module):
    """Two results in a dict, one of them a tuple."""

    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = Plain(), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        maps = self.a(self.body.a(x)).relu()
        return {"logits": self.body(x), "maps": (self.b(maps), maps.mean())}


def build():
    """The plain one, for ``--model-file``."""
    return Plain()


# torchvision's, with fresh weights.

BARE = {"weights": None, "weights_backbone": None}


def googlenet():
    """Without the classifiers on the way."""
    return models.googlenet(weights=None, aux_logits=False, init_weights=False)


def deeplabv3():
    """Maps of five classes, in a dict."""
    return models.segmentation.deeplabv3_mobilenet_v3_large(**BARE, num_classes=5)


def lraspp():
    """Maps of five classes, in a dict."""
    return models.segmentation.lraspp_mobilenet_v3_large(**BARE, num_classes=5)


def fcn():
    """Maps of five classes, in a dict."""
    return models.segmentation.fcn_resnet50(**BARE, num_classes=5)


def fasterrcnn_backbone():
    """ResNet-50 with a feature pyramid: a dict of maps."""
    return models.detection.fasterrcnn_resnet50_fpn(**BARE).backbone


NETS = {  # what makes it, input channels, other sides of an input
    "build": (build, 3, 16),
    "UNet": (UNet, 3, 32),
    "Recurrent": (Recurrent, 3, 16),
    "Several": (Several, 3, 16),
    "signals": (signals, 2, (64,)),
    "volumes": (volumes, 1, (8, 8, 8)),
    "rows": (rows, 20, ()),
    "resnet18": (resnet18, 3, 64),
    "resnet50": (resnet50, 3, 64),
    "mobilenet_v3_small": (mobilenet_v3_small, 3, 64),
    "mobilenet_v3_large": (mobilenet_v3_large, 3, 64),
    "efficientnet_b0": (efficientnet_b0, 3, 64),
    "regnet_y_400mf": (regnet_y_400mf, 3, 64),
    "shufflenet_v2_x0_5": (shufflenet_v2_x0_5, 3, 64),
    "densenet121": (densenet121, 3, 64),
    "squeezenet1_1": (squeezenet1_1, 3, 64),
    "vgg11_bn": (vgg11_bn, 3, 64),
    "mnasnet0_5": (mnasnet0_5, 3, 64),
    "convnext_tiny": (convnext_tiny, 3, 64),
    "googlenet": (googlenet, 3, 64),
    "deeplabv3": (deeplabv3, 3, 64),
    "lraspp": (lraspp, 3, 64),
    "fcn": (fcn, 3, 64),
    "fasterrcnn_backbone": (fasterrcnn_backbone, 3, 64),
    "r3d_18": (r3d_18, 3, (4, 32, 32)),
}
