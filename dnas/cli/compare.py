"""``dnas compare``: several runs side by side."""

import argparse
from pathlib import Path

from rich.table import Table

from dnas.report.metrics import grouped, read_run
from dnas.report.pages import as_text, experiments, write_comparison
from dnas.runtime.progress import console
from dnas.runtime.run_folder import write_json
from dnas.spec.checks import UserError


def folders_of(given: list[str]) -> list[Path]:
    """The run folders that are meant: those given, and of a sweep those in it. Raises UserError for anything else."""
    found: list[Path] = []
    for text in given:
        folder = Path(text)
        inside = sorted(path.parent for path in folder.glob("*/metrics.json"))
        if (folder / "metrics.json").is_file() or not inside:
            found.append(folder)  # which `read_run` will refuse if it is no run
        else:
            found += inside
    return list(dict.fromkeys(found))


def main(args: argparse.Namespace, argv: list[str]) -> None:
    """Read, print, write."""
    for flag, path in (("--out", args.out), ("--json", args.json)):
        if path and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
            raise UserError(f"{flag} {path!r} is no file in a folder that exists")
    if args.out and not args.out.endswith(".html"):
        raise UserError(f"--out {args.out!r} does not end in .html")
    runs, wrong = [], []
    for folder in folders_of(args.runs):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            wrong.append(error)
    if not runs:
        raise wrong[0]
    for reason in wrong:
        console.print(f"left out: {reason.with_flags}", soft_wrap=True)
    counted = [run for group in grouped(runs) for run in group]
    for run_ in runs:
        if run_ not in counted:
            console.print(f"left out: {run_.folder} repeats the seed of a run like it", soft_wrap=True)
    rows = experiments(runs)
    heads, cells = as_text(rows)
    table = Table(*heads)
    for row in cells:
        table.add_row(*row)
    console.width = max(console.width, 160)  # a terminal that is narrower breaks the lines; figures stay whole
    console.print(table)
    if args.json:
        write_json(Path(args.json), rows)
    if args.out:
        write_comparison(Path(args.out), runs)
        console.print(f"page: {args.out}", soft_wrap=True)
