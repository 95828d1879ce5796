"""Spaces that do not fit are refused, and an `Arch` holds exactly the answers that matter, in JSON too."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys

import pytest

from dnas.methods.derive import enumerate_archs
from dnas.nets.layer_supernet import space_of
from dnas.spec.checks import UserError
from dnas.spec.layer_space import Candidate, EfficientNetSpace, Stage
from dnas.spec.space import DROP, KEEP, Arch, Decision, Site, Space

IN_LAYER = (("keep", KEEP),)
IN_A = (*IN_LAYER, ("block", "a"))
DECISIONS = (
    Decision("width", (8, 16, 24), 16),
    Decision("keep", (DROP, KEEP), KEEP),
    Decision("block", ("a", "b"), "a", IN_LAYER),
    Decision("mid", (4, 8), 8, IN_A),
)
SITES = (
    Site("stem", "conv", {"in": 3, "out": "width"}, {"kernel": 3, "size": 4}),
    Site("a", "conv", {"in": "width", "out": "mid"}, {"kernel": 3, "size": 4}, IN_A),
)
SPACE = Space(DECISIONS, SITES)
FULL = {"width": 16, "keep": KEEP, "block": "a", "mid": 8}
SMALL = {"width": 8, "keep": DROP}


def small_macros():
    """Spaces that can be enumerated, with every kind of decision: (macro, number of networks counted by hand)."""
    ir3, ir5 = Candidate("ir", 3, 2, 2), Candidate("ir", 5, 1, 1, se=0.25)
    plain = EfficientNetSpace("p", 8, 1, (Stage(16, 2, 1, (ir3,)),), 24, "relu", False, 2, img_size=4)
    yield plain, 2 * 3 * 2 * 4  # stage, head, inner widths (2x the input)
    drop = dataclasses.replace(plain, stages=(Stage(16, 3, 1, (ir3,), droppable=True),))
    yield drop, 2 * 3 * 2 * (1 + 4) ** 2
    both = dataclasses.replace(plain, stages=(Stage(16, 3, 1, (ir3, ir5, Candidate("ds", 3)), droppable=True),))
    yield both, 2 * 3 * (2 + 1 + 1) * (1 + 4 + 2 + 1) ** 2


# Space: what is refused


def edit(index, **changes):
    """The good decisions with one of them changed."""
    changed = dataclasses.replace(DECISIONS[index], **changes)
    return (*DECISIONS[:index], changed, *DECISIONS[index + 1 :])


@pytest.mark.parametrize(
    "decisions",
    [
        (*DECISIONS, Decision("width", (1, 2), 1)),
        edit(0, options=()),
        edit(0, options=(8, 16, 16)),
        edit(0, options=(16, 8, 24)),
        edit(0, base=12),
        edit(0, base="16"),
        edit(0, base=True),
        edit(2, base="c"),
        edit(2, options=("a", "b", "a")),
        edit(2, when=(("keep", "perhaps"),)),
        edit(3, when=(("block", "a"),)),  # not the whole chain
        edit(3, when=(("block", "a"), ("keep", KEEP))),  # not outermost first
        edit(3, when=(("keep", DROP), ("block", "a"))),
        edit(3, when=(("width", 8), ("block", "a"))),
    ],
)
def test_decisions_that_do_not_fit_are_refused(decisions):
    with pytest.raises(ValueError):
        Space(decisions, ())


@pytest.mark.parametrize(
    "site",
    [
        dataclasses.replace(SITES[1], when=(("keep", "perhaps"),)),
        dataclasses.replace(SITES[1], when=(*IN_LAYER, ("block", "c"))),
        dataclasses.replace(SITES[1], widths={"in": "block", "out": 8}),
    ],
)
def test_sites_that_do_not_fit_are_refused(site):
    with pytest.raises(ValueError):
        Space(DECISIONS, (site,))


@pytest.mark.parametrize(
    "decisions, sites",
    [
        (edit(2, when=(("nobody", KEEP),)), ()),  # depends on what is not there
        (edit(2, when=(("block", "a"),)), ()),  # on itself
        ((DECISIONS[0], DECISIONS[2], DECISIONS[1]), ()),  # on a later one
        (DECISIONS, (dataclasses.replace(SITES[1], when=(("nobody", KEEP),)),)),
        (DECISIONS, (dataclasses.replace(SITES[1], widths={"in": "nobody", "out": 8}),)),
        (DECISIONS, (dataclasses.replace(SITES[1], when=()),)),  # its width does not matter everywhere
        (
            DECISIONS,
            (dataclasses.replace(SITES[1], widths={"in": 3, "out": 8}, when=(("block", "a"),)),),
        ),  # half a chain
    ],
)
def test_references_that_lead_nowhere_are_value_errors(decisions, sites):
    with pytest.raises(ValueError):
        Space(decisions, sites)


def test_an_option_is_found_by_value_and_a_truth_value_is_no_width():
    decision = Decision("w", (0, 1, 4), 1)
    assert [decision.index(o) for o in (0, 1, 4)] == [0, 1, 2] and decision.is_width
    assert not DECISIONS[1].is_width
    for wrong in (True, False, 2, "1", None):
        with pytest.raises(UserError, match=f"w = {wrong!r} is not one of 0, 1, 4"):
            decision.index(wrong)


# Space: complete and check


def test_complete_leaves_out_what_has_no_effect():
    assert dict(SPACE.complete(FULL)) == FULL
    assert dict(SPACE.complete(FULL | {"block": "b"})) == {"width": 16, "keep": KEEP, "block": "b"}
    assert dict(SPACE.complete(FULL | {"keep": DROP})) == {"width": 16, "keep": DROP}
    assert dict(SPACE.complete(SMALL)) == SMALL
    assert dict(SPACE.complete(FULL | {"something": "else"})) == FULL
    assert list(SPACE.complete(dict(reversed(FULL.items())))) == list(FULL)  # in the order of the space


def test_complete_is_idempotent():
    for arch in enumerate_archs(SPACE):
        assert SPACE.complete(arch) == arch == SPACE.check(arch)


def test_complete_needs_the_answers_that_matter():
    with pytest.raises(KeyError, match="mid"):
        SPACE.complete({k: v for k, v in FULL.items() if k != "mid"})


WRONG = {
    "missing": ({k: v for k, v in FULL.items() if k != "mid"}, "'mid'"),
    "nothing": ({}, "'width'"),
    "unknown": (FULL | {"depth": 3}, "'depth'"),
    "meaningless": (SMALL | {"block": "a"}, "'block'"),
    "off the grid": (FULL | {"width": 12}, "width = 12 is not one of 8, 16, 24"),
    "no such block": (FULL | {"block": "c"}, "block = 'c' is not one of a, b"),
    "a width as text": (FULL | {"width": "16"}, "width = '16'"),
    "a truth value": (FULL | {"width": True}, "width = True"),
    "a fraction": (FULL | {"width": 16.5}, "width = 16.5"),
    "nothing at all": (FULL | {"width": None}, "width = None"),
    "a list": (FULL | {"width": [16]}, r"width = \[16\]"),
    "an object": (FULL | {"width": {"16": 16}}, "width = {"),
    "not a number": (FULL | {"width": math.nan}, "width = nan"),
}


@pytest.mark.parametrize("why", WRONG)
def test_check_and_from_json_refuse_anything_else(why):
    answers, said = WRONG[why]
    with pytest.raises(UserError, match=said) as caught:
        SPACE.check(answers)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=said):
        Arch.from_json(json.dumps(answers), SPACE)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", '"width"', "true", '[["width", 8]]', "{'width': 8}", "\0", "1" * 5000]
)
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(UserError) as caught:
        Arch.from_json(text, SPACE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"width":' * 100_000])
def test_json_nested_too_deep_is_refused(text):
    with pytest.raises(UserError):
        Arch.from_json(text, SPACE)


# Arch


def test_json_round_trip_of_every_arch():
    seen = set()
    for macro, count in small_macros():
        space = space_of(macro)
        for arch in itertools.islice(enumerate_archs(space), 500):
            again = Arch.from_json(arch.to_json(), space)
            assert again == arch and hash(again) == hash(arch) and again.digest == arch.digest
            assert list(again) == list(arch) and again.diff(arch) == {}
            assert all(type(again[name]) is type(arch[name]) for name in arch)
            seen.add((count, arch.digest))
    assert len(seen) == sum(min(500, count) for _, count in small_macros())


def test_json_of_another_order_or_with_whole_floats_is_the_same_arch():
    arch = SPACE.complete(FULL)
    for answers in (dict(reversed(FULL.items())), FULL | {"width": 16.0}):
        again = Arch.from_json(json.dumps(answers), SPACE)
        assert again == arch and again.digest == arch.digest and type(again["width"]) is int


def test_digest_is_twelve_digits_of_sha256_of_the_sorted_answers():
    arch = Arch(FULL)
    text = '{"block": "a", "keep": "keep", "mid": 8, "width": 16}'
    assert arch.digest == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert arch.digest == Arch(dict(reversed(FULL.items()))).digest


def test_digest_does_not_depend_on_the_process():
    code = f"from dnas.spec.space import Arch; print(Arch({FULL!r}).digest)"
    for seed in ("0", "1"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == Arch(FULL).digest


def test_an_arch_is_a_mapping_with_value_semantics():
    arch = SPACE.complete(FULL)
    assert arch == FULL and len(arch) == 4 and "mid" in arch and arch.get("depth") is None
    assert arch != SPACE.complete(FULL | {"mid": 4})
    assert len({arch, SPACE.complete(FULL), SPACE.complete(SMALL)}) == 2
    assert arch.digest in repr(arch)
    with pytest.raises(TypeError):
        arch["width"] = 8
    source = dict(FULL)
    kept = Arch(source)
    source["width"] = 24
    assert kept["width"] == 16


def test_diff_names_every_difference_in_both_directions():
    full, small = SPACE.complete(FULL), SPACE.complete(SMALL)
    expected = {"width": (16, 8), "keep": (KEEP, DROP), "block": ("a", None), "mid": (8, None)}
    assert full.diff(small) == expected
    assert small.diff(full) == {name: (theirs, mine) for name, (mine, theirs) in expected.items()}
    assert full.diff(full) == {}
    assert full.diff(SPACE.complete(FULL | {"mid": 4})) == {"mid": (8, 4)}


# The size of a space


def test_number_of_archs_by_hand():
    assert SPACE.num_archs() == 3 * (1 + (2 + 1))
    assert Space((), ()).num_archs() == 1 and list(enumerate_archs(Space((), ()))) == [Arch({})]


@pytest.mark.parametrize("macro, count", list(small_macros()))
def test_number_of_archs_is_that_of_the_enumeration(macro, count):
    space = space_of(macro)
    archs = list(enumerate_archs(space))
    assert space.num_archs() == len(archs) == len(set(archs)) == count
    assert all(space.check(dict(arch)) == arch for arch in archs)


def test_number_of_archs_of_a_large_space_does_not_overflow():
    space = Space(tuple(Decision(f"w{k}", tuple(range(1, 33)), 1) for k in range(100)), ())
    assert space.num_archs() == pytest.approx(32.0**100)
