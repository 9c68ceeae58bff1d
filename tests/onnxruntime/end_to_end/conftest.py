"""One model, one artifact of it, for the whole command line with the real runtime.

Captures are remembered by folder: they are the slow part, and programs are values. Everything else is what users run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from compile_sparse.compiler.capture import ModelFolder, capture
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.pipeline import compilation
from compile_sparse.compiler.pipeline import remeasure as verification
from compile_sparse.compiler.planning import plan
from tests.onnxruntime.end_to_end.commands import CONTEXT, SMALL, Data, byte_tokenizer, lines
from tests.random_weights import randomised
from tests.shell import Shell, shell


@pytest.fixture(scope="session")
def remembered() -> Callable[..., Program]:
    """Capture, remembered by folder."""
    known: dict[tuple[Path, bool], Program] = {}

    def remember(folder: ModelFolder, *, require_weights: bool = True, **options: Any) -> Program:
        key = (folder.path, require_weights)
        if key not in known:
            known[key] = capture(folder, require_weights=require_weights, **options)
        return known[key]

    return remember


@pytest.fixture(scope="module", autouse=True)
def surroundings(root: Path, remembered: Callable[..., Program]) -> Iterator[None]:
    """A cache of our own and one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILE_SPARSE_CACHE", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        for module in (compilation, plan, verification):
            patch.setattr(module, "capture", remembered)
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def llama(root: Path) -> Path:
    """A two-layer Llama with a tokenizer."""
    config = hf.LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = root / "llama"
    randomised(hf.LlamaForCausalLM(config)).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def data(root: Path) -> Data:
    english = ["The quick brown fox jumps over the lazy dog, and nobody minds. " * 3, "Numbers: 1, 2, 3. " * 9]
    polish = ["Zażółć gęślą jaźń; pchnąć w tę łódź jeża lub ośm skrzyń fig. " * 3, "Wąż, żółw i źrebię. " * 8]
    return Data(
        lines(root / "calibration.jsonl", english + polish),
        lines(root / "english.jsonl", english),
        lines(root / "polish.jsonl", polish),
    )


@pytest.fixture(scope="session")
def command(llama: Path, data: Data, root: Path) -> tuple[object, ...]:
    """The command of the first example, but for gates."""
    return (
        *(llama, "--target", "ort-cpu", "--prune", "channels=0.25", "--quantize", "w8a8"),
        *("--calibration", data.calibration, "--sequence-length", 64),
        *("--eval", f"en={data.english}", "--eval", f"pl={data.polish}", *SMALL),
        *("--max-quality-loss", "1000x"),
        *("--out", root / "artifact"),
    )


@pytest.fixture(scope="session")
def runs() -> dict[str, Shell]:
    """What has been run, for all files."""
    return {}


@pytest.fixture(scope="module")
def compiled(surroundings: None, command: tuple[object, ...], runs: dict[str, Shell]) -> Shell:
    """Its first run. Not of session scope itself, because the surroundings are a file's."""
    if "first" not in runs:
        gates = ("--gate", "artifact_bytes<=0.6x", "--gate", "worst_slice_ppl<=1000x")
        runs["first"] = shell(*command, *gates, "--verify-each")
    return runs["first"]


@pytest.fixture
def artifact(compiled: Shell, root: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to do anything with."""
    assert compiled.code == 0, compiled.errors
    return Path(shutil.copytree(root / "artifact", tmp_path / "artifact"))
