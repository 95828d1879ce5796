"""``--class-weights``: what they are, where they act, and that validation figures do not know them."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional as F

from dnas.methods.gates import GATES, image_loss
from dnas.methods.loop import begin
from dnas.methods.method import Task
from dnas.methods.rank_and_cut import dense_loss
from dnas.methods.rankings import L1
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_supernet import MacroSupernet
from dnas.spec.budget import Budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.recipe import Recipe
from dnas.training.batches import in_memory
from dnas.training.criterion import class_weights, cross_entropy, make_criterion
from dnas.training.from_scratch import train_from_scratch
from supernets import SUPERNETS

COUNTS, VAL_COUNTS = (30, 4, 2, 12), (1, 5, 1, 1)


def unbalanced(counts=COUNTS, blank=False):
    """Noise, or images without content, in four classes; the validation images are in other shares."""

    def part(counts, seed):
        y = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        noise = torch.randint(256, (len(y), 3, 8, 8), generator=torch.Generator().manual_seed(seed))
        return (0 * noise if blank else noise).to(torch.uint8), y

    return in_memory("few", part(counts, 0), part(VAL_COUNTS, 1), tuple("abcd"), None, 3, "cpu", flip=True)


def drawn(seed=0, images=20):
    torch.manual_seed(seed)
    return torch.randn(images, 4, dtype=torch.double), torch.randint(4, (images,)), torch.rand(4).double() + 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_weighted_as_torch_does(smoothing):
    z, y, w = drawn()
    own = cross_entropy(z, y, w, smoothing)
    assert torch.allclose(own, nn.CrossEntropyLoss(weight=w, label_smoothing=smoothing)(z, y), rtol=1e-12)
    t = (1 - smoothing) * F.one_hot(y, 4).double() + smoothing / 4
    terms = -(w * t * (z - z.logsumexp(1, keepdim=True))).sum()
    assert torch.allclose(own, terms / w[y].sum(), rtol=1e-12)


def test_soft_targets_are_weighted_term_by_term():
    """Not smoothed again; of certain targets the loss is that of their labels; a factor of all weights is nothing."""
    z, y, w = drawn()
    t = torch.rand(20, 4, dtype=torch.double).softmax(1)
    terms = sum(-w[c] * t[i, c] * (z[i, c] - z[i].logsumexp(0)) for i in range(20) for c in range(4))
    expected = terms / sum(w[c] * t[i, c] for i in range(20) for c in range(4))
    assert torch.allclose(cross_entropy(z, t, w, smoothing=0.1), expected, rtol=1e-12)
    assert torch.allclose(cross_entropy(z, F.one_hot(y, 4).double(), w), cross_entropy(z, y, w), rtol=1e-12)
    assert torch.allclose(cross_entropy(z, t, 7 * w), cross_entropy(z, t, w), rtol=1e-12)
    assert torch.allclose(cross_entropy(z, t), -(t * z.log_softmax(1)).sum(1).mean(), rtol=1e-12)


def test_balanced_is_scikit_learns_rule_on_the_training_labels():
    weights = class_weights(Recipe(class_weights="balanced"), unbalanced())
    labels = np.repeat(np.arange(4), COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert weights.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert class_weights(Recipe(), unbalanced()) is None
    assert class_weights(Recipe(class_weights="1, 2,0.5,1e1"), unbalanced()).tolist() == [1, 2, 0.5, 10]


@pytest.mark.parametrize("text", ["1,2", "1,2,3,4,5"])
def test_as_many_weights_as_classes(text):
    with pytest.raises(UserError, match=f"class_weights '{text}': 4 numbers are expected, one for each class"):
        make_criterion(Recipe(class_weights=text), unbalanced())


def test_a_class_without_an_image_has_no_balanced_weight():
    with pytest.raises(UserError, match="a training image of the class 'c' is needed"):
        class_weights(Recipe(class_weights="balanced"), unbalanced((5, 5, 0, 5)))


@pytest.mark.parametrize("text", ["even", "1,x", "1,,2", "1,-2", "1,0", "1,nan", "1,inf", ","])
def test_weights_that_are_none(text):
    with pytest.raises(UserError, match="'balanced', or a number above 0 for each class"):
        Recipe(class_weights=text)


@pytest.mark.parametrize("given", ["", "balanced", "1,3,2,5"])
def test_a_network_that_sees_nothing_learns_the_weighted_shares(given):
    """On blank images only the bias learns. The best probabilities are in proportion to w_c n_c, in closed form.

    The validation loss is the plain cross entropy of these, and the accuracy that of the largest one.
    """
    data = unbalanced(blank=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    recipe = Recipe(
        epochs=400, batch_size=sum(COUNTS), opt="sgd", lr=0.5, weight_decay=0.0, smoothing=0.0, class_weights=given
    )
    model, scores = train_from_scratch(model, data, recipe, seed=0)
    n = torch.tensor(COUNTS).double()
    weights = {"": torch.ones(4), "balanced": 1 / n, "1,3,2,5": torch.tensor([1.0, 3, 2, 5])}[given]
    expected = (weights * n) / (weights * n).sum()
    assert torch.allclose(model[1].bias.softmax(0).double(), expected, atol=2e-3)
    share = torch.tensor(VAL_COUNTS).double() / sum(VAL_COUNTS)
    assert scores["loss"] == pytest.approx(float(-(share * expected.log()).sum()), rel=1e-2)
    assert scores["train_loss"] == pytest.approx(float(-(expected * expected.log()).sum()), rel=1e-2)


def test_mixup_and_weights_train():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    recipe = Recipe(epochs=2, batch_size=16, mixup=0.2, class_weights="balanced")
    scores = train_from_scratch(model, unbalanced(), recipe, seed=0)[1]
    assert math.isfinite(scores["train_loss"]) and "skipped" not in scores


def task_of(net, config, weights="1,3,2,5"):
    tables = {"macs": CostTable.build(net.space, "macs")}
    budgets = (Budget("macs", 0.4 * tables["macs"].of(tables["macs"].extremes()[1])),)
    return Task(tables, budgets, unbalanced(), Recipe(epochs=40, batch_size=8, class_weights=weights), config)


def toy():
    torch.manual_seed(0)
    return MacroSupernet(SUPERNETS["toy"](num_classes=4, img_size=8))


def test_the_weights_of_a_search_learn_from_weighted_images():
    net = toy()
    task = task_of(net, L1.config())
    state = begin(L1, net, task)
    x, y = next(iter(task.weight_batches(0.0)))
    net.eval()
    plain = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3, 2, 5]), label_smoothing=0.1)
    assert torch.allclose(dense_loss(state, task, x, y, 0.0), plain(net(x, state.own.arch), y))


@pytest.mark.parametrize("confidence", [True, False])
def test_gates_learn_from_weighted_images(confidence):
    """The gradient of the logits of two parts of a batch, in closed form, without its part along all logits."""
    net, passes = toy(), []
    task = task_of(net, GatesConfig(confidence=confidence))
    state = begin(GATES, net, task)

    def watch(module, args, logits):
        passes.append([logits.detach().clone()])
        logits.register_hook(passes[-1].append)

    net.register_forward_hook(watch)
    x, y = next(task.held_out_batches(0.3).starting_at(0))
    probabilities = {n: p.detach().numpy() for n, p in net.probabilities_on_host().items()}
    loss, seen = image_loss(state, task, 2, x, y, 2, 2, probabilities)
    w, total = torch.tensor([1.0, 3, 2, 5]), 0.0
    assert len(passes) == 2 and seen == len(y)
    for part, (logits, grad) in enumerate(passes):
        labels = y[part::2]
        slope = w[labels][:, None] * (logits.softmax(1) - F.one_hot(labels, 4)) / w[y].sum()
        if not confidence:
            slope -= (slope * logits).sum() / logits.square().sum() * logits
        torch.testing.assert_close(grad, slope)
        total += F.cross_entropy(logits, labels, w, reduction="sum") / w[y].sum()
    torch.testing.assert_close(loss, total)
