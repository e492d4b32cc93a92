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
  """The state before the last step, and the flows there."""
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


@pytest.mark.parametrize("keep", [(0, 2, 3, 6), (1,), (0,), (4, 6)])
def test_states_on_the_way(keep):
  noise = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
  schedule = FlowSchedule(SHIFT, STEPS)
  run = jax.jit(lambda x: teacher.trace(flows, x, schedule, GUIDANCE, keep))
  got = run(noise)
  assert got.shape == (2, len(keep), *SHAPE[1:]) and got.dtype == np.float32
  for place, state in enumerate(keep):
    # The loop ends before its last step, whose flows it gives too.
    want = loop(noise, state + 1)[0]
    np.testing.assert_allclose(got[:, place], want, rtol=1e-5, atol=1e-5)
  if keep[-1] == STEPS:
    end = teacher.solve(flows, noise, schedule, GUIDANCE)
    np.testing.assert_allclose(got[:, -1], end, rtol=1e-6, atol=1e-6)
  assert not np.any(jax.grad(lambda x: run(x).sum())(noise))


@pytest.mark.parametrize("keep", [(), (0, 0), (3, 2), (-1, 2), (0, 7)])
def test_states_that_are_not_there_are_refused(keep):
  with pytest.raises(ValueError, match="ascending numbers from 0 to 6"):
    teacher.trace(flows, np.zeros(SHAPE), FlowSchedule(SHIFT, STEPS), GUIDANCE, keep)


@pytest.mark.parametrize("steps", [4, 12, 48, 1000])
@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_kept_states_lie_at_the_students_times(steps, shift):
  keep = teacher.kept_states(FlowSchedule(shift, steps), (1000, 750, 500, 250))
  assert keep == (0, steps // 4, steps // 2, 3 * steps // 4, steps)
  for i, u in zip(keep, (1, 0.75, 0.5, 0.25), strict=False):
    time = 1000 * shift * u / (1 + (shift - 1) * u)
    np.testing.assert_allclose(FlowSchedule(shift, steps).timesteps[i], time, rtol=1e-6)


def test_teachers_that_do_not_pass_the_students_times_are_refused():
  with pytest.raises(ValueError, match="step 750 lies at time 937.5.*50 .*multiple of 4 steps"):
    teacher.kept_states(FlowSchedule(5.0, 50), (1000, 750, 500, 250))
  with pytest.raises(ValueError, match="multiple of 10 steps"):
    teacher.kept_states(FlowSchedule(5.0, 16), (1000, 900))
  assert teacher.kept_states(FlowSchedule(5.0, 20), (1000, 900, 250)) == (0, 2, 15, 20)
  with pytest.raises(ValueError, match="descending ones without a 0"):
    teacher.kept_states(FlowSchedule(5.0, 50), (1000, 500, 0))
  with pytest.raises(ValueError, match="whole number from 0 to 1000"):
    teacher.kept_states(FlowSchedule(5.0, 50), (1001, 500))


@pytest.mark.parametrize("stop", [0, 7])
def test_impossible_numbers_of_steps_are_refused(stop):
  with pytest.raises(ValueError, match=f"stop after {stop} of 6 steps"):
    teacher.solve(flows, np.zeros(SHAPE), FlowSchedule(SHIFT, STEPS), GUIDANCE, stop)
