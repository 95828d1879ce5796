"""The flags of each command. Nothing here imports torch, so that a wrong flag is reported at once."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields

from dnas.cli.flags import (
    ModelKwargs,
    OneLineParser,
    add_data_flags,
    add_group_flags,
    add_img_size,
    add_model_file,
    add_recipe_flags,
    add_resume_flags,
    add_space_flags,
    resumed,
)
from dnas.methods.settings import CONFIGS
from dnas.spec.latency_table import DTYPES, RUNTIMES


def search(argv: Sequence[str] = ()) -> OneLineParser:
    """From a budget to a trained timm model: search, choose, export, train, compare with uniform and balanced.

    dnas search --budget 300MFLOPs
    """
    p = OneLineParser(description=search.__doc__)
    goal = p.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget",
        help="300MFLOPs (= MMACs), 5MParams, 1.2ms, 50%% (of the widest net) or 50%%Params; "
        "several, joined by commas, all hold",
    )
    goal.add_argument("--sweep", help="instead: a net for each budget, as 100MFLOPs,200MFLOPs; shared warm-up")
    add_resume_flags(p, goal)
    p.add_argument("--method", choices=list(CONFIGS), default="gates", help="method of the search (default gates)")
    add_space_flags(p)
    add_group_flags(p)
    add_model_file(p, "instead: a function without arguments in a file of yours, which returns any torch network")
    p.add_argument("--latency-table", help="for a budget in ms: latency table of dnas profile")
    p.add_argument(
        "--latency-for",
        nargs="*",
        default={},
        action=ModelKwargs,
        help="properties that the latency table must have: batch=32 dtype=float16 ...",
    )
    p.add_argument("--latency-anyway", action="store_true", help="use a table of another device or batch, too")
    p.add_argument("--pretrained", action="store_true", help="with --model: the search starts from timm's weights")
    p.add_argument(
        "--initial-checkpoint", help="with --model or --model-file: the search starts from the weights in this file"
    )
    p.add_argument(
        "--keep-weights",
        action="store_true",
        help="fine-tune the networks from the weights of the search, instead of training from scratch",
    )
    p.add_argument(
        "--arms",
        default="",
        help="trainings of the found net to compare: finetune (with --keep-weights), scratch-e (as many epochs as "
        "search and fine-tuning together), scratch-b (as much compute); several, joined by commas",
    )
    p.add_argument("--search-epochs", type=int, default=20, help="epochs of the search (default 20)")
    p.add_argument("--num-random", type=int, default=0, help="also train this many random nets at the same cost")
    p.add_argument(
        "--output",
        help="run folder (default runs/<supernet or model>-<budget>-<seed>); a sweep has a run folder per budget in it",
    )
    p.add_argument("--name", help="name of the exported model (default: dnas_ and the name of the run folder)")
    p.add_argument("--log", choices=["tensorboard"], help="also write the search's history to RUN/tensorboard")
    p.add_argument(
        "--dry-run", action="store_true", help="only the rehearsal: export and check the uniform net, train one step"
    )
    add_data_flags(p)
    add_recipe_flags(p)
    name = method_in(argv)  # the flags of a method are the fields of its config
    config = CONFIGS[name]
    group = p.add_argument_group(
        f"settings of --method {name} (times are shares of the whole search)" if fields(config) else ""
    )
    for field in fields(config):
        default = getattr(config(), field.name)
        how: dict = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        text = f"{field.metadata['help']} (default {default})"
        group.add_argument(f"--{field.name.replace('_', '-')}", default=default, help=text, **how)
    return p


def method_in(argv: Sequence[str]) -> str:
    """The method that a command line names; the default one where it names none, or one that does not exist."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    p.add_argument("--method", choices=list(CONFIGS), default="gates")
    try:
        return str(p.parse_known_args(list(argv))[0].method)
    except argparse.ArgumentError:  # the whole parser will say what is wrong
        return "gates"


def retrain(argv: Sequence[str] = ()) -> OneLineParser:
    """Train a found net from scratch, by any recipe. Reads a run folder; writes a new one with weights and metrics.

    dnas retrain runs/my-run --epochs 100 --output runs/my-run-retrained
    dnas retrain --resume runs/my-run-retrained
    dnas retrain --resume runs/my-run-retrained --epochs 200
    """
    p = OneLineParser(description=retrain.__doc__)
    p.add_argument("run", nargs="?", help="run folder with an arch.json, or the arch.json itself")
    p.add_argument("--output", help="new run folder")
    p.add_argument("--name", help="name of the exported model (default: as in arch.json)")
    add_model_file(p, "for a network of your own: the file and function that the search had")
    p.add_argument("--initial-checkpoint", default="", help="start from the weights in this file, not from scratch")
    add_resume_flags(p, p)
    add_data_flags(p)
    p.set_defaults(in_chans=None)
    add_recipe_flags(p)
    return p


