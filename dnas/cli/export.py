"""``dnas export``: write a timm model file from an architecture file, or check one that is there."""

import argparse
import shutil
from pathlib import Path

from dnas.cli.inputs import own_of
from dnas.export.model_file import check_name, read_arch, write_export
from dnas.export.own_file import PROGRAM
from dnas.export.verify import verify_export
from dnas.runtime.progress import console
from dnas.runtime.run_folder import check_new_folder, run_folder
from dnas.spec.budget import show
from dnas.spec.checks import UserError


def main(args: argparse.Namespace, argv: list[str]) -> None:
    """Read and validate arch.json, write model.py under the name asked for, see that plain timm builds it."""
    path = Path(args.arch) / "arch.json" if Path(args.arch).is_dir() else Path(args.arch)
    own = own_of(args)
    document = read_arch(path, own)
    if own and "own" not in document["net"]:
        raise UserError(f"--model-file {args.model_file!r}: {args.arch} has no network of your own")
    if args.check == bool(args.output):
        raise UserError("exactly one of --output FOLDER and --check is needed")
    if args.check and path.name != "arch.json":
        raise UserError(f"--check looks at a run folder, or at the arch.json in one, not at {args.arch!r}")
    try:
        if args.check:
            folder = path.parent
            figures = verify_export(folder)
            if not figures:
                raise UserError(f"{folder} has no {PROGRAM}, which a network that a program gave is exported to")
        else:
            if args.name:
                check_name(args.name)
                document["name"] = args.name
            folder, weights = check_new_folder(args.output), path.with_name("model.safetensors")
            with run_folder(folder):
                write_export(folder, document, own)
                if weights.exists():
                    shutil.copy(weights, folder)
                figures = verify_export(folder)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    console.print(
        f"{document['name']} in {folder}: {show('macs', figures['macs'])}, "
        f"{show('params', document['params'])}, built without dnas",
        soft_wrap=True,
    )
