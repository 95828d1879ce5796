"""Classes of different sizes: what is measured, and what is said of a network that answers the largest one."""

import json

import numpy as np
import pytest
import torch
from commands import call, search_tool
from sklearn.metrics import balanced_accuracy_score, recall_score

from dnas.report.diagnosis import as_good_as_one_answer
from dnas.spec.recipe import Recipe
from dnas.training.batches import in_memory
from dnas.training.loop import evaluate

COUNTS = (60, 2, 2, 2)


def unbalanced():
    y = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    x = torch.randint(256, (len(y), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return in_memory("few", (x, y), (x, y), tuple("abcd"), None, 3, "cpu", flip=True)


def test_scores_are_scikit_learns():
    torch.manual_seed(0)
    logits, y = torch.randn(500, 6), torch.randint(5, (500,))  # no image of class 5
    logits[torch.arange(500), y] += 1
    batches = zip(logits[..., None, None].split(64), y.split(64), strict=True)
    scores = evaluate(torch.nn.Flatten(), batches, Recipe())
    guessed = logits.argmax(1)
    assert scores["top1"] == pytest.approx(100 * float((guessed == y).double().mean()))
    assert scores["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-6)
    recall = 100 * recall_score(y, guessed, labels=range(5), average=None, zero_division=0)
    assert scores["class_top1"][:5] == pytest.approx(recall.tolist()) and scores["class_top1"][5] is None
    assert scores["balanced_accuracy"] == pytest.approx(float(np.mean(recall)))
    inside = guessed < 5  # scikit-learn's own name for it, where no answer is a class without an image
    again = evaluate(torch.nn.Flatten(), [(logits[inside][..., None, None], y[inside])], Recipe())
    assert again["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(y[inside], guessed[inside]))


def test_what_is_said_of_one_answer():
    assert as_good_as_one_answer({"found": 93.1, "uniform": 95.0}, share=0.93, name="a") == []
    (line,) = as_good_as_one_answer({"found": 93.0, "uniform": 95.0}, share=0.93, name="a")
    assert line.startswith("the found net is no better than always to answer 'a', which is right for 93.00 %")
    (line,) = as_good_as_one_answer({"found": 93.0, "uniform": 12.0}, share=0.93, name="a")
    assert line.startswith("the found, uniform nets are no better")


def test_a_run_on_one_large_class_says_so(tmp_path, trusted, monkeypatch, capsys):
    monkeypatch.setattr("dnas.cli.search.data_of", lambda args, device: unbalanced())
    out = tmp_path / "run"
    flags = ("--supernet", "toy", "--budget", "50%", "--search-epochs", 8, "--epochs", 2, "-b", 16, "--lr", 1e-5)
    assert call(search_tool, monkeypatch, *flags, "--output", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    metrics, config = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "config"))
    share = 100 * COUNTS[0] / sum(COUNTS)
    assert config["data"]["largest_class"]["name"] == "a" and f"{share:.2f} % of the validation images" in said
    poor = [kind for kind in ("found", "uniform", "balanced") if metrics[kind]["top1"] <= share + 1e-6]
    assert poor  # the weights have hardly moved
    assert any("no better than always to answer 'a'" in line for line in metrics["warnings"])
    for kind in ("found", "uniform", "balanced"):
        hits = [top1 * n / 100 for top1, n in zip(metrics[kind]["class_top1"], COUNTS, strict=True)]
        assert 100 * sum(hits) / sum(COUNTS) == pytest.approx(metrics[kind]["top1"])
        assert metrics[kind]["balanced_accuracy"] == pytest.approx(np.mean(metrics[kind]["class_top1"]))
    page = (out / "report.html").read_text()
    assert (
        "Accuracy by class" in page
        and "always to answer it is as accurate" in page
        and "<td>balanced accuracy</td>" in page
    )
