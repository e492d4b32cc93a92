"""Clips with captions, as latents."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from hfjax.data import contexts, rows, shards
from hfjax.data.rejects import DataError
from hfjax.data.sources import Source
from hfjax.streaming.pixels import Autoencoder
from hfjax.video import VideoError, read_video
from hfjax.video.pixels import as_rate, rate_text

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".gif")
_AHEAD = 2  # clips that are decoded while another is encoded


class Captioned(NamedTuple):
  """A file, as it is named in its folder, and what it shows."""

  file: str
  caption: str


def find(folder: str | Path, bad: Callable[[str], Any]) -> list[Captioned]:
  """Clips of a folder and those below it, in the order of their names, or as a file lists them.

  That file is captions.jsonl or captions.csv, with `file` and `caption`. Without it, clip.txt
  beside clip.mp4 is its caption. bad: called with a sentence on each that has none.

  Raises DataError if there is no folder, or nothing in it.
  """
  folder = Path(folder).expanduser()
  if not folder.is_dir():
    raise DataError(f"{folder} is no folder; give one of clips with captions.")
  lists = [p for p in (folder / "captions.jsonl", folder / "captions.csv") if p.is_file()]
  if lists:
    return [Captioned(*row) for row in rows.read_rows(lists[0], ("file", "caption"), bad)]
  found = []
  paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
  if not paths:
    raise DataError(f"{folder} holds no clips ({', '.join(SUFFIXES)}); give another folder.")
  for path in paths:
    beside = path.with_suffix(".txt")
    try:
      caption = " ".join(beside.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
      caption = ""
    if caption:
      found.append(Captioned(path.relative_to(folder).as_posix(), caption))
    else:
      bad(f"{path} has no caption; write one into {beside.name}, beside it.")
  return found


def write(
  folder: str | Path,
  clips_folder: str | Path,
  clips: Sequence[Captioned],
  autoencoder: Autoencoder,
  *,
  frames: int = 81,
  size: tuple[int, int] = (832, 480),
  fps: float | str = 16,
  model: str = "",
  per_shard: int = 0,
  command: str = "",
  **options: Any,
) -> shards.Written:
  """Writes the first `frames` frames of each clip as latents `[f y x c]`, float16.

  size: columns and rows of pixels; clips are scaled to cover it and cropped. fps: at which frames
  are taken. model: of what weights; a folder is gone on with by no other. options: see
  `shards.write`, whose errors are raised. Bad clips are those that cannot be decoded, or are short.

  Raises DataError on a length or size that the autoencoder does not take, ValueError on no rate.
  """
  n, space = autoencoder.config.time_factor, autoencoder.config.space_factor
  if frames < 1 or (frames - 1) % n:
    raise DataError(f"Clips of {frames} frames are asked for; give 1 and a multiple of {n}.")
  if min(size) < 1 or size[0] % space or size[1] % space:
    raise DataError(f"Clips of {size[0]}x{size[1]} are asked for; give multiples of {space}.")
  rate = as_rate(fps)
  place = Path(clips_folder).expanduser()
  columns, height = size[0] // space, size[1] // space
  shape = ((frames - 1) // n + 1, height, columns, autoencoder.config.z_dim)
  about = {"clips": shards.digest(clips), "frames": frames, "size": size, "fps": str(rate)}
  plan = shards.Plan(
    "videos", len(clips), {"latents": (shape, "float16")}, about | {"model": model}, per_shard,
    command,
  )  # fmt: skip

  def read(clip: Captioned) -> UInt8[np.ndarray, "t y x 3"]:
    found = read_video(place / clip.file, size, rate, frames)
    if len(found.frames) < frames:
      raise VideoError(
        f"{place / clip.file} has {len(found.frames)} frames at {rate_text(rate)} a second, and "
        f"{frames} are needed."
      )
    return found.frames

  def make(start: int, stop: int, reject) -> Iterable[shards.Example]:
    for clip, future in _ahead(read, clips[start:stop]):
      try:
        pixels = future.result()
      except (VideoError, OSError) as e:
        reject(str(e))
        continue
      latents = np.asarray(autoencoder.encode(jnp.asarray(pixels[None])))[0]
      yield {"prompt": clip.caption, "latents": latents}

  return shards.write(folder, plan, make, **options)


def write_pixels(
  folder: str | Path,
  source: Source,
  autoencoder: Autoencoder,
  *,
  batch: int = 8,
  workers: int = 1,
  model: str = "",
  per_shard: int = 0,
  command: str = "",
  **options: Any,
) -> shards.Written:
  """Writes examples with `video`, bytes `[t y x 3]`, as latents `[f y x c]`, float16.

  source: all of whose clips have the shape of the first. batch: clips that are encoded at once.
  workers: threads that read examples.
  model, options: as in `write`.

  Raises DataError on a length or size that the autoencoder does not take.
  """
  if batch < 1 or workers < 0:
    raise DataError(
      f"Batches of {batch} are asked for, read by {workers} threads; give at least 1 clip, and 0 "
      "or more threads."
    )
  a = autoencoder.config
  frames, *size, _ = source[0]["video"].shape
  if (frames - 1) % a.time_factor or any(x % a.space_factor for x in size):
    raise DataError(
      f"Clips of {frames} frames of {size[1]}x{size[0]} are asked for; give 1 and a multiple of "
      f"{a.time_factor} frames, and multiples of {a.space_factor} pixels."
    )
  rows, columns = (x // a.space_factor for x in size)
  shape = ((frames - 1) // a.time_factor + 1, rows, columns, a.z_dim)
  about = {"clips": contexts.identity(source), "model": model}
  plan = shards.Plan(
    "videos", len(source), {"latents": (shape, "float16")}, about, per_shard, command
  )

  def make(start: int, stop: int, reject) -> Iterable[shards.Example]:
    examples = (
      future.result() for _, future in _ahead(source.__getitem__, range(start, stop), ahead)
    )
    waiting: deque[tuple[list[dict[str, Any]], Array]] = deque()
    while True:
      if chosen := list(itertools.islice(examples, batch)):
        videos = contexts.filled([x["video"] for x in chosen], batch)
        waiting.append((chosen, autoencoder.encode(jnp.asarray(np.stack(videos)))))
      if not waiting:
        return
      if chosen and len(waiting) == 1:  # the device works on them while others are drawn
        continue
      done, latents = waiting.popleft()
      for example, x in zip(done, np.asarray(latents)):  # without what fills up the batch
        yield {"prompt": example["prompt"], "latents": x}

  ahead = max(1, workers), batch
  return shards.write(folder, plan, make, **options)


def _ahead(
  act: Callable[[Any], Any], items: Sequence[Any], ahead: tuple[int, int] = (_AHEAD, _AHEAD)
) -> Iterator[tuple[Any, Future]]:
  """Items and their results, of which threads work on some ahead: how many threads and items."""
  rest = iter(items)
  with ThreadPoolExecutor(ahead[0]) as pool:
    begin = lambda count: ((x, pool.submit(act, x)) for x in itertools.islice(rest, count))
    waiting = deque(begin(ahead[1]))
    try:
      while waiting:
        item, future = waiting.popleft()
        waiting.extend(begin(1))
        yield item, future
    finally:
      pool.shutdown(wait=True, cancel_futures=True)
