"""dnas/training/data.py against scikit-learn, numpy and pixels that the tests wrote themselves."""

import os
import random
import runpy
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documents import NET
from image_files import (
    encode,
    noise,
    tree,
    write_folder,
    write_tar,
)
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit
from timm.data import create_transform, resolve_data_config

from dnas.export.arch_schema import DATA
from dnas.export.model_file import model_source
from dnas.training.batches import Batches, in_memory
from dnas.training.data import _as_pair, load_data

# timm leaves closing its image files to the garbage collector, and Python 3.12 dislikes a DataLoader that forks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
CIFAR10 = os.environ.get("DNAS_CIFAR10", "")


def pixels(images, data):
    """uint8 numpy [B, C, H, W] of normalised images."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (data.mean, data.std))
    return ((images.double() * std + mean) * 255).round().to(torch.uint8).numpy()


def windows(images, flip):
    """{bytes: [(index, dy, dx, mirrored)]} of every crop of [N, C, S, S] out of its zero margin, by plain slicing."""
    size, found = images.shape[-1], {}
    margin = size // 8
    for i, image in enumerate(images):
        padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)))
        for dy in range(2 * margin + 1):
            for dx in range(2 * margin + 1):
                crop = padded[:, dy : dy + size, dx : dx + size]
                for mirrored in (False, True)[: 1 + flip]:
                    seen = crop[..., ::-1] if mirrored else crop
                    found.setdefault(seen.tobytes(), []).append((i, dy, dx, mirrored))
    return found


def epoch(batches, number=0):
    batches.set_epoch(number)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def rng_states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


# ---- digits ----


def test_digits_are_sklearns_digits_resized_and_split_by_class():
    data, digits = load_data(), load_digits()
    assert (data.name, data.num_classes, data.in_chans, data.img_size) == ("digits", 10, 3, 32)
    assert (data.num_train, data.num_val, data.class_names) == (1437, 360, tuple("0123456789"))
    images, labels = epoch(data.val_batches(100))
    counts = [
        np.bincount(digits.target[part])
        for part in next(StratifiedShuffleSplit(1, test_size=0.2, random_state=1).split(digits.images, digits.target))
    ]
    assert np.abs(np.bincount(labels) - counts[1]).max() <= 1
    train_labels = epoch(data.train_batches(1437, seed=0))[1]
    assert np.abs(np.bincount(train_labels) - counts[0]).max() <= 1

    seen = pixels(images, data)
    assert (seen[:, 0] == seen[:, 1]).all() and (seen[:, 0] == seen[:, 2]).all()
    source = torch.from_numpy(digits.images)[:, None] * 255 / 16
    expected = F.interpolate(source, (32, 32), mode="bilinear", antialias=True)[:, 0].numpy()
    for image, label in zip(seen[:60, 0], labels[:60], strict=True):
        assert np.abs(expected[digits.target == label.item()] - image).max(axis=(1, 2)).min() <= 2

    everything, held_out = expected, seen[:, 0].astype(float)
    rest = everything.sum() - held_out.sum(), (everything**2).sum() - (held_out**2).sum()
    mean, square = (total / (1437 * 32 * 32) for total in rest)
    assert data.mean[0] == pytest.approx(mean / 255, abs=2e-3)
    assert data.std[0] == pytest.approx((square - mean**2) ** 0.5 / 255, abs=2e-3)


def test_digits_augmentation_is_a_shift_and_no_train_image_is_a_validation_image():
    data, digits = load_data(img_size=8, in_chans=1), load_digits()
    source = (digits.images * 255 / 16).round().astype(np.uint8)[:, None]
    places = windows(source, flip=False)
    images, labels = epoch(data.train_batches(1437, seed=3))
    trained, shifts = set(), set()
    for image, label in zip(pixels(images, data), labels.tolist(), strict=True):
        origins = [origin for origin in places[image.tobytes()] if digits.target[origin[0]] == label]
        assert origins
        if len(origins) == 1:
            trained.add(origins[0][0])
            shifts.add(origins[0][1:3])
    assert len(trained) > 1300 and shifts == {(y, x) for y in range(3) for x in range(3)}
    unmoved = {image.tobytes(): i for i, image in enumerate(source)}
    held_out = [unmoved[image.tobytes()] for image in pixels(epoch(data.val_batches(360))[0], data)]
    assert len(set(held_out)) == 360 and not trained & set(held_out)


@pytest.mark.parametrize("size", [8, 24, 40])
def test_digits_of_other_sizes(size):
    images, labels = next(iter(load_data("Digits", img_size=size, in_chans=1).val_batches(5)))
    assert images.shape == (5, 1, size, size) and images.dtype == torch.float32 and labels.dtype == torch.int64


# ---- batches ----


def test_an_epoch_depends_on_seed_and_epoch_only():
    data = load_data(img_size=16)
    before = rng_states()
    first = epoch(data.train_batches(64, seed=1), 4)
    assert rng_states() == before
    torch.rand(3), random.random(), np.random.rand()
    again = epoch(load_data(img_size=16).train_batches(64, seed=1), 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (epoch(data.train_batches(64, seed=1), 5), epoch(data.train_batches(64, seed=2), 4)):
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize("batch", [0, 1, 5, 14])
def test_an_epoch_can_be_taken_up_in_its_middle(batch):
    data = load_data(img_size=8)
    for batches in (data.train_batches(100, seed=3), data.val_batches(30)):
        batches.set_epoch(4)
        whole = list(batches)[batch:]
        rest = list(batches.starting_at(batch))
        assert len(rest) == len(whole)
        for (x, y), (other_x, other_y) in zip(rest, whole, strict=True):
            assert torch.equal(x, other_x) and torch.equal(y, other_y)


def test_batches_are_full_in_training_and_complete_in_validation():
    data = load_data(img_size=8)
    batches = data.train_batches(100, seed=0)
    assert isinstance(batches, Batches) and len(batches) == 14 and [len(y) for _, y in batches] == [100] * 14
    few = data.train_batches(100, seed=0, indices=torch.tensor([5, 7, 9]))
    assert len(few) == 1 and [len(y) for _, y in few] == [3]
    val = data.val_batches(100)
    assert len(val) == 4 and [len(y) for _, y in val] == [100, 100, 100, 60]
    once, twice = epoch(val), epoch(data.val_batches(360), 7)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_indices_choose_the_images():
    images = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8) + 1
    pair = (images, torch.arange(20) % 2)
    data = in_memory("ramp", pair, pair, ("even", "odd"), None, 1, "cpu", flip=True)
    chosen, labels = epoch(data.train_batches(2, seed=0, indices=torch.tensor([3, 4, 10, 15])))
    levels = pixels(chosen, data).reshape(4, -1).max(axis=1) - 1
    assert sorted(levels) == [3, 4, 10, 15] and (levels % 2 == labels.numpy()).all()


@pytest.mark.parametrize("fraction", [0.5, 0.2, 0.003, 0.999])
def test_split_is_stratified_disjoint_and_complete(fraction):
    data = load_data(img_size=8)
    labels = torch.empty(1437, dtype=torch.int64)
    for i in range(10):  # batches of chosen images tell the label of each index
        part = torch.arange(i, 1437, 10)
        for index in part.split(1):
            labels[index] = next(iter(data.train_batches(1, seed=0, indices=index)))[1]
    before = rng_states()
    rest, taken = data.split(fraction, seed=5)
    assert rng_states() == before
    assert torch.equal(torch.cat([rest, taken]).sort().values, torch.arange(1437))
    assert ((labels[taken].bincount(minlength=10) - fraction * labels.bincount()).abs() <= 1).all()
    again, other = data.split(fraction, seed=5), data.split(fraction, seed=6)
    assert torch.equal(taken, again[1]) and torch.equal(rest, again[0]) and not torch.equal(taken, other[1])


def test_a_part_of_the_train_images_keeps_images_with_their_labels():
    data = load_data("digits", img_size=8, in_chans=1)
    part, everything = data.take(300), load_data("digits", img_size=8, in_chans=1)
    assert abs(part.num_train - 300) <= 10 and part.num_val == data.num_val and data.take(10**6) is data
    # augmentation is a function of an image's place in the batch: turn it off to compare images
    known = {}
    for image, label in zip(*epoch(Batches(everything._train, torch.arange(data.num_train), 64)), strict=True):
        known.setdefault(image.numpy().tobytes(), set()).add(int(label))
    images, labels = epoch(Batches(part._train, torch.arange(part.num_train), 64))
    assert len({image.numpy().tobytes() for image in images}) == part.num_train
    assert all(int(label) in known[image.numpy().tobytes()] for image, label in zip(images, labels, strict=True))
    assert labels.tolist() == part._labels.tolist() and max(labels.bincount()) - min(labels.bincount()) <= 4
    assert torch.equal(epoch(Batches(data.take(300)._train, torch.arange(part.num_train), 64))[0], images)


def test_split_leaves_a_lone_image_in_the_rest():
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    pair = (images, torch.tensor([0, 0, 1, 1, 2]))
    data = in_memory("five", pair, pair, ("a", "b", "c"), None, 1, "cpu", flip=False)
    rest, taken = data.split(0.1, seed=0)
    assert sorted(pair[1][taken].tolist()) == [0, 1] and sorted(pair[1][rest].tolist()) == [0, 1, 2]
    assert torch.isfinite(epoch(data.val_batches(5))[0]).all()  # all black: no variance to divide by


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_on_the_cpu():
    for make in (lambda d: d.train_batches(64, seed=1), lambda d: d.val_batches(64)):
        for ours, theirs in zip(make(load_data(device="cuda")), make(load_data()), strict=True):
            assert ours[0].is_cuda and ours[1].is_cuda
            assert torch.equal(ours[1].cpu(), theirs[1]) and torch.allclose(ours[0].cpu(), theirs[0], atol=1e-6)


# ---- a tar ----


@pytest.mark.parametrize(
    ("name", "mode", "prefix", "val"),
    [("a.tar.gz", "w:gz", "", "validation"), ("a.tgz", "w:gz", "./", "val"), ("A.TAR", "w", "./top/", "validation")],
)
def test_a_tar_holds_the_pixels_written(tmp_path, name, mode, prefix, val):
    files, images = tree(val=6)
    files = {prefix + n.replace("validation", val): content for n, content in files.items()}
    files |= {f"{prefix}README.md": b"text", f"{prefix}train/cat/._0.png": b"note", f"{prefix}train/cat/Thumbs.db": b""}
    data = load_data(data_dir=write_tar(tmp_path / name, files, mode))
    assert (data.num_train, data.num_val, data.class_names, data.img_size) == (12, 12, ("cat", "dog"), 16)
    normal, labels = epoch(data.val_batches(5))  # here the validation images are the train images
    assert (pixels(normal, data) == images).all() and labels.tolist() == [0] * 6 + [1] * 6
    assert np.allclose(data.mean, images.mean(axis=(0, 2, 3)) / 255, atol=5.1e-5)
    assert np.allclose(data.std, images.std(axis=(0, 2, 3)) / 255, atol=5.1e-5)
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (normal.std(dim=(0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3


def test_a_tar_is_augmented_by_shifts_and_flips(tmp_path):
    files, images = tree()
    data = load_data(data_dir=write_tar(tmp_path / "a.tar", files, "w"))
    places, seen = windows(images, flip=True), []
    batches = data.train_batches(4, seed=0)
    for number in range(30):
        augmented, labels = epoch(batches, number)
        found = [places[image.tobytes()] for image in pixels(augmented, data)]
        assert all(len(origins) == 1 for origins in found)
        assert sorted(origins[0][0] for origins in found) == list(range(12))  # each image once an epoch
        assert [origins[0][0] // 6 for origins in found] == labels.tolist()
        seen += [origins[0][1:] for origins in found]
    assert {place[:2] for place in seen} == {(y, x) for y in range(5) for x in range(5)}
    assert 0.4 < np.mean([place[2] for place in seen]) < 0.6


def test_a_tar_is_resized_to_one_size_and_to_grey(tmp_path):
    files, _ = tree()
    wide = np.full((3, 20, 40), 90, np.uint8)
    files["train/cat/wide.png"] = encode(wide)
    files["train/dog/grey.jpg"] = encode(noise(1, 12, 1)[0], "JPEG")
    path = write_tar(tmp_path / "a.tar.gz", files)
    data = load_data(data_dir=path, img_size=24)
    assert (data.img_size, data.num_train) == (24, 14)
    grey = load_data(data_dir=path, img_size=8, in_chans=1)
    assert next(iter(grey.train_batches(5, seed=0)))[0].shape == (5, 1, 8, 8) and len(grey.mean) == 1
    every = [pixels(x, data) for x, _ in data.train_batches(1, seed=0)]
    assert sum(set(np.unique(x)) <= {0, 90} for x in every) == 1


# ---- folders and names, by timm ----


@pytest.mark.parametrize("size", [16, 80])
def test_a_folder_gives_the_same_batches_whatever_the_workers(tmp_path, size):
    files, _ = tree(size=20)
    root = write_folder(tmp_path, files)
    alone = load_data(data_dir=root, img_size=size, workers=0)
    assert (alone.num_train, alone.num_val, alone.class_names, alone.img_size) == (12, 4, ("cat", "dog"), size)
    before = rng_states()
    first, val = epoch(alone.train_batches(5, seed=0), 3), epoch(alone.val_batches(3))
    crowd = load_data("torch/image_folder", root, img_size=size, workers=2)
    again, val_again = epoch(crowd.train_batches(5, seed=0), 3), epoch(crowd.val_batches(3))
    assert rng_states() == before
    assert first[0].shape == (10, 3, size, size) and first[0].dtype == torch.float32
    for ours, theirs in zip((*first, *val), (*again, *val_again), strict=True):
        assert torch.equal(ours, theirs)
    assert val[1].tolist() == [0, 0, 1, 1] and val[1].dtype == torch.int64
    assert not torch.equal(first[0], epoch(alone.train_batches(5, seed=0), 4)[0])


def test_a_small_folder_is_normalised_and_augmented_by_shifts_and_flips(tmp_path):
    files, images = tree(val=6)
    data = load_data(data_dir=write_folder(tmp_path, files), img_size=16, workers=0)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (pixels(epoch(data.val_batches(12))[0], data) == images).all()
    places, seen = windows(images, flip=True), []
    rest, taken = data.split(0.5, seed=0)
    for number in range(10):
        augmented, labels = epoch(data.train_batches(6, seed=0, indices=taken), number)
        found = [places[image.tobytes()][0] for image in pixels(augmented, data)]
        assert sorted(place[0] for place in found) == taken.tolist()
        assert [place[0] // 6 for place in found] == labels.tolist()
        seen += [place[1:] for place in found]
    assert len(set(seen)) > 20 and {place[2] for place in seen} == {False, True} and len(rest) == 6


def test_a_grey_folder_named_val_with_classes_in_timms_order(tmp_path):
    files, _ = tree(classes=("c10", "c9"))
    files = {name.replace("validation", "val"): content for name, content in files.items()}
    data = load_data(data_dir=write_folder(tmp_path, files), in_chans=1, workers=0)
    assert (data.class_names, data.img_size, len(data.mean)) == (("c9", "c10"), 224, 1)
    assert next(iter(data.val_batches(2)))[0].shape == (2, 1, 224, 224)


def test_a_timm_name_held_in_memory_by_torchvision(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = noise(20, 28, 1)
    for prefix, count in (("train", 20), ("t10k", 10)):
        head = struct.pack(">4i", 2051, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + images[:count].tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, count) + bytes(range(10)) * (count // 10)
        )
    data = load_data("torch/mnist", str(tmp_path), in_chans=1)
    assert (data.name, data.img_size, data.num_train, data.num_val, data.num_classes) == ("torch/mnist", 28, 20, 10, 10)
    normal, labels = epoch(data.val_batches(4))
    assert (pixels(normal, data) == images[:10]).all() and labels.tolist() == list(range(10))
    upright = windows(images, flip=False)
    assert all(image.tobytes() in upright for image in pixels(epoch(data.train_batches(20, seed=0))[0], data))
    assert load_data("torch/mnist", str(tmp_path), img_size=32).img_size == 32


def test_labels_with_more_behind_them(tmp_path):
    """As those of QMNIST: the first of eight numbers is the digit."""
    targets = torch.arange(32).view(4, 8)
    images, labels = _as_pair(SimpleNamespace(data=torch.zeros(4, 28, 28, dtype=torch.uint8), targets=targets))
    assert images.shape == (4, 1, 28, 28) and labels.tolist() == [0, 8, 16, 24]


@pytest.mark.parametrize("size, crop", [(64, 1.0), (80, 0.875), (96, 0.875), (224, 0.875)])
def test_an_exported_model_asks_for_the_images_that_it_was_validated_on(tmp_path, size, crop):
    """timm's own transform by what model.py says, against the batches of a folder."""
    files, _ = tree(size=100)
    data = load_data(data_dir=write_folder(tmp_path, files), img_size=size, workers=0)
    assert data.crop_pct == crop
    about = {key: getattr(data, key) for key in DATA}
    (tmp_path / "model.py").write_text(model_source(f"dnas_crop_{size}", NET, **about))
    cfg = runpy.run_path(str(tmp_path / "model.py"))["CFG"]
    like = create_transform(**resolve_data_config(pretrained_cfg=cfg))
    image = Image.open(next(path for path in sorted((tmp_path / "validation").rglob("*")) if path.is_file()))
    torch.testing.assert_close(next(iter(data.val_batches(1)))[0][0], like(image.convert("RGB")), rtol=0, atol=1e-5)


def test_images_in_memory_are_not_cropped(tmp_path):
    files, _ = tree(size=100)
    assert load_data(data_dir=write_tar(tmp_path / "data.tar.gz", files), img_size=96).crop_pct == 1.0


# Meant: the tar has 18 MB and is not shipped; DNAS_CIFAR10 names one where there is one.
@pytest.mark.skipif(not CIFAR10, reason="DNAS_CIFAR10 does not name the CIFAR-10 tar")
def test_cifar10():
    data = load_data(data_dir=CIFAR10)
    assert (data.num_train, data.num_val, data.num_classes, data.img_size) == (50_000, 10_000, 10, 32)
    assert data.mean == pytest.approx((0.4913, 0.4821, 0.4465), abs=1e-3)
    assert data.std == pytest.approx((0.2452, 0.2428, 0.2606), abs=1e-3)
    rest, taken = data.split(0.2, seed=0)
    assert (len(rest), len(taken)) == (40_000, 10_000) and len(data.train_batches(128, seed=0)) == 390
