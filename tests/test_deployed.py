"""Parts of networks: together they are the whole network, each operation once."""

import random
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dnas.export.model_file import build_net, count_macs_torch
from dnas.latency.measured_parts import RUN, parts_of
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.checks import UserError
from supernets import SUPERNETS

FAMILIES = ["resnet18", "lcnet_050", "test_convnext", "test_nfnet", "test_byobnet"]


def macro_net(name):
    return MacroSupernet(SUPERNETS[name](num_classes=10, img_size=32, divisor=4, width_mult=0.5))


def timm_net(name):
    return TimmSupernet(TimmBase(name, 10, 3, 64, 4))


def draw(net, seed):
    rng = random.Random(seed)
    return net.space.complete({d.name: rng.choice(d.options) for d in net.space.decisions})


def built(net, arch):
    """The parts of one network, as modules with their inputs."""
    for part in parts_of(net):
        if all(arch.get(name) == option for name, option in part.site.when):
            widths = {slot: arch.get(width, width) for slot, width in part.site.widths.items()}
            yield part, *part.build(widths, 1)


class Functions(TorchFunctionMode):
    """How often each function of torch runs that makes a tensor of a tensor."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and any(isinstance(a, torch.Tensor) for a in args):
            self.names[func.__name__] += 1
        return out


CHECKED = ("conv2d", "linear", "batch_norm", "layer_norm", "relu", "relu_", "hardswish", "gelu", "silu", "mul", "add")


@pytest.mark.parametrize("name", ["prunet", "mobilenet_v2", "toy", *FAMILIES])
def test_parts_are_the_whole_network(name):
    net = (macro_net if name in SUPERNETS else timm_net)(name)
    for seed in range(2 if name in SUPERNETS else 1):
        arch = draw(net, seed)
        plain, size = build_net(net.net_of(arch), num_classes=10).eval(), net.outline.img_size
        counted, parts = 0, Functions()
        with torch.no_grad():
            for _, module, given in built(net, arch):
                with FlopCounterMode(display=False) as counter:
                    module(*given)
                counted += counter.get_total_flops() // 2
                with parts:
                    module(*given)
            with Functions() as whole:
                plain(torch.rand(1, 3, size, size))
        assert counted == count_macs_torch(plain, 3, size)
        assert {f: parts.names[f] for f in CHECKED} == {f: whole.names[f] for f in CHECKED}


def test_the_first_part_does_nothing():
    run = parts_of(macro_net("toy"))[0]
    module, given = run.build({}, 32)
    assert run.site.op == RUN and not run.site.widths and torch.equal(module(*given), *given)


@pytest.mark.parametrize("name", ["prunet", "mobilenet_v2"])
def test_a_block_is_what_the_network_has(name):
    """The same module tree, parameter by parameter, as the block of the exported network."""
    net = macro_net(name)
    arch = draw(net, 3)
    plain = build_net(net.net_of(arch), num_classes=10)
    own = [block for stage in plain.blocks for block in stage]
    blocks = [module for part, module, _ in built(net, arch) if part.site.name.startswith("stage")]
    for block, found in zip(own, blocks, strict=True):
        assert str(block) == str(found)
        assert {n: t.shape for n, t in block.state_dict().items()} == {
            n: t.shape for n, t in found.state_dict().items()
        }
        assert block.has_skip == found.has_skip


def test_equal_layers_are_one_unit():
    parts = parts_of(timm_net("resnet18"))
    units = {part.site.name: part.site.op for part in parts}
    assert units["layer1.1.conv2"] == units["layer1.0.conv2"] != units["layer2.0.conv2"]
    assert units["layer2.0.conv1"] != units["layer2.1.conv1"]
    assert len(set(units.values())) < len(parts)


def test_batches_and_images_of_the_space_itself():
    for net in (macro_net("mobilenet_v2"), timm_net("resnet18")):
        part = parts_of(net)[1]
        widths = {slot: options[0] for slot, options in part.options(net.space).items()}
        module, given = part.build(widths, 5)
        size = net.outline.img_size
        assert given[0].shape == (5, 3, size, size) and len(module(*given)) == 5


def test_concatenations_are_refused_by_name():
    with pytest.raises(UserError, match=r"features.denseblock1.denselayer2.conv1 has 2 widths side by side"):
        parts_of(timm_net("densenet121"))
