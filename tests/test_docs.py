"""The commands and the Python of README, CONTRIBUTING and docs/ are run, but for those that set up what runs this.

Make's targets are run dry. A search of the text ends before training (``--dry-run``): its space, budget and folders are
those of the text, and it rehearses with few images. Where it names an ``--output``, a small one is run all the way into
that, so that what the text says next can be run. Retraining and profiles are made short by flags that are appended: of
two, the last one counts.
"""

import glob
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from code_blocks import FENCE, blocks_of
from commands import call, compare_tool, export_tool, profile_tool, retrain_tool, search_tool
from image_files import tree, write_folder, write_tar
from nbclient import NotebookClient
from tables import HEADER, rows_of

from dnas.cli.parsers import PARSERS
from dnas.methods.settings import CONFIGS
from dnas.nets.layer_supernet import MacroSupernet
from dnas.runtime.run_folder import provenance
from dnas.spec.latency_table import table_text
from supernets import SUPERNETS

# timm's datasets leave closing to the garbage collector.
pytestmark = [pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"), pytest.mark.usefixtures("trusted")]
ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = list(
    dict.fromkeys(c for path in TEXTS for block in blocks_of(path) if not block.language for c in block.commands())
)
PROGRAMS = {path: [b.text for b in blocks_of(path) if b.language == "python"] for path in TEXTS}
SMALL = ["--budget", "50%", "--width-mult", "0.15", "--divisor", "4", "--img-size", "16", "-b", "8", "--workers", "0"]
SMALL += ["--search-epochs", "1", "--epochs", "1", "--warmup", "0", "--gate-every", "1"]
DRY = ["--dry-run", "--workers", "0", "-b", "8"]
PROFILE = ["--rounds", "3", "--block-ms", "0.2", "--scale-nets", "2", "--check-nets", "3", "--threads", "1"]
PROFILE += ["--device", "cpu", "--width-mult", "0.15", "--img-size", "16", "--out", "profiled.json"]
MY_NET = """
from torch import nn

def build():
    parts = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU())
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
"""
STANDS_FOR = {"/data/my-images": "my-images"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the commands can be run one after the other: images, a table and a run are in it."""
    folder = tmp_path_factory.mktemp("place")
    files, _ = tree(24, 4)
    write_folder(folder / "my-images", files)
    write_tar(folder / "cifar10.tar.gz", files)
    net = MacroSupernet(SUPERNETS["prunet"](num_classes=2, img_size=224, width_mult=0.5, divisor=32))
    space = {"supernet": "prunet", "width_mult": 0.5, "divisor": 32, "img_size": 224}
    header = HEADER | {"device": provenance(torch.device("cpu"))["device"], "space": space}
    ms = rows_of(net, lambda unit, widths: 0.1 + 0.01 * sum(widths.values()))
    (folder / "my_net.py").write_text(MY_NET)
    (folder / "mine.json").write_text(table_text(header, ms))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(search_tool, patch, *SMALL, "--data-dir", "my-images", "--output", "runs/my-run") == 0
    return folder


def run_search(words, monkeypatch, number):
    if "--resume" in words:  # of a run that is complete: it says what the run came to
        return call(search_tool, monkeypatch, *words)
    if "--output" in words:
        small = [*SMALL[:2], *SMALL[4:]] if "--model-file" in words else SMALL  # without a width multiplier
        return call(search_tool, monkeypatch, *words, *small)
    dry = [*DRY, "--output", f"dry/{number}"]
    return call(search_tool, monkeypatch, *[w for w in words if w != "--dry-run"], *dry)


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=COMMANDS)
def test_command(number, place, monkeypatch):
    monkeypatch.chdir(place)
    words = [STANDS_FOR.get(word, word) for word in shlex.split(COMMANDS[number])]
    words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    match words:
        case ["make", target, *settings]:
            subprocess.run(["make", "-n", target, *settings], cwd=ROOT, check=True, capture_output=True)
        case ["python3", "-m", "venv", ".venv", "&&", ".", ".venv/bin/activate"] | ["python", "-m", "pytest"]:
            pass  # how this test was reached
        case ["pip", "install", "-e", what]:
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)[1] or ""
            told = (ROOT / "pyproject.toml").read_text()
            assert all(re.search(rf"^{extra} = \[", told, re.MULTILINE) for extra in filter(None, extras.split(",")))
        case ["tensorboard", "--logdir", "runs"]:
            subprocess.run([sys.executable, "-m", "tensorboard.main", *words[1:], "--inspect"], check=True)
        case ["torchrun", "--nproc-per-node", _, script, *rest]:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / script, *rest]
            command += [*DRY, "--output", f"dry/{number}"]
            subprocess.run(list(map(str, command)), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        case ["python", "tools/search.py", *rest]:
            assert run_search(rest, monkeypatch, number) == 0
        case ["python", "tools/retrain.py", *rest]:
            assert call(retrain_tool, monkeypatch, *rest, "--epochs", 1, "-b", 8, "--workers", 0) == 0
        case ["python", "tools/export.py", *rest]:
            assert call(export_tool, monkeypatch, *rest) == 0
        case ["python", "tools/compare.py", *rest]:
            assert call(compare_tool, monkeypatch, *rest) == 0
        case ["python", "tools/profile_latency.py", "--check", _]:
            assert call(profile_tool, monkeypatch, "--check", "profiled.json", *PROFILE[:8]) == 0
        case ["python", "tools/profile_latency.py", *rest]:
            assert call(profile_tool, monkeypatch, *rest, *PROFILE) == 0
        case _:
            pytest.fail(f"nothing here runs {COMMANDS[number]!r}")


@pytest.mark.parametrize("path", [path for path, texts in PROGRAMS.items() if texts], ids=lambda path: path.name)
def test_python(path, place):
    """All pieces of a text, one after the other, in a process of their own; but for those of the notebook below."""
    program = "\n".join(PROGRAMS[path][2 * (path.name == "api.md") :])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_notebook(tmp_path):
    """What docs/api.md begins with, in cells."""
    cells = [nbformat.v4.new_code_cell(text) for text in PROGRAMS[ROOT / "docs" / "api.md"][:2]]
    notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell("result.costs['macs']")])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (shown,) = notebook.cells[-1].outputs
    (run,) = (tmp_path / "runs").glob("toy-*")
    assert int(shown["data"]["text/plain"]) == json.loads((run / "arch.json").read_text())["macs"]
    assert (tmp_path / "exported" / "model.py").is_file() and (tmp_path / "report.html").is_file()


def test_links_lead_somewhere():
    for path in [*TEXTS, ROOT / "benchmarks" / "README.md", ROOT / "latency_tables" / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)", FENCE.sub("", path.read_text())):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path.name}: {link}"


def test_every_flag_of_the_text_is_known():
    """Words that look like flags, in prose as well, are flags of some tool, of make's tests or of torchrun."""
    told = [parser([]).format_help() for parser in PARSERS.values()]
    told += [PARSERS["search"](["--method", name]).format_help() for name in CONFIGS]
    known = set(re.findall(r"--[a-z][\w-]+", " ".join(told))) | {"--nproc-per-node", "--logdir", "--dist"}
    for path in TEXTS:
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]", path.read_text()))
        assert flags <= known, f"{path.name}: {sorted(flags - known)}"
