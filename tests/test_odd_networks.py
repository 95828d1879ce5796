"""Networks with parts that few have: each is masked, cut and counted as one network, or refused in one line."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_methods import METHODS, net_of, task_of
from test_own_networks import check_networks, lively
from torch import nn
from torch.nn import functional as F

from dnas.export.model_file import count_macs, count_macs_torch
from dnas.methods.loop import search
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.own_base import OwnBase
from dnas.nets.timm_space import TimmBase
from dnas.nets.traced_supernet import TracedSupernet
from dnas.nets.tracing import copied
from dnas.nets.weighted_norms import weighted_norms
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.layer_space import Candidate
from supernets.toy import toy


class Raw(nn.Module):
    """Two weights without modules of their own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(40, 24))
        self.head = nn.Linear(40, 10)

    def forward(self, x):
        x = F.linear(F.linear(x.mean(1), self.one).relu(), self.two).relu()
        return self.head(x.mean(1))


class Fixed(nn.Module):
    """Its second layer has a weight that is a buffer: a random projection."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 24), nn.Linear(20, 10)
        self.register_buffer("projection", torch.randn(20, 24))

    def forward(self, x):
        return self.head(F.linear(self.first(x.mean(1)).relu(), self.projection).relu().mean(1))


class Smoothed(nn.Module):
    """A fixed filter over one dimension, the same for all channels."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv1d(3, 24, 1), nn.Linear(24, 10)
        self.register_buffer("filter", torch.tensor([[[0.25, 0.5, 0.25]]]).repeat(24, 1, 1))

    def forward(self, x):
        x = self.first(x.mean(2)).relu()
        return self.head(F.conv1d(x, self.filter, groups=x.shape[1]).mean(2))


class Normed(nn.Module):
    """Linear layers around torch's root mean square norm."""

    def __init__(self, affine=True):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 32), nn.RMSNorm(32, elementwise_affine=affine)
        self.second, self.head = nn.Linear(32, 48), nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x.mean(1)))).relu().mean(1))


class Encoder(nn.Module):
    """torch's encoder layer, which has a fused form in evaluation."""

    def __init__(self, heads=2):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
        self.layer = nn.TransformerEncoderLayer(32, heads, 48, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.mean(1))).mean(1))


CUT = {  # what of each can be cut
    Raw: {"one", "two"},
    Fixed: {"first", "projection"},
    Smoothed: {"first"},
    Normed: {"first", "second"},
    Encoder: {"layer.linear1"},
}


@pytest.mark.parametrize("create", CUT)
def test_masked_and_cut_are_one_network_with_the_counted_costs(create):
    torch.manual_seed(0)
    net = TracedSupernet(OwnBase("odd", 10, 3, 8, divisor=2), lively(create())).eval()
    assert CUT[create] <= {d.name for d in net.space.decisions}
    check_networks(net, create, (3, 8, 8), 5)


def test_a_norm_without_weights_keeps_its_channels():
    net = TracedSupernet(OwnBase("odd", 10, 3, 8, divisor=2), Normed(affine=False))
    assert [d.name for d in net.space.decisions] == ["second"]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_an_encoder_layer_costs_what_its_products_come_to(heads):
    """8 tokens: embedding, query, key, value and projection, attention, two layers of the MLP, classifier."""
    products = 8 * (8 * 32 + 4 * 32 * 32 + 2 * 32 * 48) + 2 * 8 * 8 * 32 + 32 * 10
    fast, model = torch.backends.mha.get_fastpath_enabled(), Encoder(heads)
    assert count_macs(model, 3, 8) == count_macs_torch(model, 3, 8) == products
    assert torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_network_that_torch_cannot_copy():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(UserError, match="^Sequential cannot be copied .*parametrizations has norms"):
        copied(model)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_norms_with_factors_do_not_overflow_in_half_precision():
    """All factors are 1: the norm is torch's, which mixed precision computes in float32."""
    torch.manual_seed(0)
    x = 400 * torch.randn(4, 16)
    for module in (nn.LayerNorm(16), nn.GroupNorm(1, 16), nn.RMSNorm(16)):
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            expected = module(x.half())
            with weighted_norms(module, {"weight": torch.ones(16)}):
                found = module(x.half())
        torch.testing.assert_close(found.float(), expected.float(), rtol=5e-3, atol=5e-3)


def test_what_is_frozen_does_not_learn_in_a_search():
    net = net_of("resnet")
    net.model.conv1.weight.requires_grad_(False)
    before = net.model.conv1.weight.clone()
    done, _ = search(METHODS["gates"], net, task_of(net, "gates", "60%"))
    after = done.net.model.conv1.weight
    assert not after.requires_grad and torch.equal(after, before[: len(after)])
    assert done.net.model.fc.weight.requires_grad


def test_a_classifier_that_fits_is_taken(tmp_path):
    """timm drops a classifier of other classes than its own weights have; here it is compared with the network's."""
    kwargs = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}
    trained = timm.create_model("resnet18", num_classes=4, **kwargs)
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    for classes in (4, 7):
        loaded = TimmBase("resnet18", classes, kwargs=kwargs).create(checkpoint=str(tmp_path / "trained.safetensors"))
        assert torch.equal(loaded.layer4[0].conv1.weight, trained.layer4[0].conv1.weight)
        assert len(loaded.fc.weight) == classes
        assert classes == 7 or torch.equal(loaded.fc.weight, trained.fc.weight)


@pytest.mark.parametrize("name, content", [("broken.safetensors", b"12345678{"), ("empty.pth", b"")])
def test_a_file_that_holds_no_weights(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}' cannot be read as weights"):
        TimmBase("resnet18", 10).create(checkpoint=str(tmp_path / name))


def test_candidates_of_which_the_widest_has_no_projection():
    stage = replace(toy(num_classes=10).stages[0], candidates=(Candidate("ds", 3), Candidate("ir", 3, expand=1)))
    macro = replace(toy(num_classes=10, img_size=8), stages=(stage,))
    net = MacroSupernet(macro).eval()
    assert net(torch.zeros(2, 3, 8, 8), CostTable.build(net.space, "macs").extremes()[1]).shape == (2, 10)
