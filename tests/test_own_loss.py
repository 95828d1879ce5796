"""A program's own loss and score, in the place of cross entropy and top-1."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import own_nets  # noqa: E402

import dnas
from dnas.report.metrics import facts
from dnas.spec.checks import UserError
from dnas.spec.recipe import Recipe
from dnas.training.batches import OwnLoss
from dnas.training.criterion import make_criterion, plain_loss
from dnas.training.given_data import data_of_loaders
from dnas.training.loop import evaluate

SHORT = {"budget": "50%", "divisor": 2, "search_epochs": 1, "epochs": 1, "batch_size": 16}


def absolute(outputs, targets):
    return (outputs["maps"] - targets).abs().mean()


def close(outputs, targets):
    return 100 * ((outputs["maps"] - targets).abs() < 0.5).float().mean()


class Maps(nn.Module):
    """Returns a dict of maps."""

    def __init__(self):
        super().__init__()
        self.body = own_nets.UNet(4, 1)

    def forward(self, x):
        return {"maps": self.body(x)[:, 0]}


def batches(count, seed):
    x = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return x, x.amax(1)


def test_loss_and_score_are_means_over_all_inputs():
    """Of batches of different sizes, against the functions on everything at once."""
    x, y = batches(20, 0)
    data = data_of_loaders(
        DataLoader(TensorDataset(x, y), batch_size=4), [(x[:7], y[:7]), (x[7:], y[7:])], own=OwnLoss(absolute, close)
    )
    assert (data.num_train, data.num_val, data.num_classes) == (20, 20, 1)
    model = Maps().eval()
    with torch.no_grad():
        outputs = model(x)
    found = evaluate(model, data.val_batches(6), Recipe(), data.own_loss)
    assert found["loss"] == pytest.approx(float(absolute(outputs, y)), rel=1e-5)
    assert found["top1"] == pytest.approx(float(close(outputs, y)), rel=1e-5) and set(found) == {"loss", "top1"}
    seen = torch.cat([targets for _, targets in data.train_batches(4, seed=0)])
    assert torch.equal(seen.flatten(1).sum(1).sort().values, y.flatten(1).sum(1).sort().values)
    for loss in (make_criterion(Recipe(), data)(outputs, x, y), plain_loss(outputs, y, data, None)):
        assert float(loss) == pytest.approx(float(absolute(outputs, y)))


def test_a_score_that_is_no_number():
    x, y = batches(4, 0)
    data = data_of_loaders([(x, y)], [(x, y)], own=OwnLoss(absolute, lambda outputs, targets: float("inf")))
    with pytest.raises(UserError, match="score is inf: a finite number is expected"):
        evaluate(Maps(), data.val_batches(4), Recipe(), data.own_loss)


@pytest.mark.parametrize("method", ["balanced", "taylor", "snip"])
def test_a_network_of_maps_is_searched(method, tmp_path, trusted):
    train, val = [batches(32, 0)], [batches(16, 1)]
    done = dnas.search(
        Maps(), method=method, data=(train, val), loss=absolute, score=close, output=tmp_path / "run", **SHORT
    )
    rows = dict((row[0], row[1:]) for row in facts(done.metrics)[1])
    assert "score" in rows and "top-1" not in rows and len(rows["score"]) >= 3
    with torch.no_grad():
        outputs = done.model().eval()(val[0][0])
    assert done.metrics["found"]["top1"] == pytest.approx(float(close(outputs, val[0][1])), abs=1e-3)
    assert 0.98 * done.metrics["budget"][0]["limit"] <= done.costs["macs"] <= done.metrics["budget"][0]["limit"]
    assert "top-1" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"score": None}, "loss and score go together"),
        ({"method": "gates"}, "gates' learns from classes"),
        ({"mixup": 0.2}, "mixup is about classes"),
        ({"class_weights": "balanced"}, "class_weights is about classes"),
        ({"data": "digits"}, "loss goes with data that is a pair of iterables"),
    ],
)
def test_what_does_not_go_with_a_loss_of_ones_own(more, said, tmp_path):
    data = ([batches(8, 0)], [batches(8, 1)])
    given = {"method": "l1", "data": data, "loss": absolute, "score": close, **SHORT, **more}
    with pytest.raises(UserError, match=said):
        dnas.search(Maps(), output=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_several_labels_for_an_image():
    """A network of timm's with a loss of one's own: each image has any number of labels."""
    x = torch.rand(32, 3, 32, 32)
    y = (x.mean((2, 3)) > 0.5).float()
    data = data_of_loaders([(x, y)], [(x, y)], own=OwnLoss(F.binary_cross_entropy_with_logits, lambda o, t: 0.0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    with torch.no_grad():
        expected = F.binary_cross_entropy_with_logits(model(x), y)
        assert float(make_criterion(Recipe(), data)(model(x), x, y)) == pytest.approx(float(expected))
