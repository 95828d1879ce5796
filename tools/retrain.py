#!/usr/bin/env python3
"""Train a found net from scratch, by any recipe: a run folder in, a new run folder with weights and metrics out.

python tools/retrain.py runs/my-run --epochs 100 --output runs/my-run-retrained
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cli import (
    OneLineParser,
    add_data_flags,
    add_recipe_flags,
    console,
    data_of,
    device_of,
    new_folder,
    progress_bar,
    recipe_of,
    run,
)
from timm.utils import random_seed

from dnas.export import build_net, read_arch, save_weights, verify_export, write_export
from dnas.runs import provenance, whole_folder, write_json
from dnas.train import train_from_scratch
from dnas.units import UserError, show


def inherit_data(args: argparse.Namespace, source: Path) -> None:
    """Data flags that were not given: as in the config.json of the run. UserError if that does not tell which data."""
    config = (source if source.is_dir() else source.parent) / "config.json"
    if args.data_dir or args.dataset:
        return
    if not config.is_file():
        raise UserError(f"{config} is not there to say which data: --data-dir or --dataset is needed")
    try:
        saved = json.loads(config.read_text())["args"]
        args.data_dir, args.dataset = str(saved["data_dir"]), str(saved["dataset"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{config} does not tell the data of the run: --data-dir or --dataset is needed") from None


def main() -> None:
    """Read arch.json, train, write everything beside the new weights."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("run", help="run folder with an arch.json, or the arch.json itself")
    parser.add_argument("--output", required=True, help="new run folder")
    add_data_flags(parser)
    parser.set_defaults(in_chans=None)
    add_recipe_flags(parser)
    args = parser.parse_args()
    recipe, device = recipe_of(args), device_of(args)
    folder = new_folder(args.output)
    source = Path(args.run)
    document = read_arch(source / "arch.json" if source.is_dir() else source)
    inherit_data(args, source)
    args.img_size, args.in_chans = args.img_size or document["img_size"], args.in_chans or document["in_chans"]
    data = data_of(args, device)
    for key in ("num_classes", "in_chans", "img_size"):
        if document[key] != getattr(data, key):
            raise UserError(f"{source} was found for {key} {document[key]}, the data has {getattr(data, key)}")
    document |= {"mean": data.mean, "std": data.std}
    random_seed(args.seed)
    rates = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    model = build_net(document["net"], num_classes=data.num_classes, in_chans=data.in_chans, **rates).to(device)
    steps = recipe.epochs * len(data.train_batches(recipe.batch_size, seed=args.seed))
    with progress_bar(f"training {document['name']}", steps) as advance:
        model, row = train_from_scratch(model, data, recipe, seed=args.seed, on_step=advance)
    with whole_folder(folder):
        write_export(folder, document)
        save_weights(model, folder)
        verify_export(folder)
        write_json(
            folder / "config.json", {"args": vars(args), "recipe": asdict(recipe), "provenance": provenance(device)}
        )
        costs = {metric: document[metric] for metric in ("macs", "params")}
        write_json(folder / "metrics.json", {"budget": document["budget"], "found": costs | row})
    console.print(
        f"{document['name']}: {', '.join(show(m, cost) for m, cost in costs.items())}, top-1 {row['top1']:.2f} %"
    )
    console.print(f"files: {folder}/model.py, model.safetensors, arch.json, metrics.json, config.json", soft_wrap=True)


if __name__ == "__main__":
    run(main)
