"""The images a run trains on: embedded digits, a folder or tar of images, or what timm's ``create_dataset`` opens.

Small data lives in memory (`dnas.training.batches`). Image files go through worker processes, timm's transforms and
timm's prefetcher. Either way an epoch's order and augmentation are a function of (seed, epoch) alone.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.transforms import ResizeKeepRatio
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dnas.spec.checks import UserError
from dnas.spec.image_size import ImgSize, check_size, sides
from dnas.training.batches import Data, Pair, check_whole, fit, in_memory
from dnas.training.data_summary import Met, digest_of, summarize
from dnas.training.image_files import LAYOUT, MODES, Layout, Look, decode, decode_and_look, look_at_header, walk
from dnas.training.tar_images import members

_FOLDERS = ("", "torch/image_folder", "torch/folder")
_UPRIGHT = ("torch/mnist", "torch/kmnist", "torch/qmnist")  # characters: mirrored, they are others or none
_FULL_CHECK = 20_000  # decoding more images than this before a run would take too long
_SMALL = 64  # up to this size a crop with a margin beats the random resized crop, which is made for photographs


def load_data(
    dataset: str = "",
    data_dir: str = "",
    *,
    img_size: int | Sequence[int] | None = None,
    in_chans: int = 3,
    device: str | torch.device = "cpu",
    workers: int = 2,
) -> Data:
    """Open a data set; nothing is downloaded and nothing is written.

    * neither name nor folder, or ``"digits"``: scikit-learn's 1797 handwritten digits, 80 % of them for training;
    * ``data_dir`` a folder of train/<class>/<image> and validation/<class>/<image>, read by ``workers`` processes (0:
      by this one);
    * ``data_dir`` a ``.tar``, ``.tar.gz`` or ``.tgz`` of that layout: decoded into the device's memory;
    * ``dataset`` one of timm's ``torch/...`` names, found in ``data_dir``: in memory if torchvision has it there.

    ``img_size`` is one side or (height, width); by default 32 for digits, that of the images for the others in memory,
    and 224 for files. Classes are numbered as timm does it, by natural order of their names.
    `dnas.training.image_files.Layout` says which files of a folder or tar are read.

    Raises:
        UserError: whatever is wrong with the arguments or the data, images that cannot be decoded included.
    """
    size = None if img_size is None else check_size(img_size, least=8)
    check_whole("number of workers", workers, 0)
    if in_chans not in MODES:
        raise UserError(f"in_chans {in_chans!r} must be 1 (grey) or 3 (colour)")
    kind, root, device = dataset.lower(), Path(data_dir), torch.device(device)
    if kind == "digits" and data_dir:
        raise UserError(f"dataset {dataset!r} is built in: no data folder expected, got {data_dir!r}")
    if kind not in ("", "digits") and not kind.startswith("torch/"):
        known = "'digits', timm's 'torch/<name>' such as 'torch/cifar10', or none and a data folder"
        raise UserError(f"unknown dataset {dataset!r}: expected {known}")
    if kind == "digits" or not (kind or data_dir):
        return in_memory("digits", *_digits(), tuple("0123456789"), size or 32, in_chans, device, flip=False)
    if not data_dir or not root.exists():
        raise UserError(f"data folder {data_dir!r} does not exist: expected a folder or tar of {LAYOUT}")
    if not root.is_dir():
        if kind or not root.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
            raise UserError(f"data {data_dir!r} is no folder, nor a .tar, .tar.gz or .tgz without a dataset name")
        return _from_tar(root, size, in_chans, device)
    if kind in _FOLDERS:
        return _from_files(dataset or root.name, *_open_folders(root), size or 224, in_chans, device, workers)
    train, val, names = _open_named(dataset, data_dir)
    if hasattr(train, "data"):
        pairs, flip = (_as_pair(train), _as_pair(val)), kind not in _UPRIGHT
        return in_memory(dataset, *pairs, names, size, in_chans, device, flip=flip)
    files = {"train": train.samples, "validation": val.samples}
    return _from_files(dataset, files, names, [], {}, size or 224, in_chans, device, workers)


def _digits() -> tuple[Pair, Pair]:
    """Train and validation images uint8 [N, 1, 8, 8] with labels; the same split for every seed."""
    from sklearn.datasets import load_digits  # here, because only this data needs it, and it takes long
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
    images = (images * (255 / 16)).round().to(torch.uint8)[:, None]
    train, val = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return (images[train], labels[train]), (images[val], labels[val])


def _as_pair(dataset: Any) -> Pair:
    """Torchvision's arrays, uint8 [N, H, W] or [N, H, W, C] with labels, as a pair [N, C, H, W], [N]."""
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST has more about each digit behind it
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2), labels.long()


def _from_tar(path: Path, img_size: ImgSize | None, in_chans: int, device: torch.device) -> Data:
    """`Data` of a tar, in memory; nothing is unpacked to disk."""
    where, mode = repr(str(path)), MODES[in_chans]
    layout, met = Layout(where), {"train": Met(), "validation": Met()}
    images: dict[str, list[tuple[Tensor, str]]] = {"train": [], "validation": []}
    for name, content in members(path):
        placed = layout.place(name, None if content is None else len(content))
        if placed and content is not None:
            split, label = placed
            image, look = decode_and_look(content, f"{where}: image {str(name)!r}", mode)
            met[split].add(look, label)
            pixels = TF.pil_to_tensor(image)
            images[split].append((fit(pixels[None], img_size, in_chans)[0] if img_size else pixels, label))
    names = layout.class_names()
    number = {name: k for k, name in enumerate(names)}
    sizes = sorted({tuple(image.shape[1:]) for part in images.values() for image, _ in part})
    if len(sizes) > 1 or min(sizes[0]) < 8:
        seen = " and ".join(f"{height}x{width}" for height, width in sizes[:2])
        raise UserError(f"{where} has images of {seen} pixels: expected one size from 8x8 up, or an image size")
    train, val = (
        (torch.stack([image for image, _ in part]), torch.tensor([number[label] for _, label in part]))
        for part in images.values()
    )
    about = {"files": (met["train"], met["validation"]), "left_out": layout.left_out}
    digest = digest_of([*names, *sorted(layout.sizes)])
    return in_memory(path.name, train, val, names, img_size, in_chans, device, flip=True, digest=digest, **about)


