"""Reading the builder's log and the engine inspector, on recorded lines of several versions, and the numbers made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compile_sparse.backends.tensorrt.sparsity.inspector import kernels_by_profile
from compile_sparse.backends.tensorrt.sparsity.layer_names import nodes_of, profile_of, split_list
from compile_sparse.backends.tensorrt.sparsity.sparse_gate import GemmRow
from compile_sparse.backends.tensorrt.sparsity.sparse_log import (
    LayerList,
    Selection,
    memory_lines,
    selections,
    selections_by_profile,
)
from compile_sparse.backends.tensorrt.sparsity.sparse_report import sparse_report

_RECORDED = Path(__file__).with_name("recorded")
_NAMES = ("mm", "nn")


def _log(name):
    lines = (_RECORDED / f"sparse_log_{name}.log").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def _listed(*names):
    return LayerList(len(names), names)


_WRAPPED = ("Conv_22", "MatMul_51", "MatMul_125", "MatMul_139", "MatMul_149", "MatMul_709", "Gemm_725")
_FUSED = (
    "MatMul_401",
    "Conv_619 + Relu_620",
    "Conv_626",
    "Conv_621 + Add_627 + Relu_628",
    "Conv_276 + Add_277 + Relu_278",
)
_UP = "model.layers.0.mlp.up_proj/MatMul_"
_QK = "model.layers.0.q_proj/MatMul_2 || model.layers.0.k_proj/MatMul_3"


@pytest.mark.parametrize(
    ("log", "eligible", "chosen"),
    [
        ("8.0", _listed("Conv_0"), _listed()),
        ("8.x_wrapped", _listed(*_WRAPPED), _listed()),
        ("8.4.2_none", _listed(), _listed()),
        ("8.4.0_fused", _listed(*_FUSED), _listed("Conv_621 + Add_627 + Relu_628")),
        ("10.3_counts", LayerList(39, None), _listed()),
        (
            "11_synthetic",
            _listed(_UP + "1", _UP + "10", _QK, "PWN(lm/Sigmoid_4, lm/Mul_5)"),
            _listed(_UP + "10", _QK),
        ),
    ],
)
def test_recorded_logs(log, eligible, chosen):
    """A log file as one string, and (where no line is wrapped) the same as a message per line."""
    whole = selections([_log(log)])
    assert whole[-1] == Selection(eligible, chosen)
    assert len(whole) == (2 if log == "11_synthetic" else 1)
    if "wrapped" not in log:
        assert selections(_log(log).splitlines()) == whole


@pytest.mark.parametrize(
    "prefix", ["", "[V] [TRT] ", "[11/20/2026-10:00:00] [V] [TRT] ", "\x1b[38;5;8m[V] ", "[TensorRT] INFO: "]
)
def test_prefixes_and_what_follows(prefix):
    """Whatever stands before a message, the next one is not taken for its rest."""
    messages = [
        f"{prefix}(Sparsity) Layers eligible for sparse math: a, b\x1b[0m",
        "Total Activation Memory: 1",
        f"{prefix}(Sparsity) TRT inference plan picked sparse implementation for layers: b",
        "Engine built, in 3 s",
    ]
    assert selections(messages) == [Selection(_listed("a", "b"), _listed("b"))]
    if prefix:
        file = "\n".join((messages[0], f"{prefix}Total Activation Memory: 1", messages[2]))
        assert selections([file]) == selections(messages)
    numbered = [
        f"{prefix}(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b",
        "c",
        f"{prefix}(Sparsity) Chose 0 layer(s) using sparse tactics:",
        "d",
    ]
    for messages in (numbered, ["\n".join(numbered)]):
        (found,) = selections(messages)
        assert found.eligible == _listed("a", "b")
        assert found.chosen.count == 0 and not found.chosen.names


def test_an_empty_list_has_no_rest():
    """What a program prints itself has no prefix; after an empty list it is not a name."""
    file = "[I] (Sparsity) TRT inference plan picked sparse implementation for layers:\nDone"
    assert selections([file]) == [Selection(None, _listed())]


def test_the_count_says_how_a_wrapped_list_is_joined():
    cut = "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: Mat\nMul_1, b\nnot of the list"
    between = "(Sparsity) Found 3 layer(s) eligible to use sparse tactics:\na\nb\nc\nnot of the list"
    assert selections([cut])[0].eligible == _listed("MatMul_1", "b")
    assert selections([between])[0].eligible == _listed("a", "b", "c")


def test_a_count_that_disagrees_is_kept():
    (found,) = selections(["(Sparsity) Chose 5 layer(s) using sparse tactics: a, b"])
    assert found == Selection(None, LayerList(5, ("a", "b")))


def _pair(eligible, chosen):
    return [
        f"(Sparsity) Found {len(eligible)} layer(s) eligible to use sparse tactics: {', '.join(eligible)}",
        f"(Sparsity) Chose {len(chosen)} layer(s) using sparse tactics: {', '.join(chosen)}",
    ]


def test_profiles_take_the_last_pairs_in_order():
    found = selections([*_pair(_NAMES, ["old"]), *_pair(_NAMES, ["mm"]), *_pair(_NAMES, ["nn"])])
    assert [s.chosen.names for s in selections_by_profile(found, 2)] == [("mm",), ("nn",)]
    assert [s.chosen.names for s in selections_by_profile(found[-1:], 2)] == [("nn",), ("nn",)]
    assert selections_by_profile([Selection(_listed("a"), None)], 2) == [None, None]
    cut_short = [*found, Selection(_listed("mm"), None)]  # the build ended before it chose
    assert selections_by_profile(cut_short, 1)[0].chosen.names == ("nn",)


def test_profiles_that_the_names_tell():
    """One list for both profiles must not make a layer of the first sparse in the second."""
    names = ["mm", "nn", "mm [profile 1]", "nn [profile 1]"]
    first, second, third = selections_by_profile(selections(_pair(names, ["mm", "nn", "nn [profile 1]"])), 3)
    assert (first.chosen.count, first.chosen.names) == (2, ("mm", "nn"))
    assert second.eligible.count == 2 and second.chosen.names == ("nn [profile 1]",)
    assert third is None


@pytest.mark.parametrize(
    "line",
    [
        "[TRT] [W] UNSUPPORTED_STATESkipping tactic 4 due to insufficient memory on requested size of 66048 detected.",
        "[TRT] [W] Skipping tactic 3 due to insuficient memory on requested size of 449 detected for tactic 4.",
        "[TensorRT] ERROR: Tactic Device request: 2304MB Available: 1536MB. Device memory is insufficient to use tactic.",
        "[Autotuner]: Skipping tactic: ran out of scratch memory while compiling the auto-tuner subgraph.",
        "[TRT] [W] Insuficient memory on requested size of 449.",
        "AUTOTUNER ERROR: ran out of memory, capacity 5",
        "Error Code 2: OutOfMemory (out of memory)",
    ],
)
def test_lines_about_memory(line):
    assert memory_lines(["Total Activation Memory: 1", f"before\n{line}"]) == 1


def test_names():
    assert split_list("a, PWN(b, c), {ForeignNode[d, e]},f,") == ("a", "PWN(b, c)", "{ForeignNode[d, e]}", "f")
    assert split_list(" ") == ()
    assert nodes_of("a + b || c/d.0/MatMul_1") == {"a", "b", "c/d.0/MatMul_1"}
    assert nodes_of("mm_10 [profile 1]") == {"mm_10"} and profile_of("mm_10 [profile 1]") == 1
    assert profile_of("mm [profile 1] + b") is None
    assert nodes_of("a/MatMul_1_myl0_12") == {"a/MatMul_1"}
    assert nodes_of("{ForeignNode[a...b]}") == frozenset()
    assert nodes_of("{ForeignNode[a]}") == {"a"}


_INSPECTOR = json.loads((_RECORDED / "sparse_inspector.json").read_text())


def _kernels(name, profiles=1):
    return kernels_by_profile(json.dumps(_INSPECTOR[name], ensure_ascii=False), profiles)


def test_inspector_kernels_by_version():
    (ten,) = _kernels("sparse")
    assert ten.runs_sparse("resnetv15_stage3_conv4_fwd") is True
    assert ten.runs_sparse("resnetv15_stage3_conv4") is None  # the engine has no such node
    (gemm,) = _kernels("gemm")
    assert gemm.runs_sparse("/classifier/classifier.6/Gemm") is False
    (eleven,) = _kernels("eleven")
    assert eleven.runs_sparse("a/MatMul_1") is False  # HasSparseWeights is 1, the kernel is dense
    assert eleven.runs_sparse("a/MatMul_10") is True
    assert eleven.runs_sparse("b/MatMul_3") is None  # its kernel is not named
    assert eleven.runs_sparse("c/MatMul_4") is None  # nor is this one, with HasSparseWeights 1


def test_inspector_profiles():
    first, second = _kernels("profiles", 2)
    assert (first.runs_sparse("node_of_Y"), second.runs_sparse("node_of_Y")) == (True, False)
    assert "profile 1" in _kernels("sparse", 2)[1].why_unknown


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not inspected"),
        ("{", "not JSON"),
        ("[]", "no layers"),
        ('{"Layers": []}', "no layers"),
        ("names", "names only"),
    ],
)
def test_inspectors_that_say_nothing(text, part):
    text = json.dumps(_INSPECTOR["names"]) if text == "names" else text
    (kernels,) = kernels_by_profile(text, 1)
    assert part in kernels.why_unknown
    assert kernels.runs_sparse("resnetv15_stage1_conv0_fwd") is None


def test_raw_control_characters_are_read():
    text = json.dumps(_INSPECTOR["sparse"]).replace("\\u001e", "\x1e")
    assert "\x1e" in text
    assert kernels_by_profile(text, 1)[0].runs_sparse("resnetv15_stage3_batchnorm4_fwd") is True


_INTENDED = {
    _UP + "1": "w1",
    _UP + "10": "w10",
    "model.layers.0.q_proj/MatMul_2": "q",
    "model.layers.0.k_proj/MatMul_3": "k",
}
_ROWS = [
    GemmRow(node, "MatMul", tensor, "FLOAT16", (512, 1024), 512, 1024, state="2:4")
    for node, tensor in _INTENDED.items()
] + [
    GemmRow("lm_head", "MatMul", "lm", "FLOAT16", (512, 99), 512, 99, state="dense"),
    GemmRow("other", "MatMul", "o", "FLOAT16", (512, 8), 512, 8, state="2:4"),
]


def test_four_numbers():
    report = sparse_report(_INTENDED, [_log("11_synthetic")], "", ["samples"], rows=_ROWS)
    section = report.profiles["samples"]
    assert (report.intended, section.eligible, section.chosen, section.kernels) == (4, 4, 3, None)
    assert (section.logged_eligible, section.logged_chosen) == (4, 2)  # q and k share a layer; one is no GEMM
    assert {layer.node: layer.chosen for layer in section.layers} == {
        _UP + "1": False,
        _UP + "10": True,
        "model.layers.0.q_proj/MatMul_2": True,
        "model.layers.0.k_proj/MatMul_3": True,
    }
    (declined,) = section.declined
    assert (declined.k, declined.n, declined.layers, declined.example) == (512, 1024, 1, _UP + "1")
    assert report.in_graph.states == {"2:4": 5, "dense": 1}
    assert report.in_graph.unintended == ("other",)
    assert [layer.node for layer in report.in_graph.layers] == list(_INTENDED)
    assert any("1 lines of the builder's log" in note for note in report.notes)
    assert any("not inspected" in note for note in report.notes)
    assert not any("chose no sparse kernel" in note for note in report.notes)


def test_kernels_are_counted_beside_what_was_chosen():
    intended = {"a/MatMul_1": "", "a/MatMul_10": "", "b/MatMul_3": ""}
    inspector = json.dumps(_INSPECTOR["eleven"])
    report = sparse_report(intended, _pair(list(intended), list(intended)), inspector, ["decode"])
    section = report.profiles["decode"]
    assert (section.eligible, section.chosen, section.kernels) == (3, 3, 1)
    assert [layer.kernel for layer in section.layers] == [False, True, None]
    assert any("does not name the kernels of 1 layers" in note for note in report.notes)


def test_nothing_chosen_is_said_plainly():
    report = sparse_report({"a": "", "b": ""}, _pair(["a"], []), "", ["prefill", "decode"])
    assert [section.chosen for section in report.profiles.values()] == [0, 0]
    assert "TensorRT chose no sparse kernel in profile 'decode': the zeros save nothing there." in report.notes
    assert any("did not find 1 of the layers" in note for note in report.notes)
    assert any("1 selection(s) of kernels for 2 profiles" in note for note in report.notes)


def test_counts_without_names_are_no_proof():
    unnamed = [line.partition(":")[0] for line in _pair(["a", "b"], ["a"])]
    section = sparse_report({"a": ""}, unnamed, "", ["p"]).profiles["p"]
    assert (section.eligible, section.chosen, section.logged_eligible, section.logged_chosen) == (None, None, 2, 1)
    section = sparse_report({"a": ""}, [_log("10.3_counts")], "", ["p"]).profiles["p"]
    assert (section.chosen, section.logged_chosen) == (0, 0)  # none is none, whoever was meant


def test_no_lines_and_no_builder_are_not_zero():
    silent = sparse_report({"a": ""}, ["Total Activation Memory: 1"], "", ["p"])
    assert (silent.profiles["p"].eligible, silent.profiles["p"].chosen, silent.profiles["p"].declined) == (
        None,
        None,
        None,
    )
    assert any("says nothing about sparsity" in note for note in silent.notes)
    assert not any("chose no sparse kernel" in note for note in silent.notes)
    absent = sparse_report({"a": ""}, [], "", ["p"], unverified="There is no GPU here.")
    assert absent.profiles is None and absent.unverified == "There is no GPU here."
