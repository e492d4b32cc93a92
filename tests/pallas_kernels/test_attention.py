import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels import attention, device
from pallas_kernels.problem import Inputs
from tests.helpers import compilations
from tests.pallas_kernels.oracle import draw, oracle

# The oracle is exact, and sums of some dozen float32 products round by 1e-7 of their size.
ATOL = 3e-6


def call(problem, inputs, *tensors, **kwargs):
  """The public function on what a problem and its inputs say; tensors: q, k, v and past ones."""
  q, k, v, past_k, past_v = tensors or inputs[:5]
  return pk.block_sparse_attention(
    q, k, v, inputs.index, inputs.count, scale=problem.scale, length=inputs.length, past_k=past_k,
    past_v=past_v, past_length=inputs.past_length, block_q=problem.block_q,
    block_k=problem.block_k, **kwargs,
  )  # fmt: skip


def flat(x):
  """Arrays that are there, as float64."""
  return [np.float64(y) for y in x if y is not None]


def assert_close(got, want, atol=ATOL):
  for x, y in zip(flat(got), flat(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=atol * max(1, np.abs(y).max(initial=0)))


@given(
  st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 6, 16]), st.integers(1, 20),
  st.integers(0, 20), st.integers(1, 20), st.sampled_from([1, 4, 8]), st.sampled_from([3, 8]),
  st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=12)
def test_rows_attend_to_their_listed_valid_keys_only(b, h, d, s, past, n, block_q, block_k, seed):
  """Forward, log-sum-exp and all gradients, on random sizes, lists, counts and lengths."""
  r = np.random.default_rng(seed)
  lengths = {"length": r.integers(0, n + 1, b), "past_length": r.integers(0, past + 1, b)}
  problem, inputs, dout = draw(
    b=b, h=h, d=d, s=s, past=past, n=n, block_q=block_q, block_k=block_k, seed=seed, **lengths
  )
  want, want_lse, want_grads = oracle(problem, inputs, dout)
  out, lse = jax.jit(functools.partial(attention.forward, problem))(inputs)
  assert_close([out, lse[np.isfinite(want_lse)]], [want, want_lse[np.isfinite(want_lse)]])
  assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
  tensors = [x for x in inputs[:5] if x is not None]

  @jax.jit
  def grads(*tensors):
    attend = lambda *x: call(problem, inputs, *x, *([None] * (5 - len(x))), backend="xla")
    return jax.vjp(attend, *tensors)[1](dout)

  assert_close(grads(*tensors), want_grads)


def test_all_blocks_listed_is_dense_attention():
  _, inputs, _ = draw(past=0, length=(27, 27))
  q, k, v = inputs[:3]
  index = np.broadcast_to(np.arange(4), (2, 2, 3, 4))
  got = pk.block_sparse_attention(q, k, v, index, block_q=8, block_k=8)
  np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v), atol=1e-6)


def test_past_gradients_are_zero_unless_wanted():
  problem, inputs, dout = draw()
  attend = functools.partial(call, problem, inputs, past_gradient=False)
  got = jax.vjp(attend, *inputs[:5])[1](dout)
  assert_close(got[:3], oracle(problem, inputs, dout)[2][:3])
  assert not any(x.any() for x in got[3:])


def loss_and_gradients(problem, inputs, dout, attend):
  return jax.value_and_grad(lambda *x: (attend(*x) * dout).sum(), range(5))(*inputs[:5])


def transformed(name, problem, inputs):
  """Attention under a transformation of JAX, in q, k, v, past_k and past_v."""
  attend = functools.partial(call, problem, inputs)
  if name == "jit":
    return jax.jit(attend)
  if name == "remat":
    return jax.checkpoint(attend)
  if name == "scan":  # over two calls, of which one counts
    return lambda *x: jax.lax.scan(lambda c, on: (c + on * attend(*x), None), 0 * x[0],
                                   jnp.array([0.0, 1.0]))[0]  # fmt: skip
  if name == "vmap":  # of samples in a batch of one
    one = lambda rest, *x: call(problem, Inputs(*x, *rest))
    lift = lambda t: jax.tree.map(lambda y: y[:, None], t)
    return lambda *x: jax.vmap(one)(lift(tuple(inputs[5:])), *lift(x))[:, 0]
  axis = {"shard batch": 0, "shard heads": 2}[name]
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "d")
  spec = jax.sharding.PartitionSpec(*[None] * axis, "d")
  lists = jax.sharding.PartitionSpec(*[None] * min(axis, 1), "d")
  counts = lists if axis == 0 else jax.sharding.PartitionSpec()
  part = lambda rest, *x: call(problem, Inputs(*x, *rest))
  return lambda *x: jax.shard_map(
    part, mesh=mesh, in_specs=((lists, lists, counts, counts), *[spec] * 5), out_specs=spec
  )(tuple(inputs[5:]), *x)


