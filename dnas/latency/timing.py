"""Run networks as they run when they are deployed, and measure the time of a run."""

import math
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnas.runtime.run_folder import provenance
from dnas.spec.checks import UserError
from dnas.spec.latency_table import RUNTIMES
from dnas.training.optimizer import to_channels_last


@dataclass(frozen=True)
class Target:
    """How networks run when they are deployed.

    ``batch`` is the number of images in a run, ``threads`` the number of threads of the CPU.
    """

    device: torch.device
    runtime: str = "eager"
    dtype: str = "float32"
    batch: int = 1
    threads: int = 1
    channels_last: bool = False

    def header(self) -> dict[str, Any]:
        """The part of a table's header that describes this target."""
        known = provenance(self.device)
        driver = platform.platform()
        if self.device.type == "cuda":
            driver = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        if self.runtime == "onnxruntime":
            driver += f", onnxruntime {_onnxruntime().__version__}"
        told = {"device": known["device"], "driver": driver[:128], "runtime": self.runtime, "dtype": self.dtype}
        told |= {"batch": self.batch, "threads": self.threads, "channels_last": self.channels_last}
        return told | {"torch": torch.__version__}


def target_of(header: Mapping[str, Any], device: torch.device) -> Target:
    """The target that a table with this header was measured on, as ``device`` of this machine."""
    return Target(device, *(header[key] for key in ("runtime", "dtype", "batch", "threads", "channels_last")))


def check_target(target: Target) -> Target:
    """``target`` itself if this machine can run it. Raises UserError otherwise."""
    if target.runtime not in RUNTIMES:
        raise UserError(f"--runtime {target.runtime!r} is not one of {', '.join(RUNTIMES)}")
    if target.runtime == "cudagraph" and target.device.type != "cuda":
        raise UserError(f"--runtime cudagraph needs --device cuda, not {target.device.type}")
    if target.runtime == "onnxruntime":
        if target.device.type != "cpu" or target.dtype != "float32":
            raise UserError(f"--runtime onnxruntime runs float32 on cpu, not {target.dtype} on {target.device.type}")
        _onnxruntime()
    if not 1 <= target.batch <= 65_536 or not 1 <= target.threads <= 1024:
        given = f"--batch-size {target.batch} --threads {target.threads}"
        raise UserError(f"{given}: 1 to 65536 images and 1 to 1024 threads are allowed")
    return target


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401  (torch's exporter needs it)
        import onnxruntime
    except ImportError:
        raise UserError("--runtime onnxruntime needs the packages of `pip install 'dnas[onnx]'`") from None
    return onnxruntime


# One call.


def ready(module: nn.Module, inputs: Sequence[Tensor], target: Target) -> Callable[[], object]:
    """A function that runs ``module`` on ``inputs`` once, as the target does."""
    dtype = getattr(torch, target.dtype)

    def placed(t: Tensor) -> Tensor:
        t = t.to(target.device, dtype if t.is_floating_point() else t.dtype)
        return t.to(memory_format=torch.channels_last) if t.ndim == 4 and target.channels_last else t

    module, given = module.eval().to(target.device, dtype), [placed(t) for t in inputs]
    if target.channels_last:
        to_channels_last(module)
    if target.runtime == "onnxruntime":
        return _onnx_call(module, given, target.threads)
    if target.runtime == "cudagraph":
        return _graph_call(module, given)
    run = torch.compile(module, fullgraph=True, dynamic=False) if target.runtime == "compile" else module

    def call() -> None:
        with torch.inference_mode():
            run(*given)

    return call


def _onnx_call(module: nn.Module, given: Sequence[Tensor], threads: int) -> Callable[[], object]:
    ort, names = _onnxruntime(), [f"x{k}" for k in range(len(given))]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        # The exporter that torch now prefers takes seconds for each of a thousand units; the graphs are the same.
        warnings.simplefilter("ignore")
        file = f"{folder}/part.onnx"
        torch.onnx.export(module, tuple(given), file, input_names=names, output_names=["y"], dynamo=False)
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    taken = {node.name for node in session.get_inputs()}
    binding = session.io_binding()
    for name, t in zip(names, given, strict=True):
        if name in taken:
            binding.bind_cpu_input(name, t.numpy())
    binding.bind_output("y")
    return lambda: session.run_with_iobinding(binding)


def _graph_call(module: nn.Module, given: Sequence[Tensor]) -> Callable[[], object]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside), torch.inference_mode():
        for _ in range(3):  # choices of the first runs (algorithms, workspaces) must not be captured
            module(*given)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        module(*given)

    def call() -> None:
        graph.replay()

    call.__dict__["kept"] = (module, given)  # the graph reads their memory, and does not own it
    return call


