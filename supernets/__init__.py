"""Search spaces, one in each file. Each is a function from a few numbers to an `EfficientNetSpace`."""

from collections.abc import Callable

from dnas.spec.layer_space import EfficientNetSpace
from supernets.mobilenet_v2 import mobilenet_v2
from supernets.prunet import prunet
from supernets.toy import toy

SUPERNETS: dict[str, Callable[..., EfficientNetSpace]] = {"prunet": prunet, "mobilenet_v2": mobilenet_v2, "toy": toy}
