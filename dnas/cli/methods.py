"""Every way to choose a network: what it decides, from what, its source, and its flags.

dnas methods
"""

from dataclasses import fields

from rich.table import Table

from dnas.cli.flags import OneLineParser
from dnas.methods.catalog import METHODS
from dnas.runtime.progress import console


def main() -> None:
    """Print a table with a row for each method."""
    OneLineParser(description=__doc__).parse_args()
    table = Table("method", "chooses", "flags", "source")
    for name, method in METHODS.items():
        flags = " ".join(f"--{field.name.replace('_', '-')}" for field in fields(method.config))
        table.add_row(name, method.summary, flags, method.source)
    console.print(table)
    console.print("dnas search --method NAME ...; dnas search --method NAME --help explains its flags", soft_wrap=True)
