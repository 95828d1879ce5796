"""All methods by the names that ``--method`` takes."""

from dnas.methods.curvature import KFAC
from dnas.methods.gates import GATES
from dnas.methods.method import Method
from dnas.methods.penalties import ADMM, SLIMMING, SSL
from dnas.methods.rankings import DROPNET, HRANK, L1, SNIP, TAYLOR
from dnas.methods.reconstruction import ISPASP, LASSO
from dnas.methods.rules import BALANCED, RANDOM, UNIFORM

METHODS: dict[str, Method] = {
    "gates": GATES,
    "l1": L1,
    "taylor": TAYLOR,
    "hrank": HRANK,
    "dropnet": DROPNET,
    "lasso": LASSO,
    "ispasp": ISPASP,
    "kfac": KFAC,
    "snip": SNIP,
    "slimming": SLIMMING,
    "ssl": SSL,
    "admm": ADMM,
    "balanced": BALANCED,
    "uniform": UNIFORM,
    "random": RANDOM,
}
