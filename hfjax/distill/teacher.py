"""A teacher's trajectory from given noise, in many Euler steps (spec section 8.7)."""

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hfjax.diffusion.guidance import guide
from hfjax.diffusion.schedule import TRAIN_TIMESTEPS, FlowSchedule
from hfjax.distill.losses import extrapolate

# Flows under the prompt and under the negative one, of latents at a time `[b]`.
Flows = Callable[[Array, Array, Array], tuple[Array, Array]]


def solve(
  flows: Flows,
  noise: Float[Array, "b f y x c"],
  schedule: FlowSchedule,
  guidance: float,
  stop: int | None = None,
  final: FlowSchedule | None = None,
) -> Float[Array, "b f y x c"]:
  """Latents at the end of `schedule.steps` steps, float32; no gradient flows.

  flows: called as `flows(x, t, i)`, i the number of the step; under `lax.scan`.
  guidance: of the flow, `unconditional + guidance (conditional - unconditional)`.
  stop: steps after which the clean latents that the last one sees are the result, further away from
    the unconditional ones by `guidance` times their distance; all by default.
  final: schedule whose noise levels turn those last flows into latents; `schedule` by default.

  Raises ValueError if `stop` is not from 1 to all steps.
  """
  steps = schedule.steps
  stop = steps if stop is None else stop
  if not 1 <= stop <= steps:
    raise ValueError(f"The teacher is to stop after {stop} of {steps} steps; give 1 to {steps}.")
  whole = stop == steps
  step = lambda x, i: (_step(flows, schedule, guidance, x, i), None)
  x = jnp.asarray(noise, jnp.float32)
  x, _ = jax.lax.scan(step, x, jnp.arange(stop - 1))
  if whole:
    x = _step(flows, schedule, guidance, x, jnp.int32(stop - 1))
  else:
    t, (conditional, unconditional) = _flows_at(flows, schedule, x, jnp.int32(stop - 1))
    table = final or schedule
    clean = table.x0_from_flow(conditional, x, t), table.x0_from_flow(unconditional, x, t)
    x = extrapolate(*clean, guidance)
  return jax.lax.stop_gradient(x)


def trace(
  flows: Flows,
  noise: Float[Array, "b f y x c"],
  schedule: FlowSchedule,
  guidance: float,
  keep: Sequence[int],
) -> Float[Array, "b s f y x c"]:
  """Latents before the steps `keep`, float32, where the number of steps means after all of them.

  flows, guidance: as in `solve`. No gradient flows.

  Raises ValueError unless `keep` ascends, from 0 at the least to `schedule.steps` at the most.
  """
  keep = tuple(keep)
  ascends = all(a < b for a, b in itertools.pairwise(keep))
  if not keep or not ascends or keep[0] < 0 or keep[-1] > schedule.steps:
    raise ValueError(
      f"States {keep} of a trajectory of {schedule.steps} steps are to be kept; give ascending "
      f"numbers from 0 to {schedule.steps}."
    )
  # Where each state goes; beyond the last place it is dropped.
  place = np.full(schedule.steps + 1, len(keep))
  place[list(keep)] = np.arange(len(keep))
  put = lambda kept, x, i: kept.at[jnp.asarray(place)[i]].set(x, mode="drop")

  def step(carry, i):
    x, kept = carry
    x = _step(flows, schedule, guidance, x, i)
    return (x, put(kept, x, i + 1)), None

  x = jnp.asarray(noise, jnp.float32)
  kept = put(jnp.zeros((len(keep), *x.shape), jnp.float32), x, 0)
  (_, kept), _ = jax.lax.scan(step, (x, kept), jnp.arange(keep[-1]))
  return jax.lax.stop_gradient(jnp.moveaxis(kept, 0, 1))


def kept_states(schedule: FlowSchedule, steps: Sequence[float]) -> tuple[int, ...]:
  """States of a trajectory at which a student takes its steps, and the clean one: for `trace`.

  steps: nominal denoising steps, descending from 1000 at the most, without the 0; they are warped
    by the schedule's shift.

  Raises ValueError if the trajectory does not pass through the student's times.
  """
  if not steps or any(a <= b for a, b in itertools.pairwise(steps)) or steps[-1] <= 0:
    raise ValueError(
      f"The denoising steps are {tuple(steps)}; give descending ones without a 0, such as "
      "1000, 750, 500, 250."
    )
  times = FlowSchedule(schedule.shift).warp(steps)
  found = []
  for nominal, time in zip(steps, times, strict=True):
    i = int(np.argmin(np.abs(schedule.timesteps - np.float32(time))))
    if not np.isclose(schedule.timesteps[i], time, rtol=1e-5, atol=0):
      needed = math.lcm(*(Fraction(int(s), TRAIN_TIMESTEPS).denominator for s in steps))
      raise ValueError(
        f"The student's step {nominal:g} lies at time {time:g}, and a teacher of {schedule.steps} "
        f"steps does not pass it (nearest: {schedule.timesteps[i]:g}); give the teacher a multiple "
        f"of {needed} steps."
      )
    found.append(i)
  return (*found, schedule.steps)


def _flows_at(flows: Flows, schedule: FlowSchedule, x: Array, i: Array):
  """The time of step `i`, and the flows there."""
  t = jnp.full(x.shape[:1], jnp.asarray(schedule.timesteps)[i])
  return t, flows(x, t, i)


def _step(flows: Flows, schedule: FlowSchedule, guidance: float, x: Array, i: Array) -> Array:
  """Latents after step `i`."""
  t, (conditional, unconditional) = _flows_at(flows, schedule, x, i)
  return schedule.step(guide(conditional, unconditional, guidance), x, t)
