"""What the machine is, what its roofs are, and whether each op runs there at all: the first step of ``make gpu``."""

import json
import sys
from pathlib import Path

import torch

from . import machine
from .case import DTYPES


def main() -> None:
    """Write the file named on the command line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("bf16", "fp32") if device.type == "cuda" else ("fp32",)
    found = {
        "git": machine.commit(),
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "telemetry": machine.Telemetry(device).sample(),
        "roofs": {dtype: machine.measure_roofs(device, DTYPES[dtype]) for dtype in dtypes},
    }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["machine"]))


if __name__ == "__main__":
    main()
