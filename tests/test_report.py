"""report.html and tools/compare.py: the figures are those of metrics.json, and a browser shows what is promised."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import scipy.stats
from commands import call, check_refused, compare_tool, search_tool, trust
from playwright.sync_api import sync_playwright
from tables import HEADER, costs_of, rows_of, stairs

from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.report.metrics import Run, grouped, interval, layer_rows, read_run, sibling_runs, verdict
from dnas.report.pages import again, experiments, network, write_report
from dnas.report.plots import POINTS, _curve, layers
from dnas.runtime.checkpoint import Stopped
from dnas.spec.cost import CostTable
from dnas.spec.latency_table import table_of
from supernets import SUPERNETS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Meant: a browser is no Python package; .ci/run installs Debian's.
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
pytestmark = pytest.mark.usefixtures("trusted")
FLAGS = ("--supernet", "toy", "--width-mult", 1, "--search-epochs", 4, "--epochs", 1, "--img-size", 8, "-b", 96)
FLAGS += ("--budget", "40%", "--num-random", 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two searches that differ in the seed; the second has seen the first."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        trust(patch)
        for seed in (0, 1):
            assert call(search_tool, patch, *FLAGS, "--seed", seed, "--output", folder / f"<i>{seed}&") == 0
    return [folder / "<i>0&", folder / "<i>1&"]


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def opened(chromium, path, **how):
    """The page, and all that a browser has to complain about."""
    complaints, page = [], chromium.new_context(**how).new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return page, complaints + [url for url in asked if not url.startswith(("file:", "data:"))]


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_report_in_a_browser(runs, chromium, scheme, width):
    metrics = json.loads((runs[1] / "metrics.json").read_text())
    size = {"width": width, "height": 800}
    page, complaints = opened(chromium, runs[1] / "report.html", color_scheme=scheme, viewport=size)
    assert complaints == []
    assert page.title() == page.text_content("h1") == "<i>1&"
    cells = page.locator("table").first.locator("td").all_text_contents()
    for net in ("found", "uniform"):
        assert f"{metrics[net]['macs'] / 1000:.4g}kFLOPs" in cells and f"{metrics[net]['top1']:.2f} %" in cells
    assert f"{metrics['budget'][0]['limit'] / 1000:.4g}kFLOPs" in cells

    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # wide pictures scroll for themselves
    pictures = {svg.get_attribute("id"): svg for svg in page.locator("svg").all()}
    assert set(pictures) == {"top1", "layers", "gates", "course"}
    for svg in pictures.values():
        box = svg.bounding_box()
        assert box["width"] > 300 and box["height"] > 100
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    # Each colour of a picture is one of the page's: the text of an axis is as light or as dark as the page needs it.
    colour = page.evaluate("getComputedStyle(document.querySelector('#course text')).fill")
    known = ["--ink", "--muted"]
    assert colour in [page.evaluate("v => { const e = document.createElement('i'); e.style.color = `var(${v})`;"
                      "document.body.append(e); return getComputedStyle(e).color }", v) for v in known]  # fmt: skip
    assert "var(--found)" in pictures["top1"].inner_html()


@browser
def test_the_network_is_drawn_as_it_was_found(runs, chromium):
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    page, _ = opened(chromium, runs[0] / "report.html")
    answers = json.loads((runs[0] / "arch.json").read_text())["answers"]
    rows = {row.locator(".name").text_content(): row for row in page.locator("#network .row").all()}
    assert set(rows) == {"/".join(d["name"].split("/")[:2]) for d in metrics["decisions"]}
    for name, row in rows.items():
        if answers.get(f"{name}/keep") == "drop":
            assert "gone" in row.get_attribute("class") and not row.locator(".bar").count()
            continue
        block = answers.get(f"{name}/block")
        width = answers[name] if block is None else answers[f"{name}/{block}/mid"]
        widest = next(d for d in metrics["decisions"] if d["name"] in (name, f"{name}/{block}/mid"))["options"][-1]
        bar, fill = (row.locator(s).bounding_box()["width"] for s in (".bar", ".bar i"))
        assert fill / bar == pytest.approx(width / widest, abs=0.01)
        assert row.locator(".count").text_content() == f"{width} / {widest}"
        assert row.locator(".blocks b").all_text_contents() == ([block] if block else [])


def test_pages_load_nothing_and_are_small(runs, tmp_path, monkeypatch):
    out = tmp_path / "compared.html"
    assert call(compare_tool, monkeypatch, *runs, "--out", out) == 0
    for path in (runs[0] / "report.html", out):
        text = path.read_text()
        assert len(text) < 3_000_000
        # All that is named is a namespace; what is linked to is in the page.
        assert set(re.findall(r"https?://[^\"' <]+", text)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:href|src)="([^"]*)"', text))
        assert "<script" not in text and "<i>0&<" not in text and "&lt;i&gt;0&amp;" in text
        assert not re.search(r"#0\d0d0f", text)  # every colour has become the page's


def test_what_layers_cost_adds_up(runs):
    for folder in runs:
        metrics = json.loads((folder / "metrics.json").read_text())
        for net in ("found", "uniform", "balanced"):
            for metric in ("macs", "params"):
                assert sum(row[metric][net] for row in metrics["layers"]) == metrics[net][metric]
        answers = json.loads((folder / "arch.json").read_text())["answers"]
        assert {d["name"]: d["found"] for d in metrics["decisions"] if d["found"] is not None} == answers


def test_layers_of_milliseconds_add_up():
    net = MacroSupernet(SUPERNETS["toy"](num_classes=10, img_size=8))
    cost, table = costs_of(net, stairs), table_of(HEADER, rows_of(net, stairs))
    archs = dict(zip(("cheap", "dear"), cost.extremes(), strict=True))
    rows = layer_rows(net, table, archs)
    assert {row["name"] for row in rows} > {"stage0/0", "conv_stem", "run"}
    for name, arch in archs.items():
        assert sum(row["ms"][name] for row in rows) == pytest.approx(cost.of(arch))
    named = {"widest": "dear", "found": "cheap", "uniform": "cheap"}
    drawn = layers([
        {"name": row["name"]} | {m: {net: row[m][which] for net, which in named.items()} for m in row if m != "name"}
        for row in rows
    ])  # fmt: skip
    assert ">MACs<" in drawn and ">ms<" in drawn and ">run<" in drawn


def test_layers_of_a_network_of_timms_are_its_modules():
    """Behind a concatenation a convolution has many widths, and is one layer all the same."""
    net = TimmSupernet(TimmBase("densenet121", 10, img_size=32, kwargs={"growth_rate": 16, "block_config": [2, 2]}))
    for metric in ("macs", "params"):
        table = CostTable.build(net.space, metric)
        archs = dict(zip(("cheap", "dear"), table.extremes(), strict=True))
        rows = layer_rows(net, None, archs)
        for name, arch in archs.items():
            assert sum(row[metric][name] for row in rows) == table.of(arch)
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) and "features.denseblock1.denselayer2.conv1" in names
    assert not any(":" in name for name in names)


def test_history_has_the_gates_a_hundred_times_at_most(runs):
    rows = [json.loads(line) for line in (runs[0] / "history.jsonl").read_text().splitlines()]
    shots = [row["gates"] for row in rows if "gates" in row]
    taught = [row for row in rows if "gate_loss" in row]
    assert taught[0]["gates"] and 2 <= len(shots) <= 101
    decisions = {d["name"]: d for d in json.loads((runs[0] / "metrics.json").read_text())["decisions"]}
    for shot in shots:
        for name, value in shot.items():
            options = decisions[name]["options"]
            if isinstance(value, list):
                assert len(value) == len(options) and sum(value) == pytest.approx(1, abs=1e-4)
            else:
                assert options[0] <= value <= options[-1]


def journal_rows(folder):
    return len((folder / "history.jsonl").read_text().splitlines())


def planted(seed, found, uniform, **args):
    nets = {"found": {"macs": 1, "params": 1, "top1": found}, "uniform": {"macs": 1, "params": 1, "top1": uniform}}
    budget = [{"metric": "macs", "limit": 2, "reached": 1}]
    return Run(Path("a"), {"seed": seed, "output": str(seed), "lr": 1} | args, {"budget": budget, **nets})


@pytest.mark.parametrize("differences, word", [
    ([3.0], "open"), ([3.0, 3.5, 2.5], "better"), ([-3.0, -3.5, -2.5], "worse"), ([3.0, -2.0, 0.5], "open"),
])  # fmt: skip
def test_verdict(differences, word):
    runs = [planted(k, 50 + d, 50) for k, d in enumerate(differences)]
    assert verdict(runs)[0] == word and "validation" not in verdict(runs)[1]
    if len(differences) > 1:
        ends = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert interval(differences)[1:] == pytest.approx((ends.low, ends.high))
        assert f"[{ends.low:+.2f}, {ends.high:+.2f}]" in verdict(runs)[1]
        assert ("--method uniform" in verdict(runs)[1]) == (word != "better")


@pytest.mark.parametrize("found, side", [(52.5, "2.50 points above"), (49.5, "0.50 points below"), (50, "level with")])
def test_verdict_of_one_run(found, side):
    assert verdict([planted(0, found, 50)])[1].startswith(f"The found net is {side} the uniform net")


def test_one_run_says_what_an_image_is_worth():
    run = planted(0, 50, 48)
    told = verdict([Run(run.folder, run.args, {**run.metrics, "validation_images": 40})])[1]
    assert "One validation image of 40 is 2.50 points." in told


def test_runs_are_one_experiment_if_they_differ_in_the_seed_only():
    one, other, again, longer = planted(0, 5, 4), planted(1, 7, 4), planted(0, 9, 4), planted(2, 5, 4, lr=2)
    assert grouped([one, longer, other, again]) == [[one, other], [longer]]
    first, second = experiments([one, longer, other])
    assert first["found"] == [5, 7] and first["minus_uniform"][0] == 2 and second["minus_uniform"] == [1, None, None]
    retrained = Run(Path("b"), {"seed": 0}, {key: one.metrics[key] for key in ("budget", "found")})
    kept = planted(0, 90, 50)
    kept.metrics["found"]["inherited"] = True  # and the uniform net began from scratch: nothing is said of these two
    assert verdict([kept])[0] == "alone"
    kept.metrics["uniform"]["inherited"] = True
    assert verdict([kept])[0] == "open"
    assert verdict([retrained])[0] == "alone" and experiments([retrained])[0]["minus_uniform"] is None


def test_runs_beside(runs, tmp_path):
    copies = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{}")
    other = shutil.copytree(runs[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["args"] |= {"seed": 2, "lr": 1}
    (other / "config.json").write_text(json.dumps(config))
    assert [run.folder for run in sibling_runs(read_run(copies[1]))] == [copies[1], copies[0]]


def test_a_long_curve_has_few_points():
    steps = [*range(10_000)]
    x, y = _curve(steps, [None if s % 10 == 0 else 2.0 * s for s in steps])
    assert len(x) == POINTS and y == pytest.approx(2 * x, abs=40)


def test_a_layer_that_went_has_no_width():
    keep = {"name": "a", "kind": "keep", "options": ["drop", "keep"], "found": "drop", "uniform": "keep"}
    mid = {"name": "b", "kind": "width", "options": [4, 8], "found": None, "uniform": 8}
    keep["layer"] = mid["layer"] = "stage0/1"
    ((row,),) = [section["rows"] for section in network([keep, mid])]
    assert row["gone"] and row["found"] is None


def test_compare(runs, monkeypatch, capsys, tmp_path):
    table = tmp_path / "table.json"
    assert call(compare_tool, monkeypatch, runs[0].parent, "--json", table) == 0
    (row,) = json.loads(table.read_text())
    tops = [json.loads((r / "metrics.json").read_text())["found"]["top1"] for r in runs]
    assert row["found"] == tops and row["seeds"] == 2
    assert f"{sum(tops) / 2:.2f} ± {abs(tops[0] - tops[1]) / math.sqrt(2):.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("change, quoted", [
    (lambda m: m.pop("found"), "no 'found'"),
    (lambda m: m["found"].update(top1="high"), "metrics.found.top1 is 'high'"),
    (lambda m: m.update(random={"a": 1}), "metrics.random is"),
    (lambda m: m["budget"].append(3), "metrics.budget[1] is 3"),
])  # fmt: skip
def test_compare_refuses_what_is_no_run(runs, change, quoted, monkeypatch, capsys, tmp_path):
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    change(metrics)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    shutil.copy(runs[0] / "config.json", tmp_path)
    check_refused(call(compare_tool, monkeypatch, tmp_path), capsys, quoted)


def test_compare_leaves_out_what_is_no_run(runs, monkeypatch, capsys, tmp_path):
    copies = [shutil.copytree(runs[0], tmp_path / name) for name in ("a", "b", "c")]
    (copies[1] / "metrics.json").unlink()
    assert call(compare_tool, monkeypatch, *copies) == 0
    said = capsys.readouterr().out
    assert f"left out: '{copies[1]}' is no complete run" in said and f"{copies[2]} repeats the seed" in said
    assert said.count("left out") == 2


def test_compare_refuses_wrong_paths(runs, monkeypatch, capsys, tmp_path):
    check_refused(call(compare_tool, monkeypatch, tmp_path), capsys, "is no complete run folder")
    for flag, path in (("--out", "x.pdf"), ("--out", "none/x.html"), ("--json", "none/x.json")):
        code = call(compare_tool, monkeypatch, runs[0], flag, tmp_path / path)
        check_refused(code, capsys, f"{flag} '{tmp_path / path}'")


def test_a_report_can_be_written_again(runs):
    before = (runs[1] / "report.html").read_bytes()
    write_report(runs[1])
    assert (runs[1] / "report.html").read_bytes() == before


def test_latency_is_drawn_where_it_was_measured(runs, tmp_path):
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    metrics = json.loads((run / "metrics.json").read_text())
    for net, (told, measured) in {"found": (1.5, 2.0), "uniform": (3.0, 2.5), "balanced": (2.5, 2.2)}.items():
        metrics[net] |= {"ms": measured, "predicted_ms": told, "measured_ms": measured}
    (run / "metrics.json").write_text(json.dumps(metrics))
    write_report(run)
    text, before = ((folder / "report.html").read_text() for folder in (run, runs[0]))
    assert 'id="predicted"' in text and "<td>2ms</td>" in text and 'id="predicted"' not in before


def test_a_run_that_is_stopped_at_its_report_is_complete(runs, monkeypatch, tmp_path):
    run = tmp_path / "run"

    def stopped(folder):
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(search_tool, "write_report", stopped)
        assert call(search_tool, patch, *FLAGS, "--seed", 0, "--output", run) == 128 + signal.SIGTERM
    assert not (run / "report.html").exists()
    assert call(search_tool, monkeypatch, "--resume", run) == 0
    assert {p.name for p in run.iterdir()} == {p.name for p in runs[0].iterdir()}
    assert (run / "model.safetensors").read_bytes() == (runs[0] / "model.safetensors").read_bytes()


def test_the_command_of_a_page_can_be_typed():
    argv = ["--data-dir", "my images", "--output", "a", "--budget", "40%"]
    assert again(argv) == "--data-dir 'my images' --budget 40%"
    assert again(["--output=a", "--amp"]) == "--amp"


@pytest.mark.parametrize("of_a_sweep", [False, True])
def test_tensorboard_has_the_history(of_a_sweep, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, flags = tmp_path / "run", list(FLAGS)
    if of_a_sweep:  # whose warm-up was before
        flags[flags.index("--budget") :] = ["--sweep", "40%,60%"]
        run = run / "40pc"
    else:  # one that was killed and has lost what it had logged
        real, left = search_tool.find, [1]

        def killed(plan, goal, journal, begun, plain_ms):
            if left.pop():
                monkeypatch.setattr(journal, "stop", lambda: signal.SIGTERM if journal_rows(goal.folder) > 9 else 0)
            return real(plan, goal, journal, begun, plain_ms)

        with monkeypatch.context() as patch:
            patch.setattr(search_tool, "find", killed)
            flags += ["--log", "tensorboard", "--output", tmp_path / "run"]
            assert call(search_tool, patch, *flags) == 128 + signal.SIGTERM
        for path in (run / "tensorboard").iterdir():
            path.unlink()
        flags = ["--resume", tmp_path / "run"]
    if of_a_sweep:
        flags += ["--log", "tensorboard", "--output", tmp_path / "run"]
    assert call(search_tool, monkeypatch, *flags) == 0
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    seen = EventAccumulator(str(run / "tensorboard"))
    seen.Reload()
    losses = seen.Scalars("loss")
    assert [event.step for event in losses] == [row["step"] for row in rows]
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    expected = [row["expected"]["macs"] for row in rows if "expected" in row]
    assert [event.value for event in seen.Scalars("expected/macs")] == pytest.approx(expected, rel=1e-5)
