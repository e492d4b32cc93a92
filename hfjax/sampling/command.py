"""The command: what its modes do with all the rest."""

import dataclasses
import platform
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from hfjax import pipeline
from hfjax.convert import CheckpointError
from hfjax.models.sampling_presets import SAMPLING_PRESETS
from hfjax.sampling import requests, settings
from hfjax.sampling.clip import WholeClip
from hfjax.sampling.files import SavedLatents, load_state, save_state, weights_hash
from hfjax.sampling.flags import FLAGS, LENGTHS, PLACES, UsageError, fill, parse, reset, set_flags
from hfjax.sampling.progress import Stop
from hfjax.sampling.script import Cue, read_script
from hfjax.sampling.videos import (
  Job,
  Made,
  Places,
  Source,
  beside,
  slug,
  write_about,
  write_videos,
)
from hfjax.streaming import Stream
from hfjax.streaming.stream import NEGATIVE, default_dtype
from hfjax.video import VideoError

# What a saved stream fixes; another value needs another stream.
_FIXED = (
  "prompt", "prompts_file", "script", "negative_prompt", "seed", "samples", "image", "video",
  "size", "fps", "preset", "steps", "solver", "guidance", "guidance_interval",
  "attention", "variant", "sparsity", "window", "sink", "vae", "dtype",
)  # fmt: skip
_OF_LATENTS = ("fps", "vae", "dtype")  # what of these is of use to latents that are there


@dataclasses.dataclass
class Session:
  """What all videos of a run have in common.

  digest: of the weights, once it is there. failed: whether a file beside a video is missing.
  """

  stop: Stop
  places: Places
  digest: Future[str | None] | None = None
  notes: list[str] = dataclasses.field(default_factory=list)
  failed: bool = False


def sample(session: Session):
  """Makes a video for each prompt, seed and sample."""
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
  begin, session.notes = requests.beginning(wanted, fps)
  if FLAGS.video is not None and frames is not None and begin is not None:
    frames += begin.shape[1]  # the length is that of what is new
  names = [f"{slug(p)}-{s}" for p, s in each]
  if count > 1:
    names = [f"{name}-sample{i}" for name in names for i in range(count)]
  paths = session.places.choose(names)
  model = load()
  plan = settings.plan(model)
  if plan.bidirectional:
    settings.check_clip(frames, begin, cues)
  for note in session.notes:
    say(f"{FLAGS.video}: {note}.")
  all_words = [*words, *(cue.prompt for cue in cues)]
  if notice := requests.strange_words(SAMPLING_PRESETS[plan.preset], all_words):
    say(notice)
  for cue in cues:
    if frames is not None and cue.at is not None and cue.at * fps >= frames:
      say(f"The video ends before {float(cue.at):g} s, when {cue.prompt!r} was to begin.")
  session.digest = in_background(weights_hash, FLAGS.weights)
  for number, (prompt, seed) in enumerate(each):
    if session.stop.asked:
      tell(f"{len(each) - number} of {len(each)} videos were not begun.")
      break
    check_words(model, [prompt, *(cue.prompt for cue in cues[1:])])
    job = Job(paths[number * count :][:count], prompt, wanted, fps, frames, begin, cues[1:])
    source: Source
    if plan.bidirectional:
      source = whole_clip(model, plan, [prompt] * count, seed, wanted, frames or 1)
      config = {
        "solver": plan.solver,
        "guidance": plan.guidance,
        "guidance_interval": plan.interval,
        "model": model.config,
      }
    else:
      source = Stream(
        model, [prompt] * count, size=wanted, seed=seed, negative_prompt=negative(plan.preset),
        dtype=dtype(), **plan.stream,
      )  # fmt: skip
      config = describe_stream(source)
    # Flags of this video alone, which make it again.
    given = {k: v for k, v in set_flags().items() if k != "prompts_file"} | {"seed": [seed]}
    about = {
      "prompt": prompt,
      "script": [{**cue._asdict(), "at": cue.at and float(cue.at)} for cue in cues] or None,
      "seed": seed,
      "preset": plan.preset,
      "config": config,
      "flags": given if cues else {**given, "prompt": [prompt]},
    }
    make(job, source, session, about)


