#!/usr/bin/env python3
"""``dnas retrain``, from a checkout."""

from dnas.cli import command

if __name__ == "__main__":
    command("retrain")
