"""The images a run trains on: embedded digits, a tar read into memory, or whatever timm's ``create_dataset`` opens.

Small data (digits, a tar, CIFAR, MNIST) lives on the device as uint8 and is cropped, flipped and normalised there, a
whole batch at a time. Image folders go through worker processes, timm's transforms and timm's prefetcher. Either way an
epoch's order and augmentation are a function of (seed, epoch) alone, so that a run can be repeated.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dnas.runtime.distributed import rank, share_of, world_size
from dnas.spec.checks import UserError
from dnas.training.tar_images import MODES, decode, members

Pair = tuple[Tensor, Tensor]  # images and labels
# One epoch of batches from (order [N], dice [N] or None to leave the images as they are, batch size).
Fetch = Callable[[Tensor, Tensor | None, int], Iterator[Pair]]

_LAYOUT = "train/<class>/<image> and validation/<class>/<image> (or val/<class>/<image>)"
_SPLITS = {"train": "train", "validation": "validation", "val": "validation"}
_FOLDERS = ("", "torch/image_folder", "torch/folder")
_UPRIGHT = ("torch/mnist", "torch/kmnist", "torch/qmnist")  # characters: mirrored, they are others or none
_FULL_CHECK = 20_000  # decoding more images than this before a run would take too long
_SMALL = 64  # up to this size a crop with a margin beats the random resized crop, which is made for photographs


class Batches:
    """One epoch of (images float32 [B, C, H, W], normalised; labels int64 [B]), both on the device, per iteration.

    With a seed: shuffled, augmented, full batches only (one smaller batch if there are fewer images than that).
    Without: as stored, each image once. Order and augmentation depend on (seed, epoch) only; the global random state
    is neither read nor changed, whatever the source and the number of workers. Of several processes, each gets its
    part of every batch of ``batch_size``.

    One limit: timm replaces a file that stops being readable during the run by the next one, with a warning.
    """

    def __init__(self, fetch: Fetch, indices: Tensor, batch_size: int, seed: int | None = None):
        _check_whole("batch size", batch_size, 1)
        if len(indices) == 0:
            raise UserError(f"no image left to make batches of {batch_size} from: at least 1 is needed")
        self._fetch, self._indices, self._batch_size, self._seed, self._epoch = fetch, indices, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the iterations that follow."""
        self._epoch = int(epoch)

    def __len__(self) -> int:
        images, size = len(self._indices), self._batch_size
        return -(-images // size) if self._seed is None else max(1, images // size)

    def __iter__(self) -> Iterator[Pair]:
        return self.starting_at(0)

    def starting_at(self, batch: int) -> Iterator[Pair]:
        """What is left of an epoch when so many of its batches have been taken."""
        if self._seed is None:
            return self._fetch(self._indices[batch * self._batch_size :], None, self._batch_size)
        generator = _generator("epoch", int(self._seed), self._epoch)
        order = self._indices[torch.randperm(len(self._indices), generator=generator)]
        # One number per image decides all that happens to it, in whichever process that is.
        dice = torch.randint(2**62, (len(order),), generator=generator)
        size, own = share_of(min(len(order), len(self) * self._batch_size), self._batch_size)
        own = own[batch * size :]
        return self._fetch(order[own], dice[own], size)


@dataclass(frozen=True)
class Data:
    """Training and validation images and what is known of them; built by `load_data`."""

    name: str
    num_classes: int
    in_chans: int
    img_size: int
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    num_train: int
    num_val: int
    _labels: Tensor = field(repr=False, compare=False)  # of the train images, int64 [num_train], on the CPU
    _train: Fetch = field(repr=False, compare=False)
    _val: Fetch = field(repr=False, compare=False)

    def split(self, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
        """Split the train images, class by class: sorted indices int64 of (the rest, ``fraction`` of them).

        Each class is within one image of its exact share, and is in both parts if it has two images or more.

        Raises:
            UserError: ``fraction`` is not between 0 and 1, or no class has two images.
        """
        if not 0 < fraction < 1:
            raise UserError(f"fraction {fraction!r} of the train images must be above 0 and below 1")
        shuffled = torch.randperm(self.num_train, generator=_generator("split", int(seed)))
        labels = self._labels[shuffled]
        classes = shuffled[labels.argsort(stable=True)].split(labels.bincount().tolist())
        cuts = [max(0, min(max(1, round(fraction * len(c))), len(c) - 1)) for c in classes]
        if not any(cuts):
            raise UserError(f"fraction {fraction!r} of the train images: a class with 2 of them is needed, most have 1")
        rest, taken = zip(*((c[cut:], c[:cut]) for c, cut in zip(classes, cuts, strict=True)), strict=True)
        return torch.cat(rest).sort().values, torch.cat(taken).sort().values

    def take(self, count: int) -> "Data":
        """The same data with about ``count`` of its train images, evenly over the classes: always the same ones."""
        if count >= self.num_train:
            return self
        taken = self.split(count / self.num_train, seed=0)[1]
        fetch: Fetch = lambda order, dice, size: self._train(taken[order], dice, size)  # noqa: E731
        return replace(self, num_train=len(taken), _labels=self._labels[taken], _train=fetch)

    def train_batches(self, batch_size: int, *, seed: int, indices: Tensor | None = None) -> Batches:
        """Shuffled, augmented batches of the train images, or of those at ``indices`` (int64 [N])."""
        indices = torch.arange(self.num_train) if indices is None else indices.cpu()
        return Batches(self._train, indices, batch_size, seed)

    def val_batches(self, batch_size: int) -> Batches:
        """All validation images once, in their fixed order, without augmentation; of several processes, each a part."""
        return Batches(self._val, torch.arange(rank(), self.num_val, world_size()), batch_size)


def load_data(
    dataset: str = "",
    data_dir: str = "",
    *,
    img_size: int | None = None,
    in_chans: int = 3,
    device: str | torch.device = "cpu",
    workers: int = 2,
) -> Data:
    """Open a data set; nothing is downloaded and nothing is written.

    * neither name nor folder, or ``"digits"``: scikit-learn's 1797 handwritten digits, 80 % of them for training;
    * ``data_dir`` a ``.tar``, ``.tar.gz`` or ``.tgz`` of train/<class>/<image> and validation/<class>/<image>: decoded
      into the device's memory;
    * ``data_dir`` a folder of that layout: timm's image folder, read by ``workers`` processes (0: by this one);
    * ``dataset`` one of timm's ``torch/...`` names, found in ``data_dir``: in memory if torchvision has it there.

    ``img_size`` is by default 32 for digits, that of the images for the others in memory, and 224 for files. Classes
    are numbered as timm does it, by natural order of their names.

    Raises:
        UserError: whatever is wrong with the arguments or the data, images that cannot be decoded included.
    """
    _check_whole("image size", 8 if img_size is None else img_size, 8)
    _check_whole("number of workers", workers, 0)
    if in_chans not in MODES:
        raise UserError(f"in_chans {in_chans!r} must be 1 (grey) or 3 (colour)")
    kind, root, device = dataset.lower(), Path(data_dir), torch.device(device)
    if kind == "digits" and data_dir:
        raise UserError(f"dataset {dataset!r} is built in: no data folder expected, got {data_dir!r}")
    if kind not in ("", "digits") and not kind.startswith("torch/"):
        known = "'digits', timm's 'torch/<name>' such as 'torch/cifar10', or none and a data folder"
        raise UserError(f"unknown dataset {dataset!r}: expected {known}")
    if kind == "digits" or not (kind or data_dir):
        return in_memory("digits", *_digits(), tuple("0123456789"), img_size or 32, in_chans, device, flip=False)
    if not data_dir or not root.exists():
        raise UserError(f"data folder {data_dir!r} does not exist: expected a folder or tar of {_LAYOUT}")
    if not root.is_dir():
        if kind or not root.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
            raise UserError(f"data {data_dir!r} is no folder, nor a .tar, .tar.gz or .tgz without a dataset name")
        return in_memory(root.name, *_read_tar(root, img_size, in_chans), img_size, in_chans, device, flip=True)
    train, val, names = _open_folders(root) if kind in _FOLDERS else _open_named(dataset, data_dir)
    if hasattr(train, "data"):
        pairs, flip = (_as_pair(train), _as_pair(val)), kind not in _UPRIGHT
        return in_memory(dataset, *pairs, names, img_size, in_chans, device, flip=flip)
    return _from_files(dataset or root.name, train, val, names, img_size or 224, in_chans, device, workers)


def in_memory(
    name: str, train: Pair, val: Pair, names: tuple[str, ...], img_size: int | None, in_chans: int,
    device: str | torch.device, *, flip: bool
) -> Data:  # fmt: skip
    """`Data` of images uint8 [N, 1 or 3, H, W] with labels int64 [N]; ``img_size`` None: not resized."""
    images = _fit(train[0], img_size, in_chans)
    # Mean and std from the histogram: exact, and without a float copy of the images.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    centre = share @ level
    spread = (share @ level**2 - centre**2).clamp(min=1 / 255**2).sqrt()  # all-blank images have none to divide by
    mean, std = (tuple(round(v, 4) for v in values.tolist()) for values in (centre, spread))
    norm = torch.tensor([mean, std], device=device).mul(255)[..., None, None]  # [2, C, 1, 1]
    fetch = partial(_from_memory, images.to(device), train[1].to(device), norm, flip)
    fetch_val = partial(_from_memory, _fit(val[0], img_size, in_chans).to(device), val[1].to(device), norm, flip)
    size, sizes = images.shape[-1], (len(train[1]), len(val[1]))
    return Data(name, len(names), in_chans, size, mean, std, names, *sizes, train[1], fetch, fetch_val)


def _from_memory(
    images: Tensor, labels: Tensor, norm: Tensor, flip: bool, order: Tensor, dice: Tensor | None, batch_size: int
) -> Iterator[Pair]:
    order, dice = order.to(images.device), None if dice is None else dice.to(images.device)  # one copy an epoch
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = images[index]
        if dice is not None:
            batch = _augment(batch, dice[start : start + batch_size], flip)
        yield batch.float().sub_(norm[0]).div_(norm[1]), labels[index]


def _augment(images: Tensor, dice: Tensor, flip: bool) -> Tensor:
    """Crop images [B, C, S, S] out of a zero margin of S // 8, and mirror half of them, as ``dice`` int64 [B] say."""
    size = images.shape[-1]
    places = 2 * (size // 8) + 1
    windows = F.pad(images, (size // 8,) * 4).unfold(2, size, 1).unfold(3, size, 1)  # view [B, C, places, places, S, S]
    images = windows[torch.arange(len(dice), device=dice.device), :, dice % places, dice // places % places]
    mirrored = (dice // places**2 % 2 == 1)[:, None, None, None]
    return torch.where(mirrored, images.flip(3), images) if flip else images


def _fit(images: Tensor, img_size: int | None, in_chans: int) -> Tensor:
    """Images [N, 1 or 3, H, W] with ``in_chans`` channels, resized and centre-cropped to ``img_size`` if given."""
    if images.shape[1] != in_chans:
        images = images.expand(-1, 3, -1, -1) if in_chans == 3 else TF.rgb_to_grayscale(images)
    if img_size and images.shape[-2:] != (img_size, img_size):
        images = TF.center_crop(TF.resize(images, [img_size], antialias=True), [img_size])
    return images.contiguous()


def _digits() -> tuple[Pair, Pair]:
    """Train and validation images uint8 [N, 1, 8, 8] with labels; the same split for every seed."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
    images = (images * (255 / 16)).round().to(torch.uint8)[:, None]
    train, val = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return (images[train], labels[train]), (images[val], labels[val])


def _as_pair(dataset: Any) -> Pair:
    """Torchvision's arrays, uint8 [N, H, W] or [N, H, W, C] with labels, as a pair [N, C, H, W], [N]."""
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2), labels.long()


def _read_tar(path: Path, img_size: int | None, in_chans: int) -> tuple[Pair, Pair, tuple[str, ...]]:
    """Train images uint8 [N, C, H, W] with labels, validation likewise, class names; nothing is unpacked to disk."""
    where, origins = repr(str(path)), set()
    images: dict[str, list[tuple[Tensor, str]]] = {"train": [], "validation": []}
    counts: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}
    for name, content in members(path):
        top = int(len(name.parts) > 1 and name.parts[0] not in _SPLITS and name.parts[1] in _SPLITS)
        split, inside = _SPLITS.get("".join(name.parts[top : top + 1])), name.parts[top + 1 :]
        # A hidden file is a file system's note on an image, not an image.
        is_image = name.suffix.lower() in (".jpg", ".jpeg", ".png") and not name.name.startswith(".")
        if not split or not inside or (content is not None and not is_image):
            continue
        if content is not None and len(inside) != 2:
            raise UserError(f"{where}: image {str(name)!r} is not where it is expected: {_LAYOUT}")
        origins.add(name.parts[: top + 1])
        counts[split][inside[0]] += content is not None
        if content is not None:
            image = decode(content, f"{where}: image {str(name)!r}", in_chans)
            images[split].append((_fit(image[None], img_size, in_chans)[0] if img_size else image, inside[0]))
    if sorted(_SPLITS[origin[-1]] for origin in origins) != ["train", "validation"]:
        seen = ", ".join(sorted(repr("/".join(origin)) for origin in origins)) or "none"
        raise UserError(f"{where} has these folders of classes: {seen}; expected {_LAYOUT}")
    names = _class_names(path, *counts.values())
    sizes = sorted({image.shape[1:] for part in images.values() for image, _ in part})
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1] or sizes[0][0] < 8:
        seen = " and ".join(f"{height}x{width}" for height, width in sizes[:2])
        raise UserError(f"{where} has images of {seen} pixels: expected one square size from 8x8 up, or an image size")
    train, val = (
        (torch.stack([image for image, _ in part]), torch.tensor([names.index(label) for _, label in part]))
        for part in images.values()
    )
    return train, val, names


def _open_folders(root: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """timm's datasets of the train and the validation folder in ``root``, and the class names."""
    train, vals = root / "train", [root / name for name in ("validation", "val") if (root / name).is_dir()]
    # Without these folders timm would take all images for either split.
    if not train.is_dir() or len(vals) != 1:
        seen = "no folder 'train'" if not train.is_dir() else f"{len(vals)} of the folders 'validation' and 'val'"
        raise UserError(f"data folder {str(root)!r} has {seen}: expected {_LAYOUT}")
    if train.samefile(vals[0]):
        raise UserError(f"{str(train)!r} and {str(vals[0])!r} are one folder: expected other images to validate on")
    datasets: list[Any] = []
    counts: list[Counter[str]] = []
    for folder in (train, vals[0]):
        try:
            dataset = create_dataset("", root=str(folder), search_split=False)
        except RuntimeError as error:
            raise UserError(f"folder {str(folder)!r} has no image in any class folder: expected {_LAYOUT}") from error
        names = {index: name for name, index in dataset.reader.class_to_idx.items()}
        count = Counter({path.name: 0 for path in folder.iterdir() if path.is_dir() and path.name[0] != "."})
        count.update(names[label] for _, label in dataset.reader.samples)
        datasets.append(dataset)
        counts.append(count)
    return *datasets, _class_names(root, *counts)


def _open_named(dataset: str, data_dir: str) -> tuple[Any, Any, tuple[str, ...]]:
    """torchvision's train and validation datasets by timm's name for them, and the class names."""
    try:
        train, val = (create_dataset(dataset, root=data_dir, split=s, download=False) for s in ("train", "validation"))
    except AssertionError as error:
        raise UserError(f"unknown dataset {dataset!r}: expected a name timm knows, such as 'torch/cifar10'") from error
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"dataset {dataset!r} is expected whole in {data_dir!r}: it is not downloaded") from error
    if not hasattr(train, "classes") or not (hasattr(train, "data") or hasattr(train, "samples")):
        raise UserError(f"dataset {dataset!r} does not list its labels: expected one that does, as 'torch/cifar10'")
    return train, val, tuple(c if isinstance(c, str) else c[0] for c in train.classes)


def _from_files(
    name: str, train: Any, val: Any, names: tuple[str, ...], img_size: int, in_chans: int, device: torch.device,
    workers: int
) -> Data:  # fmt: skip
    """`Data` of two datasets of (PIL image, label) that list their (file, label) pairs as ``samples``."""
    samples, val_samples = (getattr(dataset, "reader", dataset).samples for dataset in (train, val))
    paths = [path for path, _ in (*samples, *val_samples)]
    with ThreadPoolExecutor() as pool:
        broken = pool.map(partial(_is_broken, decode=len(paths) <= _FULL_CHECK), paths)
        if bad := next(compress(paths, broken), None):
            raise UserError(f"image {bad!r} cannot be decoded: expected a whole JPEG or PNG file")
    colour = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = colour if in_chans == 3 else ((round(sum(v) / 3, 4),) for v in colour)
    plain = create_transform(img_size, crop_pct=1.0 if img_size <= _SMALL else None, use_prefetcher=True)
    augment = create_transform(img_size, is_training=True, color_jitter=0.0, use_prefetcher=True)
    if img_size <= _SMALL:
        crops = [v2.Resize(img_size), v2.CenterCrop(img_size), v2.RandomCrop(img_size, padding=img_size // 8)]
        augment = v2.Compose([*crops, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    fetch = partial(_from_workers, _Images(train, augment, in_chans), mean, std, device, workers)
    fetch_val = partial(_from_workers, _Images(val, plain, in_chans), mean, std, device, workers)
    labels, sizes = torch.tensor([label for _, label in samples]), (len(samples), len(val_samples))
    return Data(name, len(names), in_chans, img_size, mean, std, names, *sizes, labels, fetch, fetch_val)


def _from_workers(
    images: "_Images", mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, workers: int,
    order: Tensor, dice: Tensor | None, batch_size: int
) -> Iterator[Pair]:  # fmt: skip
    # Not timm's create_loader: it takes neither an order nor a generator, and so draws from the global random state.
    keys = torch.stack([order, torch.zeros_like(order) if dice is None else dice], dim=1)
    batches, pin = (chunk.tolist() for chunk in keys.split(batch_size)), device.type == "cuda"
    loader = DataLoader(
        images, batch_sampler=batches, num_workers=workers, collate_fn=fast_collate, pin_memory=pin,
        generator=torch.Generator()
    )  # fmt: skip
    return iter(PrefetchLoader(loader, mean, std, channels=len(mean), device=device))


class _Images(Dataset):
    """(image, label) by (index, dice), augmented by a transform that sees no randomness but ``dice``."""

    def __init__(self, images: Any, transform: Callable[[Image.Image], Tensor], in_chans: int):
        self.images, self.transform, self.mode = images, transform, MODES[in_chans]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        image, label = self.images[key[0]]
        # The transforms know no generators but the global ones: lend them seeded ones, then put the old ones back.
        states = random.getstate(), torch.get_rng_state()
        random.seed(key[1])
        torch.set_rng_state(torch.Generator().manual_seed(key[1]).get_state())
        try:
            return self.transform(image.convert(self.mode)), label
        finally:
            random.setstate(states[0])
            torch.set_rng_state(states[1])


def _is_broken(path: str, decode: bool) -> bool:
    try:
        with Image.open(path) as image:
            image.load() if decode else image.verify()
    except Exception:  # see `decode`
        return True
    return False


def _class_names(root: Path, train: Mapping[str, int], val: Mapping[str, int]) -> tuple[str, ...]:
    """The class names in timm's order, from the number of images per class of both splits."""
    for split, counts in (("train", train), ("validation", val)):
        for name, count in counts.items():
            if not count:
                raise UserError(f"{str(root)!r}: class folder {f'{split}/{name}'!r} has no image in it: expected some")
    if train.keys() != val.keys():
        odd = min(train.keys() ^ val.keys())
        raise UserError(f"{str(root)!r}: class {odd!r} is in one split only: expected the same in train and validation")
    if len(train) < 2:
        raise UserError(f"{str(root)!r} has {len(train)} class, {', '.join(map(repr, train))}: expected at least 2")
    names = sorted(train, key=lambda name: (natural_key(name), name))
    for one, other in zip(names, names[1:], strict=False):
        if natural_key(one) == natural_key(other):  # timm would number these two by chance, differently in every run
            raise UserError(f"{str(root)!r}: classes {one!r} and {other!r} are one to timm: expected other names")
    return tuple(names)


def _check_whole(what: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{what} {value!r} must be a whole number of at least {least}")


def _generator(*key: object) -> torch.Generator:
    """A generator of its own for ``key``; neighbouring seeds and epochs have nothing in common."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
