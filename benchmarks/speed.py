#!/usr/bin/env python3
"""What gates cost: a training step of a gated network of timm's over one of the plain network, measured in turn.

python benchmarks/speed.py --threads 1 --json speed.json
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from timm.utils import random_seed  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dnas.runs import provenance, write_json  # noqa: E402
from dnas.timm_net import TimmBase, TimmSupernet  # noqa: E402

MODELS = ("resnet18", "mobilenetv2_100", "densenet121", "convnext_atto")


def seconds(step: Callable[[], Tensor], device: torch.device) -> float:
    """Wall-clock seconds of one forward and backward pass."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def gates_cost(name: str, batch_size: int, img_size: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Ratios [median, least, most] over pairs of steps: gates ``open`` (every channel), ``drawn`` evenly, ``soft``."""
    random_seed(0)
    net = TimmSupernet(TimmBase(name, 10, 3, img_size)).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch_size, 3, img_size, img_size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch_size,), device=device)
    answers = {"open": net.widest, "drawn": lambda: net.draw(uniform=True), "soft": net.soft}

    def gated(kind: str) -> Tensor:
        return nn.functional.cross_entropy(net(x, answers[kind]()), y)

    steps: dict[str, Callable[[], Tensor]] = {"plain": lambda: nn.functional.cross_entropy(net.model(x), y)}
    steps |= {kind: (lambda kind=kind: gated(kind)) for kind in answers}
    taken: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(repeats + 1):
        for kind, step in steps.items():
            taken[kind].append(seconds(step, device))
    row: dict[str, Any] = {"model": name, "plain_ms": round(1e3 * median(taken["plain"][1:]), 1)}
    for kind in answers:
        ratios = [a / b for a, b in zip(taken[kind][1:], taken["plain"][1:], strict=True)]
        row[kind] = [round(r, 3) for r in (median(ratios), min(ratios), max(ratios))]
    return row


def main() -> None:
    """Print a line a network; write all of it as JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="of timm's")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for name in args.models:
        rows.append(gates_cost(name, args.batch_size, args.img_size, args.repeats, device))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        given = {"command": " ".join(["benchmarks/speed.py", *sys.argv[1:]]), "date": date.today().isoformat()}
        write_json(Path(args.json), given | provenance(device) | {"gates": rows})


if __name__ == "__main__":
    main()
