"""Counts of operations against those of traced programs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.distill.objectives import Distillation
from hfjax.distill.rollout import roll_out
from hfjax.models import wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import preset
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.step import ChunkNoise
from hfjax.training import config, dry_run, flops, plan
from tests.helpers import MODEL

DENSE = dataclasses.replace(MODEL, linear=False, in_dim=6, out_dim=4)
STREAM = StreamConfig(
  dataclasses.replace(MODEL, linear=False),
  Geometry(4, 6, chunk=2, window=6, sink=1, variant="reference_dense"),
  steps=(1000, 750, 500),
)
OTHER = dataclasses.replace(MODEL, linear=False, layers=3)
O = Distillation(STREAM, OTHER, OTHER, None, most=4, last=2, reflow_steps=5)  # noqa: E741


def products(jaxpr):
  """Operations of all matrix products of a traced program."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval.shape
      summed = math.prod(left[i] for i in contracted)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * summed
    inner = sum(products(x.jaxpr if hasattr(x, "jaxpr") else x) for x in _programs(eqn))
    total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
  return total


def _programs(eqn):
  return [x for x in eqn.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def traced(config, frames, height, width):
  params = jax.eval_shape(lambda: wan.init_params(config, jax.random.key(0)))
  x = jnp.zeros((1, frames, height, width, config.in_dim))
  text = jnp.zeros((1, config.text_len, config.text_dim))
  run = lambda p: wan.predict_flow(config, p, x, jnp.zeros(1), text)
  return products(jax.make_jaxpr(run)(params).jaxpr)


def of_time(config):
  """What depends on the time alone, once a sample, which is not counted."""
  return 2 * config.dim * (config.freq_dim + config.dim + 6 * config.dim)


@pytest.mark.parametrize("config", [DENSE, OTHER], ids=["a", "b"])
@pytest.mark.parametrize("frames", [1, 5])
def test_a_forward_is_what_the_program_multiplies(config, frames):
  tokens = frames * 6
  want = traced(config, frames, 4, 6) - of_time(config)
  assert flops.forward(config, tokens, tokens) == want


def test_a_forward_at_full_size():
  config, frames = preset("wan-1.3b"), 21
  tokens = frames * 1560
  got = flops.forward(config, tokens, tokens)
  # Every matrix multiplies each token, but those of the text each of its rows.
  shapes = jax.eval_shape(lambda: wan.init_params(config, jax.random.key(0)))
  sizes = {
    "/".join(k.key for k in path): math.prod(x.shape)
    for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]
    if path[-1].key == "kernel"
  }
  of_text = ("text/in/kernel", "text/out/kernel", "blocks/cross_attn/kv/kernel")
  by_row = sum(sizes[name] for name in of_text)
  by_token = sum(
    size for name, size in sizes.items() if name not in of_text and not name.startswith("time/")
  )
  attention = 4 * config.layers * config.dim * tokens * (tokens + config.text_len)
  assert got == 2 * (by_token * tokens + by_row * config.text_len) + attention
  assert 1.40e9 < sum(sizes.values()) < 1.42e9  # all but a few of its 1 418 996 800 parameters
  without = flops.forward(config, tokens, tokens, text=False)
  assert got - without == 2 * by_row * config.text_len


def test_keys_that_a_chunk_sees():
  g = Geometry(4, 6, chunk=2, window=7, sink=1, ratio=0.25)
  # Of 6 tokens a frame: 2, 4 and 6 frames, and then the window's 7, of which a quarter is kept.
  assert [flops.keys_of_chunk(g, i) for i in range(6)] == [3, 6, 9, 10.5, 10.5, 10.5]
  dense = dataclasses.replace(g, variant="reference_dense")
  assert [flops.keys_of_chunk(dense, i) for i in range(5)] == [12, 24, 36, 42, 42]


class Counting:
  """A student that notes the chunk of each forward, and whether it carries gradients."""

  timesteps, sigmas = STREAM.timesteps, STREAM.sigmas

  def __init__(self):
    self.forwards = []

  def init(self, params):
    return jnp.int32(0)

  def begin(self, state):
    return state

  def flow(self, params, chunk, x, t, final):
    self.forwards.append((int(chunk), final))
    return x

  def commit(self, params, chunk, x0):
    self.forwards.append((int(chunk), False))
    return chunk + 1


