"""Profiling: which widths are measured, what is made of times, and what runs them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from tables import HEADER, costs_of
from torch import nn

from dnas.export.model_file import build_net
from dnas.latency import profile as profiling
from dnas.latency import timing
from dnas.latency.measured_parts import parts_of
from dnas.latency.profile import calibrated, check_figures, fit_scale, kendall_tau, row_of, spread_archs, time_nets
from dnas.latency.timing import CpuSpeedReference, Target, check_target, ready, time_calls
from dnas.methods.rules import uniform_arch
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.spec.budget import Budget
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.latency_table import table_of
from supernets import SUPERNETS

CPU = Target(torch.device("cpu"))
NET = MacroSupernet(SUPERNETS["mobilenet_v2"](num_classes=10, img_size=32, divisor=4))
PARTS = parts_of(NET)


def profiled(monkeypatch, ms, measured, noise=0.0, tolerance=0.05):
    """The rows that profiling ends with on a device where units take ``ms(unit, widths)``, and all that it measured."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(profiling, "ready", lambda module, inputs, target: None)

    def row(point, params, times):
        base = ms(point[0], dict(point[1])) * (1 + noise * rng.uniform(-1, 1, 25))
        return row_of(point, params, base)

    monkeypatch.setattr(profiling, "time_calls", lambda calls, *args, **kwargs: np.ones((len(calls), 25)))
    monkeypatch.setattr(profiling, "row_of", row)
    cheap = [profiling.Part(part.site, lambda widths, batch: (nn.Identity(), ()), part.more) for part in PARTS]
    told = []
    rows = profiling.profile(
        cheap, NET.space, CPU, measured, pace=CpuSpeedReference(CPU), tolerance=tolerance, rounds=25, block_ms=1.0,
        on_rows=lambda rows, left: told.append((len(rows), left)),
    )  # fmt: skip
    return rows, told


def smooth(unit, widths):
    """Linear in each width, as where arithmetic is all that counts."""
    return 0.001 if unit == "run" else 0.05 + 0.001 * math.prod(widths.values())


def staircase(unit, widths):
    return 0.001 if unit == "run" else 0.05 + 0.02 * sum(math.ceil(w / 32) for w in widths.values())


def errors_of(rows, ms):
    """Relative errors of a table along each width of each unit, the others at their widest."""
    units, errors = table_of(HEADER, rows).units, {}
    for part in PARTS[1:]:
        for slot, options in part.options(NET.space).items():
            ends = {s: o[-1] for s, o in part.options(NET.space).items()}
            for w in options:
                want = ms(part.site.op, ends | {slot: w}) - ms("run", {})
                found = float(units[part.site.op].at(**{s: np.array(v) for s, v in (ends | {slot: w}).items()}))
                errors.setdefault(part.site.op, []).append(abs(found / want - 1))
    return np.concatenate(list(errors.values()))


def test_where_latency_is_linear_few_widths_are_enough(monkeypatch):
    measured = {}
    rows, told = profiled(monkeypatch, smooth, measured)
    assert errors_of(rows, smooth).max() < 1e-3
    by_unit = {}
    for row in rows:
        by_unit.setdefault(row["unit"], []).append(row)
    for unit in by_unit.values():
        for slot in unit[0]["widths"]:
            assert len({row["widths"][slot] for row in unit}) <= 4  # the classifier has more
    assert sum(count for count, _ in told) == len(measured) and told[-1][1] == 0


def test_noise_is_no_reason_for_more(monkeypatch):
    few = len(profiled(monkeypatch, smooth, {})[0])
    assert len(profiled(monkeypatch, smooth, {}, noise=0.3)[0]) < 1.2 * few


