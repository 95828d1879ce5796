"""Whatever is in a file, its loader takes it for what it is or says what is wrong in one line.

The short form tries a few hundred files; `make test-faults` takes $DNAS_FUZZ_SECONDS (default 330) for three loaders
together and prints how many it tried.
"""

import copy
import json
import os
import time

import pytest
from documents import document
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tables import HEADER, row

from dnas.cli import parsers
from dnas.export.model_file import build_net, count_macs, read_arch
from dnas.spec.checks import UserError
from dnas.spec.latency_table import read_table

STRANGE = ["__import__('os').system('x')", "../../etc/passwd", "a\nb", "\x00", "ir", "in", "nan", "é" * 300, ""]
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(STRANGE),
)  # fmt: skip
values = st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=4))


def places(value, at=()):
    """The path of every entry of a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*at, key)
        yield from places(entry, (*at, key))


@st.composite
def damaged(draw, whole):
    """The bytes of a document in which entries were changed, taken out or added; or in which bytes were."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from([*places(found)] or [("x",)]))
        parent = found
        for key in path:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "like", "remove", "add"]))
        if what == "replace":
            parent[last] = draw(values)
        elif what == "like":  # of the right kind, and so likely to get further
            old = parent[last]
            number = type(old) in (int, float)
            parent[last] = old * draw(st.sampled_from([-1, 0, 2, 10**6])) + draw(st.integers(-1, 1)) if number else old
        elif what == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = draw(values)
        else:
            parent.insert(last, draw(values))
    text = json.dumps(found).encode()
    if draw(st.booleans()):
        return text
    at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 3))
    return text[:at] + draw(st.binary(max_size=4) | st.just(b"[" * 20_000)) + text[at + length :]


def load_arch(path):
    """An arch that is taken can be built, and is what it says."""
    found = read_arch(path)
    if found["params"] < 10**7 and found["macs"] < 10**8:
        net = build_net(found["net"], num_classes=found["num_classes"], in_chans=found["in_chans"])
        assert sum(p.numel() for p in net.parameters()) == found["params"]
        assert count_macs(net, found["in_chans"], found["img_size"]) == found["macs"]


def load_table(path):
    """A table that is taken has a time for each of its units, within those of its rows."""
    for unit in read_table(path).units.values():
        assert unit.ms.min() >= 0


def load_config(path):
    try:
        args, _ = parsers.read("search", ["--resume", str(path.parent)])
    except SystemExit as stop:  # argparse has said what is wrong
        raise UserError(f"exit {stop.code}") from None
    assert args.output == str(path.parent)


CONFIG = {"argv": ["--budget", "50%", "-b", "32", "--supernet", "toy", "--lr", "0.01"], "args": {}, "provenance": {}}
TABLE = HEADER | {"rows": [row("run", 0.01), row("u", 1.0, out=8), row("u", 2.0, out=16)]}
KINDS = {
    "arch.json": (document(), load_arch),
    "table.json": (TABLE, load_table),
    "config.json": (CONFIG, load_config),
}


def fuzz(name, folder, number, examples):
    """Try so many files. Returns (tried, taken)."""
    whole, load = KINDS[name]
    counts = [0, 0]

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(damaged(whole))
    def one(content):
        (folder / name).write_bytes(content)
        counts[0] += 1
        try:
            load(folder / name)
            counts[1] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, error

    one()
    return counts


@pytest.mark.parametrize("name", KINDS)
def test_a_few_hundred_files(name, tmp_path, capsys):
    KINDS[name][1](_written(tmp_path / name, KINDS[name][0]))  # undamaged, it is taken
    tried, taken = fuzz(name, tmp_path, 0, 200)
    assert tried >= 200 and 0 < taken < tried


def _written(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", ["arch.json", "table.json"])
def test_a_long_key_is_not_quoted_whole(name, tmp_path):
    """Found by the long form: at every place of the document where there is a dict."""
    whole, load = KINDS[name]
    for place in [(), *places(whole)]:
        found = copy.deepcopy(whole)
        at = found
        for key in place:
            at = at[key]
        if isinstance(at, dict) and place[:1] not in (("answers",), ("provenance",), ("protocol",)):
            at["[" * 20_000] = 1
            with pytest.raises(UserError) as told:
                load(_written(tmp_path / name, found))
            assert len(str(told.value)) < 1000 and "\n" not in str(told.value)


@pytest.mark.faults
def test_for_minutes(tmp_path, capsys):
    seconds, started, number = float(os.environ.get("DNAS_FUZZ_SECONDS", "330")), time.monotonic(), 0
    totals = {name: [0, 0] for name in KINDS}
    while time.monotonic() - started < seconds:
        number += 1
        for name in KINDS:
            totals[name] = [a + b for a, b in zip(totals[name], fuzz(name, tmp_path, number, 300), strict=True)]
    with capsys.disabled():
        print("".join(f"\n{name}: {tried} files, {taken} taken" for name, (tried, taken) in totals.items()))
    assert all(taken for _, taken in totals.values())
