"""Recall beyond the window is learned through the linear memory, and cannot be without it.

The first frame is one of a few codes, and the frames behind it are noise. Once the window has slid
past the code, a frame is to be predicted from pure noise: it is the code again. History carries no
gradient, so that what is learned is how the memory is read; what is written follows along.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models import wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import begin_chunk, init_state
from hfjax.streaming.step import context_step, denoise
from hfjax.training.optimizers import OptimizerConfig
from hfjax.training.update import init_part, make_update
from tests.training.mixtures import COMPILER, MESH

CODES, FRAME, BATCH = 4, (2, 4, 2), 64
BETWEEN = 4  # frames of noise behind the code, of which attention sees one
UPDATES, ROUNDS = 400, 16
# Orthogonal, and of mean square 1 each.
CODE = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0][:CODES].reshape(-1, *FRAME)
CODE = jnp.asarray(4 * CODE, jnp.float32)


def recall(linear: bool, seed: int):
  """Loss and share of right codes after training, on clips that were not seen."""
  model = WanConfig(
    dim=32, ffn_dim=64, heads=2, layers=2, in_dim=2, out_dim=2, text_dim=4, text_len=1,
    freq_dim=16, linear=linear,
  )  # fmt: skip
  grid = Geometry(*FRAME[:2], chunk=1, window=2, sink=0, ratio=1, rope_cap=8, block=2)
  config = StreamConfig(model, grid, steps=(1000,), shift=1.0)
  context = jnp.ones((BATCH, 1, model.text_dim))

  def predict(params, key):
    """What stands in place of the code after it left the window, and the code's number."""
    keys = jax.random.split(key, 3)
    code = jax.random.randint(keys[0], (BATCH,), 0, CODES)
    between = jax.random.normal(keys[1], (BETWEEN, BATCH, 1, *FRAME))
    clips = jnp.concatenate([CODE[code][None, :, None], between])
    fixed = jax.lax.stop_gradient(params)
    state = init_state(config, wan.text_keys(model, fixed, context))
    take = lambda state, x0: (context_step(config, fixed, state, x0), None)
    chunk = begin_chunk(config, jax.lax.scan(take, state, clips)[0])
    noise = jax.random.normal(keys[2], (BATCH, 1, *FRAME))
    return noise - denoise(config, params, chunk, noise, jnp.full(BATCH, 1000.0), context), code

  def loss(params, fixed, batch, key):
    del fixed, batch
    x0, code = predict(params, key)
    right = jnp.einsum("bfyxc,kyxc->bk", x0, CODE).argmax(-1) == code
    return ((x0[:, 0] - CODE[code]) ** 2).mean(), {"right": right.mean()}

  optimizer = OptimizerConfig(3e-3, "cosine").make(UPDATES)
  part = init_part(wan.init_params(model, jax.random.key(seed)), optimizer, None)
  update = make_update(loss, optimizer, None, MESH, part)

  @functools.partial(jax.jit, compiler_options=COMPILER)
  def train(part, key):
    step = lambda part, key: (update(part, (), jnp.zeros((1, BATCH)), key)[0], None)
    part, _ = jax.lax.scan(step, part, jax.random.split(key, UPDATES))
    see = lambda key: loss(part.params, (), (), key)
    value, figures = jax.lax.map(see, jax.random.split(jax.random.key(10**6), ROUNDS))
    return value.mean(), figures["right"].mean()

  return [float(x) for x in train(part, jax.random.key(seed + 1))]


@pytest.mark.slow
def test_what_left_the_window_is_recalled_by_the_memory_alone():
  """Without a memory the best guess is the mean of all codes, whose error is 1 - 1 / CODES."""
  with_memory, without = recall(True, 0), recall(False, 0)
  print(f"\nrecall: loss and share of right codes {with_memory}, without memory {without}")
  assert with_memory[0] < 0.2 and with_memory[1] > 0.95
  assert 0.98 * (1 - 1 / CODES) < without[0] < 0.9
  assert abs(without[1] - 1 / CODES) < 0.06  # 1024 draws: four standard deviations
