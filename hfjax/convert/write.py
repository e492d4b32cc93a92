"""Writing safetensors piece by piece, and folders all at once or not at all."""

import contextlib
import dataclasses
import glob
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
  `target/.NAME.converting`: nothing is lost, `check_whole` refuses to read the folder, and the next
  run with this target, whatever becomes of it, puts them where they belong. Killed earlier, it
  leaves `target` as it was beside a `.NAME.converting`, which that run removes.

  source: what is read, for the checks. Raises CheckpointError, before anything but such remains is
  changed, if `target` is no folder, is there and `overwrite` is not given, is the working directory
  or above it, or has to do with `source`; and if another process is writing it.
  """
  target = _check_target(target, source)
  made = [p for p in target.parents if not p.exists()]  # innermost first
  beside, within = target.parent / _place_name(target), target / _place_name(target)
  try:
    for place in {beside, within, *_unfinished(target)}:
      if place.is_dir():
        with _hold(place, target):
          pass  # which ends what an earlier run left
    is_new = not target.exists()
    if not is_new and not overwrite:
      raise CheckpointError(f"{target} is there already; choose another name, or add --overwrite.")
    place = beside if is_new else within
    with _hold(place, target):
      if is_new and target.exists():
        raise _busy(target)
      new = place / "new"
      new.mkdir()
      yield new
      for path in (new, *new.rglob("*")):
        _sync(path)
      if is_new:
        new.rename(target)
        for folder in (target.parent, *(parent.parent for parent in made)):
          _sync(folder)
      else:
        _swap(place)
  finally:
    for parent in made:  # that hold nothing
      with contextlib.suppress(OSError):
        parent.rmdir()


def check_whole(path: Path):
  """Raises CheckpointError if a file or folder is, or lies in, one whose exchange was cut."""
  real = Path(os.path.realpath(path))
  for target in (real, *real.parents[: 1 if os.path.isdir(real) else 2]):
    if _unfinished(target):
      raise CheckpointError(
        f"{target} is not whole: a conversion that replaces its models is at work, or was killed. "
        "Wait for it, or run the same conversion again with --overwrite, which ends it."
      )


def _unfinished(target: Path) -> list[Path]:
  """Places of exchanges in a folder, by whatever name it had then, which have not ended."""
  places = [target / name for name in glob.glob(".*.converting", root_dir=target)]
  return [p for p in places if (p / "old").is_dir() or (p / "ready").is_dir()]


def _place_name(target: Path) -> str:
  """Name of the hidden folder, no longer than systems allow."""
  name = target.name
  if len(name) > 40:
    name = f"{name[:31]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
  return f".{name}.converting"


def _check_target(target: Path, source: Path) -> Path:
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
  if is_there and (path == source or path in source.parents or source in path.parents):
    raise CheckpointError(
      f"{target}, to be written to, and {source}, which is read, lie one within the other, so that "
      "weights might replace themselves; write to a folder elsewhere."
    )
  return path


def _busy(target: Path) -> CheckpointError:
  return CheckpointError(
    f"Another conversion is writing {target}; wait for it, or choose another name."
  )


@contextlib.contextmanager
def _hold(place: Path, target: Path) -> Iterator[None]:
  """Makes a place and holds it for this process, emptied before, and removed in the end.

  Raises CheckpointError if another process that lives holds it.
  """
  with _lock(place, target):
    _settle(place)
    try:
      yield
    finally:
      try:
        _settle(place)
      except KeyboardInterrupt:
        _settle(place)
        raise
      finally:
        (place / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it still holds what could not be moved
          place.rmdir()


@contextlib.contextmanager
def _lock(place: Path, target: Path) -> Iterator[None]:
  try:
    import fcntl
  except ImportError:  # not on this system: runs at the same time are not told apart from dead ones
    place.mkdir(parents=True, exist_ok=True)
    yield
    return
  path = place / "lock"
  while True:
    with contextlib.ExitStack() as stack:
      try:
        place.mkdir(parents=True, exist_ok=True)
        f = stack.enter_context(path.open("w"))
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.path.samestat(os.fstat(f.fileno()), path.stat())
      except (BlockingIOError, FileExistsError) as e:  # it is held, or was removed just now
        raise _busy(target) from e
      except FileNotFoundError:
        is_there = False
      if is_there:
        yield
        return
    # Another process ended meanwhile, and removed the place.


def _swap(place: Path):
  """Takes what is to be replaced out of the folder, then lets `_settle` put in what is new."""
  target, new = place.parent, place / "new"
  replaced: set[Path] = set()
  for entry in _entries(new):
    name = entry.relative_to(new)
    for folder in (target / parent for parent in name.parents):
      is_near = folder.is_dir() and folder.stat().st_dev == place.stat().st_dev
      if os.path.lexists(folder) and not is_near:
        raise CheckpointError(
          f"{folder} is no folder on the disk of {target}, so that nothing in it can be exchanged; "
          "move it away, or write elsewhere."
        )
    stem = stem_of(name.name)
    folder = target / name.parent
    for old in folder.iterdir() if folder.is_dir() else ():
      if old.name == name.name or (stem is not None and stem_of(old.name) == stem):
        replaced.add(old)
  (place / "old").mkdir()
  _move(sorted(replaced), target, place / "old")
  new.rename(place / "ready")
  _sync(place)


def _settle(place: Path):
  """Ends an exchange, forward if all that is replaced was taken out, else back; empties `place`."""
  old, ready, new = (place / name for name in ("old", "ready", "new"))
  if ready.is_dir():
    _move(_entries(ready), ready, place.parent)
  elif old.is_dir():
    _move(_entries(old, new), old, place.parent)
  # The old ones first: without the others beside them they would be put back.
  for folder in (old, ready, new):
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
      break


def _move(entries: Sequence[Path], start: Path, end: Path):
  """Moves entries from below one folder to below another, and has the disk keep that."""
  touched: dict[Path, None] = {}
  for entry in entries:
    name = entry.relative_to(start)
    to = end / name
    to.parent.mkdir(parents=True, exist_ok=True)
    entry.rename(to)
    touched |= dict.fromkeys((*to.parents[: len(name.parts)], entry.parent))
  for folder in touched:
    _sync(folder)


def _sync(path: Path):
  """Has the disk keep a file, or the names in a folder, should the power fail."""
  if os.name == "nt":  # has it for files that are open for writing only
    return
  # Some file systems do not have it for folders.
  with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _entries(folder: Path, like: Path | None = None) -> list[Path]:
  """What is exchanged as a whole: files, and folders that hold more than folders.

  like: another folder, of which what has the same name must be no such whole either.
  """
  found = []
  for entry in sorted(folder.iterdir()):
    twin = (like or folder) / entry.name
    found += _entries(entry, twin) if _is_nest(entry) and _is_nest(twin) else [entry]
  return found


def _is_nest(path: Path) -> bool:
  """Whether a folder holds nothing but folders, or is not there."""
  if not os.path.lexists(path):
    return True
  return path.is_dir() and not path.is_symlink() and all(p.is_dir() for p in path.iterdir())
