"""Build a found net from rows of plain data. timm itself builds it: a genuine `timm.models.EfficientNet`.

Everything below this docstring is copied unchanged into the ``model.py`` of an export, where dnas is absent. So it may
import only torch, timm and Python's own modules.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.models import EfficientNet, build_model_with_cfg
from torch import nn

ACTS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hard_swish": nn.Hardswish}


def build(net: dict[str, Any], variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network ``net``, as a timm entry point named ``variant`` returns it.

    ``kwargs`` are timm's: num_classes, in_chans, features_only, out_indices, global_pool, drop_rate, drop_path_rate,
    pretrained_cfg, bn_momentum, ... With features_only all feature levels are returned by default, however many there
    are.
    """
    levels = 1 + sum(stage[0]["stride"] == 2 for stage in net["stages"])
    features = {"feature_cls": "getter", "out_indices": tuple(range(levels)), "flatten_sequential": True}
    return build_model_with_cfg(partial(network, net), variant, pretrained, feature_cfg=features, **kwargs)


def network(net: dict[str, Any], **kwargs: Any) -> EfficientNet:
    """The `EfficientNet` with exactly the widths, kernels, strides and shortcuts of ``net``, freshly initialised.

    ``kwargs`` go to `EfficientNet` and override ``net``. The input of the network is (batch, in_chans, height, width).
    """
    # timm assumes that every stem has stride 2, and turns the strides beyond output_stride into dilation. Here it does
    # so only if output_stride is given.
    stem_scale = 2 // net["stem"]["stride"]
    output_stride = stem_scale * kwargs.pop("output_stride", 2 ** len(net["stages"]) * net["stem"]["stride"])
    norm = {key: kwargs.pop(f"bn_{key}") for key in ("momentum", "eps") if f"bn_{key}" in kwargs}

    stages: list[list[dict[str, Any]]] = []
    in_width = net["stem"]["width"]
    for rows in net["stages"]:
        stages.append([])
        for row in rows:
            stages[-1].append(_block_args(row, in_width))
            in_width = row["out"]
    args = {
        "block_args": stages,
        "stem_size": net["stem"]["width"],
        "num_features": net["head"],
        "act_layer": ACTS[net["act"]],
        "norm_layer": partial(nn.BatchNorm2d, **norm),
        "round_chs_fn": int,  # keep widths: timm would round them to multiples of 8
        "output_stride": output_stride,
    }
    model: Any = EfficientNet(**{**args, **kwargs})

    if stem_scale == 2:
        model.conv_stem.stride = (1, 1)
        for level in model.feature_info:
            level["reduction"] //= 2
    for rows, blocks in zip(net["stages"], model.blocks, strict=True):
        for row, block in zip(rows, blocks, strict=True):
            if row["kind"] != "ds" and row["mid"] % 8:
                _narrow(block, row["mid"])
    return model


def _block_args(row: dict[str, Any], in_width: int) -> dict[str, Any]:
    """One row as arguments of timm's block builder.

    The builder takes hidden and squeeze widths as ratios to the input width.
    """
    args = {
        "block_type": row["kind"],
        "exp_kernel_size" if row["kind"] == "er" else "dw_kernel_size": row["kernel"],
        "stride": row["stride"],
        "out_chs": row["out"],
        "se_ratio": row["se"] / in_width,
        "noskip": not row["skip"],
        "act_layer": None,  # the network's
    }
    if row["kind"] != "ds":
        args["exp_ratio"] = math.ceil(row["mid"] / 8) * 8 / in_width
    return args


@torch.no_grad()
def _narrow(block: Any, mid: int) -> None:
    """Cut the hidden width of a fresh inverted (or edge) residual block to its first ``mid`` channels, in place.

    timm's builder knows only hidden widths that are multiples of 8. It draws weights with a variance of 2 / fan-out. If
    the fan-out shrinks, the weights are scaled to the variance that timm would have used at this width.
    """
    writers = [block.conv_exp if hasattr(block, "conv_exp") else block.conv_pw]
    readers, norms = [block.conv_pwl], [block.bn1]
    if not isinstance(block.se, nn.Identity):
        writers.append(block.se.conv_expand)
        readers.append(block.se.conv_reduce)
    if hasattr(block, "conv_dw"):
        norms.append(block.bn2)
        block.conv_dw.weight = nn.Parameter(block.conv_dw.weight[:mid].clone())  # fan-out of one channel: unchanged
        block.conv_dw.in_channels = block.conv_dw.out_channels = block.conv_dw.groups = mid
    for conv in writers:
        conv.weight = nn.Parameter(conv.weight[:mid] * math.sqrt(conv.out_channels / mid))
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias[:mid].clone())
        conv.out_channels = mid
    for conv in readers:
        conv.weight = nn.Parameter(conv.weight[:, :mid].clone())
        conv.in_channels = mid
    for norm in norms:
        norm.weight, norm.bias = nn.Parameter(norm.weight[:mid].clone()), nn.Parameter(norm.bias[:mid].clone())
        norm.running_mean, norm.running_var = norm.running_mean[:mid].clone(), norm.running_var[:mid].clone()
        norm.num_features = mid
