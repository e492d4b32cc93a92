"""What is seen of training: a line that moves on a terminal, and now and then one elsewhere."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
  """Step, losses, speed and time left.

  total, initial: steps of the run, and those made before. quiet: shows nothing. samples: in a
  step, of all devices. warmup: first updates that do not count for the speed, as programs are
  compiled in them. every_s: seconds between lines where the output is no terminal. stream: the
  standard error by default. clock: seconds.
  """

  def __init__(
    self,
    total: int,
    initial: int = 0,
    quiet: bool = False,
    *,
    samples: int = 1,
    warmup: int = 2,
    every_s: float = 30.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self.total, self.step, self.samples = total, initial, samples
    self._stream = sys.stderr if stream is None else stream
    self._clock, self._every, self._quiet = clock, every_s, quiet
    self._paused = 0.0
    self._warmup, self._updates = warmup, 0
    # Of the last updates: what training does now and what it did hours ago may differ.
    self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=100)
    self._text, self._shown, self._next = "", initial, -float("inf")
    moves = not quiet and self._stream.isatty()
    self._bar: Any = None
    if moves:
      self._bar = tqdm(
        total=total, initial=initial, file=self._stream, dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt}{postfix}",
      )  # fmt: skip

  @property
  def steps_per_s(self) -> float | None:
    """Of the last hundred updates, without pauses; None until it can be told."""
    if len(self._marks) < 2:
      return None
    (before, first), (now, last) = self._marks[0], self._marks[-1]
    return (last - first) / (now - before) if now > before else None

  def figures(self) -> dict[str, float]:
    """Speed by name, for metrics; empty until it can be told."""
    speed = self.steps_per_s
    if speed is None:
      return {}
    return {
      "step_seconds": 1 / speed,
      "steps_per_second": speed,
      "samples_per_second": speed * self.samples,
    }

  def update(self, step: int, losses: Mapping[str, float]):
    """So many steps are made."""
    self._updates += 1
    if self._updates >= self._warmup:
      self._marks.append((self._clock() - self._paused, step))
    done, self.step = step - self.step, step
    parts = [f"{name} {float(value):.4g}" for name, value in losses.items()]
    if speed := self.steps_per_s:
      parts += [f"{speed:.3g} steps/s", f"{speed * self.samples:.3g} samples/s"]
      parts += [f"{tqdm.format_interval((self.total - step) / speed)} left"]
    self._text = ", ".join(parts)
    if self._bar is not None:
      with self._safely():
        self._bar.set_postfix_str(self._text, refresh=False)
        self._bar.update(done)
    elif self._clock() >= self._next:
      self._next = self._clock() + self._every
      self._line()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around what is no training, such as making samples: it does not count for the speed."""
    before = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - before

  def say(self, words: str):
    """A line of its own, quiet or not."""
    with self._safely():
      if self._bar is not None:
        self._bar.write(words, file=self._stream)
      else:
        print(words, file=self._stream, flush=True)

  def close(self):
    """The last state is seen."""
    if self._bar is not None:
      with self._safely():
        self._bar.refresh()
        self._bar.close()
      self._bar = None
    elif self._shown != self.step:
      self._line()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exception):
    self.close()

  def _line(self):
    self._shown = self.step
    if not self._quiet:
      with self._safely():
        text = f", {self._text}" if self._text else ""
        print(f"step {self.step}/{self.total}{text}", file=self._stream, flush=True)

  def _safely(self) -> contextlib.AbstractContextManager:
    """A terminal that is gone does not end training."""
    return contextlib.suppress(OSError, ValueError)
