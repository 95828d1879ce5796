"""A found network out of dnas: checked, counted, and written as a plain timm model with its ``arch.json``.

A network is data (`NET`). Whatever goes into ``model.py`` is validated first and written by ``repr`` of numbers,
booleans and known words: an arch file is data, it never becomes code.
"""

import builtins
import inspect
import json
import keyword
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from fvcore.nn import FlopCountAnalysis
from timm.models import clean_state_dict, is_model, model_entrypoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dnas import native
from dnas.runs import write_whole
from dnas.units import UserError

Floats = Sequence[float]

# What is allowed, as data for `_check`: a dict has exactly these keys; a list is [entry, how many]; a range holds whole
# numbers and a tuple known values; `str` is a short line of text, `float` any finite number, `dict` any plain dict.
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
NET = {
    "act": tuple(native.ACTS),
    "stem": {"width": WIDTH, "stride": (1, 2)},
    "stages": [[ROW, range(1, 65)], range(1, 65)],
    "head": WIDTH,
}
# What the network sees and says: img_size in pixels; mean and std of pixels in [0, 1], one a channel.
SIZES = {"img_size": range(1, 8_193), "in_chans": CHANNELS, "num_classes": range(1, 1_000_001)}
DATA: dict[str, Any] = {**SIZES, "mean": [float, CHANNELS], "std": [float, CHANNELS]}
BUDGET = [{"metric": str, "limit": float, "reached": float}, range(17)]
ARCH = {"schema": (SCHEMA,), "name": str, "supernet": str, **DATA, "answers": dict, "net": NET, "widths": dict}
ARCH |= {"macs": COUNT, "params": COUNT, "budget": BUDGET, "provenance": dict}


def _fail(where: str, value: object, allowed: str) -> NoReturn:
    try:
        shown = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of thousands of digits
        shown = "a huge number"
    raise UserError(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}: it must be {allowed}")


def _check(where: str, value: Any, allowed: Any) -> None:
    """Raise UserError, naming the entry, unless ``value`` is ``allowed``; types are exact, so that True is no 1."""
    kind, parts = type(value), []
    if isinstance(allowed, dict):
        ok, text = kind is dict and value.keys() == allowed.keys(), f"a dict with the keys {', '.join(allowed)}"
        if kind is dict and not ok:
            odd = ", ".join(sorted(map(repr, value.keys() ^ allowed.keys())))[:80]
            raise UserError(f"{where} has missing or unknown keys, {odd}: it must be {text}")
        parts = [(f"{where}.{key}", key, entry) for key, entry in allowed.items()]
    elif isinstance(allowed, list):
        entry, sizes = allowed
        ok, text = kind is list and len(value) in sizes, f"a list of {sizes[0]} to {sizes[-1]} entries"
        parts = [(f"{where}[{i}]", i, entry) for i in range(len(value) if ok else 0)]
    elif isinstance(allowed, range):
        ok, text = kind is int and value in allowed, f"a whole number from {allowed[0]} to {allowed[-1]}"
    elif isinstance(allowed, tuple):
        ok = any(kind is type(known) and value == known for known in allowed)
        text = f"one of {', '.join(map(str, allowed))}"
    elif allowed is str:
        ok, text = kind is str and 1 <= len(value) <= 128 and value.isprintable(), "1 to 128 printable characters"
    elif allowed is float:
        ok, text = kind in (int, float) and abs(value) < math.inf, "a finite number"
    else:
        ok, text = kind is allowed, f"a {allowed.__name__}"
    if not ok:
        _fail(where, value, text)
    for name, key, entry in parts:
        _check(name, value[key], entry)


def check_net(net: Any) -> None:
    """Raise UserError, naming the entry, unless ``net`` follows `NET` and can be built exactly as it says."""
    _check("net", net, NET)
    width = net["stem"]["width"]
    for i, rows in enumerate(net["stages"]):
        for j, row in enumerate(rows):
            where = f"net.stages[{i}][{j}]"
            if row["kind"] == "ds" and row["mid"] != width:
                _fail(f"{where}.mid", row["mid"], f"the input width {width}, for kind ds has no expansion")
            if row["stride"] == 2 and j > 0:
                _fail(f"{where}.stride", 2, "1, for only the first block of a stage may have stride 2")
            if row["skip"] and (row["stride"] == 2 or row["out"] != width):
                _fail(f"{where}.skip", True, f"False, for stride is not 1 or out is not the input width {width}")
            width = row["out"]


