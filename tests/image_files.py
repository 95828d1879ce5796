"""Images, tars and folders that tests write themselves."""

import io
import tarfile

import numpy as np
from PIL import Image


def encode(array, kind="PNG"):
    """numpy [C, H, W] as a file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(buffer, kind)
    return buffer.getvalue()


def noise(count, size=16, chans=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, chans, size, size), dtype=np.uint8)


def tree(train=6, val=2, classes=("cat", "dog"), size=16):
    """{name: bytes} of a small data set, and its train images in the order of classes and files."""
    images = noise(len(classes) * train, size)
    files = {}
    for c, name in enumerate(classes):
        for i in range(train):
            files[f"train/{name}/{i}.png"] = encode(images[c * train + i])
        for i in range(val):
            files[f"validation/{name}/{i}.png"] = encode(images[c * train + i])
    return files, images


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    return str(path)


def write_folder(path, files):
    for name, content in files.items():
        file = path / name
        (file if content is None else file.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            file.write_bytes(content)
    return str(path)