def export(argv: Sequence[str] = ()) -> OneLineParser:
    """Write a timm model file from an arch.json, or check a model file.

    dnas export runs/my-run/arch.json --output somewhere --name my_net
    dnas export runs/my-run --check
    """
    p = OneLineParser(description=export.__doc__)
    p.add_argument("arch", help="arch.json, or its run folder")
    p.add_argument("--output", help="new folder for model.py, arch.json and the weights, if any")
    p.add_argument("--name", help="name of the model (default: as in arch.json)")
    add_model_file(p, "for a network of your own: the file and function that the search had")
    p.add_argument(
        "--check", action="store_true", help="only check the folder: does plain timm build the net of arch.json?"
    )
    return p


def profile(argv: Sequence[str] = ()) -> OneLineParser:
    """Measure the latency of the parts of a search space on this device, for budgets in milliseconds.

    dnas profile --supernet prunet --img-size 224 --out mine.json
    dnas profile --check mine.json
    dnas profile --list latency_tables/*.json
    """
    p = OneLineParser(description=profile.__doc__)
    p.add_argument("--out", help="file of the table; an interrupted run keeps its measurements beside it")
    p.add_argument("--check", metavar="TABLE", help="instead: predict and measure random nets; TABLE gets the result")
    p.add_argument("--list", nargs="+", metavar="TABLE", help="instead: list tables and the results of their checks")
    add_space_flags(p)
    add_img_size(p, "side of the images in pixels, or height and width (default 224)", default=224)
    p.add_argument("--in-chans", type=int, default=3, help="image channels (default 3)")
    p.add_argument("--num-classes", type=int, default=1000, help="classes of the classifier (default 1000)")
    group = p.add_argument_group("how the networks will run")
    group.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is a GPU)")
    group.add_argument("--runtime", choices=RUNTIMES, help="default: cudagraph on a GPU, eager on a CPU")
    group.add_argument("--amp", action="store_true", help="weights and maps in --amp-dtype instead of float32")
    group.add_argument("--amp-dtype", choices=DTYPES[1:], default="float16", help="default float16")
    group.add_argument("--batch-size", "-b", type=int, default=1, help="images per run (default 1)")
    group.add_argument("--threads", type=int, help="CPU threads (default: as torch)")
    group.add_argument("--channels-last", action="store_true", help="memory format of weights and images")
    group = p.add_argument_group("how parts are measured")
    group.add_argument(
        "--rounds", type=int, default=25, help="blocks of runs of each unit; the median counts (default 25)"
    )
    group.add_argument("--block-ms", type=float, default=10.0, help="length of a block (default 10)")
    group.add_argument(
        "--tolerance", type=float, default=0.05, help="error of interpolation between widths (default 0.05)"
    )
    group.add_argument(
        "--scale-nets", type=int, default=20, help="whole nets to scale the sum of parts by (default 20)"
    )
    group.add_argument("--check-nets", type=int, default=50, help="random nets of a check (default 50)")
    return p


def compare(argv: Sequence[str] = ()) -> OneLineParser:
    """Several runs side by side: a table, and a page with top-1 against cost. For a sweep, name its folder.

    dnas compare runs/* --out compared.html
    """
    p = OneLineParser(description=compare.__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or the folder of a sweep")
    p.add_argument("--out", help="write a page with pictures to this file (.html)")
    p.add_argument("--json", help="write the table to this file, as JSON with all figures")
    return p


def methods(argv: Sequence[str] = ()) -> OneLineParser:
    """The methods: for each, its decisions, its needs, its source and its flags.

    dnas methods
    """
    return OneLineParser(description=methods.__doc__)


PARSERS: dict[str, Callable[[Sequence[str]], OneLineParser]] = {
    "search": search,
    "retrain": retrain,
    "export": export,
    "profile": profile,
    "compare": compare,
    "methods": methods,
}


def read(name: str, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a command, and the words that they are in: those of the run that ``--resume`` names.

    Raises UserError for a wrong flag, and for a run that cannot be resumed.
    """
    args = PARSERS[name](argv).parse_args(argv)
    if getattr(args, "resume", None) is None:
        return args, argv
    return resumed(PARSERS[name], args.resume, argv, may_train_on=name == "retrain")
