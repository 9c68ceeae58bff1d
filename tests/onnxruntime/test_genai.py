"""onnxruntime-genai loads the same folder and picks the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.execution.executor import decoder_inputs
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
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


PROMPT = [5, 17, 40, 8]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a byte tokenizer: one file, as ``tokenizers`` writes it."""
    out = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LlamaConfig(**sizes, vocab_size=300, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    model = hf.LlamaForCausalLM(config)
    model.lm_head.weight.data.normal_()
    model.save_pretrained(out)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["<unk>", "<s>", "</s>", *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(out / "tokenizer.json"))
    return out


def lowered(source: Path, out: Path, **generation: Any) -> tuple[Path, Lowered]:
    model, made = Path(shutil.copytree(source, out / "source")), out / "made"
    (model / "generation_config.json").write_text(json.dumps(generation))
    made.mkdir()
    return made, OnnxRuntimeBackend().lower(capture(open_folder(model)), find_target("ort-cpu"), made, SilentProgress())


def generated(folder: Path) -> list[int]:
    """What onnxruntime-genai generates with nothing but the folder's own settings, picking the likeliest token."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + 24, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([PROMPT], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def test_every_token_that_ends_a_text_ends_it(source: Path, tmp_path: Path) -> None:
    reference = hf.LlamaForCausalLM.from_pretrained(source)
    common = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    whole = reference.generate(torch.tensor([PROMPT]), eos_token_id=None, **common)[0].tolist()
    last = next(token for place, token in enumerate(whole) if place > len(PROMPT) + 4 and token not in whole[:place])
    ends = [299, last]
    right = reference.generate(torch.tensor([PROMPT]), eos_token_id=ends, **common)[0].tolist()
    assert right[-1] == last
    assert len(right) < len(whole)

    folder, _ = lowered(source, tmp_path, eos_token_id=ends, pad_token_id=0)
    assert generated(folder) == right[:-1]  # it does not show the token that ended the text
    assert json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"] == ends


def test_sampling_is_the_models_and_what_cannot_be_said_is_named(source: Path, tmp_path: Path) -> None:
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "min_p": 0.05}
    folder, said = lowered(source, tmp_path, **asked, num_beams=1, typical_p=1.0)
    search = json.loads((folder / "genai_config.json").read_text())["search"]
    assert {name: search.get(name) for name in asked} == asked | {"min_p": None}
    og.Model(str(folder))  # refuses options that it does not know
    (limit,) = [each for each in said.limits if "generation_config.json" in each]
    assert "min_p=0.05" in limit
    assert "num_beams" not in limit


def test_a_tokenizer_that_is_not_opened_is_named(source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "sentencepiece"))
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    folder, said = lowered(model, tmp_path)
    with pytest.raises(RuntimeError, match="tokenizer"):
        og.Tokenizer(og.Model(str(folder)))
    assert any("tokenizer.json" in limit for limit in said.limits)
    assert not any("tokenizer.json" in limit for limit in lowered(source, tmp_path / "fast")[1].limits)


def test_a_tokenizer_of_one_file_is_opened(source: Path, tmp_path: Path) -> None:
    folder, said = lowered(source, tmp_path)
    text = "hello, world 12"
    found = og.Tokenizer(og.Model(str(folder)))
    right = hf.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))(text).input_ids
    ids = found.encode(text).tolist()
    assert ids[-len(text) :] == right[-len(text) :]
    assert found.decode(ids[-len(text) :]) == text
    described = json.loads((folder / "tokenizer_config.json").read_text())
    assert (described["bos_token"], described["eos_token"]) == ("<s>", "</s>")
    assert "tokenizer_config.json" in said.files
    assert hf.AutoTokenizer.from_pretrained(folder)(text).input_ids == right
