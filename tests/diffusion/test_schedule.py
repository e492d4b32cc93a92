import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfjax.diffusion.schedule import FlowSchedule, training_target

SHIFTS = st.floats(0.2, 12)


def test_table_of_shift_5_has_the_published_values():
  s = FlowSchedule(5.0)
  expected = {0: 1000, 1: 999.799805, 250: 937.5, 500: 833.333313, 625: 750.000061, 750: 625,
              998: 9.920635, 999: 4.980080}  # fmt: skip
  np.testing.assert_allclose([s.timesteps[i] for i in expected], list(expected.values()), 2e-7)
  # This one is compared for equality by whoever warps steps: exact to the last bit.
  assert float(s.timesteps[500]).hex() == "0x1.a0aaaa0000000p+9"
  weights = {0: 0, 250: 0.397952, 500: 1.024862, 750: 1.914043, 999: 0.031879}
  got = [s.training_weights[i] for i in weights]
  np.testing.assert_allclose(got, list(weights.values()), atol=1e-6)
  assert np.argmax(s.training_weights) == 833
  assert s.training_weights.mean() == pytest.approx(1, abs=1e-5)


def test_warped_steps_have_the_published_values():
  assert FlowSchedule(5.0).warp([1000, 750, 500, 250, 0]) == (
    1000, 937.5, float.fromhex("0x1.a0aaaap+9"), 625, 0,
  )  # fmt: skip
  np.testing.assert_allclose(
    FlowSchedule(8.0).warp([1000, 750, 500, 250]), [1000, 960, 888.888916, 727.272766], 1e-7
  )


@pytest.mark.parametrize("step", [-1, 1001, 500.5])
def test_a_step_outside_the_table_is_refused(step):
  with pytest.raises(ValueError, match=f"step {step} is no whole number from 0 to 1000"):
    FlowSchedule().warp([1000, step])


@pytest.mark.parametrize("settings", [{"shift": 0}, {"shift": -1}, {"steps": 0}])
def test_impossible_schedules_are_refused(settings):
  with pytest.raises(ValueError, match="must be positive|at least one"):
    FlowSchedule(**settings)


@given(
  SHIFTS,
  st.sampled_from([1, 7, 60]),
  st.lists(st.floats(0, 1000, width=32), min_size=8, max_size=8),
)
def test_lookup_takes_the_first_of_the_nearest(shift, steps, times):
  s = FlowSchedule(shift, steps)
  distance = np.abs(s.timesteps[None] - np.float32(times)[:, None])
  want = [list(row).index(row.min()) for row in distance]
  assert np.array_equal(s.index(np.float32(times)), want)
  assert np.array_equal(s.sigma(np.float32(times)), s.sigmas[want])


def test_time_zero_falls_on_the_last_entry_and_not_on_zero():
  s = FlowSchedule(5.0)
  assert int(s.index(jnp.zeros(()))) == 999
  assert float(s.sigma(jnp.zeros(()))) == pytest.approx(0.00498008, abs=1e-8)


@given(SHIFTS, st.floats(0, 1000, width=32), st.integers(0, 99))
def test_conversions_invert_each_other(shift, time, seed):
  s = FlowSchedule(shift)
  r = np.random.default_rng(seed)
  x0, noise = (jnp.asarray(r.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))
  t = jnp.full((2,), time)
  x_t = s.add_noise(x0, noise, t)
  flow = training_target(x0, noise)
  sigma = float(s.sigma(t)[0])
  np.testing.assert_allclose(s.x0_from_flow(flow, x_t, t), x0, atol=2e-6)
  # Dividing by sigma magnifies the rounding of x_t.
  np.testing.assert_allclose(s.flow_from_x0(x0, x_t, t), flow, atol=1e-6 / sigma + 1e-6)


def test_times_cover_leading_axes():
  s = FlowSchedule()
  x = jnp.ones((2, 3, 4, 5))
  t = jnp.array([[1000.0, 500, 0], [250, 750, 1000]])
  got = s.add_noise(x, 2 * x, t)
  np.testing.assert_allclose(got[..., 0, 0], 1 + s.sigma(t), 1e-6)
  assert got.dtype == x.dtype
  assert s.add_noise(x, x.astype(jnp.bfloat16), t).dtype == jnp.bfloat16


@given(SHIFTS, st.sampled_from([2, 5, 25]))
def test_euler_follows_a_straight_flow_exactly(shift, steps):
  """With the true flow of one pair of points, any number of steps ends at the clean point."""
  s = FlowSchedule(shift, steps)
  x0, noise = jnp.array([[0.5, -2.0]]), jnp.array([[1.5, 1.0]])
  x = noise
  for t in s.timesteps:
    x = s.step(noise - x0, x, jnp.full((1,), t))
  np.testing.assert_allclose(x, x0, atol=1e-5)
  jump = s.step(noise - x0, noise, jnp.full((1,), s.timesteps[0]), to_final=True)
  np.testing.assert_allclose(jump, x0, atol=1e-6)


def test_methods_work_under_jit_with_the_schedule_as_argument():
  f = jax.jit(lambda s, x, t: s.add_noise(x, x, t))
  x = jnp.ones((2, 3))
  np.testing.assert_allclose(f(FlowSchedule(3.0), x, jnp.array([10.0, 900.0])), x, 1e-6)
