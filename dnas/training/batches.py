"""Batches of images: order, crops, flips and normalisation, a function of (seed, epoch) alone.

Small data (digits, a tar, CIFAR, MNIST) lives on the device as uint8 and is cropped, flipped and normalised there, a
whole batch at a time. So that a run can be repeated, the global random state is neither read nor changed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from dnas.runtime.distributed import rank, share_of, world_size
from dnas.spec.checks import UserError
from dnas.spec.image_size import ImgSize, as_size, sides
from dnas.training.data_summary import digest_of, summarize

Pair = tuple[Tensor, Tensor]  # images and labels


class OwnLoss(NamedTuple):
    """What a program trains a network for, in the place of cross entropy. Both are means over a batch.

    ``loss(outputs, targets)`` is a scalar to minimise. ``score(outputs, targets)`` is what is reported: a number in
    percent, the higher the better. ``outputs`` is whatever the network returns.
    """

    loss: Callable[[Any, Tensor], Tensor]
    score: Callable[[Any, Tensor], Tensor | float]


# One epoch of batches from (order [N], dice [N] or None to leave the images as they are, batch size).
Fetch = Callable[[Tensor, Tensor | None, int], Iterator[Pair]]


class Batches:
    """One epoch of (images float32 [B, C, H, W], normalised; labels int64 [B]), both on the device, per iteration.

    With a seed: shuffled, augmented, full batches only (one smaller batch if there are fewer images than that).
    Without: as stored, each image once. Order and augmentation depend on (seed, epoch) only; the global random state
    is neither read nor changed, whatever the source and the number of workers. Of several processes, each gets its
    part of every batch of ``batch_size``.

    A file that can no longer be read raises a UserError.
    """

    def __init__(self, fetch: Fetch, indices: Tensor, batch_size: int, seed: int | None = None):
        check_whole("batch size", batch_size, 1)
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
    """Training and validation images and what is known of them; built by `dnas.training.data.load_data`."""

    name: str
    num_classes: int
    in_chans: int
    img_size: ImgSize
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    num_train: int
    num_val: int
    summary: Mapping[str, Any] = field(repr=False, compare=False)  # see `dnas.training.data_summary.summarize`
    _labels: Tensor = field(repr=False, compare=False)  # of the train images, int64 [num_train], on the CPU
    _train: Fetch = field(repr=False, compare=False)
    _val: Fetch = field(repr=False, compare=False)
    own_loss: OwnLoss | None = field(default=None, repr=False, compare=False)  # then there are no classes
    crop_pct: float = 1.0  # of a validation image that covers img_size / crop_pct, in its middle

    @property
    def class_counts(self) -> Tensor:
        """How many training images each class has, int64 [num_classes], on the CPU."""
        return self._labels.bincount(minlength=self.num_classes)

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
        return self.part(self.split(count / self.num_train, seed=0)[1])

    def part(self, indices: Tensor) -> "Data":
        """The same data with only the train images at ``indices`` (int64 [N])."""
        fetch: Fetch = lambda order, dice, size: self._train(indices[order], dice, size)  # noqa: E731
        return replace(self, num_train=len(indices), _labels=self._labels[indices], _train=fetch)

    def train_batches(self, batch_size: int, *, seed: int, indices: Tensor | None = None) -> Batches:
        """Shuffled, augmented batches of the train images, or of those at ``indices`` (int64 [N])."""
        indices = torch.arange(self.num_train) if indices is None else indices.cpu()
        return Batches(self._train, indices, batch_size, seed)

    def val_batches(self, batch_size: int) -> Batches:
        """All validation images once, in their fixed order, without augmentation; of several processes, each a part."""
        return Batches(self._val, torch.arange(rank(), self.num_val, world_size()), batch_size)


def in_memory(
    name: str, train: Pair, val: Pair, names: tuple[str, ...], img_size: ImgSize | None, in_chans: int,
    device: str | torch.device, *, flip: bool, **about: Any
) -> Data:  # fmt: skip
    """`Data` of images uint8 [N, 1 or 3, H, W] with labels int64 [N]; ``img_size`` None: not resized.

    ``about``: what `summarize` is to know of the files that they come from.
    """
    images = fit(train[0], img_size, in_chans)
    # Mean and std from the histogram: exact, and without a float copy of the images.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    centre = share @ level
    spread = (share @ level**2 - centre**2).clamp(min=1 / 255**2).sqrt()  # all-blank images have none to divide by
    mean, std = (tuple(round(v, 4) for v in values.tolist()) for values in (centre, spread))
    norm = torch.tensor([mean, std], device=device).mul(255)[..., None, None]  # [2, C, 1, 1]
    fetch = partial(_from_memory, images.to(device), train[1].to(device), norm, flip)
    fetch_val = partial(_from_memory, fit(val[0], img_size, in_chans).to(device), val[1].to(device), norm, flip)
    size, sizes = as_size(images.shape[-2:]), (len(train[1]), len(val[1]))
    about.setdefault("digest", digest_of([*names, *(t.numpy().tobytes() for t in (*train, *val))]))
    summary = summarize(names, train[1], val[1], img_size=size, **about)
    return Data(name, len(names), in_chans, size, mean, std, names, *sizes, summary, train[1], fetch, fetch_val)


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
    """Crop images [B, C, H, W] out of a zero margin of an eighth, and mirror half: ``dice`` int64 [B] decides."""
    height, width = images.shape[-2:]
    rows, columns = 2 * (height // 8) + 1, 2 * (width // 8) + 1
    margin = (width // 8, width // 8, height // 8, height // 8)
    windows = F.pad(images, margin).unfold(2, height, 1).unfold(3, width, 1)  # view [B, C, rows, columns, H, W]
    images = windows[torch.arange(len(dice), device=dice.device), :, dice % rows, dice // rows % columns]
    mirrored = (dice // (rows * columns) % 2 == 1)[:, None, None, None]
    return torch.where(mirrored, images.flip(3), images) if flip else images


def fit(images: Tensor, img_size: ImgSize | None, in_chans: int) -> Tensor:
    """Images [N, 1 or 3, H, W] with ``in_chans`` channels, resized and centre-cropped to ``img_size`` if given.

    They keep their shape: they are resized until they cover the size, and what sticks out is cropped.
    """
    if images.shape[1] != in_chans:
        images = images.expand(-1, 3, -1, -1) if in_chans == 3 else TF.rgb_to_grayscale(images)
    if img_size and tuple(images.shape[-2:]) != sides(img_size):
        images = TF.center_crop(
            TF.resize(images, covering(images.shape[-2:], img_size), antialias=True), sides(img_size)
        )
    return images.contiguous()


def covering(shape: Sequence[int], img_size: ImgSize) -> list[int]:
    """The smallest (height, width) with the proportions of ``shape`` that covers ``img_size``, rounded down."""
    (height, width), (to_height, to_width) = shape, sides(img_size)
    if height * to_width <= width * to_height:  # the height is what is short
        return [to_height, max(to_width, int(to_height * width / height))]
    return [max(to_height, int(to_width * height / width)), to_width]


def check_whole(what: str, value: object, least: int) -> None:
    """Raise UserError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{what} {value!r} must be a whole number of at least {least}")


def _generator(*key: object) -> torch.Generator:
    """A generator of its own for ``key``; neighbouring seeds and epochs have nothing in common."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
