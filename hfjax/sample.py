"""Makes videos from prompts: `python -m hfjax.sample --weights=DIR --prompt="..."`.

Each video is written while it is made, and can be watched meanwhile. Ctrl-C ends it after the chunk
that is under way; a second one stops at once. Beside each video lies a JSON file that says how it
was made.

Exit status: 0 if all is well, 1 if something failed on the way, 2 if the command makes no sense.
"""

import contextlib
import itertools
import json
import platform
import re
import signal
import sys
import time
import traceback
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from hfjax import pipeline
from hfjax.convert import CheckpointError
from hfjax.models.geometry import VARIANTS
from hfjax.streaming import Stream
from hfjax.video import Preview, VideoError, VideoWriter, read_image, read_video

FLAGS = flags.FlagValues()


def _define():
  define: Any = flags
  text = lambda name, default, help: define.DEFINE_string(name, default, help, flag_values=FLAGS)
  switch = lambda name, help: define.DEFINE_bool(name, False, help, flag_values=FLAGS)
  number = lambda *args, **kw: define.DEFINE_integer(*args, flag_values=FLAGS, **kw)
  real = lambda *args, **kw: define.DEFINE_float(*args, flag_values=FLAGS, **kw)
  choice = lambda name, default, values, help: define.DEFINE_enum(
    name, default, [*values], help, flag_values=FLAGS
  )
  text("weights", None, "folder that tools/convert_checkpoint.py wrote, a name on the Hugging Face "
       "Hub, or random:NAME for noise from a model of that size")  # fmt: skip
  flags.DEFINE_multi_string("prompt", [], "what the video shows; may be repeated",
                            flag_values=FLAGS)  # fmt: skip
  text("prompts_file", None, "text file with a prompt on each line")
  text("out", None, "video to write, or folder for several; by default outputs/PROMPT-SEED.mp4")
  real("seconds", None, "length of the video; 5 by default", lower_bound=0.01)
  number("frames", None, "its length in frames instead", lower_bound=1)
  switch("endless", "goes on until it is stopped")
  text("size", "832x480", "columns and rows of pixels, multiples of 16")
  text("fps", "16", "frames per second at which the video plays")
  flags.DEFINE_multi_integer("seed", [0], "of the noise; may be repeated: a video for each",
                             flag_values=FLAGS)  # fmt: skip
  flags.DEFINE_list("steps", None, "denoising steps, such as 1000,750,500,250", flag_values=FLAGS)
  choice("attention", "hybrid", ["hybrid", "dense"], "dense keeps every key block of the window")
  choice("variant", None, VARIANTS, "semantics that the weights were trained with; theirs by "
         "default")  # fmt: skip
  real("sparsity", 0.8, "share of the window's key blocks that attention leaves out",
       lower_bound=0, upper_bound=0.999)  # fmt: skip
  number("window", 9, "latent frames that attention sees")
  number("sink", 3, "first latent frames, seen for ever")
  text("image", None, "image that the video begins with")
  text("video", None, "video that it goes on from, whose last frames it begins with")
  choice("vae", "full", pipeline.AUTOENCODERS, "autoencoder; the tiny one is faster")
  choice("dtype", "bfloat16", ["bfloat16", "float32"], "that networks compute in")
  switch("preview", "writes a contact sheet (PNG) and a GIF beside the video")
  switch("overwrite", "replaces the file that --out names")
  switch("quiet", "shows no progress")
  text("log_json", None, "file to which a JSON line is added for each chunk")
  switch("debug", "shows where an error came from")


_define()
CONTEXT_FRAMES = 81  # of --video, as long as the clips that models are trained on


class UsageError(ValueError):
  """A command that cannot be followed; its text is a sentence."""


