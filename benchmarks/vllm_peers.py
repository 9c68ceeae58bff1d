"""What llm-compressor makes of a model in the formats we write for vLLM: time, memory, size and perplexity.

llm-compressor and vLLM pin clashing packages, so each runs in an interpreter of its own. All rows are calibrated and scored on
the same token windows. A checkpoint is scored inside vLLM in float32; where this machine's vLLM cannot run it, in transformers
with weights decompressed to float32, which the table says. The dense model is scored in both, and must agree. Seconds and
memory are of llm-compressor's process, from reading the model to the saved folder; set OMP_NUM_THREADS=1 for comparable CPU
seconds. Rows are kept in the work folder: rerun to resume. Rows of other tools are scored from their folders, every time:

    python benchmarks/vllm_peers.py MODEL --python PYTHON --vllm-python PYTHON --calibration calibration.jsonl \
        --eval en=en.jsonl --eval code=code.jsonl --work FOLDER [--row "ours W8A8=FOLDER"] [--markdown table.md]
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from llmcompressor_worker import RECIPES
from quality_references.evaluation import digest, equal_windows, read_stream

from compile_sparse.compiler.verify.measure import folder_bytes

HERE = Path(__file__).parent
DENSE = "dense"
AGREEMENT = 1e-4
"""Largest relative difference of the dense model's perplexity between vLLM and transformers."""
LIMIT_S = 7200


class Failed(Exception):
    """A worker ended with an error; the text is its last line that names one."""


@dataclass(frozen=True)
class Interpreter:
    """Runs a worker file on a request.

    Attributes:
        python: the interpreter.
        worker: the file.
        path: PYTHONPATH, or empty.
    """

    python: str
    worker: Path
    path: str = ""

    def __call__(self, **request: Any) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", **({"PYTHONPATH": self.path} if self.path else {})}
        with tempfile.TemporaryDirectory() as name:
            asked, answered = Path(name) / "request.json", Path(name) / "result.json"
            asked.write_text(json.dumps(request), encoding="utf-8")
            command = [self.python, str(self.worker), str(asked), str(answered)]
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, env=environment, timeout=LIMIT_S
            )
            if done.returncode or not answered.is_file():
                lines = [line for line in done.stderr.splitlines() if "Error: " in line]
                raise Failed(lines[-1].removeprefix("[rank0]: ") if lines else f"exit status {done.returncode}")
            return json.loads(answered.read_text(encoding="utf-8"))


class Bench:
    """The model, the windows and the interpreters.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        transformers.logging.set_verbosity_error()
        self.model, self.work, self.given = Path(given.model), given.work, given
        tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
        streams = {name: read_stream(Path(file), tokenizer) for name, file in given.slices.items()}
        windows = {name: equal_windows(ids, given.windows, given.sequence) for name, ids in streams.items()}
        text = read_stream(Path(given.calibration), tokenizer)
        calibration = equal_windows(text, given.calibration_windows, given.sequence)
        weights = sorted(self.model.glob("*.safetensors"))
        self.settings = {
            "model": hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:12],
            "evaluation": digest(windows),
            "calibration": digest({"calibration": calibration}),
            "windows": {name: len(ids) for name, ids in windows.items()},
            "calibration_windows": len(calibration),
            "sequence": given.sequence,
            "dtype": given.dtype,
        }
        self.windows = {name: ids.tolist() for name, ids in windows.items()}
        self.calibration = calibration.tolist()
        self.peer = Interpreter(given.python, HERE / "llmcompressor_worker.py")
        self.vllm = Interpreter(given.vllm_python, HERE / "vllm_perplexity_worker.py", given.plugin)

    def dense(self) -> dict[str, Any]:
        """The row all others are relative to, the same in both engines."""
        row = self.scored(self.model)
        other = self._in_transformers(self.model)
        for name, nll in other["nll"].items():
            gap = math.exp(abs(statistics.fmean(nll) - statistics.fmean(row["nll"][name]))) - 1
            if gap > AGREEMENT:
                raise SystemExit(f"{row['version']} and {other['version']} differ by {gap:.1e} on {name}.")
        return row

    def peer_row(self, recipe: str) -> dict[str, Any]:
        """Compress with llm-compressor, and score."""
        folder = self.work / recipe.lower().replace(",", "").replace(" ", "-")
        made = self.peer(
            do="compress",
            model=str(self.model),
            out=str(folder),
            recipe=recipe,
            dtype=self.given.dtype,
            batch=self.given.batch,
            windows={"calibration": self.calibration},
        )
        return {"made": made, **self.scored(folder)}

    def scored(self, folder: Path) -> dict[str, Any]:
        """Size and score of a checkpoint folder."""
        found: dict[str, Any] = {"folder_bytes": folder_bytes(folder)}
        try:
            return {**found, **self.vllm(model=str(folder), windows=self.windows)}
        except Failed as reason:
            return {**found, "not_in_vllm": str(reason), **self._in_transformers(folder)}

    def _in_transformers(self, folder: Path) -> dict[str, Any]:
        return self.peer(do="score", model=str(folder), batch=self.given.batch, windows=self.windows)


def ratio(row: Mapping[str, Any], dense: Mapping[str, Any]) -> tuple[float, float]:
    """Perplexity over the dense model's, all windows alike, and half the width of its paired 95 % interval."""
    excess = [
        ours - theirs for name, nll in row["nll"].items() for ours, theirs in zip(nll, dense["nll"][name], strict=True)
    ]
    value = math.exp(statistics.fmean(excess))
    return value, 1.96 * value * statistics.stdev(excess) / math.sqrt(len(excess))


