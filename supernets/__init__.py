"""Search spaces, one a file. Each is a function from a few numbers to a `Macro`; ``MacroSupernet(macro)`` builds it."""

from collections.abc import Callable

from dnas.nets.macro import Macro
from supernets.mobilenet_v2 import mobilenet_v2
from supernets.prunet import prunet
from supernets.toy import toy

SUPERNETS: dict[str, Callable[..., Macro]] = {"prunet": prunet, "mobilenet_v2": mobilenet_v2, "toy": toy}