def prompts() -> list[str]:
  """Prompts of the command line, then of the file."""
  found = list(FLAGS.prompt)
  if FLAGS.prompts_file is not None:
    try:
      lines = Path(FLAGS.prompts_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
      raise UsageError(f"{FLAGS.prompts_file} cannot be read ({e}); give a text file.") from e
    found += [line.strip() for line in lines if line.strip()]
  if not found:
    raise UsageError('There is no prompt; say what the video shows, as in --prompt="a red square".')
  if any(not p.strip() for p in found):
    raise UsageError("A prompt is empty; say what the video shows.")
  return found


def length(fps: Fraction) -> int | None:
  """Frames of each video; None without end."""
  given = [n for n in ("seconds", "frames") if FLAGS[n].value is not None]
  given += ["endless"] * FLAGS.endless
  if len(given) > 1:
    raise UsageError(f"The length is given by {' and '.join(f'--{n}' for n in given)}; choose one.")
  if FLAGS.endless:
    return None
  return FLAGS.frames or max(1, round((FLAGS.seconds or 5) * fps))


def rate() -> Fraction:
  """Frames per second."""
  try:
    fps = Fraction(FLAGS.fps)
  except (ValueError, ZeroDivisionError):
    fps = Fraction(0)
  if not 0 < fps <= 1000:
    raise UsageError(
      f"The frame rate is {FLAGS.fps!r}; give frames per second, such as 16 or 30000/1001."
    )
  return fps


def size() -> tuple[int, int]:
  """Columns and rows."""
  match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", FLAGS.size)
  if match is None:
    raise UsageError(
      f"The size is {FLAGS.size!r}; give columns and rows of pixels, such as 832x480."
    )
  return int(match[1]), int(match[2])


def _ratio(sparsity: float) -> float:
  """What is kept; of 0.8 it is 0.2, and not a little less, since counts of blocks are floored."""
  return round(1 - sparsity, 9)


def settings() -> dict[str, Any]:
  """What is set of `Geometry` and `StreamConfig`."""
  found: dict[str, Any] = {
    "window": FLAGS.window,
    "sink": FLAGS.sink,
    "ratio": 1.0 if FLAGS.attention == "dense" else _ratio(FLAGS.sparsity),
    "variant": FLAGS.variant,
    "dtype": FLAGS.dtype,
  }
  if FLAGS.steps is not None:
    try:
      found["steps"] = tuple(float(s) for s in FLAGS.steps)
    except ValueError as e:
      raise UsageError(f"The steps are {FLAGS.steps}; give numbers, as in 1000,750,500,250.") from e
  return found


def beginning(columns_rows: tuple[int, int], fps: Fraction) -> tuple[np.ndarray | None, list[str]]:
  """Frames `[1 t y x 3]` that the videos begin with, and what was done to them."""
  if FLAGS.image is not None and FLAGS.video is not None:
    raise UsageError("There are --image and --video; begin with one of them.")
  if FLAGS.image is not None:
    return read_image(FLAGS.image, columns_rows)[None, None], []
  if FLAGS.video is not None:
    clip = read_video(FLAGS.video, columns_rows, fps, CONTEXT_FRAMES, from_end=True)
    whole = (len(clip.frames) - 1) // 4 * 4 + 1  # what fills latents, so that nothing is repeated
    return clip.frames[None, -whole:], clip.notes
  return None, []


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


def slug(prompt: str) -> str:
  """A file name of the prompt's words."""
  words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
  return words[:60].rstrip("-_") or "video"


class Stop:
  """Whether the user has asked to stop, by Ctrl-C or SIGTERM; a second one stops at once."""

  def __init__(self):
    self.asked = False

  def __enter__(self) -> "Stop":
    self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *exception):
    for number, handler in self.before.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    if self.asked:
      raise KeyboardInterrupt
    self.asked = True
    print("\nStopping after this chunk; once more stops at once.", file=sys.stderr, flush=True)


class Progress:
  """Chunk, length, speed and time left, on one line; and a JSON line for each chunk."""

  def __init__(self, name: str, total: int | None, fps: Fraction, log: TextIO | None):
    self.fps, self.log, self.chunks, self.frames = fps, log, 0, 0
    self.start = time.perf_counter()
    self.marks: list[tuple[float, int]] = []  # seconds and frames, of the first chunk and the last
    self.bar = tqdm(total=total, unit=" frames", desc=name[:32], disable=FLAGS.quiet)

  def add(self, frames: int):
    """So many more frames are in the file."""
    now = time.perf_counter() - self.start
    self.chunks += 1
    self.frames += frames
    self.marks = [*self.marks[:1], (now, self.frames)]
    video = float(self.frames / self.fps)
    self.bar.update(frames)
    self.bar.set_postfix_str(f"chunk {self.chunks}, {video:.1f} s, {video / now:.2f} x real time")
    if self.log is not None:
      row = {"chunk": self.chunks, "frames": self.frames, "wall_s": round(now, 4)}
      self.log.write(json.dumps(row) + "\n")
      self.log.flush()

  def figures(self) -> dict[str, Any]:
    """Figures of the whole; speed without the first chunk, which waits for compilation."""
    (first, before), (last, after) = self.marks[0], self.marks[-1]
    stats = jax.devices()[0].memory_stats() or {}
    return {
      "frames": after,
      "first_chunk_s": round(first, 3),
      "frames_per_second": round((after - before) / (last - first), 3) if after > before else None,
      "total_s": round(last, 3),
      "peak_bytes": stats.get("peak_bytes_in_use"),
    }

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exception):
    self.bar.close()


