"""Test the plans of launches, which an op makes once for each layout of its inputs: each fits the call and the tables
of configurations.
"""

import dataclasses
import threading

import pytest
import torch

from clipfast.kernels import configs, layer_norm
from clipfast.kernels.launch import record_launches

ARCH = 90


def norm(rows, width):
    """Call the layer norm op, whose launches are planned."""
    return layer_norm(torch.empty(rows, width, dtype=torch.bfloat16), torch.empty(width), torch.empty(width))


def test_a_table_that_changes_is_seen():
    config = configs.row_config("layer_norm_fwd", ARCH, torch.bfloat16, 64)
    key = configs.config_key("layer_norm_fwd", torch.bfloat16, width=64)
    other = dataclasses.replace(config, num_warps=2 * config.num_warps)
    with record_launches(ARCH) as launches:
        norm(5, 64)
        with configs.override(key, other):
            norm(5, 64)
        norm(5, 64)
    found = [launch.options["num_warps"] for launch in launches]
    assert found == [config.num_warps, other.num_warps, config.num_warps]


def test_launches_that_are_recorded_for_another_gpu_have_its_sizes():
    programs = []
    for multiprocessors in (2, 132, 2):
        with record_launches(ARCH, multiprocessors) as launches:
            norm(100_000, 64)
        programs.append(launches[0].grid[0])
    assert programs[0] == programs[2] < programs[1]


def test_plans_of_many_threads_are_not_mixed():
    errors = []

    def call(number):
        """Launch layer norms of many shapes from one thread, each by its own plan."""
        rows, width = 1 + number % 7, 8 * (1 + number % 11)
        try:
            norm(rows, width)
        except Exception as error:
            errors.append(error)

    with record_launches(ARCH) as launches:
        threads = [threading.Thread(target=call, args=(number,)) for number in range(1000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(launches) == 1000
    for launch in launches:
        rows, width = launch.args["x_ptr"].shape
        assert (launch.args["M"], launch.constexprs["N"]) == (rows, width)


def test_equal_numbers_of_different_types_are_different_plans():
    seen = []
    decide = configs.planned(lambda number: seen.append(number) or type(number))
    assert [decide(1), decide(1.0), decide(1)] == [int, float, int]
    assert len(seen) == 2


@pytest.mark.parametrize("eps", [0, 0.0])
def test_eps_is_a_float_in_every_plan(eps):
    with record_launches(ARCH) as launches:
        layer_norm(torch.empty(2, 8), torch.empty(8), torch.empty(8), eps)
    assert type(launches[0].args["eps"]) is float
