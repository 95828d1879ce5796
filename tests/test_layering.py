"""The import order of the house, read from the sources with ``ast``; nothing is imported, so it always runs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A dnas module imports only dnas modules that stand before it here.
ORDER = [
    "units",
    "arch",
    "plain",
    "latency",
    "cost",
    "gates",
    "prunode",
    "stochastic",
    "channels",
    "tracing",
    "resize",
    "supernet",
    "macro",
    "narrowed",
    "timm_net",
    "surgery",
    "archive",
    "distributed",
    "runs",
    "checkpoint",
    "data",
    "native",
    "train",
    "objective",
    "derive",
    "search",
    "schema",
    "export",
    "deployed",
    "timing",
    "profile",
    "outcome",
    "pictures",
    "report",
]

# Packages that a package never imports, whatever the module. Those named here are the ones that are checked.
NEVER = {
    "dnas": {"supernets", "tools", "benchmarks", "tests"},
    "supernets": {"tools", "benchmarks", "tests"},
    "tools": {"benchmarks", "tests"},
}

MAX_LINES = 420


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Line and absolute dotted name of whatever a module of ``package`` imports, inside functions too.

    ``from a import b`` gives ``a.b``: b may be a module as well as a name in one. ``from . import b`` is resolved
    against the package; with more dots than the package is deep, the name starts with dots.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = {0: "", 1: package}.get(node.level, "." * node.level)
            base = ".".join(part for part in (start, node.module) if part)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            target = node.args[0].value
            if name in ("import_module", "__import__") and isinstance(target, str):
                found.append((node.lineno, package + target if target.startswith(".") else target))
    return found


def complaint(package: str, module: str, name: str) -> str | None:
    """What is wrong with ``package/module.py`` importing ``name``; None if nothing is."""
    if name.startswith("."):
        return "a relative import leaves the package"
    top, _, rest = name.partition(".")
    if top in NEVER[package]:
        return f"{package} never imports {top}"
    if package != "dnas" or top != "dnas" or module == "__init__" or module not in ORDER:
        return None
    target = rest.partition(".")[0]
    if target == "__version__":
        return None
    if target not in ORDER:
        return f"name a module of dnas, not dnas itself ({name})"
    if ORDER.index(target) >= ORDER.index(module):
        return f"dnas.{module} does not stand below dnas.{target}"
    return None


def violations(files: dict[str, str]) -> list[str]:
    """All that is wrong with these sources, given by their path from the root (``dnas/units.py``)."""
    wrong = []
    for path, source in files.items():
        package, *folders, file = path.split("/")
        module = file.removesuffix(".py")
        if folders:
            wrong.append(f"{path}: a sub-package")
        if (lines := len(source.splitlines())) > MAX_LINES:
            wrong.append(f"{path}: {lines} lines, at most {MAX_LINES}")
        if package == "dnas" and not folders and module not in [*ORDER, "__init__"]:
            wrong.append(f"{path}: has no place in the order")
        for line, name in imports(source, ".".join([package, *folders])):
            if text := complaint(package, module, name):
                wrong.append(f"{path}:{line}: {text}")
    return wrong


def test_the_house_is_in_order():
    files = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in NEVER
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    assert any(path.startswith("dnas/") for path in files), f"no sources under {ROOT}"
    assert violations(files) == []


ALLOWED = {
    "dnas/__init__.py": "from dnas.search import search\nfrom . import report\nimport dnas.units\n",
    "dnas/units.py": "import math\nfrom collections import abc\nfrom importlib import import_module\n",
    "dnas/arch.py": "from dnas import __version__, units\nfrom dnas.units import Budget\n",
    "dnas/cost.py": "from . import arch, units\nfrom .arch import Space\nimport dnas.latency as lat\n",
    "dnas/search.py": "def f():\n    from .derive import derive\n    import timm.data, torch\n",
    "dnas/report.py": "import supernets_of_others\nfrom tools_of_others import x\nimport dnasty\n",
    "supernets/__init__.py": "from supernets.toy import build\nfrom . import prunet\n",
    "supernets/toy.py": "import dnas\nfrom dnas import Supernet\nfrom dnas.report import page\n",
    "tools/search.py": "from dnas import search\nfrom supernets import SUPERNETS\n",
}


def test_what_is_allowed_passes():
    assert violations(ALLOWED) == []
    assert violations({"dnas/units.py": "#\n" * MAX_LINES}) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        # A module below, in every way it can be imported.
        ("dnas/units.py", "import dnas.arch", "dnas.units does not stand below dnas.arch"),
        ("dnas/units.py", "import os, dnas.arch as a", "dnas.units does not stand below dnas.arch"),
        ("dnas/cost.py", "from dnas import units, gates", "dnas.cost does not stand below dnas.gates"),
        ("dnas/cost.py", "from dnas.gates import MarkovGate", "dnas.cost does not stand below dnas.gates"),
        ("dnas/cost.py", "from . import gates", "dnas.cost does not stand below dnas.gates"),
        ("dnas/cost.py", "from .gates import MarkovGate", "dnas.cost does not stand below dnas.gates"),
        ("dnas/cost.py", "import importlib\nimportlib.import_module('dnas.gates')", "dnas.cost does not stand below"),
        ("dnas/cost.py", "import_module('.gates', 'dnas')", "dnas.cost does not stand below dnas.gates"),
        ("dnas/cost.py", "__import__('dnas.gates')", "dnas.cost does not stand below dnas.gates"),
        # Hidden in a function, a class, a branch.
        ("dnas/train.py", "def f():\n    from .objective import Run", "dnas.train does not stand below dnas.objective"),
        ("dnas/train.py", "class A:\n    def f(self):\n        import dnas.search", "dnas.train does not stand below"),
        ("dnas/train.py", "if TYPE_CHECKING:\n    from dnas.export import x", "dnas.train does not stand below"),
        ("dnas/train.py", "try:\n    from . import report\nexcept ImportError:\n    pass", "dnas.train does not stand"),
        # Itself; dnas as a whole, through which anything could come; a module that has no place.
        ("dnas/train.py", "from dnas.train import x", "dnas.train does not stand below dnas.train"),
        ("dnas/train.py", "import dnas", "name a module of dnas"),
        ("dnas/train.py", "from dnas import *", "name a module of dnas"),
        ("dnas/train.py", "from . import Supernet", "name a module of dnas"),
        ("dnas/train.py", "from dnas.utils import x", "name a module of dnas"),
        ("dnas/utils.py", "", "has no place in the order"),
        # The packages above.
        ("dnas/search.py", "import supernets", "dnas never imports supernets"),
        ("dnas/search.py", "def f():\n    from supernets.toy import build", "dnas never imports supernets"),
        ("dnas/search.py", "from tools import search", "dnas never imports tools"),
        ("dnas/__init__.py", "import tools.search", "dnas never imports tools"),
        ("dnas/search.py", "from ..supernets import toy", "a relative import leaves the package"),
        ("supernets/toy.py", "from tools.search import main", "supernets never imports tools"),
        ("supernets/toy.py", "def f():\n    import tools", "supernets never imports tools"),
        ("tools/search.py", "import tests.helpers", "tools never imports tests"),
        # Shape.
        ("dnas/units.py", "#\n" * (MAX_LINES + 1), "421 lines, at most 420"),
        ("supernets/toy.py", "#\n" * (MAX_LINES + 1), "421 lines, at most 420"),
        ("tools/search.py", "#\n" * (MAX_LINES + 1), "421 lines, at most 420"),
        ("dnas/gates/markov.py", "", "a sub-package"),
        ("supernets/prunet/__init__.py", "", "a sub-package"),
        ("tools/deep/search.py", "", "a sub-package"),
    ],
)
def test_a_planted_violation_is_caught(path, source, expected):
    wrong = violations({**ALLOWED, path: source})
    assert len(wrong) == 1, wrong
    assert wrong[0].startswith(f"{path}:")
    assert expected in wrong[0]
