"""Planning stays cheap on deep models. The limits are several times what an idle machine needs; see ``benchmarks/scale.py``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ANALYSIS_S, REWRITE_S, PEAK_GIB = 1.0, 40.0, 1.5


@pytest.mark.slow
def test_a_deep_model_is_planned_in_seconds_and_without_its_weights() -> None:
    """A 24-layer Llama of 1.2 B parameters: 4.8 GB of weights that are never made."""
    script = Path(__file__).parents[3] / "benchmarks" / "scale.py"
    done = subprocess.run([sys.executable, str(script), "llama-24"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^  (.+?) +([\d.]+) CPU s +peak +([\d.]+) GiB$", done.stdout, re.MULTILINE)
    seconds = {step: float(value) for step, value, _ in found}
    assert seconds["analysis"] < ANALYSIS_S
    assert seconds["plan, rewrite and check"] < REWRITE_S
    assert max(float(peak) for *_, peak in found) < PEAK_GIB
    before, after = (float(value) for value in re.findall(r"([\d.]+) B parameters", done.stdout))
    assert 0.5 < after / before < 0.7  # a quarter of channels, heads and width at once
