"""``dnas retrain``: train a found net from scratch, by any recipe."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from timm.utils import random_seed

from dnas.cli.inputs import check_same_data, data_of, device_of, new_folder, recipe_of, say_data
from dnas.export.model_file import build_net, check_name, read_arch, save_weights, verify_export, write_export
from dnas.report.metrics import read_run
from dnas.runtime.checkpoint import WORTH_KEEPING
from dnas.runtime.progress import console
from dnas.runtime.run_folder import provenance, run_folder, write_json
from dnas.runtime.signals import stop
from dnas.spec.budget import show
from dnas.spec.checks import MAX_BYTES, UserError, read_json
from dnas.training.from_scratch import train_from_scratch
from dnas.workflow import in_steps


def inherit_data(args: argparse.Namespace, source: Path) -> None:
    """Data flags that were not given: as in the config.json of the run. UserError if that does not tell which data."""
    config = (source if source.is_dir() else source.parent) / "config.json"
    if args.data_dir or args.dataset:
        return
    if not config.is_file():
        raise UserError(f"{config} is not there to say which data: --data-dir or --dataset is needed")
    try:
        saved = read_json(config, MAX_BYTES)["args"]
        args.data_dir, args.dataset = str(saved["data_dir"]), str(saved["dataset"])
    except (UserError, KeyError, TypeError):
        raise UserError(f"{config} does not tell the data of the run: --data-dir or --dataset is needed") from None


def before(source: Path, args: argparse.Namespace) -> str:
    """What the run that the net is from said of it, if it is a complete one on the same data."""
    try:
        run = read_run(source if source.is_dir() else source.parent)
    except UserError:
        return ""
    same = all(run.args.get(key) == getattr(args, key) for key in ("data_dir", "dataset"))
    return f" ({run.metrics['found']['top1']:.2f} % in {source})" if same else ""


def main(args: argparse.Namespace, argv: list[str]) -> None:
    """Read arch.json, train, write everything beside the new weights."""
    if not (args.run and args.output):
        raise UserError("a run folder and --output are expected, or --resume")
    recipe, device = recipe_of(args), device_of(args)
    folder = Path(args.output) if args.resume else new_folder(args.output)
    source = Path(args.run)
    document = read_arch(source / "arch.json" if source.is_dir() else source)
    inherit_data(args, source)
    args.img_size, args.in_chans = args.img_size or document["img_size"], args.in_chans or document["in_chans"]
    data = data_of(args, device)
    for key in ("num_classes", "in_chans", "img_size"):
        if document[key] != getattr(data, key):
            raise UserError(f"{source} was found for {key} {document[key]}, the data has {getattr(data, key)}")
    if args.resume:
        check_same_data(read_json(folder / "config.json", MAX_BYTES), data, str(folder))
    say_data(data)
    document |= {"mean": data.mean, "std": data.std, "name": args.name or document["name"]}
    check_name(document["name"])
    random_seed(args.seed)
    rates = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    model = build_net(document["net"], num_classes=data.num_classes, in_chans=data.in_chans, **rates).to(device)
    steps = recipe.epochs * len(data.train_batches(recipe.batch_size, seed=args.seed))
    costs = {metric: document[metric] for metric in ("macs", "params")}
    config = {"argv": argv, "args": vars(args), "recipe": asdict(recipe), "provenance": provenance(device)}
    config |= {"class_names": data.class_names, "data": data.summary}
    with run_folder(folder, keep_if=WORTH_KEEPING):
        if not args.resume:
            write_json(folder / "config.json", config)
        journal = stop.journal(folder, device, args.checkpoint_every)
        if not (folder / "metrics.json").exists():
            train = partial(train_from_scratch, model, data, recipe, seed=args.seed)
            row = in_steps(train, journal, document["name"], steps)[1]
            write_export(folder, document)
            save_weights(model, folder)
            verify_export(folder)
            metrics = {"budget": document["budget"], "validation_images": data.num_val, "found": costs | row}
            write_json(folder / "metrics.json", metrics)
        journal.close()
    row = read_json(folder / "metrics.json", MAX_BYTES)["found"]
    reached = ", ".join(show(m, cost) for m, cost in costs.items())
    console.print(f"{document['name']}: {reached}, top-1 {row['top1']:.2f} %{before(source, args)}", soft_wrap=True)
    console.print(f"files: {folder}/model.py, model.safetensors, arch.json, metrics.json, config.json", soft_wrap=True)
