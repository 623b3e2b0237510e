"""Patched models under DistributedDataParallel and FSDP2, on one rank, which suffices to test hooks and checks."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import clipfast

from . import hf_models, shrunk, test_hf
from .pairs import is_hf, pair


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    """Make a process group of one process, in which patched models train."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps(model: nn.Module, args: object) -> list[float]:
    """Return the losses of three training steps; with DDP, step 2 fails if a parameter had no gradient in step 1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        if isinstance(args, dict):
            loss = model(**args, return_loss=True).loss
        else:
            loss = sum(x.square().mean() for x in shrunk.outputs(model, *args))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP"])
def test_data_parallel(group, name, packed):
    model, patched = pair(name)
    args = shrunk.inputs(model)
    wrapped = nn.parallel.DistributedDataParallel(patched)
    torch.testing.assert_close(steps(wrapped, args), steps(model, args), rtol=1e-9, atol=0)
    assert packed == ([] if "siglip" in name.lower() else 3 * [True])
    assert clipfast.report_kernels(wrapped) == clipfast.report_kernels(patched)
    clipfast.revert_model(wrapped)
    assert "nothing of this model runs on clipfast" in clipfast.report_kernels(patched)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "clip", "siglip"])
def test_fully_sharded(group, name, packed):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, patched = pair(name)
    args = hf_models.inputs(model, "end") if is_hf(model) else shrunk.inputs(model)
    mesh = init_device_mesh("cpu", (1,))
    scalars = {parameter for parameter in patched.parameters() if parameter.ndim == 0}  # FSDP2 cannot shard scalars
    for module in list(patched.modules()):
        if type(module).__name__.endswith(("ResidualAttentionBlock", "Block", "EncoderLayer")):
            fully_shard(module, mesh=mesh)
    fully_shard(patched, mesh=mesh, ignored_params=scalars)
    torch.testing.assert_close(steps(patched, args), steps(model, args), rtol=1e-9, atol=0)
    assert packed == ([] if "siglip" in name.lower() else 3 * [True])
    if is_hf(model):
        assert "text_model: its last block has a hook" in clipfast.report_kernels(patched)
        assert test_hf.called(patched, args) == (4, 0)
