"""Low rank: the factored graph computes what the replaced weights would, and nothing is factored that would not pay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.rewrite import rewrite
from compile_sparse.compiler.errors import ModelError, Refusal, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program, SparsityMask
from compile_sparse.compiler.ir.storage import stored_bytes
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import AbsentTensor, LastComputed, ResidentTensor, WeightStore
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import LowRankGemms
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.passes.factoring.candidates import find_candidates
from compile_sparse.passes.factoring.factors import Factors, factor
from compile_sparse.passes.factoring.rewriting import FactorSources, lazy_factors, replace_by_factors
from compile_sparse.passes.low_rank import LowRank
from compile_sparse.passes.quantize import Quantize
from compile_sparse.testing.models import example_inputs
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Linear, target
from tests.unit.passes.running import context as toy_context

EVERY = ("llama", "qwen2", "gpt2", "opt", "bert", "vit")


def _context(*, text: bool = False, alignment: int = 1, products: LowRankGemms | None = None, **options) -> PassContext:
    contract = target().model_copy(update={"alignment": alignment, "low_rank": products})
    return PassContext(contract, SilentProgress(), calibration=_stream() if text else None, **options)


def _stream() -> CalibrationStream:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(3, 96, (16, 24), generator=generator)
    return CalibrationStream(tuple(tuple(w) for w in windows.tolist()), tokens_per_batch=192)


def _outputs(program: Program, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    return Executor(program).run(example_inputs(program, batch, length))


def _assert_same(found: Program, wanted: Program, tolerance: float) -> None:
    """Outputs at two sizes, relative to the largest element."""
    for batch, length in ((2, 7), (1, 12)):
        left, right = _outputs(found, batch, length), _outputs(wanted, batch, length)
        for name, value in right.items():
            if value.is_floating_point():
                assert (left[name] - value).abs().max() <= tolerance * value.abs().max(), name


def _exact_sources(program: Program) -> dict[str, FactorSources]:
    """Full-rank factors of every candidate, though they hold more parameters."""
    sources = {}
    for each in find_candidates(program, _context())[0]:
        weight = program.weights.load(each.linear.tensor)
        found = factor(weight if each.linear.axis == 1 else weight.t()).to(torch.float32)
        sources[each.name] = FactorSources(ResidentTensor(found.inner), ResidentTensor(found.outer))
    return sources


def _replaced(program: Program, factored: Program) -> Program:
    """The dense graph with each factored weight replaced by the product of its factors: the oracle."""
    changes = {}
    for linear in find_linears(program)[0]:
        stem = linear.tensor.removesuffix(".weight")
        inner, outer = (f"{stem}.{part}.weight" for part in ("inner", "outer"))
        if inner in factored.weights:
            left, right = factored.weights.load(outer).double(), factored.weights.load(inner).double()
            product = left @ right if linear.axis == 1 else right @ left
            changes[linear.tensor] = ResidentTensor(product.float())
    assert changes
    return replace(program, weights=program.weights.updated(changes))


@pytest.mark.parametrize("name", EVERY)
def test_full_rank_equals_the_dense_model(captured, name):
    program = captured(name)
    factored = replace_by_factors(program, _exact_sources(program))
    verify_program(factored)
    # float32 factors of each weight: 2 layers of at most 7 products, 2^-24 relative each, amplified by two norms.
    _assert_same(factored, program, 2e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_rank_equals_the_weight_it_stands_for(captured, name):
    program = captured(name)
    before = dict(program.bindings)
    result = LowRank(fraction=0.3).run(program, _context())
    verify_program(result.program)
    _assert_same(result.program, _replaced(program, result.program), 2e-5)
    assert not torch.equal(_first(_outputs(result.program)), _first(_outputs(program)))  # it is not the dense model
    assert dict(program.bindings) == before


def _first(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(outputs.values()))


@pytest.mark.parametrize("form", [Linear, AddMM])
def test_the_factors_are_the_truncated_singular_value_decomposition(form):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    program = toy_program(form(weight), (torch.randn(3, 40),))
    result = LowRank(fraction=0.5).run(program, toy_context())
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = 8  # 0.5 * 24 * 40 / (24 + 40) = 7.5, and a tie keeps more
    assert result.achieved["ranks"] == {"weight": rank}
    best = left[:, :rank] * values[:rank] @ right[:rank]
    x = torch.randn(5, 40, dtype=torch.float32, generator=torch.Generator().manual_seed(1))[:3]
    wanted = x.double() @ best.T + torch.linspace(-1, 1, 24)
    found = Executor(result.program).run({"x0": x})["y0"]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)  # float32 sums of 40 products of size 1


@pytest.mark.parametrize("form", [Linear, AddMM])
def test_the_second_linear_keeps_the_name_and_the_bias(form):
    program = toy_program(form(torch.randn(24, 40)), (torch.randn(3, 40),))
    (before,) = find_linears(program)[0]
    factored = LowRank(fraction=0.5).run(program, toy_context()).program
    first, second = find_linears(factored)[0]
    assert (first.node.name, second.node.name) == (f"{before.node.name}_inner", before.node.name)
    assert second.input is first.node and first.input.name == before.input.name
    assert (first.tensor, second.tensor) == ("weight.inner", "weight.outer")
    assert "weight" not in factored.weights and "bias" in factored.weights
    assert factored.weights["weight.inner"].shape == ((8, 40) if form is Linear else (40, 8))


def test_one_layer_is_decomposed_once_and_one_layer_is_kept(monkeypatch, tiny_llama_program):
    calls = []

    def counted(weight, **options):
        calls.append(options["where"])
        return factor(weight, **options)

    monkeypatch.setattr("compile_sparse.passes.low_rank.factor", counted)
    factored = LowRank(fraction=0.3).run(tiny_llama_program, _context()).program
    assert not calls  # nothing was read yet
    names = [name for name in factored.weights if ".inner." in name or ".outer." in name]
    for name in names:
        factored.weights.load(name)
    assert len(calls) == len(set(calls)) == len(names) // 2


def test_only_the_last_layer_is_kept():
    memory: LastComputed[Factors] = LastComputed()

    def make(value: float) -> Factors:
        return Factors(torch.full((1, 2), value), torch.full((3, 1), value), torch.ones(2))

    pairs = [lazy_factors(memory, str(v), (3, 2), 1, torch.float32, lambda v=v: make(v)) for v in (1.0, 2.0)]
    assert [pair.inner.load()[0, 0].item() for pair in pairs] == [1.0, 2.0]
    assert pairs[0].outer.load()[0, 0].item() == 1.0  # computed again, not the other layer's


# -- what is left alone


def test_logits_ties_and_patterns_are_left_alone(captured):
    program = captured("llama_tied")
    masked = "model.layers.0.mlp.up_proj.weight"
    program = replace(program, masks={masked: SparsityMask("2:4", 1, 0.5)})
    result = LowRank(fraction=0.3).run(program, _context())
    reasons = {skip.where: skip.why for skip in result.diagnostics}
    assert "logits" in reasons["lm_head.weight"] or "logits" in reasons["model.embed_tokens.weight"]
    assert "zeros" in reasons[masked]
    assert masked in result.program.weights
    assert all(skip.code == "CS2501" for skip in result.diagnostics)


def test_a_weight_with_two_readers_is_left_alone():
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = torch.nn.Linear(32, 32)
            self.own = torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.own(torch.tanh(self.shared(torch.tanh(self.shared(x)))))

    result = LowRank(fraction=0.5).run(toy_program(Twice(), (torch.randn(3, 32),)), toy_context())
    assert list(result.achieved["ranks"]) == ["own.weight"]
    assert {skip.where for skip in result.diagnostics} == {"shared.weight"}


def test_nothing_to_factor_is_an_error_with_the_arithmetic():
    program = toy_program(Linear(torch.randn(16, 16)), (torch.randn(3, 16),))
    with pytest.raises(ModelError, match="CS2502") as caught:
        LowRank(fraction=0.5).run(program, _context(alignment=8))
    # rank 8 holds exactly as many parameters as the weight
    assert "8 * (16 + 16) = 256 parameters, 100% of the weight's 256" in caught.value.why


# -- what the runtime says


def _products(**values) -> LowRankGemms:
    return LowRankGemms(**({"decode_pays_below": 1.0, "prefill_pays_below": 1.0, "measured": "x"} | values))


def test_equal_shares_that_do_not_pay_are_refused(tiny_llama_program):
    context = _context(products=_products(decode_pays_below=0.7))
    with pytest.raises(Refusal, match="CS4104") as caught:
        LowRank(fraction=0.2).run(tiny_llama_program, context)
    assert "keep 80%" in caught.value.why and "below 70%" in caught.value.why
    assert LowRank(fraction=0.4).run(tiny_llama_program, context).modified


def test_the_phase_that_is_not_in_the_workload_does_not_count(tiny_llama_program, tiny_bert_program):
    products = _products(decode_pays_below=0.7, prefill_pays_below=0.9)
    prompts_only = Workload(prompt=128, output=1)
    assert LowRank(fraction=0.2).run(tiny_llama_program, _context(products=products, workload=prompts_only)).modified
    assert LowRank(fraction=0.2).run(tiny_bert_program, _context(products=products)).modified


def test_small_layers_pay_for_their_extra_product(tiny_llama_program):
    """64 * 64 = 4,096 less 2,000 leaves rank 16; 32 * 64 leaves nothing at all."""
    result = LowRank(fraction=0.5).run(tiny_llama_program, _context(products=_products(extra_product_weights=2000)))
    ranks = result.achieved["ranks"]
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 16
    assert "model.layers.0.self_attn.k_proj.weight" not in ranks
    skipped = {skip.where: skip for skip in result.diagnostics}["model.layers.0.self_attn.k_proj.weight"]
    assert skipped.code == "CS2502" and "2,000 for one more GEMM" in skipped.why


def test_ranks_are_aligned_and_follow_the_quantization_where_there_is_room(tiny_llama_program):
    def ranks(**options) -> dict[str, int]:
        result = LowRank(fraction=0.3).run(tiny_llama_program, _context(**options))
        return {tensor.split(".")[-2]: rank for tensor, rank in result.achieved["ranks"].items()}

    plain, grouped = ranks(alignment=2), ranks(alignment=2, contraction_multiple=3)
    assert all(rank % 2 == 0 for rank in plain.values())
    assert plain["up_proj"] % 6 and plain["k_proj"] % 6  # else the next lines show nothing
    assert grouped["up_proj"] % 6 == 0  # 88 * 64 / (88 + 64) = 37 holds six multiples of 6
    assert grouped["k_proj"] == plain["k_proj"]  # 32 * 64 / (32 + 64) = 21 holds three, too few to choose from


# -- with calibration text


def test_whitened_factors_miss_less_of_the_outputs(tiny_llama_program):
    """Measured on the text itself: layer 0's query projection, whose inputs no earlier factor has changed."""
    name = "model.layers.0.self_attn.q_proj"

    def error(criterion: str) -> float:
        options = {"criterion": criterion, "compensation": "none"}
        program = LowRank(fraction=0.5, **options).run(tiny_llama_program, _context(text=True)).program
        outer, inner = (program.weights.load(f"{name}.{part}.weight").double() for part in ("outer", "inner"))
        change = tiny_llama_program.weights.load(f"{name}.weight").double() - outer @ inner
        linear = next(each for each in find_linears(tiny_llama_program)[0] if each.tensor == f"{name}.weight")
        total = 0.0

        def observe(value: torch.Tensor) -> None:
            nonlocal total
            total += float((value.double() @ change.T).square().sum())

        for feed in _stream().feeds(tiny_llama_program):
            Executor(tiny_llama_program).run(feed, observe={linear.input.name: observe})
        return total

    assert error("whitened") < 0.98 * error("svd")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_global_ranks_meet_the_budget_and_differ(captured, name):
    program = captured(name)
    result = LowRank(fraction=0.3, compensation="none").run(program, _context(text=True, alignment=2))
    verify_program(result.program)
    achieved = result.achieved
    assert achieved["criterion"] == "loss" and achieved["allocation"] == "global"
    assert 0.3 <= achieved["fraction"] < 0.31
    assert len(set(achieved["ranks"].values())) > 2
    assert achieved["estimated_loss_added"] > 0
    candidates = find_candidates(program, _context())[0]
    removed = achieved["parameters"]["before"] - achieved["parameters"]["after"]
    assert removed == round(achieved["fraction"] * sum(each.choices.dense for each in candidates))
    _assert_same(result.program, _replaced(program, result.program), 2e-5)


