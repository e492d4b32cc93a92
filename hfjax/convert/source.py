"""Reading checkpoints tensor by tensor: safetensors, single or sharded, and PyTorch pickles.

A source is a mapping from names to tensors that are read when asked for. Data are read into memory
of their own rather than mapped, so that a large checkpoint does not count as memory in use.
"""

import collections
import ctypes
import dataclasses
import json
import math
import mmap
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

# What weights may be, by its name in safetensors.
DTYPES: dict[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
INDEX = ".safetensors.index.json"
_DONTNEED = 4  # MADV_DONTNEED of Linux
_SHARD = re.compile(r"-[0-9]+-of-([0-9]+)$")
# How far wrappers nest in the pickles of trainers.
_DEPTH = 3
_MAX_PICKLE = 64 * 2**20  # bytes of the pickle itself; a published one with its names has 0.2 MB
_SHOWN = 4000  # characters of a sentence


class CheckpointError(ValueError):
  """A checkpoint that cannot be read or written; its text is a sentence for the user.

  It is made printable, as names in it come from files of others.
  """

  def __init__(self, text: str):
    super().__init__(printable(text))


def printable(text: str) -> str:
  """A sentence in which control characters are escaped, and long words shortened."""
  text = re.sub(r"\S{300,}", lambda m: f"{m[0][:100]}...", text)[:_SHOWN]
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


def user_path(text: str | Path) -> Path:
  """A path as a user gives it, where `~` is the home; CheckpointError if it cannot be one."""
  if str(text) == "" or "\0" in str(text):
    raise CheckpointError(f"{str(text)!r} is no path; give that of a file or folder.")
  return Path(os.path.expanduser(text))


def check_file(path: Path):
  """Raises CheckpointError unless `path` is a file that can be opened."""
  if not path.is_file():
    what = "a link to nothing" if path.is_symlink() and not path.exists() else "no file"
    raise CheckpointError(f"{path} is {what}; give a file of weights.")
  try:
    path.open("rb").close()
  except OSError as e:
    raise CheckpointError(f"{path} cannot be opened ({e.strerror}).") from e


def read_safetensors(path: Path, others: Mapping[str, np.dtype] = {}) -> dict[str, Tensor]:
  """Tensors of one file; others: dtypes by code that they may have besides those of weights.

  Raises CheckpointError if the file is damaged.
  """
  check_file(path)
  dtypes = {**DTYPES, **others}
  try:
    # The library checks the header against the file; it does not tell offsets, so these are read
    # from the header once it is known to be sound.
    with safe_open(path, framework="np") as f:
      names = list(f.keys())
    with path.open("rb") as f:
      size = int.from_bytes(f.read(8), "little")
      header = json.loads(f.read(size))
  except (SafetensorError, OSError, ValueError, RecursionError) as e:
    raise CheckpointError(
      f"{path} is no safetensors file that can be read ({e}); it may be truncated, so download it "
      "again."
    ) from e
  tensors = {}
  for name in names:
    entry = header[name]
    if entry["dtype"] not in dtypes:
      raise CheckpointError(
        f"{path} holds {name} as {entry['dtype']}; weights are {', '.join(DTYPES)}."
      )
    dtype, shape = dtypes[entry["dtype"]], tuple(entry["shape"])
    start = 8 + size + entry["data_offsets"][0]
    tensors[name] = Tensor(shape, dtype, _file_reader(path, start, shape, dtype), path, start)
  return tensors


def _file_reader(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype):
  def read(row: int | None = None) -> np.ndarray:
    part = shape if row is None else shape[1:]
    size = math.prod(part) * dtype.itemsize
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

  check_file(path)
  _check_archive(path)
  try:
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except Exception as e:
    # PyTorch's own advice on pickles is of no use here.
    is_pickle = isinstance(e, pickle.UnpicklingError)
    reason = "its pickle is damaged" if is_pickle else str(e).partition("\n")[0] or "it ended early"
    # The only words that tell code from damage; PyTorch raises one error for both.
    if re.search("GLOBAL|via `add_safe_globals`", str(e)):
      raise CheckpointError(
        f"{path} is a pickle that asks to run code beyond loading weights, which is refused; "
        "convert it to safetensors where it comes from."
      ) from e
    raise CheckpointError(
      f"{path} is no PyTorch file that can be read ({reason}); it is damaged, or from before "
      "PyTorch 1.6: download or save it again."
    ) from e
  _check_records(path, held)
  if not isinstance(held, Mapping):
    raise CheckpointError(f"{path} holds a {type(held).__name__}, not a dictionary of tensors.")
  return dict(held)


def _check_archive(path: Path):
  """Raises CheckpointError unless a PyTorch file is an archive that unpacks to no more than it is.

  PyTorch writes records as they are, so a compressed one is damage or an attempt to fill memory.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      infos = archive.infolist()
  except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
    raise CheckpointError(
      f"{path} is no PyTorch file that can be read ({e}); it is damaged, or from before PyTorch "
      "1.6: download or save it again."
    ) from e
  for info in infos:
    is_large = info.filename.endswith("data.pkl") and info.file_size > _MAX_PICKLE
    if info.compress_type != zipfile.ZIP_STORED or is_large:
      raise CheckpointError(
        f"{path} is no PyTorch file that can be read (its record {info.filename} is compressed or "
        "far too large); download it again."
      )


def _check_records(path: Path, held: Any):
  """Raises CheckpointError unless every storage is a whole record of the archive.

  Mapped storages are not held against their records by PyTorch: one that is too short would be
  filled up with its neighbour's bytes.
  """
  import torch

  with zipfile.ZipFile(path) as archive:
    infos = [i for i in archive.infolist() if "/data/" in f"/{i.filename}"]
  records = collections.Counter(i.file_size for i in infos)
  storages: dict[int, int] = {}
  # Containers may nest deeply, be shared, or hold themselves.
  todo, seen = [held], set()
  while todo:
    value = todo.pop()
    if id(value) in seen:
      continue
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
      if value.layout == torch.strided and value.device.type == "cpu":
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
      todo.extend(value.values())
    elif isinstance(value, (list, tuple, set)):
      todo.extend(value)
  if collections.Counter(n for n in storages.values() if n) - records:
    raise CheckpointError(
      f"{path} is no PyTorch file that can be read (its records are shorter than its tensors); "
      "download it again."
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
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_neg():
      raise CheckpointError(
        f"{path} holds {name} as a sparse tensor, a view or without data; save it as plain numbers."
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
  seen: set[int] = set()  # a dictionary may hold itself

  def walk(path: str, value: Any, depth: int):
    if not isinstance(value, Mapping) or id(value) in seen:
      return
    seen.add(id(value))
    if any(hasattr(v, "dtype") for v in value.values()):
      yield path, value
    elif depth:
      for key, inner in value.items():
        yield from walk(f"{path}.{key}".lstrip("."), inner, depth - 1)

  yield from walk("", held, _DEPTH)


def stem_of(name: str) -> str | None:
  """What the files of one set of weights have in common in their names; None for other files."""
  for end in (INDEX, ".safetensors", *PICKLES):
    if name.endswith(end):
      return _SHARD.sub("", name.removesuffix(end))
  return None


def shards(folder: Path, stem: str) -> list[Path]:
  """`stem.safetensors`, or the files that its index names, or its numbered shards without an index.

  Raises CheckpointError on missing shards, and if there is both a single file and shards.
  """
  whole, index = folder / f"{stem}.safetensors", folder / f"{stem}{INDEX}"
  numbered = sorted(
    f for f in folder.glob("*.safetensors") if f != whole and _SHARD.sub("", f.stem) == stem
  )
  if os.path.lexists(whole) and (numbered or index.is_file()):
    others = ", ".join(f.name for f in (numbered or [index]))
    raise CheckpointError(
      f"{folder} holds {stem} both in one file and in shards ({others}); remove one of them."
    )
  if os.path.lexists(whole):
    return [whole]
  if index.is_file():
    names = named_by(index)
    missing = [n for n in names if not (folder / n).is_file()]
  else:
    names = [f.name for f in numbered]
    total = max((int(m[1]) for f in numbered if (m := _SHARD.search(f.stem))), default=1)
    missing = [] if len(names) == total else [f"{len(names)} of {total} are there"]
  if missing:
    raise CheckpointError(
      f"{folder} does not hold all shards of {stem} ({', '.join(missing[:20])}); download them "
      "again."
    )
  return [folder / n for n in names]


def named_by(index: Path) -> list[str]:
  """Names of the files that an index names, all beside it; CheckpointError if it is damaged."""
  return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
  """File by tensor; CheckpointError unless all are names of files beside the index."""
  named = read_json(index).get("weight_map", {})
  files = named.values() if isinstance(named, dict) else ()
  if not files or any(not isinstance(f, str) or Path(f).name != f for f in files):
    raise CheckpointError(
      f"{index} does not name files beside it by tensor in its weight_map; download it again."
    )
  return named


def read_shards(folder: Path, stem: str) -> dict[str, Tensor]:
  """Tensors of the files that `shards` finds.

  Raises CheckpointError on missing shards or tensors, and on tensors that two shards hold.
  """
  tensors: dict[str, Tensor] = {}
  for file in shards(folder, stem):
    found = read_safetensors(file)
    twice = sorted(tensors.keys() & found.keys())
    if twice:
      raise CheckpointError(f"{folder} holds {twice[0]} in two shards of {stem}.")
    tensors.update(found)
  index = folder / f"{stem}{INDEX}"
  lost = sorted(_weight_map(index).keys() - tensors.keys()) if index.is_file() else []
  if lost:
    raise CheckpointError(
      f"The shards of {folder / stem} lack {len(lost)} tensors that their index names: "
      f"{', '.join(lost[:20])}."
    )
  return tensors


def read_json(path: Path) -> dict[str, Any]:
  """A JSON dictionary; CheckpointError if the file holds none."""
  try:
    value = json.loads(path.read_text("utf-8-sig"))  # some editors put a mark before the text
  except (OSError, ValueError, RecursionError) as e:
    raise CheckpointError(
      f"{path} is no JSON file that can be read ({e}); download or write it again."
    ) from e
  if not isinstance(value, dict):
    raise CheckpointError(f"{path} holds no JSON dictionary.")
  return value
