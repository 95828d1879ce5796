"""Budgets against the range of a space: resolved, or refused with the range named."""

import pytest

from dnas.nets.layer_supernet import space_of
from dnas.spec.budget import Budget, parse_budget, show
from dnas.spec.checks import UserError
from dnas.spec.cost import CostTable, resolve_budgets
from supernets import SUPERNETS

METRICS = ("macs", "params")


def tables_of(name):
    space = space_of(SUPERNETS[name](num_classes=10, img_size=32, width_mult=0.5))
    return {metric: CostTable.build(space, metric) for metric in METRICS}


def range_of(table):
    return tuple(table.of(arch) for arch in table.extremes())


def test_budgets_inside_the_range_are_resolved():
    tables = tables_of("prunet")
    low, high = range_of(tables["macs"])
    assert resolve_budgets(tables, parse_budget("50%")) == (Budget("macs", high / 2),)
    assert resolve_budgets(tables, parse_budget("100%")) == (Budget("macs", high),)
    for limit in (low, low + 1, high):
        assert resolve_budgets(tables, (Budget("macs", limit),)) == (Budget("macs", limit),)
    small = range_of(tables["params"])[0]
    both = (Budget("macs", 50.0, percent=True), Budget("params", small))
    assert resolve_budgets(tables, both) == (Budget("macs", high / 2), Budget("params", small))
    # One limit that cannot bind is no error as long as another can.
    loose = (Budget("macs", 10 * high), Budget("params", 2 * small))
    assert resolve_budgets(tables, loose) == loose


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("side", ["below", "above"])
def test_budgets_out_of_reach_name_the_range(metric, side):
    tables = tables_of("mobilenet_v2")
    low, high = range_of(tables[metric])
    budget = Budget(metric, low * 0.999 if side == "below" else high * 1.001)
    with pytest.raises(UserError) as caught:
        resolve_budgets(tables, (budget,))
    message = str(caught.value)
    assert all(part in message for part in (str(budget), show(metric, low), show(metric, high))) and "\n" not in message


def test_two_budgets_of_which_none_can_bind_or_one_cannot_be_kept():
    tables = tables_of("mobilenet_v2")
    (low, high), (fewest, most) = range_of(tables["macs"]), range_of(tables["params"])
    with pytest.raises(UserError, match="out of reach"):
        resolve_budgets(tables, (Budget("macs", 2 * high), Budget("params", 2 * most)))
    with pytest.raises(UserError, match=show("params", fewest)):
        resolve_budgets(tables, (Budget("macs", (low + high) / 2), Budget("params", fewest / 2)))
    with pytest.raises(UserError, match="1% is out of reach"):
        resolve_budgets(tables, parse_budget("1%"))


def test_percent_of_the_parameters():
    tables = tables_of("prunet")
    (_, macs), (_, params) = range_of(tables["macs"]), range_of(tables["params"])
    both = parse_budget("40%, 50 %params")
    assert both == (Budget("macs", 40.0, percent=True), Budget("params", 50.0, percent=True))
    assert [str(b) for b in both] == ["40%", "50%Params"]
    assert resolve_budgets(tables, both) == (Budget("macs", 0.4 * macs), Budget("params", params / 2))
    assert parse_budget("40%FLOPs") == parse_budget("40%")
    for wrong in ("50%kParams", "101%Params", "0%Params", "50%Params,60%Params", "50%ms", "%Params"):
        with pytest.raises(UserError, match="^budget "):
            parse_budget(wrong)
