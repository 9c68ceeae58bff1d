"""Windows of text begin as the model's own tokenizer begins a text, and hold nothing that it appends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.pipeline.text_reader import TextReader
from compile_sparse.compiler.recipes.flags import merge_options
from compile_sparse.compiler.recipes.recipe import Recipe, recipe_from_yaml

BOS, EOS, OTHER, MASK = 1, 2, 3, 4
SPECIAL = {"<unk>": 0, "<s>": BOS, "</s>": EOS, "<other>": OTHER, "[gMASK]": MASK}
TEXT = "it was a bright cold day in April"


def template(single: str) -> Callable[[Tokenizer], Any]:
    return lambda made: processors.TemplateProcessing(single=single, special_tokens=list(SPECIAL.items()))


KINDS: dict[str, tuple[Callable[[Tokenizer], Any], dict[str, Any], list[int]]] = {
    # name: post-processor, tokenizer_config.json beside bos and eos, what stands before a text
    "llama": (template("<s> $A"), {}, [BOS]),
    "qwen": (lambda made: None, {}, []),
    "gpt2": (lambda made: processors.ByteLevel(trim_offsets=False), {}, []),
    "llama3": (lambda made: processors.Sequence([processors.ByteLevel(), template("<other> $A")(made)]), {}, [OTHER]),
    "ends": (template("$A </s>"), {}, []),
    "both": (template("<s> $A </s>"), {}, [BOS]),
    "glm": (template("[gMASK] <other> $A"), {}, [MASK, OTHER]),
    "bert": (lambda made: processors.BertProcessing(("</s>", EOS), ("<s>", BOS)), {}, [BOS]),
    "asks for bos": (lambda made: None, {"add_bos_token": True}, []),
    "asks for none": (template("<s> $A"), {"add_bos_token": False}, [BOS]),
    "padded": (template("<s> $A"), {}, [BOS]),
}


def model_folder(out: Path, kind: str) -> Path:
    post_processor, config, _ = KINDS[kind]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(list(SPECIAL))
    if (found := post_processor(made)) is not None:
        made.post_processor = found
    if kind == "padded":
        made.enable_padding(length=50, pad_id=0, pad_token="<unk>")
        made.enable_truncation(4)
    out.mkdir(exist_ok=True)
    made.save(str(out / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (out / "tokenizer_config.json").write_text(json.dumps(described))
    return out


def windows(folder: Path, recipe: Recipe, config: dict[str, Any], *, length: int = 16) -> list[list[int]]:
    (folder / "text.jsonl").write_text(json.dumps({"text": TEXT}))
    asked = merge_options(recipe, eval={"en": folder / "text.jsonl"}, sequence_length=length)
    return TextReader({"vocab_size": 300, **config}, folder, asked.bos).slices(asked)["en"]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_begin_as_transformers_begins_a_text(kind: str, tmp_path: Path) -> None:
    """Whatever the config calls the beginning of a sequence."""
    folder, (_, _, head) = model_folder(tmp_path / "m", kind), KINDS[kind]
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inner = tokenizer(TEXT, add_special_tokens=False).input_ids
    whole = tokenizer(TEXT, truncation=False, padding=False).input_ids
    assert whole[: len(whole) - whole[::-1].index(inner[-1])] == head + inner, "the table above is right"

    found = windows(folder, Recipe(), {"bos_token_id": 7})
    assert [window[: len(head)] for window in found] == [head] * len(found)
    kept = [token for window in found for token in window[len(head) :]]
    assert kept == inner[: len(kept)]
    assert len(inner) - len(kept) < 16 // 4, "a short last piece is left out"
    assert all(len(window) <= 16 for window in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", ["always", "never"])
def test_the_option_wins(kind: str, bos: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", kind)
    found = windows(folder, merge_options(bos=bos), {"bos_token_id": 7})
    head = [] if bos == "never" else KINDS[kind][2] or [7]
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.no_truncation(), inner.no_padding()
    ids = inner.encode(TEXT, add_special_tokens=False).ids
    assert found[0] == (head + ids)[:16]


def test_always_needs_a_token_that_somebody_names(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "qwen")
    with pytest.raises(UsageError, match="CS1063") as caught:
        TextReader({"vocab_size": 300}, folder, "always")
    assert "--bos" in caught.value.where
    (folder / "generation_config.json").write_text('{"bos_token_id": 3}')
    assert windows(folder, Recipe(bos="always"), {"bos_token_id": 7})[0][0] == 3, "as in generation_config.json first"


def test_the_option_is_one_word_of_a_recipe() -> None:
    assert Recipe().bos == "tokenizer"
    assert recipe_from_yaml("bos: never").bos == merge_options(bos="never").bos == "never"
    with pytest.raises(UsageError, match="CS1105"):
        merge_options(bos="sometimes")


@pytest.mark.parametrize(("length", "code"), [(2, "CS1036"), (3, None)])
def test_windows_have_room_for_text(length: int, code: str | None, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "glm")
    if code is None:
        assert {len(window) for window in windows(folder, Recipe(), {}, length=length)} == {3}
        return
    with pytest.raises(UsageError, match=code):
        windows(folder, Recipe(), {}, length=length)


def test_a_beginning_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "glm")
    with pytest.raises(UsageError, match="CS1031"):
        windows(folder, Recipe(), {"vocab_size": 4})


@pytest.mark.parametrize("kind", ["qwen", "glm", "both"])
def test_packaged_text_begins_so_too(kind: str, tmp_path: Path) -> None:
    folder, (_, _, head) = model_folder(tmp_path / "m", kind), KINDS[kind]
    found = TextReader({"vocab_size": 300, "bos_token_id": 7}, folder).sample()
    assert found
    assert all(window[: len(head)] == head and EOS not in window and 7 not in window[:1] for window in found)
