"""Videos and images written and read back: colours, times, killed writers, full disks."""

import contextlib
import os
import resource
import signal
import struct
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hfjax.video import (
  Preview,
  VideoError,
  VideoReader,
  VideoWriter,
  frames_of,
  read_video,
  to_uint8,
  write_image,
)

ROOT = Path(__file__).resolve().parents[1]
PATCHES = np.array(
  [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 30, 60), (128, 128, 128), (255, 255, 255)], np.uint8
)


def moving(count: int, start: int = 0, width: int = 64, height: int = 48) -> np.ndarray:
  """Frames whose shade says their number: 3 levels each, from 10."""
  shades = (10 + 3 * np.arange(start, start + count)) % 240
  return np.broadcast_to(
    shades[:, None, None, None].astype(np.uint8), (count, height, width, 3)
  ).copy()


def numbers(frames: np.ndarray) -> list[int]:
  """The numbers of `moving` frames."""
  return np.rint((frames.mean((1, 2, 3)) - 10) / 3).astype(int).tolist()


def write(path: Path, count: int, fps=16, chunk: int = 12, **size: int) -> Path:
  frames = moving(count, **size)
  with VideoWriter(path, frames.shape[2], frames.shape[1], fps) as writer:
    for i in range(0, count, chunk):
      writer.write(frames[i : i + chunk])
  return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
  """60 frames at 30 frames per second."""
  return write(tmp_path_factory.mktemp("video") / "clip.mp4", 60, fps=30)


# Writing


@pytest.mark.parametrize("fps", [16, 24.0, Fraction(30000, 1001), "24000/1001", 0.5])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_counts_rates_and_durations(tmp_path, fps, chunk):
  path = write(tmp_path / "a.mp4", 33, fps, chunk)
  rate = Fraction(fps)
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    assert stream.average_rate == rate
    # Times are in ticks of the file.
    assert stream.duration * stream.time_base == pytest.approx(33 / rate, abs=1e-3)
    times = [frame.time for frame in container.decode(stream)]
  np.testing.assert_allclose(times, np.arange(33) / float(rate), atol=1e-3)
  clip = read_video(path)
  assert clip.fps == rate and clip.notes == []
  assert numbers(clip.frames) == list(range(33))


def test_format_and_tags(clip):
  with av.open(str(clip)) as container:
    context = container.streams.video[0].codec_context
    assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
    assert tags == (1, 1, 1, 1)  # BT.709 and limited range, in FFmpeg's numbering
    keys = [p.pts * p.time_base for p in container.demux(video=0) if p.pts is not None]
    assert keys == sorted(keys)
  assert b"colrnclx" in clip.read_bytes()


@pytest.mark.parametrize("colour", PATCHES.tolist())
def test_colours_survive(tmp_path, colour):
  path = tmp_path / "a.mp4"
  with VideoWriter(path, 64, 64, 16) as writer:
    writer.write(np.full((5, 64, 64, 3), colour, np.uint8))
  frames = read_video(path).frames
  np.testing.assert_allclose(frames, np.broadcast_to(colour, frames.shape), atol=2)
  with av.open(str(path)) as container:
    luma = next(container.decode(video=0)).to_ndarray()[:64].mean()
  assert luma == pytest.approx(16 + 219 / 255 * np.dot([0.2126, 0.7152, 0.0722], colour), abs=1.5)


def test_nothing_darkens(tmp_path):
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
  picture = np.asarray(small.resize((128, 96), Image.Resampling.BICUBIC))
  path = tmp_path / "a.mp4"
  with VideoWriter(path, 128, 96, 16) as writer:
    writer.write(np.stack([picture] * 4))
  error = read_video(path).frames.astype(int) - picture
  assert np.abs(error.mean((0, 1, 2))).max() < 0.3
  assert np.abs(error).mean() < 3


def test_frames_are_there_after_each_write(tmp_path):
  path = tmp_path / "a.mp4"
  with VideoWriter(path, 64, 48, 16) as writer:
    for i in range(3):
      writer.write(moving(5, 5 * i))
      writer.write(moving(0))
      assert writer.frames == 5 * i + 5
      assert numbers(read_video(path).frames) == list(range(5 * i + 5))


def test_seeking_finds_later_frames(tmp_path):
  path = write(tmp_path / "a.mp4", 90)
  with av.open(str(path)) as container:
    container.seek(5_500_000)
    assert 0.5 <= next(container.decode(video=0)).time <= 5.5  # key frames are 5 seconds apart


