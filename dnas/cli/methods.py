"""``dnas methods``: every way to choose a network."""

import argparse
from dataclasses import fields

from rich.table import Table

from dnas.methods.catalog import METHODS
from dnas.runtime.progress import console


def main(args: argparse.Namespace, argv: list[str]) -> None:
    """Print a table with a row for each method."""
    table = Table("method", "chooses", "flags", "source")
    for name, method in METHODS.items():
        flags = " ".join(f"--{field.name.replace('_', '-')}" for field in fields(method.config))
        table.add_row(name, method.summary, flags, method.source)
    console.print(table)
    console.print("dnas search --method NAME ...; dnas search --method NAME --help explains its flags", soft_wrap=True)
