#!/usr/bin/env python3
"""Which networks that are not timm's can be searched, and how much of them: one row a network, measured.

python benchmarks/own_models.py                     # the networks that are not in results/own_models.jsonl yet
python benchmarks/own_models.py --table             # docs/own-models.md from the rows

The networks are those of `own_nets.NETS`, and torchvision's among them. For each, the supernet is built (which tries
all its groups), and five random width vectors are masked and cut. fvcore and torch count the MACs of each. The uniform
net at 50 % of the MACs is exported with a copy of the file, and counted in a fresh process without dnas.
"""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import own_nets  # noqa: E402
import torch  # noqa: E402
from timm.utils import random_seed  # noqa: E402
from timm_models import try_all  # noqa: E402

from dnas.export.model_file import arch_document, build_net, count_macs, count_macs_torch, write_export  # noqa: E402
from dnas.export.verify import verify_export  # noqa: E402
from dnas.methods.rules import uniform_arch  # noqa: E402
from dnas.nets.own_base import OwnBase, read_function  # noqa: E402
from dnas.nets.own_supernet import OwnSupernet  # noqa: E402
from dnas.nets.shrink import plain_state  # noqa: E402
from dnas.nets.tracing import leaves  # noqa: E402
from dnas.spec.budget import parse_budget  # noqa: E402
from dnas.spec.checks import first_line  # noqa: E402
from dnas.spec.cost import CostTable, resolve_budgets  # noqa: E402
from dnas.spec.image_size import size_text  # noqa: E402

ROWS = Path(__file__).parent / "results" / "own_models.jsonl"
TABLE = ROOT / "docs" / "own-models.md"


def measure(name: str, row: dict) -> None:
    """Put the figures of one network into ``row``. Raises an error at the first check that fails."""
    _, channels, sides = own_nets.NETS[name]
    own, about = read_function(f"{own_nets.__file__}:{name}")
    net = OwnSupernet(
        OwnBase(**{"num_classes": 10, "in_chans": channels, "img_size": sides, "divisor": 4, **about}), own
    ).eval()
    tables = {metric: CostTable.build(net.space, metric) for metric in ("macs", "params")}
    low, high = (tables["macs"].of(arch) for arch in tables["macs"].extremes())
    row |= {"groups": len(net.space.decisions), "macs": high, "cuttable": round(1 - low / high, 3)}
    row |= {"fixed": list(net.channels.fixed)}
    for tensor_name, t in (*net.model.named_parameters(), *net.model.named_buffers()):
        if t.ndim == 1 and t.is_floating_point():  # no branch is switched off
            t.data.copy_(torch.rand(t.shape) + (-0.5 if tensor_name.endswith(("bias", "mean")) else 0.5))
    shape = (channels, *((sides, sides) if isinstance(sides, int) else sides))
    worst, x = 0.0, torch.randn(2, *shape)
    for _ in range(5):
        arch = net.draw(uniform=True)
        plain = build_net(net.net_of(arch), num_classes=10, own=own).eval()
        plain.load_state_dict(plain_state(net, arch))
        with torch.no_grad():
            for masked, cut in zip(leaves(net(x, arch)), leaves(plain(x)), strict=True):
                worst = max(worst, float((masked - cut).abs().max() / masked.abs().max()))
        counts = count_macs(plain, channels, sides), count_macs_torch(plain, channels, sides), tables["macs"].of(arch)
        if len({*counts}) > 1:
            raise RuntimeError("fvcore counts {} MACs, torch {}, the table says {}".format(*counts))
    if worst > 1e-5:
        raise RuntimeError(f"masked and cut differ by {worst:.1e}")
    row["outputs_differ"] = worst
    budgets = resolve_budgets(tables, parse_budget("50%"))
    arch = uniform_arch(net.space, tables, budgets)
    data = {"num_classes": 10, "in_chans": channels, "img_size": sides}
    data |= {"mean": [0.0] * channels, "std": [1.0] * channels}
    document = arch_document("dnas_tried", net.net_of(arch), data, supernet=name, answers=arch, own=own)
    with tempfile.TemporaryDirectory() as folder:
        write_export(folder, document, own)
        counted = verify_export(folder)
    if not counted["macs"] == tables["macs"].of(arch):
        raise RuntimeError(f"a fresh process counts {counted['macs']} MACs, the table says {tables['macs'].of(arch)}")
    row["reached"] = round(counted["macs"] / budgets[0].limit, 4)


def tried(name: str) -> dict:
    """The row of one network; ``error`` holds the first line of what went wrong, where something did."""
    random_seed(0)
    row: dict = {"model": name, "input": f"{own_nets.NETS[name][1]}, {size_text(own_nets.NETS[name][2])}"}
    started = time.perf_counter()
    try:
        measure(name, row)
    except Exception as error:  # a row of a failure is a result, too
        row["error"] = first_line(error)[:200]
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def write_table(rows: list[dict]) -> None:
    """docs/own-models.md."""
    good = [row for row in rows if "error" not in row]
    versions = {k: sorted({row[k] for row in rows}) for k in ("date", "torch")}
    lines = [
        "# Networks that are not timm's",
        "",
        f"{len(good)} of {len(rows)} tested networks pass all checks. `dnas search --model-file FILE.py:FUNCTION` and",
        "`dnas.search(net, ...)` take each network that passes. `build`, `UNet`, `Recurrent`, `Several`, `signals`,",
        "`volumes` and `rows` are in `benchmarks/own_nets.py`; the other networks are torchvision's.",
        "",
        "* Input: channels, then the other sides.",
        "* Groups: the number of decisions on a width, in multiples of 4 channels.",
        "* Can be cut: the share of MACs that the narrowest network saves.",
        "* Outputs: the largest relative difference between the masked and the cut network, over five random width",
        "  vectors. fvcore and torch count the MACs of the formula for each.",
        "* 50 %: the MACs of the exported uniform network, divided by the budget, counted in a process without dnas.",
        "",
        "| network | input | groups | can be cut | outputs | 50 % | channels that stay |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in good:
        fixed = f"{len(row['fixed'])}: {row['fixed'][0].split(': ')[-1]}" if row["fixed"] else ""
        shown = (row["model"], row["input"], row["groups"], f"{100 * row['cuttable']:.0f} %")
        shown += (f"{row['outputs_differ']:.0e}", f"{row['reached']:.3f}", fixed)
        lines.append(f"| {' | '.join(map(str, shown))} |")
    lines += ["", "Networks that do not pass:", "", "| network | input | why |", "| --- | --- | --- |"]
    lines += [f"| {r['model']} | {r['input']} | {r['error']} |" for r in rows if "error" in r]
    shown = "; ".join(f"{key} {', '.join(found)}" for key, found in versions.items())
    lines += ["", f"Made by `benchmarks/own_models.py`: {shown}."]
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_table(try_all(__doc__, ROWS, [*own_nets.NETS], tried))
