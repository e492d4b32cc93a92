import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.diffusion.guidance import guide
from hfjax.diffusion.solvers import MultistepSolver
from tests.reference import unipc_numpy


def run(solver, velocity, start):
  state = solver.init(jnp.asarray(start))
  for i in range(solver.steps):
    state = solver.step(state, velocity(state.x, solver.timesteps[i], solver.sigmas[i]), i)
  return np.asarray(state.x)


@pytest.mark.parametrize(
  ("kind", "steps", "want"),
  [
    ("unipc", 8, [-1.23610401, -0.74643207, -0.25675997, 0.23291233]),
    ("dpm++", 8, [-1.23983502, -0.75036657, -0.26089805, 0.22857037]),
    ("unipc", 50, [-1.15140486, -0.65753138, -0.16365840, 0.33021441]),
  ],
)
def test_toy_flow_has_the_published_result(kind, steps, want):
  got = run(
    MultistepSolver(kind, steps, 5.0), lambda x, t, _: 0.3 * x + t / 1000, [-1, -1 / 3, 1 / 3, 1]
  )
  np.testing.assert_allclose(got, want, atol=2e-6)  # float32 sums over the steps


@pytest.mark.parametrize(("steps", "want"), [
  (8, [-1.23610401, -0.74643207, -0.25675997, 0.23291233]),
  (50, [-1.15140486, -0.65753138, -0.16365840, 0.33021441]),
])  # fmt: skip
def test_the_oracle_has_the_published_result(steps, want):
  start = np.array([-1, -1 / 3, 1 / 3, 1])
  got = unipc_numpy.solve(lambda x, t: 0.3 * x + t / 1000, start, steps, 5.0)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_grids_have_the_published_values():
  unipc, dpm = MultistepSolver("unipc", 50, 5.0), MultistepSolver("dpm++", 50, 5.0)
  assert [*unipc.timesteps[:6], *unipc.timesteps[-4:]] == [
    999, 995, 991, 987, 982, 978, 302, 241, 172, 92,
  ]  # fmt: skip
  assert [*dpm.timesteps[:6], *dpm.timesteps[-3:]] == [1000, 995, 991, 987, 982, 978, 241, 172, 92]
  assert unipc.sigmas[0] == pytest.approx(0.99979985, abs=6e-8)
  eight = MultistepSolver("unipc", 50, 8.0).timesteps
  assert [*eight[:5], *eight[-2:]] == [999, 997, 994, 991, 989, 249, 140]


@pytest.mark.parametrize("kind", ["unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_straight_flow_is_solved_exactly(kind, steps):
  """One pair of points has a constant predicted clean latent: no order loses anything."""
  x0, noise = np.array([0.5, -2.0]), np.array([1.5, 1.0])
  solver = MultistepSolver(kind, steps, 3.0)
  got = run(solver, lambda x, t, sigma: (x - x0) / sigma, noise)
  np.testing.assert_allclose(got, x0, atol=1e-5)


@pytest.mark.parametrize("kind", ["unipc", "dpm++"])
def test_error_falls_with_the_square_of_the_steps(kind):
  """Order 2 on a smooth flow whose solution is known: Gaussian data of spread 2."""
  spread = 2.0

  def velocity(x, t, sigma):
    variance = (1 - sigma) ** 2 * spread**2 + sigma**2
    x0 = (1 - sigma) * spread**2 / variance * x
    return (x - x0) / sigma

  errors = []
  for steps in (10, 80):
    solver = MultistepSolver(kind, steps, 1.0)
    first = solver.sigmas[0]
    scale = np.sqrt((1 - first) ** 2 * spread**2 + first**2)
    got = run(solver, velocity, [scale])
    errors.append(abs(float(got[0]) - spread))
  # Order 1 would gain a factor of 8, order 2 one of 64, less what the first-order ends cost.
  assert errors[0] / errors[1] > 25, errors


def test_scan_equals_loop():
  solver = MultistepSolver("unipc", 6)
  start = jax.random.normal(jax.random.key(0), (2, 3))

  def step(state, i):
    return solver.step(state, jnp.sin(state.x), i), None

  scanned = jax.jit(lambda x: jax.lax.scan(step, solver.init(x), jnp.arange(6))[0].x)(start)
  np.testing.assert_allclose(scanned, run(solver, lambda x, t, s: jnp.sin(x), start), atol=1e-6)


@pytest.mark.parametrize("settings", [{"kind": "euler"}, {"steps": 0}, {"shift": 0.0}])
def test_impossible_solvers_are_refused(settings):
  with pytest.raises(ValueError, match="choose one of|at least one|must be positive"):
    MultistepSolver(**settings)


def test_guidance_extrapolates_from_the_unconditional():
  assert float(guide(jnp.float32(3), jnp.float32(1), 5.0)) == 11
