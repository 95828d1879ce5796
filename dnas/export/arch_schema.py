"""The schema of ``arch.json`` and of the network in it. Only entries that are listed here can reach ``model.py``."""

import builtins
import keyword
import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import is_model, model_entrypoint

from dnas.export import narrowed, native
from dnas.nets.channels import is_inside
from dnas.nets.timm_space import BUILD_ERRORS, check_kwargs, is_timms_own
from dnas.spec.checks import UserError, check, fail, first_line
from dnas.spec.image_size import check_sides, plain_size

Floats = Sequence[float]

SCHEMA = 1
MAX_BYTES = 1_000_000
WIDTH, CHANNELS, COUNT = range(1, 16_385), range(1, 1_025), range(1, 2**63)
ROW = {  # one block; ds = depthwise separable (mid: its input width), ir = inverted residual, er = fused
    "kind": ("ds", "ir", "er"),
    "kernel": (1, 3, 5, 7),
    "stride": (1, 2),  # 2 only in the first block of a stage
    "mid": WIDTH,
    "out": WIDTH,
    "se": range(16_385),  # squeeze width in channels; 0: none
    "skip": (True, False),
}
NATIVE = {
    "act": tuple(native.ACTS),
    "stem": {"width": WIDTH, "stride": (1, 2)},
    "stages": [[ROW, range(1, 65)], range(1, 65)],
    "head": WIDTH,
}
NARROWED = {"base": str, "kwargs": dict, "features": [WIDTH, range(1, 65)], "modules": dict}  # see dnas.export.narrowed
GIVEN = {"name": str}  # of a network of the user's own that a program gave
OF_FILE = {**GIVEN, "file": str, "function": str, "sha256": str}
# Inputs and outputs of the network: img_size in pixels, one side of a square or [height, width]; mean and std of pixels
# in [0, 1], one for each channel.
SIZES = {"img_size": check_sides, "in_chans": CHANNELS, "num_classes": range(1, 1_000_001)}
DATA: dict[str, Any] = {**SIZES, "mean": [float, CHANNELS], "std": [float, CHANNELS], "crop_pct": float}
BUDGET = [{"metric": str, "limit": float, "reached": float}, range(17)]
ARCH = {"schema": (SCHEMA,), "name": str, "supernet": str, **DATA, "answers": dict, "net": dict, "widths": dict}
ARCH |= {"macs": COUNT, "params": COUNT, "budget": BUDGET, "provenance": dict}


def _rules(rules: dict[str, Any], net: Any) -> dict[str, Any]:
    """The rules of a network in which residual blocks may be ``dropped``."""
    return rules | ({"dropped": [str, range(1, 1025)]} if isinstance(net, dict) and "dropped" in net else {})


def check_net(net: Any) -> None:
    """Raise UserError unless ``net`` follows `NATIVE` or `NARROWED` and can be built as it says, or is a user's own.

    The error names the entry.
    """
    if isinstance(net, dict) and "own" in net:
        _check_own(net)
    elif isinstance(net, dict) and "base" in net:
        _check_narrowed(net)
    else:
        _check_native(net)


def _check_narrowed(net: dict[str, Any]) -> None:
    check("net", net, _rules(NARROWED, net))
    base = net["base"]
    if not is_timms_own(base):
        fail("net.base", base, "a model of timm's own")
    try:
        check_kwargs(net["kwargs"])
    except UserError as error:
        raise UserError(f"net.kwargs: {error}") from None
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(
                base, num_classes=1000, **net["kwargs"]
            )  # some have no classifier by default
    except BUILD_ERRORS as error:
        fail("net.kwargs", net["kwargs"], f"arguments of {base} ({first_line(error)[:80]})")
    if len(net["features"]) != len(model.feature_info):
        fail("net.features", net["features"], f"{len(model.feature_info)} widths, one a feature level of {base}")
    modules = dict(model.named_modules())
    for path in net.get("dropped", []):
        if not path or path not in modules:
            fail("net.dropped", path, f"modules of {base}")
        modules = {name: m for name, m in modules.items() if not is_inside(name, path)}
    for path, sizes in net["modules"].items():
        if path not in modules:
            fail("net.modules", path, f"modules of {base}" + " that are not dropped" * ("dropped" in net))
        check(f"net.modules[{path!r}]", sizes, dict)
        for name, size in sizes.items():
            where = f"net.modules[{path!r}][{name!r}]"
            value = getattr(modules[path], name, None) if name.isidentifier() and name[0] != "_" else None
            if isinstance(value, torch.Tensor):
                value = value.shape
            if type(value) is float:
                check(where, size, float)
            elif type(value) is int and value > 0:
                check(where, size, range(1, value + 1))
            elif isinstance(value, (list, tuple)) and all(type(v) is int and v > 0 for v in value):
                if type(size) is not list or len(size) != len(value):
                    fail(where, size, f"a list of {len(value)} entries")
                for k, (n, v) in enumerate(zip(size, value, strict=True)):
                    check(f"{where}[{k}]", n, (None,) if n is None else range(1, v + 1))
            else:
                fail(where, size, f"left out: {base} has no tensor or number of this name there")


