"""Images in and out, contact sheets, and GIFs."""

import io
import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from hfjax.video.pixels import (
  Size,
  VideoError,
  as_rate,
  check_frames,
  check_size,
  check_target,
  cover,
  write_bytes,
)

MIN_SIDE = 16  # pixels: a token of the transformer
_GIF_RATE = 50  # players slow down what is faster
_GAP_SHADE = 24
_PALETTE_FRAMES = 16
# Levels from -15 to 15 in the order of Bayer, about the distance of colours in a palette of 256.
_DITHER = 2 * np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 15


def read_image(path: str | Path, size: Size | None = None) -> UInt8[np.ndarray, "y x 3"]:
  """Reads an image upright, as RGB; transparency is laid over white.

  size: columns and rows; the image is scaled to cover it and cropped equally on both sides.
  Of an animation the first frame is taken, and of 16 bits the upper 8.
  Raises VideoError if it cannot be read, or has a side of less than 16 pixels.
  """
  if size is not None:
    check_size(size)
    size = (int(size[0]), int(size[1]))
  path = Path(path)
  if path.is_dir():
    raise VideoError(f"{path} is a folder; give an image file.")
  try:
    with Image.open(path) as image:
      pixels = np.asarray(_as_rgb(ImageOps.exif_transpose(image)))
  except FileNotFoundError as error:
    raise VideoError(f"{path} is not there; give an image file.") from error
  except PermissionError as error:
    raise VideoError(f"{path} may not be read; change its permissions.") from error
  except Image.DecompressionBombError as error:
    raise VideoError(f"{path} has too many pixels; scale it down before.") from error
  # Broken files make decoders raise almost anything.
  except Exception as error:
    raise VideoError(
      f"{path} cannot be read as an image; give PNG, JPEG, WebP or the like, and a whole file."
    ) from error
  rows, columns = pixels.shape[:2]
  if min(rows, columns) < MIN_SIDE:
    raise VideoError(
      f"{path} is {columns} x {rows} pixels; give an image of at least {MIN_SIDE} x {MIN_SIDE}."
    )
  return cover(pixels, size) if size else pixels


def _as_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
    levels = np.clip(np.asarray(image).astype(np.int32), 0, 65535) // 256
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
  if image.mode == "F":
    raise ValueError("floating point has no range")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def write_image(path: str | Path, frame: UInt8[np.ndarray, "y x 3"]):
  """Writes a PNG file; raises VideoError if it cannot be written."""
  path = check_target(path, ".png")
  buffer = io.BytesIO()
  Image.fromarray(check_frames(np.asarray(frame)[None])[0]).save(buffer, "png", optimize=True)
  write_bytes(path, buffer.getvalue())


def contact_sheet(
  frames: UInt8[np.ndarray, "t y x 3"], columns: int = 4, rows: int = 4, width: int = 1280
) -> UInt8[np.ndarray, "u v 3"]:
  """Evenly spaced frames, from the first to the last, in rows on one image.

  columns, rows: of the sheet at most; fewer frames make fewer rows.
  width: of the sheet in pixels.
  """
  frames = check_frames(frames)
  if not len(frames):
    raise ValueError("A contact sheet got no frames; give one or more.")
  count = min(len(frames), columns * rows)
  columns = min(columns, count)
  gap = max(2, width // 320)
  cell = (width - gap * (columns + 1)) // columns
  if cell < 1:
    raise ValueError(f"{columns} frames do not fit side by side into {width} pixels; widen it.")
  size = (cell, max(1, round(cell * frames.shape[1] / frames.shape[2])))
  lines = -(-count // columns)
  sheet = np.full((gap + lines * (size[1] + gap), width, 3), _GAP_SHADE, np.uint8)
  for i, number in enumerate(np.linspace(0, len(frames) - 1, count).round().astype(int)):
    line, column = divmod(i, columns)
    top, left = gap + line * (size[1] + gap), gap + column * (cell + gap)
    sheet[top : top + size[1], left : left + cell] = cover(frames[number], size)
  return sheet


def write_gif(path: str | Path, frames: UInt8[np.ndarray, "t y x 3"], fps: Fraction | float | str):
  """Writes a GIF that repeats for ever, with one palette for all frames.

  Players show no more than 50 frames per second; faster ones are slowed down to that.
  Meant for short previews: a copy of the frames is held.
  Raises VideoError if it cannot be written.
  """
  path, frames = check_target(path, ".gif"), check_frames(frames)
  rate = min(as_rate(fps), Fraction(_GIF_RATE))
  if not len(frames):
    raise ValueError("A GIF got no frames; give one or more.")
  buffer = io.BytesIO()
  first, *rest = _with_palette(frames)
  ends = [round(100 * i / rate) for i in range(len(frames) + 1)]  # GIF counts hundredths of seconds
  durations = [10 * (end - start) for start, end in itertools.pairwise(ends)]
  first.save(buffer, "gif", save_all=True, append_images=rest, duration=durations, loop=0)
  write_bytes(path, buffer.getvalue())


def _with_palette(frames: UInt8[np.ndarray, "t y x 3"]) -> list[Image.Image]:
  """Frames in 256 colours, those of some of them.

  Dithering is ordered: its pattern lies still, which makes a third of the bytes that error
  diffusion makes.
  """
  some = frames[:: -(-len(frames) // _PALETTE_FRAMES), ::2, ::2]
  palette = Image.fromarray(np.concatenate(some)).quantize(256, Image.Quantize.MEDIANCUT)
  rows, columns = frames.shape[1:3]
  pattern = np.tile(_DITHER, (-(-rows // 4), -(-columns // 4)))[:rows, :columns, None]
  dithered = (np.clip(frame + pattern, 0, 255).astype(np.uint8) for frame in frames)
  return [Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE) for x in dithered]
