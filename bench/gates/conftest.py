"""What pytest-benchmark stores beside its figures: the card and the versions that they depend on."""

from typing import Any

import pytest
import torch

from clipfast.bench import machine


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to start without the plugin that times.

    Raises:
        pytest.UsageError: it is not installed, or it is switched off.
    """
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the gates need pytest-benchmark: run pip install -e '.[bench]'")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    """Add our description of the machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["clipfast"] = {"machine": machine.describe(device), "versions": machine.versions()}
