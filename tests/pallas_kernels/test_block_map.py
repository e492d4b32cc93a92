import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pallas_kernels as pk


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(st.sampled_from([1, 8, 9, 23]), st.integers(0, 23), st.sampled_from([1, 4, 8, 64]))
def test_means_are_over_the_valid_tokens_of_each_block(tokens, length, block):
  length = min(length, tokens)
  x = draw(tokens, 2, tokens, 2, 3)
  got = pk.block_means(jnp.asarray(x), block, jnp.array([length, tokens]))
  for b, n in enumerate((length, tokens)):
    for i in range(pk.num_blocks(tokens, block)):
      part = x[b, i * block : min((i + 1) * block, n)]
      want = part.astype(np.float64).mean(axis=0) if len(part) else np.zeros((2, 3))
      np.testing.assert_allclose(got[b, :, i], want, atol=1e-6)


def test_means_are_rounded_to_the_dtype_of_the_tokens():
  x = jnp.asarray(draw(0, 1, 20, 1, 4), jnp.bfloat16)
  got = pk.block_means(x, 8)
  want = np.float32(x)[0, :8].mean(axis=0)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got[0, :, 0], jnp.asarray(want, jnp.bfloat16))


def test_centring():
  k = jnp.asarray(draw(1, 2, 10, 3, 4))
  np.testing.assert_array_equal(pk.center_keys(k), k)
  np.testing.assert_allclose(pk.center_keys(k, "heads"), k - k.mean(2, keepdims=True), atol=1e-6)
  length = jnp.array([4, 10])
  got = pk.center_keys(k, "sequence", length)
  np.testing.assert_allclose(got[0], k[0] - k[0, :4].mean(0, keepdims=True), atol=1e-6)
  np.testing.assert_allclose(got[1], k[1] - k[1].mean(0, keepdims=True), atol=1e-6)
  with pytest.raises(ValueError, match="'tokens'; choose none, heads or sequence"):
    pk.center_keys(k, "tokens")


def test_centring_over_the_sequence_changes_no_choice():
  q, k = (jnp.asarray(draw(i, 1, 64, 2, 8)) for i in (2, 3))
  means = pk.block_means(q, 8)
  chosen = [
    pk.choose_blocks(means, pk.block_means(pk.center_keys(k, c), 8), 3)[0]
    for c in ("none", "sequence")
  ]
  assert len(np.unique(chosen[0][..., 0])) > 1
  np.testing.assert_array_equal(*chosen)


@given(st.integers(1, 6), st.integers(0, 50))
def test_the_best_valid_blocks_are_listed_best_first(most, seed):
  q, k = draw(seed, 2, 2, 3, 5), draw(seed + 100, 2, 2, 6, 5)
  valid = np.array([[1, 1, 0, 1, 0, 1], [1] * 6], bool)
  counts = np.minimum([most, most], valid.sum(axis=1))
  index, count = pk.choose_blocks(
    jnp.asarray(q), jnp.asarray(k), most, jnp.asarray(counts), jnp.asarray(valid)
  )
  assert index.dtype == count.dtype == jnp.int32
  for b in range(2):
    for h in range(2):
      for i in range(3):
        scores = np.where(valid[b], k[b, h].astype(np.float64) @ q[b, h, i], -np.inf)
        kept = int(count[b, h, i])
        assert kept == counts[b]
        assert list(index[b, h, i, :kept]) == list(np.argsort(-scores)[:kept])


def test_ties_go_to_the_lower_block_and_lists_are_never_empty():
  q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 5, 4))
  index, count = pk.choose_blocks(q, k, 3, jnp.array([0]))
  np.testing.assert_array_equal(index[0, 0], [[0, 1, 2], [0, 1, 2]])
  assert np.all(count == 1)


def test_scores_that_overflow_still_beat_blocks_without_keys():
  q, k = jnp.full((1, 1, 1, 4), 1e30), jnp.full((1, 1, 3, 4), -1e30)
  index, _ = pk.choose_blocks(q, k, 2, valid=jnp.array([[False, True, True]]))
  assert sorted(index[0, 0, 0].tolist()) == [1, 2]


def test_a_state_beyond_the_last_is_the_last():
  q, k = (jnp.asarray(draw(i, 3, 16, 1, 4)) for i in range(2))
  lists = lambda *state: pk.block_map(
    q, k, 0.5, states=[4, 16], state=jnp.array(state), block_q=4, block_k=4
  )
  for got, want in zip(lists(-5, 1, 7), lists(0, 1, 1), strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("most", [0, 4])
def test_an_impossible_number_of_blocks_is_refused(most):
  with pytest.raises(ValueError, match=f"{most} key blocks were to be kept out of 3"):
    pk.choose_blocks(jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 3, 4)), most)


def test_counts_truncate_in_double_precision():
  # 0.29 * 100 is 28.999... in float64, and 29 in float32.
  assert pk.kept_counts(0.29, [6400])[0] == 28
  assert list(pk.kept_counts(0.2, [4680, 9360, 14040])) == [14, 29, 44]
  assert list(pk.kept_counts(0.2, [0, 4680, 9360], [4680] * 3)) == [14, 29, 44]
  assert list(pk.kept_counts(0.01, [64], block=64)) == [1]


