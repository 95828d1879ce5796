"""Benchmarks/streams.py: how often widths are used, what the rules choose, and the table of planted rows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import iso_flops  # noqa: E402
import public_tables  # noqa: E402
import streams  # noqa: E402
from iso_setups import outline_of, supernet_of  # noqa: E402


def test_layers_that_use_the_widths_of_a_vit():
    """Six blocks: the embedding is written by the patches and twice a block, and read twice a block and by the head."""
    space = supernet_of(outline_of(streams.NETWORKS["vit"], 10)).space
    written, used = (public_tables.uses(space, roles) for roles in (public_tables.WRITERS, public_tables.LAYERS))
    heads, inner = "blocks.0.attn.qkv", "blocks.0.mlp.fc1"
    assert (written["patch_embed.proj"], used["patch_embed.proj"]) == (1 + 2 * 6, 1 + 2 * 6 + 2 * 6 + 1)
    assert written[inner] == 1 and used[inner] == 2 and used[heads] == written[heads] + 1


def test_a_table_of_planted_rows(tmp_path, monkeypatch):
    """Equal nets are trained once. Differences of 1 and 2 points, and a training that the others do not have."""
    monkeypatch.setattr(iso_flops, "RESULTS", tmp_path)
    table = iso_flops.Table("streams")
    for way, width in {"uniform": 4, "balanced": 8, "writers": 12, "layers": 8}.items():
        table.append({"kind": "net", "net": f"vit/{way}", "arch": {"w": width}})
    assert streams.of_network(table, "vit") == {
        "vit/uniform": ["uniform"], "vit/balanced": ["balanced", "layers"], "vit/writers": ["writers"]
    }  # fmt: skip
    for way, tops in {"uniform": (30.0, 31.0), "balanced": (40.0, 41.0, 90.0), "writers": (41.0, 43.0)}.items():
        for seed, top1 in enumerate(tops):
            table.append({"kind": "training", "net": f"vit/{way}", "seed": seed, "top1": top1})
    (line,) = streams.report().splitlines()[2:]
    assert line == "| vit | 2 | 30.50 | 40.50 | 42.00 | 40.50 | +1.50 [-4.85, +7.85] | the same net |"


@pytest.mark.parametrize("way", ["writers", "layers"])
def test_a_used_width_gets_more_channels_inside_the_budget(way):
    setup = streams.replace(streams.NETWORKS["vit"], data="digits", num_train=100)
    lab = streams.open_lab(setup, "", "cpu")
    plain, found = (streams.WAYS[name](lab) for name in ("balanced", way))
    assert found["patch_embed.proj"] > plain["patch_embed.proj"]
    assert 0.98 * lab.budgets[0].limit <= lab.tables["macs"].of(found) <= lab.budgets[0].limit