def check_name(name: Any) -> None:
    """Raise UserError unless ``name`` can name the entry point in ``model.py`` and is no model of timm's own."""
    if type(name) is not str or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        _fail("name", name, "1 to 64 of a-z, 0-9 and _, a letter first")
    taken = {*dir(builtins), *dir(native), "default_cfgs", "generate_default_cfgs", "register_model"}
    if keyword.iskeyword(name) or name in taken:
        _fail("name", name, "no word that Python or model.py itself uses")
    # A network of ours may be exported again: its entry point has NET beside it.
    if is_model(name) and "NET" not in getattr(model_entrypoint(name), "__globals__", {}):
        _fail("name", name, "no model that timm already has")


def _data(num_classes: int, in_chans: int, img_size: int, mean: Floats, std: Floats) -> dict[str, Any]:
    """These five as a dict that follows `DATA`. Raises UserError otherwise."""
    data: dict[str, Any] = dict(zip(DATA, (img_size, in_chans, num_classes, [*mean], [*std]), strict=True))
    _check("arch", data, DATA)
    for key in ("mean", "std"):
        if len(data[key]) != in_chans:
            _fail(f"arch.{key}", data[key], f"{in_chans} numbers, one a channel")
    if min(std) <= 0:
        _fail("arch.std", data["std"], "above 0")
    return data


def check_document(document: Any) -> None:
    """Raise UserError unless ``document`` follows `ARCH` and its figures are those of its net, built anew."""
    _check("arch", document, ARCH)
    check_name(document["name"])
    _data(**{key: document[key] for key in DATA})
    for decision, option in document["answers"].items():
        _check(f"arch.answers[{decision!r}]", option, int if type(option) is int else str)
    for key, value in _counts(document["net"], document).items():
        if json.dumps(document[key]) != json.dumps(value):
            _fail(f"arch.{key}", document[key], "that of the net, built anew" + f": {value}" * (key != "widths"))
    for i, row in enumerate(document["budget"]):
        if row["reached"] != document.get(row["metric"], row["reached"]):
            _fail(f"arch.budget[{i}].reached", row["reached"], f"the {row['metric']} of the net")


def build_net(
    net: dict[str, Any], *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, drop_path_rate: float = 0.0
) -> nn.Module:
    """The timm `EfficientNet` of ``net``, freshly initialised. Raises UserError where ``net`` is wrong."""
    check_net(net)
    cfg: dict[str, Any] = {"num_classes": num_classes, "input_size": (in_chans, 224, 224)}
    cfg |= {"first_conv": "conv_stem", "classifier": "classifier"}
    return native.build(net, "dnas", pretrained_cfg=cfg, drop_rate=drop_rate, drop_path_rate=drop_path_rate)


@contextmanager
def _one_image(model: nn.Module, in_chans: int, img_size: int) -> Iterator[torch.Tensor]:
    """A zero image (1, in_chans, img_size, img_size) for the model, which is in eval mode meanwhile."""
    like = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield torch.zeros(1, in_chans, img_size, img_size, device=like.device, dtype=like.dtype)
    finally:
        for module, mode in modes.items():  # one by one: a frozen batch norm in a training model stays frozen
            module.training = mode


def count_macs(model: nn.Module, in_chans: int, img_size: int) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image, counted by fvcore."""
    with _one_image(model, in_chans, img_size) as x:
        analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).tracer_warnings("none")
        by_operator = analysis.uncalled_modules_warnings(False).by_operator()
    return int(by_operator["conv"] + by_operator["linear"])  # fvcore's total has batch norm and pooling in it, too


def count_macs_torch(model: nn.Module, in_chans: int, img_size: int) -> int:
    """The same by torch's own counter, which counts 2 for a MAC; works on the meta device, too."""
    with _one_image(model, in_chans, img_size) as x, FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops()) // 2


def count_params(model: nn.Module) -> int:
    """Number of parameters; the statistics of batch norm are none."""
    return sum(p.numel() for p in model.parameters())


