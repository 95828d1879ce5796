"""The command line: ``dnas search``, ``dnas retrain`` and so on. Flags are read here, and only here.

`flags` and `parsers` say which flags there are, `inputs` what they mean, and a file a command what it does.

OpenMP's threads spin while they wait, by default for long. Where other processes keep the cores busy, every step then
becomes several times slower. So before torch is imported they are told to let others run soon.
``OMP_WAIT_POLICY=PASSIVE`` helps there a little more, but makes steps slower where nothing else runs.
"""

import os
import sys
from functools import partial
from importlib import import_module

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

COMMANDS = {
    "search": "from a budget to a trained timm model, compared with what costs nothing to choose",
    "retrain": "train a found network from scratch, by any recipe",
    "export": "write model.py from an arch.json, or check one",
    "profile": "measure a latency table on this device",
    "compare": "several runs side by side",
    "methods": "every way to choose a network, with its flags and its source",
}


def command(name: str) -> None:
    """Run one command with the arguments of the process; ends the process where something is wrong.

    Flags are read before torch is imported, which takes seconds.
    """
    from dnas.cli.parsers import read
    from dnas.spec.checks import UserError

    sys.argv[0] = f"dnas {name}"
    try:
        args, argv = read(name, sys.argv[1:])
    except UserError as error:
        print(f"error: {error.with_flags}", file=sys.stderr)
        sys.exit(2)
    from dnas.cli.process import run

    run(partial(import_module(f"dnas.cli.{name}").main, args, argv))


def main() -> None:
    """The program ``dnas``: its first argument names the command."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print("usage: dnas COMMAND ...; dnas COMMAND --help lists the flags\n")
        print("\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        return
    if name not in COMMANDS:
        print(f"error: command {name!r} is not one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    command(name)
