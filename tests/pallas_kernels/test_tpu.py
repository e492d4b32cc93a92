import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention, tpu
from pallas_kernels.problem import Inputs, Problem
from tests.pallas_kernels.oracle import SCALE, draw, oracle

KERNEL = {"backend": "tpu", "interpret": True}
# Inputs and oracle agree; weights, the output and cotangents of scores each round at 8 bits.
ATOL = {"float32": 2e-6, "bfloat16": 2**-7}


@pytest.fixture(autouse=True)
def races(monkeypatch):
  """The interpreter only prints races and keeps them for one kernel; this looks at all kernels."""
  states = []

  def keep(*args, make=interpreter.RaceDetectionState, **kwargs):
    states.append(make(*args, **kwargs))
    return states[-1]

  monkeypatch.setattr(interpreter, "RaceDetectionState", keep)
  yield states
  pltpu.reset_tpu_interpret_mode_state()  # what a failed kernel leaves would fail the next ones
  assert not any(state.races_found for state in states)


def run(problem, inputs, dout):
  """Output, log-sum-exp and cotangents of the kernels."""
  out, lse = jax.jit(functools.partial(tpu.forward, problem))(inputs)
  return out, lse, jax.jit(functools.partial(tpu.backward, problem))(inputs, out, lse, dout)


def close(got, want, dtype="float32"):
  assert got.dtype == dtype and got.shape == want.shape
  size = np.abs(want[np.isfinite(want)]).max(initial=1)
  np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=ATOL[dtype] * size)


CASES = {
  "two ragged buffers": {},
  "no past": {"past": 0, "block_q": 16, "block_k": 8, "d": 128},
  "past empty or full": {"past": 32, "past_length": (0, 32), "n": 16, "length": (16, 1)},
  "half precision": {"dtype": "bfloat16", "s": 40, "block_q": 32},
  "whole blocks, one sample": {"b": 1, "s": 16, "past": 16, "n": 32, "d": 130, "length": (32,)},
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_dense_masked_attention(case, races):
  problem, inputs, dout = draw(**KERNEL, **CASES[case])
  assert tpu.unsupported(problem, inputs) is None
  out, lse, grads = run(problem, inputs, dout)
  want_out, want_lse, want = oracle(problem, inputs, dout)
  dtype = str(inputs.q.dtype)
  close(out, want_out, dtype)
  close(lse, want_lse)
  assert not out.swapaxes(1, 2)[want_lse == -np.inf].any()
  for x, y in zip(grads, want, strict=True):
    assert (x is None) == (y is None)
    if x is not None:
      close(x, y, dtype)
  assert len(races) == 3 + bool(inputs.capacity)


def same(got, want):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(x, y)


@functools.cache
def one_sample():
  case = draw(**KERNEL, b=1, s=16)
  return case, run(*case)


def test_heads_one_at_a_time(monkeypatch, races):
  case, want = one_sample()
  races.clear()
  monkeypatch.setattr(tpu, "MAX_SCALARS", 0)
  same(run(*case), want)
  assert len(races) == 2 * 4  # heads, kernels


def test_past_gradients_are_not_computed_unless_wanted():
  (_, inputs, dout), (out, lse, want) = one_sample()
  problem = Problem(SCALE, 8, 16, "tpu", past_gradient=False, interpret=True)
  backward = functools.partial(tpu.backward, problem)
  assert str(jax.make_jaxpr(backward)(inputs, out, lse, dout)).count("name=block_sparse_dkv") == 1
  got = jax.jit(backward)(inputs, out, lse, dout)
  zeros = jnp.zeros_like(inputs.past_k)
  same(got, want._replace(past_k=zeros, past_v=zeros))


def test_gradients_under_jit_and_vmap():
  problem, inputs, dout = draw(**KERNEL, s=16)

  def grads(inputs, dout):
    tensors = inputs[:5]
    attend = lambda *x: attention.attend(problem, Inputs(*x, *inputs[5:]))
    return jax.vjp(attend, *tensors)[1](dout)

  # Every sample is a call of its own, with a batch of one.
  one = jax.tree.map(lambda x: x[:, None], (inputs, dout))
  got = jax.jit(jax.vmap(grads))(*one)
  for x, y in zip(got, oracle(problem, inputs, dout)[2], strict=True):
    close(x[:, 0], y)


def test_kernels_lower_for_a_tpu_at_full_size():
  shape = lambda *x, dtype="int32": jax.ShapeDtypeStruct(x, dtype)
  tensor = lambda rows: shape(1, rows, 12, 128, dtype="bfloat16")
  inputs = Inputs(
    *map(tensor, (4680, 4680, 4680, 9360, 9360)),
    shape(1, 12, 74, 44), shape(1, 12, 74), shape(1), shape(1),
  )  # fmt: skip
  problem = Problem(128**-0.5, 64, 64, "tpu")
  rest = tensor(4680), shape(1, 12, 4680, dtype="float32"), tensor(4680)
  for call, args, kernels in (tpu.forward, (), 1), (tpu.backward, rest, 3):
    traced = jax.jit(functools.partial(call, problem)).trace(inputs, *args)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call(") == kernels


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"interpret": False}, "runs on TPUs"),
    ({"dtype": "float16"}, "the inputs are float16"),
    ({"d": 260}, "up to 256; this one is 260"),
    ({"block_q": 12}, "a multiple of 8 tokens, up to 512; block_q is 12"),
    ({"dtype": "bfloat16", "block_q": 16, "block_k": 24}, "of 16 tokens, up to 512; block_k is 24"),
    ({"block_k": 1024}, "block_k is 1024"),
    ({"n": 0, "length": (0, 0)}, "no empty arrays"),
    ({"index": (1, 1, 1000, 99)}, "take 800000 bytes of scalar memory; 786432 is the most"),
  ],
)
def test_calls_that_it_cannot_serve(change, sentence):
  sizes = {k: v for k, v in change.items() if k not in ("interpret", "index")}
  problem, inputs, _ = draw(**KERNEL, **sizes)
  if "index" in change:
    inputs = inputs._replace(index=np.zeros(change["index"], np.int32))
  if "interpret" in change:
    problem = Problem(SCALE, 8, 16, "tpu")
  assert sentence in tpu.unsupported(problem, inputs)
