"""What an artifact gets from the model folder beside config and weights, and how the folder is remembered for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

import compile_sparse
from compile_sparse.backends.huggingface import HuggingFaceBackend
from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.backends.vllm.backend import VllmBackend
from compile_sparse.compiler.capture import capture, open_folder, side_files
from compile_sparse.compiler.capture.side_files import SIDE_FILES, Layout, SideFile, find_side_files
from compile_sparse.compiler.extension.backend_contract import Backend
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.ir.program import ModelSource, Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.prune_channels import PruneChannels

BACKENDS: dict[str, tuple[Backend, Layout]] = {
    "hf": (HuggingFaceBackend(), "huggingface"),
    "vllm-cpu": (VllmBackend(), "huggingface"),
    "ort-cpu": (OnnxRuntimeBackend(), "genai"),
}
QUIET = SilentProgress()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama in bfloat16 with every file of the list that it lacks, and files that are not on it."""
    out = tmp_path_factory.mktemp("llama")
    config = hf.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        dtype="bfloat16",
    )
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(out)
    for entry in SIDE_FILES:
        path = out / entry.pattern.replace("*", "1")
        if entry.layouts and not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")
    for name in ("pytorch_model.bin", "NOTICE", "modeling_llama.py", "notes.json"):
        (out / name).write_text("{}")
    return out


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return capture(open_folder(folder))


def lowered(program: Program, target: str, out: Path) -> dict[str, str]:
    """File -> SHA-256 of the artifact's model, as the backend says."""
    out.mkdir(exist_ok=True)
    return dict(BACKENDS[target][0].lower(program, find_target(target), out, QUIET).files)


def test_the_config_is_the_folders_and_holds_nothing_of_ours(program: Program, folder: Path) -> None:
    read = hf.LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert dict(program.config) == read.to_dict()
    assert program.source == ModelSource(folder)


def test_the_source_outlives_passes_and_edits(program: Program) -> None:
    pruned = PruneChannels(fraction=0.25).run(program, PassContext(find_target("hf"), QUIET)).program
    assert pruned.parameter_count() < program.parameter_count()
    assert pruned.source == pruned.clone().source == program.source


def test_a_model_in_memory_has_no_files(tiny_llama_program: Program, tmp_path: Path) -> None:
    assert tiny_llama_program.source == ModelSource()
    names = set(lowered(tiny_llama_program, "hf", tmp_path))
    assert names == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("target", BACKENDS)
def test_every_backend_copies_what_the_list_says(program: Program, folder: Path, target: str, tmp_path: Path) -> None:
    layout = BACKENDS[target][1]
    expected = {entry.pattern.replace("*", "1") for entry in SIDE_FILES if layout in entry.layouts}
    files = lowered(program, target, tmp_path)
    present, source = (
        {path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()} for top in (tmp_path, folder)
    )
    assert present & source - {"config.json", "model.safetensors"} == expected
    assert all(files[name] == digest_file(folder / name)[0] for name in expected)


@pytest.mark.parametrize("target", BACKENDS)
def test_a_new_entry_reaches_every_artifact(
    program: Program, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both: frozenset[Layout] = frozenset({"huggingface", "genai"})
    monkeypatch.setattr(side_files, "SIDE_FILES", (*SIDE_FILES, SideFile("NOTI*", "a notice", both)))
    assert "NOTICE" in lowered(program, target, tmp_path)
    assert (tmp_path / "NOTICE").is_file()


def test_lists_as_they_were() -> None:
    """Who gets which file is seen by users: a change here is one of behaviour."""
    huggingface = {entry.pattern for entry in SIDE_FILES if "huggingface" in entry.layouts}
    genai = {entry.pattern for entry in SIDE_FILES if "genai" in entry.layouts}
    only_huggingface = {"generation_config.json", "preprocessor_config.json", "processor_config.json"}
    only_huggingface |= {"sentencepiece.bpe.model", "spiece.model", "vocab.txt"}
    only_huggingface |= {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
    only_huggingface |= {"*_Pooling/config.json"}
    assert huggingface - genai == only_huggingface
    assert genai == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    }


@pytest.mark.parametrize("name", [entry.pattern for entry in SIDE_FILES])
def test_an_earlier_result_is_not_resumed_when_a_side_file_changed(folder: Path, name: str, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "model"))
    before = open_folder(changed).side_files_digest()
    (changed / "README.md").write_text("not read by anything")
    assert open_folder(changed).side_files_digest() == before
    (changed / name.replace("*", "1")).write_text('{"weight_map": {}}')
    assert open_folder(changed).side_files_digest() != before


def test_a_file_that_two_entries_name_is_found_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "SIDE_FILES", (*SIDE_FILES, SideFile("tokenizer*", "again", frozenset())))
    found = [path.name for path in find_side_files(folder)]
    assert len(found) == len(set(found))


def test_no_place_of_this_machine_is_written(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    (model / "tokenizer.json").unlink()  # not a real one
    compile_sparse.compile(model, target="hf", out=tmp_path / "a", prune={"channels": 0.25}, verify=False)
    written = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert {"manifest.json", "report.json", "vocab.txt"} <= {path.name for path in written}
    assert not [path.name for path in written if str(tmp_path).encode() in path.read_bytes()]


def test_types_of_the_file_and_of_the_program_are_told_apart(program: Program) -> None:
    """The weights are converted when they are loaded; the config says what the file holds."""
    assert program.config["dtype"] == "bfloat16"
    assert program.weights["lm_head.weight"].dtype == torch.float32
