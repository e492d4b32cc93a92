"""Makes videos from prompts: `python -m hfjax.sample --weights=DIR --prompt="..."`.

Each video is written while it is made, and can be watched meanwhile. Ctrl-C ends it after the chunk
that is under way, and says how to go on; a second one stops at once. Beside each video lies a JSON
file that says how it was made.

Exit status: 0 if all is well, 1 if something failed on the way, 2 if the command makes no sense.
"""

import dataclasses
import platform
import shlex
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from hfjax import pipeline
from hfjax.convert import CheckpointError
from hfjax.sampling import requests, settings
from hfjax.sampling.clip import WholeClip
from hfjax.sampling.files import SavedLatents, load_state, save_state, weights_hash
from hfjax.sampling.flags import FLAGS, PLACES, UsageError, fill, parse, reset, set_flags
from hfjax.sampling.progress import Stop
from hfjax.sampling.script import Cue, read_script
from hfjax.sampling.videos import (
  Job,
  Made,
  Source,
  beside,
  slug,
  targets,
  write_about,
  write_videos,
)
from hfjax.streaming import Stream
from hfjax.streaming.stream import NEGATIVE
from hfjax.video import VideoError

_LENGTHS = ("seconds", "frames", "endless")
# What a saved stream fixes; another value needs another stream.
_FIXED = (
  "prompt", "prompts_file", "script", "negative_prompt", "seed", "samples", "image", "video",
  "size", "fps", "preset", "steps", "solver", "guidance", "attention", "variant", "sparsity",
  "window", "sink", "vae", "dtype",
)  # fmt: skip


@dataclasses.dataclass
class Session:
  """What all videos of a run have in common. digest: of the weights, once it is there."""

  stop: Stop
  digest: Future[str | None]
  notes: list[str]


def sample() -> int:
  """Makes a video for each prompt, seed and sample; the exit status."""
  words_given = bool(FLAGS.prompt or FLAGS.prompts_file)
  requests.exclusive(**{"script": FLAGS.script, "prompt (or --prompts_file)": words_given})
  cues = [] if FLAGS.script is None else read_script(Path(FLAGS.script).expanduser())
  words = [cues[0].prompt] if cues else requests.prompts()
  wanted, fps, count = requests.size(), requests.rate(), FLAGS.samples
  frames = requests.length(fps, 0)
  each = [(p, s) for p in words for s in FLAGS.seed]
  if frames is None and len(each) > 1:
    raise UsageError(f"{len(each)} videos without end were asked for; ask for one.")
  requests.steps()  # checked before the weights are loaded
  begin, notes = requests.beginning(wanted, fps)
  names = [f"{slug(p)}-{s}" for p, s in each]
  if count > 1:
    names = [f"{name}-sample{i}" for name in names for i in range(count)]
  paths = targets(names)
  model = load()
  plan = settings.plan(model)
  if plan.bidirectional:
    settings.check_clip(frames, begin, cues)
  for note in notes:
    say(f"{FLAGS.video}: {note}.")
  with Stop() as stop:
    session = Session(stop, in_background(weights_hash, FLAGS.weights), notes)
    for number, (prompt, seed) in enumerate(each):
      if stop.asked:
        say(f"{len(each) - number} of {len(each)} videos were not begun.")
        break
      check_words(model, [prompt, *(cue.prompt for cue in cues[1:])])
      job = Job(paths[number * count :][:count], wanted, fps, frames, begin, cues[1:])
      source: Source
      if plan.bidirectional:
        source = whole_clip(model, plan, [prompt] * count, seed, wanted, frames or 1, stop)
        config = {"solver": plan.solver, "guidance": plan.guidance, "model": model.config}
      else:
        source = Stream(
          model, [prompt] * count, size=wanted, seed=seed, negative_prompt=negative(),
          dtype=FLAGS.dtype, **plan.stream,
        )  # fmt: skip
        config = describe_stream(source)
      about = {"prompt": prompt, "seed": seed, "preset": plan.preset, "config": config}
      make(job, source, session, about)
  return 0