def test_the_loss_decides_which_layers_pay(captured):
    """A layer whose output is scaled down to nothing is factored as far as possible; no other criterion sees that."""
    program = captured("llama")
    muted = "model.layers.1.mlp.down_proj.weight"
    scaled = program.weights.load(muted) * 1e-3
    quiet = replace(program, weights=program.weights.updated({muted: ResidentTensor(scaled)}))
    result = LowRank(fraction=0.2, compensation="none").run(quiet, _context(text=True))
    # Those three hold 29 % of the parameters, enough for the 20 % asked for.
    assert set(result.achieved["ranks"]) == {muted, *(muted.replace("down", part) for part in ("gate", "up"))}
    heard = LowRank(fraction=0.2, compensation="none").run(program, _context(text=True))
    assert not set(heard.achieved["ranks"]) <= set(result.achieved["ranks"])


def test_refitting_brings_the_outputs_closer(tiny_llama_program):
    def distance(compensation: str) -> float:
        result = LowRank(fraction=0.4, criterion="whitened", compensation=compensation).run(
            tiny_llama_program, _context(text=True)
        )
        verify_program(result.program)
        assert result.achieved["compensation"] == compensation
        total = 0.0
        for feed in _stream().feeds(tiny_llama_program):
            left, right = (Executor(p).run(feed)["logits"] for p in (result.program, tiny_llama_program))
            total += float((left - right).square().sum())
        return total

    assert distance("least-squares") < 0.9 * distance("none")


