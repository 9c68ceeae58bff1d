"""Pairs of query and document out of plain text: the first sentence of a paragraph asks for the rest of it.

python benchmarks/text_pairs.py en.jsonl > pairs.jsonl

``en.jsonl`` has ``{"text": ...}`` per line, paragraphs apart by blank lines; a paragraph is used when it
has a sentence of 25 to 200 characters and at least 60 more.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator

_PARAGRAPH = re.compile(r"(.{25,200}?[.!?:])\s+(.{60,})")


def pairs(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    """``{"query", "document"}`` of every paragraph that has both."""
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            found = _PARAGRAPH.fullmatch(" ".join(paragraph.split()))
            if found:
                yield {"query": found[1], "document": found[2]}


def main(path: str) -> None:
    with open(path, encoding="utf-8") as lines:
        for pair in pairs(json.loads(line)["text"] for line in lines):
            sys.stdout.write(json.dumps(pair, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
