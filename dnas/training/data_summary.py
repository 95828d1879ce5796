"""What the data is, before anything is trained on it: for the terminal, config.json and the report."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from PIL import Image
from torch import Tensor

from dnas.spec.image_size import ImgSize, sides, size_text
from dnas.training.image_files import ODD, READ, Look, counted

FEW = 10  # training images of a class: with fewer, a warning
CROP = 1 / 3  # of an image: where the centre crop leaves out more, a warning


@dataclass
class Met:
    """What the images of a split are, counted: sizes (height, width), modes of Pillow, what is odd."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    odd: Counter[str] = field(default_factory=Counter)
    digests: list[tuple[bytes, str]] = field(default_factory=list)  # of a file's bytes, and its class

    def add(self, look: Look, label: str) -> None:
        """Count one image of a class."""
        self.sizes[look.size] += 1
        self.modes[look.mode] += 1
        self.odd.update(look.odd)
        if look.digest:
            self.digests.append((look.digest, label))


def summarize(
    names: Sequence[str], labels: Tensor, val_labels: Tensor, digest: str, img_size: ImgSize, *,
    files: tuple[Met, Met] | None = None, left_out: Mapping[str, int] | None = None
) -> dict[str, Any]:  # fmt: skip
    """The summary, as in config.json: counts, sizes and modes met, files left out, a digest, and ``warnings``.

    Args:
        labels, val_labels: int64 [N], of the training and the validation images.
        digest: of whatever tells these data from others.
        files: what the files of both splits are, where there are files.
    """
    counts = {
        split: of.bincount(minlength=len(names)).tolist()
        for split, of in (("train", labels), ("validation", val_labels))
    }
    most = max(range(len(names)), key=lambda k: counts["validation"][k])
    summary: dict[str, Any] = {
        "classes": len(names),
        **{
            split: {"images": sum(n), "least": min(n), "median": median(n), "most": max(n)}
            for split, n in counts.items()
        },
        "largest_class": {"name": names[most], "share": counts["validation"][most] / max(1, len(val_labels))},
        "digest": digest,
    }
    met = Met()
    for part in files or ():
        for name in ("sizes", "modes", "odd"):
            getattr(met, name).update(getattr(part, name))
    if met.sizes:
        summary["sizes"] = {f"{height}x{width}": n for (height, width), n in met.sizes.most_common(5)}
        summary["other_sizes"] = len(met.sizes) - len(summary["sizes"])
        summary["modes"] = dict(met.modes.most_common())
    summary["left_out"] = dict(left_out or {})
    few = [f"{names[k]!r} {n}" for k, n in enumerate(counts["train"]) if n < FEW]
    warnings = [*_of_shares(summary), *_of_files(met, img_size), *_of_left_out(summary["left_out"])]
    if few:
        more = f" and {len(few) - 3} more" if len(few) > 3 else ""
        warnings.append(f"classes with fewer than {FEW} training images: {', '.join(few[:3])}{more}")
    if files:
        warnings += _of_copies(files[0].digests, files[1].digests)
    return summary | {"warnings": warnings}


def _of_shares(summary: Mapping[str, Any]) -> list[str]:
    share, name = summary["largest_class"]["share"], summary["largest_class"]["name"]
    if share <= max(0.5, 1.5 / summary["classes"]):
        return []
    return [f"the class {name!r} has {100 * share:.2f} % of the validation images: always to answer it is as accurate"]


def _of_files(met: Met, img_size: ImgSize) -> list[str]:
    total = sum(met.sizes.values())
    found = [f"{n} of {total} images {ODD[what]}" for what, n in met.odd.items()]
    lost = {size: _cropped(size, img_size) for size in met.sizes}
    cut = sum(n for size, n in met.sizes.items() if lost[size] > CROP)
    if cut > total / 10:
        size = max((size for size in lost if lost[size] > CROP), key=lambda size: met.sizes[size])
        text = f"the crop to {size_text(img_size)} leaves out {100 * lost[size]:.0f} % of an image of {size_text(size)}"
        found.append(f"{text}, and over a third of {cut} of {total} images: --img-size HEIGHT WIDTH fits its shape")
    return found


def _cropped(size: tuple[int, int], img_size: ImgSize) -> float:
    """The share of an image that is lost: it is scaled until it covers the other size, and cropped in its centre."""
    (height, width), (to_height, to_width) = size, sides(img_size)
    scale = min(height / to_height, width / to_width)
    return 1 - scale**2 * to_height * to_width / (height * width)


def _of_left_out(left_out: Mapping[str, int]) -> list[str]:
    known = Image.registered_extensions()
    images = {suffix: n for suffix, n in left_out.items() if suffix in known}
    return [f"image files are left out: {counted(images)} (read are {' '.join(READ)})"] if images else []


def _of_copies(train: Sequence[tuple[bytes, str]], val: Sequence[tuple[bytes, str]]) -> list[str]:
    known, classes = {digest for digest, _ in train}, dict[bytes, set[str]]()
    copies = sum(digest in known for digest, _ in val)
    for digest, label in (*train, *val):
        classes.setdefault(digest, set()).add(label)
    found = []
    if copies:
        found.append(f"{copies} of {len(val)} validation images are training images, too: accuracy is overstated")
    if twice := sum(len(labels) > 1 for labels in classes.values()):
        found.append(f"{twice} image{'s are' if twice > 1 else ' is'} in more than one class")
    return found


def digest_of(parts: Iterable[bytes | str]) -> str:
    """A SHA-256 of these parts in order, as hexadecimal digits."""
    whole = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        whole.update(len(content).to_bytes(8, "big") + content)
    return whole.hexdigest()


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary in short lines, without its warnings."""
    if not summary["classes"]:  # a program has a loss of its own
        return [f"{summary['train']['images']} training inputs, {summary['validation']['images']} validation inputs"]
    parts = [
        f"{part['images']} {word} images"
        f" (by class: least {part['least']}, median {part['median']:g}, most {part['most']})"
        for part, word in ((summary["train"], "training"), (summary["validation"], "validation"))
    ]
    largest = summary["largest_class"]
    lines = [
        f"{summary['classes']} classes; {'; '.join(parts)};"
        f" largest class {largest['name']!r}, {100 * largest['share']:.1f} % of the validation images"
    ]
    if "sizes" in summary:
        others = f" and {summary['other_sizes']} other sizes" if summary["other_sizes"] else ""
        sizes = ", ".join(f"{n} of {size}" for size, n in summary["sizes"].items())
        lines.append(f"files: {sizes}{others} px; modes: {counted(summary['modes'])}")
    if summary["left_out"]:
        lines.append(f"left out: {counted(summary['left_out'])}")
    return lines


def difference(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[Sequence[str]]) -> str:
    """How the data of two summaries differ, in words; empty if they are the same. ``names``: class names of both."""
    if before["digest"] == now["digest"]:
        return ""
    odd = sorted({*names[0]} ^ {*names[1]})
    if odd:
        return f"class {odd[0]!r} was {'there, and is gone' if odd[0] in names[0] else 'not there'}"
    changed = [
        f"{before[split]['images']} {split} images are now {now[split]['images']}"
        for split in ("train", "validation")
        if before[split]["images"] != now[split]["images"]
    ]
    return ", ".join(changed) or "names, sizes or labels of the images have changed"