class CpuSpeedReference:
    """Measures the current speed of a CPU with a small reference network. Not used on GPUs.

    On a shared machine other processes may halve the speed for a minute. All milliseconds are converted to a usual
    speed: the speed at which the reference network takes ``usual_us``. If the value given is 0, ``usual_us`` is the
    median of the first measurements.
    """

    def __init__(self, target: Target, usual_us: float = 0.0) -> None:
        self.asked, self.usual_us = target.device.type == "cpu", usual_us
        self.seen: list[float] = []
        if not self.asked:
            return
        wide = nn.Sequential(nn.Conv2d(24, 144, 1), nn.Conv2d(144, 144, 3, padding=1, groups=144), nn.ReLU())
        net = nn.Sequential(wide, nn.Conv2d(144, 24, 1), nn.Flatten(2), nn.Unflatten(2, (14, 56)), nn.Conv2d(24, 96, 3))
        # It runs in the timed runtime: load made torch take 1.6 x as long, and onnxruntime 1.4 x.
        runtime = target.runtime if target.runtime == "onnxruntime" else "eager"
        self.run = ready(net, [torch.rand(1, 24, 28, 28)], Target(target.device, runtime))
        for _ in range(20):
            self.slowness()
        self.seen = self.seen[10:]
        self.usual_us = usual_us or self.typical_us()

    def slowness(self) -> float:
        """The time of the reference network now, over its usual time. 1 for a GPU."""
        if not self.asked:
            return 1.0
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            self.run()
            taken.append(time.perf_counter() - start)
        self.seen.append(1e6 * median(taken))
        return self.seen[-1] / self.usual_us if self.usual_us else 1.0

    def typical_us(self) -> float:
        """The median of all measured times of the reference network, in microseconds. 0 for a GPU."""
        return median(self.seen) if self.asked else 0.0


def time_calls(
    calls: Sequence[Callable[[], object]],
    target: Target,
    pace: CpuSpeedReference,
    rounds: int,
    block_ms: float,
    seed: int = 0,
) -> np.ndarray:
    """Milliseconds of a run at the usual speed, [len(calls), rounds]: means over blocks of about ``block_ms``.

    A round measures one block of every call, in a random order. So other load of the machine, and changes of its clock,
    spread over all calls. A block of several runs begins with a run that does not count, because caches are cold and
    other threads are asleep. The time of a block is divided by the mean of `CpuSpeedReference.slowness` before and
    after it.
    """
    sync = torch.cuda.synchronize if target.device.type == "cuda" else (lambda: None)

    def block(call: Callable[[], object], runs: int) -> float:
        if runs > 1:
            call()
            sync()
        start = time.perf_counter()
        for _ in range(runs):
            call()
        sync()
        return 1e3 * (time.perf_counter() - start) / runs

    runs = []
    for call in calls:
        call()
        runs.append(max(1, math.ceil(block_ms / max(1e-3, block(call, 1)))))
    order, rng = list(range(len(calls))), random.Random(seed)
    found, before = np.empty((len(calls), rounds)), pace.slowness()
    for k in range(rounds):
        rng.shuffle(order)
        for c in order:
            ms, after = block(calls[c], runs[c]), pace.slowness()
            found[c, k], before = 2 * ms / (before + after), after
    return found