def test_an_exception_leaves_what_was_written(tmp_path):
  path = tmp_path / "a.mp4"
  with contextlib.suppress(KeyboardInterrupt), VideoWriter(path, 64, 48, 16) as writer:
    writer.write(moving(9))
    raise KeyboardInterrupt
  assert len(read_video(path).frames) == 9
  with pytest.raises(VideoError, match=r"a\.mp4 is closed; open another"):
    writer.write(moving(1))
  writer.close()


def test_a_file_is_replaced_by_the_first_frames_only(tmp_path):
  path = write(tmp_path / "a.mp4", 40)
  before = path.read_bytes()
  with VideoWriter(path, 32, 32, 8):
    pass
  assert path.read_bytes() == before
  write(path, 3)
  assert len(read_video(path).frames) == 3
  with VideoWriter(tmp_path / "none.mp4", 32, 32, 8):
    pass
  assert not (tmp_path / "none.mp4").exists()


KILLED = """
import sys
import numpy as np
from hfjax.video import VideoWriter
writer = VideoWriter(sys.argv[1], 64, 48, 16)
while True:
  shades = (10 + 3 * np.arange(writer.frames, writer.frames + 12)) % 240
  frames = np.broadcast_to(shades[:, None, None, None].astype(np.uint8), (12, 48, 64, 3))
  writer.write(frames)
  print(writer.frames, flush=True)
"""


