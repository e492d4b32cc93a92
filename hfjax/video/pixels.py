"""What videos and images have in common: pixels as bytes, sizes, paths, and refusals."""

import errno
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.video.reformatter import Interpolation
from jaxtyping import UInt8
from PIL import Image

# swscale's fast conversion to RGB, which is its default, darkens by 1 to 1.5 levels.
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
Size = tuple[int, int]  # columns and rows, as in 832 x 480


class VideoError(ValueError):
  """A video or image that cannot be read or written; its text is a sentence for the user."""


def check_frames(frames) -> UInt8[np.ndarray, "t y x 3"]:
  """Frames as a NumPy array; raises ValueError unless they are uint8 `[t y x 3]`."""
  frames = np.asarray(frames)
  if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
    raise ValueError(
      f"Frames have shape {frames.shape} and dtype {frames.dtype}; give uint8 [frames, rows, "
      "columns, 3]. `to_uint8` makes bytes of pixels in [-1, 1]."
    )
  return frames


def check_size(size: Size):
  """Raises ValueError unless `size` is columns and rows, whole and positive."""
  try:
    fits = len(size) == 2 and all(n > 0 and n == int(n) for n in size)
  except (TypeError, ValueError):
    fits = False
  if not fits:
    raise ValueError(f"The size is {size!r}; give columns and rows, as in (832, 480).")


def as_rate(fps: Fraction | float | str) -> Fraction:
  """Frames per second as a fraction with a denominator up to 1001; ValueError if there are none."""
  try:
    rate = Fraction(fps).limit_denominator(1001)
  except (TypeError, ValueError, OverflowError, ZeroDivisionError):
    rate = Fraction(0)
  if not 0 < rate <= 1000:
    raise ValueError(f"The frame rate is {fps!r}; give frames per second, above 0 and up to 1000.")
  return rate


def rate_text(fps: Fraction) -> str:
  """`16`, or `29.97`."""
  return f"{float(fps):.6g}"


def check_target(path: str | Path, suffix: str) -> Path:
  """The path of a file to be written; raises VideoError unless it ends in `suffix` in a folder."""
  path = Path(path)
  if path.is_dir():
    raise VideoError(f"{path} is a folder; give the name of a {suffix} file.")
  if path.suffix.lower() != suffix:
    raise VideoError(f"{path} does not end in {suffix}, which is what is written; rename it.")
  if not path.parent.is_dir():
    raise VideoError(f"{path.parent} is no folder; make it, or write {path.name} elsewhere.")
  return path


def unwritable(path: Path, error: OSError, kept: str = "") -> VideoError:
  """Says why a file could not be written, what is kept of it, and what to do.

  kept: a sentence.
  """
  why = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "Files may not be larger",
  }.get(error.errno or 0, error.strerror or str(error))
  return VideoError(" ".join(f"{why}: {path} cannot be written. {kept} Write elsewhere.".split()))


def write_bytes(path: Path, data: bytes):
  """Writes a small file; raises VideoError where it cannot be."""
  try:
    path.write_bytes(data)
  except OSError as error:
    raise unwritable(path, error) from error


def cover(
  image: UInt8[np.ndarray, "y x 3"], size: Size, aspect: float = 1.0
) -> UInt8[np.ndarray, "u v 3"]:
  """The image scaled to cover `size`, and what hangs over on two sides cut off equally.

  aspect: width of a pixel by its height.
  """
  box = _covering_box(image.shape[1], image.shape[0], size, aspect)
  if box == (0, 0, *size):
    return image
  return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS, box))


def cover_note(source: Size, size: Size, aspect: float = 1.0) -> str | None:
  """What `cover` does with an image of `source` columns and rows, in words."""
  left, top, right, bottom = _covering_box(*source, size, aspect)
  kept = round(right - left), round(bottom - top)
  cut = f"cropped from {source[0]} x {source[1]} to {kept[0]} x {kept[1]} pixels"
  if kept == size:
    return cut if kept != source else None
  scaled = f"scaled from {kept[0]} x {kept[1]} to {size[0]} x {size[1]} pixels"
  return scaled if kept == source else f"{cut}, and {scaled}"


def _covering_box(
  columns: int, rows: int, size: Size, aspect: float
) -> tuple[float, float, float, float]:
  """Left, top, right and bottom of the largest part in the middle with the shape of `size`."""
  shape = size[0] / size[1] / aspect
  width, height = min(columns, rows * shape), min(rows, columns / shape)
  left, top = (columns - width) / 2, (rows - height) / 2
  return left, top, left + width, top + height
