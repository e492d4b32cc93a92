"""Solvers and the flow schedule against Diffusers' schedulers (spec sections 6.1 and 6.4)."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hfjax.diffusion.schedule import FlowSchedule
from hfjax.diffusion.solvers import MultistepSolver

STEPS = (1, 2, 3, 4, 8, 20, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0)

# Relative to the largest latent of the trajectory. Diffusers in float32 takes its weights from
# logarithms of rounded noise levels, which near 1 have few digits (1 - sigma is 2e-4, rounded to
# 6e-8), and from differences of near equals. Measured: 1e-7 for one step, 1.5e-6 for 50.
TOLERANCE = 1e-5
# Diffusers in float64, so that only hfjax rounds. Measured: up to 1.2e-6, in 50 steps.
EXACT_TOLERANCE = 4e-6


def velocity(x: np.ndarray, t: float) -> np.ndarray:
  """A toy flow, non-linear in the latents, in their dtype."""
  return (
    0.3 * x + 0.5 * np.sin(3 * x) + 0.4 * np.cos(t / 150) * x**2 / (1 + x**2) + t / 1000 - 0.2
  ).astype(x.dtype)


def noise() -> np.ndarray:
  """Where trajectories start: float32 `[b f y x c]`."""
  return np.random.default_rng(2).standard_normal((1, 3, 4, 5, 2)).astype(np.float32)


def make_unipc(shift: float):
  """Diffusers' UniPC with the settings of spec section 6.4."""
  return diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=shift,
    solver_order=2,
    solver_type="bh2",
    predict_x0=True,
    lower_order_final=True,
    final_sigmas_type="zero",
  )


def make_dpm(shift: float):
  """Diffusers' DPM-Solver++ with the settings of spec section 6.4."""
  return diffusers.DPMSolverMultistepScheduler(
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=shift,
    solver_order=2,
    algorithm_type="dpmsolver++",
    solver_type="midpoint",
    lower_order_final=True,
    final_sigmas_type="zero",
  )


def put_grid(scheduler, solver: MultistepSolver, dtype):
  """Sets the scheduler to the grid of a solver, in place."""
  scheduler.set_timesteps(solver.steps)
  scheduler.sigmas = torch.from_numpy(solver.sigmas).to(dtype)
  scheduler.timesteps = torch.from_numpy(solver.timesteps).to(torch.int64)


def run_theirs(scheduler, dtype=np.float32) -> np.ndarray:
  """Latents before each step of a Diffusers scheduler and after the last."""
  scheduler.set_begin_index(0)
  x = torch.from_numpy(noise().astype(dtype))
  seen = [x.numpy()]
  for t in scheduler.timesteps:
    flow = torch.from_numpy(velocity(x.numpy(), t.item()))
    x = scheduler.step(flow, t, x, return_dict=False)[0]
    seen.append(x.numpy())
  return np.stack(seen)


def run_ours(solver: MultistepSolver) -> np.ndarray:
  """Latents before each step of a solver and after the last."""
  step = jax.jit(solver.step)
  state = solver.init(noise())
  seen = [np.asarray(state.x)]
  for i in range(solver.steps):
    flow = velocity(np.asarray(state.x), float(solver.timesteps[i]))
    state = step(state, flow, i)
    seen.append(np.asarray(state.x))
  return np.stack(seen)


def difference(actual: np.ndarray, desired: np.ndarray) -> float:
  """Largest difference, relative to the largest desired value."""
  assert actual.shape == desired.shape
  assert np.isfinite(desired).all()
  return float(np.abs(actual - desired).max() / np.abs(desired).max())


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_unipc(steps, shift):
  """Grid and trajectory; Diffusers shifts the unshifted noise levels that it is given."""
  solver = MultistepSolver("unipc", steps, shift)
  scheduler = make_unipc(shift)
  # The largest noise level below one, in single precision as spec section 6.4 has it.
  scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1])
  np.testing.assert_allclose(solver.sigmas, scheduler.sigmas.numpy(), rtol=1e-6, atol=0)
  np.testing.assert_array_equal(solver.timesteps, scheduler.timesteps.numpy())
  assert difference(run_ours(solver), run_theirs(scheduler)) < TOLERANCE


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_dpm(steps, shift):
  """Trajectory on the grid of spec section 6.4; Diffusers' own starts lower, at 0.999."""
  solver = MultistepSolver("dpm++", steps, shift)
  scheduler = make_dpm(shift)
  put_grid(scheduler, solver, torch.float32)
  assert difference(run_ours(solver), run_theirs(scheduler)) < TOLERANCE


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind, make", [("unipc", make_unipc), ("dpm++", make_dpm)])
def test_solvers_against_float64(kind, make, steps, shift):
  solver = MultistepSolver(kind, steps, shift)
  scheduler = make(shift)
  put_grid(scheduler, solver, torch.float64)
  theirs = run_theirs(scheduler, np.float64)
  assert difference(run_ours(solver), theirs) < EXACT_TOLERANCE


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_grid_of_unipc_is_that_of_the_other_scheduler(steps, shift):
  """Diffusers' DPM-Solver++ spreads noise levels just as spec section 6.4 does for UniPC."""
  scheduler = make_dpm(shift)
  scheduler.set_timesteps(steps)
  solver = MultistepSolver("unipc", steps, shift)
  np.testing.assert_allclose(solver.sigmas, scheduler.sigmas.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 4, 50, 1000])
def test_flow_schedule_steps(steps, shift):
  """Grid, bit for bit, and Euler trajectory."""
  schedule = FlowSchedule(shift, steps)
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
  scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
  np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.numpy()[:-1])
  np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())

  step = jax.jit(schedule.step)
  x = noise()
  seen = [x]
  for t in schedule.timesteps:
    x = np.asarray(step(velocity(x, float(t)), x, t))
    seen.append(x)
  assert difference(np.stack(seen), run_theirs(scheduler)) < TOLERANCE


@pytest.mark.parametrize("shift", SHIFTS)
def test_flow_schedule_adds_noise(shift):
  schedule = FlowSchedule(shift)
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
  index = np.array([0, 1, 250, 500, 750, 998, 999])
  t = schedule.timesteps[index]
  x0, eps = np.random.default_rng(4).standard_normal((2, len(t), 3, 4)).astype(np.float32)
  theirs = scheduler.scale_noise(
    torch.from_numpy(x0), scheduler.timesteps[index], torch.from_numpy(eps)
  )
  ours = schedule.add_noise(jnp.asarray(x0), jnp.asarray(eps), jnp.asarray(t))
  assert difference(np.asarray(ours), theirs.numpy()) < 1e-6
