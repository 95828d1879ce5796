"""One thread for all tests (small tensors, and two busy threads cost more than they bring), and skips without a GPU."""

import pytest
import torch
from commands import trust
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
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
