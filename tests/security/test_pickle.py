"""Pickles are never opened, and no product code could open one."""

from __future__ import annotations

import ast
import json
import os
import pickle
from pathlib import Path

import pytest

from compile_sparse.compiler.artifact.reader import read_artifact
from compile_sparse.compiler.errors import CompileSparseError
from compile_sparse.compiler.files.cache import Cache
from compile_sparse.compiler.recipes.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("compiler", "passes", "backends") for path in (ROOT / folder).rglob("*.py"))


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    """Pickle bytes that make a folder when they are opened; proved to work first."""
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Canary(proof)))
    assert proof.is_dir()
    path = tmp_path / "opened"
    yield pickle.dumps(Canary(path))
    assert not path.exists()


def test_readers_of_files_do_not_open_pickles(canary, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(canary)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_bytes(canary)
    for read, path in ((load_recipe, "recipe.yaml"), (read_artifact, "artifact")):
        with pytest.raises(CompileSparseError):
            read(tmp_path / path)
    cache = Cache(tmp_path / "cache")
    (cache.root / "k").mkdir()
    (cache.root / "k" / ".entry.json").write_bytes(canary)
    cache.get_or_build("k", lambda folder: (folder / "x").write_text("x"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "model.pt2", "weights.npz"])
def test_models_with_pickled_weights_are_refused(canary, tmp_path, name):
    from compile_sparse.compiler.capture.folder import open_folder
    from compile_sparse.compiler.capture.huggingface import capture

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / name).write_bytes(canary)
    with pytest.raises(CompileSparseError):
        capture(open_folder(model))


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.export.load", "yaml.load", "os.system"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_product_code_can_run_data(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS
            for keyword in node.keywords:
                assert not (keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False")
                assert not (keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False")
                assert not (keyword.arg == "shell" and ast.unparse(keyword.value) == "True")
