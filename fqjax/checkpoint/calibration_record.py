"""Findings of calibration, kept beside a quantized model for those who want to see why it is as it is."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fqjax.checkpoint.checksums import verify_files
from fqjax.checkpoint.manifest import read_manifest_if_any
from fqjax.checkpoint.target import write_tensors
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import exists

CALIBRATION_FILE = "calibration.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationRecord:
    """Findings of calibration on the quantized layers, by dotted path.

    Attributes:
      activations: largest magnitude of every input channel, float32 (K,).
      costs: by the bits of its weight, how much the model's output suffers from quantizing that layer alone, weights rounded
        to the nearest (:func:`fqjax.drivers.trial.sensitivities`); empty where the scheme left nothing to choose.
    """

    activations: Mapping[str, np.ndarray]
    costs: Mapping[str, Mapping[int, float]]

    def silent_channels(self, name: str) -> int:
        """Number of a layer's input channels that were zero in all of calibration."""
        return int(np.sum(self.activations[name] == 0))

    def trade_off(self, macs: Mapping[str, int]) -> list[tuple[float, float]]:
        """Cost of more INT4, layer by layer.

        Args:
          macs: multiply-accumulates of each layer.

        Returns:
          (share of the multiply-accumulates in INT4, sum of the layers' costs): all layers in INT8, then with one more in
          INT4 each time, that which adds least for its multiply-accumulates, those without any last.  Layers that can only
          be in INT8 stay in it.  Empty if no layer had a choice.
        """
        if any(8 not in cost for cost in self.costs.values()):
            return []
        added = {name: cost[4] - cost[8] for name, cost in self.costs.items() if 4 in cost}
        low, total = 0, sum(cost[8] for cost in self.costs.values())
        points = [(0.0, total)]
        whole = sum(macs[name] for name in self.costs)
        for name in sorted(added, key=lambda name: added[name] / macs[name] if macs[name] else math.inf):
            low, total = low + macs[name], total + added[name]
            points.append((low / whole if whole else 0.0, total))
        return points if added else []

    def cost(self, bits: Mapping[str, int]) -> float:
        """The sum of the layers' costs for the bits that they have."""
        return sum(cost[bits[name]] for name, cost in self.costs.items())

    def write(self, directory: Path) -> None:
        """Writes :data:`CALIBRATION_FILE`."""
        arrays = {name: np.asarray(a, np.float32) for name, a in self.activations.items()}
        write_tensors(directory / CALIBRATION_FILE, arrays, {"costs": json.dumps(self.costs)})


def read_calibration_record(
    directory: Path, layers: Mapping[str, tuple[int, int]] | None = None
) -> CalibrationRecord | None:
    """The record that :meth:`CalibrationRecord.write` wrote; None if there is no such file.

    Args:
      directory: the checkpoint's.
      layers: input channels and bits of its quantized layers; None to take what the file holds.

    Raises:
      InputError: if the file is damaged, or about other layers.
    """
    path = directory / CALIBRATION_FILE
    if not exists(path):
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            costs = json.loads((file.metadata() or {}).get("costs", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        found = CalibrationRecord(
            arrays, {name: {int(b): float(c) for b, c in cost.items()} for name, cost in costs.items()}
        )
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); the rest of the checkpoint does not need it") from None
    verify_files(read_manifest_if_any(directory), directory, CALIBRATION_FILE)
    if layers is None:
        return found
    for name, array in arrays.items():
        if name not in layers or array.shape != (layers[name][0],) or array.dtype != np.float32:
            raise InputError(f"{path}: {name!r} is not the activations of one of the model's quantized layers")
    for name, cost in found.costs.items():
        if name not in layers or layers[name][1] not in cost:
            raise InputError(f"{path}: the costs of {name!r} are not those of one of the model's quantized layers")
    return found
