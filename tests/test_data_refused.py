"""Data that cannot be read ends in one line that quotes what was given."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from image_files import (
    encode,
    noise,
    tree,
    write_folder,
    write_tar,
)

from dnas.spec.checks import UserError
from dnas.training.data import load_data

# timm leaves closing its image files to the garbage collector, and Python 3.12 dislikes a DataLoader that forks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


GOOD, _ = tree()
JPEG = encode(noise(1, 64)[0], "JPEG")


def without(part):
    return {name: content for name, content in GOOD.items() if part not in name}


def tar_of(tmp_path, files, name="x.tar"):
    return {"data_dir": write_tar(tmp_path / name, files, "w:gz" if name.endswith("gz") else "w")}


def tar_with_more(tmp_path, name):
    path = write_tar(tmp_path / "x.tar", GOOD, "w")
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(GOOD["train/dog/1.png"])
        tar.addfile(info, io.BytesIO(GOOD["train/dog/1.png"]))
    return {"data_dir": path}


def special_tar(tmp_path, kind, name="train/cat/link.png"):
    path = write_tar(tmp_path / "x.tar", GOOD, "w")
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    return {"data_dir": path}


def broken_tar(tmp_path, name, damage):
    path = tmp_path / name
    path.write_bytes(damage(Path(tar_of(tmp_path, GOOD, name)["data_dir"]).read_bytes()))
    return {"data_dir": str(path)}


def first_member_only(content):
    return content[: 512 + -(-len(next(iter(GOOD.values()))) // 512) * 512]


def bad_header(content):
    start = len(first_member_only(content))
    return content[:start] + b"\xff" * 512 + content[start + 512 :]


def flipped(content):
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 255]) + content[len(content) // 2 + 1 :]


def linked(tmp_path):
    write_folder(tmp_path, without("validation"))
    (tmp_path / "val").symlink_to(tmp_path / "train")
    return {"data_dir": str(tmp_path)}


def folder_of(tmp_path, files):
    return {"data_dir": write_folder(tmp_path / "x", files)}


def file_of(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    return {"data_dir": str(tmp_path / "notes.txt")}


REFUSED = {
    "size too small": (lambda p: {"img_size": 7}, "7"),
    "size no integer": (lambda p: {"img_size": 32.0}, "32.0"),
    "size a truth value": (lambda p: {"img_size": True}, "True"),
    "channels": (lambda p: {"in_chans": 4}, "4"),
    "workers": (lambda p: {"workers": -1}, "-1"),
    "unknown name": (lambda p: {"dataset": "cifar10"}, "'cifar10'"),
    "unknown torch name": (lambda p: {"dataset": "torch/nothing", "data_dir": str(p)}, "'torch/nothing'"),
    "would download": (lambda p: {"dataset": "hfds/cifar10", "data_dir": str(p)}, "'hfds/cifar10'"),
    "not downloaded": (lambda p: {"dataset": "torch/cifar10", "data_dir": str(p)}, "'torch/cifar10'"),
    "name without folder": (lambda p: {"dataset": "torch/cifar10"}, "''"),
    "digits in a folder": (lambda p: {"dataset": "digits", "data_dir": str(p)}, "'digits'"),
    "name with a tar": (lambda p: tar_of(p, GOOD) | {"dataset": "torch/cifar10"}, "x.tar'"),
    "no such folder": (lambda p: {"data_dir": str(p / "nowhere")}, "nowhere'"),
    "neither folder nor tar": (file_of, "notes.txt'"),
    "newline in a name": (lambda p: {"data_dir": "no\nwhere"}, "'no\\nwhere'"),
    "no train folder": (lambda p: folder_of(p, without("train")), "'validation'"),
    "no validation folder": (lambda p: folder_of(p, without("validation")), "'train'"),
    "torch folder without train": (
        lambda p: folder_of(p, without("train")) | {"dataset": "torch/image_folder"},
        "'validation'",
    ),
    "two validation folders": (lambda p: folder_of(p, GOOD | {"val/cat/0.png": JPEG}), "'val'"),
    "one folder twice": (linked, "/train'"),
    "two tops": (lambda p: folder_of(p, GOOD | {"b/train/cat/0.png": JPEG}), "b/train"),
    "empty class folder": (lambda p: folder_of(p, GOOD | {"train/bird": None}), "'train/bird'"),
    "class folder without images": (lambda p: folder_of(p, GOOD | {"validation/emu/x.txt": b"x"}), "'validation/emu'"),
    "empty train folder": (lambda p: folder_of(p, without("train") | {"train": None}), "'train'"),
    "classes differ": (lambda p: folder_of(p, without("validation/dog")), "'dog'"),
    "classes timm confuses": (lambda p: folder_of(p, tree(classes=("a", "A"))[0]), "'A' and 'a'"),
    "image outside a class": (lambda p: folder_of(p, GOOD | {"train/x.png": JPEG}), "'train/x.png'"),
    "one class": (lambda p: folder_of(p, without("dog")), "'cat'"),
    "no image at all": (lambda p: folder_of(p, GOOD | {"train/cat/5.png": b"no"}), "cat/5.png'"),
    "half an image": (lambda p: folder_of(p, GOOD | {"train/cat/z.jpg": JPEG[:900]}), "cat/z.jpg'"),
    "tar: half an image": (lambda p: tar_of(p, GOOD | {"train/cat/z.jpg": JPEG[:900]}), "'train/cat/z.jpg'"),
    "tar: half a PNG": (lambda p: tar_of(p, GOOD | {"train/cat/z.png": encode(noise(1)[0])[:99]}), "'train/cat/z.png'"),
    "tar: empty image": (lambda p: tar_of(p, GOOD | {"train/cat/z.png": b""}), "'train/cat/z.png'"),
    "tar: no layout": (lambda p: tar_of(p, {"cat/0.png": JPEG, "dog/0.png": JPEG}), "x.tar'"),
    "tar: no validation": (lambda p: tar_of(p, without("validation"), "x.tgz"), "x.tgz'"),
    "tar: val and validation": (lambda p: tar_of(p, GOOD | {"val/cat/0.png": GOOD["train/cat/0.png"]}), "validation"),
    "tar: two tops": (lambda p: tar_of(p, GOOD | {"b/train/cat/0.png": GOOD["train/cat/0.png"]}), "b/train"),
    "tar: an image twice": (lambda p: tar_with_more(p, "train/cat/0.png"), "'train/cat/0.png' is there twice"),
    "tar: image outside a class": (lambda p: tar_of(p, GOOD | {"train/0.png": JPEG}), "'train/0.png'"),
    "tar: empty class": (lambda p: tar_of(p, GOOD | {"train/bird": None}), "'train/bird'"),
    "tar: classes differ": (lambda p: tar_of(p, without("train/dog")), "'dog'"),
    "tar: one class": (lambda p: tar_of(p, without("dog")), "'cat'"),
    "tar: two sizes": (lambda p: tar_of(p, GOOD | {"train/cat/z.jpg": JPEG}), "16x16 and 64x64"),
    "tar: tiny images": (lambda p: tar_of(p, tree(size=4)[0]), "4x4"),
    "tar: climbs out": (lambda p: tar_of(p, GOOD | {"train/cat/../../../x.png": JPEG}), "'train/cat/../../../x.png'"),
    "tar: absolute": (lambda p: tar_of(p, GOOD | {"/train/cat/x.png": JPEG}), "'/train/cat/x.png'"),
    "tar: symbolic link": (lambda p: special_tar(p, tarfile.SYMTYPE), "'train/cat/link.png'"),
    "tar: hard link": (lambda p: special_tar(p, tarfile.LNKTYPE), "'train/cat/link.png'"),
    "tar: device": (lambda p: special_tar(p, tarfile.CHRTYPE, "dev"), "'dev'"),
    "tar: no tar": (lambda p: broken_tar(p, "x.tar", lambda b: b"no tar" * 300), "x.tar'"),
    "tar: no gzip": (lambda p: broken_tar(p, "x.tar.gz", lambda b: b"no tar"), "x.tar.gz'"),
    "tar: empty": (lambda p: broken_tar(p, "x.tar", lambda b: b""), "x.tar'"),
    "tar: cut": (lambda p: broken_tar(p, "x.tar", lambda b: b[: len(b) // 2 + 100]), "x.tar'"),
    "tar: cut between members": (lambda p: broken_tar(p, "x.tar", first_member_only), "x.tar'"),
    "tar: bad header": (lambda p: broken_tar(p, "x.tar", bad_header), "x.tar'"),
    "tar: cut gzip": (lambda p: broken_tar(p, "x.tgz", lambda b: b[: len(b) // 2]), "x.tgz'"),
    "tar: gzip without its end": (lambda p: broken_tar(p, "x.tgz", lambda b: b[:-4]), "x.tgz'"),
    "tar: a bit flipped": (lambda p: broken_tar(p, "x.tgz", flipped), "x.tgz'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_quotes_what_was_given(tmp_path, case):
    arguments, quoted = REFUSED[case]
    with pytest.raises(UserError) as error:
        load_data(**arguments(tmp_path))
    message = str(error.value)
    assert quoted in message and "\n" not in message
    assert any(word in message for word in ("expected", "must be", "not downloaded", "is no folder")), message


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(UserError, match=f"^fraction {fraction} of the train images must be above 0 and below 1$"):
        load_data(img_size=8).split(fraction, seed=0)


@pytest.mark.parametrize("size", [0, -3, 2.0])
def test_a_batch_size_out_of_range_is_refused(size):
    with pytest.raises(UserError, match=f"^batch size {size} must be a whole number of at least 1$"):
        load_data(img_size=8).val_batches(size)
    with pytest.raises(UserError, match="at least 1 is needed"):
        load_data(img_size=8).train_batches(8, seed=0, indices=torch.tensor([], dtype=torch.int64))
