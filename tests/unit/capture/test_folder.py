"""Opening a folder: what is refused, with which code, and that nothing in it is ever run."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 - the trap is one
import shutil
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as hf
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.errors import CompileSparseError, ModelError, UsageError

CopyOf = Callable[[str], Path]


def configure(folder: Path, **changes: Any) -> Path:
    """Change config.json; None removes a key."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def refused(folder: Path | str, kind: type[CompileSparseError] = ModelError) -> CompileSparseError:
    with pytest.raises(kind) as caught:
        capture(open_folder(folder))
    return caught.value


class _Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_a_folder_with_pickles_only_is_refused_unopened(copy_of: CopyOf, tmp_path: Path, name: str) -> None:
    folder, trap = copy_of("bert"), tmp_path / "opened"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Canary(trap)))
    error = refused(folder)
    assert error.code == "CS2003"
    assert name in error.why
    assert not trap.exists()
    pickle.loads((folder / name).read_bytes())
    assert trap.is_dir(), "the trap does not work, so the test proves nothing"


def test_a_folder_without_weights_is_refused(copy_of: CopyOf) -> None:
    folder = copy_of("bert")
    (folder / "model.safetensors").unlink()
    error = refused(folder)
    assert error.code == "CS2003"
    assert "explain" in error.hint


def test_a_config_that_disagrees_names_the_tensor_and_both_shapes(copy_of: CopyOf) -> None:
    error = refused(configure(copy_of("bert"), intermediate_size=80))
    assert error.code == "CS2005"
    assert "encoder.layer.0.intermediate.dense.weight is [88, 64], the config implies [80, 64]" in error.why


def test_a_missing_tensor_is_named(copy_of: CopyOf) -> None:
    folder = copy_of("bert")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.bias")
    save_file(tensors, folder / "model.safetensors")
    error = refused(folder)
    assert error.code == "CS2005"
    assert "encoder.layer.1.output.dense.bias" in error.why


def test_a_config_with_fewer_layers_than_the_checkpoint_is_refused(copy_of: CopyOf) -> None:
    error = refused(configure(copy_of("bert"), num_hidden_layers=1))
    assert error.code == "CS2005"
    assert "more layers than the config" in error.why
    assert "encoder.layer.1." in error.why


def test_a_tensor_of_another_head_is_no_disagreement(copy_of: CopyOf) -> None:
    folder = copy_of("bert")
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.bias"] = tensors["pooler.dense.bias"].clone()
    save_file(tensors, folder / "model.safetensors")
    capture(open_folder(folder))


def test_an_unknown_model_type_is_refused(copy_of: CopyOf) -> None:
    error = refused(configure(copy_of("bert"), model_type="llamma9"))
    assert error.code == "CS2002"
    assert "'llamma9'" in error.what


def test_remote_code_is_never_imported(copy_of: CopyOf, tmp_path: Path) -> None:
    folder, trap = copy_of("bert"), tmp_path / "imported"
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    remote = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    error = refused(configure(folder, model_type="homemade", auto_map=remote))
    assert error.code == "CS2002"
    assert "auto_map" in error.why
    open_folder(configure(folder, model_type="bert"))  # known to transformers: its own class is used
    assert not trap.exists()


@pytest.mark.parametrize("name", ["LlamaForWorldPeace", "AutoModel", "logging", "BertTokenizer", "__name__"])
def test_an_unknown_architecture_is_refused(copy_of: CopyOf, name: str) -> None:
    error = refused(configure(copy_of("bert"), architectures=[name]))
    assert error.code == "CS2002"
    assert name in error.what


def test_without_an_architecture_the_default_class_of_the_model_type_is_used(copy_of: CopyOf) -> None:
    assert open_folder(configure(copy_of("bert"), architectures=None)).model_class.__name__ == "BertModel"


def test_an_encoder_decoder_is_refused_as_a_kind(tmp_path: Path) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 16, "d_ff": 16}
    config |= {"num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        capture(open_folder(tmp_path), require_weights=False)
    assert caught.value.code == "CS2007"
    assert "encoder-decoder" in caught.value.why


@pytest.mark.parametrize(
    "text", [None, "{", "[1]", "\N{ZERO WIDTH SPACE}", "[" * 200_000, '{"a": "' + " " * (4 << 20) + '"}']
)
def test_an_unreadable_config_is_a_usage_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert refused(tmp_path, UsageError).code == "CS1003"


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        ("bert", "hidden_size", "many"),
        ("bert", "hidden_size", -64),
        ("bert", "num_attention_heads", 7),
        ("bert", "architectures", "BertModel"),
        ("bert", "architectures", {"a": "BertModel"}),
        ("bert", "architectures", [["BertModel"]]),
        ("bert", "hidden_act", "nope"),
        ("bert", "vocab_size", 2**64),
        ("bert", "max_position_embeddings", 2**70),
        ("llama", "num_attention_heads", 0),
        ("llama", "num_key_value_heads", 0),
        ("llama", "pad_token_id", "vocab_size"),
        ("llama", "rope_parameters", {"rope_type": "nope"}),
    ],
)
def test_a_value_the_model_rejects_is_named_by_its_key(copy_of: CopyOf, model: str, key: str, value: Any) -> None:
    folder = copy_of(model)
    if value == "vocab_size":
        value = json.loads((folder / "config.json").read_text())["vocab_size"]
    error = refused(configure(folder, **{key: value}))
    assert (error.code, error.exit_code) == ("CS2014", 4)
    assert key in error.where


