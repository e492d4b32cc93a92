"""Scores a model of the shapes world: `python tools/score_shapes.py --weights DIR --name NAME`.

Makes videos of captions that no training has seen and judges their pixels: a video counts if every
attribute of its caption is right in its 5 seconds before each of the times --at. By the preset of
the weights, of bidirectional transformers clips are made, and of others streams; with --vae, clips
go through the autoencoder alone, with --trajectories the ends of trajectories are decoded, which
measures what a student is taught, and with --truth clips are judged as they are, which measures the
judge. Figures go into --out under NAME_5s and so on, what they consist of into details/, and the
first videos' contact sheets beside them.
"""

import argparse
import fcntl
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import commit
from tqdm import tqdm

from hfjax import pipeline
from hfjax.convert import CheckpointError
from hfjax.data import shapes, shapes_score, shapes_words
from hfjax.data.loading import open_source
from hfjax.data.rejects import DataError
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models.sampling_presets import SAMPLING_PRESETS
from hfjax.sampling.clip import WholeClip
from hfjax.streaming import Stream
from hfjax.streaming.pixels import FrameDecoder
from hfjax.video import Preview, write_image

FRAMES = 81  # that are judged by default, 5 seconds
_SEED = 10_007  # of captions
_SHOWN = 12
_SOLVED = ("steps", "guidance", "guidance_interval", "shift")  # flags of teachers alone
_STREAMED = ("window", "sink", "ratio", "variant")  # and of streams


def windows(source: Any, ends: list[int], count: int) -> dict[int, np.ndarray]:
  """The `count` frames before each of `ends`, `[b t y x 3]`, of an iterator over frames."""
  kept: dict[int, list[np.ndarray]] = {end: [] for end in ends}
  done = 0
  for frames in source:
    first, done = done, done + frames.shape[1]
    for end in ends:
      start = max(end - count, first)
      if start < min(end, done):
        kept[end].append(np.asarray(frames[:, start - first : min(end, done) - first]))
    if done >= ends[-1]:
      break
  return {end: np.concatenate(pieces, axis=1) for end, pieces in kept.items()}


def make(model: pipeline.Pipeline, args: argparse.Namespace, prompts: list[str], seed: int) -> Any:
  """An iterator over frames of a batch of videos."""
  preset = SAMPLING_PRESETS[model.preset]
  common = {
    "size": (shapes.SIZE, shapes.SIZE), "negative_prompt": "", "seed": seed, "dtype": args.dtype,
  }  # fmt: skip
  solved = {}
  if preset.solver:
    shift = preset.shift if args.shift is None else args.shift
    guidance = preset.guidance if args.guidance is None else args.guidance
    solver = MultistepSolver(preset.solver, args.steps or preset.solver_steps, shift)
    interval = args.guidance_interval or preset.guidance_interval
    solved = {"solver": solver, "guidance": guidance, "guidance_interval": tuple(interval)}
  if preset.bidirectional:
    return WholeClip(model, prompts, frames=args.frames, **common, **solved)
  settings = {n: getattr(args, n) for n in _STREAMED}
  settings = {name: value for name, value in settings.items() if value is not None}
  return Stream(model, prompts, backend="xla", **common, **solved, **settings)


def check(args: argparse.Namespace, name: str):
  """Raises ValueError on flags that would do nothing, by which figures would be told falsely."""
  preset = SAMPLING_PRESETS[name]
  idle = [*(() if preset.solver else _SOLVED), *(_STREAMED if preset.bidirectional else ())]
  _refuse(args, idle, f"for weights of the preset {name}")
  if preset.solver and (preset.guidance if args.guidance is None else args.guidance) == 1:
    _refuse(args, ["guidance_interval"], "without guidance")


def _refuse(args: argparse.Namespace, idle: Sequence[str], where: str):
  given = [f"--{flag}" for flag in idle if getattr(args, flag) not in (None, 0)]
  if given:
    raise ValueError(f"{', '.join(given)} would do nothing {where}; leave it out.")


