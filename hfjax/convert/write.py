"""Writing safetensors piece by piece, and folders all at once or not at all."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hfjax.convert.source import DTYPES, CheckpointError, stem_of

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
    return math.prod(self.shape) * self.dtype.itemsize


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
      f"The checkpoint needs {need / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; make room, or "
      "write elsewhere."
    )


@contextlib.contextmanager
def replace_folder(target: Path, overwrite: bool, source: Path) -> Iterator[Path]:
  """Gives an empty folder whose content becomes that of `target` if all goes well.

  A `target` that is not there yet is made by one rename. In one that is there, what was written
  takes the place of what has its name: files with weights also of other files of the same weights,
  folders as a whole, folders of nothing but folders one by one. All else stays.

  Whatever ends the block early leaves `target` as it was, and an interruption while things change
  places leaves it as it was or complete. A process that is killed at once (SIGKILL, power), or a
  disk that refuses, while things change places may leave some of them in
  `target/.NAME.converting`: nothing is lost, and the next run with this target puts them where they
  belong. Killed earlier, it leaves `target` as it was beside a `.NAME.converting`, which that run
  removes.

  source: what is read, for the checks. Raises CheckpointError, before anything is changed, if
  `target` is no folder, is there and `overwrite` is not given, is the working directory or above
  it, or has to do with `source`; and if another process is writing it.
  """
  target = _check_target(target, overwrite, source)
  is_new = not target.exists()
  made = [p for p in target.parents if not p.exists()]  # innermost first
  name = f".{target.name[:40]}.converting"
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      for place in (target.parent / name, target / name):
        if place.is_dir():
          with _lock(place, target):
            _settle(place, target)
      place = (target.parent if is_new else target) / name
      place.mkdir()
      stack.enter_context(_lock(place, target))
      new = place / "new"
      try:
        new.mkdir()
        yield new
        if is_new:
          new.rename(target)
        else:
          _swap(place, target)
      finally:
        try:
          _settle(place, target)
        except KeyboardInterrupt:
          _settle(place, target)
          raise
  finally:
    for parent in made:  # that hold nothing
      with contextlib.suppress(OSError):
        parent.rmdir()


def _check_target(target: Path, overwrite: bool, source: Path) -> Path:
  try:
    path, cwd, source = target.resolve(), Path.cwd(), source.resolve()
    try:
      is_there = bool(os.stat(path))
    except FileNotFoundError:
      is_there = False
  except (OSError, ValueError, RuntimeError) as e:  # a loop of links, a name that cannot be
    raise CheckpointError(f"{target} cannot be written ({e}); choose another name.") from e
  if path == cwd or path in cwd.parents:
    raise CheckpointError(
      f"{target} is the working directory or a folder above it; give a folder of its own."
    )
  if is_there and not path.is_dir():
    raise CheckpointError(f"{target} is a file; give a folder to write to.")
  if target.is_symlink() and not is_there:
    raise CheckpointError(f"{target} is a link to nothing; remove it, or choose another name.")
  if is_there and not overwrite:
    raise CheckpointError(f"{target} is there already; choose another name, or add --overwrite.")
  if is_there and (path == source or path in source.parents or source in path.parents):
    raise CheckpointError(
      f"{target}, to be written to, and {source}, which is read, lie one within the other, so that "
      "weights might replace themselves; write to a folder elsewhere."
    )
  return path


@contextlib.contextmanager
def _lock(place: Path, target: Path) -> Iterator[None]:
  """Holds a folder for this process; CheckpointError if another one that lives does."""
  try:
    import fcntl
  except ImportError:  # not on this system: runs at the same time are not told apart from dead ones
    yield
    return
  with (place / "lock").open("w") as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise CheckpointError(
        f"Another conversion is writing {target}; wait for it, or choose another name."
      ) from e
    yield


def _swap(place: Path, target: Path):
  """Takes what is to be replaced out of `target`, then lets `_settle` put in what is new."""
  (place / "old").mkdir()
  for entry in _entries(place / "new"):
    name = entry.relative_to(place / "new")
    folder = (target / name).parent
    folder.mkdir(parents=True, exist_ok=True)
    stem = stem_of(name.name)
    for old in sorted(folder.iterdir()):
      if old.name == name.name or (stem is not None and stem_of(old.name) == stem):
        moved = place / "old" / old.relative_to(target)
        moved.parent.mkdir(parents=True, exist_ok=True)
        old.rename(moved)
  (place / "new").rename(place / "ready")


def _settle(place: Path, target: Path):
  """Ends an exchange, forward if all that is replaced was taken out, else back; removes `place`."""
  old, ready = place / "old", place / "ready"
  for folder in (ready, old):
    if folder.is_dir():
      for entry in _entries(folder):
        place_for = target / entry.relative_to(folder)
        place_for.parent.mkdir(parents=True, exist_ok=True)
        entry.rename(place_for)
      break
  # The old ones first: without the others beside them they would be put back.
  for folder in (old, ready, place):
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
      break


def _entries(folder: Path) -> list[Path]:
  """What is exchanged as a whole: files, and folders that hold more than folders."""
  found = []
  for entry in sorted(folder.iterdir()):
    is_nest = entry.is_dir() and not entry.is_symlink() and all(p.is_dir() for p in entry.iterdir())
    found += _entries(entry) if is_nest else [entry]
  return found
