"""The Hopper kernels without a GPU: lowered, and in JAX's interpreter where it has one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import attention, mosaic_gpu
from pallas_kernels.mosaic_gpu_rings import halved, registers
from pallas_kernels.problem import Inputs, Problem
from tests.pallas_kernels.oracle import draw, oracle

# By the norm of the whole: probabilities, cotangents of scores and results each round at 8 bits.
TOLERANCE = 6e-3
KERNEL = {"backend": "mosaic_gpu", "interpret": True, "dtype": "bfloat16", "d": 64}

interpreted = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"), reason="JAX has this interpreter from 0.11 on"
)


@pytest.fixture
def races(monkeypatch):
  """The interpreter only prints races and keeps them for one kernel; this looks at all kernels."""
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  states = []

  def keep(*args, make=gpu_callbacks.GPURaceDetectionState, **kwargs):
    states.append(make(*args, **kwargs))
    return states[-1]

  monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", keep)
  yield states
  gpu_callbacks.reset_gpu_interpret_mode_state()  # what a failed kernel leaves fails the next ones
  assert states and not any(state.races_found for state in states)


def close(got, want, tolerance=TOLERANCE):
  got = np.float64(got)
  assert got.shape == want.shape
  assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


CASES = {
  "two ragged buffers": {"s": 150, "past": 100, "n": 140, "length": (140, 70),
                         "past_length": (100, 37)},
  "one buffer": {"past": 0, "s": 70, "n": 150, "length": (150, 9)},
  "tall query blocks": {"s": 150, "past": 100, "n": 70, "block_q": 128, "length": (70, 64),
                        "past_length": (0, 100)},
  "less than a tile": {"s": 20, "past": 21, "n": 27},
  "wide key blocks": {"s": 70, "past": 100, "n": 140, "block_k": 128, "length": (140, 129),
                      "past_length": (100, 1)},
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_dense_masked_attention(case, races):
  problem, inputs, dout = draw(**KERNEL, **{"block_q": 64, "block_k": 64, **CASES[case]})
  assert mosaic_gpu.unsupported(problem, inputs) is None
  out, lse = mosaic_gpu.forward(problem, inputs)
  want_out, want_lse, want = oracle(problem, inputs, dout)
  close(out, want_out)
  np.testing.assert_allclose(lse, want_lse, atol=1e-4)  # the scores are exact to float32
  assert not out.swapaxes(1, 2)[want_lse == -np.inf].any()
  grads = mosaic_gpu.backward(problem, inputs, out, lse, dout)
  for x, y in zip(grads, want, strict=True):
    assert (x is None) == (y is None)
    if x is not None:
      close(x, y)


@interpreted
@pytest.mark.parametrize("cores", [1, 7])
@pytest.mark.parametrize("case", ["two ragged buffers", "tall query blocks"])
def test_programs_whole_and_halved(case, cores, monkeypatch, races):
  """Eight programs: all whole on one multiprocessor, the last of them in two halves on seven."""
  monkeypatch.setattr(mosaic_gpu.device, "multiprocessors", lambda: cores)
  problem, inputs, dout = draw(**KERNEL, **{"block_q": 64, "block_k": 64, **CASES[case]})
  assert halved(8, 2) == (cores == 7)
  out, lse = mosaic_gpu.forward(problem, inputs)
  want, want_lse, _ = oracle(problem, inputs, dout)
  close(out, want)
  np.testing.assert_allclose(lse, want_lse, atol=1e-4)


def test_halves_never_take_more_multiprocessors_than_there_are(monkeypatch):
  monkeypatch.setattr(mosaic_gpu.device, "multiprocessors", lambda: 132)
  assert [halved(n, 2) for n in (1, 66, 67, 132, 444)] == [1, 66, 0, 0, 48]
  assert halved(444, 1) == halved(444, 4) == 0


@interpreted
def test_past_gradients_are_zero_unless_wanted(races):
  sizes = {**CASES["two ragged buffers"], "b": 1, "h": 1, "s": 64}
  problem, inputs, dout = draw(**KERNEL, block_q=64, block_k=64, **sizes)
  problem = Problem(problem.scale, 64, 64, "mosaic_gpu", past_gradient=False, interpret=True)

  def attend(*tensors):
    return attention.attend(problem, Inputs(*tensors, *inputs[5:]))

  dq, dk, dv, *past = jax.vjp(attend, *inputs[:5])[1](dout)
  for x, y in zip((dq, dk, dv), oracle(problem, inputs, dout)[2][:3], strict=True):
    close(x, y)
  assert not any(x.any() for x in past)


@pytest.mark.parametrize(
  ("s", "past", "n"), [(4680, 9360, 4680), (4680, 0, 14040), (333, 245, 137)]
)
@pytest.mark.parametrize("blocks", mosaic_gpu.TUNING)
def test_kernels_lower_for_a_gpu_at_full_size(blocks, s, past, n):
  """Which checks shared memory, layouts and what can be copied by tiles."""
  block_q, block_k = blocks
  shape = lambda *x, dtype="int32": jax.ShapeDtypeStruct(x, dtype)
  tensor = lambda rows: shape(1, rows, 12, 128, dtype="bfloat16") if rows else None
  lists = (1, 12, -(-s // block_q))
  inputs = Inputs(
    *map(tensor, (s, n, n, past, past)), shape(*lists, 3), shape(*lists), shape(1),
    shape(1) if past else None,
  )  # fmt: skip
  problem = Problem(128**-0.5, block_q, block_k, "mosaic_gpu")
  rest = tensor(s), shape(1, 12, s, dtype="float32"), tensor(s)
  for call, args, kernels in (mosaic_gpu.forward, (), 1), (mosaic_gpu.backward, rest, 2):
    traced = jax.jit(functools.partial(call, problem)).trace(inputs, *args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2(") == kernels


def test_no_program_asks_for_more_registers_than_there_are():
  for consumers in range(1, 5):
    many, few = registers(consumers)
    assert many % 8 == few % 8 == 0
    assert 128 * (many * consumers + few) <= 65536
    start = 65536 // (128 * (consumers + 1))
    assert few < start and few >= 24


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"interpret": False}, "needs an NVIDIA GPU of compute capability 9"),
    ({"dtype": "float32"}, "the arrays are float32; it takes bfloat16 and float16"),
    ({"d": 80}, "the head dimension is 80; it takes 64 and 128"),
    ({"block_k": 32}, "blocks are 64 x 32; it takes 64 and 128"),
  ],
)
def test_calls_that_it_cannot_serve(change, sentence):
  problem, inputs, _ = draw(**{**KERNEL, "block_q": 64, "block_k": 64, **change})
  assert sentence in mosaic_gpu.unsupported(problem, inputs)


def test_a_scale_that_would_turn_the_maximum_round_is_refused():
  _, inputs, _ = draw(**KERNEL, block_q=64, block_k=64)
  for scale in (0.0, -1.0):
    problem = Problem(scale, 64, 64, "mosaic_gpu", interpret=True)
    assert "takes positive ones" in mosaic_gpu.unsupported(problem, inputs)


def test_float16_lowers_too():
  _, inputs, dout = draw(**{**KERNEL, "dtype": "float16"}, block_q=64, block_k=64, s=64)
  problem = Problem(0.3, 64, 64, "mosaic_gpu")
  call = jax.jit(functools.partial(mosaic_gpu.backward, problem))
  lse = jnp.zeros((2, 2, 64))
  call.trace(inputs, dout, lse, dout).lower(lowering_platforms=("cuda",))
