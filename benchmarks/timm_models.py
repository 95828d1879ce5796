#!/usr/bin/env python3
"""Which networks of timm's can be searched, and how much of them: one row a network, measured.

python benchmarks/timm_models.py                     # the networks that are not in results/timm_models.jsonl yet
python benchmarks/timm_models.py --table             # docs/timm-models.md from the rows

Per network, with 10 classes: the supernet is built (which tries all its groups), five random width vectors are masked
and exported with one set of weights, a search step runs, the uniform net at 50 % of the MACs is exported, counted by
fvcore in a fresh process without dnas, and asked for features.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
from timm.utils import random_seed  # noqa: E402

from dnas.export.model_file import (  # noqa: E402
    arch_document,
    build_net,
    narrowed,  # noqa: E402
    write_export,
)
from dnas.export.verify import verify_export  # noqa: E402
from dnas.methods.rules import random_arch, uniform_arch  # noqa: E402
from dnas.nets.shrink import plain_state  # noqa: E402
from dnas.nets.timm_space import TimmBase  # noqa: E402
from dnas.nets.timm_supernet import TimmSupernet  # noqa: E402
from dnas.runtime.run_folder import provenance  # noqa: E402
from dnas.spec.budget import parse_budget  # noqa: E402
from dnas.spec.checks import first_line  # noqa: E402
from dnas.spec.cost import CostTable, resolve_budgets  # noqa: E402

ROWS = Path(__file__).parent / "results" / "timm_models.jsonl"
TABLE = ROOT / "docs" / "timm-models.md"
CLASSES = 10
# Image size in pixels where it is not 96: what the network is made for, or the least that it takes.
SIZES = {"inception_v3": 128, "inception_v4": 128, "inception_resnet_v2": 128, "xception41": 128, "vgg11_bn": 224}
SIZES |= {"fastvit_t8": 256, "nasnetalarge": 128, "pnasnet5large": 128}
# Arguments of timm's for networks that are made for one size of images, or that are deep: see `--model-kwargs`.
KWARGS = {
    **{name: {"img_size": 96} for name in ("mixer_s32_224", "pit_ti_224", "deit_tiny_distilled_patch16_224")},
    "vit_tiny_patch16_224": {"img_size": 96},
    "swin_tiny_patch4_window7_224": {"img_size": 96, "depths": [2, 2, 2, 2]},
    "cait_xxs24_224": {"img_size": 96, "depth": 2},
    "xcit_nano_12_p16_224": {"img_size": 96, "depth": 2},
    "beit_base_patch16_224": {"img_size": 96, "depth": 2},
    "eva02_tiny_patch14_224": {"img_size": 98, "depth": 2},
    "vit_relpos_small_patch16_224": {"img_size": 96, "depth": 2},
    "pvt_v2_b0": {},
    "swinv2_tiny_window8_256": {"img_size": 96, "depths": [2, 2, 2, 2]},
    "twins_svt_small": {"img_size": 96, "depths": [1, 1, 2, 1]},
    "davit_tiny": {"depths": [1, 1, 2, 1]},
    **{name: {"img_size": 96} for name in ("resmlp_12_224", "levit_128s", "visformer_tiny", "gmixer_24_224")},
    "convit_tiny": {"img_size": 96, "depth": 4},
}
SIZES |= {name: kwargs["img_size"] for name, kwargs in KWARGS.items() if "img_size" in kwargs}
MODELS = """
resnet18 resnet50 resnet26t resnet50d seresnet18 ecaresnet26t resnetv2_50 resnetv2_50x1_bit wide_resnet50_2
resnext50_32x4d seresnext26d_32x4d skresnet18 res2net50_26w_4s res2next50 resnest50d regnetx_002 regnety_002
regnetz_b16 gernet_s repvgg_a0 mobileone_s0 mobilenetv1_100 mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small
mobilenetv4_hybrid_medium mnasnet_100 semnasnet_075 fbnetc_100 fbnetv3_b spnasnet_100 hardcorenas_a lcnet_050 tinynet_e
mixnet_s efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0 ghostnet_100 ghostnetv2_100 repghostnet_050 rexnet_100
densenet121 vgg11_bn convnext_atto convnextv2_atto inception_next_tiny hgnetv2_b0 dla34 hrnet_w18_small selecsls42b
inception_v3 inception_v4 inception_resnet_v2 xception41 cspresnet50 cspdarknet53 darknet53 vovnet39a ese_vovnet19b_dw
dpn48b dm_nfnet_f0 eca_nfnet_l0 nf_regnet_b0 edgenext_xx_small fastvit_t8 mobilevit_xxs repvit_m1 fasternet_t0
starnet_s1 poolformer_s12 nasnetalarge pnasnet5large resnetblur18 tresnet_m
""".split()  # noqa: SIM905
MODELS += KWARGS


def try_model(name: str) -> dict:
    """The row of one network; ``error`` holds the first line of what went wrong, where something did."""
    row: dict = {"model": name, "img_size": SIZES.get(name, 96)}
    row |= {"kwargs": KWARGS[name]} if KWARGS.get(name) else {}
    random_seed(0)
    started = time.perf_counter()
    try:
        for part in (measure_space, measure_logits, measure_step, measure_export):
            row |= part(row)
    except Exception as error:  # a row of a failure is a result, too
        row["error"] = f"{part.__name__}: {first_line(error).replace(tempfile.gettempdir(), '')[:200]}"
    _made.clear()
    return row | {"seconds": round(time.perf_counter() - started, 1)}


_made: dict = {}  # of the network at hand: its supernet and tables


def base_of(row: dict) -> TimmBase:
    """The network of a row."""
    return TimmBase(row["model"], CLASSES, 3, row["img_size"], kwargs=row.get("kwargs", {}))


def measure_space(row: dict) -> dict:
    """Build the supernet: groups, and the share of the MACs that the narrowest network saves."""
    started = time.perf_counter()
    net = TimmSupernet(base_of(row))
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    _made.update(net=net, tables=tables, budgets=())
    low, high = (tables["macs"].of(arch) for arch in tables["macs"].extremes())
    found = {"build_seconds": round(time.perf_counter() - started, 1), "groups": len(net.space.decisions)}
    found |= {"macs": high, "cuttable": round(1 - low / high, 3), "fixed": list(net.channels.fixed)}
    _made["budgets"] = resolve_budgets(tables, parse_budget("50%"))
    return found


def measure_logits(row: dict) -> dict:
    """Largest relative difference of logits, masked against exported, over five random width vectors."""
    net, worst, changed = _made["net"].eval().double(), 0.0, []
    for name, t in net.model.state_dict().items():  # no branch is switched off
        if t.ndim == 1 and t.is_floating_point():
            t.copy_(torch.rand(t.shape) + (-0.5 if name.endswith(("bias", "mean")) else 0.5))
        elif t.ndim > 1 and float(t.abs().max()) < 1e-3:
            t.normal_(0, 0.1)
    x = torch.randn(2, 3, row["img_size"], row["img_size"], dtype=torch.double)
    with torch.no_grad():
        whole = net.model(x)
        for _ in range(5):
            arch = net.draw(uniform=True)
            masked = net(x, arch)
            plain = build_net(net.net_of(arch), num_classes=CLASSES).eval().double()
            plain.load_state_dict(plain_state(net, arch))
            scale = float(masked.abs().max())
            worst = max(worst, float((plain(x) - masked).abs().max()) / scale)
            changed.append(float((whole - masked).abs().max()) / scale)
    if worst > 1e-5 or min(changed) < 1e-3:
        raise RuntimeError(f"masked and exported differ by {worst:.1e}, masked and whole by {min(changed):.1e}")
    return {"logits_differ": worst}


def measure_step(row: dict) -> dict:
    """One step of the weights on a drawn network and one of the gates on the soft one; all gates get a gradient."""
    net = TimmSupernet(base_of(row))
    x, y = torch.randn(4, 3, row["img_size"], row["img_size"]), torch.randint(0, CLASSES, (4,))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for answers in (net.draw(), net.soft()):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x, answers), y)
        loss.backward()
        optimizer.step()
    silent = [n for n, gate in net.gates().items() if gate.alpha.grad is None or not bool((gate.alpha.grad != 0).any())]
    if silent or not loss.isfinite():
        raise RuntimeError(f"a search step has the loss {float(loss)} and no gradient for {', '.join(silent[:3])}")
    return {"step": True}


def measure_export(row: dict) -> dict:
    """What `tools/search.py --budget 50% --dry-run` does, a random net as well, and features."""
    net, tables, budgets = (_made[key] for key in ("net", "tables", "budgets"))
    ratios = []
    for arch in (uniform_arch(net.space, tables, budgets), random_arch(net.space, tables, budgets, 0)):
        data = {"num_classes": CLASSES, "in_chans": 3, "img_size": row["img_size"], "mean": [0.5] * 3, "std": [0.5] * 3}
        document = arch_document("dnas_tried", net.net_of(arch), data, supernet=row["model"], answers=arch)
        with tempfile.TemporaryDirectory() as folder:
            write_export(folder, document)
            counted = verify_export(folder)
        if not counted["macs"] == tables["macs"].of(arch) == document["macs"] or counted["counted_by"] != "fvcore":
            raise RuntimeError(f"{counted['counted_by']} counts {counted['macs']}, the table {tables['macs'].of(arch)}")
        ratios.append(tables["macs"].of(arch) / budgets[0].limit)
        cfg = {"num_classes": CLASSES, "input_size": (3, row["img_size"], row["img_size"])}
        model = narrowed.build(document["net"], "dnas_tried", features_only=True, pretrained_cfg=cfg).eval()
        with torch.no_grad():
            maps = model(torch.randn(1, *cfg["input_size"]))
        axis = 1 if getattr(model, "output_fmt", "NCHW") == "NCHW" else -1
        if [m.shape[axis] for m in maps] != model.feature_info.channels():
            raise RuntimeError(f"features of {[m.shape[axis] for m in maps]}, said {model.feature_info.channels()}")
    return {"reached": round(ratios[0], 4), "reached_random": round(ratios[1], 4), "features": True}


def _named(row: dict) -> str:
    """The name of a network, with its arguments but for the size of images."""
    more = {key: value for key, value in row.get("kwargs", {}).items() if key != "img_size"}
    return f"{row['model']} {json.dumps(more)}" if more else row["model"]


def write_table(rows: list[dict]) -> None:
    """docs/timm-models.md."""
    good = [row for row in rows if "error" not in row]
    versions = {k: sorted({row[k] for row in rows}) for k in ("date", "torch", "timm")}
    lines = [
        "# Networks of timm's that can be searched",
        "",
        f"{len(good)} of {len(rows)} tested networks pass all checks. "
        "`tools/search.py --model NAME --budget ...` takes each network that passes.",
        "",
        "* Groups: the number of decisions on a width, in multiples of 8 channels, or on a number of heads.",
        "* Can be cut: the share of MACs that the narrowest network saves.",
        "* Logits: the largest relative difference between the masked and the exported network, over five random width "
        "vectors.",
        "* 50 %: the MACs of the exported uniform network, divided by the budget. fvcore counts them in a process "
        "without dnas.",
        "",
        "| network | pixels | groups | can be cut | logits | 50 % | channels that stay |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(good, key=lambda row: row["model"]):
        fixed = f"{len(row['fixed'])}: {row['fixed'][0].split(': ')[-1]}" if row["fixed"] else ""
        shown = (_named(row), row["img_size"], row["groups"], f"{100 * row['cuttable']:.0f} %")
        shown += (f"{row['logits_differ']:.0e}", f"{row['reached']:.3f}", fixed)
        lines.append(f"| {' | '.join(map(str, shown))} |")
    lines += ["", "Networks that do not pass:", "", "| network | pixels | why |", "| --- | --- | --- |"]
    lines += [f"| {_named(r)} | {r['img_size']} | {r['error']} |" for r in rows if "error" in r]
    shown = "; ".join(f"{key} {', '.join(found)}" for key, found in versions.items())
    lines += ["", f"Made by `benchmarks/timm_models.py`: {shown}."]
    TABLE.write_text("\n".join(lines) + "\n")


def try_all(about: str, path: Path, names: Sequence[str], tried: Callable[[str], dict]) -> list[dict]:
    """The command line of a benchmark with a row for each name: the rows of ``path``, and those that it lacks.

    ``about`` is the text of ``--help``. ``tried(name)`` gives the row of a name; it is appended when it is there.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=names, help="names of networks (default: a list)")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    info = {"date": date.today().isoformat()} | provenance(torch.device("cpu"))
    for name in [] if args.table else [m for m in args.models if m not in {row["model"] for row in rows}]:
        rows.append(tried(name) | info)
        with open(path, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print({k: v for k, v in rows[-1].items() if k not in info}, flush=True)
    return rows


if __name__ == "__main__":
    write_table(try_all(__doc__, ROWS, [name for name in MODELS if timm.is_model(name)], try_model))
