"""From a device to a network of so many milliseconds: profile, check, search, and what is refused on the way."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import call, check_refused, profile_tool, search_tool, workflow
from tables import costs_of, row, rows_of

from dnas.latency.measured_parts import parts_of
from dnas.latency.profile import calibrated, spread_archs
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.latency_table import read_table, table_text
from supernets import SUPERNETS
from supernets.toy import toy

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

QUICK = (
    "--rounds",
    "3",
    "--block-ms",
    "0.2",
    "--scale-nets",
    "2",
    "--threads",
    "1",
    "--device",
    "cpu",
)
TOY = ("--supernet", "toy", "--img-size", "16", "--num-classes", "10", "--divisor", "8")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of the toy space, measured here in a moment: its figures are noise."""
    out = tmp_path_factory.mktemp("tables") / "toy.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(profile_tool, monkeypatch, *TOY, *QUICK, "--out", out) == 0
    return out


def toy_net():
    return MacroSupernet(toy(num_classes=10, img_size=16, divisor=8))


def planned_ms(unit, widths):
    """What units take in the tables that are searched with: no noise of this machine decides a test."""
    return 0.02 + 0.001 * sum(widths.values()) * (2 if "k5" in unit else 1)


@pytest.fixture(scope="module")
def planned(table, tmp_path_factory):
    """A table of this device with `planned_ms` in its rows."""
    out = tmp_path_factory.mktemp("tables") / "planned.json"
    out.write_text(
        table_text(read_table(table).header | {"scale": 1.0, "ms_per_mparam": 0.0}, rows_of(toy_net(), planned_ms))
    )
    return out


def limits():
    """The fastest network, half-way, and the slowest."""
    costs = costs_of(toy_net(), planned_ms)
    low, high = (costs.of(arch) for arch in costs.extremes())
    return low, (low + high) / 2, high


def test_a_profile_is_a_table_that_says_what_it_is_of(table):
    found = read_table(table)
    assert found.header["space"] == {"supernet": "toy", "width_mult": 1.0, "img_size": 16, "divisor": 8}
    assert (found.header["runtime"], found.header["dtype"], found.header["batch"]) == ("eager", "float32", 1)
    assert [p.name for p in table.parent.iterdir()] == [table.name]


