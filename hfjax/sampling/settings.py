"""How videos are sampled: what the weights are meant for, and what the flags change."""

import dataclasses
from typing import Any

import numpy as np

from hfjax.diffusion.guidance import Interval, as_interval, count_texts
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models.geometry import Geometry
from hfjax.models.sampling_presets import SAMPLING_PRESETS
from hfjax.pipeline import Pipeline
from hfjax.sampling import requests
from hfjax.sampling.flags import FLAGS, UsageError
from hfjax.sampling.script import Cue

_FEW = 10  # steps at most that a distilled model is asked for
_GUIDANCE = 5.0  # of undistilled models (spec section 6.4)
_STEPS = 50
_OF_STREAMS = ("window", "sink", "sparsity", "attention", "variant")


@dataclasses.dataclass(frozen=True)
class Plan:
  """Settings of a run.

  preset: its name. stream: arguments of `Stream`, where there is one. solver: None for few-step
  models. guidance, interval: factor, and times from and up to which there is guidance.
  """

  preset: str
  bidirectional: bool
  stream: dict[str, Any]
  solver: MultistepSolver | None
  guidance: float
  interval: Interval


def plan(model: Pipeline) -> Plan:
  """What the flags and the model's preset come to; UsageError on what does not go together."""
  name = FLAGS.preset or model.preset
  preset = SAMPLING_PRESETS[name]
  steps, kind = requests.steps(), _solver(preset.solver)
  solver = None
  stream: dict[str, Any] = {
    "window": preset.window if FLAGS.window is None else FLAGS.window,
    "sink": preset.sink if FLAGS.sink is None else FLAGS.sink,
    "ratio": _ratio(preset.ratio or Geometry.ratio),
    "block": preset.block or Geometry.block,
    "variant": FLAGS.variant or preset.variant,
    "shift": preset.shift,
  }
  if kind is None:
    if preset.bidirectional:
      raise UsageError("A bidirectional model needs a multistep solver; leave out --solver.")
    stream["steps"] = _spread(steps) if isinstance(steps, int) else steps or preset.steps
  else:
    if isinstance(steps, tuple):
      raise UsageError(
        f"The solver {kind} takes a number of steps, and got a list of {len(steps)}; give --steps="
        f"{_STEPS}, or --solver=few-step for a distilled model."
      )
    solver = MultistepSolver(kind, steps or preset.solver_steps or _STEPS, preset.shift)
    stream["solver"] = solver
  usual = (preset.guidance if preset.solver else _GUIDANCE) if solver else 1.0
  guidance = usual if FLAGS.guidance is None else FLAGS.guidance
  count_texts(guidance)  # checks it
  interval = _interval(preset.guidance_interval)
  if guidance == 1 and FLAGS.guidance_interval is not None:
    raise UsageError(
      "--guidance_interval says where there is guidance, and there is none; give --guidance=5, "
      "say, with it."
    )
  stream |= {"guidance": guidance, "guidance_interval": interval}
  return Plan(name, preset.bidirectional, stream, solver, guidance, interval)


def check_clip(frames: int | None, begin: np.ndarray | None, cues: list[Cue]):
  """Raises UsageError on what whole clips of bidirectional models cannot have."""
  wrong = {
    "--endless": frames is None,
    "--image and --video": begin is not None,
    "--script": bool(cues),
    "--save_state": FLAGS.save_state,
    **{f"--{name}": FLAGS[name].present for name in _OF_STREAMS},
  }
  for name, is_wrong in wrong.items():
    if is_wrong:
      raise UsageError(
        f"{name} cannot be had of a bidirectional model, which makes whole clips at once; take a "
        "causal one, or --preset=self_forcing if this one is."
      )


def _interval(usual: Interval) -> Interval:
  """Times from and up to which there is guidance."""
  given = FLAGS.guidance_interval
  if given is None:
    return usual
  try:
    low, high = map(float, given)
    return as_interval((low, high))
  except ValueError:
    raise UsageError(
      f"--guidance_interval is {','.join(given)!r}; give two times from 0 to 1000, the lower one "
      "first, such as 500,1000."
    ) from None


def _solver(usual: str | None) -> str | None:
  """Kind of a multistep solver, or None for few steps."""
  if FLAGS.solver is not None:
    return None if FLAGS.solver == "few-step" else FLAGS.solver
  steps = requests.steps()
  many = isinstance(steps, int) and steps > _FEW
  guided = FLAGS.guidance is not None and FLAGS.guidance != 1
  return usual or ("unipc" if many or guided else None)


def _spread(steps: int) -> tuple[float, ...]:
  """So many few steps, evenly spaced: of 4 they are 1000, 750, 500 and 250."""
  return tuple(float(round(1000 * (steps - i) / steps)) for i in range(steps))


def _ratio(usual: float) -> float:
  """Share of blocks that is kept."""
  if FLAGS.attention == "dense":
    return 1.0
  if FLAGS.sparsity is None:
    return usual
  # Of 0.8 it is 0.2, and not a little less, since counts of blocks are floored.
  return round(1 - FLAGS.sparsity, 9)