def decode(session: Session, path: Path):
  """Makes a video of a file of latents."""
  useless = [name for name in _FIXED if FLAGS[name].present and name not in _OF_LATENTS]
  if useless:
    raise UsageError(f"--{useless[0]} changes nothing of latents that are there; leave it out.")
  latents = SavedLatents(path)
  if "resumed" in latents.about:
    raise UsageError(
      f"{path} begins in the middle of a stream, and {latents.about['resumed']}; give the latents "
      "of a stream from its beginning."
    )
  if "fps" in latents.about and not FLAGS["fps"].present:
    FLAGS.fps = latents.about["fps"]
  fps = requests.rate()
  (target,) = session.places.choose(
    [path.name.removesuffix(".safetensors").removesuffix(".latents")]
  )
  autoencoder = pipeline.load_autoencoder(FLAGS.weights, FLAGS.vae, dtype())
  source = latents.begin(autoencoder)
  factor, rows, columns = autoencoder.config.space_factor, *latents.shape[1:3]
  whole = 1 + autoencoder.config.time_factor * (latents.shape[0] - 1)
  shown = latents.about.get("frames", "")
  if shown.isdecimal() and int(shown):
    whole = min(whole, int(shown))
  frames = min(whole, requests.length(fps, whole) or whole)
  session.digest = in_background(weights_hash, FLAGS.weights)
  job = Job([target], "", (columns * factor, rows * factor), fps, frames)
  make(job, source, session, {"latents": str(path), "flags": set_flags()})


def resume(session: Session, path: Path):
  """Goes on with a stream that was saved, in a video of its own."""
  arrays, saved = load_state(path)
  changed = [name for name in _FIXED if FLAGS[name].present]
  if changed:
    raise UsageError(
      f"A saved stream goes on as it was begun, and --{changed[0]} would change it; leave it out."
    )
  fill({k: v for k, v in saved["flags"].items() if k not in LENGTHS}, str(path))
  take_own_weights()
  left = saved["frames_left"]
  frames = requests.length(requests.rate(), 0 if left == 0 else left)
  paths = session.places.choose(saved["names"], path.parent)
  digest = session.digest = in_background(weights_hash, FLAGS.weights)
  model = load()
  if digest.result() != saved["weights_sha256"]:
    raise UsageError(
      f"{path} was saved with other weights than those in {FLAGS.weights}; give those with "
      "--weights."
    )
  cues = [Cue(None if at is None else Fraction(at), *rest) for at, *rest in saved["cues"]]
  pending = arrays.pop("pending", None)
  stream = Stream.from_state(model, arrays)
  g, factor = stream.config.geometry, model.autoencoder.config.space_factor
  job = Job(
    paths, saved["about"]["prompt"], (g.width * factor, g.height * factor), requests.rate(), frames,
    None, cues, saved["chunks"], pending,
  )  # fmt: skip
  about = {**saved["about"], "resumed_from": str(path), "config": describe_stream(stream)}
  make(job, stream, session, {**about, "flags": set_flags()})


def make(job: Job, source: Source, session: Session, about: dict[str, Any]):
  """Writes the videos of a job, and what is to be known of them."""
  about |= {
    "notes": session.notes,
    "weights": FLAGS.weights,
    "device": jax.devices()[0].device_kind,
    "versions": versions(),
  }

  def describe(figures: dict[str, Any] | None = None):
    for path in job.paths:
      attempt(session, write_about, path, {**about, "timings": figures})

  job.begun = describe  # so that it is there if the process is killed
  made = write_videos(job, source, session.stop)
  about["weights_sha256"] = None if session.digest is None else session.digest.result()
  # What cannot be made again goes first.
  if isinstance(source, Stream) and (made.stopped or FLAGS.save_state):
    save(job, source, made, about)
  describe(made.figures)
  for recording in made.recordings:
    attempt(session, recording.write_preview, job.fps)
    say(summary(recording.path, job, made.figures))
    if recording.previews:
      say(f"{' and '.join(map(str, recording.previews))}: contact sheet and preview")


def attempt(session: Session, write: Callable, *args: Any):
  """Writes a file beside a video, which is there whether this succeeds or not."""
  try:
    write(*args)
  except (VideoError, OSError) as e:
    session.failed = True
    tell(f"sample: {e}")


