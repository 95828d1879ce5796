"""One thread for all tests (small tensors, and two busy threads cost more than they bring), skips without a GPU; which
tests are slow, and that the others are not.
"""

import os
from pathlib import Path

import pytest
import torch
from commands import trust
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


SLOW = [line for line in Path(__file__).with_name("slow.txt").read_text().splitlines() if not line.startswith("#")]
MOST_S = 10.0  # of a test that is not slow: seconds of all its processes, so that other work beside it does not count


def is_slow(item):
    """Whether a line of slow.txt is this test."""
    fixtures = {f"fixture:{name}" for name in getattr(item, "fixturenames", ())}
    return not fixtures.isdisjoint(SLOW) or any(item.nodeid.startswith(line) for line in SLOW)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = sum(os.times()[:4])
    result = yield
    taken = sum(os.times()[:4]) - before
    if taken > MOST_S and not {"slow", "faults", "gpu"} & item.keywords.keys():
        pytest.fail(f"it took {taken:.1f} s, more than {MOST_S} s: make it shorter, or a line of tests/slow.txt")
    return result


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items):
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def trusted(monkeypatch):
    """The folders that the tools would verify, in order; see `commands.trust`."""
    return trust(monkeypatch)


@pytest.fixture
def image_folder(tmp_path):
    """Six small images a class and split, in a folder of their own."""
    root = tmp_path / "images"
    for split in ("train", "validation"):
        for c, colour in enumerate(("red", "blue")):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for k in range(6):
                Image.new("RGB", (16, 16), colour).save(folder / f"{k}.png")
    return root