def forwards(chunks, exit_step, first):
  """Forwards of a rollout, as it is run."""
  student, shape = Counting(), (1, 2, 1, 1, 1)
  noise = lambda number: ChunkNoise(jnp.ones(shape), jnp.ones((2, *shape)))
  with jax.disable_jit():
    roll_out(student, (), noise, exit_step, chunks, most=O.most, last=O.last, first=first)
  return student.forwards


def student_work(number, backward, text):
  g = STREAM.geometry
  keys = (min(number * g.chunk, g.past) + g.chunk) * g.tokens
  tokens = g.chunk * g.tokens
  return (2 if backward else 1) * flops.forward(STREAM.model, tokens, keys, text=text)


@pytest.mark.parametrize(("chunks", "exit_step"), [(2, 0), (4, 0), (3, 2)])
def test_a_rollout_is_the_forwards_that_it_runs(chunks, exit_step):
  want = sum(student_work(number, False, False) for number, _ in forwards(chunks, exit_step, False))
  assert flops.rollout(O, chunks, exit_step) == pytest.approx(want, rel=1e-12)
  clip = flops.forward(OTHER, 24, 24)  # of 4 frames
  assert flops.critic_step(O, chunks, exit_step) == pytest.approx(want + 3 * clip, rel=1e-12)


@pytest.mark.parametrize(
  ("fields", "exit_step", "clips"),
  [
    ({}, 0, 3),
    ({}, 2, 3),
    ({"critic_guidance": 1.0}, 1, 4),
    ({"reflow_weight": 0.1}, 0, 3 + 10),
    ({"reflow_weight": 0.1}, 1, 3),
    ({"reflow_weight": 0.1, "reflow_stop": 3}, 0, 3 + 6),
    ({"reflow_weight": 0.1, "reflow_always": True}, 0, 3 + 10),
    ({"reflow_weight": 0.1, "reflow_always": True}, 2, 3 + 10),
  ],
)
def test_a_generators_update_adds_backward_passes_and_clips(fields, exit_step, clips):
  o, chunks = dataclasses.replace(O, **fields), 3
  first = o.reflow_weight > 0 and o.reflow_always
  ran = forwards(chunks, exit_step, first)
  # Forwards that carry gradients make keys of the text anew.
  want = sum(student_work(number, False, final) for number, final in ran)
  trained = [number for number, final in ran if final]
  want += sum(student_work(number, True, True) for number in trained)
  want += clips * flops.forward(OTHER, 24, 24)
  assert flops.generator_step(o, chunks, exit_step) == pytest.approx(want, rel=1e-12)


def test_sparse_attention_takes_its_share():
  sparse = dataclasses.replace(
    STREAM, geometry=Geometry(4, 6, chunk=2, window=6, sink=1, ratio=0.5)
  )
  o = dataclasses.replace(O, stream=sparse)
  one, other = (flops.rollout(x, 4, 1) for x in (O, o))
  frames = np.minimum(np.arange(4) * 2, 4) + 2
  saved = 4 * 12 * 0.5 * frames.sum() * 6 * MODEL.dim * MODEL.layers * 3
  assert one - other == pytest.approx(saved)


@pytest.mark.parametrize("stage", ["ode", "flow"])
def test_with_teacher_forcing_clean_clips_count_as_well(stage):
  def counted(forcing):
    argv = [f"--config=configs/smoke_{stage}.py", "--workdir=unused"]
    frames = f"--config.{stage}.frames=6"
    p = plan.make_plan(config.parse([*argv, frames, f"--config.{stage}.forcing={forcing}"]).config)
    tokens = math.prod(p.latent_shape[:3]) // math.prod(p.student.patch)
    chunk = tokens * p.stream.geometry.chunk // 6
    return dry_run.operations(p, "student"), (p.config.batch, p.student, tokens, chunk)

  plain, _ = counted("none")
  forced, (batch, model, tokens, chunk) = counted("teacher")
  # Two clips, each token of which sees half of one and half of its chunk more.
  assert forced == 3 * batch * 2 * flops.forward(model, tokens, (tokens + chunk) / 2)
  assert forced / plain == 2 if stage == "ode" else 1.5 < forced / plain < 2