Samples = dict[str, list[tuple[str, int]]]  # split -> (path, class) of each image


def _open_folders(root: Path) -> tuple[Samples, tuple[str, ...], list[str], Mapping[str, int]]:
    """The images of a folder, the class names, and of `Layout` the sizes of the files and what was left out."""
    layout = Layout(f"data folder {str(root)!r}")
    placed = []
    for name, path, size in walk(root):
        if (place := layout.place(name, size)) and size is not None:
            placed.append((*place, str(path)))
    names = layout.class_names()
    number = {name: k for k, name in enumerate(names)}
    samples: Samples = {split: [] for split in ("train", "validation")}
    for split, label, file in sorted(placed, key=lambda item: natural_key(item[2])):  # in timm's order
        samples[split].append((file, number[label]))
    return samples, names, sorted(layout.sizes), layout.left_out


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
    name: str, samples: Samples, names: tuple[str, ...], entries: Sequence[str], left_out: Mapping[str, int],
    img_size: ImgSize, in_chans: int, device: torch.device, workers: int
) -> Data:  # fmt: skip
    """`Data` of image files, which are looked at first; ``entries`` is what `Layout` says of them, if anything."""
    met = _looked_at(samples, names)
    colour = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = colour if in_chans == 3 else ((round(sum(v) / 3, 4),) for v in colour)
    height, width = sides(img_size)
    is_small = height * width <= _SMALL**2
    crop_pct = 1.0 if is_small else DEFAULT_CROP_PCT
    plain = create_transform((3, height, width), crop_pct=crop_pct, use_prefetcher=True)
    ratio = (3 / 4 * width / height, 4 / 3 * width / height)  # timm's crops are for square images: these keep shapes
    augment = create_transform((3, height, width), is_training=True, ratio=ratio, color_jitter=0.0, use_prefetcher=True)
    if is_small:
        cover = v2.Resize(height) if height == width else ResizeKeepRatio((height, width), interpolation="bilinear")
        crops = [
            cover,
            v2.CenterCrop((height, width)),
            v2.RandomCrop((height, width), padding=[width // 8, height // 8]),
        ]
        augment = v2.Compose([*crops, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    train, val = samples["train"], samples["validation"]
    fetch = partial(_from_workers, _Images(train, augment, in_chans), mean, std, device, workers)
    fetch_val = partial(_from_workers, _Images(val, plain, in_chans), mean, std, device, workers)
    labels, val_labels = (torch.tensor([label for _, label in part]) for part in (train, val))
    digest = digest_of(
        [*names, *entries] if entries else [f"{Path(path).name} {label}" for path, label in (*train, *val)]
    )
    files = met["train"], met["validation"]
    summary = summarize(names, labels, val_labels, digest, img_size, files=files, left_out=left_out)
    sizes = len(train), len(val)
    about = (name, len(names), in_chans, img_size, mean, std, names)
    return Data(*about, *sizes, summary, labels, fetch, fetch_val, crop_pct=crop_pct)


def _looked_at(samples: Samples, names: Sequence[str]) -> dict[str, Met]:
    """What the image files are, by split. Raises UserError for one that cannot be decoded."""
    met = {split: Met() for split in samples}
    few = sum(map(len, samples.values())) <= _FULL_CHECK

    def look(path: str) -> Look:
        what = f"image {path!r}"
        try:
            return decode_and_look(Path(path).read_bytes(), what, "RGB")[1] if few else look_at_header(path, what)
        except OSError as error:
            raise UserError(f"{what} cannot be read ({error.strerror}): expected a file that can") from None

    with ThreadPoolExecutor() as pool:
        for split, part in samples.items():
            for start in range(0, len(part), 10_000):  # of millions of files, not all are to wait at once
                some = part[start : start + 10_000]
                for one, (_, label) in zip(pool.map(look, [path for path, _ in some]), some, strict=True):
                    met[split].add(one, names[label])
    return met


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
    try:
        yield from PrefetchLoader(loader, mean, std, channels=len(mean), device=device)
    except UserError as error:  # where another process raised it, a traceback comes before its text
        raise UserError(error.with_flags.rpartition("UserError: ")[2].strip()) from None


class _Images(Dataset):
    """(image, label) by (index, dice), augmented by a transform that sees no randomness but ``dice``."""

    def __init__(self, samples: Sequence[tuple[str, int]], transform: Callable[[Image.Image], Any], in_chans: int):
        self.samples, self.transform, self.mode = samples, transform, MODES[in_chans]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        path, label = self.samples[key[0]]
        image = decode(path, f"image {path!r}", self.mode)
        # The transforms know no generators but the global ones: lend them seeded ones, then put the old ones back.
        states = random.getstate(), torch.get_rng_state()
        random.seed(key[1])
        torch.set_rng_state(torch.Generator().manual_seed(key[1]).get_state())
        try:
            return self.transform(image), label
        finally:
            random.setstate(states[0])
            torch.set_rng_state(states[1])
