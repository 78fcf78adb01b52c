"""Text that every checkout has: the project's own documents, one of which is held out, and
Python's.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HELD_OUT = ROOT / "docs" / "protocol.md"


def held_out_text() -> str:
    """The text that no training sees."""
    return HELD_OUT.read_text()


def training_text() -> str:
    """The other documents, and the reference that Python's `help()` shows."""
    files = sorted(
        path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if path != HELD_OUT
    )
    from pydoc_data.topics import topics

    return "\n\n".join(
        [path.read_text() for path in files] + [topics[name] for name in sorted(topics)]
    )


def sentences(text: str) -> list[str]:
    """Plain sentences of a text, for haystacks: no tables, no code."""
    flat = re.sub(r"\s+", " ", re.sub(r"```.*?```", " ", text, flags=re.S))
    parts = re.split(r"(?<=[a-z]\.) (?=[A-Z])", flat)
    return [part for part in parts if 20 <= len(part) <= 400 and "|" not in part]
