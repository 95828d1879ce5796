"""Prove an export: build it in a fresh process where dnas cannot be imported, and count its costs again."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dnas.export.model_file import read_arch
from dnas.export.own_file import PROGRAM
from dnas.spec.image_size import sides

_CHILD = """
import json, math, os, sys
sys.modules.update(dnas=None, supernets=None)  # to import them is now an error, wherever they are installed
sys.path[:] = [os.getcwd(), *json.loads(sys.argv[4])]  # packages are where the parent finds them
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)
torch.backends.mha.set_fastpath_enabled(False)  # no counter knows torch's fused encoder layer
name, shape, kind = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
weights = os.path.isfile("model.safetensors")
if kind == "timm":
    import model, timm
    net = timm.create_model(name, pretrained=weights).eval().requires_grad_(False)
elif kind == "own":
    import model
    net = model.create(pretrained=weights).eval().requires_grad_(False)
else:
    net = torch.export.load(kind).module()
x = torch.zeros(1, *shape)

def shapes(out):
    if isinstance(out, torch.Tensor):
        return list(out.shape)
    return [shapes(o) for o in (out.values() if isinstance(out, dict) else out)]

with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
    found = {"outputs": shapes(net(x)), "params": sum({p.data_ptr(): p.numel() for p in net.parameters()}.values())}
found.update(macs=counter.get_total_flops() // 2, counted_by="torch")

def attention(inputs, outputs):  # fvcore lacks it
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])

try:
    from fvcore.nn import FlopCountAnalysis
    analysis = FlopCountAnalysis(net, x).unsupported_ops_warnings(False).tracer_warnings("none")
    ops = analysis.set_op_handle("aten::scaled_dot_product_attention", attention).by_operator()
    parts = ("_convolution_mode", "baddbmm", "attention")
    lacks = [op for op in analysis.unsupported_ops() if any(part in op for part in parts)]
    names = ("conv", "linear", "addmm", "mm", "bmm", "matmul", "scaled_dot_product_attention")
    if not lacks and not ops["einsum"]:
        found.update(macs=sum(int(ops[name]) for name in names), counted_by="fvcore")
except ImportError:
    pass
found["packages"] = sorted({type(m).__module__.partition(".")[0] for m in net.modules()})
versions = {name: sys.modules[name].__version__ for name in ("torch", "timm") if name in sys.modules}
print(json.dumps({**found, "weights": weights, **versions}))
"""


def verify_export(folder: str | Path) -> dict[str, Any]:
    """Build the ``model.py`` in ``folder`` in a fresh process where dnas cannot be imported, and count its costs.

    It loads the weights if they are there. Returns ``macs, params, outputs`` (shape for one image), ``packages`` (those
    that the modules come from), ``counted_by, weights, torch, timm``. Raises UserError if ``arch.json`` is wrong.
    Raises RuntimeError if the model does not build, differs from ``arch.json``, or has parts that are not from torch
    and timm. A network of the user's own may have parts from elsewhere; that of a program is looked at if it has been
    written (`dnas.export.own_file.write_program`).
    """
    folder = Path(folder)
    document = read_arch(folder / "arch.json")
    own = document["net"].get("own", {})
    kind = "timm" if not own else "own" if "file" in own else PROGRAM
    if kind == PROGRAM and not (folder / PROGRAM).is_file():
        return {}
    with tempfile.TemporaryDirectory() as copy:
        for name in ("model.py", "model.safetensors", PROGRAM, own.get("file", "model.py")):
            if (folder / name).is_file():
                shutil.copy(folder / name, copy)
        command = [sys.executable, "-I", "-B", "-W", "ignore", "-c", _CHILD]
        command += [document["name"], json.dumps([document["in_chans"], *sides(document["img_size"])]), kind]
        command += [json.dumps([path for path in sys.path if path])]
        child = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
    file = folder / (PROGRAM if kind == PROGRAM else "model.py")
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{file} does not work without dnas: {reason}")
    figures = json.loads(child.stdout.splitlines()[-1])
    expected = {"macs": document["macs"], "params": document["params"]}
    if not own:
        expected |= {"packages": ["timm", "torch"], "outputs": [1, document["num_classes"]]}
    for key, value in expected.items():
        if figures[key] != value:
            raise RuntimeError(f"{file} has {key} {figures[key]}, not {value}")
    return figures