def _counts(net: dict[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """``{"widths": {module: [in, out]}, "macs", "params"}`` of ``net``; raises UserError where it is wrong."""
    check_net(net)
    with torch.device("meta"):  # takes no memory, whatever an arch file from elsewhere asks for
        model = native.network(net, num_classes=data["num_classes"], in_chans=data["in_chans"])
    modules = dict(model.named_modules())
    widths = {name: [m.in_channels, m.out_channels] for name, m in modules.items() if isinstance(m, nn.Conv2d)}
    widths |= {name: [m.in_features, m.out_features] for name, m in modules.items() if isinstance(m, nn.Linear)}
    macs = count_macs_torch(model, data["in_chans"], data["img_size"])
    return {"widths": widths, "macs": macs, "params": count_params(model)}


_SOURCE = '''"""{name}: a network found by dnas, as a plain timm model. Needs torch and timm, not dnas.

    import timm
    import model  # this file, which tells timm the name
    net = timm.create_model("{name}", pretrained=True)  # weights: model.safetensors beside this file
    net = timm.create_model("{name}", num_classes=7, in_chans=1, features_only=True)

Found for images of {in_chans} x {img_size} x {img_size} and {num_classes} classes. To change the network, change NET.
"""

from pathlib import Path

from timm.models import generate_default_cfgs, register_model

# From here to NET: dnas/native.py as it stands.
{native}


# One row a block: kind (ds depthwise separable, ir inverted residual, er fused), hidden and output width,
# se = squeeze width (0: none), skip = shortcut. Widths are in channels.
NET = {net}

WEIGHTS = Path(__file__).resolve().with_name("model.safetensors")

CFG = {cfg}
default_cfgs = generate_default_cfgs({{"{name}": {{**CFG, "file": str(WEIGHTS) if WEIGHTS.is_file() else None}}}})


@register_model
def {name}(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network in NET; kwargs are those of any timm entry point."""
    return build(NET, "{name}", pretrained, **kwargs)
'''


def model_source(
    name: str, net: dict[str, Any], *, num_classes: int, in_chans: int, img_size: int, mean: Floats, std: Floats
) -> str:
    """The text of a ``model.py`` that registers ``net`` with timm as ``name``, and needs torch and timm only.

    Raises UserError where anything that would go into the text is not what it should be.
    """
    check_name(name)
    check_net(net)
    data = _data(num_classes, in_chans, img_size, mean, std)
    strides = [net["stem"]["stride"], *(rows[0]["stride"] for rows in net["stages"])]
    last = -(-img_size // math.prod(strides))  # every stride halves and rounds up
    crop_pct = 0.875 if img_size >= 96 else 1.0  # small images come at their final size: nothing to crop
    cfg: dict[str, Any] = {"input_size": (in_chans, img_size, img_size), "pool_size": (last, last)}
    cfg |= {key: tuple(map(float, data[key])) for key in ("mean", "std")} | {"num_classes": num_classes}
    cfg |= {"interpolation": "bicubic", "crop_pct": crop_pct, "first_conv": "conv_stem", "classifier": "classifier"}
    body = inspect.getsource(native).split('"""\n', 1)[1].strip()  # without its docstring
    # Numbers, booleans and known words have no quotes inside.
    net_text, cfg_text = (_pretty(part, repr).replace("'", '"') for part in (net, cfg))
    return _SOURCE.format(name=name, native=body, net=net_text, cfg=cfg_text, **data)


def _pretty(value: Any, write: Callable[[Any], str], indent: int = 0) -> str:
    """``write(value)``, which is JSON or Python, broken into one entry a line where it does not fit on one."""
    line = write(value)
    if not isinstance(value, (dict, list)) or indent + len(line) <= 110:
        return line
    if isinstance(value, dict):
        parts = [f"{write(key)}: {_pretty(entry, write, indent + 4)}" for key, entry in value.items()]
    else:
        parts = [_pretty(entry, write, indent + 4) for entry in value]
    pad = "\n" + " " * indent
    return line[0] + ",".join(f"{pad}    {part}" for part in parts) + pad + line[-1]


def arch_document(
    name: str,
    net: dict[str, Any],
    data: Mapping[str, Any],
    *,
    supernet: str,
    answers: Mapping[str, int | str],
    budget: Sequence[Mapping[str, Any]] = (),
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``arch.json`` (`ARCH`), with the widths, MACs and parameters of the net as built.

    ``data`` holds the keywords of `model_source`, ``budget`` rows ``{"metric", "limit", "reached"}``. Raises UserError
    where something is not what it should be.
    """
    data = _data(**data)
    document = {"schema": SCHEMA, "name": name, "supernet": supernet, **data, "answers": dict(answers), "net": net}
    document |= {**_counts(net, data), "budget": [*map(dict, budget)], "provenance": dict(provenance or {})}
    document = _parse(_dump(document).encode(), "arch document")  # a copy, of JSON's own types
    check_document(document)
    return document


def write_export(folder: str | Path, document: dict[str, Any]) -> None:
    """Write ``model.py`` and ``arch.json``, each whole or not at all; nothing (UserError) if ``document`` is wrong."""
    text = (_dump(document) + "\n").encode()
    document = _parse(text, "arch document")
    check_document(document)
    source = model_source(document["name"], document["net"], **{key: document[key] for key in DATA})
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder) / "model.py", source.encode())
    write_whole(Path(folder) / "arch.json", text)  # last: where it is, the export is complete


def read_arch(path: str | Path) -> dict[str, Any]:
    """The document in an ``arch.json``, whoever wrote it. Raises UserError if anything is wrong with it."""
    try:
        with open(path, "rb") as file:
            document = _parse(file.read(MAX_BYTES + 1), "the content")
        check_document(document)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return document


def save_weights(model: nn.Module, folder: str | Path) -> None:
    """Write the model's state to ``model.safetensors`` in ``folder``, whole or not at all."""
    state = clean_state_dict(model.state_dict())  # without the prefixes of DDP and torch.compile
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_whole(Path(folder) / "model.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))


def _dump(value: Any) -> str:
    try:
        return _pretty(value, partial(json.dumps, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"arch document cannot be written as JSON: {error}") from None


def _parse(content: bytes, what: str) -> Any:
    """``content`` as JSON; UserError if it is too long, something else, or has NaN or infinity (1e999) in it."""
    if len(content) > MAX_BYTES:
        raise UserError(f"{what} is too large: at most {MAX_BYTES} bytes are allowed")
    try:
        value = json.loads(content)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not strict JSON: {str(error).splitlines()[0]}") from None
    return value


_CHILD = """
import json, os, sys
sys.modules.update(dnas=None, supernets=None)  # to import them is now an error, wherever they are installed
sys.path.insert(0, os.getcwd())
import model, timm, torch
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)
weights, img_size = os.path.isfile("model.safetensors"), int(sys.argv[3])
net = timm.create_model(sys.argv[1], pretrained=weights).eval()
x = torch.zeros(1, int(sys.argv[2]), img_size, img_size)
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    found = {"outputs": list(net(x).shape), "params": sum(p.numel() for p in net.parameters())}
found.update(macs=counter.get_total_flops() // 2, counted_by="torch")
try:
    from fvcore.nn import FlopCountAnalysis
    ops = FlopCountAnalysis(net, x).unsupported_ops_warnings(False).tracer_warnings("none").by_operator()
    found.update(macs=int(ops["conv"] + ops["linear"]), counted_by="fvcore")
except ImportError:
    pass
found["packages"] = sorted({type(m).__module__.partition(".")[0] for m in net.modules()})
print(json.dumps({**found, "weights": weights, "torch": torch.__version__, "timm": timm.__version__}))
"""


def verify_export(folder: str | Path) -> dict[str, Any]:
    """Build the ``model.py`` in ``folder`` in a fresh process where dnas cannot be imported, and count.

    Loads the weights if they are there. Returns ``macs, params, outputs`` (shape for one image), ``packages`` (where
    the modules come from), ``counted_by, weights, torch, timm``. Raises UserError if ``arch.json`` is wrong,
    RuntimeError if the model does not build, is not as ``arch.json`` says, or has parts not from torch and timm.
    """
    folder = Path(folder)
    document = read_arch(folder / "arch.json")
    with tempfile.TemporaryDirectory() as copy:
        for file in ("model.py", "model.safetensors"):
            if (folder / file).is_file():
                shutil.copy(folder / file, copy)
        command = [sys.executable, "-I", "-B", "-W", "ignore", "-c", _CHILD]
        command += [str(document[key]) for key in ("name", "in_chans", "img_size")]
        child = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{folder / 'model.py'} does not work without dnas: {reason}")
    figures = json.loads(child.stdout.splitlines()[-1])
    expected = {"macs": document["macs"], "params": document["params"], "packages": ["timm", "torch"]}
    for key, value in {**expected, "outputs": [1, document["num_classes"]]}.items():
        if figures[key] != value:
            raise RuntimeError(f"{folder / 'model.py'} has {key} {figures[key]}, not {value}")
    return figures
