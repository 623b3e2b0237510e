"""The packages that one may carry to a GPU machine without a network, for ``bench.gpu --wheels``."""

import importlib.util

# Packages that may be copied to the GPU machine, by module: the names on PyPI of the package and of others that it
# needs, and the consequence if they are missing.
WHEELS = {
    "pytest": ("pytest", "no tests at all"),
    "xdist": ("pytest-xdist execnet", "tests compile in one process"),
    "hypothesis": ("hypothesis sortedcontainers", "no tests of random sizes"),
    "regex": ("regex", "no tokenizer"),
    "ftfy": ("ftfy wcwidth", "no text is mended before it is tokenized"),
    "PIL": ("pillow", "no images from files"),
    "safetensors": ("safetensors", "no checkpoints in this format"),
    "open_clip": ("open-clip-torch==3.3.0 torchvision timm huggingface-hub tqdm", "OpenCLIP is not compared"),
    "pynvml": ("nvidia-ml-py", "no clocks and temperatures beside the timings"),
    "memeff": ("memeff", "a loss is not compared"),
    "cut_cross_entropy": ("cut-cross-entropy", "a loss is not compared"),
    "liger_kernel": ("liger-kernel", "losses and norms are not compared"),
    "siglip_kernel": ("siglip-kernel", "a loss is not compared"),
    "flash_attn": ("flash-attn", "attention is not compared; its wheel is built for one PyTorch only"),
}


def wheels() -> str:
    """Return a table of :data:`WHEELS` for the GPU run: installed packages, and commands to get the missing ones."""
    lines, missing = [], []
    for module, (packages, loss) in WHEELS.items():
        is_here = importlib.util.find_spec(module) is not None
        missing += [] if is_here else packages.split()
        lines.append(f"{'here' if is_here else 'not here':9} {module:18} without it: {loss}")
    if not missing:
        return "\n".join([*lines, "Nothing has to be carried."])
    return "\n".join([
        *lines, "On a machine with a network and the same Python (leave out packages without a wheel):",
        f"  python3 -m pip download --no-deps --only-binary=:all: -d .whl {' '.join(missing)}",
        "On the GPU machine, in the checkout, with the folder .whl in it:",
        "  python3 -m pip install --no-index --no-deps --target build/wheels .whl/*.whl",
        "  export PYTHONPATH=$PWD/build/wheels",
    ])  # fmt: skip