def test_a_check_writes_its_figures_into_the_table(table, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy.json"
    copy.write_bytes(table.read_bytes())
    assert call(profile_tool, monkeypatch, "--check", copy, "--check-nets", "5", "--device", "cpu") == 0
    assert "5 nets of " in capsys.readouterr().out
    before, after = read_table(table), read_table(copy)
    assert after.header["check"]["nets"] == 5 and -1 <= after.header["check"]["kendall_tau"] <= 1
    assert {**after.header, "check": {}} == before.header
    assert all((after.units[name].ms == unit.ms).all() for name, unit in before.units.items())


SHIPPED = sorted((Path(__file__).parent.parent / "latency_tables").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_tables_are_whole_and_checked(path):
    table = read_table(path)
    assert table.header["check"]["nets"] >= 50
    space = dict(table.header["space"])
    name = space.pop("model", None) or space.pop("supernet")
    sizes = {key: table.header["protocol"][key] for key in ("num_classes", "in_chans")}
    runs = [f"b{table.header['batch']}", "fp32", table.header["runtime"]]
    device = table.header["device"].lower().replace(" ", "-")
    assert path.stem.split("_") == [device, *name.split("_"), f"{space['img_size']}px", *runs]
    if name in SUPERNETS:
        net = MacroSupernet(SUPERNETS[name](**space, **sizes))
    else:
        net = TimmSupernet(TimmBase(name, sizes["num_classes"], sizes["in_chans"], space["img_size"]))
    assert not table.missing(net.space, [part.site for part in parts_of(net)])


def test_the_two_numbers_of_a_scale_are_found_again(monkeypatch):
    """Planted: a network takes 0.7 of its units' milliseconds, and 0.5 ms for every million of numbers in them."""
    net, rng = toy_net(), np.random.default_rng(0)
    rows = [r | {"params": int(rng.integers(1000, 10**6))} for r in rows_of(net, planned_ms)]
    known = {(r["unit"], tuple(r["widths"].values())): 0.7 * r["ms"] + 0.5 * r["params"] / 1e6 for r in rows}
    archs, parts = spread_archs(net.space, 20, seed=1), parts_of(net)

    def takes(arch):
        there = (part.site for part in parts if all(arch.get(name) == option for name, option in part.site.when))
        return sum(known[site.op, tuple(arch.get(w, w) for w in site.widths.values())] for site in there)

    found = profile_tool.scale_of(net, [part.site for part in parts], rows, archs, np.array([*map(takes, archs)]))
    assert found == pytest.approx((0.7, 0.5), rel=1e-9)


def test_tables_are_listed_with_their_checks(planned, tmp_path, monkeypatch, capsys):
    checked = tmp_path / "checked.json"
    figures = {"nets": 50, "fastest_ms": 1.0, "slowest_ms": 2.5, "median_error": 0.0161, "p90_error": 0.044}
    figures |= {"bias": -0.001, "kendall_tau": 0.9412, "noise_median_error": 0.015, "noise_kendall_tau": 0.95}
    content = json.loads(planned.read_text())
    checked.write_text(json.dumps(content | {"check": figures | {"date": "2026-01-01"}}))
    assert call(profile_tool, monkeypatch, "--list", planned, checked) == 0
    head, line, *tables = [text.strip("|").split(" | ") for text in capsys.readouterr().out.splitlines()]
    assert len({len(head), len(line), *map(len, tables)}) == 1 and len(tables) == 2
    assert [cell.strip() for cell in tables[0][-7:]] == ["-"] * 7
    found = ["50 of 1 to 2.5", "1.6 %", "4.4 %", "-0.1 %", "0.941", "1.5 %", "0.950"]
    assert [cell.strip() for cell in tables[1][-7:]] == found
    checked.write_text(json.dumps(content | {"check": {"nets": 50}}))
    check_refused(call(profile_tool, monkeypatch, "--list", checked), capsys, "check has missing or unknown keys")


def test_an_interrupted_profile_goes_on(tmp_path, monkeypatch, capsys):
    out, beside = tmp_path / "t.json", tmp_path / "t.json.part.jsonl"
    real, done = profile_tool.profile, []

    def interrupted(*args, on_rows, **kwargs):
        def stop(rows, left):
            on_rows(rows, left)
            done.extend(rows)
            raise KeyboardInterrupt

        return real(*args, on_rows=stop, **kwargs)

    monkeypatch.setattr(profile_tool, "profile", interrupted)
    assert call(profile_tool, monkeypatch, *TOY, *QUICK, "--out", out) == 130
    assert not out.exists() and beside.exists()
    beside.write_text(beside.read_text() + '{"unit": "torn')
    assert "go on" in capsys.readouterr().out
    monkeypatch.setattr(profile_tool, "profile", real)
    check_refused(call(profile_tool, monkeypatch, *TOY, *QUICK, "--rounds", "4", "--out", out), capsys, str(beside))
    assert call(profile_tool, monkeypatch, *TOY, *QUICK, "--out", out) == 0
    assert not beside.exists()
    rows = {json.dumps([r["unit"], r["widths"]]): r for r in json.loads(out.read_text())["rows"]}
    run = next(r["ms"] for r in done if r["unit"] == "run")
    kept = [r for r in done if r["unit"] != "run" and json.dumps([r["unit"], r["widths"]]) in rows]
    assert kept
    for r in kept:  # what was measured before the interruption, less what starting takes
        found = rows[json.dumps([r["unit"], r["widths"]])]["ms"]
        assert found == pytest.approx(max(0.01 * r["ms"], r["ms"] - run), rel=1e-3, abs=1e-5)


def test_no_table_is_written_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    """Whole networks seem to take 100 times their parts: the machine was busy. Measurements of parts are kept."""
    out, beside = tmp_path / "t.json", tmp_path / "t.json.part.jsonl"
    real = profile_tool.time_archs
    monkeypatch.setattr(profile_tool, "time_archs", lambda *args: 100 * real(*args))
    check_refused(call(profile_tool, monkeypatch, *TOY, *QUICK, "--out", out), capsys, "0.1 to 10 is allowed")
    assert not out.exists()
    kept, known, measure = len(beside.read_text().splitlines()) - 2, [], profile_tool.profile

    def again(parts, space, target, measured, **how):
        known.append(len(measured))
        return measure(parts, space, target, measured, **how)

    monkeypatch.setattr(profile_tool, "time_archs", real)
    monkeypatch.setattr(profile_tool, "profile", again)
    monkeypatch.setattr(profile_tool, "scale_of", lambda *args: (1.0, 0.0))  # whatever this machine is doing
    assert call(profile_tool, monkeypatch, *TOY, *QUICK, "--out", out) == 0
    assert known == [kept] and kept > 10 and read_table(out).header["scale"] > 0


PROFILE_ERRORS = [
    ([], "--out FILE"),
    (["--out", "a.json", "--check", "b.json"], "--out FILE"),
    (["--out", "no/folder/a.json"], "'no/folder/a.json'"),
    (["--out", "a.json", "--runtime", "cudagraph", "--device", "cpu"], "--runtime cudagraph"),
    (["--out", "a.json", "--runtime", "onnxruntime", "--amp", "--device", "cpu"], "float16 on cpu"),
    (["--out", "a.json", "--batch-size", "0"], "--batch-size 0"),
    (["--out", "a.json", "--rounds", "1"], "--rounds 1"),
    (["--out", "a.json", "--img-size", "0"], "--img-size: '0'"),
    (["--out", "a.json", "--model", "densenet121", "--img-size", "64"], "denselayer2.conv1"),
    (["--out", "a.json", "--model", "resnet51"], "'resnet51'"),
    (["--check", "absent.json"], "absent.json"),
]


@pytest.mark.parametrize("flags, quoted", PROFILE_ERRORS, ids=lambda value: " ".join(value) if value else None)
def test_wrong_flags_of_profiling(flags, quoted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(call(profile_tool, monkeypatch, *flags), capsys, quoted)
    assert not list(tmp_path.iterdir())


def test_a_table_is_not_overwritten(table, monkeypatch, capsys):
    before = table.read_bytes()
    check_refused(call(profile_tool, monkeypatch, *TOY, *QUICK, "--out", table), capsys, str(table))
    assert table.read_bytes() == before


def test_networks_are_measured_with_the_threads_of_the_table(monkeypatch):
    seen = []
    monkeypatch.setattr(workflow, "time_nets", lambda *_: seen.append(torch.get_num_threads()) or np.ones((1, 3)))
    header = {"runtime": "eager", "dtype": "float32", "batch": 1, "threads": 2, "channels_last": False, "pace_us": 9.0}
    data = SimpleNamespace(in_chans=3, img_size=8)
    plan = SimpleNamespace(latency=SimpleNamespace(header=header), latency_device=torch.device("cpu"), data=data)
    assert workflow.measured_ms(plan, [None]) == [1.0]
    assert seen == [2] and torch.get_num_threads() == 1  # the tests' own


def test_a_search_for_milliseconds(planned, tmp_path, trusted, monkeypatch, capsys):
    """The space comes from the table; networks take 1.2 x what it says, and are found by what they take."""
    costs = costs_of(toy_net(), planned_ms)

    def on_a_slower_device(table, limit, find, measure):
        assert measure(find(table)) > 0
        return calibrated(table, limit, find, lambda arch: 1.2 * costs.of(arch))

    monkeypatch.setattr(workflow, "calibrated", on_a_slower_device)
    limit, out = limits()[1], tmp_path / "run"
    flags = ("--budget", f"{limit}ms", "--latency-table", planned, "--search-epochs", "2", "--epochs", "1", "-b", "128")
    assert call(search_tool, monkeypatch, *flags, "--device", "cpu", "--output", out) == 0
    metrics, document = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "arch"))
    (budget,) = document["budget"]
    assert budget["metric"] == "ms" and budget["limit"] == pytest.approx(limit)
    assert 0.96 * limit <= budget["reached"] <= limit
    found = toy_net().space.complete(document["answers"])
    assert 1.2 * costs.of(found) == pytest.approx(budget["reached"])
    assert metrics["found"]["ms"] == budget["reached"] and metrics["found"]["measured_ms"] > 0
    assert 0.96 * limit <= metrics["uniform"]["ms"] <= limit
    assert document["supernet"] == "toy" and document["img_size"] == 16
    shown = capsys.readouterr().out
    assert "latency" in shown and "measured" in shown


def test_the_run_is_named_after_the_tables_space(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--budget", f"{limits()[1]:.6f}ms", "--latency-table", planned, "--device", "cpu", "--dry-run")
    assert call(search_tool, monkeypatch, *flags) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("toy-")


@pytest.mark.parametrize("flag", [["--latency-anyway"], ["--latency-for", "batch=1"]])
def test_flags_of_a_table_without_one(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(call(search_tool, monkeypatch, "--budget", "50%", *flag), capsys, "--latency-table")


def test_milliseconds_and_flops_at_once(planned, tmp_path, monkeypatch):
    out, limit = tmp_path / "dry", limits()[1]
    flags = ("--budget", f"{limit}ms,60%", "--latency-table", planned, "--device", "cpu", "--dry-run", "--output", out)
    assert call(search_tool, monkeypatch, *flags) == 0
    rows = json.loads((out / "metrics.json").read_text())["budget"]
    assert [row["metric"] for row in rows] == ["ms", "macs"]
    ratios = [row["reached"] / row["limit"] for row in rows]
    assert max(ratios) <= 1 and max(ratios) >= 0.98


def test_tables_that_do_not_fit(planned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = planned.read_text()
    content = json.loads(text)
    other = json.dumps({**content, "device": "another device"})
    few = json.dumps({**content, "rows": [r for r in content["rows"] if r["unit"] != "classifier"]})
    foreign = json.dumps({**content, "space": {"supernet": "resnet9000"}})
    wrong = {
        "foreign": foreign,
        "other": other,
        "few": few,
        "cut": text[:-200],
        "schema": text.replace('"schema": 2', '"schema": 9'),
    }
    for name, given in wrong.items():
        (tmp_path / f"{name}.json").write_text(given)
    before = sorted(p.name for p in tmp_path.iterdir())
    flags = ("--budget", "1ms", "--device", "cpu", "--dry-run", "--latency-table")
    for given, quoted in (
        (["other.json"], "'another device'"),
        (["few.json"], "lacks classifier"),
        (["foreign.json"], "'resnet9000'"),
        (["cut.json"], "cut.json"),
        (["schema.json"], "schema is 9"),
        ([planned, "--latency-for", "batch=32"], "batch 1"),
        ([planned, "--latency-for", "dtype=float16"], "'float16'"),
        ([planned, "--latency-for", "colour=red"], "colour"),
        ([planned, "--img-size", "32"], "lacks"),
        ([planned, "--supernet", "mobilenet_v2"], "lacks"),
        (["absent.json"], "absent.json"),
    ):
        check_refused(call(search_tool, monkeypatch, *flags, *given), capsys, quoted)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_insisting_on_a_table_of_another_device(planned, tmp_path, trusted, monkeypatch):
    content = json.loads(planned.read_text())
    (tmp_path / "other.json").write_text(json.dumps({**content, "device": "another device"}))
    flags = ("--budget", f"{limits()[1]}ms", "--device", "cpu", "--dry-run", "--latency-table")
    out = ("--output", tmp_path / "dry")
    assert call(search_tool, monkeypatch, *flags, tmp_path / "other.json", "--latency-anyway", *out) == 0


def test_a_budget_out_of_a_tables_reach(planned, tmp_path, monkeypatch, capsys):
    low, _, high = limits()
    flags = ("--dry-run", "--device", "cpu", "--output", tmp_path / "x", "--latency-table", planned)
    for given in (f"{0.9 * low}ms", f"{1.1 * high}ms"):
        code = call(search_tool, monkeypatch, "--budget", given, *flags)
        check_refused(code, capsys, f"networks of this search space have {low:.4g}ms to {high:.4g}ms")


def test_other_rows_than_the_space_needs_are_no_harm(planned, tmp_path, monkeypatch):
    content = json.loads(planned.read_text())
    content["rows"].append(row("a unit of another space", 1.0, out=8))
    (tmp_path / "more.json").write_text(json.dumps(content))
    flags = ("--budget", f"{limits()[1]}ms", "--device", "cpu", "--dry-run", "--output", tmp_path / "dry")
    assert call(search_tool, monkeypatch, *flags, "--latency-table", tmp_path / "more.json") == 0
