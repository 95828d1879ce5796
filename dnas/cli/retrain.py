"""``dnas retrain``: train a found net from scratch, by any recipe, on any data; or train one on."""

import argparse
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.utils import random_seed
from torch import Tensor, nn

from dnas.cli.inputs import check_same_data, data_of, device_of, new_folder, own_of, recipe_of, say_data
from dnas.export.arch_schema import DATA, SIZES
from dnas.export.model_file import arch_document, build_net, check_name, read_arch, save_weights, write_export
from dnas.export.own_file import needed
from dnas.export.verify import verify_export
from dnas.nets.own_base import Own
from dnas.nets.own_supernet import check_logits
from dnas.nets.timm_space import TimmBase, sized
from dnas.report.metrics import read_run
from dnas.runtime.checkpoint import BEFORE, LAST, WORTH_KEEPING
from dnas.runtime.distributed import gathered, rank
from dnas.runtime.progress import console
from dnas.runtime.run_folder import provenance, run_folder, write_json
from dnas.runtime.signals import stop
from dnas.spec.budget import show
from dnas.spec.checks import MAX_BYTES, UserError, first_line, read_json
from dnas.spec.image_size import ImgSize, as_size, plain_size, sides
from dnas.training.batches import Data
from dnas.training.criterion import make_criterion
from dnas.training.freeze import check_patterns
from dnas.training.from_scratch import train_from_scratch
from dnas.training.loop import steps_per_epoch
from dnas.training.teacher import make_teacher
from dnas.training.weights import load_weights, read_weights
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


def resized(net: dict[str, Any], img_size: ImgSize) -> dict[str, Any]:
    """The network of an arch document for images of another size. timm builds some networks for one size of images.

    Raises UserError if timm cannot build it for this size.
    """
    if "base" not in net:
        return net
    kwargs = net["kwargs"] | ({"img_size": plain_size(img_size)} if "img_size" in net["kwargs"] else {})
    base = sized(TimmBase(net["base"], 1000, img_size=img_size, kwargs=kwargs))
    base.create(device="meta")
    return net | {"kwargs": dict(base.kwargs)}


def for_data(found: dict[str, Any], data: Data, name: str, own: Own | None) -> dict[str, Any]:
    """The arch document ``found`` for these data: its network with their classes, channels and image size.

    The costs are counted again. A budget held for the data of the search: it goes if they have other sizes.
    """
    shown = {key: getattr(data, key) for key in DATA}
    same = as_size(found["img_size"]) == as_size(data.img_size)
    here = arch_document(
        name,
        found["net"] if same else resized(found["net"], data.img_size),
        shown,
        supernet=found["supernet"],
        answers=found["answers"],
        provenance=found["provenance"],
        own=own,
    )
    changed = [key for key in SIZES if as_size(found[key]) != as_size(here[key])]  # as JSON has them
    if not changed:
        return here | {"budget": found["budget"]}
    sizes = ", ".join(f"{key} {here[key]} (was {found[key]})" for key in changed)
    costs = ", ".join(f"{show(m, here[m])} (was {show(m, found[m])})" for m in ("macs", "params"))
    console.print(f"the network was found for other data: {sizes}; it costs {costs}", soft_wrap=True)
    return here