def save(job: Job, stream: Stream, made: Made, about: dict[str, Any]):
  """Writes the state of a stream, and says how to go on."""
  path = beside(job.paths[0], ".state.safetensors")
  state = stream.state()
  if made.surplus is not None:
    state["pending"] = made.surplus
  given = {k: v for k, v in set_flags().items() if k not in PLACES} | {"dtype": dtype()}
  if FLAGS["weights"].present and Path(FLAGS.weights).exists():
    given["weights"] = str(Path(FLAGS.weights).resolve())  # wherever the next run is started from
  note = {
    "flags": given,
    "names": [p.stem for p in job.paths],
    "frames_left": None if job.frames is None else job.frames - made.figures["frames"],
    "weights_sha256": about["weights_sha256"],
    "cues": [[None if c.at is None else str(c.at), *c[1:]] for c in job.cues],
    "chunks": job.chunks,
    "about": {k: about.get(k) for k in ("prompt", "script", "seed", "preset")},
  }
  save_state(path, state, note)
  show = tell if made.stopped else say
  show(f"The stream is kept ({path.stat().st_size / 2**20:.0f} MiB). Go on with it by")
  show(f"  python -m hfjax.sample --resume={shlex.quote(str(path))}")


def whole_clip(model, plan, prompts, seed, size, frames) -> WholeClip:
  """A clip of an undistilled bidirectional model, denoised, with a bar for its steps."""
  with tqdm(total=plan.solver.steps, unit=" steps", desc="denoising", disable=FLAGS.quiet) as bar:
    clip = WholeClip(
      model, prompts, size=size, frames=frames, solver=plan.solver, guidance=plan.guidance,
      guidance_interval=plan.interval,
      negative_prompt=negative(plan.preset), seed=seed, dtype=dtype(),
      progress=lambda step: bar.update(step - bar.n),
    )  # fmt: skip
    clip.denoise()
  return clip


def load() -> pipeline.Pipeline:
  """The networks that the flags name."""
  return pipeline.load(FLAGS.weights, FLAGS.vae, dtype())


def dtype() -> str:
  """What networks compute in."""
  return FLAGS.dtype or default_dtype()


def take_own_weights():
  """Takes the weights that come with hfjax, if there are no others; CheckpointError without."""
  if FLAGS.weights is None:
    FLAGS["weights"].value = str(pipeline.embedded())


def negative(preset: str) -> str:
  """What guided videos keep away from."""
  if FLAGS.negative_prompt is not None:
    return FLAGS.negative_prompt
  usual = SAMPLING_PRESETS[preset].negative
  return NEGATIVE if usual is None else usual


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
    "guidance_interval": c.guidance_interval,
    "shift": c.shift,
    "geometry": dataclasses.asdict(c.geometry),
    "model": dataclasses.asdict(c.model),
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
  peak = figures["peak_bytes"] or figures["peak_host_bytes"]
  return ", ".join([*parts, f"{peak / 2**30:.1f} GiB at most"])


def versions() -> dict[str, str]:
  """Of what made a video."""
  found = {"python": platform.python_version()}
  for name in ("hfjax", "jax", "jaxlib", "flax", "av"):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:  # run from the repository
      continue
  return found


def in_background(call: Callable, *args: Any) -> Future:
  """A call in a thread of its own, which does not keep the process from ending."""
  future: Future = Future()

  def run():
    try:
      future.set_result(call(*args))
    except Exception as e:
      future.set_exception(e)

  threading.Thread(target=run, daemon=True).start()
  return future


def say(words: str):
  """Prints unless the user wants quiet."""
  if not FLAGS.quiet:
    print(words, flush=True)


def tell(words: str):
  """Prints what the user must know, quiet or not."""
  print(words, file=sys.stderr, flush=True)


def run(session: Session):
  """Does what the flags say."""
  from_latents = FLAGS.latents not in (None, "save")
  requests.exclusive(resume=FLAGS.resume is not None, latents=from_latents)
  if FLAGS.resume is not None:
    return resume(session, Path(FLAGS.resume).expanduser())
  take_own_weights()
  return decode(session, Path(FLAGS.latents).expanduser()) if from_latents else sample(session)


def main(argv: list[str], about: str) -> int:
  """Command line; the exit status. about: text of the help, above the flags."""
  reset()
  if {"-h", "--help"} & set(argv):
    print(f"{about}\n{FLAGS.get_help()}")
    return 0
  stop = Stop()
  try:
    with stop, Places() as places:
      parse(argv)
      session = Session(stop, places)
      run(session)
      return int(session.failed)
  except (flags.Error, UsageError) as e:
    return _fail(e, 2)
  except (CheckpointError, VideoError) as e:
    return _fail(e, 1)
  except ValueError as e:
    return _fail(e, 2)
  except OSError as e:
    return _fail(e, 1)
  except KeyboardInterrupt:
    kept = "what was written plays" if stop.begun else "nothing was made"
    tell(f"sample: stopped; {kept}.")
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
