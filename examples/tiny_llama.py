"""Train a tiny byte-level Llama on Python's own standard library, compile it, and print what it gained.

About two CPU minutes of training on the first run; the model is kept in ``.demo/`` and reused afterwards. Everything is
seeded: the same Python version gives the same model.

    python examples/tiny_llama.py [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import compile_sparse
from compile_sparse.compiler.cli.tables import report_table
from compile_sparse.compiler.cli.terminal_progress import TerminalProgress
from compile_sparse.compiler.errors import GateFailure

STEPS, BATCH, LENGTH = 180, 16, 128
HELD_OUT = ("asyncio", "email", "json")
"""Packages the model never sees: the evaluation slices."""


def build_tokenizer() -> Tokenizer:
    """One token per byte (GPT-2's printable alphabet) and a beginning-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_data(folder: Path) -> str:
    """Write calibration and evaluation files; returns the training text."""
    library = Path(sysconfig.get_path("stdlib"))
    training = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("*.py"))]
    held_out = {name: sorted((library / name).glob("*.py")) for name in HELD_OUT}
    files = {"calibration": training[::8]} | {
        name: [path.read_text(encoding="utf-8", errors="ignore") for path in paths] for name, paths in held_out.items()
    }
    for name, texts in files.items():
        lines = [json.dumps({"text": text}) for text in texts if text.strip()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(training)


def train(folder: Path, text: str) -> None:
    """Train and save the model with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer.encode(text[:4_000_000]).ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS, pct_start=0.1)
    draws = torch.Generator().manual_seed(0)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=STEPS)
        for _ in range(STEPS):
            starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=draws)
            batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"training, loss {loss.item():.2f}")
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> int:
    """Train if needed, compile, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="working folder (default: .demo)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    text = write_data(out)
    model = out / "model"
    if not (model / "tokenizer.json").is_file():  # written last
        train(model, text)
    with TerminalProgress() as progress:
        try:
            result = compile_sparse.compile(
                model,
                target="ort-cpu",
                prune={"channels": 0.25},
                quantize="w8a8",
                calibration=out / "calibration.jsonl",
                calibration_samples=64,
                eval={name: out / f"{name}.jsonl" for name in HELD_OUT},
                workload="prompt=128,output=64,rounds=15",
                gates=["fidelity_top1>=0.97", "artifact_bytes<=0.6x"],
                out=out / "artifact",
                force=True,
                progress=progress,
            )
            report, path, code = result.report, result.report_path, 0
        except GateFailure as failure:
            report, path, code = failure.result.report, failure.result.report_path, failure.exit_code
            Console(stderr=True).print(str(failure))
    Console().print(report_table(report))
    sys.stdout.write(f"{path}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