def score(args: argparse.Namespace) -> dict[str, Any]:
  """Figures by their names, and sheets and details in files."""
  prompts, source = shapes.prompts("held_out", args.prompts, _SEED), None
  if args.vae or args.truth or args.trajectories:
    _refuse(args, _SOLVED + _STREAMED, "where no model makes videos")
    if args.at != [5.0]:
      raise ValueError("Clips are as long as they are; leave out --at.")
  if args.trajectories:
    if args.frames != FRAMES:
      raise ValueError("Trajectories are as long as they are; leave out --frames.")
    source = open_source("trajectories", args.trajectories)
    prompts = [source[i]["prompt"] for i in range(min(args.prompts, len(source)))]
    for prompt in prompts:  # before all are decoded
      shapes_words.read(prompt)
  # The first are judged from the beginning on.
  ends = [args.frames if i == 0 and at <= 5 else round(at * shapes.FPS) + 1
          for i, at in enumerate(args.at)]  # fmt: skip
  found: dict[int, list[np.ndarray]] = {end: [] for end in ends}
  model: Any = None
  begin = time.perf_counter()
  given = args.vae or args.truth or args.trajectories
  clips = shapes.Shapes("held_out", args.prompts, _SEED, args.frames)
  if args.vae or args.trajectories:
    autoencoder = pipeline.load_autoencoder(args.weights, "full", args.dtype)
  elif not given:
    model = pipeline.load(args.weights, dtype=args.dtype)
    check(args, model.preset)
  streams = model is not None and not SAMPLING_PRESETS[model.preset].bidirectional
  errors: list[float] = []
  for start in tqdm(range(0, len(prompts), args.batch), disable=args.quiet, unit="batch"):
    chosen = prompts[start : start + args.batch]
    if source is not None:
      latents = [source[start + i]["trajectory"][-1] for i in range(len(chosen))]
      latents += [latents[-1]] * (args.batch - len(chosen))
      decoded = FrameDecoder(autoencoder)(jnp.asarray(np.stack(latents)))
      found[ends[0]].append(np.asarray(decoded[: len(chosen)]))
    elif given:
      videos = pixels = np.stack([clips.video(start + i) for i in range(len(chosen))])
      if args.vae:
        from hfjax.training import autoencoder as measures

        videos = measures.reconstruct(autoencoder.config, autoencoder.params, pixels, args.dtype)
        errors += [measures.psnr(a, b) for a, b in zip(pixels, videos, strict=True)]
      found[ends[0]].append(videos)
    else:
      # A batch of one size, so that one program serves all.
      filled = [*chosen, *[chosen[-1]] * (args.batch - len(chosen))]
      for end, videos in windows(make(model, args, filled, start), ends, args.frames).items():
        found[end].append(videos[: len(chosen)])
  made = time.perf_counter() - begin
  figures: dict[str, Any] = {}
  folder = Path(args.out).parent
  for at, end in zip(args.at, ends, strict=True):
    videos = np.concatenate(found[end])
    result = shapes_score.score(prompts, shapes_score.look(videos, args.workers))
    name = args.name + (f"_{at:g}s" if streams else "")
    details = {**result.to_json(), "seconds_to_make": made}
    if args.vae:
      details |= {"psnr_db": float(np.mean(errors)), "psnr_db_deviation": float(np.std(errors))}
      figures["vae_psnr_db"] = details["psnr_db"]
    figures[name] = result.accuracy
    write(folder / "details" / f"{name}.json", {**details, **about(args)})
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    for i, video in enumerate(videos[:_SHOWN]):
      preview = Preview(width=shapes.SIZE)
      preview.add(video)
      write_image(folder / "sheets" / f"{name}-{i:02d}.png", preview.sheet())
    low, high = details["low"], details["high"]
    print(f"{name}: {result.accuracy:.3f} ({low:.3f} to {high:.3f}), {details['attributes']}")
  return figures


def about(args: argparse.Namespace) -> dict[str, Any]:
  """What was run, and where."""
  return {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "commit": args.commit or commit(),
    "command": args.command,
  }


def write(path: Path, value: Any):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  flag("--weights", metavar="DIR", help="folder of all models")
  flag("--name", required=True, help="of the figures, such as student_accuracy")
  flag("--prompts", type=int, default=1000)
  flag("--at", type=float, nargs="+", default=[5.0], help="seconds")
  flag("--frames", type=int, default=FRAMES, help="that are judged, at least 33")
  flag("--batch", type=int, default=50, help="videos that are made at once")
  flag("--vae", action="store_true", help="score the autoencoder alone")
  flag("--trajectories", metavar="DIR", help="score ends of a teacher's trajectories")
  flag("--truth", action="store_true", help="score true clips, by which the judge is measured")
  flag("--steps", type=int, default=0, help="of a teacher's solver; its preset's by default")
  flag("--guidance", type=float, help="of a teacher, likewise")
  flag("--guidance_interval", type=float, nargs=2, metavar=("FROM", "TO"),
       help="times between which there is guidance, likewise")  # fmt: skip
  flag("--shift", type=float, help="of times of a teacher, likewise")
  flag("--window", type=int, help="of a stream, as the next three; else the model's")
  flag("--sink", type=int)
  flag("--ratio", type=float)
  flag("--variant")
  flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  flag("--workers", type=int, default=0, help="processes that judge")
  flag("--out", default="benchmarks/shapes/results.json", metavar="FILE")
  flag("--commit", help="to record, where git is not there")
  flag("--quiet", action="store_true")
  args = parser.parse_args(argv)
  args.command = " ".join(itertools.chain(["python", "tools/score_shapes.py"], argv))
  if args.frames < 33 or args.frames % 4 != 1:
    print("score_shapes: give --frames from 33 on, 1 and a multiple of 4.", file=sys.stderr)
    return 2
  if args.at != sorted(args.at) or min(args.prompts, args.batch, *args.at) < 1:
    print("score_shapes: give 1 or more prompts, a batch, and rising times.", file=sys.stderr)
    return 2
  if args.vae + args.truth + bool(args.trajectories) > 1:
    print("score_shapes: give one of --vae, --truth and --trajectories.", file=sys.stderr)
    return 2
  if (args.weights is None) != args.truth:
    print("score_shapes: give --weights DIR, or else --truth.", file=sys.stderr)
    return 2
  try:
    figures = score(args)
  except (CheckpointError, DataError, ValueError) as e:
    print(f"score_shapes: {e}", file=sys.stderr)
    return 2
  add(Path(args.out), figures, about(args))
  return 0


def add(path: Path, figures: dict[str, Any], told: dict[str, Any]):
  """Adds figures to those of other commands, which may do the same at this moment."""
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX)
    before = json.loads(path.read_text()) if path.is_file() else {}
    commands = dict.fromkeys([*before.get("command", "").split("; "), told["command"]])
    told = told | {"command": "; ".join(c for c in commands if c)}
    write(path, {**before, **figures, **told})
  finally:
    os.close(folder)


if __name__ == "__main__":
  sys.exit(main())