def test_a_killed_process_leaves_all_finished_chunks(tmp_path):
  path = tmp_path / "a.mp4"
  with subprocess.Popen(
    [sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  ) as process:
    for _ in range(5):
      written = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    written = max([written, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
  assert process.returncode == -signal.SIGKILL
  frames = read_video(path).frames
  assert len(frames) >= written >= 60
  assert numbers(frames[:60]) == list(range(60))


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> tuple[Path, list[int]]:
  """A video of six chunks of 4 frames, and its size after each."""
  path = tmp_path_factory.mktemp("growing") / "a.mp4"
  with VideoWriter(path, 64, 48, 16) as writer:
    sizes = []
    for i in range(6):
      writer.write(moving(4, 4 * i))
      sizes.append(path.stat().st_size)
  return path, sizes


class Recorder:
  """A file that remembers what was written where."""

  def __init__(self, file):
    self.file, self.writes = file, []

  def write(self, data):
    self.writes.append((self.file.tell(), bytes(data)))
    return self.file.write(data)

  def __getattr__(self, name):
    return getattr(self.file, name)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """What is written where for a video of six chunks of 4 frames, and a place for files."""
  path = tmp_path_factory.mktemp("recorded") / "a.mp4"
  with VideoWriter(path, 64, 48, 16) as writer:
    recorder = writer._file = Recorder(writer._file)
    for i in range(6):
      writer.write(moving(4, 4 * i))
  return recorder.writes, path.with_name("part.mp4")


@given(data=st.data())
@settings(max_examples=100)
def test_whenever_a_process_is_killed_all_finished_chunks_play(recorded, data):
  """After any number of bytes that were written, within a fragment's table too."""
  writes, part = recorded
  left = data.draw(st.integers(len(writes[0][1]), sum(len(x) for _, x in writes)))
  content, done = bytearray(), 0
  for at, x in writes:
    done += len(x) <= left
    content[at : at + min(len(x), left)] = x[:left]
    left -= min(len(x), left)
    if not left:
      break
  part.write_bytes(content)
  # The first chunk is one write, every other two.
  assert numbers(read_video(part).frames) == list(range(4 * (1 + (done - 1) // 2)))


@given(data=st.data())
def test_damage_is_no_traceback(growing, data):
  path, sizes = growing
  content = bytearray(path.read_bytes())
  start = data.draw(st.integers(0, sizes[-1] - 1))
  content[start : start + 64] = data.draw(st.binary(min_size=64, max_size=64))
  part = path.with_name("damaged.mp4")
  part.write_bytes(content)
  with contextlib.suppress(VideoError):
    assert read_video(part).frames.ndim == 4


def test_titles_need_not_be_text(growing):
  path, _ = growing
  content, refused = bytearray(path.read_bytes()), 0
  letters = bytes([*24 * [0], *7 * [1], 128, *32 * [0]])
  for start in range(280, 300):  # among them a name of the track
    damaged = path.with_name("title.mp4")
    damaged.write_bytes(content[:start] + letters + content[start + 64 :])
    with contextlib.suppress(VideoError):
      assert read_video(damaged).frames.ndim == 4
    try:
      av.open(str(damaged)).close()
    except (UnicodeDecodeError, av.FFmpegError) as error:
      refused += isinstance(error, UnicodeDecodeError)
  assert refused  # or this tests nothing


def noise(count: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)


def until_refused(path: Path, match: str) -> VideoWriter:
  with VideoWriter(path, 64, 48, 16) as writer:
    with pytest.raises(VideoError, match=match):
      for _ in range(100):
        writer.write(noise(4))
    assert writer.frames >= 4
    with pytest.raises(VideoError, match="ended when it could not be written"):
      writer.write(noise(1))
  return writer


def test_a_file_that_may_not_grow_plays(tmp_path):
  path = tmp_path / "a.mp4"
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    writer = until_refused(path, r"Files may not be larger: .*a\.mp4 cannot be written\. The \d+ ")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert len(read_video(path).frames) == writer.frames


def test_a_full_disk_leaves_what_was_written(tmp_path):
  mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
  if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("needs to mount a small disk")
  try:
    path = tmp_path / "a.mp4"
    writer = until_refused(path, r"The disk is full: .* The \d+ frames before are kept and play\.")
    assert len(read_video(path).frames) == writer.frames
    with pytest.raises(VideoError, match="The disk is full"):
      write_image(tmp_path / "a.png", noise(16).reshape(-1, 64, 3))
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)


def resident() -> float:
  """Resident memory in MB."""
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize() / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_is_constant(tmp_path):
  path, preview = tmp_path / "a.mp4", Preview(16, 32)
  frames = moving(4)
  with VideoWriter(path, 64, 48, 16) as writer:
    for i in range(400):
      writer.write(frames)
      preview.add(frames)
      if i == 100:
        before = resident()
  assert resident() - before < 8
  with VideoReader(path) as reader:
    for i, _ in enumerate(reader):
      if i == 100:
        before = resident()
  assert i == 1599 and resident() - before < 8


def test_what_no_writer_takes(tmp_path):
  for name, match in {
    "a.gif": r"does not end in \.mp4",
    "no/a.mp4": "is no folder; make it",
    ".": "is a folder; give the name of a .mp4 file",
  }.items():
    with pytest.raises(VideoError, match=match):
      VideoWriter(tmp_path / name, 64, 48, 16)
  for width, height in [(63, 48), (64, 47), (8, 64), (0, 16), ("64", 48)]:
    with pytest.raises(ValueError, match=r"even numbers|give columns and rows"):
      VideoWriter(tmp_path / "a.mp4", width, height, 16)
  for fps in [0, -1, "fast", float("nan"), float("inf"), None, 5000]:
    with pytest.raises(ValueError, match="give frames per second"):
      VideoWriter(tmp_path / "a.mp4", 64, 48, fps)
  with pytest.raises(ValueError, match="crf goes from 0"):
    VideoWriter(tmp_path / "a.mp4", 64, 48, 16, crf=60)
  with VideoWriter(tmp_path / "b.mp4", 64, 48, 16) as writer:
    for frames in [moving(2)[0], moving(2) / 255.0, moving(2)[..., :1]]:
      with pytest.raises(ValueError, match=r"give uint8 \[frames, rows, columns, 3\]"):
        writer.write(frames)
    with pytest.raises(ValueError, match="Frames are 48 x 64 pixels, and the video is 64 x 48"):
      writer.write(moving(2, width=48, height=64))
    writer.write(moving(2))  # a refused call does no harm
  assert list(tmp_path.iterdir()) == [tmp_path / "b.mp4"]


def test_no_permission_is_a_sentence(tmp_path, monkeypatch):
  def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(
    "hfjax.video.writer.os.open", refuse
  )  # tests may run as root, who may write anything
  with pytest.raises(VideoError, match=r"Permission denied: .*a\.mp4 cannot be written"):
    VideoWriter(tmp_path / "a.mp4", 64, 48, 16)


# Pixels


def test_bytes_are_the_nearest():
  x = np.array([[-1, 0, 1], [-1.5, 2, np.nan], [-0.5, 0.25, 1 / 255]], np.float32)
  want = [[0, 128, 255], [0, 255, 0], [64, 159, 128]]
  for made in to_uint8(x), to_uint8(x.astype(np.float64)), jax.jit(to_uint8)(x):
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, want)
  assert isinstance(to_uint8(x), np.ndarray) and isinstance(to_uint8(jnp.array(x)), jax.Array)
  levels = np.repeat(np.arange(256)[:, None], 3, 1)
  np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1), levels)
  half = to_uint8(jnp.asarray(x, jnp.bfloat16)[:1])
  np.testing.assert_array_equal(half, want[:1])
  for bad in [np.zeros((2, 3), np.int32), np.zeros((3, 2)), np.zeros(())]:
    with pytest.raises(ValueError, match="give floating point numbers in"):
      to_uint8(bad)


# Reading


@pytest.mark.parametrize(
  ("fps", "want"),
  [
    (30, range(60)),
    (15, range(0, 60, 2)),
    (60, np.repeat(range(60), 2)[: 120]),
    (16, [min(59, int(np.ceil(30 * k / 16 - 0.5))) for k in range(32)]),
  ],
)  # fmt: skip
def test_frames_nearest_in_time(clip, fps, want):
  frames, rate, notes = read_video(clip, fps=fps)
  assert rate == fps and len(frames) == 2 * fps
  got = numbers(frames)
  if fps == 60:  # half way between two frames, either is as near
    assert np.abs(np.array(got) - np.arange(120) / 2).max() <= 0.5
  else:
    assert got == list(want)
  assert notes == ([] if fps == 30 else [f"resampled from 30 to {fps} frames per second"])


def test_first_last_and_pieces(clip):
  assert numbers(read_video(clip, frames=5).frames) == [0, 1, 2, 3, 4]
  assert numbers(read_video(clip, frames=5, from_end=True).frames) == [55, 56, 57, 58, 59]
  last = read_video(clip, fps=10, frames=3, from_end=True)
  assert numbers(last.frames) == [51, 54, 57]
  assert len(read_video(clip, frames=100).frames) == 60
  pieces = list(frames_of(clip, size=(32, 32), length=25))
  assert [p.shape for p in pieces] == [(25, 32, 32, 3), (25, 32, 32, 3), (10, 32, 32, 3)]
  assert numbers(np.concatenate(pieces)) == list(range(60))
  with pytest.raises(ValueError, match="give 1 or more"):
    read_video(clip, frames=0)
  with pytest.raises(ValueError, match="say how many"):
    read_video(clip, from_end=True)
  with pytest.raises(ValueError, match="give columns and rows"):
    read_video(clip, size=64)
  with pytest.raises(ValueError, match="give frames per second"):
    read_video(clip, fps=0)


def halves(width: int, height: int) -> np.ndarray:
  """A frame of four columns in black, red, blue and white."""
  colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)], np.uint8)
  row = np.repeat(colours, width // 4, axis=0)
  return np.broadcast_to(row, (height, width, 3)).copy()


def test_sizes_cover_and_crop(tmp_path):
  path = tmp_path / "a.mp4"
  with VideoWriter(path, 128, 64, 16) as writer:
    writer.write(halves(128, 64)[None])
  frames, _, notes = read_video(path, size=(32, 32))
  assert frames.shape == (1, 32, 32, 3)
  assert notes == [
    "cropped from 128 x 64 to 64 x 64 pixels, and scaled from 64 x 64 to 32 x 32 pixels"
  ]
  np.testing.assert_allclose(frames[0, 16, [4, 28]], [(255, 0, 0), (0, 0, 255)], atol=8)
  assert read_video(path, size=(64, 64)).notes == ["cropped from 128 x 64 to 64 x 64 pixels"]
  assert read_video(path, size=(64, 32)).notes == ["scaled from 128 x 64 to 64 x 32 pixels"]
  assert read_video(path, size=(128, 64)).notes == []


def test_rotated_videos_stand_upright(tmp_path):
  path = write(tmp_path / "a.mp4", 1, width=64, height=32)
  with VideoWriter(path, 64, 32, 16) as writer:
    writer.write(halves(64, 32)[None])
  content = bytearray(path.read_bytes())
  header = content.index(b"tkhd")
  matrix = header + (56 if content[header + 4] else 44)
  # A quarter turn clockwise, as telephones write it.
  one = 1 << 16
  content[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
  path.write_bytes(content)
  frame = read_video(path).frames[0]
  assert frame.shape == (64, 32, 3)
  np.testing.assert_allclose(frame[[8, 56], 16], [(0, 0, 0), (255, 255, 255)], atol=8)


def test_what_no_reader_takes(tmp_path):
  with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
    sound.setparams((1, 2, 8000, 0, "NONE", ""))
    sound.writeframes(bytes(8000))
  (tmp_path / "empty.mp4").touch()
  (tmp_path / "text.mp4").write_text("not a video\n" * 100)
  content = write(tmp_path / "a.mp4", 2).read_bytes()
  (tmp_path / "header.mp4").write_bytes(content[: content.index(b"moof") - 4])
  for name, match in {
    "sound.wav": "has only sound; give a file with pictures",
    "empty.mp4": "cannot be read as a video",
    "text.mp4": "cannot be read as a video",
    "header.mp4": "holds no frame",
    "missing.mp4": "is not there",
    ".": "is a folder; give a video file",
  }.items():
    with pytest.raises(VideoError, match=match):
      read_video(tmp_path / name)
