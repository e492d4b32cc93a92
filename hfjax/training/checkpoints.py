"""Checkpoints of training, on top of Orbax: written in the background, verified when restored.

A checkpoint is the folder FOLDER/STEP; it holds items (trees of arrays, each readable alone) and
`note`, a JSON object. Orbax writes to a folder of another name and renames it at the end, so that
a process that is killed leaves the checkpoints before as they were.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from hfjax.checksums import checksum, described
from hfjax.streaming.trees import named

_NOTE, _SUMS, _UNFINISHED = "note", "checksums", ".orbax-checkpoint-tmp"


class CheckpointFailed(RuntimeError):  # noqa: N818  it says what happened
  """A checkpoint could not be written, or none can be read; its text is a sentence."""


class CheckpointMismatch(ValueError):  # noqa: N818
  """A checkpoint is whole, but of another structure; its text is a sentence."""


class _Damaged(Exception):  # noqa: N818
  """A checkpoint that cannot be read as it was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpoints.restore` found.

  step: of the checkpoint. items: trees of the structure, dtypes and shardings that were asked for.
  note: as it was given to `save`.
  """

  step: int
  items: dict[str, Any]
  note: dict[str, Any]


class Checkpoints:
  """The checkpoints of one folder, of which the newest `keep` stay.

  The oldest goes when a new one is complete: there is to be room for one more.

  One object at a time writes to a folder; what a killed process left unfinished is removed when
  it opens. With several processes, all make the same calls, on a file system that all see.
  say: takes sentences that the user must know, by default to the standard error.
  Raises CheckpointFailed if the folder cannot be made.
  """

  def __init__(self, folder: Path | str, keep: int = 2, say: Callable[[str], None] | None = None):
    if keep < 1:
      raise ValueError(f"keep is {keep}; at least one checkpoint must stay.")
    _hush()
    self.folder, self.keep = Path(folder).expanduser().resolve(), keep
    self._say = say or functools.partial(print, file=sys.stderr)
    self._saving: int | None = None
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._remove_unfinished()
      self._open()
    except OSError as e:
      raise CheckpointFailed(
        f"No checkpoints can be kept in {self.folder} ({e.strerror}); give a folder that can be "
        "written."
      ) from e

  def save(self, step: int, items: Mapping[str, Any], note: Mapping[str, Any]) -> bool:
    """Begins to save, and goes on in the background; arrays may be donated right after.

    step: a step that is there already is left as it is. items: trees of arrays by name; scalars
    become arrays. note: a JSON object. Returns whether there was anything to save.
    Raises CheckpointFailed if this or the save before cannot be written; both may be tried again.
    """
    if _NOTE in items:
      raise ValueError(f"An item cannot be called {_NOTE!r}; give it another name.")
    plain = json.loads(json.dumps(note))  # raises TypeError here, not in the background
    self.wait()
    steps = self.steps()
    if step in steps:
      return False
    if steps and step < steps[-1]:
      raise CheckpointFailed(
        f"{self.folder} holds step {steps[-1]}, so step {step} is not saved there; go on from that "
        "step, or give another folder."
      )
    arrays = {k: jax.tree.map(_as_array, tree) for k, tree in items.items()}
    sums = {k: checksum(tree) for k, tree in arrays.items()}
    args: dict[str, Any] = {k: ocp.args.StandardSave(tree) for k, tree in arrays.items()}
    args[_NOTE] = ocp.args.JsonSave({**plain, _SUMS: {**sums, _NOTE: _sum_of_note(plain)}})
    self._saving = step
    try:
      self._manager.save(step, args=ocp.args.Composite(**args), force=True)
    except Exception as e:
      raise self._failure(e) from e
    return True

  def restore(
    self,
    like: Mapping[str, Any],
    items: Collection[str] | None = None,
    optional: Collection[str] = (),
  ) -> Restored | None:
    """The newest checkpoint that is whole; None if there is none at all.

    Newer ones that are damaged are told of and set aside as `damaged-STEP`, so that training can
    save these steps again and nothing is lost that someone might still want.

    like: for each item a tree of jax.ShapeDtypeStruct (or arrays) with the sharding to restore to;
    without one, the first device. It need not be the sharding it was saved with.
    items: those to be read, by default all of `like`. optional: those that may be missing.
    Raises CheckpointMismatch if the structure is another, CheckpointFailed if all are damaged.
    """
    self.wait()
    wanted = {k: jax.tree.map(_like, like[k]) for k in (like if items is None else items)}
    damaged: dict[int, str] = {}
    for step in reversed(self.steps()):
      try:
        found = self._read(step, wanted, optional)
      except _Damaged as e:
        damaged[step] = str(e)
        continue
      for bad, why in damaged.items():
        self._set_aside(bad, why, step)
      if damaged:
        self._reopen()
      return found
    if damaged:
      raise CheckpointFailed(
        f"All checkpoints in {self.folder} are damaged ("
        + "; ".join(f"step {k}: {v}" for k, v in damaged.items())
        + "); move them away to begin anew."
      )
    return None

  def note(self, step: int | None = None) -> dict[str, Any] | None:
    """The note of a step, by default of the newest whose note can be read; None without any.

    Raises CheckpointFailed if `step` is not there or its note cannot be read.
    """
    self.wait()
    for at in reversed(self.steps()) if step is None else [step]:
      try:
        return self._read_note(at)[0]
      except _Damaged as e:
        if step is not None:
          raise CheckpointFailed(f"{self.folder / str(at)} cannot be read ({e}).") from e
    return None

  def steps(self) -> list[int]:
    """Steps whose checkpoints are complete, ascending."""
    return sorted(ocp.utils.checkpoint_steps(self.folder))

  def wait(self):
    """Until the save that was begun is on disk; CheckpointFailed if it did not get there."""
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      raise self._failure(e) from e
    self._saving = None
    self._remove_unfinished()

  def close(self):
    """As `wait`, and lets go of threads."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):
        self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception):
    self.close()

  def _open(self):
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(max_to_keep=self.keep, enable_async_checkpointing=True),
    )

  def _reopen(self):
    """What Orbax thinks is there is what is there again."""
    with contextlib.suppress(Exception):
      self._manager.close()
    self._remove_unfinished()
    self._open()

  def _remove_unfinished(self):
    """For when nothing is being saved."""
    if jax.process_index() == 0:
      for path in self.folder.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)

  def _failure(self, error: Exception) -> CheckpointFailed:
    """What to raise for an error of Orbax; nothing of the failed save is left."""
    step, self._saving = self._saving, None
    self._reopen()
    # Other files of the same save may still be on their way; `wait` removes later ones.
    time.sleep(0.1)
    self._remove_unfinished()
    steps = self.steps()
    return CheckpointFailed(
      f"The checkpoint of step {step} could not be written to {self.folder} ({_why(error)}); "
      + (f"the last one there is of step {steps[-1]}." if steps else "there is none yet.")
    )

  def _read(self, step: int, like: Mapping[str, Any], optional: Collection[str]) -> Restored:
    """A checkpoint, or _Damaged."""
    note, sums = self._read_note(step)
    there = {k: tree for k, tree in like.items() if self._has(step, k, sums, optional)}
    for name, tree in there.items():
      self._check_structure(step, name, tree)
    args = {k: ocp.args.StandardRestore(tree) for k, tree in there.items()}
    trees = {}
    if args:
      with _damage():
        found = self._manager.restore(step, args=ocp.args.Composite(**args))
        trees = {name: found[name] for name in args}
    for name, tree in trees.items():
      if name in sums and checksum(tree) != sums[name]:
        raise _Damaged(f"the arrays of {name} are not those that were saved")
    return Restored(step, trees, note)

  def _has(self, step: int, name: str, sums: Mapping[str, int], optional: Collection[str]) -> bool:
    if (self.folder / str(step) / name).is_dir():
      return True
    if name in sums:
      raise _Damaged(f"{name} is missing")
    if name in optional:
      return False
    have = ", ".join(sorted(p.name for p in (self.folder / str(step)).iterdir() if p.is_dir()))
    raise CheckpointMismatch(
      f"The checkpoint of step {step} in {self.folder} holds no {name!r} (but {have}); it is of "
      "another kind of training: go on with the config that it was made with, or give another "
      "folder."
    )

  def _read_note(self, step: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The note as it was given, and checksums of items."""
    if not (self.folder / str(step)).is_dir():
      raise _Damaged("it is not there")
    with _damage():
      args = ocp.args.Composite(**{_NOTE: ocp.args.JsonRestore()})
      note = dict(self._manager.restore(step, args=args)[_NOTE])
      sums = note.pop(_SUMS, {})
      if _sum_of_note(note) != sums.get(_NOTE, _sum_of_note(note)):
        raise ValueError("its note is not the one that was saved")
    return note, sums

  def _check_structure(self, step: int, name: str, like: Any):
    """CheckpointMismatch unless names, shapes and dtypes are those of `like`."""
    with _damage():
      path: Any = self.folder / str(step) / name
      saved = named(ocp.StandardCheckpointHandler().metadata(path).tree)
      saved = {k: described(x) for k, x in saved.items()}
    wanted = {k: described(x) for k, x in named(like).items()}
    wrong = [
      f"{k} is {saved.get(k, 'missing')} instead of {wanted.get(k, 'missing')}"
      for k in dict.fromkeys([*wanted, *saved])
      if saved.get(k) != wanted.get(k)
    ]
    if wrong:
      more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
      raise CheckpointMismatch(
        f"The checkpoint of step {step} in {self.folder} is of another model: of {name}, "
        f"{'; '.join(wrong[:3])}{more}. Go on with the config that it was made with, or give "
        "another folder."
      )

  def _set_aside(self, step: int, why: str, used: int):
    path = self.folder / str(step)
    aside = path.with_name(f"damaged-{step}")
    count = 1
    while aside.exists():
      count += 1
      aside = path.with_name(f"damaged-{step}-{count}")
    _together("aside chosen")
    if jax.process_index() == 0:
      try:
        path.rename(aside)
      except OSError as e:
        raise CheckpointFailed(
          f"{path} is damaged ({why}) and cannot be renamed ({e.strerror}); move it away."
        ) from e
      self._say(
        f"The checkpoint of step {step} is damaged ({why}); training goes on from step {used}. "
        f"What is left of it is now {aside}: delete it if nobody wants it."
      )
    _together("aside")


def _sum_of_note(note: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(note, sort_keys=True).encode())


def _as_array(x: Any) -> Any:
  """What is saved of an array: of what all devices hold, one device's copy.

  Otherwise parts of several would be written, and if ever they differed, by a bit that a device
  rounded otherwise, the file would be that of no device, and count as damaged.
  """
  if isinstance(x, jax.Array) and x.is_fully_addressable and x.is_fully_replicated:
    return x.addressable_data(0)
  return x if hasattr(x, "dtype") else jnp.asarray(x)


def _like(x: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(x, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _together(where: str):
  """All processes get here before one goes on."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"hfjax checkpoints: {where}")


@contextlib.contextmanager
def _damage():
  """Errors of reading as _Damaged, except for those that say nothing of the files."""
  try:
    yield
  except MemoryError:
    raise
  except Exception as e:
    if "RESOURCE_EXHAUSTED" in str(e):
      raise
    raise _Damaged(_why(e)) from e


def _why(error: BaseException) -> str:
  """A short reason out of an error, which may be a page long."""
  while error.__cause__ is not None:
    error = error.__cause__
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = " ".join(str(error).split())
  if re.match("[A-Z_]+: ", text):  # of TensorStore: what failed, in what, in what, and why [where]
    if "expected=" in text:
      return "a file has another checksum"
    text = re.split(r" \[(?:os_error_code|tensorstore_spec|source)", text)[0].rsplit(": ", 1)[-1]
  if not isinstance(error, (ValueError, OSError)):
    text = f"{type(error).__name__}: {text}"
  return text if len(text) <= 160 else f"{text[:160]}..."


class _NotOfOrbax(logging.Filter):
  """Drops what Orbax logs: it tells each step and error, with tracebacks, which are raised too."""

  def filter(self, record: logging.LogRecord) -> bool:
    if record.name == "asyncio":  # which tells of all errors after the first
      trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
      return "orbax" not in record.getMessage() + trace
    return "orbax" not in Path(record.pathname).parts


@functools.cache
def _hush():
  """Keeps Orbax from writing to the user's terminal; what goes wrong is raised."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_NotOfOrbax())
  warnings.filterwarnings("ignore", module=r"orbax\.")
  # What it leaves behind when a file cannot be read or written.
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  before = sys.unraisablehook

  def hook(problem: Any):
    # Of reads that were given up because another one had failed.
    file = getattr(getattr(problem.object, "cr_code", None), "co_filename", "")
    closed = problem.object is None and str(problem.exc_value) == "Event loop is closed"
    if not closed and "orbax" not in Path(file).parts:
      before(problem)

  sys.unraisablehook = hook
