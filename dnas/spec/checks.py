"""Data from a file, checked entry by entry: what is wrong is told in one line that names the entry."""

import json
import math
import re
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

MAX_BYTES = 10_000_000  # of a config.json, which has the names of all classes, or a metrics.json


_FLAG = re.compile(r"(?<![\w'\"-])--([a-z][a-z0-9-]*)(?:/-[a-z])?")


class UserError(ValueError):
    """The user's mistake, told in one line that quotes what was given and what is allowed; the command exits with 2.

    The text that it is made of names flags (``--batch-size``), which is what the command line prints. `str` names the
    arguments of a Python function (``batch_size``).
    """

    def __str__(self) -> str:
        return _FLAG.sub(lambda found: found[1].replace("-", "_"), self.with_flags)

    @property
    def with_flags(self) -> str:
        """The text for the command line."""
        return str(self.args[0]) if self.args else ""


def fail(where: str, value: object, allowed: str) -> NoReturn:
    """Raise a UserError that says what ``where`` is and what it must be."""
    try:
        shown = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of thousands of digits
        shown = "a huge number"
    where = where if len(where) <= 200 else where[:197] + "..."  # it may have keys from the file in it
    raise UserError(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}: it must be {allowed}")


def check(where: str, value: Any, allowed: Any) -> None:
    """Raise UserError, naming the entry, unless ``value`` is ``allowed``; types are exact, so that True is no 1.

    ``allowed`` is data: a dict has exactly these keys; a list is [entry, how many]; a range holds whole numbers and a
    tuple known values; `str` is a short line of text, `float` any finite number, `dict` any plain dict. A function is
    called with the value, and returns it or raises UserError.
    """
    kind, parts = type(value), []
    if isinstance(allowed, dict):
        ok, text = kind is dict and value.keys() == allowed.keys(), f"a dict with the keys {', '.join(allowed)}"
        if kind is dict and not ok:
            odd = ", ".join(sorted(map(repr, value.keys() ^ allowed.keys())))[:80]
            raise UserError(f"{where} has missing or unknown keys, {odd}: it must be {text}")
        parts = [(f"{where}.{key}", key, entry) for key, entry in allowed.items()]
    elif isinstance(allowed, list):
        entry, sizes = allowed
        ok, text = kind is list and len(value) in sizes, f"a list of {sizes[0]} to {sizes[-1]} entries"
        parts = [(f"{where}[{i}]", i, entry) for i in range(len(value) if ok else 0)]
    elif isinstance(allowed, range):
        ok, text = kind is int and value in allowed, f"a whole number from {allowed[0]} to {allowed[-1]}"
    elif isinstance(allowed, tuple):
        ok = any(kind is type(known) and value == known for known in allowed)
        text = f"one of {', '.join(map(str, allowed))}"
    elif isinstance(allowed, FunctionType):
        try:
            allowed(value)
        except UserError as error:
            raise UserError(f"{where}: {error.with_flags}") from None
        ok, text = True, ""
    elif allowed is str:
        ok, text = kind is str and 1 <= len(value) <= 128 and value.isprintable(), "1 to 128 printable characters"
    elif allowed is float:
        ok, text = kind in (int, float) and abs(value) < math.inf, "a finite number"
    else:
        ok, text = kind is allowed, f"a {allowed.__name__}"
    if not ok:
        fail(where, value, text)
    for name, key, entry in parts:
        check(name, value[key], entry)


def parse_json(content: bytes, what: str, most: int) -> Any:
    """``content`` as JSON; UserError if it is longer than ``most`` bytes, something else, or not to be taken literally.

    That is: a key given twice, of which Python would silently take the last, NaN, or a number that is none (1e999).
    """

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:60]!r} is given twice")
        return found

    if len(content) > most:
        raise UserError(f"{what} is too large: at most {most} bytes are allowed")
    try:
        value = json.loads(content, object_pairs_hook=entries)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not strict JSON: {str(error).splitlines()[0]}") from None
    return value


def read_json(path: str | Path, most: int) -> Any:
    """The JSON in a file, see `parse_json`. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(most + 1), "the content", most)
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from None
