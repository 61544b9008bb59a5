"""A pass that was killed goes on: finished layers in a directory, each file complete or not there at all.

`layer-007.npz` holds the new weights of a layer and what was measured; `state-008.npy` the input of the
next one, which is all that a pass needs to continue with the same bits. A directory belongs to one model,
recipe and calibration: another one is refused.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel
from ridgeline.quant.formats import FORMATS, QuantFormat, group_format
from ridgeline.quant.weight import ActivationQuant, Weight

Report = dict[str, Any]


def model_fingerprint(model: LoadedModel) -> str:
    """Of the config and of every byte of the weights."""
    checksum = zlib.crc32(repr(model.config).encode())
    for name, weight in sorted(model.weights.items()):
        checksum = zlib.crc32(f"{name} {weight.format.name} {weight.shape}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(weight.data).reshape(-1).view(np.uint8).data, checksum)
    return f"{checksum:08x}"


class WorkDirectory:
    """The finished layers of one run."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        """Open or create. Raises ConfigError for a directory of another run."""
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        marker = path / "run.json"
        if marker.exists():
            found = json.loads(marker.read_text())
            if different := [key for key in identity if found.get(key) != identity[key]]:
                raise ConfigError(
                    f"{path} holds a run with another {', '.join(different)}; delete it or choose another "
                    "work directory"
                )
        else:
            if any(path.iterdir()):
                raise ConfigError(f"{path} is not empty and holds no run; choose another work directory")
            document = json.dumps(dict(identity), indent=1).encode()
            _write(marker, lambda file: file.write(document))

    def remembered(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, as plain data; computed once for all continuations of the run."""
        path = self._path / f"{name}.json"
        if not path.exists():
            document = json.dumps(compute(), indent=1).encode()
            _write(path, lambda file: file.write(document))
        return json.loads(path.read_text())

    def load(self) -> tuple[int, dict[str, Weight], list[Report], npt.NDArray[np.float32] | None]:
        """The next layer, the weights and reports of those before it, and its input; layer 0 has none."""
        states = sorted(self._path.glob("state-*.npy"))
        if not states:
            return 0, {}, [], None
        next_layer = int(states[-1].stem.partition("-")[2])
        weights: dict[str, Weight] = {}
        reports: list[Report] = []
        for index in range(next_layer):
            with np.load(self._layer(index)) as arrays:
                description = json.loads(str(arrays["description"]))
                reports += description["reports"]
                for entry in description["weights"]:
                    weights[entry["name"]] = _weight(entry, arrays)
        return next_layer, weights, reports, np.load(states[-1])

    def store(
        self,
        index: int,
        weights: Iterable[Weight],
        reports: list[Report],
        residual: Callable[[], npt.NDArray[np.float32]],
    ) -> None:
        """The layer `index` is finished. The state, written last, is what makes it count."""
        weights = list(weights)
        arrays = {f"{w.name}/{key}": value for w in weights for key, value in w.buffers.items()}
        document = {"weights": [_description(w) for w in weights], "reports": reports}
        arrays["description"] = np.array(json.dumps(document))
        _write(self._layer(index), lambda file: np.savez(file, allow_pickle=False, **arrays))
        state = self._path / f"state-{index + 1:03d}.npy"
        _write(state, lambda file: np.save(file, residual()))
        for older in self._path.glob("state-*.npy"):
            if older != state:
                older.unlink()

    def _layer(self, index: int) -> Path:
        return self._path / f"layer-{index:03d}.npz"


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Under another name first: what a kill leaves behind is never taken for the file."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        write(file)
    os.replace(temporary, path)


def _description(weight: Weight) -> dict[str, Any]:
    fmt = weight.format
    return {
        "name": weight.name,
        "shape": weight.shape,
        "format": fmt.name,
        "group": None if fmt.codes is None else {"group_size": fmt.block_size, **asdict(fmt.codes)},
        "activation": None if weight.activation is None else asdict(weight.activation),
        "buffers": sorted(weight.buffers),
    }


def _weight(entry: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Weight:
    fmt: QuantFormat = FORMATS.get(entry["format"]) or group_format(**entry["group"])
    activation = entry["activation"]
    return Weight(
        entry["name"],
        fmt,
        tuple(entry["shape"]),
        {key: arrays[f"{entry['name']}/{key}"] for key in entry["buffers"]},
        None if activation is None else ActivationQuant(**activation),
    )
