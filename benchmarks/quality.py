"""What compression costs in perplexity: our settings and published one-shot methods on the same tokens.

Every row removes the same share of one dimension of a Hugging Face Llama with the same calibration windows and is scored on
the same evaluation windows, per slice, relative to the dense model. Reference rows are written from the papers and share no
code with the compiler (``quality_references``); our rows run through it (``quality_rows``). Rows are written to the report as
they are made, and rows already in it are kept: rerun the command to resume, with ``--only ours --force`` after a change of the
compiler. Set OMP_NUM_THREADS=1 for comparable CPU seconds.

    python benchmarks/quality.py MODEL --calibration calibration.jsonl --eval en=en.jsonl --eval code=code.jsonl \
        --out report.json [--markdown table.md] [--only channels] [--only ours] [--force]

The rows of the package torch-pruning need it installed. Exit status 1 with --check when a row of ours is missing for a kind,
or worse than a reference that leaves no more parameters.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from quality_references import channels_and_heads, layers, low_rank, slicegpt, torch_pruning_package, width
from quality_references.evaluation import Evaluator, digest, equal_windows, read_stream
from quality_references.registry import KINDS, REFERENCES, Unavailable
from quality_references.table import markdown, missed
from quality_rows import OURS, compile_row, dense_program, logits_of

from compile_sparse.compiler.errors import CompileSparseError
from compile_sparse.compiler.version import code_identity

REFERENCE_MODULES = (channels_and_heads, torch_pruning_package, layers, width, slicegpt, low_rank)  # register on import
AGREEMENT = 1e-5
"""Largest relative difference of perplexity between the model in transformers and in the compiler, both dense float32."""


class Bench:
    """The model, the data and the report.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.folder = Path(given.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
        streams = {name: read_stream(Path(file), tokenizer) for name, file in given.slices.items()}
        self.slices = {name: equal_windows(ids, given.windows, given.sequence) for name, ids in streams.items()}
        text = read_stream(Path(given.calibration), tokenizer)
        self.calibration = equal_windows(text, given.calibration_windows, given.sequence)
        weights = sorted(self.folder.glob("*.safetensors"))
        self.settings = {
            "model": hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:12],
            "evaluation": digest(self.slices),
            "calibration": digest({"calibration": self.calibration}),
            "windows": {name: len(ids) for name, ids in self.slices.items()},
            "calibration_windows": len(self.calibration),
            "sequence": given.sequence,
        }

    @cached_property
    def model(self) -> Any:
        """The dense transformers model."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def program(self) -> Any:
        """The dense program, checked against the transformers model."""
        program = dense_program(self.folder)
        found = self.evaluator(logits_of(program))
        for name, scores in found.items():
            if abs(math.log(scores["ratio"])) > AGREEMENT:
                raise SystemExit(
                    f"The captured program is not the model: perplexity ratio {scores['ratio']} on {name}."
                )
        return program

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores against the dense model."""
        return Evaluator(self.slices, _hugging_face(self.model))

    def reference_row(self, name: str) -> dict[str, Any]:
        """Apply a reference to a fresh copy of the model, and score it."""
        chosen, model = REFERENCES[name], copy.deepcopy(self.model)
        began = time.process_time()
        notes = chosen.run(model, self.calibration)
        seconds = time.process_time() - began
        return {
            "kind": chosen.kind,
            "ours": False,
            "source": chosen.source,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "cpu_s": round(seconds, 1),
            "notes": notes or {},
            "scores": self.evaluator(_hugging_face(model)),
        }

    def our_row(self, name: str) -> dict[str, Any]:
        """Run a setting of ours through the compiler, and score it."""
        row, dense = OURS[name], self.program
        began = time.process_time()
        program, achieved = compile_row(dense, row, self.calibration)
        seconds = time.process_time() - began
        return {
            "kind": row.kind,
            "ours": True,
            "source": row.as_dict(),
            "code": code_identity()["source"][:12],
            "parameters": program.parameter_count(),
            "cpu_s": round(seconds, 1),
            "notes": achieved,
            "scores": self.evaluator(logits_of(program)),
        }

    def dense(self) -> dict[str, Any]:
        """The row all others are relative to."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"parameters": parameters, "ppl": self.evaluator.dense}


def _hugging_face(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def _read_report(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The report so far without rows that no longer exist, or an empty one."""
    if not path.is_file():
        return {"schema_version": 1, "settings": settings, "dense": None, "rows": {}}
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        raise SystemExit(f"{path} was made with another model, other text or other windows; choose another --out.")
    report["rows"] = {name: row for name, row in report["rows"].items() if name in OURS or name in REFERENCES}
    return report


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _write_table(path: Path | None, report: Mapping[str, Any]) -> None:
    if path and report["rows"]:
        _write(path, markdown(report))


