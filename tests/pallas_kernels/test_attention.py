import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

# batch, heads, head dimension, queries, past capacity, keys, block
SIZES = [(1, 1, 8, 16, 0, 16, 8), (2, 3, 10, 13, 0, 29, 8), (2, 2, 16, 9, 21, 12, 4),
         (1, 2, 6, 5, 8, 7, 16)]  # fmt: skip


def draw(size, seed=0):
  """Inputs with random lists of distinct blocks, random counts and random valid lengths."""
  b, h, d, s, past, n, block = size
  r = np.random.default_rng(seed)
  tensor = lambda rows: r.normal(size=(b, rows, h, d)).astype(np.float32)
  q, k, v = tensor(s), tensor(n), tensor(n)
  extra = {}
  if past:
    extra = {"past_k": tensor(past), "past_v": tensor(past),
             "past_length": r.integers(0, past + 1, b).astype(np.int32)}  # fmt: skip
  extra["length"] = r.integers(1, n + 1, b).astype(np.int32)
  blocks = pk.num_blocks(past, block) + pk.num_blocks(n, block)
  lists = (b, h, pk.num_blocks(s, block))
  index = r.permuted(np.broadcast_to(np.arange(blocks), (*lists, blocks)), axis=-1)
  most = max(1, blocks - 1)
  count = r.integers(1, most + 1, lists)
  return q, k, v, index[..., :most].astype(np.int32), count.astype(np.int32), extra


def oracle(q, k, v, index, count, block, past_k=None, past_v=None, past_length=None, length=None):
  """Masked softmax in float64, key by key."""
  b, s, h, d = q.shape
  capacity = 0 if past_k is None else past_k.shape[1]
  older = pk.num_blocks(capacity, block)
  out = np.zeros((b, s, h, d))
  for n in range(b):
    for head in range(h):
      for i in range(s):
        row = i // block
        keys, values = [], []
        for entry in index[n, head, row, : count[n, head, row]]:
          if entry < older:
            source, values_of, valid, at = past_k, past_v, past_length[n], entry * block
          else:
            source, values_of, at = k, v, (entry - older) * block
            valid = k.shape[1] if length is None else length[n]
          keys += list(source[n, at : min(at + block, valid), head])
          values += list(values_of[n, at : min(at + block, valid), head])
        if keys:
          scores = np.array(keys, np.float64) @ q[n, i, head] * d**-0.5
          p = np.exp(scores - scores.max())
          out[n, i, head] = p @ np.array(values, np.float64) / p.sum()
  return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_attend_to_their_listed_valid_keys_only(size, seed):
  q, k, v, index, count, extra = draw(size, seed)
  block = size[-1]
  attend = jax.jit(functools.partial(pk.block_sparse_attention, block_q=block, block_k=block))
  got = attend(q, k, v, index, count, **extra)
  np.testing.assert_allclose(got, oracle(q, k, v, index, count, block, **extra), atol=2e-6)


def test_all_blocks_listed_is_dense_attention():
  q, k, v, _, _, _ = draw(SIZES[1])
  index = np.broadcast_to(np.arange(4), (2, 3, 2, 4))
  got = pk.block_sparse_attention(q, k, v, index, block_q=8, block_k=8)
  np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v), atol=1e-6)


def test_the_scale_of_scores():
  q, k, v, index, count, extra = draw(SIZES[1])
  attend = functools.partial(pk.block_sparse_attention, block_q=8, block_k=8, **extra)
  scaled = attend(q, k, v, index, count, scale=0.7)
  np.testing.assert_allclose(scaled, attend(0.7 * 10**0.5 * q, k, v, index, count), atol=2e-6)
  assert np.abs(scaled - attend(q, k, v, index, count)).max() > 1e-2


