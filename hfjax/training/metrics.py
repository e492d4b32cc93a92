"""Metrics of training: JSON lines, TensorBoard, and Weights & Biases where it is asked for.

None of them can stop training: what cannot be written is told of once.
"""

import collections
import contextlib
import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

_RESERVED = ("step", "time")
_RETRY_S = 60.0  # after which TensorBoard gets a new file, if the last could not be written


class MetricsError(ValueError):
  """Metrics that were asked for cannot be had; its text is a sentence."""


class Metrics:
  """Where the figures of a run go.

  workdir: gets metrics.jsonl, and a folder `tensorboard`. wandb: name of a project, or None.
  config: told to Weights & Biases. say: takes sentences that the user must know, by default to the
  standard error. active: False where another process of the run writes them.
  Raises MetricsError if Weights & Biases is asked for and cannot be had.
  """

  def __init__(
    self,
    workdir: Path | str,
    tensorboard: bool = True,
    wandb: str | None = None,
    config: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
    active: bool = True,
  ):
    self._say = say or (lambda words: print(words, file=sys.stderr))
    self._told: set[str] = set()
    self._sinks: list[_Sink] = []
    if not active:
      return
    workdir = Path(workdir).expanduser()
    self._sinks.append(_Lines(workdir / "metrics.jsonl"))
    self._each(lambda sink: workdir.mkdir(parents=True, exist_ok=True))
    if tensorboard:
      self._sinks.append(_Board(workdir / "tensorboard"))
    if wandb is not None:
      self._sinks.append(_Wandb(wandb, workdir, config or {}))

  def write(self, step: int, values: Mapping[str, Any]):
    """One line of numbers, of any kind that float() takes; nan and infinities are words in it."""
    if wrong := [name for name in values if name in _RESERVED]:
      raise ValueError(f"A metric is called {wrong[0]!r}, as each line says; give another name.")
    numbers = {name: float(x) for name, x in values.items()}
    self._each(lambda sink: sink.write(int(step), numbers))

  def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "y x 3"]):
    """A picture, for TensorBoard and Weights & Biases."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
      raise ValueError(
        f"The image {name!r} is {pixels.dtype} {pixels.shape}; give uint8 [rows, columns, 3]."
      )
    self._each(lambda sink: sink.image(int(step), name, pixels))

  def resume(self, step: int):
    """Forgets what is of later steps than `step`, from which the run goes on."""
    self._each(lambda sink: sink.resume(int(step)))

  def close(self):
    """Everything is written, as far as it can be."""
    self._each(lambda sink: sink.close())

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *exception):
    self.close()

  def _each(self, call: Callable[["_Sink"], None]):
    for sink in self._sinks:
      try:
        call(sink)
      except Exception as e:
        if sink.name not in self._told:
          self._told.add(sink.name)
          why = getattr(e, "strerror", None) or " ".join(str(e).split())[:200]
          self._say(f"{sink.name} cannot be written ({why}); training goes on.")


class _Sink(Protocol):
  """One place for metrics; any error may be raised. name: for sentences."""

  name: str

  def write(self, step: int, values: Mapping[str, float]): ...
  def image(self, step: int, name: str, pixels: np.ndarray): ...
  def resume(self, step: int): ...
  def close(self): ...


class _Lines:
  """A file of JSON lines; what cannot be written waits until it can be."""

  def __init__(self, path: Path):
    self.name, self._path = str(path), path
    self._waiting: collections.deque[bytes] = collections.deque(maxlen=10_000)
    # Lines of later steps are to go before any are added; at first only what is no line.
    self._forget: float | None = math.inf

  def write(self, step: int, values: Mapping[str, float]):
    words = {k: x if math.isfinite(x) else str(x) for k, x in values.items()}
    row = {"step": step, "time": round(time.time(), 3), **words}
    self._waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
    self._flush()

  def image(self, step: int, name: str, pixels: np.ndarray):
    pass

  def resume(self, step: int):
    self._waiting = collections.deque((x for x in self._waiting if _until(x, step)), 10_000)
    self._forget = step
    self._drop()

  def close(self):
    self._flush()

  def _drop(self):
    """Leaves out lines of later steps, and what is no line, such as the half of one."""
    if self._forget is None:
      return
    part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
    try:
      if self._path.exists():
        with self._path.open("rb") as old, part.open("wb") as new:
          new.writelines(line for line in old if _until(line, self._forget))
          new.flush()
          os.fsync(new.fileno())
        part.replace(self._path)
      self._forget = None
    finally:
      part.unlink(missing_ok=True)

  def _flush(self):
    """All of what waits, or nothing."""
    if not self._waiting:
      return
    self._drop()
    with self._path.open("ab", buffering=0) as f:
      size = f.seek(0, os.SEEK_END)
      data = memoryview(b"".join(self._waiting))
      try:
        while data:
          data = data[f.write(data) :]
      except OSError:
        f.truncate(size)
        raise
    self._waiting.clear()


def _until(line: bytes, step: float) -> bool:
  """Whether this is a line of that step or one before."""
  try:
    return line.endswith(b"\n") and json.loads(line)["step"] <= step
  except (ValueError, KeyError, TypeError):
    return False


class _Board:
  """Files of TensorBoard.

  They are written at once: the writers of tensorboardX that have a thread wait for ever once it
  has died of a full disk.
  """

  def __init__(self, folder: Path):
    self.name, self._folder = f"{folder} (TensorBoard)", folder
    self._writer: EventsWriter | None = None
    self._purge: int | None = None
    self._suffix, self._retry_at = "", 0.0

  def write(self, step: int, values: Mapping[str, float]):
    self._add(step, [summary.scalar(name, x) for name, x in values.items()])

  def image(self, step: int, name: str, pixels: np.ndarray):
    self._add(step, [summary.image(name, pixels, dataformats="HWC")])

  def resume(self, step: int):
    self._purge = step + 1
    self._add(step, [])

  def close(self):
    writer, self._writer = self._writer, None
    if writer is not None:
      writer.close()

  def _add(self, step: int, summaries: list[Any]):
    if time.monotonic() < self._retry_at:
      return
    now = time.time()
    events = [Event(wall_time=now, step=step, summary=x) for x in summaries]
    if self._purge is not None:  # TensorBoard forgets what it has from this step on
      start = SessionLog(status=SessionLog.START)
      events.insert(0, Event(wall_time=now, step=self._purge, session_log=start))
    begun = self._writer is not None
    try:
      writer = self._writer or self._open()
      for event in events:
        writer.write_event(event)
      writer.flush()
      self._purge = None
    except OSError:
      # It may end in half an event, after which nothing would be read.
      self._retry_at = time.monotonic() + _RETRY_S
      with contextlib.suppress(OSError):
        self.close()
      if not begun:
        for path in self._folder.glob(f"*{self._suffix}"):
          path.unlink(missing_ok=True)
      raise

  def _open(self) -> EventsWriter:
    self._folder.mkdir(parents=True, exist_ok=True)
    # Names are of seconds, and a file of the same name would be lost.
    self._suffix = f".{os.getpid()}.{uuid.uuid4().hex[:8]}"
    self._writer = EventsWriter(str(self._folder / "events"), self._suffix)
    return self._writer


class _Wandb:
  """A run of Weights & Biases, the same one when training goes on."""

  name = "Weights & Biases"

  def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
    try:
      wandb: Any = importlib.import_module("wandb")  # optional
    except ImportError as e:
      raise MetricsError(
        "Weights & Biases is asked for, but wandb is not installed; `pip install wandb`, or leave "
        "it out."
      ) from e
    try:
      file = workdir / "wandb_run.txt"
      if not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
      self._image = wandb.Image
      self._run = wandb.init(
        project=project, dir=str(workdir), config=dict(config), id=file.read_text().strip(),
        resume="allow",
      )  # fmt: skip
    except Exception as e:
      raise MetricsError(
        f"Weights & Biases does not start ({' '.join(str(e).split())[:200]}); mend that, or leave "
        "it out."
      ) from e

  def write(self, step: int, values: Mapping[str, float]):
    self._run.log(dict(values), step=step)

  def image(self, step: int, name: str, pixels: np.ndarray):
    self._run.log({name: self._image(pixels)}, step=step)

  def resume(self, step: int):
    pass  # it takes no step twice

  def close(self):
    self._run.finish()