@pytest.mark.parametrize("name", ["jit", "remat", "scan", "vmap", "shard batch", "shard heads"])
def test_transformations_change_nothing(name):
  problem, inputs, dout = draw()
  want = oracle(problem, inputs, dout)
  attend = transformed(name, problem, inputs)
  value, grads = loss_and_gradients(problem, inputs, dout, attend)
  assert_close([value], [(want[0] * np.float64(dout)).sum()], 1e-5)
  assert_close(grads, want[2])


@pytest.mark.parametrize(
  ("backend", "platform", "sizes"),
  [
    ("tpu", "tpu", {}),
    ("mosaic_gpu", "cuda", {"dtype": "bfloat16", "d": 64, "block_q": 64, "block_k": 64}),
  ],
)
def test_kernels_lower_under_shard_map_and_vmap(backend, platform, sizes):
  problem, inputs, dout = draw(backend=backend, **sizes)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "d")
  spec = jax.sharding.PartitionSpec("d")
  part = lambda *x: attention.attend(problem, Inputs(*x))
  shared = jax.shard_map(part, mesh=mesh, in_specs=(spec,) * 9, out_specs=spec)
  lift = lambda *x: jax.vmap(part)(*(y[:, None] for y in x))[:, 0]
  for attend in (shared, lift):

    def grads(*tensors, attend=attend):
      return jax.vjp(lambda *x: attend(*x, *inputs[5:]), *tensors)[1](dout)

    jax.jit(grads).trace(*inputs[:5]).lower(lowering_platforms=(platform,))


def test_nested_vmaps_and_what_is_not_mapped():
  problem, inputs, _ = draw()
  q = jnp.stack([inputs.q, inputs.q[::-1], 2 * inputs.q])
  attend = lambda q: call(problem, inputs, q, *inputs[1:5])
  assert_close([jax.vmap(attend)(q)], [np.stack([attend(x) for x in q])])
  twice = jax.vmap(jax.vmap(attend))(q[None])
  assert_close([twice[0]], [np.stack([attend(x) for x in q])])


def test_a_count_per_sample_serves_all_its_lists():
  problem, inputs, _ = draw()
  index = jnp.clip(inputs.index, 0, 3)
  same = call(problem, inputs._replace(index=index, count=np.array([[[1]], [[2]]])))
  for sample, count in enumerate((1, 2)):
    counts = np.full(index.shape[:3], count, np.int32)
    all_alike = call(problem, inputs._replace(index=index, count=counts))
    np.testing.assert_array_equal(same[sample], all_alike[sample])
  assert np.any(same[1] != call(problem, inputs._replace(index=index, count=counts - 1))[1])


def test_outside_of_jit_too_a_call_is_compiled_once():
  problem, inputs, dout = draw(s=19)
  attend = functools.partial(call, problem, inputs)
  value = lambda: jax.block_until_ready(attend(*inputs[:5]))
  gradients = lambda: jax.block_until_ready(jax.vjp(attend, *inputs[:5])[1](dout))
  value(), gradients()
  with compilations() as compiled:
    value(), gradients()
  assert not compiled


def test_half_precision_accumulates_in_single():
  problem, inputs, dout = draw("bfloat16", d=128, s=64, n=256, past=0, length=(256, 200))
  # Inputs, probabilities and the output each round at 8 bits.
  assert_close([call(problem, inputs)], [oracle(problem, inputs, dout)[0]], 0.01)
  assert call(problem, inputs).dtype == jnp.bfloat16


def test_without_an_accelerator_auto_takes_plain_jax(caplog):
  problem, inputs, _ = draw()
  with caplog.at_level("INFO"):
    chosen = attention.choose_backend(dataclasses.replace(problem, backend="auto"), inputs)
  assert chosen.backend == "xla" and not caplog.records


