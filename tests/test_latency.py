"""Latency tables: interpolation, what is refused, the one formula over them, and the edges of a staircase."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from tables import HEADER, costs_of, row, rows_of, stairs

from dnas.latency.measured_parts import parts_of
from dnas.methods.budget_loss import budget_penalty
from dnas.methods.derive import derive, enumerate_archs, gate_likelihood
from dnas.methods.gates import GATES
from dnas.methods.loop import search
from dnas.methods.method import Task
from dnas.methods.rules import random_arch, uniform_arch
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.markov_gate import MarkovGate
from dnas.spec.budget import Budget, parse_budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from dnas.spec.latency_table import check_use, read_table, table_of, table_text, units_of
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage
from dnas.spec.recipe import Recipe
from dnas.spec.space import Decision, Site, Space
from dnas.training.data import load_data
from supernets.toy import toy

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("slots", [("out",), ("in", "out"), ("in", "mid", "out")])
def test_interpolation_is_scipys(slots):
    axes = [np.sort(RNG.choice(np.arange(4, 100, 4), size=4 + k, replace=False)) for k in range(len(slots))]
    ms = RNG.uniform(1, 5, [len(axis) for axis in axes])
    rows = [
        row("u", float(ms[at]), **{s: int(axes[k][at[k]]) for k, s in enumerate(slots)}) for at in np.ndindex(ms.shape)
    ]
    unit = units_of(rows)["u"]
    points = np.stack([RNG.integers(axis[0], axis[-1] + 1, 200) for axis in axes], 1)
    ends = np.array([[axis[0] for axis in axes], [axis[-1] for axis in axes]])
    points = np.concatenate([points, ends])
    found = unit.at(**{s: points[:, k] for k, s in enumerate(slots)})
    assert found == pytest.approx(RegularGridInterpolator(axes, ms)(points), rel=1e-12)
    at_once = unit.at(**{s: axis.reshape([-1 if j == k else 1 for j in range(len(slots))])
                         for k, (s, axis) in enumerate(zip(slots, axes, strict=True))})  # fmt: skip
    assert np.array_equal(at_once, ms)


def test_a_unit_without_widths_and_one_with_a_single_width():
    stem = [row("stem", ms, **{"in": 3, "out": out}) for ms, out in ((2.0, 8), (4.0, 16))]
    units = units_of([row("run", 0.25), *stem])
    assert units["run"].at() == 0.25
    assert units["stem"].at(**{"in": np.array(3), "out": np.array([8, 12, 16])}) == pytest.approx([2.0, 3.0, 4.0])


def test_the_scale_is_that_of_every_unit():
    rows = [row("run", 0.25) | {"params": 0}, row("u", 2.0, out=8) | {"params": 500_000}]
    table = table_of({"scale": 1.5, "ms_per_mparam": 0.4}, rows)
    assert table.units["run"].at() == 0.375
    assert table.units["u"].at(out=np.array(8)) == 3.0 + 0.5 * 0.4


def random_ms(unit, widths):
    return 0.1 + len(unit) / 100 + sum(math.sqrt(w) * (k + 1) for k, w in enumerate(widths.values()))


def test_one_formula():
    """Exact costs are sums over parts, expected ones are means over all networks by their probability."""
    net = MacroSupernet(toy())
    table = costs_of(net, random_ms)
    p = {d.name: torch.rand(len(d.options), dtype=torch.double) for d in net.space.decisions}
    p = {name: row / row.sum() for name, row in p.items()}
    mean, total = 0.0, 0.0
    for arch in enumerate_archs(net.space):
        ms = 0.0
        for part in parts_of(net):
            if all(arch.get(name) == option for name, option in part.site.when):
                ms += random_ms(part.site.op, {s: arch.get(w, w) for s, w in part.site.widths.items()})
        assert table.of(arch) == pytest.approx(ms, rel=1e-9)
        weight = math.prod(float(p[n][net.space.by_name[n].index(o)]) for n, o in arch.items())
        mean, total = mean + weight * ms, total + weight
    assert total == pytest.approx(1)
    assert float(table.expected(p)) == pytest.approx(mean, rel=1e-9)


def test_what_is_missing_is_listed():
    net = MacroSupernet(toy())
    rows, sites = rows_of(net, random_ms), [part.site for part in parts_of(net)]
    assert table_of(HEADER, rows).missing(net.space, sites) == []
    block = next(site for site in sites if site.op.startswith("ir k5"))
    top = net.space.by_name[block.widths["mid"]].options[-1]
    narrow = [r for r in rows if r["unit"] != block.op or r["widths"]["mid"] < top]
    (line,) = table_of(HEADER, narrow).missing(net.space, sites)
    assert line.startswith(f"{block.op} with mid ") and f" to {top}, where " in line
    without = [r for r in rows if r["unit"] != block.op]
    assert table_of(HEADER, without).missing(net.space, sites) == [block.op]
    with pytest.raises(UserError, match=f"lacks {block.op}: profile them"):
        CostTable.measured(net.space, sites, table_of(HEADER, without))


# Files.

GOOD = HEADER | {"rows": [row("run", 0.01), row("u", 1.0, out=8), row("u", 2.0, out=16)]}


def changed(path, value):
    def change(table):
        *way, last = path
        for step in way:
            table = table[step]
        if value is None:
            del table[last]
        else:
            table[last] = value

    return change


WRONG = [
    (changed(["schema"], 1), "schema is 1: it must be one of 2"),
    (changed(["schema"], None), "'schema'"),
    (changed(["extra"], 1), "'extra'"),
    (changed(["device"], 7), "device is 7"),
    (changed(["dtype"], "float8"), "dtype is 'float8'"),
    (changed(["runtime"], "magic"), "runtime is 'magic'"),
    (changed(["batch"], 0), "batch is 0"),
    (changed(["scale"], 0), "scale is 0"),
    (changed(["scale"], True), "scale is True"),
    (changed(["ms_per_mparam"], -0.5), "ms_per_mparam is -0.5"),
    (changed(["rows", 1, "params"], -1), "rows[1].params is -1"),
    (changed(["space"], {"supernet": 3}), "space.supernet is 3"),
    (changed(["space"], {"os": "rm"}), "space.os"),
    (changed(["rows"], []), "rows is []"),
    (changed(["rows"], {}), "rows is {}"),
    (changed(["rows", 1], 3), "rows[1] is 3"),
    (changed(["rows", 1, "ms"], -1.0), "rows[1] has p10 1.0, ms -1.0, p90 1.0: it must be 0 < p10 <= ms <= p90"),
    (changed(["rows", 1, "ms"], 0), "rows[1] has"),
    (changed(["rows", 1, "p10"], 3.0), "rows[1] has"),
    (changed(["rows", 1, "ms"], "fast"), "rows[1].ms is 'fast'"),
    (changed(["rows", 1, "ms"], None), "'ms'"),
    (changed(["rows", 1, "widths"], {"out": 8.5}), "rows[1].widths.out is 8.5"),
    (changed(["rows", 1, "widths"], {"out": -8}), "rows[1].widths.out is -8"),
    (changed(["rows", 1, "widths"], {"depth": 8}), "rows[1].widths has 'depth'"),
    (changed(["rows", 1, "widths"], {"out": 16}), "two rows of unit 'u' at out 16"),
    (changed(["rows", 1, "widths"], {"in": 8}), "the rows of unit 'u' have different widths"),
    (lambda t: t["rows"].extend(row("v", 1.0, **{"in": w, "out": w}) for w in (8, 9)),
     "the row of unit 'v' at in 8, out 9 is missing"),
]  # fmt: skip
TEXTS = {
    "truncated": (lambda text: text[: len(text) // 2], "not strict JSON"),
    "empty": (lambda text: "", "not strict JSON"),
    "binary": (lambda text: "\x80\x02}q\x00.", "not strict JSON"),
    "NaN": (lambda text: text.replace('"ms": 1.0', '"ms": NaN'), "not strict JSON"),
    "infinite": (lambda text: text.replace('"ms": 1.0', '"ms": 1e999'), "not strict JSON"),
    "a key twice": (lambda text: text.replace('"batch"', '"device": "other", "batch"'), "'device' is given twice"),
}


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_table(path)
    (line,) = str(caught.value).splitlines()
    assert str(path) in line and len(line) < 400
    return line


@pytest.mark.parametrize("change, said", WRONG, ids=[said for _, said in WRONG])
def test_wrong_tables(change, said, tmp_path):
    table = copy.deepcopy(GOOD)
    change(table)
    (tmp_path / "t.json").write_text(json.dumps(table))
    assert said in refusal(tmp_path / "t.json")


@pytest.mark.parametrize("damage, said", TEXTS.values(), ids=TEXTS)
def test_damaged_files(damage, said, tmp_path):
    text = table_text(GOOD, GOOD["rows"])
    assert damage(text) != text
    (tmp_path / "t.json").write_text(damage(text))
    assert said in refusal(tmp_path / "t.json")
    assert "cannot be read" in refusal(tmp_path / "absent.json")


def test_what_is_written_is_what_is_read(tmp_path):
    (tmp_path / "t.json").write_text(table_text(GOOD, GOOD["rows"]))
    assert json.loads((tmp_path / "t.json").read_text()) == GOOD
    table = read_table(tmp_path / "t.json")
    assert table.header == HEADER
    assert table.units["u"].at(out=np.array(12)) == 1.5


@pytest.mark.parametrize("asked", [{"device": "another"}, {"dtype": "float16"}, {"batch": 32}, {"runtime": "compile"}])
def test_a_table_of_something_else_needs_insisting(asked):
    table = table_of(HEADER, GOOD["rows"])
    check_use(table, {key: HEADER[key] for key in asked})
    ((key, value),) = asked.items()
    with pytest.raises(UserError, match=f"of {key} {HEADER[key]!r}, where {value!r} is asked for"):
        check_use(table, asked)
    check_use(table, asked, anyway=True)
    with pytest.raises(UserError, match="^latency_for color='red'"):
        check_use(table, {"color": "red"}, anyway=True)


# The staircase.

STAIRS = EfficientNetSpace(
    *("stairs", 128, 1, tuple(Stage(128, 1, stride, (Candidate("ir", 3, 1, 1),)) for stride in (2, 1)), 128, "relu"),
    *(False, 10, 1, 8, 8),
)


def on_edges(arch):
    return [width % 32 == 0 for width in arch.values()]


@pytest.mark.parametrize("seed", range(3))
def test_a_search_lands_on_the_edges_of_a_staircase(seed):
    torch.manual_seed(seed)
    net = MacroSupernet(STAIRS)
    tables = {"macs": CostTable.build(net.space, "macs"), "ms": costs_of(net, stairs)}
    middle = net.space.complete({d.name: 64 for d in net.space.decisions})
    budgets = resolve_budgets(tables, parse_budget(f"{1.01 * tables['ms'].of(middle)}ms"))
    data = load_data("digits", img_size=8, in_chans=1, device=torch.device("cpu"))
    rows = []
    recipe = Recipe(epochs=4, batch_size=64)
    search(GATES, net, Task(tables, budgets, data, recipe, GatesConfig(), seed), on_row=rows.append)
    found = derive(net.space, tables, budgets, gate_likelihood(net))
    assert 0.98 <= tables["ms"].of(found) / budgets[0].limit <= 1
    assert all(on_edges(found)), dict(found)
    assert all(on_edges(uniform_arch(net.space, tables, budgets)))
    assert not all(on_edges(random_arch(net.space, tables, budgets, seed=seed)))
    # Gates on a staircase hop to and fro between two steps of it: no single value says where they are.
    settled = [row["expected"]["ms"] for row in rows if row.get("target", {}).get("ms") == budgets[0].limit]
    assert len(settled) > 5 and np.median(settled) == pytest.approx(budgets[0].limit, rel=0.15)


def learn_width(expected, options):
    """The distribution of a gate that likes width (its logarithm) and has a budget of two steps of ``expected``."""
    gate = MarkovGate(options)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    like = torch.tensor(options).double().log()
    for _ in range(1000):
        p = gate.probabilities().double()
        loss = -(p @ like) + 20 * budget_penalty({"ms": expected(p)}, {"ms": 2.0})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gate.probabilities().detach().double().numpy()


def test_gates_stop_at_an_edge_if_the_steps_are_in_the_expectation_and_not_if_they_are_not():
    options = tuple(range(8, 136, 8))
    space = Space((Decision("w", options, 128),), (Site("u", "u", {"out": "w"}, {}),))
    rows = [row("u", float(math.ceil(w / 32)), out=w) for w in options]
    table = CostTable.measured(space, space.sites, table_of(HEADER, rows))
    p = learn_width(lambda p: table.expected({"w": p}), options)
    assert float(p[options.index(64)]) > 0.85
    assert float(table.expected({"w": torch.from_numpy(p)})) == pytest.approx(2, rel=0.05)

    def of_expected_width(p):
        """What `dnas.spec.cost` does not do: the latency of the expected width, between its neighbours on the grid."""
        grid, width = torch.tensor(options).double(), p @ torch.tensor(options).double()
        k = int(torch.searchsorted(grid, width.detach()).clamp(1, len(options) - 1))
        share = (width - options[k - 1]) / (options[k] - options[k - 1])
        return (1 - share) * math.ceil(options[k - 1] / 32) + share * math.ceil(options[k] / 32)

    # On a step it has no slope, and the gate does not come down at all.
    q = learn_width(of_expected_width, options)
    assert float(table.expected({"w": torch.from_numpy(q)})) > 3


def test_widths_that_cost_nothing_are_raised():
    net = MacroSupernet(STAIRS)
    table = costs_of(net, stairs)
    likes = {d.name: -np.abs(np.array(d.options) - 40.0) for d in net.space.decisions}
    arch = net.space.complete({d.name: 40 for d in net.space.decisions})
    budget = Budget("ms", table.of(arch) * 1.005)
    found = derive(net.space, {"ms": table}, (budget,), likes)
    assert set(found.values()) == {64} and table.of(found) == table.of(arch)
