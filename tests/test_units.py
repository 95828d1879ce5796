"""Budgets as people write them: what is read, what is refused and how, and that what is shown can be read again."""

import math
import random

import pytest

from dnas.spec.budget import Budget, parse_budget, show
from dnas.spec.checks import UserError

VALID = {
    "300MFLOPs": [("macs", 300e6)],
    "300MMACs": [("macs", 300e6)],
    "0.3G": [("macs", 300e6)],
    "300M": [("macs", 300e6)],
    "300m": [("macs", 300e6)],
    "300mflops": [("macs", 300e6)],
    "300MFLOP": [("macs", 300e6)],
    "300MMAC": [("macs", 300e6)],
    "300 MFLOPs": [("macs", 300e6)],
    "  300MFLOPs  ": [("macs", 300e6)],
    "300000kFLOPs": [("macs", 300e6)],
    "300000000FLOPs": [("macs", 300e6)],
    ".3GFLOPS": [("macs", 300e6)],
    "2.GMACS": [("macs", 2e9)],
    "1T": [("macs", 1e12)],
    "0300M": [("macs", 300e6)],
    "5MParams": [("params", 5e6)],
    "5mparams": [("params", 5e6)],
    "1.5 kPARAMS": [("params", 1500)],
    "7Params": [("params", 7)],
    "300MFLOPs,5MParams": [("macs", 300e6), ("params", 5e6)],
    "5MParams , 0.3G": [("params", 5e6), ("macs", 300e6)],
    "1.2ms": [("ms", 1.2)],
    "1.2 MS": [("ms", 1.2)],
    "900us": [("ms", 0.9)],
    ".5s": [("ms", 500)],
    "300MFLOPs,1.2ms": [("macs", 300e6), ("ms", 1.2)],
}

INVALID = [
    *("", " ", ",", "300MFLOPs,", ",300MFLOPs", "300", "0", "M", "MFLOPs", "%", "FLOPs", "Params"),
    *("-3MFLOPs", "+3MFLOPs", "--3M", "nanFLOPs", "nan", "infFLOPs", "inf", "-infG", "NaN%", "inf%"),
    *("0FLOPs", "0M", "0.0GMACs", "0Params", "0%", "0.00%", "100.1%", "101%", "1000%", "-5%"),
    *("300MB", "300MFLOPSs", "300XFLOPs", "300MMFLOPs", "300FLOPsM", "5Mparam s", "5%kParams", "5%M", "300K FLOPs"),
    *(
        "1e3MFLOPs",
        "0x10FLOPs",
        "1,000MFLOPs",
        "1_000FLOPs",
        "1.2.3MFLOPs",
        ".M",
        "½GFLOPs",
        "three",
        "300MFLOPs;5MParams",
    ),
    *("300MFLOPs 5MParams", "300MFLOPs\n5MParams", "300MB\nand more", "9" * 400 + "FLOPs", "300MFLOPs,-1MParams"),
    *("-1.2ms", "0ms", "0.0us", "1.2msec", "ms", "1.2kms", "nanms", "1e3ms", "300MFLOPs,-1.2ms", "1ms,900us", "1ms%"),
    *("300MFLOPs,0.2G", "50%,300MFLOPs", "50%,50%", "5MParams,5MParams", "1M,5MParams,2M"),
]


@pytest.mark.parametrize("text", VALID)
def test_valid_budgets(text):
    budgets = parse_budget(text)
    assert [b.metric for b in budgets] == [metric for metric, _ in VALID[text]]
    assert [b.limit for b in budgets] == pytest.approx([limit for _, limit in VALID[text]], rel=1e-12)
    assert not any(b.percent for b in budgets)


@pytest.mark.parametrize("text", [t for t in VALID if "," not in t])
def test_case_and_padding_do_not_matter(text):
    assert parse_budget(text.upper()) == parse_budget(text.lower()) == parse_budget(f"\t{text} ") == parse_budget(text)


@pytest.mark.parametrize("text, percent", [("50%", 50), ("100%", 100), ("0.5 %", 0.5), ("33.3%", 33.3)])
def test_percentages_are_of_the_widest_nets_flops(text, percent):
    (budget,) = parse_budget(text)
    assert budget == Budget("macs", percent, percent=True)
    assert budget.resolve(200e6) == Budget("macs", percent / 100 * 200e6)
    assert budget.resolve(200e6).resolve(7) == budget.resolve(200e6)
    assert str(budget) == text.replace(" ", "")
    with_params = parse_budget(f"{text},5MParams")
    assert [b.percent for b in with_params] == [True, False]


@pytest.mark.parametrize("text", INVALID)
def test_invalid_budgets_are_refused_in_one_line_that_quotes_them(text):
    with pytest.raises(UserError) as caught:
        parse_budget(text)
    message = str(caught.value)
    parts = {part.strip() for part in text.split(",")} | {text}
    assert any(repr(part) in message for part in parts)
    assert "\n" not in message and message.startswith("budget ")


@pytest.mark.parametrize("text", [t for t in INVALID if "," not in t and not t.lower().endswith("s")])
def test_refusals_say_what_is_allowed(text):
    with pytest.raises(UserError, match="300MFLOPs.*5MParams.*50%"):
        parse_budget(text)


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    "metric, value, text",
    [
        ("macs", 3e6, "3MFLOPs"),
        ("macs", 300_774_272, "300.8MFLOPs"),
        ("macs", 4_089_184_256, "4.089GFLOPs"),
        ("macs", 999, "999FLOPs"),
        ("macs", 1000, "1kFLOPs"),
        ("macs", 2.5e12, "2.5TFLOPs"),
        ("params", 25_557_032, "25.56MParams"),
        ("params", 0, "0Params"),
    ],
)
def test_show(metric, value, text):
    assert show(metric, value) == text


def test_what_is_shown_can_be_read_again():
    rng = random.Random(0)
    for _ in range(2000):
        metric, value = rng.choice(["macs", "params"]), 10 ** rng.uniform(0, 15)
        (again,) = parse_budget(show(metric, value))
        assert again.metric == metric and not again.percent
        assert math.isclose(again.limit, value, rel_tol=5.001e-4)  # four significant digits
        assert str(again) == show(metric, again.limit)
        (twice,) = parse_budget(str(again))
        assert math.isclose(twice.limit, again.limit, rel_tol=1e-12)
        percent = Budget("macs", round(rng.uniform(0.001, 100), 3), percent=True)
        assert parse_budget(str(percent)) == (percent,)