def test_auto_says_once_why_an_accelerator_is_not_used(monkeypatch, caplog):
  problem, inputs, _ = draw()
  monkeypatch.setattr(device, "platform", lambda: "gpu")
  monkeypatch.setattr(device, "compute_capability", lambda: (7, 5))
  attention._say.cache_clear()
  with caplog.at_level("INFO"):
    for _ in range(2):
      auto = dataclasses.replace(problem, backend="auto")
      assert attention.choose_backend(auto, inputs).backend == "xla"
  assert len(caplog.records) == 1 and "compute capability" in caplog.text


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton", "tpu"])
def test_a_backend_that_cannot_serve_says_why(backend):
  problem, inputs, _ = draw()
  with pytest.raises(ValueError, match=f"backend {backend} cannot serve this call: it "):
    call(problem, inputs, backend=backend)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"k": np.ones((1, 16, 2, 8), np.float32)}, "must agree"),
    ({"v": np.ones((1, 15, 1, 8), np.float32)}, "k holds 16 tokens and v 15"),
    ({"k": np.ones((1, 16, 1, 8), np.float16)}, "q is float32 and k float16; give all in one"),
    ({"block_index": np.zeros((1, 1, 3, 1), np.int32)}, r"need \(1, 1, 2\) lists"),
    ({"block_index": np.zeros((1, 1, 2, 3), np.int32)}, "lists 3 blocks of keys.* only 2"),
    ({"past_length": np.zeros((1,), np.int32)}, "go together"),
    ({"past_k": np.ones((1, 4, 1, 8), np.float32)}, "go together"),
    ({"block_k": 0}, "at least 1 each"),
    ({"block_q": 8.0}, "Blocks are 8.0 queries and 8 keys; give whole numbers"),
    ({"length": 5}, r"length is int32 \[\]; give integers of shape \[1\]"),
    ({"length": [5.0]}, r"length is float32 \[1\]"),
    ({"q": np.ones((1, 16, 1, 8), np.int32)}, "q is int32; give floating point"),
    ({"q": np.ones((1, 0, 1, 8), np.float32)}, "no axis may be empty"),
    (
      {"k": np.ones((1, 0, 1, 8), np.float32), "v": np.ones((1, 0, 1, 8), np.float32)},
      "no axis may be empty",
    ),
    ({"q": np.ones((1, 16, 8), np.float32)}, r"q has shape \(1, 16, 8\)"),
    ({"block_index": np.zeros((1, 1, 2, 1), np.float32)}, "block_index is float32"),
    ({"block_count": np.ones((1, 1, 2), np.float32)}, "block_count is float32; give integers"),
    ({"block_count": np.ones((3,), np.int32)}, r"shape \[3\]; give one that broadcasts to"),
    ({"length": np.ones((2,), np.int32)}, r"length is int32 \[2\]"),
    ({"scale": float("nan")}, "The scale is nan; give a finite number"),
    ({"scale": np.ones(1)}, "give a finite number, not an array"),
    ({"backend": "mosaic"}, "Unknown backend 'mosaic'"),
  ],
)
def test_wrong_arguments_are_refused(change, sentence):
  x = np.ones((1, 16, 1, 8), np.float32)
  args = {"q": x, "k": x, "v": x, "block_index": np.zeros((1, 1, 2, 1), np.int32),
          "block_q": 8, "block_k": 8, **change}  # fmt: skip
  with pytest.raises(ValueError, match=sentence):
    pk.block_sparse_attention(**args)


def small(**change):
  """Two query blocks and two key blocks of eight."""
  r = np.random.default_rng(0)
  q, k, v = r.normal(size=(3, 1, 16, 1, 8)).astype(np.float32)
  args = {"q": q, "k": k, "v": v, "block_index": np.array([[[[0, 1], [1, 0]]]]), "block_q": 8}
  return pk.block_sparse_attention(**{**args, "block_k": 8, **change})


def test_a_past_without_room_is_no_past():
  none = np.zeros((1, 0, 1, 8), np.float32)
  np.testing.assert_array_equal(
    small(past_k=none, past_v=none, past_length=np.zeros(1, np.int32)), small()
  )


def test_lengths_beyond_the_buffer_add_no_keys():
  args = {"k": np.ones((1, 12, 1, 8), np.float32), "v": np.ones((1, 12, 1, 8), np.float32)}
  np.testing.assert_array_equal(small(**args, length=[16]), small(**args))
  np.testing.assert_array_equal(small(**args, length=[-3]), np.zeros((1, 16, 1, 8)))


def test_what_is_listed_past_the_count_is_not_read():
  """Not even when it is no number; nor is anything of an empty list."""
  r = np.random.default_rng(1)
  k = r.normal(size=(1, 16, 1, 8)).astype(np.float32)
  bad = k.copy()
  bad[:, 8:] = np.nan
  args = {"block_index": np.array([[[[0, 1], [1, 0]]]]), "block_count": np.array([[[1, 0]]])}

  def loss(k, v):
    return (small(k=k, v=v, **args) ** 2).sum()

  for x, y in zip(
    jax.value_and_grad(loss, (0, 1))(bad, bad), jax.value_and_grad(loss, (0, 1))(k, k), strict=True
  ):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
      np.testing.assert_array_equal(a, b)


def test_lists_and_numbers_of_python_will_do():
  want = small(length=np.array([9]), block_count=np.array(1))
  got = small(block_index=[[[[0, 1], [1, 0]]]], length=[9], block_count=1)
  np.testing.assert_array_equal(got, want)
