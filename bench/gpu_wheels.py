"""The packages that one may carry as wheels to a GPU machine without a network. This imports only Python's own."""

import importlib.util

# Module, name on PyPI, and what is measured or checked less without it.
OPTIONAL = (
    ("pytest", "pytest", "no tests at all"),
    ("xdist", "pytest-xdist", "tests compile in one process"),
    ("execnet", "execnet", "pytest-xdist needs it"),
    ("hypothesis", "hypothesis", "no tests of random sizes"),
    ("sortedcontainers", "sortedcontainers", "hypothesis needs it"),
    ("regex", "regex", "no tokenizer, and none of its tests"),
    ("ftfy", "ftfy", "no text is mended before it is tokenized"),
    ("wcwidth", "wcwidth", "ftfy needs it"),
    ("PIL", "pillow", "no images from files"),
    ("safetensors", "safetensors", "no checkpoints in this format"),
    ("torchvision", "torchvision", "OpenCLIP needs it"),
    ("timm", "timm", "OpenCLIP needs it"),
    ("huggingface_hub", "huggingface-hub", "OpenCLIP needs it"),
    ("tqdm", "tqdm", "OpenCLIP needs it"),
    ("open_clip", "open-clip-torch==3.3.0", "the model and the losses that ours are compared with"),
    ("pynvml", "nvidia-ml-py", "no clocks and temperatures beside the timings"),
    ("memeff", "memeff", "a loss to compare with"),
    ("inf_cl", "inf-cl", "a loss to compare with"),
    ("cut_cross_entropy", "cut-cross-entropy", "a loss to compare with"),
    ("liger_kernel", "liger-kernel", "losses and norms to compare with"),
    ("siglip_kernel", "siglip-kernel", "a loss to compare with"),
    ("flash_attn", "flash-attn", "attention to compare with; its wheel is built for one PyTorch only"),
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def wheels() -> str:
    """Return a table of these packages, whether this Python has them, and the commands to fetch and to use the rest."""
    lines, missing = [f"{'package':24} {'here':5} without it"], []
    for module, package, loss in OPTIONAL:
        is_here = importlib.util.find_spec(module) is not None
        missing += [] if is_here else [package]
        lines.append(f"{package:24} {'yes' if is_here else 'no':5} {loss}")
    if not missing:
        return "\n".join([*lines, "", "Nothing has to be carried."])
    platforms = " ".join(f"--platform {platform}_x86_64" for platform in PLATFORMS)
    fetch = f"python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 {platforms} -d .whl"
    target = "build/wheels"
    install = f"python3 -m pip install --no-index --no-deps --target {target} .whl/*.whl"
    return "\n".join([
        *lines, "", "Where there is a network, for Python 3.12 there (leave out what has no wheel):",
        f"  {fetch} {' '.join(missing)}",
        "On the GPU machine, in the checkout, with the folder .whl in it:",
        f"  {install} && export PYTHONPATH=$PWD/{target}",
    ])  # fmt: skip
