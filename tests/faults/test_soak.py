"""A long search takes no more memory and no more open files in the end than in the beginning."""

import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
from commands import call, search_tool, workflow

STATM, FILES = Path("/proc/self/statm"), Path("/proc/self/fd")


# Meant: elsewhere a process cannot read its memory as it is now without another package, only its peak.
@pytest.mark.faults
@pytest.mark.skipif(not STATM.exists(), reason="Linux tells the memory of a process there")
def test_ten_thousand_steps(tmp_path, monkeypatch, capsys):
    samples = []

    def append_row(file, row):
        plain(file, row)
        if row["step"] % 100 == 0:
            gc.collect()
            pages = int(STATM.read_text().split()[1])
            samples.append((row["step"], pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len([*FILES.iterdir()])))

    plain = workflow.append_row
    monkeypatch.setattr(workflow, "append_row", append_row)
    flags = ("--supernet", "toy", "--width-mult", 1, "--budget", "40%", "--img-size", 8, "-b", 100, "--epochs", 1)
    flags += ("--search-epochs", 1000, "--checkpoint-every", 5, "--output", tmp_path / "run")
    assert call(search_tool, monkeypatch, *flags) == 0
    steps, mb, files = np.array(samples).T
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["search"]["steps"] == 10_000 == steps[-1] + 100
    late = steps > 2000
    slope = 1000 * np.polyfit(steps[late], mb[late], 1)[0]
    with capsys.disabled():
        print(f"\n{mb[late][0]:.0f} to {mb[-1]:.0f} MiB from step 2000, {slope:+.2f} in 1000; {files[-1]:.0f} files")
    assert slope < 1.0 and files[-1] <= files[0]