def trained_on(folder: Path, config: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The config.json of a complete run that goes on to ``epochs`` epochs from its last weights.

    Raises UserError for a run that is not complete, or has as many epochs.
    """
    for name in ("metrics.json", "model.safetensors"):
        if not (folder / name).exists():
            raise UserError(f"--epochs {epochs}: {folder} has no {name}; --resume without --epochs goes on with it")
    try:
        done = int(read_json(folder / "metrics.json", MAX_BYTES)["found"]["epochs"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder}: its metrics.json does not say how many epochs it had") from None
    if epochs <= done:
        raise UserError(f"--epochs {epochs}: {folder} has {done} already, more are expected")
    args = config["args"] | {"epochs": epochs}
    return config | {"argv": [*config["argv"], f"--epochs={epochs}"], "args": args, "trained_before": done}


def load_trained(model: nn.Module, path: Path) -> None:
    """Put the weights of a run that trains on into its network. Raises UserError if they are damaged or another's."""
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{str(path)!r} does not hold the weights of this network: {reason}") from None


def start_from(model: nn.Module, found: dict[str, Tensor], path: str) -> None:
    """Put the weights of ``--initial-checkpoint`` into a network. Raises UserError if they do not fit."""
    if not load_weights(model, found, f"--initial-checkpoint {path!r}", any_classifier=True):
        console.print(f"the classifier of {path} does not fit the data: a new one is trained", soft_wrap=True)


def main(args: argparse.Namespace, argv: list[str]) -> None:
    """Read arch.json, train, write everything beside the new weights."""
    if not (args.run and args.output):
        raise UserError("a run folder and --output are expected, or --resume")
    recipe, device = recipe_of(args), device_of(args)
    if recipe.freeze and not args.initial_checkpoint:
        raise UserError(f"--freeze {recipe.freeze!r} goes with --initial-checkpoint: fresh weights have to learn")
    # Before data is read, which may take long. A run that goes on may not need them.
    fresh = args.initial_checkpoint and not args.resume
    weights = read_weights(args.initial_checkpoint, "--initial-checkpoint") if fresh else None
    folder = Path(args.output) if args.resume and rank() == 0 else new_folder(args.output)
    more = args.more_epochs if args.resume else None
    source = Path(args.run)
    own = own_of(args)
    found = read_arch(source / "arch.json" if source.is_dir() else source, own)
    if "own" in found["net"]:
        needed(found["net"], own)
    elif own:
        raise UserError(f"--model-file {args.model_file!r}: {args.run} has no network of your own")
    inherit_data(args, source)
    args.img_size, args.in_chans = args.img_size or as_size(found["img_size"]), args.in_chans or found["in_chans"]
    check_name(args.name or found["name"])
    data = data_of(args, device)
    criterion = make_criterion(recipe, data, make_teacher(recipe, data, device))
    config: dict[str, Any] = {
        "argv": argv,
        "args": vars(args),
        "recipe": asdict(recipe),
        "provenance": provenance(device),
    }
    config |= {"class_names": data.class_names, "data": data.summary}
    if args.resume:
        config = read_json(Path(args.output) / "config.json", MAX_BYTES)
        check_same_data(config, data, args.output)
        if more is not None:
            config = trained_on(Path(args.output), config, more)
            recipe = replace(recipe, epochs=more)
            config |= {"recipe": asdict(recipe)}
    say_data(data)
    document = for_data(found, data, args.name or found["name"], own)
    random_seed(args.seed)
    model = build_net(
        document["net"],
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        drop_rate=recipe.drop,
        drop_path_rate=recipe.drop_path,
        own=own,
    ).to(device)
    if own:
        check_logits(model, f"--model-file {args.model_file}", (data.in_chans, *sides(data.img_size)), data.num_classes)
    check_patterns(model, recipe.freeze)
    with tempfile.TemporaryDirectory() as aside:  # what comes after the training is tried before it
        write_export(aside, document, own)
        if rank() == 0:
            verify_export(aside)
    per_epoch = steps_per_epoch(data.train_batches(recipe.batch_size, seed=args.seed), recipe)
    first = int(config.get("trained_before", 0)) * per_epoch
    if first:
        load_trained(model, Path(args.output) / "model.safetensors")
    complete = gathered(more is None and (folder / "metrics.json").exists())[0]
    if args.initial_checkpoint and not (first or complete):
        weights = weights or read_weights(args.initial_checkpoint, "--initial-checkpoint")
        start_from(model, weights, args.initial_checkpoint)
    costs = {metric: document[metric] for metric in ("macs", "params")}
    with run_folder(folder, keep_if=WORTH_KEEPING):
        if not args.resume or more is not None:
            write_json(folder / "config.json", config)
        if more is not None and rank() == 0:
            for name in (BEFORE, LAST):  # of the training that is complete
                (folder / name).unlink(missing_ok=True)
            (folder / "metrics.json").rename(folder / f"metrics-{config['trained_before']}-epochs.json")
        journal = stop.journal(folder, device, args.checkpoint_every, Path(args.output))
        if not complete:
            train = partial(train_from_scratch, model, data, recipe, seed=args.seed, first=first, criterion=criterion)
            row = in_steps(train, journal, document["name"], recipe.epochs * per_epoch, first)[1]
            write_export(folder, document, own)
            save_weights(model, folder)
            verify_export(folder)
            metrics = {"budget": document["budget"], "validation_images": data.num_val, "found": costs | row}
            write_json(folder / "metrics.json", metrics)
        journal.close()
    if rank():
        return
    row = read_json(folder / "metrics.json", MAX_BYTES)["found"]
    reached = ", ".join(show(m, cost) for m, cost in costs.items())
    console.print(f"{document['name']}: {reached}, top-1 {row['top1']:.2f} %{before(source, args)}", soft_wrap=True)
    console.print(f"files: {folder}/model.py, model.safetensors, arch.json, metrics.json, config.json", soft_wrap=True)
