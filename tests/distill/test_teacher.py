"""A teacher's trajectory against plain loops in float64."""

import jax
import numpy as np
import pytest

from hfjax.diffusion.schedule import FlowSchedule
from hfjax.distill import teacher

SHAPE = (2, 3, 2, 2, 4)
SHIFT, STEPS, GUIDANCE = 5.0, 6, 3.5


def flows(x, t, i):
  """Of the sort that networks give: they depend on latents, time and text."""
  t = t.reshape(-1, 1, 1, 1, 1)
  return 0.3 * x + t / 1000 + 0.01 * i, 0.2 * x - t / 2000


def sigma(step, steps=STEPS):
  u = 1 - step / steps
  return SHIFT * u / (1 + (SHIFT - 1) * u)


def loop(noise, stop):
  """States before each step, and the flows of the last."""
  x = np.float64(noise)
  for i in range(stop):
    t = np.full(2, 1000 * sigma(i))
    both = flows(x, t, i)
    if i + 1 < stop:
      x = x + (sigma(i + 1) - sigma(i)) * (both[1] + GUIDANCE * (both[0] - both[1]))
  return x, both


@pytest.mark.parametrize("stop", [None, 1, 3, STEPS])
def test_the_end_of_the_trajectory(stop):
  noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  run = jax.jit(lambda x: teacher.solve(flows, x, FlowSchedule(SHIFT, STEPS), GUIDANCE, stop))
  last = stop or STEPS
  x, (conditional, unconditional) = loop(noise, last)
  if last == STEPS:
    guided = unconditional + GUIDANCE * (conditional - unconditional)
    want = x - sigma(STEPS - 1) * guided
  else:
    clean = [x - sigma(last - 1) * f for f in (conditional, unconditional)]
    want = clean[0] + GUIDANCE * (clean[0] - clean[1])
  np.testing.assert_allclose(run(noise), want, rtol=1e-5, atol=1e-5)
  assert not np.any(jax.grad(lambda x: run(x).sum())(noise))


@pytest.mark.parametrize("stop", [0, 7])
def test_impossible_numbers_of_steps_are_refused(stop):
  with pytest.raises(ValueError, match=f"stop after {stop} of 6 steps"):
    teacher.solve(flows, np.zeros(SHAPE), FlowSchedule(SHIFT, STEPS), GUIDANCE, stop)
