"""Layer by layer in ONNX Runtime: right artifacts are never accused, and the smallest mistakes in one layer are found in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from benchmarks.fidelity_separation import separations
from compile_sparse.backends.onnxruntime.observation import round_groups
from compile_sparse.compiler.capture import capture
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.pipeline.job import Job, prepare
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.recipes.recipe import recipe_from_yaml
from tests.support.served_models import SMALL, build_served
from tests.support.tiny_models import build_tiny

MUTANTS = (
    "scales of one q_proj x 1.02",
    "scales of one up_proj x 1.02",
    "two query heads swapped",
    "two key heads swapped",
    "one norm's weight dropped",
    "neighbours swapped (nibbles)",
    "scales along the wrong axis",
    "rotary angles off by one position",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Program]:
    folder = tmp_path_factory.mktemp("llama")
    build_served("llama", SMALL).save_pretrained(folder)
    job = prepare(folder, "ort-cpu", recipe_from_yaml("passes: []"))
    return job, capture(job.folder, progress=SilentProgress())


@pytest.mark.parametrize("scheme", ["none", "w8a8", "w8a16", "w4a16-g32"])
def test_right_artifacts_pass_and_each_mutant_is_found(model: tuple[Job, Program], scheme: str) -> None:
    right, *wrong = separations(*model, scheme, MUTANTS)
    assert right.wrong == 0
    assert right.checked == 15  # seven in each block, and the head
    assert right.ratio < 0.1
    grouped = scheme == "w4a16-g32"  # the other forms have one scale in a row of this model
    assert [each.mutant for each in wrong] == [name for name in MUTANTS if grouped or "axis" not in name]
    missed = [each for each in wrong if each.ratio <= 1]
    assert not missed
    # The layer itself is found; those behind it start from the runtime's own values. Rotation is in every block.
    assert all(each.wrong <= 2 for each in wrong if "rotary" not in each.mutant), wrong


def test_one_expert_off_by_two_per_cent_is_found(tmp_path: Path) -> None:
    build_tiny("mixtral").save_pretrained(tmp_path)
    job = prepare(tmp_path, "ort-cpu", recipe_from_yaml("passes: []"))
    dense = capture(job.folder, progress=SilentProgress())
    right, wrong = separations(job, dense, "none", ["one expert's weights x 1.02"])
    assert (right.wrong, wrong.wrong) == (0, 1)
    assert wrong.ratio > 10


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_the_kernel_rounds_its_input_as_the_reference_does(bits: int, group: int) -> None:
    """Against the kernel itself: with codes that stand for the identity it shows its rounded input."""
    width, rows = 256, 5
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 50
    middle = 1 << (bits - 1)
    codes = np.full((width, width), middle, np.uint8) + np.eye(width, dtype=np.uint8)
    packed = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    helper = onnx.helper
    node = helper.make_node(
        "MatMulNBits",
        ["x", "b", "s"],
        ["y"],
        domain="com.microsoft",
        **{"K": width, "N": width, "bits": bits, "block_size": group, "accuracy_level": 4},
    )
    stored = [
        onnx.numpy_helper.from_array(packed.reshape(width, width // group, group * bits // 8), "b"),
        onnx.numpy_helper.from_array(np.ones(width * width // group, np.float32), "s"),
    ]
    shown = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, width]) for name in "xy"]
    graph = helper.make_graph([node], "g", shown[:1], shown[1:], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    (found,) = session.run(None, {"x": x.numpy()})
    # The kernel adds code x middle to each sum and takes it away again, in float32.
    cancelled = 2.0**-22 * middle * float(x.abs().sum(1).max())
    torch.testing.assert_close(round_groups(x, group), torch.from_numpy(found), rtol=1e-6, atol=cancelled)
    step = float(x.abs().max()) / 127
    assert cancelled < step / 20
    assert (x - torch.from_numpy(found)).abs().max() > step / 4


def test_short_last_groups_and_empty_ones() -> None:
    x = torch.tensor([[1.0, -0.5, 0.0, 0.0, 3.0]])
    torch.testing.assert_close(round_groups(x, 2), torch.tensor([[1.0, -64 / 127, 0.0, 0.0, 3.0]]))


def test_the_copy_leaves_the_folder_as_it_was(model: tuple[Job, Program], tmp_path: Path) -> None:
    job, program = model
    folder, scratch = tmp_path / "model", tmp_path / "copy"
    folder.mkdir()
    scratch.mkdir()
    lowered = job.backend.lower(program, job.target, folder, SilentProgress(), job.settings)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    seen = job.backend.observation(program, job.target, folder, scratch, job.settings)  # type: ignore[attr-defined]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert set(lowered.files) == {path.name for path in scratch.iterdir()}
    assert seen.program is program  # nothing is rounded inside float kernels
