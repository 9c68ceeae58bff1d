"""Tokens that end a text, and sampling: as transformers reads them, and completed from the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from compile_sparse.compiler.capture.generation import generation_defaults
from compile_sparse.compiler.errors import ModelError, UsageError

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, {"bos_token_id": 5, "eos_token_id": [2, 201], "pad_token_id": 7}),
        ({"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}, None),
        ({"eos_token_id": 9, "do_sample": True, "temperature": 0.7, "top_k": 11}, None),
        ({}, {"eos_token_id": [4], "do_sample": True, "top_p": 0.9, "min_p": 0.05, "max_new_tokens": 64}),
    ],
)
def test_what_transformers_reads_from_the_same_folder(config: Any, generation: Any, tmp_path: Path) -> None:
    write(tmp_path, config=config, **({} if generation is None else {"generation_config": generation}))
    file = "generation_config.json" if generation is not None else "config.json"
    right = hf.GenerationConfig.from_pretrained(tmp_path, config_file_name=file).to_dict()
    found = generation_defaults(tmp_path, {}).values
    for name in (*IDS, "do_sample", "temperature", "top_k", "top_p", "min_p"):
        assert found.get(name) == right.get(name), name


def test_what_the_file_leaves_open_is_the_configs(tmp_path: Path) -> None:
    write(
        tmp_path,
        config={"bos_token_id": 1, "eos_token_id": [2, 3]},
        generation_config={"eos_token_id": None, "top_k": 5},
    )
    found = generation_defaults(tmp_path, {"pad_token_id": 6})
    assert found.values == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 6, "top_k": 5}
    assert found.added == IDS
    assert found.ids("eos_token_id") == (2, 3)


def test_the_folders_config_wins_over_defaults_of_its_class(tmp_path: Path) -> None:
    write(tmp_path, config={"bos_token_id": None, "pad_token_id": -1})
    found = generation_defaults(tmp_path, {"bos_token_id": 1, "eos_token_id": 2})
    assert [found.ids(name) for name in IDS] == [(), (2,), ()]


def test_a_model_from_memory_has_its_config() -> None:
    assert generation_defaults(None, {"eos_token_id": 2}).ids("eos_token_id") == (2,)


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", "[" * 100_000, '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, "x"]}', '{"eos_token_id": true}',
     '{"pad_token_id": 1.5}', '{"temperature": "hot"}'],
)  # fmt: skip
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    write(tmp_path, config={}, generation_config=content)
    with pytest.raises(UsageError, match="CS1003") as caught:
        generation_defaults(tmp_path, {})
    assert caught.value.where == "generation_config.json"


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "secret.json").write_text('{"eos_token_id": 1}')
    (model / "generation_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ModelError, match="CS2010"):
        generation_defaults(model, {})
