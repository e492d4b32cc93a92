"""Reading checkpoints tensor by tensor: safetensors, single or sharded, and PyTorch pickles.

A source is a mapping from names to tensors that are read when asked for. Data are read into memory
of their own rather than mapped, so that a large checkpoint does not count as memory in use.
"""

import collections
import ctypes
import dataclasses
import json
import mmap
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES: dict[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_DONTNEED = 4  # MADV_DONTNEED of Linux
_SHARD = re.compile(r"-\d+-of-(\d+)$")
# How far wrappers nest in the pickles of trainers.
_DEPTH = 3


class CheckpointError(ValueError):
  """A checkpoint that cannot be read or written; its text is a sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a checkpoint, read by `read()`, or one row of its first axis by `read(row)`.

  file, offset: where its bytes lie as they are, if they do.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[..., np.ndarray]
  file: Path | None = None
  offset: int = 0

  @property
  def nbytes(self) -> int:
    """Size in memory."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


def read_safetensors(path: Path) -> dict[str, Tensor]:
  """Tensors of one file. Raises CheckpointError if it is damaged."""
  try:
    # The library checks the header against the file; it does not tell offsets, so these are read
    # from the header once it is known to be sound.
    with safe_open(path, framework="np") as f:
      names = list(f.keys())
    with path.open("rb") as f:
      size = int.from_bytes(f.read(8), "little")
      header = json.loads(f.read(size))
  except (SafetensorError, OSError, ValueError) as e:
    raise CheckpointError(
      f"{path} is no safetensors file that can be read ({e}); it may be truncated, so download it "
      "again."
    ) from e
  tensors = {}
  for name in names:
    entry = header[name]
    if entry["dtype"] not in DTYPES:
      raise CheckpointError(
        f"{path} holds {name} as {entry['dtype']}; hfjax reads {', '.join(DTYPES)}."
      )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start = 8 + size + entry["data_offsets"][0]
    tensors[name] = Tensor(shape, dtype, _file_reader(path, start, shape, dtype), path, start)
  return tensors


def _file_reader(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype):
  def read(row: int | None = None) -> np.ndarray:
    part = shape if row is None else shape[1:]
    size = int(np.prod(part, dtype=np.int64)) * dtype.itemsize
    data = np.fromfile(path, np.uint8, size, offset=start + (row or 0) * size)
    if data.size != size:
      raise CheckpointError(f"{path} ended while it was read; it was changed or truncated.")
    return data.view(dtype).reshape(part)

  return read


def read_pickle(path: Path) -> dict[str, Any]:
  """What a PyTorch file holds, with tensors mapped into memory; nothing but weights is unpickled.

  Raises CheckpointError without PyTorch, or if the file is damaged or asks for more than weights.
  """
  try:
    import torch
  except ImportError as e:
    raise CheckpointError(
      f"{path} is a PyTorch file, and PyTorch is not installed; pip install 'hfjax[convert]', or "
      "give safetensors."
    ) from e
  import pickle

  try:
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except pickle.UnpicklingError as e:
    raise CheckpointError(
      f"{path} is a pickle that asks to run code beyond loading weights, which is refused; convert "
      "it to safetensors where it comes from."
    ) from e
  except Exception as e:
    reason = str(e).partition("\n")[0]
    raise CheckpointError(
      f"{path} is no PyTorch file that can be read ({reason}); files from before PyTorch 1.6 and "
      "truncated ones are refused."
    ) from e
  _check_records(path, held)
  if not isinstance(held, Mapping):
    raise CheckpointError(f"{path} holds a {type(held).__name__}, not a dictionary of tensors.")
  return dict(held)


def _check_records(path: Path, held: Any):
  """Raises CheckpointError unless every storage is a whole record of the archive, uncompressed.

  Mapped storages are not held against their records by PyTorch: one that is too short would be
  filled up with its neighbour's bytes.
  """
  import torch

  with zipfile.ZipFile(path) as archive:
    infos = [i for i in archive.infolist() if "/data/" in f"/{i.filename}"]
  records = collections.Counter(i.file_size for i in infos if i.compress_type == zipfile.ZIP_STORED)
  storages: dict[int, int] = {}

  def collect(value):
    if isinstance(value, torch.Tensor):
      storage = value.untyped_storage()
      storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
      for inner in value.values():
        collect(inner)
    elif isinstance(value, (list, tuple)):
      for inner in value:
        collect(inner)

  collect(held)
  if collections.Counter(n for n in storages.values() if n) - records:
    raise CheckpointError(
      f"{path} is no PyTorch file that can be read (its records are shorter than its tensors, or "
      "compressed); download it again."
    )


def pickle_tensors(path: Path, held: Mapping[str, Any]) -> dict[str, Tensor]:
  """Tensors of a dictionary read by `read_pickle`; CheckpointError if it holds other things."""
  import torch

  tensors = {}
  for name, value in held.items():
    if not isinstance(value, torch.Tensor):
      raise CheckpointError(
        f"{path} holds {name} of type {type(value).__name__} among its tensors; give a file of "
        "weights."
      )
    key = str(value.dtype).removeprefix("torch.")
    dtype = next((d for d in DTYPES.values() if d.name == key), None)
    if dtype is None:
      raise CheckpointError(f"{path} holds {name} as {key}, which hfjax does not read.")
    tensors[str(name)] = Tensor(tuple(value.shape), dtype, _torch_reader(value, dtype))
  return tensors


def _torch_reader(value: Any, dtype: np.dtype):
  def read(row: int | None = None) -> np.ndarray:
    import torch

    part = value if row is None else value[row]
    flat = part.detach().contiguous().flatten().view(torch.uint8)
    data = np.array(flat.numpy())  # a copy, so that the pages of the file can go
    _forget_pages(part)
    return data.view(dtype).reshape(tuple(part.shape))

  return read


def _forget_pages(value: Any):
  """Tells the system that the pages of a mapped tensor are not needed any more."""
  if sys.platform != "linux":
    return
  page = mmap.PAGESIZE
  # Whole pages inside the tensor only: neighbours may be in use. The file was mapped privately and
  # nothing writes to it, so the pages are read again if they are asked for.
  start = -(-value.data_ptr() // page) * page
  stop = (value.data_ptr() + value.numel() * value.element_size()) // page * page
  if stop > start:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)


def nested(held: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Dictionaries of tensors inside a trainer's dictionary, by the path of keys that leads there."""

  def walk(path: str, value: Any, depth: int):
    if not isinstance(value, Mapping) or not value:
      return
    if any(hasattr(v, "dtype") for v in value.values()):
      yield path, value
    elif depth:
      for key, inner in value.items():
        yield from walk(f"{path}.{key}".lstrip("."), inner, depth - 1)

  yield from walk("", held, _DEPTH)


def read_shards(folder: Path, stem: str) -> dict[str, Tensor]:
  """Tensors of `stem.safetensors`, or of its numbered shards and their index.

  Raises CheckpointError on missing shards or tensors, and on tensors that two shards hold.
  """
  whole = folder / f"{stem}.safetensors"
  if whole.is_file():
    return read_safetensors(whole)
  files = sorted(f for f in folder.glob("*.safetensors") if _SHARD.sub("", f.stem) == stem)
  totals = {int(m[1]) for f in files if (m := _SHARD.search(f.stem))}
  if len(totals) != 1 or len(files) != totals.pop():
    names = ", ".join(f.name for f in files)
    raise CheckpointError(
      f"{folder} does not hold all shards of {stem}, only {names}; download the others again."
    )
  tensors: dict[str, Tensor] = {}
  for file in files:
    found = read_safetensors(file)
    twice = sorted(tensors.keys() & found.keys())
    if twice:
      raise CheckpointError(f"{folder} holds {twice[0]} in two shards of {stem}.")
    tensors.update(found)
  index = folder / f"{stem}.safetensors.index.json"
  if index.is_file():
    named = read_json(index).get("weight_map", {})
    lost = sorted(set(named) - tensors.keys())
    if lost:
      raise CheckpointError(
        f"The shards of {folder / stem} lack {len(lost)} tensors that their index names: "
        f"{', '.join(lost[:20])}."
      )
  return tensors


def read_json(path: Path) -> dict[str, Any]:
  """A JSON dictionary; CheckpointError if the file holds none."""
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise CheckpointError(f"{path} is no JSON file that can be read ({e}).") from e
  if not isinstance(value, dict):
    raise CheckpointError(f"{path} holds no JSON dictionary.")
  return value