@pytest.mark.parametrize("center", ["none", "heads"])
@pytest.mark.parametrize("past", [True, False])
def test_the_map_of_tokens_is_that_of_their_blocks(past, center):
  """Two samples with other numbers of valid keys."""
  q, k, older = (jnp.asarray(draw(i, 2, n, 2, 4)) for i, n in ((0, 10), (1, 13), (2, 11)))
  states, state = ([0, 5, 11] if past else [4, 9, 13]), jnp.array([1, 2])
  given = {}
  if past:
    length = jnp.array([5, 11])
    older = pk.center_keys(older, center)
    given["past_means"] = pk.block_means(older, 4, length)
  index, count = pk.block_map(
    q, k, 0.5, states=states, state=state, center=center, block_q=4, block_k=4, **given
  )
  assert index.shape == (2, 2, 3, 3 if past else 2) and count.shape == (2, 2, 3)
  for b, valid in enumerate((5, 11) if past else (9, 13)):
    kept = pk.center_keys(k[b : b + 1], center)
    rows = [older[b : b + 1, :valid], kept] if past else [kept[:, :valid]]
    blocks = [x[:, i : i + 4] for x in rows for i in range(0, x.shape[1], 4)]
    numbers = list(range(-(-valid // 4)))
    numbers += [3 + i for i in range(4)] if past else []
    expected = max(1, len(blocks) // 2)
    assert np.all(count[b] == expected)
    for h, i in np.ndindex(2, 3):
      mean = q[b, 4 * i : 4 * i + 4, h].mean(0)
      scores = np.array([float(mean @ x[0, :, h].mean(0)) for x in blocks])
      best = [numbers[j] for j in np.argsort(-scores)[:expected]]
      assert list(index[b, h, i, :expected]) == best


@pytest.mark.parametrize(
  ("given", "sentence"),
  [
    ({"states": [9]}, r"room for 8 tokens; \[9\] of them"),
    ({"states": []}, r"\[\] of them were to be valid"),
    ({"states": [4, 8]}, "2 states; say which one"),
  ],
)
def test_impossible_states_are_refused(given, sentence):
  x = jnp.ones((1, 8, 1, 4))
  with pytest.raises(ValueError, match=sentence):
    pk.block_map(x, x, 0.5, block_q=4, block_k=4, **given)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"ratio": float("nan")}, "The ratio is nan; give a number from 0 to 1"),
    ({"ratio": 1.5}, "The ratio is 1.5"),
    ({"ratio": -1}, "The ratio is -1"),
    ({"ratio": None}, "The ratio is None"),
    ({"k": np.ones((2, 16, 2, 4), np.float32)}, "batch, heads and head dimension must agree"),
    ({"k": np.ones((1, 16, 1, 4), np.float32)}, "batch, heads and head dimension must agree"),
    ({"k": np.ones((1, 0, 2, 4), np.float32)}, "k has shape .* not empty"),
    ({"q": np.ones((16, 2, 4), np.float32)}, r"q has shape \(16, 2, 4\)"),
    ({"past_means": np.ones((1, 1, 3, 4), np.float32)}, r"give \[1, 2, blocks, 4\]"),
    ({"states": [8, 16], "state": 1}, r"state is int32 \[\]; give integers of shape \[1\]"),
    ({"states": [8, 16], "state": [1.0]}, "state is float32"),
    ({"backend": "triton"}, "backend is 'triton'; choose auto or xla"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(change, sentence):
  x = np.ones((1, 16, 2, 4), np.float32)
  args = {"q": x, "k": x, "ratio": 0.5, "block_q": 8, "block_k": 8, **change}
  with pytest.raises(ValueError, match=sentence):
    pk.block_map(args.pop("q"), args.pop("k"), args.pop("ratio"), **args)


def test_choices_of_kernels_stand_still_under_gradients(monkeypatch):
  """As in training: layers in a loop, each computed again in the backward pass."""
  from pallas_kernels import pooling, triton_map

  monkeypatch.setattr(triton_map, "unsupported", lambda *args: None)
  monkeypatch.setattr(
    triton_map, "block_means", lambda xs, block: tuple(pooling.block_means(x, block) for x in xs)
  )
  chosen = lambda q, k, most, count: pooling.choose_blocks(q, k, most, count)[0]
  monkeypatch.setattr(triton_map, "choose_blocks", chosen)
  x = jnp.asarray(draw(3, 1, 32, 1, 4))

  def total(x):
    @jax.checkpoint
    def layer(x, _):
      index, _ = pk.block_map(x, x, 0.5, block_q=8, block_k=8)
      return x * (1 + index.sum()), index

    y, _ = jax.lax.scan(layer, x, None, length=2)
    return y.sum()

  index, _ = pk.block_map(x, x, 0.5, block_q=8, block_k=8, backend="xla")
  scaled, _ = pk.block_map(
    x * (1 + index.sum()), x * (1 + index.sum()), 0.5, block_q=8, block_k=8, backend="xla"
  )
  want = (1 + index.sum()) * (1 + scaled.sum())
  np.testing.assert_allclose(jax.grad(total)(x), np.full(x.shape, float(want)))
