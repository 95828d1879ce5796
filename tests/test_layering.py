"""The import order of the package, read from the sources with ``ast``; nothing is imported, so it always runs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file of dnas imports only files that stand before it here: rooms in order, and files in order inside a room.
ROOMS = {
    "spec": ["checks", "image_size", "budget", "recipe", "layer_space", "space", "latency_table", "cost"],
    "runtime": ["distributed", "run_folder", "checkpoint", "signals", "progress"],
    "training": [
        "image_files",
        "tar_images",
        "data_summary",
        "batches",
        "data",
        "given_data",
        "optimizer",
        "onednn_workaround",
        "weights",
        "freeze",
        "teacher",
        "criterion",
        "loop",
        "from_scratch",
    ],
    "nets": [
        *(
            "own_base",
            "gate",
            "markov_gate",
            "bipath_block",
            "layer_choice",
            "channels",
            "channel_units",
            "layer_rules",
            "tracing",
            "residual_blocks",
            "cut_tensors",
            "weighted_norms",
            "remove_options",
        ),
        *("supernet", "layer_supernet", "timm_space", "traced_supernet", "timm_supernet", "own_supernet", "shrink"),
    ],
    "methods": [
        "settings",
        "budget_loss",
        "derive",
        "method",
        "rules",
        "rank_and_cut",
        "feature_maps",
        "rankings",
        "reconstruction",
        "curvature",
        "penalties",
        "gates",
        "catalog",
        "loop",
    ],
    "export": ["native", "narrowed", "own_file", "arch_schema", "model_file", "verify"],
    "latency": ["measured_parts", "timing", "profile"],
    "report": ["metrics", "diagnosis", "plots", "pages"],
    "plan": [],  # a file, not a room
    "workflow": [],  # another file
    "cli": [
        "flags",
        "parsers",
        "inputs",
        "process",
        "rehearsal",
        "search",
        "retrain",
        "export",
        "profile",
        "compare",
        "methods",
    ],
    "api": [],  # a file, too
}
ORDER = [f"{room}.{file}" for room, files in ROOMS.items() for file in files or [""]]
ORDER = [name.rstrip(".") for name in ORDER]
MOST_ENTRIES = 12  # of dnas/, beside what Python asks for: somebody who opens it sees the way through

# Packages that a package never imports. The command line is where the search spaces of supernets/ are named.
NEVER = {
    "dnas": {"supernets", "tools", "benchmarks", "tests"},
    "dnas.cli": {"tools", "benchmarks", "tests"},
    "supernets": {"tools", "benchmarks", "tests"},
    "tools": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}

MAX_LINES = 420


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Line and absolute dotted name of whatever a file of ``package`` imports, inside functions too.

    ``from a import b`` gives ``a.b``: b may be a module as well as a name in one. ``from . import b`` is resolved
    against the package; with more dots than the package is deep, the name starts with dots.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = "" if not node.level else ".".join(above) if above else "." * node.level
            base = ".".join(part for part in (start, node.module) if part)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            target = node.args[0].value
            if name in ("import_module", "__import__") and isinstance(target, str):
                found.append((node.lineno, package + target if target.startswith(".") else target))
    return found


def place_of(name: str) -> str | None:
    """The entry of `ORDER` that a dotted name below dnas is in: ``spec.cost.CostTable`` is in ``spec.cost``."""
    parts = name.split(".")
    return next((place for n in (2, 1) if (place := ".".join(parts[:n])) in ORDER), None)


def complaint(package: str, module: str, name: str) -> str | None:
    """What is wrong with the file ``module`` of ``package`` importing ``name``; None if nothing is."""
    if name.startswith("."):
        return "a relative import leaves the package"
    top, _, rest = name.partition(".")
    if top in NEVER.get(package, NEVER[package.partition(".")[0]]):
        return f"{package} never imports {top}"
    own = ".".join([*package.split(".")[1:], module])
    if package.partition(".")[0] != "dnas" or top != "dnas" or own not in ORDER or rest == "__version__":
        return None
    target = place_of(rest)
    if target is None:
        return f"name a file of dnas, not a package ({name})"
    if ORDER.index(target) >= ORDER.index(own):
        return f"dnas.{own} does not stand below dnas.{target}"
    return None


def violations(files: dict[str, str]) -> list[str]:
    """All that is wrong with these sources, given by their path from the root (``dnas/spec/budget.py``)."""
    wrong = []
    for path, source in files.items():
        *folders, file = path.split("/")
        package, module = ".".join(folders), file.removesuffix(".py")
        deepest = 2 if folders[0] == "dnas" else 1
        if len(folders) > deepest or (len(folders) == 2 and folders[1] not in ROOMS):
            wrong.append(f"{path}: a package that is not in the list")
        if (lines := len(source.splitlines())) > MAX_LINES:
            wrong.append(f"{path}: {lines} lines, at most {MAX_LINES}")
        place = ".".join([*folders[1:], module])
        if folders[0] == "dnas" and len(folders) <= 2 and not module.startswith("__") and place not in ORDER:
            wrong.append(f"{path}: has no place in the order")
        for line, name in imports(source, package):
            if text := complaint(package, module, name):
                wrong.append(f"{path}:{line}: {text}")
    return wrong


def test_the_package_is_in_order():
    files = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in NEVER
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    assert any(path.startswith("dnas/") for path in files), f"no sources under {ROOT}"
    assert violations(files) == []


def test_every_place_of_the_order_is_a_file():
    there = {p.relative_to(ROOT / "dnas").with_suffix("").as_posix() for p in (ROOT / "dnas").rglob("*.py")}
    assert {place.replace(".", "/") for place in ORDER} <= there
    entries = [p.name for p in (ROOT / "dnas").iterdir() if not p.name.startswith("__") and p.name != "py.typed"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_benchmarks_import_each_other_in_one_direction():
    """No circle among them; they are single files beside each other."""

    names = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    edges = {
        name: {n.split(".")[0] for _, n in imports(text, "") if n.split(".")[0] in names}
        for name, text in names.items()
    }
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges


ALLOWED = {
    "dnas/__init__.py": "from dnas.methods.gates import search\nfrom .report import pages\nimport dnas.spec.budget\n",
    "dnas/spec/__init__.py": "",
    "dnas/spec/checks.py": "import math\nfrom collections import abc\nfrom importlib import import_module\n",
    "dnas/spec/budget.py": "from dnas import __version__\nfrom dnas.spec import checks\n",
    "dnas/spec/cost.py": "from . import space, budget\nfrom .space import Space\nimport dnas.spec.latency_table as t\n",
    "dnas/methods/gates.py": "def f():\n    from .derive import derive\n    import timm.data, torch\n",
    "dnas/report/pages.py": "import supernets_of_others\nfrom tools_of_others import x\nimport dnasty\n",
    "dnas/cli/search.py": "from dnas.workflow import find\nfrom supernets import SUPERNETS\n",
    "supernets/__init__.py": "from supernets.toy import build\nfrom . import prunet\n",
    "supernets/toy.py": "import dnas\nfrom dnas import Supernet\nfrom dnas.report.pages import page\n",
    "tools/search.py": "from dnas.cli import search\nfrom supernets import SUPERNETS\n",
}


def test_what_is_allowed_passes():
    assert violations(ALLOWED) == []
    assert violations({"dnas/spec/budget.py": "#\n" * MAX_LINES}) == []


BUDGET, COST, LOOP = "dnas/spec/budget.py", "dnas/spec/cost.py", "dnas/training/loop.py"


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        # A file below, in every way it can be imported; in the same room and in another.
        (BUDGET, "import dnas.spec.space", "dnas.spec.budget does not stand below dnas.spec.space"),
        (BUDGET, "import os, dnas.spec.space as a", "dnas.spec.budget does not stand below dnas.spec.space"),
        (COST, "from dnas.nets import layer_supernet", "dnas.spec.cost does not stand below dnas.nets.layer_supernet"),
        (
            COST,
            "from dnas.nets.layer_supernet import EfficientNetSpace",
            "dnas.spec.cost does not stand below dnas.nets.layer_supernet",
        ),
        (COST, "from ..nets import layer_supernet", "dnas.spec.cost does not stand below dnas.nets.layer_supernet"),
        (
            COST,
            "import importlib\nimportlib.import_module('dnas.nets.layer_supernet')",
            "dnas.spec.cost does not stand below",
        ),
        (
            COST,
            "__import__('dnas.nets.layer_supernet')",
            "dnas.spec.cost does not stand below dnas.nets.layer_supernet",
        ),
        # Hidden in a function, a class, a branch.
        (LOOP, "def f():\n    from .from_scratch import Run", "dnas.training.loop does not stand below"),
        (LOOP, "class A:\n    def f(self):\n        import dnas.methods.gates", "dnas.training.loop does not stand"),
        (LOOP, "if TYPE_CHECKING:\n    from dnas.export.native import x", "dnas.training.loop does not stand below"),
        (LOOP, "try:\n    from ..report import pages\nexcept ImportError:\n    pass", "dnas.training.loop does not"),
        (LOOP, "from dnas.workflow import x", "dnas.training.loop does not stand below dnas.workflow"),
        # Itself; a whole package, through which anything could come; a file that has no place.
        (LOOP, "from dnas.training.loop import x", "does not stand below dnas.training.loop"),
        (LOOP, "import dnas", "name a file of dnas"),
        (LOOP, "from dnas import *", "name a file of dnas"),
        (LOOP, "from . import Supernet", "name a file of dnas"),
        (LOOP, "import dnas.spec", "name a file of dnas"),
        (LOOP, "from dnas.spec.utils import x", "name a file of dnas"),
        ("dnas/spec/utils.py", "", "has no place in the order"),
        ("dnas/utils.py", "", "has no place in the order"),
        # The packages above.
        ("dnas/methods/gates.py", "import supernets", "dnas.methods never imports supernets"),
        ("dnas/methods/gates.py", "def f():\n    from supernets.toy import build", "never imports supernets"),
        ("dnas/methods/gates.py", "from tools import search", "dnas.methods never imports tools"),
        ("dnas/__init__.py", "import tools.search", "dnas never imports tools"),
        ("dnas/cli/search.py", "import tools.search", "dnas.cli never imports tools"),
        ("dnas/methods/gates.py", "from ...supernets import toy", "a relative import leaves the package"),
        ("supernets/toy.py", "from tools.search import main", "supernets never imports tools"),
        ("supernets/toy.py", "def f():\n    import tools", "supernets never imports tools"),
        ("tools/search.py", "import tests.helpers", "tools never imports tests"),
        # Shape.
        (BUDGET, "#\n" * (MAX_LINES + 1), "421 lines, at most 420"),
        ("supernets/toy.py", "#\n" * (MAX_LINES + 1), "421 lines, at most 420"),
        ("tools/search.py", "#\n" * (MAX_LINES + 1), "421 lines, at most 420"),
        ("dnas/gates/__init__.py", "", "a package that is not in the list"),
        ("dnas/nets/gates/__init__.py", "", "a package that is not in the list"),
        ("supernets/prunet/__init__.py", "", "a package that is not in the list"),
        ("tools/deep/search.py", "", "a package that is not in the list"),
    ],
)
def test_a_planted_violation_is_caught(path, source, expected):
    wrong = violations({**ALLOWED, path: source})
    assert len(wrong) == 1, wrong
    assert wrong[0].startswith(f"{path}:")
    assert expected in wrong[0]
