"""The decisions and sites of a search (`Space`) and one network of it (`Arch`): plain frozen data, no modules."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dnas.spec.checks import UserError

Option = int | str
When = tuple[tuple[str, Option], ...]

DROP, KEEP = "drop", "keep"


@dataclass(frozen=True)
class Decision:
    """One decision: a width (ascending ints), a block (names), or whether a layer stays (``DROP``, ``KEEP``).

    ``base`` is the option of the base net, which uniform scaling starts from. ``when`` lists the choices (decision,
    option) that this decision depends on, outermost first: in a network without them the decision does not matter.
    ``layer`` is the layer of the decision, by default the name of the decision.
    """

    name: str
    options: tuple[Option, ...]
    base: Option
    when: When = ()
    layer: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", self.layer or self.name)

    @property
    def kind(self) -> Literal["width", "block", "keep"]:
        """Whether this is a decision on a width, on a block, or on whether a layer stays (``keep``)."""
        return "width" if self.is_width else "keep" if set(self.options) == {DROP, KEEP} else "block"

    @property
    def is_width(self) -> bool:
        return isinstance(self.options[0], int)

    def index(self, option: Option) -> int:
        """Position of ``option``. Raises UserError if it is not one of the options."""
        if isinstance(option, bool) or option not in self.options:
            raise UserError(f"{self.name} = {option!r} is not one of {', '.join(map(str, self.options))}")
        return self.options.index(option)


@dataclass(frozen=True)
class Site:
    """A part of the network with a cost: one operation, or a whole block that is measured as one unit.

    ``widths`` maps the operation's width slots (``"in"``, ``"mid"``, ``"out"``) to a width decision or a constant.
    ``fixed`` holds its other numbers (kernel, output size, ...). The site exists only in networks with the choices
    ``when``. ``layer`` is the layer of the site, by default the name of the site.
    """

    name: str
    op: str
    widths: Mapping[str, Option]
    fixed: Mapping[str, int]
    when: When = ()
    layer: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", self.layer or self.name)


@dataclass(frozen=True)
class Space:
    """All decisions, each after those in its ``when``, and all sites.

    Raises ValueError if decisions and sites are inconsistent, for example if a ``when`` names an unknown option.
    """

    decisions: tuple[Decision, ...]
    sites: tuple[Site, ...]
    by_name: Mapping[str, Decision] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        seen: dict[str, Decision] = {}

        def check_chain(what: str, when: When) -> None:
            for k, (name, option) in enumerate(when):
                if name not in seen or option not in seen[name].options or seen[name].when != when[:k]:
                    raise ValueError(f"{what}: `when` is not the whole chain of answers that it depends on")

        for d in self.decisions:
            if d.name in seen or not d.options or len(set(d.options)) != len(d.options) or d.base not in d.options:
                raise ValueError(
                    f"decision {d.name!r}: a name used twice, or options not distinct, or base not of them"
                )
            if d.is_width and list(d.options) != sorted(d.options):
                raise ValueError(f"decision {d.name!r}: widths must ascend")
            check_chain(f"decision {d.name!r}", d.when)
            seen[d.name] = d
        for site in self.sites:
            check_chain(f"site {site.name!r}", site.when)
            for width in site.widths.values():
                if isinstance(width, str) and not (width in seen and seen[width].is_width):
                    raise ValueError(f"site {site.name!r}: {width!r} is no width")
                if isinstance(width, str) and site.when[: len(seen[width].when)] != seen[width].when:
                    raise ValueError(f"site {site.name!r}: its width {width!r} does not matter wherever it exists")
        object.__setattr__(self, "by_name", seen)

    def complete(self, answers: Mapping[str, Option]) -> "Arch":
        """The `Arch` of the choices ``answers``, without those that have no effect.

        Raises KeyError if a choice is missing, and UserError if one is not an option of its decision.
        """
        kept: dict[str, Option] = {}
        for d in self.decisions:
            if all(kept.get(name) == option for name, option in d.when):
                kept[d.name] = d.options[d.index(answers[d.name])]
        return Arch(kept)

    def check(self, answers: Mapping[str, Option]) -> "Arch":
        """``answers`` as an `Arch`. Raises UserError unless they are exactly the choices that matter, and valid."""
        unknown = [name for name in answers if name not in self.by_name]
        if unknown:
            raise UserError(f"decision {unknown[0]!r} is not part of this search space")
        try:
            arch = self.complete(answers)
        except KeyError as error:
            raise UserError(f"the architecture gives no answer to {error.args[0]!r}") from None
        for name in answers:
            if name not in arch:
                raise UserError(f"the architecture answers {name!r}, which its other answers make meaningless")
        return arch

    def num_archs(self) -> int:
        """The number of different networks in the space. It may exceed the integers of a machine."""

        def count(d: Decision) -> int:
            children = [c for c in self.decisions if c.when and c.when[-1][0] == d.name]
            return sum(math.prod(count(c) for c in children if c.when[-1][1] == o) for o in d.options)

        return math.prod(count(d) for d in self.decisions if not d.when)


class Arch(Mapping[str, Option]):
    """One network: exactly the choices that matter, in the order of the space. Immutable, hashable, JSON."""

    def __init__(self, answers: Mapping[str, Option]) -> None:
        self._answers = dict(answers)

    def __getitem__(self, name: str) -> Option:
        return self._answers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers)

    def __len__(self) -> int:
        return len(self._answers)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Arch({self.digest}, {len(self)} answers)"

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits, the same in every process and independent of the order of the choices."""
        return hashlib.sha256(json.dumps(self._answers, sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> str:
        return json.dumps(self._answers, indent=1)

    @classmethod
    def from_json(cls, text: str, space: Space) -> "Arch":
        """The arch in a JSON text. Raises UserError unless it is an arch of ``space``."""
        try:
            answers = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the architecture is not JSON: {error}") from None
        if not isinstance(answers, dict):
            raise UserError(f"the architecture must be an object of answers, not {type(answers).__name__}")
        return space.check(answers)

    def diff(self, other: "Arch") -> dict[str, tuple[Option | None, Option | None]]:
        """``{decision: (mine, theirs)}`` for all choices that differ. None means that an arch has no choice there."""
        names = [*self, *(name for name in other if name not in self)]
        return {n: (self.get(n), other.get(n)) for n in names if self.get(n) != other.get(n)}
