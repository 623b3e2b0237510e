"""FlexAttention's kernels, made from the templates in the installed PyTorch.

TorchInductor fills its templates when a model is compiled on a GPU. Here they are filled in the same way, for a call
without ``score_mod``, and with the causal mask or none. The tiles are those that PyTorch takes on an H100 for
dimensions 64 and 128 without ``max_autotune``.
"""

import functools
import importlib.util
import math
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import torch

_IMPORTS = "import triton\nimport triton.language as tl\n\nINDEX_DTYPE: tl.constexpr = tl.int32\n\n"
_EVERYTHING = 1 << 30  # FlexAttention's block size without a block mask
_BLOCK = 128  # FlexAttention's block size with a block mask
Mask = Mapping[str, torch.Tensor] | None


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: Mask = None) -> None:
    """Launch the forward kernel for tensors [batch, heads, length, dim] in any strides."""
    block_m, stages = 128, 3
    block_n, warps = (128, 4) if query.shape[-1] == 64 else (64, 8)
    tensors = _inputs(query, key, value, mask)
    out = torch.empty_like(query)
    options = _options(query, key, mask) | {"BLOCK_M": block_m, "BLOCK_N": block_n, "OUTPUT_LOGSUMEXP": True,
                                      "OUTPUT_MAX": False}  # fmt: skip
    names = ("Q", "K", "V", "LSE", "MAX", "KV_NUM_BLKS", "KV_IDX", "FULL_KV_NUM_BLKS", "FULL_KV_IDX")
    kernel = _kernel("flex_attention", ("flex_attention", "utilities", "common"), names, tensors, out, options)
    batch, heads, length, _ = query.shape
    grid = (-(-length // block_m), batch, heads)
    kernel[grid](*(tensors[name] for name in names), out, num_warps=warps, num_stages=stages)


def backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: Mask = None) -> None:
    """Launch the kernels of the backward pass; PyTorch's own ops compute the row sums of output times gradient."""
    blocks, stages, warps = {"BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64}, 3, 8
    tensors = _inputs(query, key, value, mask)
    tensors |= {"DO": torch.empty_like(query), "DQ": torch.empty_like(query), "DV": torch.empty_like(value)}
    options = _options(query, key, mask) | blocks | {"WRITE_DQ": True}
    names = (
        "Q", "K", "V", "LSE", "DELTA", "DO", "DQ", "DV", "KV_NUM_BLKS", "KV_IDX", "Q_NUM_BLKS", "Q_IDX",
        "FULL_KV_NUM_BLKS", "FULL_KV_IDX", "FULL_Q_NUM_BLKS", "FULL_Q_IDX",
    )  # fmt: skip
    out = torch.empty_like(key)
    kernel = _kernel("flex_backward", ("flex_backwards", "utilities"), names, tensors, out, options)
    batch, heads, length, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grid = (-(-length // 128) * (heads // kv_heads) + -(-keys // 128), batch, kv_heads)
    kernel[grid](*(tensors[name] for name in names), out, num_warps=warps, num_stages=stages)


def causal_mask(length: int) -> dict[str, torch.Tensor]:
    """Return the causal mask: blocks of 128 tokens below the diagonal are seen as a whole, and those on it in part."""
    number = torch.arange(length // _BLOCK, dtype=torch.int32)
    one, columns = torch.ones_like(number)[None, None], number.expand(1, 1, len(number), -1)
    below, above = number[None, None], number.flip(0)[None, None]
    mask = {"KV_NUM_BLKS": one, "KV_IDX": number[None, None, :, None], "Q_NUM_BLKS": one}
    mask |= {"Q_IDX": number[None, None, :, None], "FULL_KV_NUM_BLKS": below, "FULL_KV_IDX": columns.contiguous()}
    later = (columns + number[:, None] + 1) % len(number)
    return mask | {"FULL_Q_NUM_BLKS": above, "FULL_Q_IDX": later.contiguous()}


def _inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Mask) -> dict[str, torch.Tensor]:
    """Return the tensors of FlexAttention's templates by name."""
    batch, heads, length, _ = query.shape
    rows = torch.empty(batch, heads, length)
    none = torch.empty(0, dtype=torch.int32)
    tensors = {"Q": query, "K": key, "V": value, "LSE": rows, "DELTA": torch.empty_like(rows), "MAX": none}
    tensors |= dict.fromkeys(("FULL_KV_NUM_BLKS", "FULL_KV_IDX", "FULL_Q_NUM_BLKS", "FULL_Q_IDX"), none)
    if mask is not None:
        return tensors | dict(mask)
    one, first = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    return tensors | {"KV_NUM_BLKS": one, "KV_IDX": first, "Q_NUM_BLKS": one, "Q_IDX": first}


def _options(query: torch.Tensor, key: torch.Tensor, mask: Mask) -> dict[str, Any]:
    """Return the constants of FlexAttention's templates for these tensors."""
    dim, block = query.shape[-1], _EVERYTHING if mask is None else _BLOCK
    return {
        "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False,
        "IS_DIVISIBLE": query.shape[-2] % 128 == key.shape[-2] % 128 == 0,
        "FLOAT32_PRECISION": "'ieee'", "SM_SCALE": 1 / math.sqrt(dim),
        "GQA_SHARED_HEADS": query.shape[1] // key.shape[1],
        "HAS_FULL_BLOCKS": mask is not None,
        "QK_HEAD_DIM": dim, "QK_HEAD_DIM_ROUNDED": dim, "V_HEAD_DIM": dim,
        "V_HEAD_DIM_ROUNDED": dim, "SAFE_HEAD_DIM": True, "USE_TMA": False, "SPARSE_Q_BLOCK_SIZE": block,
        "SPARSE_KV_BLOCK_SIZE": block,
    }  # fmt: skip


def _kernel(
    name: str, templates: Sequence[str], names: Sequence[str], tensors: dict[str, torch.Tensor], out: torch.Tensor,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """Return the FlexAttention kernel that a template gives for these tensors; its last argument is ``out``."""
    folder = Path(torch.__file__).parent / "_inductor/kernel/flex/templates"
    text = "\n".join((folder / f"{one}.py.jinja").read_text() for one in templates)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["indent_except_first"] = lambda lines, levels: textwrap.indent(lines, "    " * levels).lstrip()

    def size(tensor: str, axis: int) -> str:
        """Return the code for a size in FlexAttention's template."""
        return str(tensors[tensor].shape[axis])

    def stride(tensor: str, axis: int | None = None) -> str:
        """Return the code for a stride in FlexAttention's template."""
        return str(tuple(tensors[tensor].stride()) if axis is None else tensors[tensor].stride(axis))

    def store_output(indices: Sequence[str], value: str, mask: str, indent_width: int = 4, **_: Any) -> str:
        """Return the code of FlexAttention's template that stores a tile of the output."""
        steps = " + ".join(f"{index} * {step}" for index, step in zip(indices, out.stride(), strict=True))
        shape = f"{value}.shape"
        lines = f"tl.store(out_ptr0 + tl.broadcast_to({steps}, {shape}), {value}, {mask})"
        return textwrap.indent(lines, " " * indent_width).lstrip()

    def modification(subgraph_number: int, output_name: str | None, score: str = "", **more: Any) -> str:  # noqa: ARG001
        """Return the code of FlexAttention's template that changes scores (here, none does) or masks them."""
        if output_name is None:
            return "pass"
        if output_name == "mask_mod_output":
            is_causal = options["HAS_FULL_BLOCKS"]
            return f"{output_name} = " + (f"{more['n']} <= {more['m']}" if is_causal else "tl.full([1], True, tl.int1)")
        return f"{output_name} = {more['grad_score_mod'] if output_name == 'grad_scores' else score}"

    defines = "\n".join(f"{option} : tl.constexpr = {value}" for option, value in options.items())
    arguments = ", ".join([*(f"arg_{one}" for one in names), "out_ptr0"])

    def def_kernel(*argument_names: str) -> str:
        """Return the head of the kernel that FlexAttention's template generates."""
        renames = "\n".join(f"    {one} = arg_{one}" for one in argument_names)
        inner = textwrap.indent(defines, "    ")
        return f"@triton.jit\ndef {name}({arguments}):\n{inner}\n{renames}\n"

    source = environment.from_string(text).render(
        def_kernel=def_kernel, size=size, stride=stride, store_output=store_output, modification=modification,
        gen_argdefs=lambda: arguments, gen_defines=lambda: defines, **options,
    )  # fmt: skip
    return getattr(_module(_IMPORTS + source), name)


@functools.cache
def _module(source: str) -> ModuleType:
    """Import generated code from a file, where Triton looks for the text of its kernels."""
    folder = tempfile.mkdtemp(prefix="flex_")
    path = Path(folder) / f"generated_{abs(hash(source))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
