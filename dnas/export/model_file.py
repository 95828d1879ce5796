"""Export a found net: check it, count its costs, and write it as a plain timm model with its ``arch.json``.

A network is data (`dnas.export.arch_schema`). Everything that goes into ``model.py`` is validated first, and written by
``repr`` of numbers, booleans and known words. So an arch file is data and never becomes code.
"""

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from fvcore.nn import FlopCountAnalysis
from timm.models import clean_state_dict, get_pretrained_cfg
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from dnas.export import narrowed, native
from dnas.export.arch_schema import ARCH, DATA, MAX_BYTES, SCHEMA, Floats, check_data, check_name, check_net
from dnas.export.own_file import build_own, needed, own_source
from dnas.nets.own_base import Own
from dnas.nets.timm_supernet import measure
from dnas.nets.tracing import on_meta
from dnas.runtime.run_folder import write_whole
from dnas.spec.checks import UserError, check, fail, first_line, parse_json, read_json
from dnas.spec.image_size import ImgSize, sides, size_text, strided


def check_document(document: Any, own: Own | None = None) -> None:
    """Raise UserError unless ``document`` follows `ARCH` and its figures are those of its net, built again.

    A network of the user's own is only built if ``own`` is there, which runs its code.
    """
    old = isinstance(document, dict) and "crop_pct" not in document
    check("arch", document, {key: rule for key, rule in ARCH.items() if key != "crop_pct"} if old else ARCH)
    check_name(document["name"])
    check_data(**{key: document[key] for key in DATA if key in document})
    for decision, option in document["answers"].items():
        check(f"arch.answers[{decision!r}]", option, int if type(option) is int else str)
    counts = _counts(document["net"], document, own) if own or "own" not in document["net"] else {}
    for key, value in counts.items():
        if json.dumps(document[key]) != json.dumps(value):
            fail(f"arch.{key}", document[key], "that of the net, built anew" + f": {value}" * (key != "widths"))
    for i, row in enumerate(document["budget"]):
        if row["reached"] != document.get(row["metric"], row["reached"]):
            fail(f"arch.budget[{i}].reached", row["reached"], f"the {row['metric']} of the net")


def build_net(
    net: dict[str, Any],
    *,
    num_classes: int,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    own: Own | None = None,
) -> nn.Module:
    """The timm network of ``net``, or that which ``own`` makes, freshly initialised.

    Rates of 0 are not passed on, because not every network of timm's knows them. Raises UserError if ``net`` is wrong
    or the network does not take the rates.
    """
    check_net(net)
    if "own" in net:
        if drop_rate or drop_path_rate:
            raise UserError("--drop and --drop-path go with networks of timm's: one of your own has its own rates")
        return build_own(net, own)
    cfg: dict[str, Any] = {"num_classes": num_classes, "input_size": (in_chans, 224, 224), **_heads(net)}
    rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    rates = {name: rate for name, rate in rates.items() if rate}
    try:
        return _kind(net).build(net, "dnas", pretrained_cfg=cfg, **rates)
    except TypeError as error:
        raise UserError(f"the network does not take {', '.join(rates)}: {error}") from None


def _kind(net: dict[str, Any]) -> ModuleType:
    """The module whose text builds ``net``."""
    return narrowed if "base" in net else native


def _heads(net: dict[str, Any]) -> dict[str, Any]:
    """The names of the first convolution and of the classifier, for timm."""
    if "base" not in net:
        return {"first_conv": "conv_stem", "classifier": "classifier"}
    cfg = get_pretrained_cfg(net["base"])
    return {key: getattr(cfg, key, None) for key in ("first_conv", "classifier")}


@contextmanager
def _one_image(model: nn.Module, in_chans: int, img_size: ImgSize) -> Iterator[torch.Tensor]:
    """A zero image (1, in_chans, height, width) for the model. Inside the context the model is in eval mode."""
    like = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # torch's fused encoder layer, which no counter knows
        model.eval().requires_grad_(False)  # torch's counter fails on a view of a parameter (an expanded class token)
        with torch.no_grad():
            yield torch.zeros(1, in_chans, *sides(img_size), device=like.device, dtype=like.dtype)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():  # one by one: a frozen batch norm in a training model stays frozen
            module.training = mode
        for p in trained:
            p.requires_grad_()


# fvcore leaves out convolutions whose padding is a word, products added to a map, and other operators of attention.
LACKS = ("_convolution_mode", "baddbmm", "attention")
# What fvcore calls the operators with multiply-accumulates. Its total also includes norms and pooling.
COUNTED = ("conv", "linear", "addmm", "mm", "bmm", "matmul", "scaled_dot_product_attention")


