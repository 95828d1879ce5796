#!/usr/bin/env python3
"""Why do gates leave the last stream of a ResNet so narrow? One thing of the search changed at a time.

python benchmarks/last_stream.py --search 3        # searches of timm_resnet_50; rows in results/last_stream.jsonl
python benchmarks/last_stream.py --report          # the same table again

A row has the widths that a search ends with; what moves the gates of the last stream at a quarter, half and three
quarters of it; and how many directions the features before the classifier span.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import iso_flops as lab_of  # noqa: E402
import torch  # noqa: E402
from iso_flops import Table  # noqa: E402
from iso_report import markdown  # noqa: E402
from iso_setups import SETUPS, Lab, open_lab  # noqa: E402
from timm.utils import random_seed  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from variants import OLDER  # noqa: E402

from dnas.methods.budget_loss import budget_penalty, ramp, target  # noqa: E402
from dnas.methods.gates import GATES, log_widths  # noqa: E402
from dnas.methods.loop import begin, run  # noqa: E402
from dnas.methods.method import Search, Task  # noqa: E402
from dnas.methods.settings import GatesConfig  # noqa: E402
from dnas.runtime.run_folder import provenance  # noqa: E402
from dnas.training.loop import cycle  # noqa: E402

SETUP, LAST = "timm_resnet_50", "layer4.0.conv2"  # the stream that the classifier reads, 64 channels wide
POINTS = (0.25, 0.5, 0.75)
KINDS = ("held out", "held out, calibrated", "learnt", "learnt, calibrated", "budget")


@dataclass(frozen=True)
class Change:
    """What is changed in the older search: its config, a factor on its epochs, the optimizer of the gates."""

    config: GatesConfig = OLDER
    length: float = 1.0
    sgd: bool = False


CHANGES = {
    "default": Change(GatesConfig()),
    "default without the prior": Change(GatesConfig(prior=0.0)),
    "older": Change(),
    "without the logits' scale": Change(replace(OLDER, confidence=False)),
    "same images": Change(replace(OLDER, gate_fraction=0.0)),
    "scale in gradient": Change(replace(OLDER, scale_in_gradient=True)),
    "gates by SGD": Change(sgd=True),
    "half as long": Change(length=0.5),
    "twice as long": Change(length=2.0),
    "gates from 60 % on": Change(replace(OLDER, warmup=0.6, budget_from=0.6, budget_by=0.9, skip_at=0.6)),
    "weights on soft nets": Change(replace(OLDER, weights_on="soft")),
    "no sharpening": Change(replace(OLDER, temperature=1.0)),
}


Images = Mapping[str, tuple[Tensor, Tensor]]


def forces(search: Search, task: Task, progress: float, images: Images) -> dict[str, dict[str, float]]:
    """Width -> what images and what the budget ask for, in nats per unit of its expected log width.

    The gradient of each loss along a common shift of all logits of the gate, over that of the expected log width:
    positive where the loss falls as the width grows. ``calibrated`` is the cross entropy of the held-out images after
    the best scaling of the logits: what is left when a width can gain nothing by making the network less sure of
    itself. Gates and weights are left as they are.
    """
    net, own, config = search.net, search.own, task.config
    fallen = ramp(progress, config.budget_from, config.budget_by)
    targets = {m: target(own.first[m], limit, fallen) for m, limit in task.limits.items()}
    alphas = {name: gate.alpha for name, gate in net.gates().items() if not gate.settled}

    def along_logits(loss: Tensor) -> dict[str, float]:
        grads = torch.autograd.grad(loss, [*alphas.values()], allow_unused=True, retain_graph=True)
        return {n: 0.0 if g is None else float(g.sum()) for n, g in zip(alphas, grads, strict=True)}

    asked = {}
    for name, (x, y) in images.items():
        logits = net(x, net.soft(own.draws, 0, own.temperature, with_scale=config.scale_in_gradient)).float()
        asked[name] = along_logits(nn.functional.cross_entropy(logits, y))
        loss = nn.functional.cross_entropy(best_scale(logits.detach(), y) * logits, y)
        asked[f"{name}, calibrated"] = along_logits(loss)
    p = net.probabilities_on_host(own.temperature)
    expected = {m: task.tables[m].expected(p) for m in targets}
    budget = along_logits(config.budget_weight * budget_penalty(expected, targets))
    widths = along_logits(log_widths(net.space, net.probabilities_on_host(own.temperature)))
    asked["budget"] = budget
    return {n: {kind: -all_of[n] / widths[n] for kind, all_of in asked.items()} for n in alphas if widths[n] > 0}


def best_scale(logits: Tensor, y: Tensor) -> Tensor:
    """The factor on logits [B, classes] with the smallest cross entropy: a bisection on its derivative, which rises."""
    low, high = torch.tensor(1e-3), torch.tensor(1e3)
    right = logits.gather(1, y[:, None])[:, 0]
    for _ in range(60):
        middle = (low * high).sqrt()
        slope = ((middle * logits).softmax(1) * logits).sum(1).sub(right).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return (low * high).sqrt()


def spectrum(net: nn.Module, features: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float]:
    """Directions that pooled features [B, width] span: for 99 % of their variance, and the participation ratio."""
    with torch.no_grad():
        net.eval()
        found = features(x)
        net.train()
    values = torch.linalg.svdvals((found - found.mean(0)).double()).square()
    share = (values / values.sum()).cumsum(0)
    ratio = float(values.sum() ** 2 / values.square().sum())
    return {"width": found.shape[1], "for_99_percent": int((share < 0.99).sum()) + 1, "participation": ratio}


def pooled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the classifier of a network of timm's reads."""
    return lambda x: model.forward_head(model.forward_features(x), pre_logits=True)


