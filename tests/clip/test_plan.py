"""Plans: steps on fake tensors against real ones, what a plan adds up to, and what the command says."""

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F

import clipfast
from clipfast.cli import main
from clipfast.kernels.contrastive.distributed import choose_mode
from clipfast.kernels.hardware import CARDS, Cluster
from clipfast.ledger import Event, Ledger
from clipfast.plan import predict as predicting
from clipfast.plan.predict import PATHS, check, figures, largest_pairs, predict, seconds
from clipfast.plan.step import OPENCLIP, Problem, run_step

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(INTERPRET, reason="runs the path of the CPU, and records kernels")
H100 = CARDS["h100"]
# Features that are widened on a CPU, rows that are not aligned on a GPU, two ranks and one, a whole step.
PROBLEMS = [
    Problem(768, 3, torch.float32, embed_dim=256),
    Problem(510, 3, torch.bfloat16, embed_dim=300),
    Problem(512, 2, torch.float16, embed_dim=256),
    Problem(1100, 1, torch.bfloat16, embed_dim=256),  # fewer of one rank go another way on a CPU
    Problem(8, 2, torch.float32, "ViT-T-8-32"),
]


@pytest.mark.skipif(ON_GPU, reason="compares runs on a CPU")
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.gpus}-{p.pairs}-{p.model or p.embed_dim}-{p.dtype}")
def test_fake_step_takes_what_a_real_one_takes(problem):
    rows = check(problem)
    assert {(row["path"], row["mode"]) for row in rows} == {(path, mode) for path in PATHS for mode in problem.modes}
    assert not [row for row in rows if not row["agrees"]]
    flops = {(row["path"], row["mode"]): row["measured"] for row in rows if row["what"] == "FLOPs"}
    if problem.model is None:  # the products of PyTorch are those of the launched kernels
        assert all(flops["CPU path", mode] == flops["GPU path, kernels recorded", mode] > 0 for mode in problem.modes)


