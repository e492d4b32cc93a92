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
from typing import Any, Protocol, TextIO

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from hfjax.sampling.clip import WholeClip
from hfjax.sampling.files import LatentsWriter
from hfjax.sampling.flags import FLAGS, UsageError
from hfjax.sampling.progress import Progress, Stop
from hfjax.sampling.script import Cue
from hfjax.streaming import Stream
from hfjax.video import Preview, VideoError, VideoWriter

_OTHERS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".webm")
# What may lie beside a video.
_SIDES = (".json", ".png", ".gif", ".latents.safetensors", ".state.safetensors")
# What a run reads, and the log, to which it adds.
_READ = ("image", "video", "config", "script", "prompts_file", "latents", "resume", "log_json")


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

  paths: of the videos, one for each sample. prompt: the first one. frames: of each; None without
  end. begin: frames that they begin with `[1 t y x 3]`. cues: prompts that are still to come.
  chunks: made before, in a stream that is gone on with. pending: its frames that were not written
  yet `[b t y x 3]`. begun: called once there is a video.
  """

  paths: list[Path]
  prompt: str
  size: tuple[int, int]
  fps: Fraction
  frames: int | None
  begin: np.ndarray | None = None
  cues: list[Cue] = dataclasses.field(default_factory=list)
  chunks: int = 0
  pending: np.ndarray | None = None
  begun: Callable[[], None] = lambda: None


class Recording:
  """The files of one video: its frames, its latents, its previews once they are written."""

  def __init__(self, path: Path, job: Job, stack: contextlib.ExitStack):
    self.path = path
    self.writer = stack.enter_context(VideoWriter(path, *job.size, job.fps))
    self.preview = Preview() if FLAGS.preview else None
    self.previews: tuple[Path, ...] = ()
    self.latents: LatentsWriter | None = None
    if FLAGS.latents == "save":
      about = {"prompt": job.prompt, "fps": str(job.fps)}
      if job.chunks:
        about["resumed"] = "its decoder needs what came before"
      self.latents = stack.enter_context(LatentsWriter(beside(path, ".latents.safetensors"), about))

  def add(self, frames: np.ndarray, latents: np.ndarray | None):
    """Takes the next frames `[t y x 3]`, and their latents `[f y x z]`."""
    self.writer.write(frames)
    if self.preview is not None:
      self.preview.add(frames)
    if self.latents is not None and latents is not None:
      self.latents.about["frames"] = str(self.writer.frames)
      self.latents.write(latents)

  def write_preview(self, fps: Fraction):
    """Writes contact sheet and GIF, if they are wanted and there is a frame."""
    if self.preview is not None and self.writer.frames:
      self.previews = self.preview.write(self.path.with_suffix(""), fps)


@dataclasses.dataclass
class Made:
  """What came of a job. stopped: whether the user ended it. surplus: frames of the stream that no
  longer fitted in `[b t y x 3]`. figures: see `Progress.figures`.
  """

  recordings: list[Recording]
  figures: dict[str, Any]
  stopped: bool
  surplus: np.ndarray | None


def write_videos(job: Job, source: Source, stop: Stop) -> Made:
  """Makes the videos of a job, one chunk of all of them after the other.

  What was written stays, whatever ends it.
  """
  surplus: np.ndarray | None = None
  stop.begun = True
  with contextlib.ExitStack() as stack:
    log = open_log(stack)
    recordings = [Recording(path, job, stack) for path in job.paths]
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
      if not progress.chunks:
        job.begun()
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
  stopped = stop.asked and (job.frames is None or figures["frames"] < job.frames)
  surplus = surplus if surplus is not None and surplus.size else None
  return Made(recordings, figures, stopped, surplus)


def open_log(stack: contextlib.ExitStack) -> TextIO | None:
  """The file of --log_json, if there is one; VideoError if it cannot be written."""
  if FLAGS.log_json is None:
    return None
  try:
    return stack.enter_context(open(FLAGS.log_json, "a"))
  except OSError as e:
    raise VideoError(f"--log_json={FLAGS.log_json} cannot be written ({e.strerror}).") from e


def change_prompt(job: Job, source: Source):
  """Lets the stream follow the prompts that begin with its next chunk."""
  if not job.cues or not isinstance(source, Stream):
    return
  factor = source.model.autoencoder.config.time_factor
  following = source.config.geometry.chunk * factor - (0 if source.frames else factor - 1)
  while job.cues and job.cues[0].is_due(source.frames, job.chunks, following, job.fps):
    cue = job.cues.pop(0)
    source.set_prompt(cue.prompt, cue.blend, cue.share)


class Places:
  """Where videos go: their names are taken when they are chosen, by empty files.

  Those that nothing was written to are gone at the end.
  """

  def __init__(self):
    self.taken: list[Path] = []

  def __enter__(self) -> "Places":
    return self

  def __exit__(self, *exception):
    for path in self.taken:
      with contextlib.suppress(OSError):
        if not path.stat().st_size:
          path.unlink()

  def choose(self, names: list[str], usual: str | Path = "outputs") -> list[Path]:
    """A path for each video; their folder is made. usual: folder unless --out names another.

    Raises UsageError if a file would be lost.
    """
    out = Path(usual if FLAGS.out is None else FLAGS.out).expanduser()
    if out.suffix.lower() in _OTHERS and not out.is_dir():
      raise UsageError(f"--out is {out}, and videos are MP4; give a name that ends in .mp4.")
    single = FLAGS.out is not None and out.suffix.lower() == ".mp4" and not out.is_dir()
    if single and len(names) > 1:
      raise UsageError(f"{len(names)} videos are to be made, and --out is one file; give a folder.")
    folder = out.parent if single else out
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise UsageError(f"{folder} cannot be made ({e.strerror}); write elsewhere.") from e
    if single:
      self._check(out)
      if not FLAGS.overwrite and not self._take(out):
        raise UsageError(f"{out} is there already; choose another name, or add --overwrite.")
      return [out]
    return [self._free(folder, name) for name in names]

  def _free(self, folder: Path, name: str) -> Path:
    endings = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    paths = (folder / f"{name}{ending}.mp4" for ending in endings)
    free = (p for p in paths if not any(beside(p, x).exists() for x in _SIDES))
    return next(p for p in free if self._take(p))

  def _take(self, path: Path) -> bool:
    """Makes an empty file, unless there is one."""
    try:
      path.touch(exist_ok=False)
    except FileExistsError:
      return False
    except OSError as e:
      raise UsageError(f"{path} cannot be written ({e.strerror}); write elsewhere.") from e
    self.taken.append(path)
    return True

  def _check(self, out: Path):
    """Raises UsageError if files beside a video would take the place of others."""
    read = {name: str(FLAGS[name].value) for name in _READ if FLAGS[name].value}
    for path in (out, *(beside(out, ending) for ending in _SIDES)):
      for name, given in read.items():
        if path.resolve() == Path(given).expanduser().resolve():
          raise UsageError(f"{path} would be lost, which --{name} reads; choose another --out.")
      if path.exists() and not FLAGS.overwrite:
        raise UsageError(f"{path} is there already; choose another --out, or add --overwrite.")


def beside(path: Path, ending: str) -> Path:
  """A file beside a video, with the same name but for its ending."""
  return path.with_name(path.stem + ending)


def slug(prompt: str) -> str:
  """A file name of the prompt's words."""
  words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60]
  # Names have 255 bytes, and the longest ending takes some dozen.
  return words.encode()[:180].decode(errors="ignore").rstrip("-_") or "video"


def write_about(path: Path, about: dict[str, Any]):
  """Writes what is known of a video to a JSON file beside it; VideoError if that cannot be."""
  target = path.with_suffix(".json")
  # Fields alone: tables that follow from them may have been kept beside.
  is_object = lambda x: dataclasses.is_dataclass(x) and not isinstance(x, type)
  plain = lambda x: dataclasses.asdict(x) if is_object(x) else str(x)
  try:
    target.write_text(json.dumps(about, indent=2, default=plain) + "\n")
  except OSError as e:
    raise VideoError(f"{target} cannot be written ({e.strerror}); the video itself plays.") from e