def look(lab: Lab, name: str, seed: int) -> dict:
    """One search with a change. Returns its row."""
    change = CHANGES[name]
    recipe = replace(lab.setup.search, epochs=round(lab.setup.search.epochs * change.length))
    random_seed(seed)
    net = lab.supernet().to(memory_format=torch.channels_last)
    task = Task(lab.tables, lab.budgets, lab.data, recipe, change.config, seed)
    search = begin(GATES, net, task)
    if change.sgd:  # the rate at which its first steps are as long as Adam's, in the mean over logits
        search.own.optimizer = torch.optim.SGD(net.gate_parameters(), lr=sgd_rate(search, task), momentum=0.5)
    learnt, held_out = lab.data.split(GatesConfig.gate_fraction, seed)
    images = {
        what: next(cycle(lab.data.train_batches(512, seed=seed, indices=indices)))
        for what, indices in (("held out", held_out), ("learnt", learnt))
    }
    moved: dict[str, Any] = {}
    for point in POINTS:
        run(GATES, search, task, until=point)
        moved[f"{point}"] = forces(search, task, point, images)
    before = spectrum(net, pooled(net.model), images["held out"][0])
    run(GATES, search, task)
    p = net.seen(search.own.temperature)
    expected = {n: round(float(p[n] @ torch.tensor(lab.net.space.by_name[n].options).numpy()), 2) for n in p}
    row = {"kind": "search", "net": f"{name}/{seed}", "arch": dict(GATES.choose(search, task)), "expected": expected}
    return lab_of.rounded(row | {"forces": moved, "features_at_0.75": before})


def sgd_rate(search: Search, task: Task) -> float:
    """The learning rate of SGD whose first step is as long as that of Adam, whose steps are its rate in every logit."""
    x, y = next(iter(task.held_out_batches(task.config.gate_fraction)))
    logits = search.net(x, search.net.soft(None))
    gates = search.net.gate_parameters()
    grads = torch.autograd.grad(nn.functional.cross_entropy(logits.float(), y), gates)
    return search.own.optimizer.param_groups[0]["lr"] / float(torch.cat(grads).abs().mean())


def widest(lab: Lab, seed: int) -> dict:
    """Features of the widest net, trained as long as a search and by the same images. Returns their row."""
    random_seed(seed)
    model = lab.net.outline.create()
    rest, held_out = lab.data.split(GatesConfig.gate_fraction, seed)
    lab_of.opponents.train_shared(lab, model, list(model.parameters()), model, rest, seed)
    x, _ = next(cycle(lab.data.train_batches(512, seed=seed, indices=held_out)))
    return lab_of.rounded({"kind": "widest", "net": f"widest/{seed}", "features": spectrum(model, pooled(model), x)})


def call(what: str, seed: int) -> dict:
    """A row, in a process of `iso_flops`."""
    lab = lab_of._lab
    assert lab is not None
    return widest(lab, seed) if what == "widest" else look(lab, what, seed)


def report(table: Table) -> str:
    """The table in Markdown: means over searches."""
    rows = []
    for name in CHANGES:
        own = [row for row in table.rows if row["net"].split("/")[0] == name]
        if own:
            cells: list[Any] = [name, len(own), fmean(row["arch"][LAST] for row in own)]
            for kind in KINDS:
                at = [[r["forces"][f"{p}"][LAST][kind] for r in own if LAST in r["forces"][f"{p}"]] for p in POINTS]
                cells.append(", ".join(f"{fmean(values):+.3f}" if values else "-" for values in at))
            features = [row["features_at_0.75"] for row in own]
            cells += [fmean(f[key] for f in features) for key in ("width", "for_99_percent", "participation")]
            rows.append(cells)
    heads = ["search", "searches", "last stream of 64", *KINDS]
    heads += ["live at 75 %", "directions for 99 %", "participation ratio"]
    full = [row["features"] for row in table.rows if row["kind"] == "widest"]
    if full:
        last = [fmean(f[key] for f in full) for key in ("width", "for_99_percent", "participation")]
        rows.append(["the widest net, trained as long", len(full), None, *([None] * len(KINDS)), *last])
    return markdown(heads, rows)


def main() -> None:
    """Searches that the rows lack, or the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--change", nargs="+", choices=list(CHANGES), default=list(CHANGES), help="default: all")
    lab_of.add_search_flags(p)
    args, table = p.parse_args(), Table("last_stream")
    if not args.report:
        device = open_lab(SETUPS[SETUP], args.data_dir, args.device).device
        info = {"date": date.today().isoformat()} | provenance(device)
        have = {row["net"] for row in table.rows}
        wanted = [(what, k) for k in range(args.search) for what in ("widest", *args.change)]
        entered = (SETUPS[SETUP], args.data_dir, args.device)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, spawn, initializer=lab_of._enter, initargs=entered) as pool:
            jobs = [pool.submit(call, what, k) for what, k in wanted if f"{what}/{k}" not in have]
            for future in as_completed(jobs):
                row = future.result()
                table.append(row | info)
                print(row["net"], row.get("arch", {}).get(LAST, ""), flush=True)
    print(report(table))


if __name__ == "__main__":
    lab_of.told(main)
