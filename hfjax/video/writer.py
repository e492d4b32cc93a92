"""Videos that can be watched while they grow, and that a killed process leaves playable."""

import contextlib
import io
import os
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8

from hfjax.video.pixels import (
  SCALING,
  VideoError,
  as_rate,
  check_frames,
  check_size,
  check_target,
  unwritable,
)

_ENCODER: Literal["libx264"] = "libx264"
# Lest encoding hold up the model: at the same quality setting 2.1 to 2.6 times as fast as x264's
# own choice, on noise and on smooth motion, for 0.1 and 1.6 dB.
_PRESET = "veryfast"
_TABLE, _FREE = b"moof", b"free"  # types of boxes (ISO/IEC 14496-12)
_KEY_SECONDS = 5  # where players can begin; every 2 seconds made a moving picture 40 % larger
# Times are taken as they are, so that a fragment goes on where the one before it ended.
_FRAGMENT = {
  "movflags": "empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer",
  "use_editlist": "0",
  "avoid_negative_ts": "disabled",
}


class VideoWriter:
  """Writes H.264 (yuv420p, BT.709, limited range) to an MP4 file that grows in place.

  Each call of `write` appends one fragment. A process that is killed, or a disk that is full,
  leaves a file that plays up to the last fragment. Memory is constant at any length.

  Nothing is changed before the first frames come: then a file that was there is replaced.
  frames: how many are in the file.
  """

  def __init__(
    self,
    path: str | Path,
    width: int,
    height: int,
    fps: Fraction | float | str,
    crf: float = 18,
  ):
    """Opens the file, to which frames of that size are written.

    crf: quality, from 0 (without loss) to 51; 18 is hardly to be told from the source.
    Raises VideoError if the file cannot be written, ValueError for what no video can have.
    """
    check_size((width, height))
    if width % 2 or height % 2 or min(width, height) < 16:
      raise ValueError(
        f"Frames are {width} x {height} pixels; H.264 with yuv420p takes even numbers from 16 on."
      )
    if not 0 <= crf <= 51:
      raise ValueError(f"The quality is {crf!r}; crf goes from 0 (without loss) to 51.")
    self.path = check_target(path, ".mp4")
    self.width, self.height, self.fps, self.frames = width, height, as_rate(fps), 0
    self._stream = _open_stream(width, height, self.fps, crf)
    self._fragments = 0
    self._end = 0  # of the last whole fragment, in bytes
    self._broken = False
    self._file: BinaryIO | None
    try:
      # Not truncated yet, and without a buffer, which might fail when it is closed.
      self._file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
      raise unwritable(self.path, error) from error

  def write(self, frames: UInt8[np.ndarray, "t y x 3"]):
    """Appends frames as one fragment; when the call returns they are in the file.

    Raises VideoError when the disk takes no more, after which nothing can be written.
    """
    frames = check_frames(frames)
    if frames.shape[1:3] != (self.height, self.width):
      raise ValueError(
        f"Frames are {frames.shape[2]} x {frames.shape[1]} pixels, and the video is "
        f"{self.width} x {self.height}; give all frames the same size."
      )
    if self._file is None:
      raise VideoError(f"{self.path} is closed; open another writer for more frames.")
    if self._broken:
      raise VideoError(f"{self.path} ended when it could not be written; begin another video.")
    if not len(frames):
      return
    self._broken = True  # until all is in the file: the encoder cannot go back
    try:
      self._append(self._file, self._fragment(frames))
    except OSError as error:
      kept = f"The {self.frames} frames before are kept and play." if self.frames else ""
      raise unwritable(self.path, error, kept) from error
    except av.FFmpegError as error:
      raise VideoError(f"{self.path} cannot be encoded: {error}.") from error
    self.frames += len(frames)
    self._broken = False

  def close(self):
    """Ends the file, which is removed if it is empty."""
    if self._file is not None:
      self._file.close()
      self._file = None
      with contextlib.suppress(FileNotFoundError):  # somebody took it away
        if not self.path.stat().st_size:
          self.path.unlink()

  def __enter__(self) -> "VideoWriter":
    return self

  def __exit__(self, *exception):
    self.close()

  def _fragment(self, frames: np.ndarray) -> bytes:
    """A fragment of the file, the first one with the header in front.

    FFmpeg begins a fragment when the next frame comes; PyAV cannot make it do so earlier. A muxer
    for each fragment ends it with its last frame.
    """
    buffer = io.BytesIO()
    options = {**_FRAGMENT, "fragment_index": str(self._fragments + 1)}
    with av.open(buffer, "w", format="mp4", options=options) as muxer:
      track = muxer.add_stream_from_template(self._stream, opaque=True)
      muxer.start_encoding()
      header = buffer.tell()
      for i, pixels in enumerate(frames):
        packets = self._stream.encode(self._frame(pixels, self.frames + i))
        for packet in packets:
          packet.stream = track
          muxer.mux(packet)
    return buffer.getvalue()[header if self._fragments else 0 :]

  def _frame(self, pixels: np.ndarray, number: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame = frame.reformat(
      format="yuv420p",
      src_color_range=ColorRange.JPEG,
      dst_colorspace=Colorspace.ITU709,
      dst_color_range=ColorRange.MPEG,
      interpolation=SCALING,
    )
    frame.pts, frame.time_base = number, 1 / self.fps
    return frame

  def _append(self, file: BinaryIO, data: bytes):
    """Writes all bytes, or none that stay.

    Players give up a file that ends within a fragment's table. So it is called free space until all
    of the fragment is there.
    """
    if not self._fragments:
      file.truncate(0)
    file.seek(self._end)
    hidden = data[4:8] == _TABLE
    try:
      rest = memoryview(data[:4] + _FREE + data[8:] if hidden else data)
      while rest:
        rest = rest[file.write(rest) :]
      if hidden:
        file.seek(self._end + 4)
        file.write(_TABLE)
    except BaseException:
      file.truncate(self._end)
      raise
    self._end += len(data)
    self._fragments += 1


def _open_stream(width: int, height: int, fps: Fraction, crf: float) -> av.VideoStream:
  """An encoder that gives the bytes of each frame at once, and a stream that describes them."""
  if _ENCODER not in av.codecs_available:
    raise VideoError(
      f"This build of PyAV has no {_ENCODER}; install the wheel with `pip install av`."
    )
  container = av.open(io.BytesIO(), "w", format="mp4", options={"movflags": "empty_moov"})
  # As many threads on each machine, since each makes a slice of its own: the same bytes everywhere.
  options = {"crf": str(crf), "preset": _PRESET, "tune": "zerolatency", "threads": "4"}
  stream = container.add_stream(_ENCODER, rate=fps, options=options)
  stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
  context = stream.codec_context
  context.time_base = 1 / fps
  context.gop_size = max(1, round(_KEY_SECONDS * fps))
  context.color_range = ColorRange.MPEG
  context.colorspace = Colorspace.ITU709
  context.color_primaries = ColorPrimaries.BT709
  context.color_trc = ColorTrc.BT709
  container.start_encoding()
  return stream
