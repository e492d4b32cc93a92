"""Videos in, at the size and the frame rate that are wanted."""

import collections
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Colorspace
from jaxtyping import UInt8

from hfjax.video.pixels import (
  SCALING,
  Size,
  VideoError,
  as_rate,
  check_size,
  cover,
  cover_note,
  rate_text,
)

_UNSPECIFIED = 2  # a colour space, in FFmpeg's numbering
_HD_ROWS = 720


class Clip(NamedTuple):
  """Frames that were read, and how.

  fps: frames per second that they have now.
  notes: what was done with them, in words, as in `scaled from 64 x 32 to 32 x 16 pixels`.
  """

  frames: UInt8[np.ndarray, "t y x 3"]
  fps: Fraction
  notes: list[str]


class VideoReader:
  """Iterates over frames `[y x 3]` of a file, in constant memory.

  size, fps: columns and rows, and frames per second, that frames have.
  notes: what is done with them, in words; complete when all frames are read.
  """

  def __init__(
    self, path: str | Path, size: Size | None = None, fps: Fraction | float | str | None = None
  ):
    """Reads the first frame.

    size: frames are scaled to cover it, and what hangs over is cut off equally on both sides.
    fps: of the frames of the file, the nearest in time are taken.
    Raises VideoError if there is no video to be read.
    """
    if size is not None:
      check_size(size)
      size = (int(size[0]), int(size[1]))
    wanted = None if fps is None else as_rate(fps)
    self.path, self.notes = Path(path), list[str]()
    self._container = _open(self.path)
    try:
      self._stream = self._container.streams.video[0]
      self._stream.thread_type = "AUTO"
      self._aspect = float(self._stream.sample_aspect_ratio or 1)
      rate = self._stream.average_rate or self._stream.guessed_rate
      self._rate = Fraction(rate) if rate else wanted or Fraction(25)
      decoded = self._decode()
      first = next(decoded, None)
      if first is None:
        raise VideoError(f"{self.path} holds no frame; give another video.")
    except BaseException:
      self._container.close()
      raise
    pixels = self._pixels(first[1])
    source = (pixels.shape[1], pixels.shape[0])
    self.size, self.fps = size or source, wanted or self._rate
    if note := cover_note(source, self.size, self._aspect if size else 1):
      self.notes.append(note)
    if self.fps != self._rate:
      rates = f"{rate_text(self._rate)} to {rate_text(self.fps)}"
      self.notes.append(f"resampled from {rates} frames per second")
    timed = itertools.chain([first], decoded)
    self._taken = _nearest(timed, wanted, 1 / self._rate) if wanted else (f for _, f in timed)

  def __iter__(self) -> Iterator[UInt8[np.ndarray, "y x 3"]]:
    return self

  def __next__(self) -> UInt8[np.ndarray, "y x 3"]:
    return cover(self._pixels(next(self._taken)), self.size, self._aspect)

  def __enter__(self) -> "VideoReader":
    return self

  def __exit__(self, *exception):
    self._container.close()

  def _decode(self) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Frames and their times in seconds, from the first one on."""
    start, count = None, 0
    try:
      for frame in self._container.decode(self._stream):
        time = frame.pts * frame.time_base if frame.pts is not None else count / self._rate
        start = time if start is None else start
        yield time - start, frame
        count += 1
    except (av.FFmpegError, OSError) as error:
      if not count:
        raise VideoError(f"{self.path} cannot be decoded: {error.strerror}.") from error
      self.notes.append(f"damaged: only the first {count} frames of the file can be read")

  def _pixels(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "y x 3"]:
    """A frame upright.

    Colours are what the frame says of itself, or else BT.601 in small frames, BT.709 in large ones.
    """
    guess = frame.colorspace == _UNSPECIFIED and frame.height >= _HD_ROWS
    space = Colorspace.ITU709 if guess else None
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=space, interpolation=SCALING)
    return np.rot90(pixels, round(frame.rotation / 90) % 4)


def read_video(
  path: str | Path,
  size: Size | None = None,
  fps: Fraction | float | str | None = None,
  frames: int | None = None,
  from_end: bool = False,
) -> Clip:
  """Reads a video into memory: all of it, or its first or last `frames`, or as many as it has.

  size, fps: as in `VideoReader`, whose errors are raised too.
  from_end: takes the last frames, of which `frames` must say how many; all are decoded.
  """
  if frames is not None and frames < 1:
    raise ValueError(f"{frames} frames are wanted; give 1 or more, or None for all.")
  if from_end and frames is None:
    raise ValueError("The last frames are wanted; say how many.")
  with VideoReader(path, size, fps) as reader:
    kept = collections.deque(reader, frames) if from_end else list(itertools.islice(reader, frames))
    return Clip(np.stack(kept), reader.fps, reader.notes)


def frames_of(
  path: str | Path,
  size: Size | None = None,
  fps: Fraction | float | str | None = None,
  length: int = 16,
) -> Iterator[UInt8[np.ndarray, "t y x 3"]]:
  """Yields a video in pieces of `length` frames, the last one perhaps shorter.

  size, fps: as in `VideoReader`, whose errors are raised too.
  """
  with VideoReader(path, size, fps) as reader:
    while piece := list(itertools.islice(reader, length)):
      yield np.stack(piece)


def _open(path: Path):
  if path.is_dir():
    raise VideoError(f"{path} is a folder; give a video file.")
  try:
    container = av.open(str(path), metadata_errors="replace")  # titles are not of interest
  except FileNotFoundError as error:
    raise VideoError(f"{path} is not there; give a video file.") from error
  except PermissionError as error:
    raise VideoError(f"{path} may not be read; change its permissions.") from error
  except (av.FFmpegError, OSError) as error:
    raise VideoError(
      f"{path} cannot be read as a video; give MP4, WebM, GIF or the like."
    ) from error
  if not container.streams.video:
    what = "only sound" if container.streams.audio else "no video"
    container.close()
    raise VideoError(f"{path} has {what}; give a file with pictures.")
  return container


def _nearest(
  timed: Iterator[tuple[Fraction, av.VideoFrame]], fps: Fraction, duration: Fraction
) -> Iterator[av.VideoFrame]:
  """For each time 0, 1 / fps, 2 / fps and so on, the frame that is nearest; the earlier of two.

  duration: of the last frame, in seconds.
  """
  time, held = next(timed)
  count = 0
  for later, frame in timed:
    while count / fps <= (time + later) / 2:
      yield held
      count += 1
    time, held = later, frame
  while count / fps < time + duration:
    yield held
    count += 1
