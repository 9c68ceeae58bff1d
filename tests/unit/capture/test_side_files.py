"""What an artifact gets from the model folder beside config and weights, and how the folder is remembered for it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import transformers as hf

import compile_sparse
from compile_sparse.backends.huggingface import HuggingFaceBackend
from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.backends.tensorrt.backend import TensorRtBackend
from compile_sparse.backends.tensorrt.options import TensorRtOptions
from compile_sparse.backends.triton.repository import write_repository
from compile_sparse.backends.vllm.backend import VllmBackend
from compile_sparse.compiler.capture import capture, open_folder, side_files
from compile_sparse.compiler.capture.hub import FETCHED, IGNORED
from compile_sparse.compiler.capture.side_files import SIDE_FILES, SideFile, find_side_files
from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.extension.backend_contract import Backend
from compile_sparse.compiler.extension.backend_options import RunFacts
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.ir.program import ModelSource, Program
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.passes.prune_channels import PruneChannels

BACKENDS: dict[str, Backend] = {
    "hf": HuggingFaceBackend(),
    "vllm-cpu": VllmBackend(),
    "ort-cpu": OnnxRuntimeBackend(),
    "trt-a100": TensorRtBackend(),
}
QUIET = SilentProgress()


def instance(pattern: str) -> str:
    """A file that the pattern of an entry means."""
    return pattern.replace("*", "1").replace("[CS]", "S").replace("[1-9]", "2")


COPIES = {instance(entry.pattern): entry.name or instance(entry.pattern) for entry in SIDE_FILES if entry.copied}
"""File of the source -> file of the artifact; of two that become one the first counts."""
COPIES.pop("source_README.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama in bfloat16 with every file of the list, and files that are not on it."""
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
    for name in COPIES:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(
            json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "from": name})
        )
    for name in ("pytorch_model.bin", "modeling_llama.py", "notes.json"):
        (out / name).write_text("{}")
    return out


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return capture(open_folder(folder))


def lowered(program: Program, target: str, out: Path) -> dict[str, str]:
    """File -> SHA-256 of the artifact's model, as the backend says."""
    out.mkdir(exist_ok=True)
    goal = find_target(target)
    settings = DEFAULT_SETTINGS
    if target.startswith("trt"):
        pytest.importorskip("onnx")
        settings = RunSettings(
            options=TensorRtOptions(engine="none").settle(goal, RunFacts(Workload(prompt=8, output=8)))
        )
    return dict(BACKENDS[target].lower(program, goal, out, QUIET, settings).files)


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
def test_every_backend_copies_the_list(program: Program, folder: Path, target: str, tmp_path: Path) -> None:
    files = lowered(program, target, tmp_path)
    present = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert present >= set(COPIES.values())
    assert not present & {"README.md", "pytorch_model.bin", "modeling_llama.py", "notes.json"}
    for source, copy in COPIES.items():
        assert files[copy] == digest_file(folder / source)[0] == digest_file(tmp_path / copy)[0], copy


@pytest.mark.parametrize("target", BACKENDS)
def test_encoders_get_them_too_and_say_what_their_classes_are_called(target: str, tmp_path: Path) -> None:
    if target == "vllm-cpu":
        pytest.skip("serves no encoders")
    torch.manual_seed(0)
    source, out = tmp_path / "model", tmp_path / "out"
    labels = {0: "ham", 1: "spam", 2: "eggs"}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    config = hf.BertConfig(**sizes, id2label=labels, label2id={name: i for i, name in labels.items()})
    hf.BertForSequenceClassification(config).save_pretrained(source)
    for name in ("vocab.txt", "LICENSE", "README.md", "tokenizer.json"):
        (source / name).write_text(name)
    lowered(capture(open_folder(source)), target, out)
    assert [(out / name).read_text() for name in ("vocab.txt", "LICENSE", "tokenizer.json")] == [
        *("vocab.txt", "LICENSE", "tokenizer.json")
    ]
    assert hf.AutoConfig.from_pretrained(out).id2label == labels
    if target != "hf":
        said = json.loads((out / "config.json").read_text())
        assert not set(said) & {"hidden_size", "intermediate_size", "num_hidden_layers"}, "sizes that may have changed"
        with pytest.raises(UsageError, match="CS1003") as caught:
            compile_sparse.explain(out, target="hf")
        assert "compiled graph" in caught.value.what


