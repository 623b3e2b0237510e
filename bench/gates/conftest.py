"""What pytest-benchmark stores beside its figures: the card and the versions that they depend on."""

from typing import Any

import torch

from clipfast.bench import machine


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    """Add our description of the machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["clipfast"] = {"machine": machine.describe(device), "versions": machine.versions()}
