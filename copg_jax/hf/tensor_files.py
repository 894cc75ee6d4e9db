"""Files of named tensors in the safetensors format: read in part, written one tensor at a time.

1. `SafetensorsFolder` reads slices of the tensors of a model folder, of one file or of many.
2. `write_safetensors` writes a file whose tensors are made one after the other.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors relies on)
import numpy as np
from safetensors import safe_open

from copg_jax.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsFolder:
    """The tensors of a folder: model.safetensors, or the files its index names.

    Args:
        folder: where they are.
        name: another file than model.safetensors, which has no index.
    """

    def __init__(self, folder: Path, name: str = SINGLE_NAME):
        self._handles: dict[Path, Any] = {}
        self._weight_map: dict[str, str] = {}
        if name == SINGLE_NAME and (folder / INDEX_NAME).is_file():
            self._weight_map = _read_weight_map(folder / INDEX_NAME)
            files = {folder / name for name in self._weight_map.values()}
            single = folder / SINGLE_NAME
            if single.is_file() and single not in files:
                raise InputError(
                    f"{single} and {folder / INDEX_NAME}, which names other files: wanted one set "
                    "of weights, got two. Fix: delete the one that is out of date (with the index "
                    "go its files)."
                )
        else:
            files = {folder / name}
        absent = sorted(str(file) for file in files if not file.is_file())
        if absent:
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            hint = (
                "Pickled weights (.bin, .pt) can run code and are never read: convert them, e.g. "
                "load with torch and call save_pretrained of transformers"
                if pickled
                else "Copy the missing files"
            )
            raise InputError(f"wanted safetensors weights, got no {', '.join(absent)}. {hint}.")
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(files):
            self._open(file)
        for name in self._weight_map.keys() - self._file_of.keys():
            raise InputError(
                f"{folder / self._weight_map[name]}: wanted {name}, which {INDEX_NAME} says is in "
                "it, got no tensor of that name. Fix: copy the folder again."
            )

    def _open(self, file: Path) -> None:
        try:
            handle = self._handles[file] = safe_open(file, framework="numpy")
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own type for a broken header
            raise InputError(
                f"{file}: not a readable safetensors file ({error}); copy it again"
            ) from error
        for name, part in slices.items():
            if part.get_dtype() not in _FLOATS and not name.endswith("inv_freq"):
                raise InputError(
                    f"{file}: {name}: wanted a dtype of {_FLOATS}, got {part.get_dtype()}; "
                    "quantised checkpoints are not supported"
                )
            if name in self._file_of or self._weight_map.get(name, file.name) != file.name:
                other = self._file_of.get(name, file.with_name(self._weight_map.get(name, "")))
                raise InputError(
                    f"{file}: {name}: wanted each tensor in one file, got it here and, by "
                    f"{INDEX_NAME}, in {other.name}. Fix: copy the folder again."
                )
            self._file_of[name] = file
            self._shapes[name] = tuple(part.get_shape())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        return self._handles[self._file_of[name]].get_slice(name)[tuple(index)]


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{index}: wanted JSON with a 'weight_map' of tensor names to files, got {error!r}"
        ) from error
    for name, file in weight_map.items():
        # What lies elsewhere would not be in the hash of the folder.
        if not (isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file)):
            raise InputError(
                f"{index}: {name}: wanted the name of a .safetensors file of this folder, got "
                f"{file!r}. Fix: copy the file here, and name it without a path."
            )
    return weight_map


def write_safetensors(
    stream: IO[bytes],
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
) -> None:
    """Writes float32 tensors so that the host never holds more than one of them.

    Args:
        stream: a binary file.
        shapes: name to shape, in the order to write.
        tensor: gives the float32 tensor of a name, C-contiguous.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in shapes:
        stream.write(np.ascontiguousarray(tensor(name), "<f4").data)
