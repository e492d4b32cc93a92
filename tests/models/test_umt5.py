"""The text encoder by itself: padding, batches, lengths, dtypes, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfjax.models import umt5
from hfjax.models.umt5 import Umt5Config, relative_buckets

# Heads wider together than the model, so that the two widths cannot be confused.
MODEL = Umt5Config(vocab=50, dim=24, dim_attn=32, dim_ffn=40, heads=4, layers=2)
encode = jax.jit(umt5.encode, static_argnums=(0, 4, 5))


@functools.cache
def params(config=MODEL):
  """Initial weights, norms and position biases moved so that they matter."""
  tree = umt5.init_params(config, jax.random.key(0))
  moved = lambda path: path[-1].key in ("scale", "position")
  return jax.tree_util.tree_map_with_path(
    lambda p, x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape) if moved(p) else x,
    tree,
  )


def tokens(batch, length, seed=0):
  return np.random.default_rng(seed).integers(2, MODEL.vocab, (batch, length)).astype(np.int32)


def lengths(*n):
  return np.asarray(n, np.int32)


def test_bucket_golden_values():
  """Spec section 10."""
  distance = [-200, -128, -127, -91, -64, -20, -12, -9, -8, -7, -1, 0, 1, 7, 8, 9, 12, 20, 64, 91]
  bucket = [15, 15, 15, 15, 14, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 24, 25, 26, 30, 31]
  got = relative_buckets(np.asarray([*distance, 127, 511]))
  assert got.tolist() == [*bucket, 31, 31] and got.dtype == np.int32


@pytest.mark.parametrize(
  ("buckets", "most"), [(32, 128), (32, 9), (4, 2), (10, 50), (64, 512), (2**8, 2**20)]
)
def test_buckets_grow_with_distance_and_end_at_the_last(buckets, most):
  half = buckets // 2
  behind = relative_buckets(-np.arange(2 * most), buckets, most)
  ahead = relative_buckets(np.arange(2 * most), buckets, most)
  exact = half // 2
  assert behind[:exact].tolist() == list(range(exact))
  assert np.all(np.diff(behind) >= 0) and np.all(behind[most:] == half - 1)
  np.testing.assert_array_equal(ahead[1:], behind[1:] + half)


@given(st.lists(st.integers(1, 16), min_size=3, max_size=3), st.integers(0, 1000))
def test_padding_touches_no_valid_row(length, seed):
  ids, length = tokens(3, 16, seed), lengths(*length)
  valid = np.arange(16) < length[:, None]
  other = np.where(valid, ids, tokens(3, 16, seed + 1))
  for keep in (False, True):
    a, b = (np.asarray(encode(MODEL, params(), x, length, jnp.float32, keep)) for x in (ids, other))
    np.testing.assert_array_equal(a[valid], b[valid])
    assert np.all(a[~valid] == 0) != keep or valid.all()


def test_batch_equals_one_by_one_at_its_own_length():
  ids, length = tokens(4, 20), lengths(20, 1, 7, 13)
  together = encode(MODEL, params(), ids, length)
  for n, size in enumerate(length):
    alone = encode(MODEL, params(), ids[n : n + 1, :size], lengths(size))
    np.testing.assert_allclose(together[n, :size], alone[0], 0, 5e-6)
    assert not np.any(together[n, size:])


def test_texts_beyond_the_largest_distance():
  """The order of tokens further off than that does not matter."""
  config = dataclasses.replace(MODEL, layers=1, max_distance=16)
  ids, length = tokens(1, 300), lengths(300)
  hidden = encode(config, params(config), ids, length)
  assert np.all(np.isfinite(hidden))
  # Keys that share a bucket may change places: to row 0, but not to row 8, all from 16 on do.
  swapped = np.concatenate([ids[:, :16], ids[:, :15:-1]], axis=1)
  other = encode(config, params(config), swapped, length)
  np.testing.assert_allclose(hidden[0, 0], other[0, 0], 0, 5e-6)
  assert np.abs(hidden[0, 8] - other[0, 8]).max() > 1e-3


def test_order_of_tokens_matters():
  ids, length = tokens(1, 12), lengths(12)
  hidden, turned = (encode(MODEL, params(), x, length) for x in (ids, ids[:, ::-1]))
  assert np.abs(hidden[0] - turned[0, ::-1]).max() > 0.01


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_bfloat16_is_near_float32(stored):
  ids, length = tokens(2, 40), lengths(40, 11)
  held = jax.tree.map(lambda x: x.astype(stored), params())
  exact = np.asarray(encode(MODEL, held, ids, length))
  half = encode(MODEL, held, ids, length, jnp.bfloat16)
  assert half.dtype == jnp.bfloat16 and exact.dtype == np.float32
  difference = np.asarray(half, np.float32) - exact
  assert np.linalg.norm(difference) < 0.02 * np.linalg.norm(exact)


def test_a_text_without_tokens_is_zero_and_not_nan():
  ids = tokens(2, 5)
  assert not np.any(encode(MODEL, params(), ids, lengths(0, 0)))
  assert np.all(np.isfinite(encode(MODEL, params(), ids, lengths(0, 5), jnp.bfloat16, True)))


@pytest.mark.parametrize("wrong", [MODEL.vocab, -1])
def test_ids_beyond_the_vocabulary_give_nan_where_they_are(wrong):
  ids = tokens(2, 5)
  ids[1, 2] = wrong
  hidden = encode(MODEL, params(), ids, lengths(5, 5))
  assert np.all(np.isfinite(hidden[0])) and np.all(np.isnan(hidden[1]))


def test_initial_states_are_of_order_one():
  hidden = encode(
    MODEL, umt5.init_params(MODEL, jax.random.key(1)), tokens(4, 30), lengths(*[30] * 4)
  )
  assert 0.8 < np.std(hidden) < 1.2


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"heads": 0}, "heads is 0; it must be at least 1"),
    ({"vocab": -1}, "vocab is -1"),
    ({"heads": 5}, "width of 32 does not divide into 5 heads"),
    ({"buckets": 7}, "has 7 buckets"),
    ({"buckets": 2}, "has 2 buckets"),
    ({"max_distance": 8}, "largest distance is 8, and 32 buckets"),
  ],
)
def test_impossible_sizes_are_refused(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    dataclasses.replace(MODEL, **change)


@pytest.mark.parametrize(
  ("ids", "length", "sentence"),
  [
    (tokens(2, 5)[0], lengths(5), r"ids have shape \(5,\)"),
    (tokens(2, 5).astype(np.float32), lengths(5, 5), "dtype float32"),
    (tokens(2, 5), lengths(5), r"lengths have shape \(1,\).* each of the 2 texts"),
    (tokens(2, 5), np.ones((2, 5), bool), r"shape \(2, 5\) and dtype bool"),
    (tokens(2, 5), np.ones(2, np.float32), "dtype float32"),
  ],
)
def test_other_inputs_are_refused(ids, length, sentence):
  with pytest.raises(ValueError, match=sentence):
    umt5.encode(MODEL, params(), ids, length)


def test_presets_by_name():
  assert umt5.preset("umt5-xxl").head_dim == 64
  with pytest.raises(ValueError, match="'t5'; choose one of umt5-xxl"):
    umt5.preset("t5")


def test_position_biases_are_learnt_without_sums_of_an_order_that_devices_choose():
  length, heads = 5, MODEL.heads
  row = np.arange(length)
  index = relative_buckets(row[None] - row[:, None])
  rng = np.random.default_rng(0)
  table, pull = rng.normal(size=(MODEL.buckets, heads)), rng.normal(size=(length, length, heads))
  loss = lambda x: (umt5._rows(x, jnp.asarray(index)) * pull).sum()
  value, gradient = jax.value_and_grad(loss)(jnp.asarray(table, jnp.float32))
  np.testing.assert_allclose(value, (table[index] * pull).sum(), rtol=1e-5)
  want = np.zeros_like(table)
  np.add.at(want, index, pull)
  np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-6)
  # Only the table of tokens has one, and what devices add up of their texts is summed afterwards.
  ids = tokens(2, length)
  whole = jax.grad(lambda p: encode(MODEL, p, ids, lengths(5, 3), jnp.float32, True).sum())
  assert str(jax.make_jaxpr(whole)(params())).count("scatter-add[") == 1
