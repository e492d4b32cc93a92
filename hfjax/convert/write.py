"""Writing safetensors piece by piece, and folders all at once or not at all."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hfjax.convert.source import DTYPES, CheckpointError

SHARD_BYTES = 4 * 2**30
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# What a folder needs beyond its tensors: headers, configuration, tokenizer.
_MARGIN = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor to be written.

  pieces: yields arrays whose bytes, one after the other, are the tensor in C order.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  pieces: Callable[[], Iterator[np.ndarray]]

  @property
  def nbytes(self) -> int:
    """Size on disk."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_shards(
  folder: Path,
  stem: str,
  entries: Sequence[Entry],
  progress: Callable[[int], object] = lambda count: None,
  shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
  """Writes tensors to `stem.safetensors`, or to numbered shards with an index; SHA-256 by file.

  progress: called with every number of bytes written.
  A tensor larger than `shard_bytes` gets a file of its own.
  """
  shards: list[list[Entry]] = [[]]
  for entry in entries:
    if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
      shards.append([])
    shards[-1].append(entry)
  total = len(shards)
  numbered = [f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
  names = [f"{stem}.safetensors"] if total == 1 else numbered
  hashes = {
    name: _write_file(folder / name, shard, progress)
    for name, shard in zip(names, shards, strict=True)
  }
  if total > 1:
    index = {
      "metadata": {"total_size": sum(e.nbytes for e in entries)},
      "weight_map": {e.name: name for name, s in zip(names, shards, strict=True) for e in s},
    }
    write_json(folder / f"{stem}.safetensors.index.json", index)
  return hashes


def _write_file(path: Path, entries: Sequence[Entry], progress: Callable[[int], object]) -> str:
  header, offset = {}, 0
  for entry in entries:
    header[entry.name] = {
      "dtype": _CODES[entry.dtype],
      "shape": list(entry.shape),
      "data_offsets": [offset, offset + entry.nbytes],
    }
    offset += entry.nbytes
  text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
  text += b" " * (-len(text) % 8)  # data start at a multiple of 8, so that they may be mapped
  digest = hashlib.sha256()
  with path.open("wb") as f:

    def put(data):
      f.write(data)
      digest.update(data)

    put(len(text).to_bytes(8, "little"))
    put(text)
    for entry in entries:
      written = 0
      for piece in entry.pieces():
        data = np.ascontiguousarray(piece, entry.dtype).reshape(-1).view(np.uint8)
        put(data.data)
        written += data.size
        progress(data.size)
      if written != entry.nbytes:
        raise AssertionError(f"{entry.name}: {written} bytes instead of {entry.nbytes}")
    f.flush()
    os.fsync(f.fileno())
  return digest.hexdigest()


def write_json(path: Path, value):
  """Writes JSON with an indent of 2."""
  path.write_text(json.dumps(value, indent=2) + "\n")


def check_space(folder: Path, nbytes: int):
  """Raises CheckpointError unless the disk below `folder` has room for `nbytes` and some."""
  free = shutil.disk_usage(folder).free
  need = nbytes + _MARGIN
  if free < need:
    raise CheckpointError(
      f"The checkpoint needs {need / 1e9:.2f} GB at {folder}, and {free / 1e9:.2f} GB are free; "
      "make room, or write elsewhere."
    )


@contextlib.contextmanager
def replace_folder(target: Path, overwrite: bool) -> Iterator[Path]:
  """Gives a temporary folder beside `target` that becomes `target` if all goes well.

  Whatever ends the block early leaves `target` as it was. With `overwrite`, entries that the new
  folder does not have are kept from the old one. Raises CheckpointError if `target` is there and
  `overwrite` is not given, or if it is no folder.
  """
  if target.exists() and not target.is_dir():
    raise CheckpointError(f"{target} is a file; give a folder to write to.")
  if target.exists() and not overwrite:
    raise CheckpointError(f"{target} is there already; choose another name, or add --overwrite.")
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
  except OSError as e:
    raise CheckpointError(f"{target} cannot be written ({e}); choose another place.") from e
  try:
    new.chmod(0o755)
    yield new
    if not target.exists():
      new.rename(target)
      return
    for entry in target.iterdir():
      if not (new / entry.name).exists():
        # Links, so that the old folder stays whole until the new one takes its name.
        copy = os.link if entry.is_file() else _link_tree
        copy(entry, new / entry.name)
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
      new.rename(target)
    except BaseException:
      (old / target.name).rename(target)
      raise
    shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(new, ignore_errors=True)


def _link_tree(source: Path, target: Path):
  shutil.copytree(source, target, copy_function=os.link)
