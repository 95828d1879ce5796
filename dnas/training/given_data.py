"""The images that a program has already, as `Data`: its own loaders, or a `Data` of another device."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from dnas.spec.checks import UserError
from dnas.spec.image_size import as_size
from dnas.training.batches import Data, Fetch, OwnLoss, Pair
from dnas.training.data_summary import digest_of, summarize

MOST_BYTES = 4 * 2**30  # of images of an iterable, which are kept in memory
PLAIN_SAMPLERS = (SequentialSampler, RandomSampler, DistributedSampler)  # which take every image


def data_of_loaders(
    train: Iterable[Pair], val: Iterable[Pair], device: str | torch.device = "cpu", own: OwnLoss | None = None
) -> Data:
    """`Data` of two iterables of batches (images float [B, C, H, W], labels int [B]), such as DataLoaders.

    Images are what the network is shown: augmented and normalised already. For a network of the user's own they may be
    anything else: signals [B, C, length], volumes [B, C, D, H, W], or rows of numbers [B, C]. Of a DataLoader the data
    set, the workers and ``collate_fn`` are used, with batches of the recipe's size; what is random in them draws from
    the global random numbers. Any other iterable is read once and kept in memory, as augmented as it comes.

    With a program's ``own`` loss, the second of a pair may be any tensor [B, ...]: then there are no classes.

    Raises:
        UserError: the batches are no such pairs, or too many to be kept; a loader has a sampler of its own.
    """
    device = torch.device(device)
    (fetch, labels, shape), (fetch_val, val_labels, val_shape) = (
        _from_dataset(loader, device, what, own is None)
        if _has_indices(loader)
        else _from_memory(loader, device, what, own is None)
        for loader, what in ((train, "training"), (val, "validation"))
    )
    if shape != val_shape:
        raise UserError(f"training images are {shape}, validation images {val_shape}: one shape is expected")
    channels, (mean, std) = shape[0], ((0.0,) * shape[0], (1.0,) * shape[0])
    sizes, size = (len(labels), len(val_labels)), as_size(shape[1:])
    if own:
        digest = digest_of([str(shape), *map(str, sizes)])
        summary = summarize(["none"], labels, val_labels, digest, size) | {"classes": 0, "warnings": []}
        about = ("given", 1, channels, size, mean, std, ("none",), *sizes, summary)
        return Data(*about, labels, fetch, fetch_val, own_loss=own)
    every = torch.cat([labels, val_labels])
    least, count = int(every.min()), 1 + int(every.max())
    names = tuple(map(str, getattr(getattr(train, "dataset", None), "classes", None) or range(count)))
    if count < 2 or len(names) < count or least < 0:
        raise UserError(f"labels from {least} to {count - 1}: at least 2 classes, from 0 on, are expected")
    digest = digest_of([*names, str(shape), *(t.numpy().tobytes() for t in (labels, val_labels))])
    summary = summarize(names, labels, val_labels, digest, size)
    return Data("given", len(names), channels, size, mean, std, names, *sizes, summary, labels, fetch, fetch_val)


def on_device(data: Data, device: str | torch.device) -> Data:
    """The same data, with batches that are moved to ``device``."""

    def moved(fetch: Fetch) -> Fetch:
        return lambda order, dice, size: ((x.to(device), y.to(device)) for x, y in fetch(order, dice, size))

    return replace(data, _train=moved(data._train), _val=moved(data._val))


Read = tuple[Fetch, Tensor, tuple[int, ...]]  # fetch, labels, shape of an image


def _check(batch: Any, what: str, classes: bool) -> Pair:
    """A batch as (images float32, labels int64; or targets as they are). Raises UserError if it is none."""
    ok = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)
    x, y = batch if ok else (torch.empty(0), torch.empty(0))
    if not (ok and 2 <= x.ndim <= 5 and x.is_floating_point() and (y.shape if classes else y.shape[:1]) == x.shape[:1]):
        found = " and ".join(f"{t.dtype} {list(t.shape)}" for t in (x, y)) if ok else type(batch).__name__
        raise UserError(
            f"a {what} batch is {found}: images float [B, C, H, W] (also [B, C], [B, C, L] or [B, C, D, H, W]) and "
            f"{'labels int [B]' if classes else 'targets [B, ...]'} are expected"
        )
    return x.float(), y.long() if classes else y


def _has_indices(loader: Any) -> TypeGuard[DataLoader]:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _from_memory(batches: Iterable[Pair], device: torch.device, what: str, classes: bool) -> Read:
    """All batches, read once."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    size = 0
    for batch in batches:
        x, y = _check(batch, what, classes)
        size += x.nbytes
        if size > MOST_BYTES or (images and x.shape[1:] != images[0].shape[1:]):
            allowed = f"at most {MOST_BYTES >> 30} GiB of one shape (a DataLoader of a data set is not read at once)"
            raise UserError(f"{what} batches of {list(x.shape[1:])}, {size >> 20} MiB so far: {allowed} are expected")
        images.append(x)
        labels.append(y)
    if not images:
        raise UserError(f"no {what} batch: at least one is expected")
    x, y = torch.cat(images).to(device), torch.cat(labels)
    labels_of = y.cpu() if classes else torch.zeros(len(y), dtype=torch.long)
    return partial(_slices, x, y.to(device)), labels_of, tuple(x.shape[1:])


def _slices(x: Tensor, y: Tensor, order: Tensor, dice: Tensor | None, batch_size: int) -> Iterator[Pair]:
    for index in order.to(x.device).split(batch_size):
        yield x[index], y[index]


def _from_dataset(loader: DataLoader, device: torch.device, what: str, classes: bool) -> Read:
    """A data set with indices, read whenever it is needed; once for its labels where it does not list them."""
    dataset: Any = loader.dataset
    if type(loader.batch_sampler) is not BatchSampler or not isinstance(loader.sampler, PLAIN_SAMPLERS):
        sampler = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
        raise UserError(
            f"the {what} loader has a {type(sampler).__name__}: one that takes every image is expected "
            "(torch.utils.data.Subset says which there are)"
        )
    if len(dataset) == 0:
        raise UserError(f"no {what} image: at least one is expected")
    order = torch.arange(len(dataset))
    x, y = _check(next(iter(_read(loader, order[:64], 64))), what, classes)
    if not classes:
        return partial(_batches, loader, device, what, False), torch.zeros_like(order), tuple(x.shape[1:])
    labels = torch.as_tensor(getattr(dataset, "targets", [])).long().cpu()
    if labels.shape != order.shape or not torch.equal(labels[: len(y)], y):  # it does not list what it returns
        labels = torch.cat([_check(batch, what, True)[1] for batch in _read(loader, order, 64)])
    return partial(_batches, loader, device, what, True), labels, tuple(x.shape[1:])


def _read(loader: DataLoader, order: Tensor, batch_size: int) -> DataLoader:
    """A loader of these images in this order, with the workers of ``loader``."""
    indices = [chunk.tolist() for chunk in order.split(batch_size)]
    how: dict[str, Any] = {
        name: getattr(loader, name)
        for name in ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "timeout", "multiprocessing_context")
    }
    return DataLoader(loader.dataset, batch_sampler=indices, **how)


def _batches(
    loader: DataLoader,
    device: torch.device,
    what: str,
    classes: bool,
    order: Tensor,
    dice: Tensor | None,
    batch_size: int,
) -> Iterator[Pair]:
    for batch in _read(loader, order, batch_size):
        x, y = _check(batch, what, classes)
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
