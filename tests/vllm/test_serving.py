"""A served checkpoint answers as the model in transformers does, in chunks, and the server leaves nothing running."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.runtimes.environments import RuntimeRecord
from compile_sparse.passes.prune_channels import PruneChannels
from tests.random_weights import randomised
from tests.vllm.conftest import small_config
from tests.vllm.lowering import artifact
from tests.vllm.serving import ServingFailure, members, serve, stream

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
COUNT = 12

STAND_IN = """#!{python}
import signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.do_GET()
        self.wfile.write(b'data: {{"choices": [{{"text": "a", "token_ids": [7], "finish_reason": null}}]}}\\n\\n')
        if self.path == "/v1/completions":
            self.wfile.write(b"data: [DONE]\\n\\n")

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def interpreter(runtime: RuntimeRecord) -> str:
    """The registered interpreter that has vLLM."""
    return str(runtime.python)


def make_checkpoint(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama whose tokens are single printable characters, so that any output is valid text."""
    torch.manual_seed(0)
    characters = [
        *map(chr, range(ord("!"), ord("~") + 1)),
        "Ġ",
        "Ċ",
    ]  # a space and a line break, as byte-level has them
    words = {word: index for index, word in enumerate(["<s>", "</s>", *characters])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # sharp enough that the likeliest token is clear
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    """The likeliest continuation, each step clear of float32 rounding by far."""
    ids = list(prompt)
    for _ in range(COUNT):
        best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-2, "the runner-up is too close for the comparison to mean anything"
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :]


@pytest.mark.server
def test_a_served_checkpoint_streams_what_transformers_generates(interpreter: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model, tokenizer = make_checkpoint(folder)
    request: dict[str, Any] = {"max_tokens": COUNT, "ignore_eos": True}
    with serve(interpreter, folder, log=tmp_path / "log", arguments=["--kv-cache-memory-bytes", "16000000"]) as server:
        text = "def main(): return 1"
        expected = greedy(model, tokenizer(text)["input_ids"])
        answer = stream(server, "/v1/completions", prompt=text, **request)
        assert answer.tokens == expected
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.finish_reason == "length"
        assert len(answer.chunks) > 1

        messages = [{"role": "user", "content": "hello"}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        expected = greedy(model, prompt)
        answer = stream(server, "/v1/chat/completions", messages=messages, **request)
        assert answer.tokens == expected
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert len(answer.chunks) > 1
    assert members(server.group) == []


@pytest.mark.server
def test_a_checkpoint_without_tokenizer_is_asked_with_token_ids(interpreter: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model, _ = make_checkpoint(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    prompt = [0, 40, 50, 60]
    with serve(interpreter, folder, log=tmp_path / "log", arguments=["--kv-cache-memory-bytes", "16000000"]) as server:
        answer = stream(server, "/v1/completions", prompt=prompt, max_tokens=COUNT, ignore_eos=True, detokenize=False)
    assert answer.tokens == greedy(model, prompt)
    assert len(answer.chunks) > 1


@pytest.mark.server
def test_an_artifact_with_its_plugin_is_served(interpreter: str, tmp_path: Path) -> None:
    """Layers of different size: what is served is the program, and the artifact's own plugin folder is all it needs."""
    program = capture_model(randomised(LlamaForCausalLM(small_config())))
    pruned, lowered = artifact(
        program, [PruneChannels(fraction=0.25, allocation="global", compensation="none")], tmp_path
    )
    folder = tmp_path / "model"
    plugin = {"PYTHONPATH": str(folder / lowered.form["plugin"])}
    prompt = [5, 40, 50, 60]
    arguments = ["--kv-cache-memory-bytes", "16000000"]
    with serve(interpreter, folder, log=tmp_path / "log", environment=plugin, arguments=arguments) as server:
        answer = stream(server, "/v1/completions", prompt=prompt, max_tokens=COUNT, ignore_eos=True, detokenize=False)
    executor, expected = Executor(pruned), list(prompt)
    for _ in range(COUNT):
        best = executor.run(decoder_inputs(pruned, torch.tensor([expected])))["logits"][0, -1].topk(2)
        assert float(best.values[0] - best.values[1]) > 1e-3, "a near tie would decide"
        expected.append(int(best.indices[0]))
    assert answer.tokens == expected[len(prompt) :]
    assert members(server.group) == []


def test_a_server_that_ignores_the_interrupt_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.vllm.serving.STOP_SECONDS", 0.2)
    impostor = tmp_path / "impostor"
    impostor.write_text(STAND_IN.format(python=sys.executable))
    os.chmod(impostor, stat.S_IRWXU)
    with serve(impostor, tmp_path, log=tmp_path / "log") as server:
        assert len(members(server.group)) == 2
        assert stream(server, "/v1/completions", prompt=[1]).tokens == [7]
        with pytest.raises(ServingFailure, match=r"without \[DONE\]"):
            stream(server, "/v1/broken_off", prompt=[1])
    assert members(server.group) == []


def test_a_server_that_does_not_start_says_what_it_printed(tmp_path: Path) -> None:
    failed = pytest.raises(ServingFailure, match=r"ended with code \d+\. It printed: .*vllm")
    with failed, serve(sys.executable, tmp_path, log=tmp_path / "log"):
        pass