def test_gradients_equal_those_of_masked_attention():
  size = (2, 2, 8, 11, 9, 13, 4)
  q, k, v, index, count, extra = draw(size)
  block, past = size[-1], size[4]
  older = pk.num_blocks(past, block)

  # The same as one dense masked attention over both buffers.
  mask = np.zeros((2, 2, 11, past + 13), bool)
  for b, h, i in np.ndindex(2, 2, 11):
    for e in index[b, h, i // block, : count[b, h, i // block]]:
      if e < older:
        mask[b, h, i, e * block : min((e + 1) * block, extra["past_length"][b])] = True
      else:
        at = (e - older) * block
        mask[b, h, i, past + at : past + min(at + block, extra["length"][b])] = True

  def dense(q, k, v, past_k, past_v):
    k, v = jnp.concatenate([past_k, k], axis=1), jnp.concatenate([past_v, v], axis=1)
    s = jnp.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    p = jnp.exp(s - 3) * mask
    total = p.sum(-1)
    return jnp.einsum("bhij,bjhd->bihd", p / jnp.where(total > 0, total, 1)[..., None], v)

  def sparse(q, k, v, past_k, past_v):
    rest = {"length": extra["length"], "past_length": extra["past_length"]}
    return pk.block_sparse_attention(
      q, k, v, index, count, past_k=past_k, past_v=past_v, block_q=block, block_k=block, **rest
    )

  args = (q, k, v, extra["past_k"], extra["past_v"])
  cot = np.random.default_rng(5).normal(size=q.shape).astype(np.float32)
  for got, want in zip(jax.vjp(sparse, *args)[1](cot), jax.vjp(dense, *args)[1](cot), strict=True):
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_samples_lists_and_transformations():
  q, k, v, index, count, extra = draw(SIZES[2])
  attend = functools.partial(pk.block_sparse_attention, block_q=4, block_k=4)
  want = attend(q, k, v, index, count, **extra)
  mapped = jax.vmap(lambda *a: attend(*(x[None] for x in a[:5]), **{
    n: x[None] for n, x in zip(extra, a[5:], strict=True)})[0])(
      q, k, v, index, count, *extra.values())  # fmt: skip
  np.testing.assert_allclose(mapped, want, atol=1e-6)
  # Entries past the count are never read.
  junk = np.where(np.arange(index.shape[-1]) < count[..., None], index, 0)
  np.testing.assert_array_equal(attend(q, k, v, junk, count, **extra), want)
  # A count per sample serves all its lists.
  same = attend(q, k, v, index, np.array([[[1]], [[2]]]), **extra)
  one = attend(q, k, v, index, np.ones_like(count), **extra)
  np.testing.assert_array_equal(same[0], one[0])


def test_half_precision_accumulates_in_single():
  q, k, v, index, count, extra = draw((1, 2, 64, 128, 0, 256, 64))
  want = pk.block_sparse_attention(q, k, v, index, count, **extra)
  got = pk.block_sparse_attention(
    *(x.astype(jnp.bfloat16) for x in (q, k, v)), index, count, **extra
  )
  assert got.dtype == jnp.bfloat16
  # Inputs, probabilities and the output each round at 8 bits.
  np.testing.assert_allclose(np.float32(got), want, atol=0.03)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"k": np.ones((1, 16, 2, 8), np.float32)}, "must agree"),
    ({"v": np.ones((1, 15, 1, 8), np.float32)}, "k holds 16 tokens and v 15"),
    ({"block_index": np.zeros((1, 1, 3, 1), np.int32)}, r"need \(1, 1, 2\) lists"),
    ({"block_index": np.zeros((1, 1, 2, 3), np.int32)}, "lists 3 blocks of keys.* only 2"),
    ({"past_length": np.zeros((1,), np.int32)}, "go together"),
    ({"past_k": np.ones((1, 4, 1, 8), np.float32)}, "go together"),
    ({"block_k": 0}, "give at least 1 each"),
    ({"q": np.ones((1, 16, 8), np.float32)}, r"q has shape \(1, 16, 8\)"),
    ({"block_index": np.zeros((1, 1, 2, 1), np.float32)}, "block_index is float32"),
    ({"length": np.ones((2,), np.int32)}, r"length is int32 \[2\]"),
    ({"backend": "mosaic"}, "Unknown backend 'mosaic'"),
  ],
)
def test_wrong_arguments_are_refused(change, sentence):
  q, k, v, index, _, _ = draw(SIZES[0])
  args = {"q": q, "k": k, "v": v, "block_index": index, "block_q": 8, "block_k": 8, **change}
  with pytest.raises(ValueError, match=sentence):
    pk.block_sparse_attention(**args)