def decode(path: Path) -> int:
  """Makes a video of a file of latents; the exit status."""
  latents, fps = SavedLatents(path), requests.rate()
  (target,) = targets([path.name.removesuffix(".safetensors").removesuffix(".latents")])
  autoencoder = pipeline.load_autoencoder(FLAGS.weights, FLAGS.vae, FLAGS.dtype)
  source = latents.begin(autoencoder)
  factor, rows, columns = autoencoder.config.space_factor, *latents.shape[1:3]
  whole = 1 + autoencoder.config.time_factor * (latents.shape[0] - 1)
  frames = min(whole, requests.length(fps, whole) or whole)
  with Stop() as stop:
    session = Session(stop, in_background(weights_hash, FLAGS.weights), [])
    job = Job([target], (columns * factor, rows * factor), fps, frames)
    make(job, source, session, {"latents": str(path)})
  return 0


def resume(path: Path) -> int:
  """Goes on with a stream that was saved, in a video of its own; the exit status."""
  arrays, saved = load_state(path)
  changed = [name for name in _FIXED if FLAGS[name].present]
  if changed:
    raise UsageError(
      f"A saved stream goes on as it was begun, and --{changed[0]} would change it; leave it out."
    )
  fill({k: v for k, v in saved["flags"].items() if k not in _LENGTHS}, str(path))
  left = saved["frames_left"]
  frames = requests.length(requests.rate(), 0 if left == 0 else left)
  paths = targets(saved["names"])
  digest = in_background(weights_hash, FLAGS.weights)
  model = load()
  if digest.result() != saved["weights_sha256"]:
    raise UsageError(
      f"{path} was saved with other weights than those in {FLAGS.weights}; give those with "
      "--weights."
    )
  cues = [Cue(None if at is None else Fraction(at), *rest) for at, *rest in saved["cues"]]
  pending = arrays.pop("pending", None)
  stream = Stream.from_state(model, arrays)
  job = Job(paths, requests.size(), requests.rate(), frames, None, cues, saved["chunks"], pending)
  about = {**saved["about"], "resumed_from": str(path), "config": describe_stream(stream)}
  with Stop() as stop:
    make(job, stream, Session(stop, digest, []), about)
  return 0


def make(job: Job, source: Source, session: Session, about: dict[str, Any]):
  """Writes the videos of a job, and what is to be known of them."""
  about |= {
    "script": FLAGS.script and [cue._asdict() for cue in job.cues],
    "flags": set_flags(),
    "notes": session.notes,
    "weights": FLAGS.weights,
    "device": jax.devices()[0].device_kind,
    "versions": versions(),
  }
  for path in job.paths:
    write_about(path, {**about, "timings": None}, say)  # there if the process is killed
  made = write_videos(job, source, session.stop)
  hashed = {"weights_sha256": session.digest.result(), "timings": made.figures}
  for path in job.paths:
    write_about(path, {**about, **hashed}, say)
    say(summary(path, job, made.figures))
  if isinstance(source, Stream) and (made.stopped or FLAGS.save_state):
    save(job, source, made, {**about, **hashed})


def save(job: Job, stream: Stream, made: Made, about: dict[str, Any]):
  """Writes the state of a stream, and says how to go on."""
  path = beside(job.paths[0], ".state.safetensors")
  state = stream.state()
  if made.surplus is not None:
    state["pending"] = made.surplus
  note = {
    "flags": {k: v for k, v in set_flags().items() if k not in PLACES},
    "names": [p.stem for p in job.paths],
    "frames_left": None if job.frames is None else job.frames - made.figures["frames"],
    "weights_sha256": about["weights_sha256"],
    "cues": [[None if c.at is None else str(c.at), *c[1:]] for c in job.cues],
    "chunks": job.chunks,
    "about": {k: about.get(k) for k in ("prompt", "seed", "preset")},
  }
  save_state(path, state, note)
  size = path.stat().st_size / 2**20
  say(f"The stream is kept ({size:.0f} MiB). Go on with it by")
  say(f"  python -m hfjax.sample --resume={shlex.quote(str(path))}")


