"""``dnas profile``: measure what the parts of a search space take on this device."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnas.cli.inputs import device_of, new_folder, outline_of
from dnas.export.model_file import build_net
from dnas.latency.measured_parts import parts_of
from dnas.latency.profile import check_figures, fit_scale, point_of, profile, spread_archs, time_nets
from dnas.latency.timing import CpuSpeedReference, Target, check_target, target_of
from dnas.nets.layer_supernet import MacroSupernet
from dnas.nets.supernet import Supernet
from dnas.nets.timm_space import TimmBase
from dnas.nets.timm_supernet import TimmSupernet
from dnas.runtime.distributed import gathered, rank, world_size
from dnas.runtime.progress import console, progress_bar
from dnas.runtime.run_folder import provenance, write_whole
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable
from dnas.spec.image_size import check_size, sides, size_text
from dnas.spec.latency_table import SCALES, SCHEMA, SPACE, check_use, read_table, table_of, table_text
from dnas.spec.space import Arch


def supernet_of(args) -> Supernet:
    """The search space in the flags, as a supernet that nobody trains."""
    args.img_size = check_size(args.img_size)
    for name, value in (("in-chans", args.in_chans), ("num-classes", args.num_classes)):
        if not 1 <= value <= 8192:
            raise UserError(f"--{name} {value} is not between 1 and 8192")
    outline = outline_of(args, {key: getattr(args, key) for key in ("num_classes", "in_chans", "img_size")})
    return (
        TimmSupernet(outline)
        if isinstance(outline, TimmBase)
        else MacroSupernet(outline(width_mult=args.width_mult or 1.0))
    )


def space_flags(args, net: Supernet) -> dict[str, Any]:
    """The flags that make this space again, for whoever searches it with the table."""
    found = {key: getattr(args, key) for key in SPACE}
    if not args.model:
        found |= {"supernet": net.name, "width_mult": args.width_mult or 1.0}
    return {key: value for key, value in found.items() if value not in (None, {})} | {"divisor": net.outline.divisor}


def rows_beside(path: Path, header: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """CpuSpeedReference and rows that a run that did not end has left; its last line may be torn.

    Raises UserError if its settings were others.
    """
    if not path.exists():
        return 0.0, []
    lines = path.read_text().splitlines(keepends=True)
    first, *more = [json.loads(line) for line in lines if line.endswith("\n")] or [None]
    if first != json.loads(json.dumps(header)):  # where a tuple is a list
        raise UserError(f"{path} is of another device or other settings: remove it, or choose another --out")
    return (more[0], more[1:]) if more else (0.0, [])


def new_table(args, target: Target) -> None:
    """Measure and write a table; what an interrupted run of the same settings has measured is taken over."""
    out = Path(args.out)
    if rank() == 0 and (out.exists() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {args.out!r}: a file that does not exist yet, in a folder that does, is allowed")
    net = supernet_of(args)
    parts = parts_of(net)
    keys = ("rounds", "block_ms", "tolerance", "scale_nets", "num_classes", "in_chans")
    protocol = {key: getattr(args, key) for key in keys}
    header = {"schema": SCHEMA, **target.header(), "space": space_flags(args, net), "protocol": protocol}
    units = len({part.site.op for part in parts})
    console.print(f"{net.name}: {units} units of {len(parts)} parts, on {header['device']}, {target.runtime}")

    if rank():
        out = new_folder(args.out) / out.name
    beside = out.with_name(f"{out.name}.part.jsonl")
    usual_us, known = gathered(rows_beside(beside, header))[0]
    measured = {point_of(row): row for row in known}
    started, pace = time.perf_counter(), CpuSpeedReference(target, usual_us)
    pace.usual_us = gathered(pace.usual_us)[0]
    sites, archs = [part.site for part in parts], spread_archs(net.space, args.scale_nets, seed=1)
    whole = time_archs(args, net, archs, target, pace) if archs else None  # before the parts, and once more after them
    with open(beside, "w") as file, progress_bar("measuring", 0) as advance:
        file.writelines(json.dumps(line) + "\n" for line in (header, pace.usual_us, *known))

        def on_rows(rows: list[dict], left: int) -> None:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            advance(steps=len(rows), total=len(measured) - len(known) + left)

        how = {"tolerance": args.tolerance, "rounds": args.rounds, "block_ms": args.block_ms}
        try:
            rows = profile(parts, net.space, target, measured, pace=pace, on_rows=on_rows, **how)
        except KeyboardInterrupt:
            console.print(f"{len(measured)} measurements are kept in {beside}: the same command will go on with them")
            raise
    scale, per_mparam = 1.0, 0.0
    if whole is not None:
        whole = np.hstack([whole, time_archs(args, net, archs, target, pace)])
        scale, per_mparam = scale_of(net, sites, rows, archs, np.median(whole, 1))
    drift = pace.typical_us() / pace.usual_us if pace.asked else 1.0  # from the pace of the beginning to the typical
    # Only the first process writes a table.
    drift, scale, per_mparam, kept = gathered((drift, scale, per_mparam, str(beside)))[0]
    header |= {"date": date.today().isoformat(), "pace_us": round(pace.typical_us(), 1)}
    if not SCALES[0] <= round(drift * scale, 4) <= SCALES[1]:
        times = f"whole networks take {scale:.3g} times the sum of their parts"
        what = times if archs else "no whole network is measured"
        raise UserError(
            f"{what}, and the speed of the machine changed by a factor of {drift:.3g}: {SCALES[0]} to {SCALES[1]} is "
            f"allowed in all. Was the machine busy? The same command goes on with {kept}; remove it to begin anew"
        )
    header |= {"scale": round(drift * scale, 4), "ms_per_mparam": round(drift * per_mparam, 4), "check": {}}
    write_whole(out, table_text(header, rows).encode())
    beside.unlink()
    console.print(f"{out}: {len(rows)} rows of {len(measured)} measured in {time.perf_counter() - started:.0f} s")
    table = CostTable.measured(net.space, sites, table_of(header, rows))
    low, high = (table.of(arch) for arch in table.extremes())
    console.print(f"networks take {low:.4g} to {high:.4g} ms by it; next: --check {out}")


def scale_of(net: Supernet, sites, rows, archs: Sequence[Arch], measured: np.ndarray) -> tuple[float, float]:
    """What `fit_scale` says of these networks."""
    told = [{"scale": 1.0, "ms_per_mparam": 0.0}, {"scale": 0.0, "ms_per_mparam": 1.0}]
    costs = [CostTable.measured(net.space, sites, table_of(header, rows)) for header in told]
    ms, mparams = (np.array([table.of(arch) for arch in archs]) for table in costs)
    return fit_scale(ms, mparams, measured)


def time_archs(args, net: Supernet, archs: Sequence[Arch], target: Target, pace: CpuSpeedReference) -> np.ndarray:
    """Milliseconds of whole networks, [len(archs), rounds]."""
    sizes = {"num_classes": args.num_classes, "in_chans": args.in_chans}
    nets = (build_net(net.net_of(arch), **sizes) for arch in archs)
    shape = (args.in_chans, *sides(args.img_size))
    return time_nets(nets, shape, target, pace, args.rounds, 2 * args.block_ms)


def check_table(args) -> None:
    """Predict and measure whole random networks, and write the figures into the table."""
    path = Path(args.check)
    table = read_table(path)
    space, known = table.header["space"], vars(args) | table.header["protocol"]
    for key in SPACE:
        setattr(args, key, space.get(key, {} if key == "model_kwargs" else None))
    for key in ("num_classes", "in_chans", "rounds", "block_ms"):
        setattr(args, key, known[key])
    device = device_of(args)
    check_use(table, {"device": provenance(device)["device"]})
    target = check_target(target_of(table.header, device))
    torch.set_num_threads(target.threads)
    net = supernet_of(args)
    costs = CostTable.measured(net.space, [part.site for part in parts_of(net)], table)
    archs = spread_archs(net.space, args.check_nets, seed=0)
    pace = CpuSpeedReference(target, table.header["pace_us"])
    ms = [time_archs(args, net, archs, target, pace) for _ in range(2)]
    figures = {
        key: value if isinstance(value, int) else float(f"{value:.4g}")
        for key, value in check_figures(costs, archs, ms).items()
    }
    content = json.loads(path.read_text())
    rows = content.pop("rows")
    content["check"] = {**figures, "date": date.today().isoformat()}
    write_whole(path, table_text(content, rows).encode())
    console.print(f"{figures['nets']} nets of {figures['fastest_ms']:.4g} to {figures['slowest_ms']:.4g} ms")
    for text, prefix in (("predicted against measured", ""), ("measured against measured again", "noise_")):
        error, tau = figures[f"{prefix}median_error"], figures[f"{prefix}kendall_tau"]
        console.print(f"{text}: median error {100 * error:.1f} %, Kendall tau {tau:.3f}")
    console.print(f"bias {100 * figures['bias']:+.1f} %")


def list_tables(paths: Sequence[str]) -> None:
    """A line of Markdown for each table."""
    told: tuple[str, ...] = ("table", "space", "device", "runs", "rows", "nets, ms")
    told += ("median error", "90th percentile", "bias", "tau", "noise", "tau of noise")
    print(f"| {' | '.join(told)} |\n{'| --- ' * len(told)}|")
    for path in paths:
        table = read_table(path)
        header, found = table.header, table.header["check"]
        space = dict(header["space"])
        name = space.pop("model", None) or space.pop("supernet", "")
        name = " ".join(
            [name, f"{size_text(space.pop('img_size', 0))} px", *(f"{key} {v}" for key, v in space.items())]
        )
        runs = f"{header['runtime']}, {header['dtype']}, batch {header['batch']}, threads {header['threads']}"
        cells = [Path(path).name, name, header["device"], runs, str(sum(unit.ms.size for unit in table.units.values()))]
        if found:
            cells.append(f"{found['nets']} of {found['fastest_ms']:.3g} to {found['slowest_ms']:.3g}")
            errors = [f"{100 * found[key]:.1f} %" for key in ("median_error", "p90_error", "noise_median_error")]
            taus = [f"{found[key]:.3f}" for key in ("kendall_tau", "noise_kendall_tau")]
            cells += [errors[0], errors[1], f"{100 * found['bias']:+.1f} %", taus[0], errors[2], taus[1]]
        print(f"| {' | '.join(cells + ['-'] * (len(told) - len(cells)))} |")


def main(args: argparse.Namespace, argv: list[str]) -> None:
    """A new table, the check of one, or what there is."""
    if sum(map(bool, (args.out, args.check, args.list))) != 1:
        raise UserError("one of --out FILE (a new table), --check TABLE and --list TABLE ... must be given")
    if rank() and not args.out:
        return None  # one process is enough
    if args.list:
        return list_tables(args.list)
    for name, low, high in (
        ("rounds", 3, 1000),
        ("block_ms", 0.01, 1e4),
        ("tolerance", 0.001, 1),
        ("scale_nets", 0, 10_000),
        ("check_nets", 3, 10_000),
    ):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is not between {low} and {high}")
    if args.check:
        return check_table(args)
    device = device_of(args)
    if world_size() > 1 and device.type == "cpu" and os.environ.get("LOCAL_WORLD_SIZE") != "1":
        raise UserError(f"--device cpu with {world_size()} processes: one on each machine is allowed, no neighbours")
    runtime = args.runtime or ("cudagraph" if device.type == "cuda" else "eager")
    dtype = args.amp_dtype if args.amp else "float32"
    threads = torch.get_num_threads() if args.threads is None else args.threads
    target = check_target(Target(device, runtime, dtype, args.batch_size, threads, args.channels_last))
    torch.set_num_threads(target.threads)
    new_table(args, target)
