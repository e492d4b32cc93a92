import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models import memory, rope
from hfjax.models.geometry import VARIANTS

PAPER = VARIANTS["paper"]
H, D, GRID = 2, 8, (2, 3)
N = 6


def draw(seed, frames, batch=1):
  k, v = jax.random.normal(jax.random.key(seed), (2, batch, frames, N, H, D))
  return k, v


def turn(positions):
  return rope.grid_rotation(jnp.asarray(positions), GRID, D)


def fold(chunks, position=4, variant=PAPER):
  """Absorbs chunks `(k, v, leaves)` in turn, all at the same place; (memory, frames)."""
  held, count = memory.init_memory((1, H), D), jnp.zeros((1,), jnp.int32)
  for k, v, leaves in chunks:
    at = position + jnp.arange(k.shape[1])[None]
    held = memory.absorb(held, count, k, v, turn(at), leaves, variant)
    count = count + leaves.sum(axis=1)
  return held, count


def closed_form(chunks, position=4):
  """Float64 means over all tokens that left, with interleaved complex rotation spelled out."""
  kv, km, tokens = np.zeros((H, D, D)), np.zeros((H, D)), 0
  for k, v, leaves in chunks:
    rotation = turn(position + np.arange(k.shape[1])[None])
    cos, sin = (np.float64(x)[0].reshape(-1, N, 1, D // 2) for x in rotation)
    k, v = np.maximum(np.float64(k)[0], 0), np.float64(v)[0]
    a, b = k[..., : D // 2], k[..., D // 2 :]
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    for f in np.flatnonzero(np.asarray(leaves)[0]):
      kv += np.einsum("nhd,nhe->hde", turned[f], v[f])
      km += k[f].sum(axis=0)
      tokens += N
  return kv / tokens, km / tokens


ALL = jnp.ones((1, 3), bool)


def test_memory_is_the_mean_over_all_absorbed_tokens():
  masks = [[1, 1, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1]]
  chunks = [(*draw(i, 3), jnp.array([m], bool)) for i, m in enumerate(masks)]
  held, count = fold(chunks)
  kv, km = closed_form(chunks)
  assert int(count[0]) == 7
  np.testing.assert_allclose(held.kv[0], kv, atol=1e-6)
  np.testing.assert_allclose(held.k[0], km, atol=1e-6)


def test_ten_thousand_chunks_stay_at_the_closed_form():
  """A running mean in float32 drifts by rounding only, and later chunks weigh less and less."""
  chunks, size = 10_000, 3
  k, v = jax.random.normal(jax.random.key(7), (2, chunks, 1, size, N, H, D))
  rotation = turn(4 + jnp.arange(size)[None])
  # A mean that is not zero, so that a relative error means something.
  v = v + 1

  @jax.jit
  def run(k, v):
    def step(carry, kv):
      held, count = carry
      held = memory.absorb(held, count, *kv, rotation, ALL, PAPER)
      return (held, count + size), None

    start = memory.init_memory((1, H), D), jnp.zeros((1,), jnp.int32)
    return jax.lax.scan(step, start, (k, v))[0]

  held, count = run(k, v)
  assert int(count[0]) == size * chunks
  cos, sin = (np.float64(x)[0].reshape(size, N, 1, D // 2) for x in rotation)
  mapped, values = np.maximum(np.float64(k)[:, 0], 0), np.float64(v)[:, 0]
  a, b = mapped[..., : D // 2], mapped[..., D // 2 :]
  turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  kv = np.einsum("cfnhd,cfnhe->hde", turned, values) / (chunks * size * N)
  km = mapped.mean(axis=(0, 1, 2))
  # Each update rounds by half a unit of 6e-8; what it leaves behind shrinks with 1/n. Entries are
  # below 1, so errors stay within some units; 100 updates' worth is allowed.
  np.testing.assert_allclose(held.kv[0], kv, atol=6e-6)
  np.testing.assert_allclose(held.k[0], km, atol=6e-6)


def test_order_does_not_matter_at_one_relative_position():
  chunks = [(*draw(i, 3), ALL) for i in range(6)]
  held, _ = fold(chunks)
  permuted, _ = fold([chunks[i] for i in (3, 0, 5, 1, 4, 2)])
  np.testing.assert_allclose(held.kv, permuted.kv, atol=1e-6)
  np.testing.assert_allclose(held.k, permuted.k, atol=1e-6)
  # It matters where: absorbed elsewhere, the numerator differs and the denominator does not.
  moved, _ = fold(chunks, position=9)
  assert np.abs(held.kv - moved.kv).max() > 1e-2
  np.testing.assert_array_equal(held.k, moved.k)


@pytest.mark.parametrize("name", ["paper", "reference_train", "reference_infer"])
def test_recall_follows_the_variant(name):
  """Spec section 4.4, with the feature map where the variant has it."""
  variant = VARIANTS[name]
  held, _ = fold([(*draw(1, 3), ALL)], variant=variant)
  q = jax.random.normal(jax.random.key(5), (1, 3 * N, H, D))
  rotation = turn([[9, 10, 11]])
  got = memory.recall(held, q, rotation, variant)
  mapped = np.maximum(q, 0)
  query = q if name == "reference_infer" else jnp.asarray(mapped)
  turned = np.float64(rope.rotate(query, rotation))
  numerator = np.einsum("bshd,bhde->bshe", turned, np.float64(held.kv))
  denominator = np.einsum("bshd,bhd->bsh", np.float64(mapped), np.float64(held.k))
  want = numerator / (denominator + 1e-6)[..., None]
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  keys = memory.absorb(
    memory.init_memory((1, H), D), jnp.zeros((1,), jnp.int32), *draw(1, 3),
    turn([[4, 5, 6]]), ALL, VARIANTS["paper"],
  )  # fmt: skip
  assert (np.abs(keys.kv - held.kv).max() > 1e-2) == (not variant.map_memory_keys)


def test_samples_absorb_on_their_own():
  k, v = draw(3, 3, batch=2)
  leaves = jnp.array([[True, True, True], [False, False, True]])
  both = memory.absorb(
    memory.init_memory((2, H), D), jnp.array([0, 4]), k, v, turn([[1, 2, 3], [7, 8, 9]]),
    leaves, PAPER,
  )  # fmt: skip
  for i, at in enumerate(([[1, 2, 3]], [[7, 8, 9]])):
    one = memory.absorb(
      memory.init_memory((1, H), D), jnp.array([0, 4])[i : i + 1], k[i : i + 1], v[i : i + 1],
      turn(at), leaves[i : i + 1], PAPER,
    )  # fmt: skip
    np.testing.assert_allclose(both.kv[i], one.kv[0], atol=1e-6)
