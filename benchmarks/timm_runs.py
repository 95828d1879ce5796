#!/usr/bin/env python3
"""Whole runs of networks of timm's that nobody chose: does any of them fail after its first step?

python benchmarks/timm_runs.py --count 40              # those that are not in results/timm_runs.jsonl yet
python benchmarks/timm_runs.py --summary

The networks are drawn with a fixed seed, one of a file of timm's after the other, without those that
docs/timm-models.md lists. Each gets the smallest square images that plain timm trains on, and a whole ``dnas.search``
with ``budget="50%"`` and the other settings as short as they can be, on 64 images of noise. A row says how it ended:
``done``, or ``refused`` before the first step with the line that a user reads; ``failed`` is everything else.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
from timm.models import model_entrypoint  # noqa: E402

import dnas  # noqa: E402
from dnas.runtime.run_folder import provenance  # noqa: E402
from dnas.spec.checks import UserError  # noqa: E402
from dnas.training.batches import Data, in_memory  # noqa: E402

ROWS = Path(__file__).parent / "results" / "timm_runs.jsonl"
SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 331, 384)
MOST_PARAMS = 40e6  # of a network: larger ones take too long here
CLASSES = 4


def drawn() -> list[str]:
    """The networks in the order in which they are tried."""
    listed = (ROOT / "docs" / "timm-models.md").read_text()
    by_file = defaultdict(list)
    for name in timm.list_models():
        if f"| {name} |" not in listed:
            by_file[model_entrypoint(name).__module__].append(name)
    dice = random.Random(0)
    for names in by_file.values():
        dice.shuffle(names)
    files = sorted(by_file)
    dice.shuffle(files)
    return [
        by_file[file][k] for k in range(max(map(len, by_file.values()))) for file in files if k < len(by_file[file])
    ]


def smallest_size(name: str) -> int | None:
    """The side of the smallest images that plain timm trains the network on; None if there is none."""
    for size in SIZES:
        try:
            model = timm.create_model(name, num_classes=CLASSES).train()
            model(torch.zeros(2, 3, size, size)).sum().backward()
            return size
        except Exception:  # whatever timm says of images that are too small
            continue
    return None


def noise(size: int) -> Data:
    """64 training and 16 validation images that have nothing to learn in them."""
    x = torch.randint(256, (80, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = torch.arange(80) % CLASSES
    names = tuple("abcd")
    return in_memory("noise", (x[:64], y[:64]), (x[64:], y[64:]), names, None, 3, "cpu", flip=True)


def try_run(name: str) -> dict:
    """The row of a network."""
    started, row = time.perf_counter(), {"model": name, "img_size": smallest_size(name)}
    if row["img_size"] is None:
        return row | {"end": "not run", "reason": "plain timm trains it on none of the sizes"}
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(said), redirect_stderr(said):
        run = Path(folder) / "run"
        try:
            how = {"search_epochs": 2, "epochs": 1, "batch_size": 16, "workers": 0}
            result = dnas.search(name, budget="50%", data=noise(row["img_size"]), output=str(run), **how)
            budget = result.metrics["budget"][0]
            row |= {"end": "done", "reached": round(budget["reached"] / budget["limit"], 3)}
        except UserError as error:
            row |= {"end": "failed" if run.exists() else "refused", "reason": str(error)}
        except Exception as error:
            row |= {"end": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Try networks until there are ``--count`` rows; count how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="networks in all (default 40)")
    parser.add_argument("--summary", action="store_true", help="only count the rows")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    known = {row["model"] for row in rows}
    for name in [] if args.summary else drawn():
        if len(rows) >= args.count:
            break
        if name in known or sum(p.numel() for p in timm.create_model(name).parameters()) > MOST_PARAMS:
            continue
        rows.append(try_run(name) | {"date": date.today().isoformat()} | provenance(torch.device("cpu")))
        with open(ROWS, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print({k: rows[-1].get(k) for k in ("model", "img_size", "end", "reached", "reason", "seconds")}, flush=True)
    for end in ("done", "refused", "failed", "not run"):
        found = [row for row in rows if row["end"] == end]
        print(f"{end}: {len(found)}")
        for row in found if end in ("refused", "failed") else ():
            print(f"  {row['model']} at {row['img_size']} px: {row['reason']}")


if __name__ == "__main__":
    main()
