"""The command lines: a table of wrong inputs, a dry run, and one small run from budget to trained model."""

import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import call, check_refused, export_tool, retrain_tool, search_tool, workflow

from dnas.export.model_file import build_net, count_params, read_arch, write_export
from dnas.export.verify import verify_export
from dnas.nets.layer_supernet import space_of
from dnas.report.diagnosis import no_better_than_a_guess
from dnas.spec.cost import CostTable
from dnas.training.loop import evaluate
from supernets import SUPERNETS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


SEARCH_ERRORS = [
    (["--budget", "-3MFLOPs"], "-3MFLOPs"),
    (["--budget=-3MFLOPs"], "-3MFLOPs"),
    (["--budget", "300"], "'300'"),
    (["--budget", "300MB"], "'300MB'"),
    (["--budget", "nanFLOPs"], "'nanFLOPs'"),
    (["--budget", "infFLOPs"], "'infFLOPs'"),
    (["--budget", ""], "''"),
    (["--budget", "1.2ms"], "--latency-table"),
    (["--budget", "0%"], "'0%'"),
    (["--budget", "1kFLOPs"], "1kFLOPs"),
    (["--budget", "1kFLOPs"], "(--width-mult and --divisor for another one)"),
    (["--budget", "1kFLOPs", "--model", "test_resnet"], "(--divisor for another one)"),
    (["--budget", "1TFLOPs", "--width-mult", "0.25"], "1TFLOPs"),
    (["--budget", "1MFLOPs,10Params"], "10Params"),
    ([], "--budget"),
    (["--budget", "50%", "--supernet", "resnet"], "'resnet'"),
    (["--budget", "50%", "--nonsense", "1"], "'--nonsense' ("),
    (["--bugdet", "50%"], "'--bugdet': did you mean --budget?"),
    (["--budget", "50%", "--epohcs", "1"], "'--epohcs': did you mean --epochs?"),
    (
        ["--budget", "50%", "--search-epochs=1", "--serach-epochs=3"],
        "'--serach-epochs': did you mean --search-epochs?",
    ),
    (["--budget", "50%", "--epochs", "0"], "--epochs 0"),
    (["--budget", "50%", "--epochs", "many"], "'many'"),
    (["--budget", "50%", "--search-epochs", "0"], "--search-epochs 0"),
    (["--budget", "50%", "--num-random", "-1"], "--num-random -1"),
    (["--budget", "50%", "--batch-size", "1"], "--batch-size 1"),
    (["--budget", "50%", "--grad-accum-steps", "0"], "--grad-accum-steps 0"),
    (["--budget", "50%", "--class-weights", "even"], "--class-weights 'even'"),
    (["--budget", "50%", "--class-weights", "1,2"], "--class-weights '1,2': 10 numbers"),
    (["--budget", "50%", "--kd-temperature", "2"], "--kd-temperature 2.0 goes with --kd-model-name"),
    (["--budget", "50%", "--kd-model-name", "resnet50"], "weights are for 1000 classes"),
    (["--budget", "50%", "--lr", "nan"], "--lr nan"),
    (["--budget", "50%", "--opt", "nothing"], "'nothing'"),
    (["--budget", "50%", "--sched", "nothing"], "'nothing'"),
    (["--budget", "50%", "--amp-dtype", "int8"], "'int8'"),
    (["--budget", "50%", "--device", "tpu9"], "'tpu9'"),
    (["--budget", "50%", "--divisor", "0"], "--divisor 0"),
    (["--budget", "50%", "--width-mult", "0"], "--width-mult 0"),
    (["--budget", "50%", "--img-size", "4"], "4"),
    (["--budget", "50%", "--in-chans", "2"], "2"),
    (["--budget", "50%", "--num-classes", "7"], "--num-classes 7"),
    (["--budget", "50%", "--data-dir", "no/such/folder"], "no/such/folder"),
    (["--budget", "50%", "--dataset", "no-such-data"], "no-such-data"),
    (["--budget", "50%", "--name", "no name"], "no name"),
    (["--budget", "50%", "--name", "resnet50"], "resnet50"),
    (["--budget", "50%", "--skip-at", "2"], "--skip-at 2"),
    (["--budget", "50%", "--gate-fraction", "1"], "--gate-fraction 1"),
    (["--budget", "50%", "--weights-on", "stone"], "hard, soft"),
    (["--budget", "50%", "--paths", "1"], "--paths 1"),
    (["--budget", "50%", "--seed", "-1"], "'-1'"),
    (["--budget", "50%", "--seed", "5000000000"], "5000000000"),
    (["--budget", "50%", "--opt", "adahessian"], "adahessian"),
    (["--budget", "50%", "--opt", "lookahead_adam"], "--opt 'lookahead_adam' keeps its state where"),
    (["--sweep", ""], "''"),
    (["--budget", "50%", "--device", "meta"], "--device 'meta' is not available here"),
    (["--budget", "50%", "--model", "resnet51"], "'resnet51'"),
    (["--budget", "50%", "--model", "test_resnet", "--supernet", "toy"], "--supernet"),
    (["--budget", "50%", "--model", "test_resnet", "--width-mult", "2"], "--width-mult"),
    (["--budget", "50%", "--model", "test_resnet", "--model-kwargs", "no_such=1"], "no_such"),
    (["--budget", "50%", "--model", "test_resnet", "--model-kwargs", "layers"], "'layers'"),
    (["--budget", "50%", "--model", "test_resnet", "--model-kwargs", "checkpoint_path=w.pth"], "'checkpoint_path'"),
    (["--budget", "50%", "--model", "test_resnet", "--model-kwargs", "layers=(1,1)"], "(1, 1)"),
    (["--budget", "50%", "--model", "test_resnet", "--initial-checkpoint", "no/such.pth"], "no/such.pth"),
    (["--budget", "1%", "--model", "test_resnet"], "1%"),
    (["--budget", "1GFLOPs", "--model", "test_resnet"], "1GFLOPs"),
    (["--budget", "50%", "--model", "resnet18.typo"], "resnet18.typo"),
    (
        ["--budget", "50%", "--model", "nest_tiny", "--img-size", "100"],
        "nest_tiny cannot be run on an image of 3 x 100",
    ),
    (["--budget", "50%", "--model", "inception_v3"], "inception_v3 cannot be run on an image of 3 x 32 x 32"),
    (["--budget", "50%", "--pretrained"], "--model"),
    (["--budget", "50%", "--img-size", "16", "--warmup", "1"], "--warmup 1.0"),
    (["--budget", "50%", "--img-size", "16", "--search-epochs", "1", "-b", "1024"], "1 steps"),
    (["--budget", "50%", "--img-size", "16", "--search-epochs", "2", "--lr", "1e30", "--clip-grad", "0"], "--lr"),
]


