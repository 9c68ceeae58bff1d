"""What the commands of these tests are made of: a tokenizer, text, and a workload that is measured at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SMALL = ("--workload", "prompt=8,output=4,rounds=3")
CONTEXT = 128


def byte_tokenizer() -> Tokenizer:
    """One token per byte and a beginning-of-sequence token: 257 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["<s>", *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Data:
    calibration: Path
    english: Path
    polish: Path