@pytest.mark.skipif(not ON_GPU, reason="measures the GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["default", "min"])
def test_memory_on_a_gpu(mode, dtype):
    major, _ = torch.cuda.get_device_capability()
    card = next(card for card in CARDS.values() if card.arch == 10 * major)
    image, text = (F.normalize(torch.randn(8192, 512, device="cuda"), dim=-1).to(dtype) for _ in range(2))
    for _ in range(2):  # the first call compiles
        sides = [side.detach().requires_grad_() for side in (image, text)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        clipfast.contrastive_loss(*sides, 14.3, memory=mode).backward()
        measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(run_step(Problem(8192, dtype=dtype), mode, card).peak["loss"], rel=0.03)


# The table in distributed.py for four ranks: FLOPs over b N D, and rows that are sent forward, sent backward and held.
# The first number of each pair is of rows in the dtype of the features, the second of rows in float32.
DOCUMENTED = {
    "gather": (8, (3, 0), (0, 3), (4, 4)),
    "ring": (8, (3, 0), (3, 4), (2, 5)),
    "scalars": (12, (6, 0), (0, 0), (10, 2)),
}


@pytest.mark.parametrize("mode", DOCUMENTED)
def test_loss_takes_what_its_docs_say(mode):
    b, width = 1024, 4096
    flops, *rows = DOCUMENTED[mode]
    for dtype in (torch.bfloat16, torch.float32):
        ledger = run_step(Problem(4 * b, 4, dtype, embed_dim=width), mode, H100)
        found = figures(ledger)
        forward, backward, held = (b * width * (dtype.itemsize * narrow + 4 * wide) for narrow, wide in rows)
        assert found["FLOPs"] == flops * b * 4 * b * width
        assert found["sent forward"] == forward + 4 * 3 * b * (5 if mode == "scalars" else 7)
        assert found["sent backward"] == backward + 2 * 3 * 4
    # in float32, where pairs are not widened; vectors, and what blocks hold for a while, come on top
    assert held <= ledger.peak["loss"] <= 1.05 * held


@pytest.mark.parametrize(("name", "gpus"), [("ViT-T-8-32", 1), ("RN50", 8)])
def test_step_of_a_model(name, gpus):
    ledger = run_step(Problem(2 * gpus, gpus, model=name), "gather" if gpus > 1 else "default", H100)
    model = clipfast.create_model(name, device="meta")
    sizes = [parameter.nbytes for parameter in model.parameters()]
    size = sum(sizes)
    assert ledger.peak["weights"] == size + sum(buffer.nbytes for buffer in model.buffers())
    assert ledger.peak["optimizer state"] == 2 * size + 4 * len(sizes)
    assert ledger.peak["inputs"] == 2 * (3 * model.visual.image_size**2 + 8 * model.context_length)
    # DDP keeps all gradients, and both of a norm's lie in one tensor, which lives as long as either of them; else the
    # peak comes before the last gradient
    least, most = (1, 1.0005) if gpus > 1 else (0.9, 1)
    assert least * size <= ledger.peak["gradients"] <= most * size
    reduced = [event.bytes for event in ledger.events if event.collective == "allreduce"]
    assert sum(reduced) == pytest.approx(2 * size * (gpus - 1) / gpus, abs=len(reduced))
    assert len(reduced) > size / (40 * 2**20) if gpus > 1 else not reduced  # buckets of about 25 MiB
    phases = list(dict.fromkeys(event.phase for event in ledger.events))
    assert phases == ["forward", "loss forward", "loss backward", "backward", "update"]
    on_cpu = run_step(Problem(2 * gpus, gpus, model=name), "gather" if gpus > 1 else "default", None)
    assert figures(ledger)["FLOPs"] == pytest.approx(figures(on_cpu)["FLOPs"], rel=0.03)


def test_open_clip():
    open_clip = pytest.importorskip("open_clip")
    b, width = 256, 64
    for gpus in (1, 4):
        found = figures(run_step(Problem(b * gpus, gpus, torch.float32, embed_dim=width), OPENCLIP, None))
        assert found["FLOPs"] == 12 * b * b * gpus * width
        assert found["sent forward"] == found["sent backward"] == 2 * (gpus - 1) * b * width * 4
    image, text = (F.normalize(torch.randn(b, width), dim=-1).requires_grad_() for _ in range(2))
    with Ledger() as real:
        open_clip.ClipLoss()(image, text, torch.tensor(14.3, requires_grad=True)).backward()
    fake = run_step(Problem(b, 1, torch.float32, embed_dim=width), OPENCLIP, None)
    assert figures(real)["memory"] == pytest.approx(figures(fake)["memory"], rel=0.05)


def test_clocks_hide_messages_behind_kernels():
    card = dataclasses.replace(H100, half_peak=1.0, half_reached=1.0, link_bytes_per_s=1.0)
    cluster, problem = Cluster(card, launch_s=0.5, latency_s=0.25), Problem(8, 4)
    kernel, message = Event("a", 1, frozenset({1}), flops=3), Event("a", 4, frozenset({2}), 0, "reduce", 1)
    reader = Event("b", 1, frozenset({2}), flops=1)
    # the message leaves at 3.5 and takes 4.25; the kernel after it ends at 6.5, what reads it starts at 7.75
    assert seconds([kernel, message, kernel, reader], problem, cluster) == {"a": 6.5, "b": 2.25}
    assert seconds([kernel, message, kernel, reader], problem, cluster, with_messages=False) == {"a": 6.5, "b": 1.0}
    # a host that is slower than the GPU, and a message that nothing waits for
    assert seconds([dataclasses.replace(kernel, flops=0)] * 4, problem, cluster)["a"] == pytest.approx(2.0)
    assert seconds([kernel, message], problem, cluster)["a"] == pytest.approx(3.5 + 4.25)


def test_between_nodes_a_ring_has_one_adapter():
    cluster = Cluster(dataclasses.replace(H100, network_bytes_per_s=20e9))
    rates = [cluster.bytes_per_s(gpus, is_ring=is_ring) for gpus in (8, 9) for is_ring in (False, True)]
    assert rates == [450e9, 450e9, 160e9, 20e9]


@pytest.mark.parametrize(("pairs", "gpus"), [(1024 * 9, 9), (8192, 4), (64, 1)])
def test_auto_is_what_the_loss_takes(pairs, gpus):
    expected = [choose_mode([pairs // gpus] * gpus, 512, torch.bfloat16)] if gpus > 1 else []
    assert [row["mode"] for row in predict(Problem(pairs, gpus), Cluster(H100)) if row["is_auto"]] == expected


def test_largest_batch_fits_and_a_larger_one_does_not():
    cluster = Cluster(dataclasses.replace(H100, memory_bytes=20e6))
    for mode in ("gather", OPENCLIP):
        most = largest_pairs(Problem(64, 2), mode, cluster)
        at = [run_step(Problem(int(pairs), 2), mode, H100).peak.total() <= 20e6 for pairs in (most, 1.02 * most)]
        assert at == [True, False]
    assert largest_pairs(Problem(64, 2), "gather", Cluster(dataclasses.replace(H100, memory_bytes=1e3))) == 0


def test_plan(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert main(["plan", "--pairs", "9216", "--gpus", "9", "--card", "b200", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    texts = ["gather", "ring", "scalars (auto)", "openclip", "never measured", "9 ranks of 1,024 pairs", "B200"]
    assert all(text in out for text in texts), out
    saved = json.loads(path.read_text())
    assert [saved["problem"][key] for key in ("pairs", "rows", "gpus", "dtype")] == [9216, 1024, 9, "bf16"]
    (scalars,) = [mode for mode in saved["modes"] if mode["is_auto"]]
    assert scalars["FLOPs"] == 12 * 1024 * 9216 * 512
    assert scalars["memory"] == sum(scalars["memory by category"].values())
    assert scalars["time"] == pytest.approx(sum(scalars["time by phase"].values()))
    assert scalars["sent forward"] + scalars["sent backward"] == scalars["sent by collective"]["allgather"]["bytes"]


@pytest.mark.parametrize("what", ["memory", "FLOPs", "sent forward", "sent backward", "messages", "kernels"])
def test_check_says_which_figure_is_wrong(capsys, monkeypatch, tmp_path, what):
    def measure(_, problem, is_fake=False):
        found = {("CPU path", mode, name): 1000 for mode in problem.modes for name in figures(Ledger())}
        return found | ({} if is_fake else {("CPU path", "min", what): 1050 if what == "memory" else 1001})

    monkeypatch.setattr(predicting, "_measure", measure)
    path = tmp_path / "check.json"
    assert main(["plan", "--check", "--gpus", "1", "--json", str(path)]) == 1
    assert re.findall(r"CPU path +(\w+) +(\w[\w ]*?)  +1,000 .*WRONG", capsys.readouterr().out) == [("min", what)]
    assert [row["what"] for row in json.loads(path.read_text())["check"] if not row["agrees"]] == [what]
