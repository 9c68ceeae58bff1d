"""Progress: plain lines in logs, bars on terminals, nothing on stdout."""

from __future__ import annotations

import io

import pytest

from compile_sparse.compiler.cli.terminal_progress import TerminalProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines():
    stream = io.StringIO()
    with TerminalProgress(stream) as progress, progress.task("lowering", total=3) as task:
        task.advance()
    assert stream.getvalue().startswith("lowering: done in 0.")


def test_plain_lines_of_work_that_fails():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="x"), TerminalProgress(stream) as progress, progress.task("lowering"):
        raise ValueError("x")
    assert stream.getvalue().startswith("lowering: stopped in 0.")


def test_long_work_shows_that_it_is_alive(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with TerminalProgress(stream) as progress, progress.task("calibrating", total=100) as task:
        for _ in range(30):
            now[0] += 1.0
            task.advance(2)
    assert stream.getvalue().splitlines() == [
        "calibrating: 20 of 100, about 40 s left",
        "calibrating: 40 of 100, about 30 s left",
        "calibrating: 60 of 100, about 20 s left",
        "calibrating: done in 30.0 s",
    ]


def test_bars():
    stream = Terminal()
    with TerminalProgress(stream) as progress, progress.task("lowering", total=2) as task:
        task.advance(2)
    assert "lowering" in stream.getvalue()
    assert "2/2" in stream.getvalue()