def markdown(report: Mapping[str, Any]) -> str:
    """One line per row; a figure that nobody measured is a dash."""
    settings, rows = report["settings"], report["rows"]
    slices = list(settings["windows"])
    head = ["row", "wall s", "CPU s", "peak RSS MB (imports)", "folder MB", *slices, "all, of dense", "evaluated in"]
    lines = [" | ".join(head), " | ".join("---" if i in (0, len(head) - 1) else "---:" for i in range(len(head)))]
    for name, row in rows.items():
        cells = [name, "-", "-", "-", f"{row['folder_bytes'] / 1e6:.2f}"]
        if made := row.get("made"):
            memory = [made[key] / 1e6 for key in ("peak_rss_bytes", "import_rss_bytes")]
            cells[1:4] = f"{made['wall_s']:.0f}", f"{made['cpu_s']:.0f}", f"{memory[0]:.0f} ({memory[1]:.0f})"
        cells += [f"{math.exp(statistics.fmean(row['nll'][part])):.3f}" for part in slices]
        value, half = ratio(row, rows[DENSE])
        cells += ["1" if name == DENSE else f"{value:.4f} ± {half:.4f}"]
        cells += [f"{row['version']}, float32" + (" (weights decompressed)" if "not_in_vllm" in row else "")]
        lines.append(" | ".join(cells))
    table = "\n".join(f"| {line} |" for line in lines)
    windows = ", ".join(f"{name} {count}" for name, count in settings["windows"].items())
    notes = [f"{settings['calibration_windows']} calibration windows and {windows} evaluation windows of"]
    notes[0] += f" {settings['sequence']} tokens; model loaded for compression as {settings['dtype']}."
    made_by = {row["made"]["version"] for row in rows.values() if "made" in row}
    if made_by:
        notes.append(f"Rows with seconds are of {', '.join(sorted(made_by))}.")
    reasons = {row["not_in_vllm"] for row in rows.values() if "not_in_vllm" in row}
    notes += [f"Not run by this machine's vLLM: {reason}" for reason in sorted(reasons)]
    return table + "\n\n" + "\n".join(notes) + "\n"


def _read_report(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {"schema_version": 1, "settings": settings, "rows": {}}
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        raise SystemExit(f"{path} was made with another model, other text or other windows; choose another --work.")
    return report


def _pairs(options: argparse.ArgumentParser, name: str, given: list[str]) -> dict[str, str]:
    found = dict(part.split("=", 1) for part in given if "=" in part)
    if len(found) != len(given):
        options.error(f"--{name} is NAME=PATH, each name once")
    return found


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="Hugging Face folder of a causal language model")
    options.add_argument("--python", required=True, help="interpreter that has llm-compressor")
    options.add_argument("--vllm-python", required=True, help="interpreter that has vLLM")
    options.add_argument("--calibration", required=True, help="JSONL file of {'text': ...}")
    options.add_argument("--eval", action="append", required=True, metavar="NAME=FILE", help="slice; repeatable")
    options.add_argument("--work", required=True, type=Path, help="folder for checkpoints and report.json")
    options.add_argument("--row", action="append", default=[], metavar="NAME=FOLDER", help="checkpoint to score too")
    options.add_argument("--plugin", default="", help="PYTHONPATH of vLLM, for checkpoints that need a plugin")
    options.add_argument("--only", action="append", default=[], help="llm-compressor rows to make; * works")
    options.add_argument("--force", action="store_true", help="make rows again that the report has")
    options.add_argument("--dtype", default="auto", help="of the model while it is compressed; default as stored")
    options.add_argument("--markdown", type=Path, help="file for the table")
    for name, value in (("windows", 64), ("calibration-windows", 128), ("sequence", 256), ("batch", 8)):
        options.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    given = options.parse_args()
    given.slices = _pairs(options, "eval", given.eval)
    given.rows = _pairs(options, "row", given.row)
    if reserved := {DENSE, *RECIPES} & given.rows.keys():
        options.error(f"--row cannot be called {', '.join(sorted(reserved))}")
    return given


def main() -> int:
    """Make the rows that are missing, score the folders given, print the table. Exit status 1 when a row failed."""
    given = _arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(given)
    path, failures = given.work / "report.json", 0
    report = _read_report(path, bench.settings)
    wanted = [name for name in RECIPES if not given.only or any(fnmatch.fnmatch(name, p) for p in given.only)]
    for name in [DENSE, *wanted, *given.rows]:
        if name in report["rows"] and name not in given.rows and not given.force:
            continue
        try:
            if name in RECIPES:
                row = bench.peer_row(name)
            else:
                row = bench.dense() if name == DENSE else bench.scored(Path(given.rows[name]))
        except (Failed, subprocess.TimeoutExpired) as reason:
            if name == DENSE:
                raise SystemExit(f"The dense model cannot be scored: {reason}") from reason
            print(f"{name}: left out: {reason}", flush=True)
            failures += 1
            continue
        report["rows"][name] = row
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(f"{name}: {ratio(row, report['rows'][DENSE])[0]:.4f} of dense", flush=True)
    table = markdown(report)
    print(table)
    if given.markdown:
        given.markdown.write_text(table, encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