def test_floats_that_json_lacks_are_read_as_transformers_writes_them(copy_of: CopyOf) -> None:
    folder = configure(copy_of("llama"), some_limit=[0.0, {"__float__": "Infinity"}])
    found = open_folder(folder).config
    assert found.some_limit == [0.0, float("inf")] == hf.AutoConfig.from_pretrained(folder).some_limit


def test_kernels_that_the_config_was_saved_with_do_not_matter(copy_of: CopyOf) -> None:
    open_folder(configure(copy_of("llama"), _attn_implementation="flash_attention_2", attn_implementation="nope"))


@pytest.mark.parametrize("model", ["./missing", "../missing/model", "/nowhere/model", "~/nowhere", "missing", "here/x"])
def test_a_missing_local_folder_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    def asked(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    start = time.perf_counter()
    error = refused(model, UsageError)
    assert error.code == "CS1002"
    assert time.perf_counter() - start < 2


def test_a_hub_that_cannot_be_reached_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    error = refused("somebody/some-model", UsageError)
    assert error.code == "CS1002"
    assert "LocalEntryNotFoundError" in error.why


def test_a_name_the_hub_would_not_accept_is_a_usage_error() -> None:
    assert refused("some..body/some--model", UsageError).code == "CS1002"


def test_a_model_file_instead_of_a_folder_is_named_for_what_it_is(tmp_path: Path) -> None:
    for name, said in {"a.gguf": "GGUF", "a.onnx": "ONNX", "a.bin": "pickle", "a.safetensors": "weight file"}.items():
        (tmp_path / name).write_bytes(b"?")
        error = refused(str(tmp_path / name))
        assert (error.code, error.exit_code) == ("CS2003", 4)
        assert said in error.what
        assert error.hint


def test_a_revision_of_a_hub_id_is_asked_for_and_its_commit_is_known(
    monkeypatch: pytest.MonkeyPatch, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    asked: list[Any] = []
    snapshot = tmp_path / "models--somebody--some-model" / "snapshots" / "c0ffee"
    shutil.copytree(saved("bert"), snapshot)

    def download(model: str, **options: Any) -> str:
        asked.append((model, options["revision"], options["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = open_folder("somebody/some-model@refs/pr/7")
    assert asked[0][:2] == ("somebody/some-model", "refs/pr/7")
    for name in ("chat_template.jinja", "License.txt", "qwen.tiktoken", "model-00001-of-00002.safetensors"):
        assert any(fnmatchcase(name, pattern) for pattern in asked[0][2])
    assert (folder.name, folder.commit) == ("somebody/some-model", "c0ffee")
    assert open_folder("somebody/some-model").model_class is folder.model_class
    assert asked[1][1] is None


def test_a_folder_that_lies_here_has_no_commit(saved: Callable[[str], Path]) -> None:
    folder = open_folder(saved("bert"))
    assert (folder.name, folder.commit) == ("bert", "")


def test_pickles_and_code_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, copy_of: CopyOf) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options)
        return str(copy_of("bert"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_folder("somebody/some-model").model_class.__name__ == "BertModel"
    assert not {"*.py", "*.bin", "*.pt", "*"} & set(asked["allow_patterns"])


def test_the_digest_is_of_config_and_weights(copy_of: CopyOf, saved: Callable[[str], Path]) -> None:
    folder = copy_of("bert")
    before = open_folder(folder).digest()
    assert before == open_folder(saved("bert")).digest()
    (folder / "README.md").write_text("not part of the model")
    assert open_folder(folder).digest() == before
    tensors = load_file(folder / "model.safetensors")
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 1}, folder / "model.safetensors")
    changed = open_folder(folder).digest()
    assert changed != before
    assert open_folder(configure(folder, hidden_act="relu")).digest() not in (before, changed)


def test_weights_follow_the_dtype_that_is_asked_for(copy_of: CopyOf) -> None:
    folder = copy_of("bert")
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    program = capture(open_folder(configure(folder, dtype="bfloat16")))
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(program.weights.load(name), tensors[name].float())
    floating = {source.dtype for source in program.weights.values() if source.dtype.is_floating_point}
    assert floating == {torch.float32}