@pytest.mark.parametrize(("flags", "quoted"), SEARCH_ERRORS, ids=lambda value: " ".join(value) if value else None)
def test_wrong_flags_are_one_line_and_leave_nothing(flags, quoted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(call(search_tool, monkeypatch, *flags), capsys, quoted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty class", "broken image", "no validation"])
def test_wrong_image_folder(damage, image_folder, tmp_path, monkeypatch, capsys):
    if damage == "empty class":
        (image_folder / "train" / "class2").mkdir()
        quoted = "class2"
    elif damage == "broken image":
        victim = image_folder / "train" / "class1" / "3.png"
        victim.write_bytes(victim.read_bytes()[:40])
        quoted = "3.png"
    else:
        (image_folder / "validation").rename(image_folder / "elsewhere")
        quoted = "validation"
    out = tmp_path / "run"
    flags = ("--budget", "50%", "--data-dir", image_folder, "--img-size", "16", "--output", out)
    check_refused(call(search_tool, monkeypatch, *flags), capsys, quoted)
    assert not out.exists()


def test_output_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("a file")
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").write_text("")
    for out in (tmp_path / "file" / "run", full, "/proc/run"):
        check_refused(call(search_tool, monkeypatch, "--budget", "50%", "--output", out), capsys, str(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def test_a_dry_run_leaves_the_folder_of_its_search_alone(tmp_path, trusted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(search_tool, monkeypatch, "--supernet", "toy", "--budget", "50%", "--img-size", 8, "--dry-run") == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["toy-50pc-0-dry"]


@pytest.mark.parametrize(
    ("supernet", "percent"),
    [(name, percent) for name in ("prunet", "mobilenet_v2") for percent in (10, 20, 30, 40, 50, 60, 70, 80, 90)]
    + [("toy", percent) for percent in (10, 30, 50, 70, 80)],
)
def test_dry_run_reaches_every_budget(supernet, percent, tmp_path, trusted, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = ("--budget", f"{percent}%", "--supernet", supernet, "--dry-run", "--output", out)
    assert call(search_tool, monkeypatch, *flags) == 0, capsys.readouterr().err
    document = read_arch(out / "arch.json")
    table = CostTable.build(space_of(SUPERNETS[supernet](num_classes=10, img_size=32)), "macs")
    full = table.of(table.extremes()[1])
    assert 0.98 * full * percent / 100 <= document["macs"] <= full * percent / 100
    assert sorted(p.name for p in out.iterdir()) == ["arch.json", "config.json", "metrics.json", "model.py"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The smallest whole run: search, derive, export, train found, uniform and one random net."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    flags = [
        "--budget",
        "1.5MFLOPs,60kParams",
        "--img-size",
        "16",
        "--search-epochs",
        "2",
        "--epochs",
        "1",
        "-b",
        "128",
    ]
    flags += ["--num-random", "1", "--model-ema-decay", "0.9", "--mixup", "0.2", "--divisor", "4", "--output", str(out)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(search_tool, monkeypatch, *flags) == 0
    return out


def test_a_run_ends_with_all_its_files(finished_run):
    names = {"config.json", "history.jsonl", "arch.json", "model.py", "model.safetensors", "metrics.json"}
    names.add("report.html")
    assert {p.name for p in finished_run.iterdir()} - {"search.safetensors"} == names  # if nothing of it was cut off
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert {"seconds", "steps", "images", "peak_memory_mb", "first_step_ms", "last_step_ms", "relative_cost"} <= set(
        metrics["search"]
    )
    for net in (metrics["found"], metrics["uniform"], *metrics["random"]):
        assert {"macs", "params", "top1", "epochs"} <= set(net)
        ratios = [net[row["metric"]] / row["limit"] for row in metrics["budget"]]
        assert 0.98 <= max(ratios) <= 1.0
    assert metrics["validation_images"] == 360
    assert json.loads((finished_run / "config.json").read_text())["class_names"] == list("0123456789")
    history = [json.loads(line) for line in (finished_run / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == list(range(metrics["search"]["steps"]))


@pytest.mark.parametrize("method", ["l1", "gates"])
def test_networks_start_from_the_weights_of_the_search(method, tmp_path, trusted, monkeypatch):
    """They know the digits before they are trained, which networks that start from scratch do not."""
    begun = {}

    def train(model, data, recipe, seed, **_):
        for module in model.modules():  # the statistics of a norm are those of the wider network
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        with torch.no_grad():
            for x, _y in data.train_batches(64, seed=0):
                model.train()(x)
        begun[count_params(model)] = evaluate(model, data.val_batches(64), recipe)["top1"]
        return model, {"top1": 0.0, "loss": 0.0, "epochs": 0, "seconds": 0.0}

    monkeypatch.setattr(workflow, "train_from_scratch", train)
    flags = ["--model", "resnet18", "--model-kwargs", "layers=[1,1,1,1]", "channels=[8,16,16,24]", "--img-size", "8"]
    flags += ["--budget", "60%", "--divisor", "2", "--search-epochs", "6", "--epochs", "1", "--method", method]
    out = tmp_path / "kept"
    assert call(search_tool, monkeypatch, *flags, "--keep-weights", "--output", out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    nets = [metrics[kind] for kind in ("found", "uniform", "balanced")]
    assert metrics["found"]["inherited"]
    for net in nets:
        if net.get("inherited"):
            top1 = begun[net["params"]]
            assert net is not metrics["found"] or top1 > 35
    begun.clear()
    assert call(search_tool, monkeypatch, *flags, "--output", tmp_path / "scratch") == 0
    assert all(top1 < 25 for top1 in begun.values()) and begun
    found = build_net(read_arch(out / "arch.json")["net"], num_classes=10)
    found.load_state_dict(safetensors.torch.load_file(out / "search.safetensors"))


def test_a_search_that_learned_nothing_says_so(tmp_path, trusted, monkeypatch, capsys):
    flags = ("--budget", "50%", "--img-size", "8", "--width-mult", "0.25", "--search-epochs", "1", "--epochs", "1")
    flags += ("-b", "128", "--lr", "1e-9", "--gate-lr", "0.001", "--output", tmp_path / "run")
    assert call(search_tool, monkeypatch, *flags) == 0
    out = capsys.readouterr()
    for line in ("the search ended at a loss of 2.", "the gates ended at "):
        assert f"warning: {line}" in " ".join((out.out + out.err).split())
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())["search"]
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    losses = [row["gate_loss"] for row in history if "gate_loss" in row]
    assert figures["gate_loss"] == pytest.approx(losses[-1], abs=1e-4) and len(losses) < 20
    assert no_better_than_a_guess(2.2, 10) == []
    assert "not even 2 % below a guess's 2.30" in no_better_than_a_guess(2.29, 10)[0]
    assert "worse than a guess's 2.30" in no_better_than_a_guess(2.4, 10)[0]


def test_a_run_loads_without_dnas(finished_run):
    figures = verify_export(finished_run)
    assert figures["macs"] == read_arch(finished_run / "arch.json")["macs"]
    assert figures["weights"]


def test_retrain_and_export_from_a_run(finished_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "again"
    flags = (finished_run, "--epochs", "1", "-b", "256", "--output", out, "--name", "longer")
    assert call(retrain_tool, monkeypatch, *flags) == 0
    row = json.loads((out / "metrics.json").read_text())["found"]
    before = json.loads((finished_run / "metrics.json").read_text())["found"]["top1"]
    assert row["epochs"] == 1 and read_arch(out / "arch.json")["name"] == "longer"
    assert f"top-1 {row['top1']:.2f} % ({before:.2f} % in {finished_run})" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["class_names"] == list("0123456789")
    assert (out / "model.safetensors").exists()
    assert call(export_tool, monkeypatch, finished_run, "--output", tmp_path / "named", "--name", "my_net") == 0
    assert "def my_net(" in (tmp_path / "named" / "model.py").read_text()
    assert call(export_tool, monkeypatch, tmp_path / "named", "--check") == 0
    check_refused(call(retrain_tool, monkeypatch, finished_run, "--output", out), capsys, str(out))
    named = call(retrain_tool, monkeypatch, finished_run, "--name", "resnet50", "--output", tmp_path / "other")
    check_refused(named, capsys, "resnet50")
    check_refused(call(retrain_tool, monkeypatch, tmp_path, "--output", tmp_path / "o"), capsys, "arch.json")
    assert not (tmp_path / "other").exists()


def test_a_whole_run_with_a_network_of_timms(tmp_path, trusted, monkeypatch, capsys):
    out, again = tmp_path / "run", tmp_path / "again"
    flags = ["--model", "test_resnet", "--model-kwargs", "layers=[1,2,1,1]", "--budget", "40%", "--divisor", "4"]
    flags += ["--search-epochs", "3", "--epochs", "1", "-b", "128", "--in-chans", "1", "--output", out]
    assert call(search_tool, monkeypatch, *flags) == 0, capsys.readouterr().err
    document, metrics = read_arch(out / "arch.json"), json.loads((out / "metrics.json").read_text())
    assert document["supernet"] == document["net"]["base"] == "test_resnet"
    assert document["net"]["kwargs"] == {"layers": [1, 2, 1, 1]}
    assert 0.98 * metrics["budget"][0]["limit"] <= metrics["found"]["macs"] <= metrics["budget"][0]["limit"]
    assert metrics["found"]["macs"] == document["macs"]
    assert call(retrain_tool, monkeypatch, out, "--epochs", "1", "-b", "256", "--output", again) == 0
    found, before_training, retrained = trusted
    assert (found, retrained) == (out, again) and Path(before_training) not in (out, again)
    assert call(export_tool, monkeypatch, again, "--check") == 0
    too_much = (out, "--epochs", "1", "--drop-path", "0.1", "--output", tmp_path / "other")
    assert call(retrain_tool, monkeypatch, *too_much) == 0  # a ResNet takes it


def test_retraining_takes_the_data_of_the_run(image_folder, tmp_path, trusted, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "again"
    flags = ("--budget", "50%", "--data-dir", image_folder, "--img-size", "16", "--dry-run", "--output", run)
    assert call(search_tool, monkeypatch, *flags) == 0
    assert call(retrain_tool, monkeypatch, run, "--epochs", "1", "-b", "3", "--mixup", "0.2", "--output", out) == 0
    assert read_arch(out / "arch.json")["num_classes"] == 2
    alone = tmp_path / "alone" / "arch.json"
    alone.parent.mkdir()
    alone.write_text((run / "arch.json").read_text())
    check_refused(call(retrain_tool, monkeypatch, alone, "--output", tmp_path / "o"), capsys, "--data-dir")
    (alone.parent / "config.json").write_text('{"args": {}}')
    check_refused(call(retrain_tool, monkeypatch, alone, "--output", tmp_path / "o"), capsys, "config.json")
    # other images of the same shape have other statistics, and model.py must say those
    document = read_arch(run / "arch.json") | {"mean": [0.1, 0.2, 0.3]}
    write_export(run, document)
    flags = (run, "--data-dir", image_folder, "--epochs", "1", "-b", "4", "--output", tmp_path / "other")
    assert call(retrain_tool, monkeypatch, *flags) == 0
    assert read_arch(tmp_path / "other" / "arch.json")["mean"] != [0.1, 0.2, 0.3]


def test_a_model_file_that_was_changed_fails_the_check(finished_run, tmp_path, monkeypatch, capsys):
    copied = tmp_path / "run"
    shutil.copytree(finished_run, copied)
    (copied / "model.py").write_text("raise ValueError('edited')")
    check_refused(call(export_tool, monkeypatch, copied, "--check"), capsys, "edited")
    other = copied / "found.json"
    shutil.copy(copied / "arch.json", other)
    check_refused(call(export_tool, monkeypatch, other, "--check"), capsys, "found.json")


@pytest.mark.parametrize("where", ["search", "training"])
def test_an_interrupted_run_leaves_no_folder_unless_a_network_was_found(where, tmp_path, trusted, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        if where == "search":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(workflow, "run_search" if where == "search" else "train_arch", interrupt)
    monkeypatch.setattr(workflow, "search_figures", lambda *args: {"gate_loss": 0.0, "expected": {"macs": 0.0}})
    if where == "training":
        monkeypatch.setattr(workflow, "run_search", lambda *args, **kwargs: None)
    out = tmp_path / "run"
    assert call(search_tool, monkeypatch, "--budget", "50%", "--img-size", "16", "--output", out) == 130
    assert out.exists() == (where == "training")
    told = f"stopped: --resume {out} goes on from here\n" if out.exists() else "interrupted\n"
    assert capsys.readouterr().err == told


def test_a_dry_run_can_be_asked_for_again(tmp_path, trusted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dnas.cli.rehearsal.verify_export", trusted.append)
    for _ in range(3):
        assert call(search_tool, monkeypatch, "--budget", "50%", "--supernet", "toy", "--dry-run") == 0
    names = [f"toy-50pc-0-dry{end}" for end in ("", "-2", "-3")]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names
    assert [folder.name for folder in trusted] == names


def test_a_changed_arch_file_is_refused(finished_run, tmp_path, monkeypatch, capsys):
    document = json.loads((finished_run / "arch.json").read_text())
    document["macs"] += 1
    (tmp_path / "arch.json").write_text(json.dumps(document))
    check_refused(call(export_tool, monkeypatch, tmp_path, "--output", tmp_path / "out"), capsys, "macs")
    assert not (tmp_path / "out").exists()


def test_a_tar_of_images_is_read(image_folder, tmp_path, trusted, monkeypatch):
    path = tmp_path / "images.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(image_folder, ".")
    out = tmp_path / "run"
    flags = ("--budget", "50%", "--data-dir", path, "--dry-run", "--width-mult", "0.25", "--output", out)
    assert call(search_tool, monkeypatch, *flags) == 0
    assert read_arch(out / "arch.json")["num_classes"] == 2
