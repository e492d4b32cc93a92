"""Videos and what lies beside them, written while they are made."""

import contextlib
import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from hfjax.sampling.clip import WholeClip
from hfjax.sampling.files import LatentsWriter
from hfjax.sampling.flags import FLAGS, UsageError
from hfjax.sampling.progress import Progress, Stop
from hfjax.sampling.script import Cue
from hfjax.streaming import Stream
from hfjax.video import Preview, VideoWriter


class Source(Protocol):
  """Where frames come from, chunk by chunk: a stream, a clip, a file of latents."""

  @property
  def frames(self) -> int:
    """How many have been given out."""
    ...

  @property
  def chunk(self) -> Array | None:
    """Latents of the last ones."""
    ...

  def __iter__(self) -> Iterator[UInt8[Array, "b t y x 3"]]: ...

  def __next__(self) -> UInt8[Array, "b t y x 3"]: ...


@dataclasses.dataclass
class Job:
  """What is to be written.

  paths: of the videos, one for each sample. frames: of each; None without end. begin: frames that
  they begin with `[1 t y x 3]`. cues: prompts that are still to come. chunks: made before, in a
  stream that is gone on with. pending: its frames that were not written yet `[b t y x 3]`.
  """

  paths: list[Path]
  size: tuple[int, int]
  fps: Fraction
  frames: int | None
  begin: np.ndarray | None = None
  cues: list[Cue] = dataclasses.field(default_factory=list)
  chunks: int = 0
  pending: np.ndarray | None = None


@dataclasses.dataclass
class Made:
  """What came of a job. stopped: whether the user ended it. surplus: frames of the stream that no
  longer fitted in `[b t y x 3]`. figures: see `Progress.figures`.
  """

  figures: dict[str, Any]
  stopped: bool
  surplus: np.ndarray | None


class Recording:
  """The files of one video: its frames, its latents, its previews."""

  def __init__(self, path: Path, job: Job, stack: contextlib.ExitStack):
    self.path = path
    self.writer = stack.enter_context(VideoWriter(path, *job.size, job.fps))
    self.preview = Preview() if FLAGS.preview else None
    self.latents: LatentsWriter | None = None
    if FLAGS.latents == "save":
      about = {"prompt": FLAGS.prompt[0] if FLAGS.prompt else "", "fps": str(job.fps)}
      self.latents = stack.enter_context(LatentsWriter(beside(path, ".latents.safetensors"), about))

  def add(self, frames: np.ndarray, latents: np.ndarray | None):
    """Takes the next frames `[t y x 3]`, and their latents `[f y x z]`."""
    self.writer.write(frames)
    if self.preview is not None:
      self.preview.add(frames)
    if self.latents is not None and latents is not None:
      self.latents.write(latents)


def write_videos(job: Job, source: Source, stop: Stop) -> Made:
  """Makes the videos of a job, one chunk of all of them after the other.

  What was written stays, whatever ends it.
  """
  surplus: np.ndarray | None = None
  with contextlib.ExitStack() as stack:
    recordings = [Recording(path, job, stack) for path in job.paths]
    log = FLAGS.log_json and stack.enter_context(open(FLAGS.log_json, "a"))
    name = job.paths[0].stem
    progress = stack.enter_context(
      Progress(name, job.frames, job.fps, log, FLAGS.quiet, len(job.paths))
    )

    def put(frames: Any, latents: Any):
      """Writes a chunk, as far as frames are wanted; keeps what is left over."""
      nonlocal surplus
      room = None if job.frames is None else job.frames - progress.frames
      frames = np.asarray(frames)
      surplus = None if room is None else frames[:, room:]
      kept = None if latents is None or FLAGS.latents != "save" else np.asarray(latents)
      for i, recording in enumerate(recordings):
        recording.add(frames[i, :room], None if kept is None else kept[i])
      progress.add(frames[:, :room].shape[1])

    if isinstance(source, WholeClip):
      progress.denoising_s = source.denoising_s
    if job.pending is not None:
      put(job.pending, None)
    if job.begin is not None and isinstance(source, Stream):
      begin = np.broadcast_to(job.begin, (len(recordings), *job.begin.shape[1:]))
      put(source.extend(jnp.asarray(begin)), source.chunk)
    ahead: tuple[Any, Any] | None = None  # on the device while the one before is written
    expected = progress.frames
    # At least one chunk, however early a stop is asked for.
    while not (stop.asked and expected) and (job.frames is None or expected < job.frames):
      change_prompt(job, source)
      asked = time.perf_counter()
      frames = next(source, None)
      if frames is None:
        break
      job.chunks += 1
      expected += frames.shape[1]
      streamed = source.chunk if isinstance(source, Stream) else None
      progress.watch(asked, streamed, frames)
      if ahead is not None:
        put(*ahead)
      ahead = frames, source.chunk
    if ahead is not None:
      put(*ahead)
    figures = progress.figures()
  for recording in recordings:
    if recording.preview is not None:
      recording.preview.write(recording.path.with_suffix(""), job.fps)
  stopped = stop.asked and (job.frames is None or figures["frames"] < job.frames)
  return Made(figures, stopped, surplus if surplus is not None and surplus.size else None)


def change_prompt(job: Job, source: Source):
  """Lets the stream follow the prompts that begin with its next chunk."""
  if not job.cues or not isinstance(source, Stream):
    return
  following = source.config.geometry.chunk * source.model.autoencoder.config.time_factor
  while job.cues and job.cues[0].is_due(source.frames, job.chunks, following, job.fps):
    cue = job.cues.pop(0)
    source.set_prompt(cue.prompt, cue.blend, cue.share)


def targets(names: list[str]) -> list[Path]:
  """Paths of the videos; their folder is made. Raises UsageError if one would be lost."""
  out = Path("outputs" if FLAGS.out is None else FLAGS.out).expanduser()
  single = FLAGS.out is not None and out.suffix.lower() == ".mp4" and not out.is_dir()
  if single and len(names) > 1:
    raise UsageError(f"{len(names)} videos are to be made, and --out is one file; give a folder.")
  folder = out.parent if single else out
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UsageError(f"{folder} cannot be made ({e.strerror}); write elsewhere with --out.") from e
  if single:
    if out.exists() and not FLAGS.overwrite:
      raise UsageError(f"{out} is there already; choose another name, or add --overwrite.")
    return [out]
  found: list[Path] = []
  for name in names:
    endings = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    paths = (folder / f"{name}{ending}.mp4" for ending in endings)
    found.append(next(p for p in paths if p not in found and not p.exists()))
  return found


def beside(path: Path, ending: str) -> Path:
  """A file beside a video, with the same name but for its ending."""
  return path.with_name(path.stem + ending)


def slug(prompt: str) -> str:
  """A file name of the prompt's words."""
  words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
  return words[:60].rstrip("-_") or "video"


def write_about(path: Path, about: dict[str, Any], say: Callable[[str], None]):
  """Writes what is known of a video to a JSON file beside it."""
  target = path.with_suffix(".json")
  try:
    target.write_text(json.dumps(about, indent=2, default=str) + "\n")
  except OSError as e:
    say(f"{target} cannot be written ({e.strerror}); the video is not touched by that.")
