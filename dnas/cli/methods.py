"""``dnas methods``: every way to choose a network."""

import argparse

from dnas.methods.catalog import METHODS
from dnas.methods.method import Method
from dnas.runtime.progress import console


def facts(method: Method) -> dict[str, str]:
    """What a user wants to know of a method, by name. The work is in trainings of the widest net."""
    return {
        "decides": method.summary,
        "needs": method.needs,
        "trainings": f"{sum(method.work(method.config())):g}",
        "deviations": method.deviations,
        "source": method.source,
    }


def main(args: argparse.Namespace, argv: list[str]) -> None:
    """Print the facts of each method."""
    for name, method in METHODS.items():
        console.print(name, style="bold")
        for what, text in facts(method).items():
            console.print(f"    {what + ':':12} {text}", soft_wrap=True, highlight=False)
    console.print("dnas search --method NAME ...; dnas search --method NAME --help explains its flags", soft_wrap=True)