def test_refitting_keeps_patterns_of_zeros(tiny_llama_program):
    name = "model.layers.0.mlp.up_proj.weight"
    value = tiny_llama_program.weights.load(name) * (torch.arange(64) % 2)
    program = replace(
        tiny_llama_program,
        weights=tiny_llama_program.weights.updated({name: ResidentTensor(value)}),
        masks={name: SparsityMask("1:2", 1, 0.5)},
    )
    result = LowRank(fraction=0.4, criterion="whitened").run(program, _context(text=True))
    assert result.achieved["refitted_layers"] > 0
    assert torch.equal(result.program.weights.load(name), value)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"criterion": "loss"}, "low-rank.criterion"),
        ({"criterion": "whitened"}, "low-rank.criterion"),
        ({"allocation": "global"}, "low-rank.criterion"),
        ({"compensation": "least-squares"}, "low-rank.compensation"),
    ],
)
def test_what_needs_text_says_so(tiny_llama_program, options, where):
    with pytest.raises(UsageError, match="CS1121") as caught:
        LowRank(fraction=0.3, **options).run(tiny_llama_program, _context())
    assert caught.value.where == where


@pytest.mark.parametrize("criterion", ["svd", "whitened"])
def test_errors_that_cannot_be_compared_are_not_ranked(criterion):
    with pytest.raises(ValidationError, match="same unit"):
        LowRank(fraction=0.3, criterion=criterion, allocation="global")


