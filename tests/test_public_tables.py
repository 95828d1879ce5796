"""The judge by public tables: their networks, their look-up against brute force, and how rows become a summary."""

import csv
import gzip
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import iso_flops  # noqa: E402
import public_tables  # noqa: E402
import table_networks  # noqa: E402
from iso_setups import Setup, open_lab, outline_of, supernet_of  # noqa: E402

from dnas.export.model_file import count_macs, count_params  # noqa: E402
from dnas.methods.rules import balanced_arch  # noqa: E402
from dnas.spec.budget import Budget  # noqa: E402
from dnas.spec.checks import UserError  # noqa: E402
from dnas.spec.cost import CostTable  # noqa: E402
from dnas.spec.recipe import Recipe  # noqa: E402

# Parameters and MACs of networks at the ends of the two spaces, from the tables themselves.
NATS = {(8, 8, 8, 8, 8): (11_714, 4_481_104), (8, 8, 8, 8, 16): (18_386, 4_894_880), (64,) * 5: (713_674, 274_399_872)}
MOBILENET = {
    tuple(w // 4 for w in table_networks.MOBILENET_WIDTHS): (125_418, 14_285_312),
    table_networks.MOBILENET_WIDTHS: (1_804_170, 211_281_920),
}


@pytest.mark.parametrize("build, known", [(table_networks.nats, NATS), (table_networks.bench_mobilenet, MOBILENET)])
def test_networks_cost_what_the_tables_say(build, known):
    for widths, costs in known.items():
        model = build(10, widths)
        assert (count_params(model), count_macs(model, 3, 32)) == costs


def supernet(space):
    return supernet_of(outline_of(public_tables.SPACES[space], 10))


def test_spaces_have_the_widths_of_the_tables_in_their_order():
    nats = supernet("nats").space
    assert [d.options for d in nats.decisions] == [tuple(range(8, 65, 8))] * 5
    mobilenet = supernet("mobilenet").space
    quarters = [tuple(width * k // 4 for k in (1, 2, 3, 4)) for width in table_networks.MOBILENET_WIDTHS]
    assert [d.options for d in mobilenet.decisions] == quarters
    for space, build, widths in (
        (nats, table_networks.nats, (8, 24, 40, 56, 64)),  # no two widths of a cell are equal: no identity
        (mobilenet, table_networks.bench_mobilenet, (32, 384, 192, 768, 128, 1152, 512)),
    ):
        arch = space.complete(dict(zip(space.by_name, widths, strict=True)))
        model = build(10, widths)
        assert CostTable.build(space, "macs").of(arch) == count_macs(model, 3, 32)
        assert CostTable.build(space, "params").of(arch) == count_params(model)


@pytest.mark.parametrize(
    "build, space",
    [(partial(table_networks.nats, for_search=True), "nats"), (table_networks.bench_mobilenet, "mobilenet")],
)
def test_layers_that_write_a_width_are_those_whose_outputs_change_with_it(build, space):
    """Counted on the table's own networks: convolutions with other outputs if one width is another one."""

    def outputs(widths):
        return [m.out_channels for m in build(10, widths).modules() if isinstance(m, nn.Conv2d)]

    decisions = supernet(space).space.decisions
    full = tuple(d.options[-1] for d in decisions)
    found = public_tables.uses(supernet(space).space)
    for k, decision in enumerate(decisions):
        less = (*full[:k], decision.options[-2], *full[k + 1 :])
        changed = sum(a != b for a, b in zip(outputs(full), outputs(less), strict=True))
        assert found[decision.name] == changed > 0


@pytest.mark.parametrize("space, share", [("nats", 0.15), ("mobilenet", 0.75)])
def test_weights_of_widths_move_channels_to_those_that_many_layers_write(space, share):
    net = supernet(space).space
    tables = {metric: CostTable.build(net, metric) for metric in ("macs", "params")}
    budgets = (Budget("macs", share * tables["macs"].of(tables["macs"].extremes()[1])),)
    assert public_tables.weighted(net, tables, budgets, 0) == balanced_arch(net, tables, budgets)
    count, sums = public_tables.uses(net), []
    for power in (0, 1, 3):
        arch = public_tables.weighted(net, tables, budgets, power)
        sums.append(sum(count[name] * np.log(width) for name, width in arch.items()))
    assert sums[0] < sums[1] >= sums[2]  # at power 1 this sum is what is maximised
    assert 0.98 * budgets[0].limit <= tables["macs"].of(arch) <= budgets[0].limit


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A made-up table of NATS-Bench's form: accuracy is the sum of widths, on another data set its opposite."""
    rng, names = np.random.default_rng(0), [f"c{k}" for k in range(5)]
    with gzip.open(tmp_path / "nats_sss.csv.gz", "wt", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*names, "acc_cifar10", "acc_other", "macs_cifar10"])
        for _ in range(400):
            widths = [int(w) for w in rng.integers(1, 9, 5) * 8]
            rows.writerow([*widths, sum(widths), -sum(widths), 1000 + sum(widths)])
    monkeypatch.setattr(iso_flops, "RESULTS", tmp_path)
    return tmp_path


def test_a_network_is_looked_up_among_those_of_equal_cost(folder):
    judge = public_tables.read_judge("nats", str(folder))
    limit = 0.95 * judge.macs.max()
    band = [k for k in range(400) if 0.98 * limit <= judge.macs[k] <= limit]
    assert len(band) > 5
    for k in band:
        arch = dict(zip("abcde", judge.widths[k].tolist(), strict=True))
        if (judge.widths == judge.widths[k]).all(1).sum() > 1:
            continue
        worse = [judge.top1["cifar10"][j] < judge.top1["cifar10"][k] for j in band]
        equal = [judge.top1["cifar10"][j] == judge.top1["cifar10"][k] for j in band]
        found = judge.look_up(arch, "cifar10", 95)
        assert found["percentile"] == pytest.approx(100 * (sum(worse) + sum(equal) / 2) / len(band))
        assert found["regret"] == pytest.approx(max(judge.top1["cifar10"][j] for j in band) - found["top1"])
        assert judge.look_up(arch, "other", 95)["percentile"] == pytest.approx(100 - found["percentile"])


def test_a_summary_has_a_row_for_each_budget_data_set_and_method(folder):
    judge = public_tables.read_judge("nats", str(folder))
    order = np.argsort(judge.macs)
    best, *others = (dict(zip("abcde", judge.widths[k].tolist(), strict=True)) for k in order[[-1, -60, -90]])
    nets = {"95%/balanced/0": others[0], "95%/l1/0": best, "95%/l1/1": others[1]}
    rows = [{"kind": "net", "net": name, "arch": arch} for name, arch in nets.items()]
    (folder / "public_nats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {(r["dataset"], r["method"]): r for r in public_tables.summary(str(folder))}
    assert set(found) == {(d, m) for d in ("cifar10", "other") for m in ("balanced", "l1")}
    l1 = found["cifar10", "l1"]
    assert (l1["space"], l1["budget"], l1["searches"]) == ("nats", "95%", 2)
    tops = {name: sum(arch.values()) for name, arch in nets.items()}
    mean, low, high = l1["minus_balanced"]
    assert mean == pytest.approx((tops["95%/l1/0"] + tops["95%/l1/1"]) / 2 - tops["95%/balanced/0"])
    assert low < mean < high


UNREADABLE = {"missing": None, "no gzip": b"no gzip", "other columns": gzip.compress(b"c0,c1\n1,2\n")}
UNREADABLE["empty"] = gzip.compress(b"")


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_a_folder_without_the_table_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "nats_sss.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match="nats_sss.csv.gz") as error:
        public_tables.read_judge("nats", str(tmp_path))
    assert "\n" not in str(error.value)


# Meant: the tables are other people's and are not shipped; DNAS_TABLES names their folder where there is one.
@pytest.mark.skipif(not os.environ.get("DNAS_TABLES"), reason="DNAS_TABLES names no folder with the public tables")
def test_all_costs_of_the_public_tables_are_those_of_the_cost_tables():
    for space in public_tables.SPACES:
        judge, net = public_tables.read_judge(space, os.environ["DNAS_TABLES"]), supernet(space)
        table, rng = CostTable.build(net.space, "macs"), np.random.default_rng(0)
        for k in rng.permutation(len(judge.macs))[:500]:
            arch = net.space.complete(dict(zip(net.space.by_name, judge.widths[k].tolist(), strict=True)))
            _, b, c, d, e = judge.widths[k][:5]
            identities = 256 * b * c * (b == c) + 64 * d * e * (d == e) if space == "nats" else 0
            assert table.of(arch) == judge.macs[k] + identities


def test_evolution_trains_shared_weights_once_for_all_budgets(monkeypatch):
    """Its nets are those that each budget would have alone."""
    short = Recipe(epochs=1, batch_size=32)
    narrow = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    setup = Setup("resnet18", 1, 4, "50%", "digits", 60, 8, short, short, 1, kwargs=narrow)
    lab = open_lab(setup, "", "cpu")
    most = float(lab.tables["macs"].of(lab.tables["macs"].extremes()[1]))
    monkeypatch.setattr(public_tables.opponents, "POPULATION", 4)
    monkeypatch.setattr(public_tables.opponents, "GENERATIONS", 1)
    monkeypatch.setattr(public_tables, "_lab", lab)
    rows = public_tables.search_all(most, ["evolution"], 0, (30, 60))
    assert [row["net"] for row in rows] == ["30%/evolution/0", "60%/evolution/0"]
    for row, percent in zip(rows, (30, 60), strict=True):
        alone, _ = public_tables.opponents.evolution(replace(lab, budgets=public_tables.goal(most, percent)), 0)
        assert row["arch"] == dict(alone) and 0.98 <= row["macs"] / (percent / 100 * most) <= 1
