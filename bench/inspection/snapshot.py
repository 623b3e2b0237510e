"""The committed snapshot of what the compiler made of every shipped kernel: ``tests/kernels/resources.json``.

A kernel is a line, so that a change is a difference to be read. The lists hold the fields that stand at the top of the
file. An architecture for which another one stands is left out where the two are alike.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .offline import Resources
from .waves import Waves

RESOURCES = tuple(field.name for field in dataclasses.fields(Resources))
WAVES = tuple(field.name for field in dataclasses.fields(Waves))
# The compiler makes the same of both (a test asserts it), so that their kernels differ in nothing but their name.
STANDS_FOR = {"sm_89": "sm_86"}

# Fields of a kernel by name; of the kernels of a case; of the cases of an architecture.
Fields = dict[str, Any]
Cases = dict[str, dict[str, Fields]]


@dataclasses.dataclass
class Snapshot:
    """What was compiled, by Triton version ("3.9"): resources by architecture ("sm_90"), and waves on an H100."""

    resources: dict[str, dict[str, Cases]] = dataclasses.field(default_factory=dict)
    waves: dict[str, Cases] = dataclasses.field(default_factory=dict)


def as_fields(found: Resources | Waves) -> Fields:
    """Return a record as the snapshot holds it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(found).items()}


def loads(text: str) -> Snapshot:
    """Read a snapshot.

    Raises:
        ValueError: the text is no snapshot.
    """
    record = json.loads(text)
    if record == {}:
        return Snapshot()
    if not isinstance(record, dict) or not isinstance(record.get("fields"), dict):
        raise ValueError("a snapshot has the fields of its lists at the top, as tests/kernels/resources.json does")
    fields = record.pop("fields")
    snapshot = Snapshot()
    for version, parts in record.items():
        snapshot.waves[version] = _named(parts.pop("waves", {}), fields["waves"])
        archs = {arch: _named(cases, fields["resources"]) for arch, cases in parts.items()}
        for arch, other in STANDS_FOR.items():
            if arch in archs:
                archs[arch] = archs.get(other, {}) | archs[arch]
        snapshot.resources[version] = archs
    return snapshot


def dumps(snapshot: Snapshot) -> str:
    """Return the text of a snapshot."""
    parts = [f' "fields": {json.dumps({"resources": RESOURCES, "waves": WAVES})}']
    for version in sorted(snapshot.resources):
        archs = dict(snapshot.resources[version])
        for arch, other in STANDS_FOR.items():
            alike = archs.get(other, {})
            if arch in archs:
                archs[arch] = {case: found for case, found in archs[arch].items() if found != alike.get(case)}
        blocks = [_block(arch, archs[arch]) for arch in sorted(archs, key=lambda arch: int(arch[3:]))]
        blocks.append(_block("waves", snapshot.waves.get(version, {})))
        parts.append(f' "{version}": {{\n' + ",\n".join(blocks) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _named(cases: Mapping[str, Mapping[str, list[Any]]], fields: list[str]) -> Cases:
    return {
        case: {kernel: dict(zip(fields, values, strict=True)) for kernel, values in kernels.items()}
        for case, kernels in cases.items()
    }


def _block(name: str, cases: Cases) -> str:
    lines = []
    for case in sorted(cases):
        kernels = [
            f"    {json.dumps(kernel)}: {json.dumps(list(found.values()))}" for kernel, found in cases[case].items()
        ]
        lines.append(f"   {json.dumps(case)}: {{\n" + ",\n".join(kernels) + "\n   }")
    return f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }" if lines else f'  "{name}": {{}}'
