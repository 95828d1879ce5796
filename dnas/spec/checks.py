"""Checks of data from a file, entry by entry. An error is one line that names the wrong entry."""

import difflib
import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

MAX_BYTES = 10_000_000  # of a config.json, which has the names of all classes, or of a metrics.json


_FLAG = re.compile(r"(?<![\w'\"-])--([a-z][a-z0-9-]*)(?:/-[a-z])?")


class UserError(ValueError):
    """A user's mistake. The message is one line that quotes the mistake and says what is allowed; the exit code is 2.

    The message names flags (``--batch-size``), and the command line prints it unchanged. `str` replaces each flag by
    the argument of a Python function (``batch_size``).
    """

    def __str__(self) -> str:
        return _FLAG.sub(lambda found: found[1].replace("-", "_"), self.with_flags)

    @property
    def with_flags(self) -> str:
        """The message for the command line."""
        return str(self.args[0]) if self.args else ""


def first_line(error: Exception) -> str:
    """The first line of an error's text; the name of its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def told(error: Exception) -> str:
    """The type of an error and the first line of its text, as ``TypeError: text``."""
    return ": ".join(dict.fromkeys([type(error).__name__, first_line(error)]))


def near_names(name: str, known: Collection[str], least: float = 0.3) -> str:
    """Up to four names that are at least so like ``name``, as ``near: a, b``; the first four if there are none."""
    near = difflib.get_close_matches(name, known, 4, least) or [*known][:4]
    return f"near: {', '.join(near) or 'none'}"


def fail(where: str, value: object, allowed: str) -> NoReturn:
    """Raise a UserError: the entry ``where`` is ``value``, but it must be ``allowed``."""
    try:
        shown = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of thousands of digits
        shown = "a huge number"
    where = where if len(where) <= 200 else where[:197] + "..."  # it may contain long keys from the file
    raise UserError(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}: it must be {allowed}")


def check(where: str, value: Any, allowed: Any) -> None:
    """Raise UserError with the name of the entry unless ``value`` is ``allowed``. Types must be equal: True is not 1.

    ``allowed`` is data:

    * a dict: a dict with exactly these keys, whose entries are checked in the same way;
    * a list [entry, sizes]: a list with a length in the range ``sizes``, whose elements are checked against ``entry``;
    * a range: a whole number in this range;
    * a tuple: one of its elements;
    * `str`: 1 to 128 printable characters;
    * `float`: a finite number, which may be an int;
    * any other type, such as `dict` or `int`: a value of exactly this type.
    * a function: it is called with the value and raises UserError.
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
    """``content`` as strict JSON. Errors call it ``what``.

    Raises UserError if it is longer than ``most`` bytes, is not JSON, gives a key twice (Python would silently take the
    last one), or has a number that is NaN or infinite (1e999).
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
        raise UserError(f"{what} is not strict JSON: {first_line(error)}") from None
    return value


def read_json(path: str | Path, most: int) -> Any:
    """The JSON in a file. Raises UserError if the file cannot be read or is not strict JSON (`parse_json`)."""
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(most + 1), "the content", most)
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from None
