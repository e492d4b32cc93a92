import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfjax.models import rope
from tests.helpers import interleave


def test_published_angles_at_position_one():
  """Spec section 2, head dimension 128: first pairs of each axis and others."""
  one = rope.grid_rotation(jnp.array([[1]]), (2, 2), 128)
  angle = np.arctan2(one.sin, one.cos)[0, 3]  # the token at row 1, column 1
  pairs = {0: 1, 1: 0.65793322, 21: 1.5199111e-4, 22: 1, 23: 0.64494668, 42: 1.5505158e-4,
           43: 1, 63: 1.5505158e-4}  # fmt: skip
  np.testing.assert_allclose([angle[i] for i in pairs], list(pairs.values()), 1e-6)


def test_published_timestep_embedding():
  got = rope.timestep_embedding(jnp.float32(937.5), 256)
  want = [0.26230213, 0.58048729, 0.99492957, 0.96498580, -0.81426931, 0.10057415]
  np.testing.assert_allclose(got[jnp.array([0, 1, 127, 128, 129, 255])], want, atol=5e-7)


@given(
  st.sampled_from([2, 6, 32, 256]),
  st.lists(st.floats(0, 1000, width=32, allow_subnormal=False), min_size=5, max_size=5),
)
def test_timestep_embedding_is_accurate_for_any_time(width, times):
  t = np.float64(np.float32(times))[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
  want = np.concatenate([np.cos(t), np.sin(t)], axis=-1)
  # Three roundings of numbers up to one.
  np.testing.assert_allclose(rope.timestep_embedding(np.float32(times), width), want, atol=4e-7)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=5, max_size=5), st.sampled_from([1, 5, 64]))
def test_turns_are_accurate_for_any_position(positions, pairs):
  omega = rope.frequencies(pairs)
  angle = np.float64(positions)[:, None] * omega  # exact enough below 2^31: angles to 5e-7
  got = rope.turn(jnp.array(positions, jnp.int32), omega)
  np.testing.assert_allclose(got.cos, np.cos(angle), atol=2e-6)
  np.testing.assert_allclose(got.sin, np.sin(angle), atol=2e-6)


@pytest.mark.parametrize(
  ("head_dim", "start", "frames"), [(2, 3, 2), (4, 0, 1), (10, 40, 3), (32, 7, 2), (128, 18, 3)]
)
def test_rotation_equals_complex_multiplication(head_dim, start, frames):
  """Against spec section 2, written with complex numbers and interleaved pairs."""
  c, grid = head_dim // 2, (2, 3)
  widths = (c - 2 * (c // 3), c // 3, c // 3)
  r = np.random.default_rng(head_dim)
  x = r.normal(size=(frames * 6, head_dim)).astype(np.float32)
  want = np.zeros_like(x)
  for f in range(frames):
    for i in range(grid[0]):
      for j in range(grid[1]):
        token = (f * grid[0] + i) * grid[1] + j
        angles = [
          p * 10000.0 ** (-2 * np.arange(w) / (2 * w)) if w else np.zeros(0)
          for p, w in zip((start + f, i, j), widths, strict=True)
        ]
        z = (x[token, 0::2] + 1j * x[token, 1::2]) * np.exp(1j * np.concatenate(angles))
        want[token, 0::2], want[token, 1::2] = z.real, z.imag
  halves = np.concatenate([x[:, 0::2], x[:, 1::2]], axis=-1)
  rotation = rope.grid_rotation(start + jnp.arange(frames)[None], grid, head_dim)
  got = interleave(rope.rotate(jnp.asarray(halves)[None, :, None], rotation))[0, :, 0]
  np.testing.assert_allclose(got, want, atol=3e-6)


def test_scores_depend_on_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 24))

  def score(a, b):
    turn = lambda x, p: rope.rotate(x, rope.grid_rotation(jnp.array([[p]]), (2, 2), 24))
    return jnp.einsum("bshd,bshd->s", turn(q, a), turn(k, b))

  np.testing.assert_allclose(score(9, 4), score(100_009, 100_004), atol=3e-5)
  assert np.abs(score(9, 4) - score(9, 5)).max() > 1e-2


def test_still_frames_and_known_limits():
  frames = jnp.array([[3, 7]])
  full = rope.grid_rotation(frames, (2, 2), 12)
  bounded = rope.grid_rotation(frames, (2, 2), 12, limit=8)
  still = rope.grid_rotation(frames, (2, 2), 12, still=jnp.array([[True, False]]))
  # Higher digits are zero there: they turn by nothing, exactly.
  np.testing.assert_array_equal(full.cos, bounded.cos)
  assert np.all(still.cos[0, :4] == 1) and np.all(still.sin[0, :4] == 0)
  np.testing.assert_array_equal(still.sin[0, 4:], full.sin[0, 4:])


@pytest.mark.parametrize("head_dim", [0, 1, 7])
def test_an_odd_head_dimension_is_refused(head_dim):
  with pytest.raises(ValueError, match=f"head dimension is {head_dim}"):
    rope.grid_rotation(jnp.array([[0]]), (1, 1), head_dim)


def test_an_odd_timestep_embedding_is_refused():
  with pytest.raises(ValueError, match="15 wide"):
    rope.timestep_embedding(jnp.zeros(()), 15)
