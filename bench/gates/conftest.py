"""Hooks of the gates: pytest-benchmark stores GPU and versions together with its timings, which depend on them."""

from typing import Any

import pytest
import torch

from clipfast.bench import machine


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to start the gates without pytest-benchmark, the plugin that measures the time.

    Raises:
        pytest.UsageError: the plugin is not installed, or it is switched off.
    """
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the gates need pytest-benchmark: run pip install -e '.[bench]'")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    """Add our description of the machine to the gates' record of pytest-benchmark."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["clipfast"] = {"machine": machine.describe(device), "versions": machine.versions()}
