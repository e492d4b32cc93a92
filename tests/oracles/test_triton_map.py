"""The block map's Triton kernels in Triton's interpreter, against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, triton, triton_map
from pallas_kernels.triton_map import block_means, choose_blocks
from tests.oracles.triton_interpreter import interpret


@pytest.fixture(autouse=True)
def launches(monkeypatch):
  """The kernels run in the interpreter; what they are launched with."""
  return interpret(monkeypatch)


def wide(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


def small_integers(seed, *shape, dtype="float32", least=-3, most=3):
  """Numbers whose products and sums are exact, and often equal."""
  draw = np.random.default_rng(seed).integers(least, most + 1, shape)
  return jnp.asarray(draw, dtype)


def mean_oracle(x, block):
  """Means [b h n d] of the dtype of `x`; the sums must be exact in float32."""
  blocks = [wide(x)[:, i : i + block] for i in range(0, x.shape[1], block)]
  means = [y.sum(1).astype(np.float32) / np.float32(y.shape[1]) for y in blocks]
  return jnp.asarray(np.stack(means, axis=2)).astype(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
  ("b", "h", "d", "block", "sizes"),
  [
    (2, 2, 64, 16, (37, 16)),
    (1, 3, 16, 64, (64, 129)),
    (2, 1, 128, 32, (5, 1)),  # shorter than a block
    (2, 2, 32, 16, (33,)),
    (1, 2, 16, 16, (17, 31, 48)),
  ],
)
def test_means_are_those_of_each_block(b, h, d, block, sizes, dtype, launches):
  xs = tuple(small_integers(i, b, s, h, d, dtype=dtype) for i, s in enumerate(sizes))
  got = block_means(xs, block)
  assert len(launches) == -(-len(sizes) // 2)
  for x, means in zip(xs, got, strict=True):
    assert means.dtype == x.dtype
    np.testing.assert_array_equal(wide(means), wide(mean_oracle(x, block)))


def test_means_of_large_numbers_are_summed_in_float32():
  x = jnp.asarray(100 + np.random.default_rng(0).normal(size=(1, 48, 1, 16)), jnp.bfloat16)
  want = wide(x).reshape(1, 1, 3, 16, 16).mean(3)
  np.testing.assert_allclose(wide(block_means((x,), 16)[0]), want, 2**-8)


def test_a_block_of_nan_stays_alone():
  x = small_integers(0, 1, 48, 1, 16).at[0, 17].set(jnp.nan)
  (got,) = block_means((x,), 16)
  np.testing.assert_array_equal(np.isnan(got).all(-1)[0, 0], [False, True, False])


def test_means_of_unlike_arrays_are_refused():
  x = jnp.zeros((1, 16, 2, 16))
  for y in (jnp.zeros((1, 16, 1, 16)), x.astype(jnp.bfloat16)):
    with pytest.raises(ValueError, match="must agree"):
      block_means((x, y), 16)


def scores_of(q, k, past=None):
  keys = wide(k) if past is None else np.concatenate([wide(past), wide(k)], 2)
  with np.errstate(invalid="ignore"):
    return np.einsum("bhqd,bhnd->bhqn", wide(q), keys)


def choice_oracle(scores, most, count, valid):
  """Lists [b h q most] of a stable sort; NaN above +inf, invalid blocks last."""
  ranks = np.nan_to_num(scores, nan=1e300, posinf=1e200, neginf=-1e200)
  ranks = np.where(valid[:, None, None], ranks, -1e300)
  order = np.argsort(-ranks, axis=-1, kind="stable")
  lists = np.empty((*scores.shape[:3], most), int)
  for i, n in enumerate(np.asarray(count)):
    chosen = np.sort(order[i, ..., :n], axis=-1)
    lists[i] = np.pad(chosen, ((0, 0), (0, 0), (0, most - n)), mode="edge")
  return lists


def validity(b, p, n, past_blocks):
  past_blocks = np.full(b, p) if past_blocks is None else np.asarray(past_blocks)
  return (np.arange(p + n) >= p) | (np.arange(p + n) < past_blocks[:, None])


def check(q, k, most, count, past=None, past_blocks=None):
  """Equality with the oracle; scores must be exact."""
  count = jnp.asarray(count, jnp.int32)
  blocks = None if past_blocks is None else jnp.asarray(past_blocks, jnp.int32)
  got = choose_blocks(q, k, most, count, past, blocks)
  assert got.dtype == jnp.int32 and got.shape == (*q.shape[:3], most)
  valid = validity(q.shape[0], 0 if past is None else past.shape[2], k.shape[2], past_blocks)
  np.testing.assert_array_equal(got, choice_oracle(scores_of(q, k, past), most, count, valid))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("most", [1, 5, 21])
def test_one_buffer(dtype, most):
  q, k = (small_integers(i, 2, 2, n, 64, dtype=dtype) for i, n in enumerate((5, 21)))
  check(q, k, most, [most, max(1, most - 2)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("past_blocks", [None, [0, 0], [13, 0], [4, 13], [1, 12]])
def test_two_buffers(dtype, past_blocks):
  q, k, past = (small_integers(i, 2, 2, n, 64, dtype=dtype) for i, n in enumerate((7, 8, 13)))
  # Blocks without a valid token hold anything.
  if past_blocks is not None:
    past = past.at[0, 0, past_blocks[0] :].set(jnp.nan).at[1, :, past_blocks[1] :].set(100)
  check(q, k, 8, [8, 3], past, past_blocks)


@pytest.mark.parametrize("count", [1, 2, 6, 9, 15, 16])
def test_every_count(count):
  q, k, past = (small_integers(i, 2, 1, n, 16, most=0) for i, n in enumerate((3, 6, 10)))
  check(q, k, 16, [count, 17 - count], past)


@pytest.mark.parametrize("blocks", [1, 15, 16, 31])
def test_numbers_of_blocks_around_a_power_of_two(blocks):
  q, k = (small_integers(i, 1, 1, n, 16) for i, n in enumerate((9, blocks)))
  check(q, k, blocks, [max(1, blocks // 2)])


@pytest.mark.parametrize(("value", "count"), [(0, 5), (1, 11), (-1, 12), (0, 1)])
def test_equal_scores_go_to_the_first_blocks(value, count):
  q, k, past = (jnp.full((2, 1, n, 16), x) for n, x in ((2, value), (5, 1), (7, 1)))
  check(q * 1.0, k * 1.0, 12, [count, 3], past * 1.0, [7, 2])


def test_zeros_of_both_signs_are_equal():
  q = jnp.ones((1, 1, 1, 16)).at[..., 1:].set(0)
  check(q, jnp.asarray([0.0, -0.0, 0.0, -0.0])[None, None, :, None] * q, 4, [2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_that_are_no_numbers(dtype):
  q, k, past = (
    small_integers(i, 2, 2, n, 16, dtype=dtype, least=1) for i, n in enumerate((5, 6, 7))
  )
  q = q.at[0, 0, 1, 3].set(jnp.nan)
  k = k.at[0, :, 2, 0].set(jnp.inf).at[0, :, 3, 0].set(-jnp.inf).at[1, 0, 4].set(jnp.nan)
  past = past.at[1, 0, 0].set(jnp.nan).at[1, 1, 1, 2].set(-jnp.inf).at[:, :, 5].set(jnp.nan)
  check(q, k, 13, [8, 4], past, [7, 5])
  check(q * jnp.nan, k, 13, [11, 9], past, [7, 5])
  check(q, k * 0 - jnp.inf, 6, [6, 5], past, [1, 2])


def test_a_count_beyond_the_blocks_lists_only_blocks():
  q, k, past = (small_integers(i, 2, 1, n, 16) for i, n in enumerate((2, 3, 4)))
  for count in ([0, -5], [100, 6]):
    got = np.asarray(choose_blocks(q, k, 6, jnp.asarray(count), past, jnp.asarray([-1, 0])))
    assert got.min() >= 0 and got.max() < 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_means_at_the_real_number_of_blocks(dtype):
  """Of 147 past and 74 current blocks a fifth; scores may be off by their rounding only."""
  r = np.random.default_rng(0)
  q, k, past = (jnp.asarray(r.normal(size=(1, 1, n, 128)), dtype) for n in (9, 74, 147))
  got = np.asarray(choose_blocks(q, k, 44, jnp.asarray([44]), past, jnp.asarray([140])))
  assert (np.diff(got) > 0).all()
  scores = np.where(validity(1, 147, 74, [140]), scores_of(q, k, past), -np.inf)
  limit = np.sort(scores)[..., -44]
  chosen = np.take_along_axis(scores, got, -1)
  margin = 1e-4
  assert (chosen >= limit[..., None] - margin).all()
  assert ((scores > limit[..., None] + margin).sum(-1) <= 44).all()
  clear = (np.sort(scores)[..., -44] - np.sort(scores)[..., -45]) > margin
  want = np.sort(np.argsort(-scores, axis=-1)[..., :44])
  assert clear.sum() >= 7
  np.testing.assert_array_equal(got[clear], want[clear])


@pytest.mark.parametrize("tuning", [(4, 1, 16, 4, 2), (4, 16, 64, 8, 1)])
def test_tuning_changes_no_choice(tuning, monkeypatch):
  monkeypatch.setattr(triton_map, "TUNING", triton_map.Tuning(*tuning))
  q, k = (small_integers(i, 1, 2, n, 64, dtype="bfloat16") for i, n in enumerate((5, 21)))
  check(q, k, 6, [5])


def test_nothing_is_differentiated(monkeypatch):
  def call(launch):  # as jax-triton's, it has no derivative
    zeros = [np.zeros(x.shape, x.dtype) for x in launch.outputs]
    return jax.pure_callback(lambda *_: zeros, list(launch.outputs), *launch.arrays)

  def total(x):
    q, k = block_means((x, x), 16)
    index = choose_blocks(q, k, 2, jnp.asarray([1]), k)
    return index.sum() * 1.0 + q.sum() + k.sum()

  monkeypatch.setattr(triton, "call", call)
  assert not jax.grad(total)(jnp.ones((1, 32, 1, 16))).any()


def test_what_does_not_fit_is_refused():
  x = jnp.zeros((1, 1, 3, 16))
  for most in (0, 7):
    with pytest.raises(ValueError, match="keep from 1 to 6"):
      choose_blocks(x, x, most, jnp.asarray([1]), x)
  with pytest.raises(ValueError, match="give up to 1023"):
    choose_blocks(x, jnp.zeros((1, 1, 1024, 16)), 1, jnp.asarray([1]))


def like(b=1, s=64, h=2, d=16, dtype="float32"):
  return jax.ShapeDtypeStruct((b, s, h, d), dtype)


@pytest.mark.parametrize(
  ("x", "block", "key_blocks", "sentence"),
  [
    (like(d=24), 64, None, "d is 24"),
    (like(d=512), 64, None, "d is 512"),
    (like(), 48, None, "the block is 48"),
    (like(), 8, None, "the block is 8"),
    (like(dtype="int32"), 64, None, "the arrays are int32"),
    (like(s=0), 64, None, "an array is empty"),
    (like(s=2**14), 16, None, "1024 key blocks"),
    (like(), 64, 1024, "1024 key blocks"),
    (like(h=2**16), 64, None, "too many"),
  ],
)
def test_what_it_cannot_serve_it_says(x, block, key_blocks, sentence, monkeypatch):
  monkeypatch.setattr(device, "platform", lambda: "gpu")
  monkeypatch.setattr(device, "compute_capability", lambda: (8, 0))
  monkeypatch.setattr(triton, "_modules", lambda: (None, {}))
  assert triton_map.unsupported(like(s=2**14), 64, 1023) is None
  assert triton_map.unsupported(like(s=2**14), 32) is None
  assert re.search(sentence, triton_map.unsupported(x, block, key_blocks))


def test_where_it_cannot_run_it_says_so(monkeypatch):
  assert "NVIDIA GPU" in triton_map.unsupported(like(), 64)
  monkeypatch.setattr(device, "platform", lambda: "gpu")
  monkeypatch.setattr(device, "compute_capability", lambda: (7, 5))
  assert "8.0 or newer" in triton_map.unsupported(like(), 64)
  monkeypatch.setattr(device, "compute_capability", lambda: (8, 0))
  monkeypatch.setattr(triton, "_modules", lambda: "ImportError: none")
  assert "ImportError: none); pip install" in triton_map.unsupported(like(), 64)