def test_a_staircase_gets_widths_until_it_is_met_between_them(monkeypatch):
    few, _ = profiled(monkeypatch, smooth, {})
    rows, _ = profiled(monkeypatch, staircase, {}, tolerance=0.02)
    assert len(rows) > 1.5 * len(few)
    assert errors_of(rows, staircase).mean() < 0.02
    options = {}
    for part in PARTS:
        for slot, own in part.options(NET.space).items():
            options.setdefault((part.site.op, slot), set()).update(own)
    tried = 0
    for name, unit in table_of(HEADER, rows).units.items():
        for slot, known in zip(unit.slots, unit.widths, strict=True):
            if len(known) >= profiling.MOST_WIDTHS[len(unit.slots)]:
                continue
            for low, high in zip(known, known[1:], strict=False):
                for middle in [w for w in options[name, slot] if abs(2 * w - low - high) <= 1]:
                    for end in (0, -1):
                        at = {s: int(ws[end]) for s, ws in zip(unit.slots, unit.widths, strict=True)} | {slot: middle}
                        want = staircase(name, at)
                        assert (
                            abs(float(unit.at(**{s: np.array(w) for s, w in at.items()})) - want) < 0.02 * want + 0.002
                        )
                        tried += 1
    assert tried > 30


def test_what_was_measured_is_not_measured_again(monkeypatch):
    first = {}
    rows, _ = profiled(monkeypatch, smooth, first)
    some = dict(list(first.items())[: len(first) // 2])
    again, told = profiled(monkeypatch, smooth, some)
    assert again == rows and sum(count for count, _ in told) == len(first) - len(first) // 2


def test_what_starting_takes_is_counted_once(monkeypatch):
    rows, _ = profiled(monkeypatch, lambda unit, widths: 0.25 if unit == "run" else 1.0, {})
    table = CostTable.measured(NET.space, [part.site for part in PARTS], table_of(HEADER, rows))
    arch = table.extremes()[1]
    assert table.of(arch) == pytest.approx(0.25 + (len(PARTS) - 1) * 0.75)


def test_a_row_has_the_quantiles_of_its_times():
    ms = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    told = {"unit": "u", "widths": {"out": 8}, "params": 72, "ms": 6.0, "p10": 2.0, "p90": 10.0}
    assert row_of(("u", (("out", 8),)), 72, ms) == told


def test_weights_that_are_not_in_the_caches():
    """Planted: 0.7 of the milliseconds and 0.5 for each million of weights, and 2 % of noise."""
    rng = np.random.default_rng(0)
    ms, mparams = rng.uniform(1, 30, 400), rng.uniform(0.2, 25, 400)
    measured = (0.7 * ms + 0.5 * mparams) * (1 + 0.02 * rng.standard_normal(400))
    assert fit_scale(ms, mparams, measured) == pytest.approx((0.7, 0.5), rel=0.02)
    # Where weights do not matter, or many of them seem to make a network faster, there is one number.
    assert fit_scale(ms, mparams, 1.3 * ms) == pytest.approx((1.3, 0.0), abs=1e-9)
    scale, per_mparam = fit_scale(ms, mparams, 1.3 * ms - 0.01 * mparams)
    assert per_mparam == 0 and scale == pytest.approx(float(np.median(1.3 - 0.01 * mparams / ms)))
    # A first number that no table may have is not fitted, either.
    measured = 0.05 * ms + 2 * mparams
    assert fit_scale(ms, mparams, measured) == (pytest.approx(float(np.median(measured / ms))), 0.0)
    assert fit_scale(ms[:2], mparams[:2], measured[:2]) == (pytest.approx(float(np.median((measured / ms)[:2]))), 0.0)


def test_numbers_of_units_are_those_of_the_network():
    """Over the parts of a network there are as many parameters and buffers as in the network."""
    for net in (NET, TimmSupernet(TimmBase("test_resnet", 10, 3, 32))):
        parts, arch = parts_of(net), spread_archs(net.space, 1, seed=0)[0]
        total = 0
        for part in parts:
            if all(arch.get(name) == option for name, option in part.site.when):
                widths = {slot: arch.get(width, width) for slot, width in part.site.widths.items()}
                total += profiling.held_by(part.build(widths, 1)[0])
        plain = build_net(net.net_of(arch), num_classes=10, in_chans=3).state_dict()
        # (the batches that norms have seen are counted in one number each; no unit of timm's networks has them)
        numbers = [name for name in plain if name.endswith("num_batches_tracked")]
        assert 0 <= sum(t.numel() for t in plain.values()) - total <= len(numbers)


def test_kendall_is_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    b = b + a
    assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert kendall_tau(a, a) == 1 and kendall_tau(a, -a) == -1


def test_check_figures():
    """Networks that take 1.1 x their parts, and 1.21 x when they are measured again: errors, noise by hand."""
    table = costs_of(NET, smooth)
    archs = spread_archs(NET.space, 20, seed=0)
    exact = np.array([table.of(arch) for arch in archs])
    ms = np.tile(exact[:, None] * 1.1, 8)
    found = check_figures(table, archs, [ms, 1.1 * ms])
    assert found["nets"] == 20 and found["kendall_tau"] == 1 and found["noise_kendall_tau"] == 1
    assert found["noise_median_error"] == pytest.approx(1 - 1 / 1.1)
    for figure in (found["median_error"], -found["bias"], found["p90_error"]):
        assert figure == pytest.approx(1 - 1 / (1.1 * 1.05))
    assert found["fastest_ms"] == pytest.approx(1.1 * 1.05 * exact.min())


@pytest.mark.parametrize("wrong", [0.7, 0.95, 1.0, 1.3])
def test_a_network_is_found_by_what_it_takes(wrong):
    """Narrow networks take ``wrong`` times what the table says, the widest what it says."""
    table, low, high = costs_of(NET, smooth), *(costs_of(NET, smooth).of(a) for a in costs_of(NET, smooth).extremes())
    limit, asked = low + 0.3 * (high - low), []

    def truth(arch):
        asked.append(arch)
        return table.of(arch) * (wrong + (1 - wrong) * table.of(arch) / high)

    def find(costs):
        return uniform_arch(NET.space, {"ms": costs}, [Budget("ms", limit)])

    arch, told = calibrated(table, limit, find, truth)
    assert 0.96 * limit <= truth(arch) <= limit and told.of(arch) == pytest.approx(truth(arch))
    assert len({*asked}) <= 4 and (len({*asked}) == 1 or wrong != 1)


def test_a_device_on_which_no_network_is_fast_enough():
    """All take twice what the table says. The search cannot ask for less than the fastest: that one it is."""
    table = costs_of(NET, smooth)
    limit = 1.2 * table.of(table.extremes()[0])

    def find(costs):
        return uniform_arch(NET.space, {"ms": costs}, [Budget("ms", limit)])

    arch, told = calibrated(table, limit, find, lambda arch: 2 * table.of(arch))
    assert told.of(arch) == 2 * table.of(arch) > limit
    with pytest.raises(UserError):
        calibrated(table.scaled(2), limit, find, lambda arch: 2 * table.of(arch))


def test_nets_of_a_check_reach_from_narrow_to_wide():
    table = CostTable.build(NET.space, "macs")
    costs = [table.of(arch) for arch in spread_archs(NET.space, 50, seed=0)]
    low, high = (table.of(arch) for arch in table.extremes())
    assert min(costs) < 0.1 * high and max(costs) > 0.6 * high and min(costs) >= low
    assert spread_archs(NET.space, 5, seed=0) == spread_archs(NET.space, 50, seed=0)[:5]
    assert not set(spread_archs(NET.space, 50, seed=0)) & set(spread_archs(NET.space, 50, seed=1))


def test_few_networks_are_ready_at_a_time(monkeypatch):
    """All are timed, in order, four at a time, and those of the next four are not built before."""
    built, asked = [], []

    def net(width):
        built.append(width)
        return nn.Conv2d(3, width, 1)

    def timed(calls, target, pace, rounds, block_ms):
        asked.append(len(built))
        return np.array([[float(built[asked[-1] - len(calls) + k])] * rounds for k in range(len(calls))])

    monkeypatch.setattr(profiling, "time_calls", timed)
    found = time_nets(map(net, range(1, 11)), (3, 8, 8), CPU, None, 2, 1.0)
    assert found.tolist() == [[float(width)] * 2 for width in range(1, 11)] and asked == [4, 8, 10]


# Runtimes.

TARGETS = {
    "eager": CPU,
    "channels_last": Target(torch.device("cpu"), channels_last=True),
    "bfloat16": Target(torch.device("cpu"), dtype="bfloat16"),
    "onnxruntime": Target(torch.device("cpu"), runtime="onnxruntime"),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_more_work_takes_longer(target):
    calls = [
        ready(
            nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()),
            [torch.rand(1, 3, size, size)],
            target,
        )
        for width, size in ((8, 8), (64, 128))
    ]
    ms = np.median(time_calls(calls, target, CpuSpeedReference(target), 3, 1.0), 1)
    assert 0 < 4 * ms[0] < ms[1]


class Machine:
    """A clock that only work moves, at a pace of its own: ``slow`` is how much longer everything takes."""

    def __init__(self, monkeypatch, slow):
        self.now, self.slow = 0.0, slow
        self.calls = [lambda: self.work(2e-3), lambda: self.work(3e-3)]
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "ready", lambda *args: lambda: self.work(1e-4))

    def work(self, seconds):
        self.now += seconds * self.slow(self.now)


def test_a_machine_that_is_half_as_fast_for_half_of_the_time(monkeypatch):
    machine = Machine(monkeypatch, lambda now: 1.0 if now % 20 < 10 else 2.0)
    pace = CpuSpeedReference(CPU)
    ms = time_calls(machine.calls, CPU, pace, 901, 10.0)
    assert machine.now > 25
    for call, alone in zip(ms, (2.0, 3.0), strict=True):
        assert np.isclose(call, alone, rtol=1e-6).mean() > 0.99  # all but the blocks in which it changed
    # Whoever begins in the slow half tells all by that pace, and can bring it to any other.
    machine.now = 10.0
    later = CpuSpeedReference(CPU)
    assert later.usual_us == pytest.approx(2 * pace.usual_us)
    assert np.median(time_calls(machine.calls, CPU, later, 5, 10.0), 1) == pytest.approx([4.0, 6.0], rel=1e-6)
    same = CpuSpeedReference(CPU, pace.usual_us)
    assert np.median(time_calls(machine.calls, CPU, same, 5, 10.0), 1) == pytest.approx([2.0, 3.0], rel=1e-6)
    assert same.typical_us() == pytest.approx(2 * pace.usual_us, rel=1e-6)


def test_a_clock_that_creeps_is_divided_out(monkeypatch):
    machine = Machine(monkeypatch, lambda now: 1.0 + 0.3 * math.sin(now))
    machine.now = math.pi / 2
    ms = time_calls(machine.calls, CPU, CpuSpeedReference(CPU), 501, 10.0)
    assert machine.now > 10 and ms == pytest.approx(1.3 * np.array([[2.0], [3.0]]) * np.ones((2, 501)), rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["eager", "cudagraph"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_gpu(runtime, dtype):
    target = Target(torch.device("cuda"), runtime, dtype)
    calls = [ready(nn.Conv2d(64, 64, 3), [torch.rand(8, 64, size, size)], target) for size in (16, 512)]
    ms = np.median(time_calls(calls, target, CpuSpeedReference(target), 5, 2.0), 1)
    assert 0 < 4 * ms[0] < ms[1]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"runtime": "cudagraph"}, "--runtime cudagraph needs --device cuda, not cpu"),
        ({"runtime": "onnxruntime", "dtype": "float16"}, "runs float32 on cpu, not float16 on cpu"),
        ({"runtime": "tensorrt"}, "'tensorrt' is not one of eager, compile, cudagraph, onnxruntime"),
        ({"batch": 0}, "--batch-size 0"),
        ({"threads": 0}, "--threads 0"),
    ],
)
def test_targets_that_cannot_be(given, said):
    with pytest.raises(UserError) as told:
        check_target(Target(torch.device("cpu"), **given))
    assert said in told.value.with_flags
