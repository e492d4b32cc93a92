"""Videos of the student while it is trained, always from the same noise."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from hfjax.diffusion.solvers import MultistepSolver
from hfjax.pipeline import Pipeline
from hfjax.sampling.clip import WholeClip
from hfjax.streaming import Stream
from hfjax.streaming.pixels import Autoencoder
from hfjax.training.metrics import Metrics
from hfjax.training.plan import Plan
from hfjax.training.stages import Stage
from hfjax.training.weights import Encoder, TrainedText, as_pipeline
from hfjax.video import Preview, VideoError, VideoWriter, write_image

_GEOMETRY = ("chunk", "window", "sink", "ratio", "rope_cap", "block", "variant")


def make_videos(
  plan: Plan,
  stage: Stage,
  encode: Encoder,
  autoencoder: Autoencoder,
  step: int,
  workdir: Path,
  metrics: Metrics,
  say: Callable[[str], None],
  stop: Callable[[], bool] = lambda: False,
):
  """Writes a video and a contact sheet for each prompt, of weights and of their averages.

  stop: whether to leave it, asked for after each chunk.
  They are `videos/step-000200-raw-0.mp4` and `.png`; sheets go to the metrics too. What cannot be
  written is told of, and training goes on.
  """
  kinds = {"raw": False} | ({"ema": True} if plan.average else {})
  for kind, averaged in kinds.items():
    if stop() or not plan.config.validation.prompts:
      return
    if isinstance(encode.encode, TrainedText):
      encode.encode.params = stage.text(averaged)
    model = as_pipeline(plan, stage.student(averaged), encode, autoencoder)
    name = f"step-{step:06d}-{kind}"
    previews, stems = _write(plan, model, workdir / "videos", name, say, stop)
    for number, (preview, stem) in enumerate(zip(previews, stems, strict=True)):
      if jax.process_index() == 0:
        sheet = preview.sheet()
        metrics.image(step, f"validation/{kind}-{number}", sheet)
        _try(say, write_image, f"{stem}.png", sheet)


def _write(plan: Plan, model: Pipeline, folder: Path, name: str, say, stop):
  """Previews of the videos of all prompts, and the paths of their files without endings."""
  c, g = plan.config.validation, plan.stream.geometry
  prompts = list(c.prompts)
  factor, stride = model.autoencoder.config.space_factor, model.autoencoder.config.time_factor
  wanted = 1 + stride * (c.frames - 1)
  size = (g.width * factor, g.height * factor)
  stems = [folder / f"{name}-{i}" for i in range(len(prompts))]
  if jax.process_index() == 0:
    _try(say, functools.partial(folder.mkdir, parents=True, exist_ok=True))
  previews, writers = [Preview(width=size[0]) for _ in prompts], list[VideoWriter]()
  if jax.process_index() == 0:
    for stem in stems:
      _try(say, lambda path: writers.append(VideoWriter(path, *size, c.fps)), f"{stem}.mp4")
  done = 0
  for chunk in _source(plan, model, prompts, size, wanted):
    frames = np.asarray(chunk)[:, : wanted - done]
    done += frames.shape[1]
    for preview, video in zip(previews, frames, strict=True):
      preview.add(video)
    for writer, video in zip(writers, frames, strict=False):
      _try(say, writer.write, video)
    if done >= wanted or stop():
      break
  for writer in writers:
    _try(say, writer.close)
  return previews, stems


def _source(
  plan: Plan, model: Pipeline, prompts: list[str], size: tuple[int, int], frames: int
) -> Iterator[UInt8[Any, "b t y x 3"]]:
  c = plan.config
  solved = {
    "solver": MultistepSolver("unipc", c.flow.solver_steps, c.flow.shift),
    "guidance": c.flow.guidance,
    "guidance_interval": tuple(c.flow.guidance_interval),
  }
  if not plan.causal:
    return WholeClip(
      model, prompts, size=size, frames=frames, **solved,
      negative_prompt=c.text.negative, seed=c.validation.seed, dtype=c.compute.dtype,
    )  # fmt: skip
  settings = {name: c.geometry[name] for name in _GEOMETRY}
  if plan.stage == "flow":
    settings |= {**solved, "shift": c.flow.shift}
  else:
    settings |= dict(c.denoising)
  return Stream(
    model, prompts, size=size, seed=c.validation.seed, negative_prompt=c.text.negative,
    dtype=c.compute.dtype, backend=c.compute.backend, **settings,
  )  # fmt: skip


def _try(say: Callable[[str], None], write: Callable[..., Any], *args: Any):
  try:
    write(*args)
  except (VideoError, OSError) as e:
    say(f"A validation video is missing: {e}")
