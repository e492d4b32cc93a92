"""Where a teacher's trajectory from given noise ends, in many Euler steps (spec section 8.7)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax.diffusion.guidance import guide
from hfjax.diffusion.schedule import FlowSchedule
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
  times = jnp.asarray(schedule.timesteps)

  def at(x, i):
    t = jnp.full(x.shape[:1], times[i])
    return t, flows(x, t, i)

  def step(x, i):
    t, (conditional, unconditional) = at(x, i)
    flow = guide(conditional, unconditional, guidance)
    return schedule.step(flow, x, t, to_final=False), None

  x = jnp.asarray(noise, jnp.float32)
  x, _ = jax.lax.scan(step, x, jnp.arange(stop - 1))
  t, (conditional, unconditional) = at(x, jnp.int32(stop - 1))
  if whole:
    x = schedule.step(guide(conditional, unconditional, guidance), x, t)
  else:
    table = final or schedule
    clean = table.x0_from_flow(conditional, x, t), table.x0_from_flow(unconditional, x, t)
    x = extrapolate(*clean, guidance)
  return jax.lax.stop_gradient(x)