def test_a_triton_repository_has_them_beside_the_graph(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    lowered(program, "ort-cpu", tmp_path / "model")
    written = write_repository(tmp_path / "model", tmp_path / "triton", name="m", backend="onnxruntime", device="cpu")
    assert {f"m/1/{name}" for name in COPIES.values()} <= set(written.files)
    served = json.loads((tmp_path / "triton" / "m" / "1" / "generation_config.json").read_text())
    assert served["eos_token_id"] == [2, 3]


@pytest.mark.parametrize("target", BACKENDS)
def test_a_new_entry_reaches_every_artifact(
    program: Program, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "SIDE_FILES", (*SIDE_FILES, SideFile("note*", "notes")))
    assert "notes.json" in lowered(program, target, tmp_path)
    assert (tmp_path / "notes.json").is_file()


TERMS = (
    *(
        "LICENSE",
        "License.txt",
        "LICENCE.md",
        "LICENSE-APACHE",
        "MODEL_LICENSE",
        "Llama-License.txt",
        "licenses/MIT.txt",
    ),
    *("NOTICE.txt", "ThirdPartyNotices.txt", "THIRD_PARTY_NOTICES.md", "Terms_of_Use.md", "Readme.md", "USE_POLICY.md"),
)


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_found_however_they_are_spelled(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("terms")
    assert [path.relative_to(tmp_path).as_posix() for path in find_side_files(tmp_path, copied=True)] == [name]
    assert any(fnmatchcase(name, pattern) for pattern in FETCHED)


def test_no_code_and_no_pickle_is_found(tmp_path: Path) -> None:
    for name in (
        "license_plates.py",
        "modeling_license.py",
        "1_Pooling/pytorch_model.bin",
        "2_Dense/pytorch_model.bin",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
        fetched = any(fnmatchcase(name, pattern) for pattern in FETCHED)
        assert not fetched or any(fnmatchcase(name, pattern) for pattern in IGNORED), name
    assert find_side_files(tmp_path) == []


def test_files_of_every_tokenizer_of_transformers_are_on_the_list(tmp_path: Path) -> None:
    models = Path(hf.__file__).parent / "models"
    tables = [
        found
        for path in sorted(models.glob("*/tokenization_*.py"))
        for found in re.findall(r"^VOCAB_FILES_NAMES\b[^={]*= (\{.*?\})", path.read_text(), re.MULTILINE | re.DOTALL)
    ]
    names = {name for table in tables for name in ast.literal_eval(table).values()}
    assert len(names) > 20
    for name in names:
        (tmp_path / name).write_text("{}")
    assert {path.name for path in find_side_files(tmp_path, copied=True)} == names


def test_a_card_of_the_source_is_kept_under_another_name_twice_over(program: Program, tmp_path: Path) -> None:
    """An artifact may be compiled again: the card of what it was made from stays."""
    first, second = tmp_path / "first", tmp_path / "second"
    lowered(program, "hf", first)
    assert json.loads((first / "source_README.md").read_text())["from"] == "README.md"
    lowered(replace(program, source=ModelSource(first)), "hf", second)
    assert (second / "source_README.md").read_text() == (first / "source_README.md").read_text()


OUTSIDE = ["merges.txt", "chat_template.jinja", "LICENSE", "tokenizer.json", "additional_chat_templates/tools.jinja"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("of_folder", [False, True])
def test_a_link_out_of_the_folder_is_refused_and_nothing_is_copied(
    folder: Path, name: str, of_folder: bool, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    secret = tmp_path / "elsewhere" / Path(name).name
    secret.parent.mkdir()
    secret.write_text("canary")
    link, target = (model / name, secret)
    if of_folder:
        if "/" not in name:
            pytest.skip("lies in no folder of its own")
        link, target = link.parent, secret.parent
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    with pytest.raises(ModelError, match="CS2010"):
        compile_sparse.compile(model, target="hf", out=tmp_path / "a", verify=False)
    with pytest.raises(ModelError, match="CS2010"):
        compile_sparse.explain(model, target="hf")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"canary" and not
                (path == secret or path.is_symlink() or path.parent.is_symlink())]  # fmt: skip


def test_the_links_of_a_hub_cache_are_its_own(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for path in [path for path in snapshot.rglob("*") if path.is_file()]:
        blob = blobs / path.relative_to(snapshot).as_posix().replace("/", "-")
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    assert len(find_side_files(snapshot, copied=True)) == len(COPIES)


@pytest.mark.parametrize("name", [entry.pattern for entry in SIDE_FILES])
def test_an_earlier_result_is_not_resumed_when_a_side_file_changed(folder: Path, name: str, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "model"))
    before = open_folder(changed).side_files_digest()
    (changed / "notes.json").write_text("not read by anything")
    assert open_folder(changed).side_files_digest() == before
    (changed / instance(name)).write_text('{"weight_map": {}}')
    assert open_folder(changed).side_files_digest() != before


def test_a_file_that_two_entries_name_is_found_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "SIDE_FILES", (*SIDE_FILES, SideFile("tokenizer*", "again")))
    found = find_side_files(folder)
    assert len(found) == len(set(found))


def test_no_place_of_this_machine_is_written(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    for name in ("tokenizer.json", "generation_config.json"):  # not real ones
        (model / name).unlink()
    compile_sparse.compile(model, target="hf", out=tmp_path / "a", prune={"channels": 0.25}, verify=False)
    written = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert {"manifest.json", "report.json", "vocab.txt"} <= {path.name for path in written}
    assert not [path.name for path in written if str(tmp_path).encode() in path.read_bytes()]


def test_types_of_the_file_and_of_the_program_are_told_apart(program: Program) -> None:
    """The weights are converted when they are loaded; the config says what the file holds."""
    assert program.config["dtype"] == "bfloat16"
    assert program.weights["lm_head.weight"].dtype == torch.float32
