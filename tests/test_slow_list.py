"""Every line of slow.txt is a test or a fixture that exists."""

import re
from pathlib import Path

from conftest import SLOW

HERE = Path(__file__).parent


def test_every_line_is_of_a_test():
    texts = {f"tests/{p.relative_to(HERE).as_posix()}": p.read_text() for p in HERE.rglob("test_*.py")}
    assert len(SLOW) > 20
    for line in SLOW:
        if line.startswith("fixture:"):
            name = line.removeprefix("fixture:")
            assert any(re.search(rf"@pytest\.fixture[^\n]*\ndef {name}\(", text) for text in texts.values()), line
        else:
            path, _, name = line.partition("::")
            assert f"def {name.partition('[')[0]}" in texts[path], line