def _check_own(net: Any) -> None:
    """Raise UserError unless ``net`` is plain data of a network of the user's own.

    Only the code of the network can tell whether its sizes fit.
    """
    own = net["own"]
    made_by = OF_FILE if isinstance(own, dict) and "file" in own else GIVEN
    check("net", net, _rules({"own": made_by, "modules": dict}, net))
    for key, pattern in (("file", r"[A-Za-z_]\w{0,63}\.py"), ("function", r"[A-Za-z_]\w{0,63}")):
        if key in own and not re.fullmatch(pattern, own[key], re.ASCII):
            fail(f"net.own.{key}", own[key], "FILE.py" if key == "file" else "the name of a function")
    for key, path in [*(("modules", p) for p in net["modules"]), *(("dropped", p) for p in net.get("dropped", []))]:
        if not re.fullmatch(r"[\w.-]{0,512}", path, re.ASCII):
            fail(f"net.{key}", path, "names of modules")
    for path, sizes in net["modules"].items():
        check(f"net.modules[{path!r}]", sizes, dict)
        for name, size in sizes.items():
            entries = size if type(size) is list else [size]
            if not (
                re.fullmatch(r"_?[A-Za-z]\w*", name, re.ASCII)  # no dunder
                and all(type(n) in (int, float, type(None)) for n in entries)
            ):
                fail(f"net.modules[{path!r}]", {name: size}, "the name of a tensor or number, and its sizes")


def _check_native(net: Any) -> None:
    check("net", net, NATIVE)
    width = net["stem"]["width"]
    for i, rows in enumerate(net["stages"]):
        for j, row in enumerate(rows):
            where = f"net.stages[{i}][{j}]"
            if row["kind"] == "ds" and row["mid"] != width:
                fail(f"{where}.mid", row["mid"], f"the input width {width}, for kind ds has no expansion")
            if row["stride"] == 2 and j > 0:
                fail(f"{where}.stride", 2, "1, for only the first block of a stage may have stride 2")
            if row["skip"] and (row["stride"] == 2 or row["out"] != width):
                fail(f"{where}.skip", True, f"False, for stride is not 1 or out is not the input width {width}")
            width = row["out"]


def check_name(name: Any) -> None:
    """Raise UserError unless ``name`` can name the entry point in ``model.py`` and is no model of timm's own."""
    if type(name) is not str or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        fail("name", name, "1 to 64 of a-z, 0-9 and _, a letter first")
    taken = {*dir(builtins), *dir(native), *dir(narrowed), "default_cfgs", "generate_default_cfgs", "register_model"}
    if keyword.iskeyword(name) or name in taken:
        fail("name", name, "no word that Python or model.py itself uses")
    # A network that dnas exported may be exported again: the module of its entry point has a NET.
    if is_model(name) and "NET" not in getattr(model_entrypoint(name), "__globals__", {}):
        fail("name", name, "no model that timm already has")


def check_data(
    num_classes: int, in_chans: int, img_size: int | Sequence[int], mean: Floats, std: Floats, crop_pct: float = 1.0
) -> dict[str, Any]:
    """The arguments as a dict that follows `DATA`. Raises UserError if they do not follow it.

    ``crop_pct`` is timm's: the share of a resized validation image that is left by its crop. Older files lack it.
    """
    size = plain_size(check_sides(img_size))
    given = (size, in_chans, num_classes, [*mean], [*std], float(crop_pct))
    data: dict[str, Any] = dict(zip(DATA, given, strict=True))
    check("arch", data, DATA)
    if not 0 < crop_pct <= 1:
        fail("arch.crop_pct", crop_pct, "above 0, at most 1")
    for key in ("mean", "std"):
        if len(data[key]) != in_chans:
            fail(f"arch.{key}", data[key], f"{in_chans} numbers, one a channel")
    if min(std) <= 0:
        fail("arch.std", data["std"], "above 0")
    return data
