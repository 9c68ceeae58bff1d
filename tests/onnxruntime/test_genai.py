"""onnxruntime-genai loads the same folder and picks the same tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from compile_sparse.compiler.execution.executor import decoder_inputs
from tests.onnxruntime.conftest import FolderOf
from tests.onnxruntime.running import run, session

og = pytest.importorskip("onnxruntime_genai")


@pytest.mark.parametrize(("name", "scheme"), [("llama", ""), ("llama", "w4a16"), ("gpt2", "w8a8"), ("mistral", "")])
def test_same_greedy_ids(folder_of: FolderOf, name: str, scheme: str) -> None:
    folder, _, program = folder_of(name, scheme)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    prompt, steps = [5, 17, 40, 8], 12
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    # A minimum length keeps the end token, which a random model may pick, from stopping one of the two.
    parameters.set_search_options(max_length=len(prompt) + steps, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    picked = [int(token) for token in generator.get_sequence(0)]

    loaded = session(folder)
    ids = list(prompt)
    outputs = run(loaded, decoder_inputs(program, torch.tensor([ids])))
    while len(ids) < len(picked):
        ids.append(int(outputs["logits"][0, -1].argmax()))
        outputs = run(loaded, decoder_inputs(program, torch.tensor([ids[-1:]]), past=outputs))
    assert len(picked) > len(prompt)
    assert picked == ids
