"""The house is open: ``examples/gptq_quantizer.py``, installed as another package would be, serves ``--quantizer gptq``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "gptq_quantizer.py"


def installed(folder: Path) -> Path:
    """The example as ``pip install`` would leave it: the module, and the entry point that its docstring shows."""
    text = EXAMPLE.read_text(encoding="utf-8")
    group, name, value = re.search(r'\[project\.entry-points\."(.+)"\]\n\s+(\w+) = "(.+)"\n', text).groups()  # type: ignore[union-attr]
    info = folder / "gptq_quantizer-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / EXAMPLE.name).write_text(text, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gptq-quantizer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    return folder


def test_a_third_party_quantizer_takes_one_file(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 80
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    model = hf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    windows = [torch.randint(3, 64, (32,)).tolist() for _ in range(8)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in windows))
    environment = os.environ | {"PYTHONPATH": str(installed(tmp_path / "site"))}
    made = {}
    for quantizer in ("rtn", "gptq"):
        words = ["compile", "model", "--target", "null", "--quantize", "w4a16-g32", "--quantizer", quantizer]
        words += ["--calibration", "text.jsonl", "--no-verify", "--out", quantizer, "--json"]
        command = [sys.executable, "-m", "compile_sparse.compiler.cli.main", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["passes"][0]["requested"]["quantizer"] == quantizer
        made[quantizer] = load_file(tmp_path / quantizer / "model" / "weights.safetensors")

    inputs: dict[str, list[torch.Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, []).append(given[0]))
    with torch.no_grad():
        model(torch.tensor(windows))
    for name in (name for name in inputs if name != "lm_head"):
        (x,), weight = inputs[name], model.get_submodule(name).weight.detach()
        errors = {}
        for quantizer, tensors in made.items():
            codes, scale = tensors[f"{name}.weight.codes"], tensors[f"{name}.weight.scale"]
            lost = weight - codes.float() * scale.float().repeat_interleave(32, 1)
            errors[quantizer] = float((x @ lost.t()).square().mean())
        assert errors["gptq"] < 0.9 * errors["rtn"], (name, errors)