def _attention_macs(inputs: list, outputs: list) -> int:
    """fvcore's count of fused attention, which it lacks: of [..., L, E], [..., S, E] and [..., S, V], L S (E + V)."""
    queries, keys, values = (value.type().sizes() for value in inputs[:3])
    return math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def count_macs(model: nn.Module, in_chans: int, img_size: ImgSize) -> int:
    """The multiply-accumulates for one image, by fvcore, or by torch if fvcore lacks a part (`LACKS`) or rounds."""
    with _one_image(model, in_chans, img_size) as x:
        analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).tracer_warnings("none")
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        by_operator = analysis.uncalled_modules_warnings(False).by_operator()
    if any(part in op for op in analysis.unsupported_ops() for part in LACKS) or by_operator["einsum"]:
        return count_macs_torch(model, in_chans, img_size)
    return sum(int(by_operator[op]) for op in COUNTED)


def count_macs_torch(model: nn.Module, in_chans: int, img_size: ImgSize) -> int:
    """The same by torch's own counter. This works on the meta device, too."""
    # torch may not count fused attention (2.14 leaves out the CPU's). Unfused attention is plain products.
    unfused = sdpa_kernel(SDPBackend.MATH)
    with _one_image(model, in_chans, img_size) as x, unfused, FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """The number of parameters, without the statistics of batch norm."""
    return sum(p.numel() for p in model.parameters())


def _counts(net: dict[str, Any], data: Mapping[str, Any], own: Own | None) -> dict[str, Any]:
    """``{"widths": {module: [in, out]}, "macs", "params"}`` of ``net``. Raises UserError if ``net`` is wrong."""
    check_net(net)
    try:
        if "own" in net:
            model = on_meta(build_own(net, own))
        else:
            with torch.device("meta"):  # needs no memory, even if a foreign arch file asks for much
                model = _kind(net).network(net, num_classes=data["num_classes"], in_chans=data["in_chans"])
        macs = count_macs_torch(model, data["in_chans"], data["img_size"])
        features = measure(model, data["in_chans"], data["img_size"])["features"] if "base" in net else []
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"the network cannot be run on images of {size_text(data['img_size'])} px: {first_line(error)}"
        ) from None
    if features != net.get("features", []):
        fail("net.features", net["features"], f"the channels of its feature levels: {features}")
    modules = dict(model.named_modules())
    widths = {name: [m.in_channels, m.out_channels] for name, m in modules.items() if isinstance(m, _ConvNd)}
    widths |= {name: [m.in_features, m.out_features] for name, m in modules.items() if isinstance(m, nn.Linear)}
    return {"widths": widths, "macs": macs, "params": count_params(model)}


_SOURCE = '''"""{name}: a network found by dnas, as a plain timm model. Needs torch and timm, not dnas.

    import timm
    import model  # this file, which tells timm the name
    net = timm.create_model("{name}", pretrained=True)  # weights: model.safetensors beside this file
    net = timm.create_model("{name}", num_classes=7, in_chans=1, features_only=True)

Found for images of {in_chans} x {height} x {width} and {num_classes} classes. To change the network, change NET.
"""

from pathlib import Path

from timm.models import generate_default_cfgs, register_model

# From here to NET: {kind} as it stands.
{body}


{about}
NET = {net}

WEIGHTS = Path(__file__).resolve().with_name("model.safetensors")

CFG = {cfg}
default_cfgs = generate_default_cfgs({{"{name}": {{**CFG, "file": str(WEIGHTS) if WEIGHTS.is_file() else None}}}})


@register_model
def {name}(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network in NET; kwargs are those of any timm entry point."""
    return build(NET, "{name}", pretrained, **kwargs)
'''


_ABOUT = {
    native: """\
# One row a block: kind (ds depthwise separable, ir inverted residual, er fused), hidden and output width,
# se = squeeze width (0: none), skip = shortcut. Widths are in channels.""",
    narrowed: """\
# The network of timm's that this is a narrower version of; the channels of its feature levels; for each module what is
# smaller than there: shapes of tensors (None: as there) and the numbers that the module keeps.""",
}


