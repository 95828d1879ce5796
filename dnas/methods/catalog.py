"""All methods by the names that ``--method`` takes."""

from dnas.methods.gates import GATES
from dnas.methods.method import Method
from dnas.methods.rank_and_cut import L1, TAYLOR
from dnas.methods.rules import BALANCED, RANDOM, UNIFORM

METHODS: dict[str, Method] = {
    "gates": GATES,
    "l1": L1,
    "taylor": TAYLOR,
    "balanced": BALANCED,
    "uniform": UNIFORM,
    "random": RANDOM,
}
