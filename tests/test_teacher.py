"""Distillation: the loss, what the teacher sees, that it never changes, and runs that are stopped."""

from dataclasses import replace
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from stopped import in_parts, part_of_search
from timm.utils import random_seed
from torch.nn import functional as F

from dnas.methods.method import Task
from dnas.methods.settings import GatesConfig
from dnas.nets.layer_supernet import MacroSupernet
from dnas.runtime.checkpoint import read_checkpoint
from dnas.spec.budget import Budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.recipe import Recipe
from dnas.training.criterion import cross_entropy, make_criterion
from dnas.training.data import load_data
from dnas.training.from_scratch import train_from_scratch
from dnas.training.given_data import data_of_loaders
from dnas.training.teacher import Teacher, distillation_loss, make_teacher
from supernets import SUPERNETS

CPU = torch.device("cpu")


def network(num_classes=10, in_chans=3):
    torch.manual_seed(7)
    return timm.create_model("test_resnet", num_classes=num_classes, in_chans=in_chans)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    safetensors.torch.save_file(network().state_dict(), path)
    return str(path)


@pytest.fixture
def recipe(file):
    return Recipe(epochs=2, batch_size=32, kd_model_name="test_resnet", kd_checkpoint=file)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_and_its_gradient_in_closed_form(temperature):
    torch.manual_seed(0)
    z, t = torch.randn(2, 6, 5, dtype=torch.double)
    z.requires_grad_()
    loss = distillation_loss(z, t, temperature)
    loss.backward()
    p, q = (t / temperature).softmax(1), (z.detach() / temperature).softmax(1)
    terms = [p[i, c] * (p[i, c] / q[i, c]).log() for i in range(6) for c in range(5)]
    assert float(loss.detach()) == pytest.approx(temperature**2 * float(sum(terms)) / 6, rel=1e-12)
    torch.testing.assert_close(z.grad, temperature * (q - p) / 6)
    assert float(distillation_loss(t, t, temperature)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_of_a_step_is_timms(mixed, recipe, monkeypatch):
    """timm's own task, with images that are normalised otherwise for the teacher."""
    distillation = pytest.importorskip("timm.task.distillation")  # Meant: timm has it only in newer versions.
    data, student = load_data(img_size=32), timm.create_model("test_efficientnet", num_classes=10).eval()
    student.pretrained_cfg = student.pretrained_cfg | {"mean": data.mean, "std": data.std}
    assert data.mean != network().pretrained_cfg["mean"]
    x, y = next(iter(data.train_batches(32, seed=0)))
    y = torch.rand(32, 10).softmax(1) if mixed else y
    task = distillation.LogitDistillationTask(
        student, network(), partial(cross_entropy, smoothing=0.1), task_loss_weight=0.3, temperature=2.0, verbose=False
    )
    given = Recipe(kd_model_name="x", kd_temperature=2.0, task_loss_weight=0.3)
    loss = make_criterion(given, data, Teacher(network(), data))(student(x), x, y)
    torch.testing.assert_close(loss, task.train(False)(x, y)["loss"])


@pytest.mark.parametrize("in_chans", [3, 1])
def test_the_teacher_sees_pixels_as_it_is_used_to(in_chans, tmp_path):
    data, path = load_data(img_size=32, in_chans=in_chans), str(tmp_path / "weights.pth")
    torch.save({"state_dict": network(in_chans=in_chans).state_dict()}, path)
    teacher = make_teacher(Recipe(kd_model_name="test_resnet", kd_checkpoint=path), data, CPU)
    x, _ = next(iter(data.val_batches(8)))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    pixels = x * std + mean
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    expected = network(in_chans=in_chans).eval()((pixels - 0.5) / 0.5)  # test_resnet's own mean and deviation
    torch.testing.assert_close(teacher(x), expected.detach(), atol=1e-4, rtol=1e-4)


def test_batches_of_a_program_stay_as_they_are():
    x, y = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    data = data_of_loaders([(x, y)], [(x, y)])
    torch.testing.assert_close(Teacher(network(), data)(x), network().eval()(x).detach())


def frozen(teacher):
    """Whether it is as it was, and learns nothing."""
    before = network().state_dict()
    return (
        all(torch.equal(t, before[name]) for name, t in teacher.model.state_dict().items())
        and not any(module.training for module in teacher.modules())
        and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    )


def test_a_student_that_is_the_teacher_has_nothing_to_learn(recipe):
    """Without labels, and in eval mode; after a step towards other logits it has."""
    data = load_data(img_size=32)
    teacher, student = make_teacher(recipe, data, CPU), network().eval()
    student.pretrained_cfg["mean"], student.pretrained_cfg["std"] = data.mean, data.std
    x, y = next(iter(data.train_batches(32, seed=0)))
    seen = x * teacher.scale + teacher.shift
    without = Recipe(kd_model_name="x", task_loss_weight=0.0)
    loss = make_criterion(without, data, teacher)(student(seen), x, y)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-5
    assert float(make_criterion(without, data, teacher)(student(x), x, y).detach()) > 1e-5 and frozen(teacher)


def test_a_training_brings_the_student_to_its_teacher(recipe):
    """Labels weigh nothing: the student's answers get nearer to the teacher's, whose weights stay bit for bit."""
    data = load_data(img_size=8).take(300)
    recipe = replace(recipe, epochs=15, task_loss_weight=0.0, lr=1e-2)
    teacher = make_teacher(recipe, data, CPU)
    x, _ = next(iter(data.val_batches(200)))
    distances = []
    for epochs in (1, 15):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        criterion = make_criterion(recipe, data, teacher)
        model, _ = train_from_scratch(model, data, replace(recipe, epochs=epochs), seed=0, criterion=criterion)
        distances.append(float(F.mse_loss(model(x).softmax(1), teacher(x).softmax(1)).detach()))
    assert distances[1] < 0.5 * distances[0] and frozen(teacher)


def test_a_training_goes_on_to_the_bit(recipe, tmp_path):
    data, kept = load_data(img_size=8).take(300), []

    def part(journal):
        random_seed(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        criterion = make_criterion(recipe, data, make_teacher(recipe, data, CPU))
        saved = journal.under_way("training")
        kept.append(saved)
        on_step = partial(journal.step, "training")
        return train_from_scratch(model, data, recipe, seed=3, on_step=on_step, saved=saved, criterion=criterion)

    model, figures = in_parts(tmp_path / "new", (), part)
    other, seen = in_parts(tmp_path, (5, 7), part)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert figures["train_loss"] == seen["train_loss"] and figures["loss"] == seen["loss"]
    assert [*kept[-1]["model"]] == [*model.state_dict()]  # and no teacher


def test_a_search_goes_on_to_the_bit(recipe, tmp_path):
    data, teachers = load_data(img_size=8).take(300), []

    def start():
        torch.manual_seed(0)
        net = MacroSupernet(SUPERNETS["toy"](num_classes=10, img_size=8))
        tables = {"macs": CostTable.build(net.space, "macs")}
        budgets = (Budget("macs", 0.4 * tables["macs"].of(tables["macs"].extremes()[1])),)
        teachers.append(make_teacher(recipe, data, CPU))
        task = Task(tables, budgets, data, recipe, GatesConfig(), teacher=teachers[-1])
        return net, task

    net, rows = in_parts(tmp_path / "new", (), part_of_search(start))
    other, seen = in_parts(tmp_path, (2, 6), part_of_search(start))
    assert seen == rows and all(torch.equal(a, b) for a, b in zip(net.tensors(), other.tensors(), strict=True))
    assert all(map(frozen, teachers))
    saved = read_checkpoint(tmp_path)["under_way"]["state"]["search"]
    assert [*saved["net"]] and not any("model." in name for name in saved["net"])


@pytest.mark.parametrize("given, said", [
    ({"kd_model_name": "resnet51"}, "^kd_model_name 'resnet51' is no model of timm's; near: resnet"),
    ({"kd_model_name": "test_resnet"}, "weights are for 1000 classes: kd_checkpoint with weights for 10 c"),
    ({"kd_model_name": "test_resnet", "kd_checkpoint": "no/file"}, "kd_checkpoint 'no/file' is no file"),
    ({"kd_model_name": "test_efficientnet", "kd_checkpoint": "FILE"}, "does not fit the network: "),
    ({"kd_model_name": "test_vit", "kd_checkpoint": "VIT"}, "'test_vit' cannot be used on images of 8 px"),
    ({"kd_model_name": "test_resnet", "kd_checkpoint": "SEVEN"}, "for 10 classes.*: fc.weight is \\[7, .*\\], \\[10, "),
    ({"kd_model_name": "test_resnet", "kd_checkpoint": "TEXT"}, "cannot be read as weights of safetensors or torch"),
    ({"kd_model_name": "test_resnet", "kd_checkpoint": "LIST"}, "kd_checkpoint '.*list.pth' (holds no|cannot be read)"),
])  # fmt: skip
def test_teachers_that_are_none(given, said, file, tmp_path):
    vit = timm.create_model("test_vit", num_classes=10).state_dict()
    safetensors.torch.save_file(vit, tmp_path / "vit.safetensors")
    torch.save(network(num_classes=7).state_dict(), tmp_path / "seven.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    files = {"FILE": file, "VIT": "vit.safetensors", "SEVEN": "seven.pth", "TEXT": "text.pth", "LIST": "list.pth"}
    if (name := given.get("kd_checkpoint")) in files:
        given = given | {"kd_checkpoint": str(tmp_path / files[name])}
    with pytest.raises(UserError, match=said) as told:
        make_teacher(Recipe(**given), load_data(img_size=8), CPU)
    assert "\n" not in str(told.value) and "--" not in str(told.value)


def test_weights_of_timms(monkeypatch):
    """Nothing is downloaded here: timm is asked for its weights, and what it cannot load is a user's error."""

    def create_model(name, **given):
        assert name == "test_resnet" and given == {"pretrained": True, "num_classes": 1000, "in_chans": 3}
        raise OSError("no network\nand more")

    monkeypatch.setattr(timm, "create_model", create_model)
    data = replace(load_data(img_size=8), num_classes=1000)
    with pytest.raises(UserError, match="^kd_model_name 'test_resnet' cannot be used .*: no network$"):
        make_teacher(Recipe(kd_model_name="test_resnet"), data, CPU)


@pytest.mark.parametrize("given", [{"kd_temperature": 2.0}, {"kd_checkpoint": "a"}, {"task_loss_weight": 0.1}])
def test_settings_of_a_teacher_without_one(given):
    with pytest.raises(UserError, match=f"^{next(iter(given))} .* goes with kd_model_name$"):
        Recipe(**given)