def test_an_amount_out_of_reach_is_refused(tiny_llama_program):
    """Rank 16 of 64 x 64 leaves half of it."""
    with pytest.raises(Refusal, match="CS4104") as caught:
        LowRank(fraction=0.9).run(tiny_llama_program, _context(text=True, alignment=16))
    candidates = find_candidates(tiny_llama_program, _context(alignment=16))[0]
    least = sum(each.choices.parameters(16) for each in candidates)
    assert f"leave {least:,} of" in caught.value.why


def test_equal_shares_go_as_far_as_the_alignment_allows_and_say_so(tiny_llama_program):
    result = LowRank(fraction=0.9).run(tiny_llama_program, _context(alignment=16))
    assert set(result.achieved["ranks"].values()) == {16}
    assert result.achieved["fraction"] < 0.6
    assert "90.0% was asked for" in result.notes[0]


def test_equal_shares_leave_a_layer_dense_rather_than_take_far_more(tiny_llama_program):
    """With 1,500 weights for one more GEMM, the highest rank of 64 x 64 that pays holds 62 % of it, asked were 80 %."""
    context = _context(products=_products(extra_product_weights=1500))
    result = LowRank(fraction=0.2).run(tiny_llama_program, context)
    assert "model.layers.0.self_attn.q_proj.weight" not in result.achieved["ranks"]
    assert "model.layers.0.self_attn.q_proj.weight" in result.program.weights
    skip = {skip.where: skip for skip in result.diagnostics}["model.layers.0.self_attn.q_proj.weight"]
    assert skip.code == "CS2502" and "62%" in skip.why
    assert "model.layers.0.mlp.up_proj.weight" in result.achieved["ranks"]
    with pytest.raises(Refusal, match="CS4104"):
        LowRank(fraction=0.05).run(tiny_llama_program, context)