def write_video(
  path: Path,
  stream: Stream,
  begin: np.ndarray | None,
  frames: int | None,
  fps: Fraction,
  stop: Stop,
) -> dict[str, Any]:
  """Makes one video; its figures. A disk that is full ends it, with what was written."""
  width, height = size()
  preview = Preview() if FLAGS.preview else None
  with contextlib.ExitStack() as stack:
    writer = stack.enter_context(VideoWriter(path, width, height, fps))
    log = FLAGS.log_json and stack.enter_context(open(FLAGS.log_json, "a"))
    progress = stack.enter_context(Progress(path.stem, frames, fps, log))

    def put(chunk: Any):
      """Writes a chunk, as far as frames are wanted."""
      some = np.asarray(chunk)[0, : None if frames is None else frames - writer.frames]
      writer.write(some)
      progress.add(len(some))
      if preview is not None:
        preview.add(some)

    if begin is not None:
      put(stream.extend(jnp.asarray(begin)))
    ahead = None  # handed to the device, which works on it while the one before is written
    expected = stream.frames
    # At least one chunk, however early a stop is asked for.
    while not (stop.asked and expected) and (frames is None or expected < frames):
      chunk = next(stream)
      expected = stream.frames
      if ahead is not None:
        put(ahead)
      ahead = chunk
    if ahead is not None:
      put(ahead)
  if preview is not None:
    preview.write(path.with_suffix(""), fps)
  return progress.figures()


def describe(prompt: str, seed: int, stream: Stream, figures: dict[str, Any], notes: list[str]):
  """What the JSON file beside a video says."""
  return {
    "prompt": prompt,
    "seed": seed,
    "weights": FLAGS.weights,
    "flags": {k: v for k, v in FLAGS.flag_values_dict().items() if FLAGS[k].present},
    "config": {
      "steps": stream.config.steps,
      "geometry": stream.config.geometry.__dict__,
      "model": stream.config.model.__dict__,
      "dtype": stream.config.dtype,
      "backend": stream.config.backend,
    },
    "notes": notes,
    "device": jax.devices()[0].device_kind,
    "versions": {"jax": jax.__version__, "python": platform.python_version()},
    "timings": figures,
  }


def run() -> int:
  """Makes all videos; the exit status."""
  if FLAGS.weights is None:
    raise UsageError(
      "There are no weights in this package yet: give --weights=DIR, a folder that "
      "tools/convert_checkpoint.py wrote, or --weights=random:tiny to see it work on noise."
    )
  words, fps, wanted = prompts(), rate(), size()
  frames = length(fps)
  if frames is None and len(words) * len(FLAGS.seed) > 1:
    raise UsageError(
      f"{len(words) * len(FLAGS.seed)} videos without end were asked for; ask for one."
    )
  options = settings()
  begin, notes = beginning(wanted, fps)
  videos = [(p, s) for p in words for s in FLAGS.seed]
  paths = targets([f"{slug(p)}-{s}" for p, s in videos])
  model = pipeline.load(FLAGS.weights, FLAGS.vae, FLAGS.dtype)
  say = (lambda *x: None) if FLAGS.quiet else lambda *x: print(*x, flush=True)
  for note in notes:
    say(f"{FLAGS.video}: {note}.")
  with Stop() as stop:
    for (prompt, seed), path in zip(videos, paths, strict=True):
      if stop.asked:
        break
      if surplus := model.encode.surplus(prompt):
        say(f"The prompt is too long: its last {surplus} tokens are left out.")
      stream = Stream(model, prompt, size=wanted, seed=seed, **options)
      figures = write_video(path, stream, begin, frames, fps, stop)
      about = describe(prompt, seed, stream, figures, notes)
      path.with_suffix(".json").write_text(json.dumps(about, indent=2, default=str) + "\n")
      peak = figures["peak_bytes"]
      say(
        f"{path}: {figures['frames']} frames, {float(figures['frames'] / fps):.2f} s; first chunk "
        f"after {figures['first_chunk_s']:.1f} s"
        + (f", then {figures['frames_per_second']:.1f} FPS" if figures["frames_per_second"] else "")
        + (f"; {peak / 2**30:.1f} GiB at most" if peak else "")
      )
  return 0


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  FLAGS.unparse_flags()
  for name in FLAGS:
    FLAGS[name].unparse()
  if {"-h", "--help"} & set(argv):
    print(f"{__doc__}\n{FLAGS.get_help()}")
    return 0
  try:
    rest = FLAGS(["sample", *argv])[1:]
    if rest:
      raise UsageError(f'{rest[0]!r} is no flag; prompts are given as --prompt="...".')
    return run()
  except (flags.Error, UsageError) as e:
    return _fail(e, 2)
  except (CheckpointError, VideoError) as e:
    return _fail(e, 1)
  except ValueError as e:
    return _fail(e, 2)
  except OSError as e:
    return _fail(e, 1)
  except KeyboardInterrupt:
    print("sample: stopped; what was written plays.", file=sys.stderr)
    return 130
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return _fail(
      "The device is out of memory; take a smaller --size or --window, or --vae=tiny.", 1, e
    )


def _fail(message: Any, status: int, error: BaseException | None = None) -> int:
  if len(FLAGS) and FLAGS["debug"].value:
    traceback.print_exception(error or message)
  print(f"sample: {' '.join(str(message).split())}", file=sys.stderr)
  return status


if __name__ == "__main__":
  sys.exit(main())