def whole_clip(model, plan, prompts, seed, size, frames, stop) -> WholeClip:
  """A clip of an undistilled bidirectional model, denoised, with a bar for its steps."""
  with tqdm(total=plan.solver.steps, unit=" steps", desc="denoising", disable=FLAGS.quiet) as bar:

    def progress(step: int):
      bar.update(step - bar.n)
      if stop.asked and step < plan.solver.steps:
        raise KeyboardInterrupt  # there is no part of a clip that could be kept

    clip = WholeClip(
      model, prompts, size=size, frames=frames, solver=plan.solver, guidance=plan.guidance,
      negative_prompt=negative(), seed=seed, dtype=FLAGS.dtype, progress=progress,
    )  # fmt: skip
    clip.denoise()
  return clip


def load() -> pipeline.Pipeline:
  """The networks that the flags name."""
  return pipeline.load(FLAGS.weights, FLAGS.vae, FLAGS.dtype)


def negative() -> str:
  """What guided videos keep away from."""
  return NEGATIVE if FLAGS.negative_prompt is None else FLAGS.negative_prompt


def check_words(model: pipeline.Pipeline, prompts: Sequence[str]):
  """Says which prompts are too long."""
  for prompt in prompts:
    if surplus := model.encode.surplus(prompt):
      say(f"The prompt is too long: its last {surplus} tokens are left out.")


def describe_stream(stream: Stream) -> dict[str, Any]:
  """Configuration of a stream for its JSON file."""
  c = stream.config
  return {
    "steps": None if c.solver else c.steps,
    "solver": c.solver,
    "guidance": c.guidance,
    "shift": c.shift,
    "geometry": vars(c.geometry),
    "model": vars(c.model),
    "dtype": c.dtype,
    "backend": c.backend,
  }


def summary(path: Path, job: Job, figures: dict[str, Any]) -> str:
  """A line about a video that is there."""
  parts = [
    f"{path}: {figures['frames']} frames, {float(figures['frames'] / job.fps):.2f} s; first chunk "
    f"after {figures['first_chunk_s']:.1f} s"
  ]
  for name, key in (("transformer", "transformer_"), ("decoder", "decoder_"), ("pixels", "")):
    if speed := figures[f"{key}frames_per_second"]:
      parts.append(f"{name} {speed:.1f} FPS")
  if figures["peak_bytes"]:
    parts.append(f"{figures['peak_bytes'] / 2**30:.1f} GiB at most")
  return ", ".join(parts)


def versions() -> dict[str, str]:
  """Of what made a video."""
  found = {"python": platform.python_version()}
  for name in ("hfjax", "jax", "jaxlib", "flax", "av"):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:  # run from the repository
      continue
  return found


def in_background(call, *args) -> Future:
  """A call in a thread of its own."""
  pool = ThreadPoolExecutor(1)
  future = pool.submit(call, *args)
  pool.shutdown(wait=False)
  return future


def say(*words: Any):
  """Prints unless the user wants quiet."""
  if not FLAGS.quiet:
    print(*words, flush=True)


def run() -> int:
  """Does what the flags say; the exit status."""
  from_latents = FLAGS.latents not in (None, "save")
  requests.exclusive(resume=FLAGS.resume, latents=from_latents)
  if FLAGS.resume is not None:
    return resume(Path(FLAGS.resume).expanduser())
  if FLAGS.weights is None:
    raise UsageError(
      "There are no weights in this package yet: give --weights=DIR, a folder that "
      "tools/convert_checkpoint.py wrote, or --weights=random:tiny to see it work on noise."
    )
  return decode(Path(FLAGS.latents).expanduser()) if from_latents else sample()


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  reset()
  if {"-h", "--help"} & set(argv):
    print(f"{__doc__}\n{FLAGS.get_help()}")
    return 0
  try:
    parse(argv)
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
      "The device is out of memory; take a smaller --size or --window, fewer --samples, or "
      "--vae=tiny.",
      1,
      e,
    )


def _fail(message: Any, status: int, error: BaseException | None = None) -> int:
  if FLAGS["debug"].value:
    traceback.print_exception(error or message)
  print(f"sample: {' '.join(str(message).split())}", file=sys.stderr)
  return status


if __name__ == "__main__":
  sys.exit(main())