# -- together with other passes


def test_the_plan_has_the_sizes_without_weights(tiny_llama_program):
    bare = WeightStore({n: AbsentTensor(s.shape, s.dtype, n) for n, s in tiny_llama_program.weights.items()})
    absent = replace(tiny_llama_program, weights=bare)
    real = LowRank(fraction=0.3).run(tiny_llama_program, _context())
    for program in (absent, tiny_llama_program):
        planned = LowRank(fraction=0.3).run(program, _context(plan_only=True))
        verify_program(planned.program)
        assert planned.achieved["ranks"] == real.achieved["ranks"]
        assert stored_bytes(planned.program) == stored_bytes(real.program)
        assert not planned.notes


def test_the_plan_of_a_global_allocation_has_the_total(tiny_llama_program):
    """Also where equal shares would not pay."""
    options = {"text": True, "alignment": 2, "products": _products(decode_pays_below=0.7)}
    real = LowRank(fraction=0.2, compensation="none").run(tiny_llama_program, _context(**options))
    planned = LowRank(fraction=0.2).run(tiny_llama_program, _context(plan_only=True, **options))
    verify_program(planned.program)
    assert planned.achieved["fraction"] == pytest.approx(real.achieved["fraction"], abs=0.01)
    assert planned.notes


def test_followed_by_quantization(tiny_llama_program):
    context = _context()
    quantized, sections = run_passes(
        tiny_llama_program, [LowRank(fraction=0.3), Quantize(scheme="w8a16")], context, verify_each=True
    )
    factored = LowRank(fraction=0.3).run(tiny_llama_program, context).program
    assert sections[1].achieved["linears"] == len(find_linears(factored)[0])
    # 8 bits with groups of 128: 2^-8 of the largest weight per element, two layers.
    _assert_same(quantized, factored, 0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_rank_is_an_axis_like_any_other(captured, name):
    """The analysis of the result finds the rank, and removing its last positions gives the lower rank."""
    program = captured(name)
    factored = LowRank(fraction=0.3).run(program, _context()).program
    analysis = analyse(factored)
    axis = 0 if name == "llama" else 1  # of the rank in the inner factor
    inner = [tensor for tensor in factored.weights if ".inner." in tensor]
    ranks = [g for g in analysis.groups if set(g.members) & {(tensor, axis) for tensor in inner}]
    assert len(ranks) == len(inner)
    for group in ranks:
        assert not group.frozen
        assert len(group.members) == 2  # the two factors and nothing else
    keep = {}
    for group in ranks:
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[: group.size // 2] = True
        keep[group.anchor] = mask
    cut = rewrite(factored, analysis, keep)
    verify_program(cut)

    changes = {}
    for tensor in inner:
        zeros = factored.weights.load(tensor).clone()
        half = zeros.shape[axis] // 2
        zeros.narrow(axis, half, zeros.shape[axis] - half).zero_()
        changes[tensor] = ResidentTensor(zeros)
    oracle = replace(factored, weights=factored.weights.updated(changes))
    _assert_same(cut, oracle, 2e-6)
