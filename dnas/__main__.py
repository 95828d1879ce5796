"""``python -m dnas`` is the command ``dnas``."""

from dnas.cli import main

main()
