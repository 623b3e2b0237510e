"""Test the breakdown of a training step's time: names have the right categories, which add up to the whole step."""

import json
import re
from pathlib import Path

import pytest
import torch

import clipfast.kernels
from clipfast.bench import breakdown, results, tables
from clipfast.bench.breakdown import STEP_RANGE, Breakdown, of_device, of_host
from clipfast.bench.case import OURS, Candidate
from clipfast.bench.categories import CATEGORIES, LOSS_RANGE, classify, classify_op
from clipfast.bench.harness import Timing
from clipfast.bench.suites import build

from .conftest import CPU, TELEMETRY, case, smallest, validate

GEMM, ATTENTION, NORM, CONVOLUTION, INPUT, LOSS, OPTIMIZER, COPIES, OTHER, DATA, HOST = CATEGORIES
# Kernels of retrieval_ranks and top_k, which no training step launches.
NOT_IN_A_STEP = (
    "_own_score_kernel", "_count_ahead_kernel", "_group_maxima_kernel", "_group_scores_kernel", "_results_kernel",
)  # fmt: skip
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
KERNELS = {
    GEMM: ["nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "ampere_sgemm_128x64_tn", "triton_tem_fused_addmm_3"],
    ATTENTION: [
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "_short_bwd_kernel",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16",
    ],
    NORM: [
        "void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>",
        "triton_red_fused_add_native_layer_norm_native_layer_norm_backward_5",
    ],
    CONVOLUTION: ["sm80_xmma_fprop_implicit_gemm_indexed_bf16bf16_bf16f32"],
    INPUT: ["triton_poi_fused_add_embedding_2"],
    LOSS: ["void cunn_SoftMaxForward<LogSoftMaxForwardEpilogue> log_softmax", "_grad_tile_kernel"],
    OPTIMIZER: ["void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>"],
    COPIES: ["Memcpy DtoD (Device -> Device)", ELEMENTWISE, "triton_poi_fused__to_copy_1"],
    DATA: ["Memcpy HtoD (Pinned -> Device)"],
    OTHER: ["mystery_kernel_7"],
}  # fmt: skip
LAUNCHED = [
    # The category is that of the profiler's range or of the op around the kernel.
    ("nvjet_x", (LOSS_RANGE, "aten::matmul", "aten::mm"), LOSS),
    (ELEMENTWISE, ("Optimizer.step#AdamW.step", "aten::_foreach_add_"), OPTIMIZER),
    ("ampere_sgemm", ("clipfast::contrastive_bwd", "aten::addmm"), LOSS),
    ("ampere_sgemm", ("aten::scaled_dot_product_attention", "aten::bmm"), ATTENTION),
    ("any_kernel", ("clipfast::layer_norm_fwd",), NORM),
    # The category is that of the innermost op, because its name is more specific than the kernel's.
    ("void reduce_kernel", ("aten::linear", "aten::addmm"), GEMM),
    ("cutlass_gemm_relu", ("aten::linear", "aten::addmm"), GEMM),
    ("cutlass_gemm", ("aten::conv2d", "aten::cudnn_convolution"), CONVOLUTION),
    (ELEMENTWISE, ("aten::linear", "aten::to", "aten::_to_copy", "aten::copy_"), COPIES),
    (ELEMENTWISE, ("aten::addmm", "aten::copy_"), COPIES),
    ("nvjet_x", ("aten::linear", "somebody::s_linear"), GEMM),
    # The category of a kernel that torch.compile made is that of its name, not of the op around it.
    ("triton_poi_fused_gelu_1", ("CompiledFunction", "aten::mm"), NORM),
    ("mystery_kernel_7", ("aten::view", "autograd::engine::evaluate_function: FooBackward0"), OTHER),
]
LAUNCHED += [(name, (), category) for category, names in KERNELS.items() for name in names]
# Names of CPU ops, each after the ops around it.
OPS = {
    GEMM: ["aten::linear > aten::addmm"],
    ATTENTION: ["clipfast::attention_pool_bwd > aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu"],
    NORM: ["aten::native_layer_norm_backward", "CompiledFunction > graph_2_cpp_fused_add_clone_native_layer_norm_5"],
    CONVOLUTION: ["aten::mkldnn_convolution"],
    INPUT: ["aten::embedding_dense_backward", "clipfast::patch_embed_fwd > aten::mm"],
    LOSS: ["aten::nll_loss_forward"],
    OPTIMIZER: ["Optimizer.step#AdamW.step", "aten::_fused_adamw_"],
    COPIES: ["aten::copy_", "aten::sum"],
    HOST: ["aten::linear", "CompiledFunction", "autograd::engine::evaluate_function: MmBackward0 > MmBackward0"],
    OTHER: ["aten::something_new", "somebody::op"],
}  # fmt: skip


def test_names_have_the_category_of_what_they_do():
    for kernel, ops, category in LAUNCHED:
        assert classify(kernel, ops) == category, kernel
    for category, names in OPS.items():
        for ops in names:
            assert classify_op(ops.split(" > ")) == category, ops


def test_every_kernel_and_op_of_ours_has_a_category():
    sources = [path.read_text() for path in Path(clipfast.kernels.__path__[0]).rglob("*.py")]
    kernels, ops = (
        {name for text in sources for name in re.findall(pattern, text)}
        for pattern in (r"@triton\.jit\s+def (\w+_kernel)\(", r'@registered\("(\w+)"\)')
    )
    assert min(len(kernels), len(ops)) > 15
    unknown = {name for name in kernels if classify(name) == OTHER}
    unknown |= {name for name in ops if classify_op((f"clipfast::{name}",)) == OTHER}
    assert unknown <= {*NOT_IN_A_STEP, "retrieval_ranks", "top_k"}, "give them a rule in bench/categories.py"


def event(cat, name, start, end, thread=1, **args):
    """Return an event of a profiler's trace, as the benchmark's breakdown reads it."""
    return {"cat": cat, "name": name, "tid": thread, "ts": start, "dur": end - start, "args": args}


def op(name, start, end, thread=1, sequence=None, forward_thread=None):
    """Return the event of a PyTorch op in a profiler's trace, or of a marked step."""
    kind = "user_annotation" if name.startswith("step: ") else "cpu_op"
    return event(kind, name, start, end, thread, **{"Sequence number": sequence, "Fwd thread id": forward_thread})


def launch(at, correlation, thread=1):
    """Return the event of a kernel launch by the host in a profiler's trace."""
    return event("cuda_runtime", "cudaLaunchKernel", at, at + 1.0, thread, correlation=correlation)


def kernel(name, start, end, correlation=None, cat="kernel"):
    """Return the event of a kernel on the GPU in a profiler's trace."""
    return event(cat, name, start, end, "stream 7", correlation=correlation)


def microseconds(found):
    """Return the microseconds of each category in a breakdown, after checking that they add up to the step."""
    assert sum(found.seconds.values()) == pytest.approx(found.step_s)
    return {category: 1e6 * seconds for category, seconds in found.seconds.items() if seconds}


def test_time_of_a_cpu_is_that_of_ops_without_the_ops_they_call():
    found = of_host(
        [
            op("aten::mm", 0, 50),  # during the start of the profiler, outside of all marked steps
            op(STEP_RANGE, 100, 200),
            op("aten::linear", 100, 140),
            op("aten::addmm", 105, 135),
            op("aten::copy_", 110, 115),
            op("aten::gelu", 140, 160),
            op("somebody::op", 160, 163),
            op("aten::mm", 100, 200, thread=2),  # on another thread than the step
        ]
    )
    assert microseconds(found) == pytest.approx({GEMM: 25, COPIES: 5, NORM: 20, OTHER: 3, HOST: 37 + 10})
    assert found.unknown == (("somebody::op", pytest.approx(3e-6)),)
    assert found.step_s == found.traced_s == pytest.approx(100e-6)


def test_a_backward_op_belongs_where_its_forward_does():
    events = [
        op(STEP_RANGE, 0, 100),
        op("aten::linear", 0, 10, sequence=4),
        op("aten::addmm", 1, 9, sequence=5),
        op("aten::argmax", 10, 11, sequence=6),  # makes no node of the graph, so the next op has its sequence number
        op(LOSS_RANGE, 20, 40),
        op("aten::mm", 20, 40, sequence=6),
        op("autograd::engine::evaluate_function: MmBackward0", 50, 70, sequence=6, forward_thread=1),
        op("aten::mm", 50, 70),
        op("autograd::engine::evaluate_function: AddmmBackward0", 70, 90, sequence=5, forward_thread=1),
        op("aten::mm", 70, 90),
    ]
    expected = {GEMM: 8 + 20, LOSS: 20 + 20, COPIES: 1, HOST: 2 + 9 + 10 + 10}
    assert microseconds(of_host(events)) == pytest.approx(expected)


def steps_of_a_device():
    """Return a trace of two steps on a GPU for the breakdown; the host runs them on thread 1, backward on thread 2."""
    events = [kernel("nvjet_warm_up", 0, 900)]
    for base, correlation in ((1000, 10), (2000, 20)):
        events += [
            op(STEP_RANGE, base, base + 500),
            op("aten::addmm", base, base + 10), launch(base + 2, correlation),
            op(LOSS_RANGE, base + 20, base + 40),
            op("aten::mm", base + 21, base + 39, sequence=correlation), launch(base + 30, correlation + 1),
            op("autograd::engine::evaluate_function: MmBackward0", base + 50, base + 60, thread=2,
               sequence=correlation, forward_thread=1),
            launch(base + 55, correlation + 2, thread=2),
            kernel("nvjet_a", base + 100, base + 200, correlation),
            kernel("nvjet_b", base + 150, base + 250, correlation + 1),  # its first half overlaps with nvjet_a
            kernel("nvjet_c", base + 300, base + 330, correlation + 2),
            kernel("mystery", base + 330, base + 334),
            kernel("Memset (Device)", base + 340, base + 346, cat="gpu_memset"),
        ]  # fmt: skip
    return events


def test_time_of_a_device_counts_no_moment_twice_and_gaps_are_the_rest():
    found = of_device(steps_of_a_device(), seconds=400e-6)
    assert microseconds(found) == pytest.approx({GEMM: 100, LOSS: 50 + 30, OTHER: 4, COPIES: 6, HOST: 400 - 190})
    assert found.unknown == (("mystery", pytest.approx(4e-6)),)
    assert (found.step_s, found.traced_s) == (400e-6, pytest.approx(500e-6))
    # If the kernels took longer under the profiler than a step without it, no time is left for gaps between kernels.
    slower = of_device(steps_of_a_device(), seconds=100e-6)
    assert HOST not in microseconds(slower)
    assert slower.step_s == pytest.approx(190e-6)


def test_a_profiler_that_sees_nothing_says_so():
    with pytest.raises(RuntimeError, match="saw no work of the device"):
        of_device([op(STEP_RANGE, 0, 10), kernel("nvjet", 20, 30)], seconds=1.0)
    with pytest.raises(RuntimeError, match="no range"):
        of_host([op("aten::mm", 0, 10)])


def test_patches_are_input_where_they_are_the_only_convolution():
    seconds = {**dict.fromkeys(CATEGORIES, 0.0), GEMM: 3.0, CONVOLUTION: 1.0}
    found = Breakdown(4.0, 5.0, seconds).with_convolutions_as_input()
    assert found.step_s == sum(found.seconds.values()) == 4.0
    assert (found.seconds[INPUT], found.seconds[CONVOLUTION]) == (1.0, 0.0)


@pytest.mark.parametrize("name", [OURS, "OpenCLIP"])
def test_a_step_on_a_cpu_is_told_apart(name):
    built = build("step", {"model": "ViT-T-8-32", "batch": 16}, "fp32", CPU)
    if name == "OpenCLIP":
        pytest.importorskip("open_clip")
    step, inputs = next(c for c in built.candidates if c.name == name).make(), built.inputs()
    step(**inputs)
    found = step.breakdown(**inputs, seconds=0.01)
    assert sum(found.seconds.values()) == pytest.approx(found.step_s)
    assert found.step_s == pytest.approx(found.traced_s)
    assert {category for category in CATEGORIES if not found.seconds[category]} == {CONVOLUTION, OTHER, DATA}
    assert found.unknown == ()  # a rule gives each op of a training step a category


def test_a_breakdown_is_written_and_printed():
    seconds = {**dict.fromkeys(CATEGORIES, 0.0), GEMM: 1.5, OTHER: 0.25, HOST: 0.25}
    found = Breakdown(2.0, 2.5, seconds, (("mystery_kernel", 0.25),))
    breakdowns = {OURS: found, f"{OURS} compiled": "RuntimeError: no CUPTI"}
    built = smallest("step")
    timings = [Timing(candidate, samples=[2.0] * 3) for candidate in built.candidates[:2]]
    roofs = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": built.model_flops}
    run = results.new_run(CPU, {"fp32": roofs})
    run["cases"] = [results.case_result(built, timings, TELEMETRY, {}, roofs, breakdowns)]
    run = json.loads(json.dumps(run, allow_nan=False))
    validate(run)
    ours, compiled = run["cases"][0]["candidates"]
    assert ours["breakdown"]["seconds"] == seconds
    assert ours["mfu"] == {"measured": 0.5, "data_sheet": None}
    assert compiled["breakdown_refused"] == "RuntimeError: no CUPTI"
    table = tables.case_table(run["cases"][0])
    for expected in ("50.0%", "75.0%", "12.5%", "mystery_kernel 12.50%", "clipfast compiled: RuntimeError: no CUPTI"):
        assert expected in table
    del ours["breakdown"]["seconds"][GEMM]  # the schema requires every category
    with pytest.raises(Exception, match="'GEMM' is a required property"):
        validate(run)


def test_a_failed_trace_refuses_no_timing(monkeypatch, run_session):
    class Step:
        def __call__(self, x):
            return 2 * x

        def breakdown(self, x, seconds):
            """Fail as a profiler does that may not trace the benchmark."""
            raise RuntimeError("CUPTI is not allowed here\nsecond line")

    (found,) = run_session(case((Candidate(OURS, Step),)))["cases"]
    assert found["candidates"][0]["breakdown_refused"] == "RuntimeError: CUPTI is not allowed here"
    assert found["candidates"][0]["samples_s"]


def test_a_long_step_is_traced_once_and_float32_stays_exact(monkeypatch):
    monkeypatch.setattr(breakdown, "of_host", lambda events: None)
    for seconds, times in ((0.1, 1 + breakdown.STEPS), (15.0, 2)):
        seen = []
        breakdown.trace(lambda seen=seen: seen.append(torch.backends.cudnn.allow_tf32), CPU, seconds)
        assert seen == [False] * times
