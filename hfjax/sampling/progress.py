"""What the user sees while videos are made, and the figures that remain."""

import contextlib
import json
import queue
import resource
import signal
import sys
import threading
import time
from fractions import Fraction
from typing import Any, TextIO

import jax
from tqdm import tqdm


class Stop:
  """Whether the user has asked to stop, by Ctrl-C or SIGTERM; a second one stops at once.

  begun: whether there is anything to be ended well; until then the first one stops at once.
  """

  def __init__(self):
    self.asked = self.begun = False

  def __enter__(self) -> "Stop":
    self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *exception):
    for number, handler in self.before.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    if self.asked or not self.begun:
      raise KeyboardInterrupt
    self.asked = True
    print("\nStopping after this chunk; once more stops at once.", file=sys.stderr, flush=True)


class DeviceClock:
  """How long the device takes for latents and for decoding them, without the first two chunks.

  Those wait for compilation: the decoder's first chunk is a program of its own.

  It waits for both in a thread of its own, so that whoever makes chunks need not wait. The device
  does one thing after the other: a chunk's latents are begun when the frames before are done, or
  when they are asked for, if that is later.
  """

  def __init__(self):
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._chunks = 0
    self.total = (0, 0.0, 0.0)  # frames, seconds of latents and of decoding, of all that count
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def watch(self, asked: float, latents: Any, frames: Any):
    """Takes a chunk that was asked for at `asked`, by time.perf_counter.

    latents: None if they were there before.
    """
    self._queue.put((asked, latents, frames))

  def _watch(self):
    free = 0.0
    while (item := self._queue.get()) is not None:
      asked, latents, frames = item
      item = None
      with contextlib.suppress(Exception):  # whoever uses the chunk will see it
        begun = made = max(free, asked)
        if latents is not None:
          jax.block_until_ready(latents)
          made = time.perf_counter()
        jax.block_until_ready(frames)
        free = time.perf_counter()
        self._chunks += 1
        if self._chunks > 2:
          count, making, decoding = self.total
          count += frames.shape[1]
          self.total = count, making + made - begun, decoding + free - made
      del latents, frames

  def close(self):
    """Waits for all that was taken."""
    self._queue.put(None)
    self._thread.join()


class Progress:
  """Chunk, length, speed and time left, on one line; and a JSON line for each chunk."""

  def __init__(
    self, name: str, total: int | None, fps: Fraction, log: TextIO | None, quiet: bool, videos: int
  ):
    self.fps, self.log, self.videos, self.chunks, self.frames = fps, log, videos, 0, 0
    self.start = time.perf_counter()
    self.marks: list[tuple[float, int]] = []  # seconds and frames after each chunk: see `add`
    self.denoising_s: float | None = None  # of a clip whose latents are made all at once
    self.clock = DeviceClock()
    self.bar = tqdm(total=total, unit=" frames", desc=name[:32], disable=quiet)

  def watch(self, asked: float, latents: Any, frames: Any):
    """See `DeviceClock`; frames: `[b t y x 3]`."""
    self.clock.watch(asked, latents, frames)

  def add(self, frames: int):
    """So many more frames are in the file."""
    now = time.perf_counter() - self.start
    self.chunks += 1
    self.frames += frames
    # Of the first, of the second, and of the last chunk.
    self.marks = [*self.marks[:2], (now, self.frames)]
    video = float(self.frames / self.fps)
    dit, _ = self._speeds()
    self.bar.update(frames)
    whole = self._speed()
    self.bar.set_postfix_str(
      f"chunk {self.chunks}, {video:.1f} s of video"
      + (f", transformer {dit:.1f} FPS" if dit else "")
      + (f", pixels {whole:.1f} FPS, {whole / self.fps:.2f} x real time" if whole else "")
    )
    if self.log is not None:
      row = {
        "chunk": self.chunks,
        "frames": self.frames,
        "wall_s": round(now, 4),
        "transformer_fps": dit and round(dit, 3),
        "pixels_fps": whole and round(whole, 3),
      }
      self.log.write(json.dumps(row) + "\n")
      self.log.flush()

  def _speed(self) -> float | None:
    """Frames per second in the file, without two chunks, which wait for compilation."""
    if len(self.marks) < 3:
      return None
    _, (first, before), (last, after) = self.marks
    return self.videos * (after - before) / (last - first) if after > before else None

  def _speeds(self) -> tuple[float | None, float | None]:
    """Frames per second of transformer and decoder, of all videos together."""
    frames, *seconds = self.clock.total
    dit, decoder = (self.videos * frames / s if s > 0 else None for s in seconds)
    if self.denoising_s is not None:
      dit = self.videos * self.frames / self.denoising_s
    return dit, decoder

  def figures(self) -> dict[str, Any]:
    """Figures of the whole: frames per second of all videos together."""
    self.clock.close()
    stats = jax.devices()[0].memory_stats() or {}
    dit, decoder = self._speeds()
    rounded = lambda x: x and round(x, 3)
    first, last = self.marks[0][0], self.marks[-1][0]
    speed = self._speed()
    return {
      "frames": self.frames,
      "first_chunk_s": round(first, 3),
      "transformer_frames_per_second": rounded(dit),
      "decoder_frames_per_second": rounded(decoder),
      "frames_per_second": rounded(speed),
      "times_real_time": rounded(speed and speed / float(self.videos * self.fps)),
      "total_s": round(last, 3),
      "peak_bytes": stats.get("peak_bytes_in_use"),
      "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10,
    }

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exception):
    self.bar.close()
    self.clock.close()
