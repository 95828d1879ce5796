"""The code in the documentation."""

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """What stands between two fences; ``language`` is empty for commands of a shell."""

    path: Path
    language: str
    text: str

    def commands(self) -> list[str]:
        """Its lines without comments, with those that a backslash goes on with joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def blocks_of(path: Path) -> list[Block]:
    return [Block(path, language, text) for language, text in FENCE.findall(path.read_text())]
