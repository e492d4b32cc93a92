"""A few small frames of a video of any length."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from hfjax.video.pictures import contact_sheet, write_gif, write_image
from hfjax.video.pixels import as_rate, check_frames, cover

_MIN_RATE = 8  # frames per second of a GIF, lest it look like slides


class Preview:
  """Keeps evenly spaced frames of a stream: every one at first, then every second, fourth...

  stride: frames of the stream from one that is kept to the next.
  Memory is constant; of more than `capacity` frames, at least half as many are kept.
  """

  def __init__(self, capacity: int = 64, width: int = 320):
    """Keeps nothing yet.

    capacity: frames kept at most.
    width: of those frames in pixels, unless the stream's are smaller.
    """
    if capacity < 2 or width < 1:
      raise ValueError(
        f"A preview of {capacity} frames of {width} pixels is wanted; give 2 and 1 or more."
      )
    self.capacity, self.width, self.stride = capacity, width, 1
    self._count = 0  # frames of the stream so far
    self._kept: list[np.ndarray] = []

  def add(self, frames: UInt8[np.ndarray, "t y x 3"]):
    """Takes the next frames of the stream."""
    frames = check_frames(frames)
    for number, frame in enumerate(frames, self._count):
      if number % self.stride == 0 and len(self._kept) == self.capacity:
        self._kept = self._kept[::2]
        self.stride *= 2
      if number % self.stride == 0:
        self._kept.append(self._small(frame))
    self._count += len(frames)

  @property
  def numbers(self) -> list[int]:
    """Which frames of the stream are kept."""
    return [i * self.stride for i in range(len(self._kept))]

  @property
  def frames(self) -> UInt8[np.ndarray, "t y x 3"]:
    """What is kept; raises ValueError before the first frame."""
    if not self._kept:
      raise ValueError("The preview has got no frames; add some first.")
    return np.stack(self._kept)

  def sheet(self, columns: int = 4, rows: int = 4, width: int = 1280) -> np.ndarray:
    """A contact sheet `[y x 3]` of what is kept, which is not made larger."""
    frames = self.frames
    return contact_sheet(frames, columns, rows, min(width, columns * frames.shape[2]))

  def write(self, stem: str | Path, fps: Fraction | float | str) -> tuple[Path, Path]:
    """Writes a contact sheet and a GIF, to `stem.png` and `stem.gif`, and says where.

    fps: of the stream. A GIF of a longer one plays faster than it, as there are 8 frames per second
    or more.
    """
    png, gif = Path(f"{stem}.png"), Path(f"{stem}.gif")
    write_image(png, self.sheet())
    write_gif(gif, self.frames, max(as_rate(fps) / self.stride, Fraction(_MIN_RATE)))
    return png, gif

  def _small(self, frame: np.ndarray) -> np.ndarray:
    rows, columns = frame.shape[:2]
    width = min(self.width, columns)
    # A copy, lest a view hold the whole chunk.
    return cover(frame, (width, max(1, round(rows * width / columns)))).copy()