def model_source(
    name: str,
    net: dict[str, Any],
    *,
    num_classes: int,
    in_chans: int,
    img_size: int | Sequence[int],
    mean: Floats,
    std: Floats,
    crop_pct: float = 1.0,
) -> str:
    """The text of a ``model.py`` that registers ``net`` with timm as ``name``. It needs torch and timm only.

    Raises UserError if anything that would go into the text is not valid.
    """
    check_name(name)
    check_net(net)
    data = check_data(num_classes, in_chans, img_size, mean, std, crop_pct)
    kind = _kind(net)
    height, width = sides(img_size)
    cfg: dict[str, Any] = {"input_size": (in_chans, height, width), "pool_size": _pool_size(net, data)}
    cfg |= {key: tuple(map(float, data[key])) for key in ("mean", "std")} | {"num_classes": num_classes}
    cfg |= {"interpolation": "bilinear", "crop_pct": crop_pct, **_heads(net)}
    body = inspect.getsource(kind).split('"""\n', 1)[1].strip()  # without its docstring
    # Numbers, booleans and known words have no quotes inside.
    net_text, cfg_text = (_pretty(part, repr).replace("'", '"') for part in (net, cfg))
    path = f"dnas/export/{kind.__name__.split('.')[-1]}.py"
    return _SOURCE.format(
        name=name,
        kind=path,
        body=body,
        about=_ABOUT[kind],
        net=net_text,
        cfg=cfg_text,
        height=height,
        width=width,
        **data,
    )


def _pool_size(net: dict[str, Any], data: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Height and width of the last feature map. None for tokens."""
    if "base" not in net:
        strides = [net["stem"]["stride"], *(rows[0]["stride"] for rows in net["stages"])]
        return sides(strided(data["img_size"], math.prod(strides)))  # every stride halves and rounds up
    with torch.device("meta"):
        model = narrowed.network(net, num_classes=data["num_classes"], in_chans=data["in_chans"])
    return measure(model, data["in_chans"], data["img_size"])["pool_size"]


def _pretty(value: Any, write: Callable[[Any], str], indent: int = 0) -> str:
    """``write(value)``, which is JSON or Python. If it does not fit on one line, every entry gets its own line."""
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
    own: Own | None = None,
) -> dict[str, Any]:
    """The content of ``arch.json`` (`ARCH`), with the widths, MACs and parameters of the net as built.

    ``data`` holds the keywords of `model_source`, ``budget`` rows ``{"metric", "limit", "reached"}``. Raises UserError
    if an entry is not valid.
    """
    data = check_data(**data)
    document = {"schema": SCHEMA, "name": name, "supernet": supernet, **data, "answers": dict(answers), "net": net}
    document |= {**_counts(net, data, own), "budget": [*map(dict, budget)], "provenance": dict(provenance or {})}
    document = parse_json(_dump(document).encode(), "arch document", MAX_BYTES)  # a copy, of JSON's own types
    check_document(document)  # a network of the user's own has just been counted
    return document


def write_export(folder: str | Path, document: dict[str, Any], own: Own | None = None) -> None:
    """Write ``model.py`` and ``arch.json`` into ``folder``, each whole or not at all.

    Beside a ``model.py`` of the user's own network goes a copy of the user's file. A network that a program gave has no
    ``model.py``. Raises UserError and writes nothing if ``document`` is wrong.
    """
    text = (_dump(document) + "\n").encode()
    document = parse_json(text, "arch document", MAX_BYTES)
    check_document(document, own)
    source, net = "", document["net"]
    if "own" not in net:
        source = model_source(document["name"], net, **{key: document[key] for key in DATA if key in document})
    elif needed(net, own).file:
        shape = document["in_chans"], *sides(document["img_size"])
        source = own_source(document["name"], net, shape, lambda value: _pretty(value, repr).replace("'", '"'))
    Path(folder).mkdir(parents=True, exist_ok=True)
    if own and own.file and "own" in net:
        write_whole(Path(folder) / net["own"]["file"], own.text)
    if source:
        write_whole(Path(folder) / "model.py", source.encode())
    write_whole(Path(folder) / "arch.json", text)  # last: if it is there, the export is complete


def read_arch(path: str | Path, own: Own | None = None) -> dict[str, Any]:
    """The document in an ``arch.json``, whoever wrote the file. Raises UserError if anything is wrong with it."""
    try:
        document = read_json(path, MAX_BYTES)
        check_document(document, own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return document


def save_weights(model: nn.Module, folder: str | Path) -> None:
    """Write the model's state to ``model.safetensors`` in ``folder``, whole or not at all."""
    # without the prefixes of DDP and torch.compile
    write_state(clean_state_dict(model.state_dict()), Path(folder) / "model.safetensors")


def write_state(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the state of a plain network to a .safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    count = Counter(tensor.data_ptr() for tensor in tensors.values())  # the format has no shared tensors
    tensors = {name: t.clone() if count[t.data_ptr()] > 1 else t for name, t in tensors.items()}
    write_whole(path, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _dump(value: Any) -> str:
    try:
        return _pretty(value, partial(json.dumps, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"arch document cannot be written as JSON: {error}") from None
