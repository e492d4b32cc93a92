"""The Triton kernels in Triton's interpreter, on the processor, against attention in NumPy."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton as backend
from pallas_kernels.problem import Gradients, Inputs, Problem
from pallas_kernels.triton import Tuning
from tests.oracles.triton_interpreter import interpret

# Relative, by norm. In float32 sums of some 100 products round; measured: 1e-6. In half precision
# probabilities, their gradients and results are each rounded to 8 or 11 bits.
TOLERANCE = {"float32": 3e-6, "bfloat16": 6e-3, "float16": 1e-3}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
  """The kernels run in the interpreter; what they are launched with."""
  return interpret(monkeypatch)


def draw(b, h, d, s, past, n, block_q, block_k, dtype="float32", seed=0):
  """Inputs with random lists, counts and valid lengths; what does not count is junk."""
  r = np.random.default_rng(seed)
  array = lambda rows: jnp.asarray(r.normal(size=(b, rows, h, d)), dtype)
  older = -(-past // block_k)
  blocks = older - (-n // block_k)
  lists = (b, h, -(-s // block_q))
  index = r.permuted(np.broadcast_to(np.arange(blocks), (*lists, blocks)), axis=-1)
  count = r.integers(1, blocks + 1, lists)
  # A list of nothing, and one of a block that may hold no valid key.
  count[0, 0, 0], count[-1, -1, -1] = 0, 1
  length = r.integers(1, n, b)
  length[-1] = min(n - 1, 2)
  index[-1, -1, -1, :] = np.roll(np.arange(blocks), 1)
  index = np.where(np.arange(blocks) < count[..., None], index, 10**6)
  int32 = lambda x: jnp.asarray(x, jnp.int32)
  return Inputs(
    array(s), array(n), array(n), array(past) if past else None, array(past) if past else None,
    int32(index), int32(count), int32(length), int32(r.integers(0, past + 1, b)) if past else None,
  )  # fmt: skip


def oracle(problem, inputs, dout):
  """Output, log-sum-exp in base 2 and gradients, in float64, of one masked softmax."""
  wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
  q, dout = wide(inputs.q), wide(dout)
  buffers = [(inputs.k, inputs.v, inputs.length)]
  if inputs.past_k is not None:
    buffers.insert(0, (inputs.past_k, inputs.past_v, inputs.past_length))
  k, v = (np.concatenate([wide(x[i]) for x in buffers], 1) for i in (0, 1))
  # Of each key: its block, and whether it is valid.
  blocks, valid = [], []
  for x, _, n in buffers:
    first = blocks[-1][-1] + 1 if blocks else 0
    blocks.append(first + np.arange(x.shape[1]) // problem.block_k)
    valid.append(np.arange(x.shape[1]) < np.asarray(n)[:, None])
  blocks, valid = np.concatenate(blocks), np.concatenate(valid, 1)
  index, count = np.asarray(inputs.index), np.asarray(inputs.count)
  counts = np.arange(index.shape[-1]) < count[..., None]
  listed = ((index[..., None] == blocks) & counts[..., None]).any(-2)  # [b h q n]
  mask = np.repeat(listed, problem.block_q, axis=2)[:, :, : q.shape[1]] & valid[:, None, None]

  s = np.where(mask, problem.scale * np.einsum("bihd,bjhd->bhij", q, k), -np.inf)
  top = np.where(mask.any(-1), s.max(-1), 0)[..., None]
  total = np.exp(s - top).sum(-1, keepdims=True)
  p = np.exp(s - top) / np.where(total > 0, total, 1)
  out = np.einsum("bhij,bjhd->bihd", p, v)
  with np.errstate(divide="ignore"):
    lse = (top + np.log(total))[..., 0] * np.log2(np.e)
  dp = np.einsum("bihd,bjhd->bhij", dout, v)
  ds = problem.scale * p * (dp - (p * dp).sum(-1, keepdims=True))
  dk, dv = np.einsum("bhij,bihd->bjhd", ds, q), np.einsum("bhij,bihd->bjhd", p, dout)
  past = inputs.capacity
  grads = [np.einsum("bhij,bjhd->bihd", ds, k), dk[:, past:], dv[:, past:], None, None]
  if past:
    grads[3:] = [x[:, :past] * problem.past_gradient for x in (dk, dv)]
  return out, lse, Gradients(*grads)


def check(problem, inputs, seed=3):
  """Forward and backward against the oracle."""
  dout = jnp.asarray(np.random.default_rng(seed).normal(size=inputs.q.shape), inputs.q.dtype)
  out, lse, grads = oracle(problem, inputs, dout)
  got, got_lse = backend.forward(problem, inputs)
  got_grads = backend.backward(problem, inputs, got, got_lse, dout)
  assert got.dtype == inputs.q.dtype and got_lse.dtype == jnp.float32
  tolerance = TOLERANCE[str(inputs.q.dtype)]
  empty = np.isneginf(lse)
  np.testing.assert_array_equal(np.isneginf(got_lse), empty)
  # Four roundings of scores as large as these; how many there are depends on the processor.
  got_lse, lse = np.where(empty, 0, got_lse), np.where(empty, 0, lse)
  np.testing.assert_allclose(got_lse, lse, 4 * np.finfo(np.float32).eps, 1e-6)
  assert not np.asarray(got.astype(jnp.float32))[empty.swapaxes(1, 2)].any()
  compare(got, out, tolerance)
  for name, want in grads._asdict().items():
    x = getattr(got_grads, name)
    assert (x is None) == (want is None), name
    if x is not None:
      assert x.dtype == inputs.q.dtype and x.shape == getattr(inputs, name).shape
      compare(x, want, tolerance)
  return empty


def compare(got, want, tolerance):
  got = np.asarray(got.astype(jnp.float32), np.float64)
  assert np.isfinite(got).all()
  assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


# Batch, heads, head dimension, queries, past capacity, keys, block_q, block_k.
SIZES = [
  (2, 2, 64, 37, 0, 53, 16, 16),
  (2, 2, 64, 70, 45, 37, 32, 16),
  (2, 1, 128, 35, 60, 64, 16, 32),
  (1, 2, 16, 80, 64, 70, 64, 64),  # blocks of several tiles
  (2, 2, 16, 9, 5, 7, 16, 16),  # arrays shorter than a tile
  (1, 2, 16, 70, 40, 9, 16, 32),
]


@pytest.mark.parametrize("size", SIZES)
def test_equals_attention_in_double_precision(size):
  assert check(Problem(0.2, *size[-2:]), draw(*size)).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", SIZES[:3])
def test_half_precision(size, dtype):
  check(Problem(size[2] ** -0.5, *size[-2:]), draw(*size, dtype))


@pytest.mark.parametrize("past_length", [[0, 45], [32, 31], [45, 1]])
@pytest.mark.parametrize("length", [[37, 16], [1, 33]])
def test_valid_keys_may_end_anywhere(past_length, length):
  inputs = draw(*SIZES[1])
  lengths = {"past_length": past_length, "length": length}
  check(Problem(0.3, 32, 16), inputs._replace(**{n: jnp.asarray(x) for n, x in lengths.items()}))


@pytest.mark.parametrize("size", [(2, 1, 16, 75, 45, 37, 32, 32), (1, 1, 16, 9, 5, 7, 32, 32)])
@pytest.mark.parametrize(
  "tuning",
  [
    Tuning(16, 16),
    Tuning(32, 16, branch=False, fused=True, turned=True),
    Tuning(16, 32, fused=True),
    Tuning(32, 32, branch=False, turned=True),
  ],
)
def test_every_form_of_a_kernel_computes_the_same(size, tuning, monkeypatch):
  monkeypatch.setattr(backend, "_tuning", lambda *_: tuning)
  check(Problem(0.25, 32, 32), draw(*size))


@pytest.mark.parametrize("size", [SIZES[1], SIZES[4]])
def test_gradients_of_a_constant_past_are_not_computed(size, launches):
  problem = Problem(0.2, *size[-2:], past_gradient=False)
  check(problem, draw(*size))
  current = -(-size[5] // size[7])
  assert launches[-1].grid == (current, size[1], size[0])


def test_large_scores_do_not_overflow():
  inputs = draw(*SIZES[1])
  inputs = inputs._replace(q=inputs.q.at[0].multiply(100).at[:, 3].multiply(-1e4))
  out, lse = backend.forward(Problem(1.0, 32, 16), inputs)
  assert np.isfinite(out).all()
  want, want_lse, _ = oracle(Problem(1.0, 32, 16), inputs, inputs.q)
  compare(out, want, 1e-4)
  np.testing.assert_allclose(got_finite(lse), got_finite(want_lse), 1e-6, 1e-3)


def got_finite(x):
  return np.where(np.isfinite(x), x, 0)


@pytest.mark.parametrize(
  ("change", "q", "sentence"),
  [
    ({"interpret": True}, None, "no interpreter"),
    ({"block_k": 48}, None, "block_k is 48"),
    ({"block_q": 256}, None, "block_q is 256"),
    ({"scale": 0.0}, None, "the scale is 0.0"),
    ({}, jax.ShapeDtypeStruct((1, 16, 1, 24), jnp.float32), "d is 24"),
    ({}, jax.ShapeDtypeStruct((1, 16, 1, 16), jnp.int32), "the arrays are int32"),
    ({}, jax.ShapeDtypeStruct((1, 0, 1, 16), jnp.float32), "an array is empty"),
    ({}, jax.ShapeDtypeStruct((1, 2**23, 2, 128), jnp.float32), "8388608 tokens .* are too many"),
  ],
)
def test_what_it_cannot_serve_it_says(change, q, sentence, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(backend, "_capability", lambda: (9, 0))
  monkeypatch.setattr(backend, "_modules", lambda: (None, {}))
  problem, inputs = Problem(1.0, 16, 16), draw(1, 1, 16, 16, 16, 16, 16, 16)
  assert backend.unsupported(problem, inputs) is None
  changed = dataclasses.replace(problem, **change)
  assert re.search(
    sentence, backend.unsupported(changed, inputs._replace(q=inputs.q if q is None else q))
  )


def test_where_it_cannot_run_it_says_so(monkeypatch):
  problem, inputs = Problem(1.0, 16, 16), draw(1, 1, 16, 16, 16, 16, 16, 16)
  assert "NVIDIA GPU" in backend.unsupported(problem, inputs)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(backend, "_capability", lambda: (7, 5))
  assert "8.0 or newer" in backend.unsupported(problem, inputs)
  monkeypatch.setattr(backend, "_capability", lambda: (8, 0))
  monkeypatch.setattr(backend, "_modules", lambda: "ImportError: none")
  assert "ImportError: none); pip install" in backend.unsupported(problem, inputs)


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_fit_the_shared_memory_of_every_gpu(shared, dtype, monkeypatch):
  monkeypatch.setattr(backend, "_SHARED_ELSEWHERE", shared)
  arrays = draw(1, 1, 128, 128, 0, 128, 16, 16, dtype)
  for kernel in ("forward", "queries", "keys"):
    for block_q, block_k in itertools.product((16, 32, 64, 128), repeat=2):
      tuning = backend._tuning(kernel, Problem(1.0, block_q, block_k), arrays)
      size = arrays.q.dtype.itemsize
      assert backend._shared_bytes(kernel, tuning, 128, size) <= 1024 * shared
      assert block_q % tuning.tile_q == 0 and block_k % tuning.tile_k == 0
      assert min(tuning.tile_q, tuning.tile_k) >= 16 and tuning.stages >= 1
