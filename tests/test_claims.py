"""What the documents say about the code: sizes, extras, files and modules that they name."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

from dnas.export import arch_schema
from dnas.spec import checks, latency_table

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
TEXTS += [path for folder in ("docs", "benchmarks", "latency_tables") for path in sorted((ROOT / folder).glob("*.md"))]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
LIMITS = {
    "`arch.json`": arch_schema.MAX_BYTES,
    "latency table": latency_table.MAX_BYTES,
    "`config.json`": checks.MAX_BYTES,
    "`metrics.json`": checks.MAX_BYTES,
}
PATH = re.compile(r"(?<![\w/.-])(?:dnas|tools|benchmarks|tests)/[\w/]+\.\w+\b")
MODULE = re.compile(r"(?<![\w/.-])dnas(?:\.[A-Za-z_]\w*)+")
EXTRAS = re.compile(r"(?<![\w\])])(?:\.|dnas)\[([\w, -]+)\]")


def stated_sizes(text: str) -> dict[str, int]:
    """First cell of each row of a table that says "more than N MB" -> that many bytes."""
    rows = re.findall(r"^\| ([^|]+?) \|.*?\bmore than (\d+) MB\b", text, re.MULTILINE)
    return {name: int(size) * 10**6 for name, size in rows}


def extras() -> set[str]:
    """The extras of pyproject.toml, read by hand: Python 3.10 has no tomllib."""
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    return set(re.findall(r"^([\w-]+) = \[", table.partition("\n[")[0], re.MULTILINE))


def unknown_extras(text: str) -> set[str]:
    named = {extra.strip() for found in EXTRAS.findall(text) for extra in found.split(",")}
    return named - extras()


def missing(text: str) -> list[str]:
    """Files, modules and names of modules that the text mentions and that do not exist."""
    wrong = [path for path in PATH.findall(text) if not (ROOT / path).is_file()]
    for name in dict.fromkeys(MODULE.findall(text)):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            wrong.append(name)
    return wrong


def test_security_says_the_limits_of_the_code():
    assert stated_sizes((ROOT / "docs" / "security.md").read_text()) == LIMITS


@pytest.mark.parametrize("path", [*TEXTS, *SCRIPTS], ids=lambda path: path.name)
def test_extras_exist(path):
    assert unknown_extras(path.read_text()) == set()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_and_modules_exist(path):
    assert missing(path.read_text()) == []


def test_what_is_wrong_is_seen():
    assert stated_sizes("| `a.json` | us | more than 3 MB; text |\n| b | us | nothing |") == {"`a.json`": 3_000_000}
    assert {"test", "peers"} <= extras() and "build-backend" not in extras()
    assert unknown_extras("pip install -e '.[bench,peers]' and 'dnas[onnx]'") == {"bench"}
    assert unknown_extras("values[k] and CLOSED_FORMS[metric], dnas.spec.cost.CLOSED_FORMS[metric]") == set()
    assert missing("`dnas/spec/cost.py`, `dnas.spec.cost.CostTable.build` and `dnas.cli`.") == []
    text = "dnas/spec/costs.py, dnas.methods.search.search, dnas.spec.cost.Table and tools/cli.py"
    assert missing(text) == ["dnas/spec/costs.py", "tools/cli.py", "dnas.methods.search.search", "dnas.spec.cost.Table"]


# Words that the glossary of CONTRIBUTING.md has another word for.
OTHER_WORDS = {
    "chain group": "channel groups?",
    "run folder": "(?:run director(?:y|ies)|output folders?|result folders?)",
    "supernet": "(?:super-?networks?|super-nets?|hyper-?nets?)",
    "found net": "(?:discovered|searched|resulting) net(?:work)?s?",
    "widest net": "(?:largest|biggest|full) net(?:work)?s?",
    "held out": "hold-?outs?",
    "space": "design spaces?",
    "site": "(?:cost sites?|cost terms?)",
    "method": "search strateg(?:y|ies)",
    "decision": "decision variables?",
    "budget": "cost constraints?",
}


def prose(path: Path) -> str:
    """A document without its code, or the docstrings and comments of a source."""
    text = path.read_text()
    if path.suffix == ".md":
        return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
    return "\n".join([*docstrings, *re.findall(r"#(.*)$", text, re.MULTILINE)])


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
SOURCES = [path for folder in ("dnas", "supernets", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_one_word_for_one_thing(word):
    other = re.compile(rf"\b{OTHER_WORDS[word]}\b", re.IGNORECASE)
    found = {path.name: m[0] for path in [*TEXTS, *SOURCES] if (m := other.search(" ".join(prose(path).split())))}
    assert not found, f"the glossary calls it {word!r}"