def _wanted(patterns: list[str]) -> list[str]:
    """Names of rows, ours first, that any pattern matches by name, kind, 'ours' or 'references'."""
    rows = [(name, row.kind, "ours") for name, row in OURS.items()]
    rows += [(name, row.kind, "references") for name, row in REFERENCES.items()]
    return [row[0] for row in rows if not patterns or any(fnmatch.fnmatch(w, p) for w in row for p in patterns)]


def _is_current(name: str, found: Mapping[str, Any] | None) -> bool:
    """Whether a row of the report is of the setting asked for now."""
    return found is not None and (name not in OURS or found["source"] == OURS[name].as_dict())


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="Hugging Face folder of a Llama")
    options.add_argument("--calibration", required=True, help="JSONL file of {'text': ...}")
    options.add_argument("--eval", action="append", required=True, metavar="NAME=FILE", help="slice; repeatable")
    options.add_argument("--out", required=True, type=Path, help="report.json, made or continued")
    options.add_argument("--markdown", type=Path, help="table of the whole report")
    options.add_argument(
        "--only", action="append", default=[], help=f"row, {', '.join(KINDS)}, ours or references; * works"
    )
    options.add_argument("--force", action="store_true", help="make rows again that the report has")
    options.add_argument(
        "--check", action="store_true", help="exit 1 unless ours are at least as good as the references"
    )
    for name, value in (("windows", 64), ("calibration-windows", 128), ("sequence", 256)):
        options.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    given = options.parse_args()
    given.slices = dict(part.split("=", 1) for part in given.eval if "=" in part)
    if len(given.slices) != len(given.eval):
        options.error("--eval is NAME=FILE, each name once")
    return given


def main() -> int:
    """Make the rows that are missing, print each, and write the table."""
    given = _arguments()
    torch.manual_seed(0)
    bench = Bench(given)
    report = _read_report(given.out, bench.settings)
    for name in _wanted(given.only):
        if not given.force and _is_current(name, report["rows"].get(name)):
            continue
        try:
            row = bench.our_row(name) if name in OURS else bench.reference_row(name)
        except (Unavailable, CompileSparseError) as reason:
            print(f"{name:28} left out: {reason}", flush=True)
            continue
        # Read again: another process may have added rows meanwhile.
        report = _read_report(given.out, bench.settings)
        report["dense"] = report["dense"] or bench.dense()
        report["rows"][name] = row
        _write(given.out, json.dumps(report, indent=1))
        _write_table(given.markdown, report)
        scores = row["scores"]
        worst = max((s for s in scores if s != "all"), key=lambda s: scores[s]["ratio"])
        print(
            f"{name:28} {scores['all']['ratio']:.4f}  worst {scores[worst]['ratio']:.4f} ({worst})  "
            f"{row['parameters'] / 1e6:.3f} M  {row['cpu_s']} CPU s",
            flush=True,
        )
    _write_table(given.markdown, report)
    failures = missed(report)
    if given.check:
        print("\n".join(failures) or "Every kind: ours are at least as good as every reference.")
    return 1 if given.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
