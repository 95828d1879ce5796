#!/usr/bin/env python3
"""``dnas compare``, from a checkout."""

from dnas.cli import command

if __name__ == "__main__":
    command("compare")
