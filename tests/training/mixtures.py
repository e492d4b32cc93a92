"""Clips in latent space of which all is known, and what trains and samples tiny networks on them.

A clip shows one of two patterns, by chance, of those that its prompt has, throughout, and on it
noise that goes on from frame to frame. So the process is stationary: true clips of any length can
be drawn, and a stream must keep what it began with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hfjax import parallel
from hfjax.diffusion.clip import sample_clip
from hfjax.diffusion.schedule import FlowSchedule
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.distill import teacher
from hfjax.distill.inputs import Texts
from hfjax.distill.objectives import Distillation, Frozen
from hfjax.distill.supervised import FlowMatching, Regression
from hfjax.models import wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.rollout import generate
from hfjax.streaming.state import init_state
from hfjax.training.optimizers import OptimizerConfig
from hfjax.training.update import Average, init_part, make_update

# Many updates are run of each program, so that some optimisation by the compiler pays.
COMPILER = {"xla_backend_optimization_level": "1"}
MESH = parallel.make_mesh(devices=jax.devices()[:1])

SHAPE = (2, 4, 2)  # rows, columns, channels of a frame: two tokens
FRAMES, BATCH, SHIFT = 6, 64, 3.0
SPREAD, KEPT = 0.4, 0.8  # of the noise on patterns: standard deviation, correlation of neighbours
SAMPLES = 1024
PROMPTS = jnp.arange(SAMPLES) % 2  # of samples that are measured
MODEL = WanConfig(
  dim=32, ffn_dim=64, heads=2, layers=2, in_dim=2, out_dim=2, text_dim=4, text_len=2, freq_dim=32
)
HYBRID_MODEL = dataclasses.replace(MODEL, linear=True)

_rng = np.random.default_rng(0)
PATTERNS = jnp.asarray(
  3.2 * np.linalg.qr(_rng.normal(size=(16, 16)))[0][:4].reshape(2, 2, *SHAPE), jnp.float32
)
WORDS = jnp.asarray(5 * _rng.normal(size=(2, 2, 4)), jnp.float32)
NEGATIVE = jnp.zeros((1, 2, 4))


def draw(key, prompts, frames, even=False):
  """True clips `[b f y x c]`. even: both patterns of a prompt equally often, not by chance."""
  one, two = jax.random.split(key)
  chance = jax.random.randint(one, prompts.shape, 0, 2)
  pattern = jnp.arange(len(prompts)) // 2 % 2 if even else chance
  fresh = jax.random.normal(two, (frames, len(prompts), *SHAPE))

  def go_on(noise, fresh):
    noise = KEPT * noise + np.sqrt(1 - KEPT**2) * fresh
    return noise, noise

  _, rest = jax.lax.scan(go_on, fresh[0], fresh[1:])
  noise = jnp.concatenate([fresh[:1], rest]).swapaxes(0, 1)
  return PATTERNS[prompts, pattern][:, None] + SPREAD * noise


def distance(a, b, directions=256):
  """Sliced Wasserstein distance of two sets of clips.

  Directions are products of one over frames, which is the mean for half of them, and one over the
  numbers of a frame; those in all numbers of a clip would hardly see what frames have in common.
  """
  a, b = (np.asarray(x, np.float64).reshape(*x.shape[:2], -1) for x in (a, b))
  rng = np.random.default_rng(0)
  over_frames = rng.normal(size=(directions, a.shape[1]))
  over_frames[::2] = 1
  over_numbers = rng.normal(size=(directions, a.shape[2]))
  f, p = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (over_frames, over_numbers))
  a, b = (np.sort(np.einsum("bfp,df,dp->db", x, f, p, optimize=True)) for x in (a, b))
  return np.abs(a - b).mean()


def judge(clips):
  """Distance of clips under `PROMPTS` from true ones, the mean of both prompts."""
  true = draw(jax.random.key(99), PROMPTS, clips.shape[1], even=True)
  return float(np.mean([distance(clips[i::2], true[i::2]) for i in range(2)]))


def draw_texts(key):
  """A batch of texts."""
  return Texts(WORDS[jax.random.randint(key, (BATCH,), 0, 2)], NEGATIVE)


def train(step: Callable, carry: Any, updates: int, seed: int):
  """`step(carry, key) -> (carry, figure)` so many times; the last carry and all figures."""
  run = lambda carry, keys: jax.lax.scan(step, carry, keys)
  keys = jax.random.split(jax.random.key(seed), updates)
  return jax.jit(run, compiler_options=COMPILER)(carry, keys)


def one_microbatch(tree):
  return jax.tree.map(lambda x: x[None], tree)


def train_one(loss, params, optimizer: OptimizerConfig, make_batch, updates, seed):
  """Averaged weights after training by `loss(params, fixed, batch, key)`."""
  adam, average = optimizer.make(updates), Average(0.98)
  part = init_part(params, adam, average)
  update = make_update(loss, adam, average, MESH, part)

  def step(part, key):
    one, two = jax.random.split(key)
    part, figures = update(part, (), one_microbatch(make_batch(one)), two)
    return part, figures["loss"]

  return train(step, part, updates, seed)[0].ema


def train_teacher(seed: int, updates: int):
  """A bidirectional model of the true clips, by flow matching."""
  objective = FlowMatching(MODEL, shift=SHIFT, weighted=False, drop_text=0.1, remat=False)

  def make_batch(key):
    one, two = jax.random.split(key)
    prompts = jax.random.randint(one, (BATCH,), 0, 2)
    return draw(two, prompts, FRAMES), WORDS[prompts]

  def loss(params, fixed, batch, key):
    del fixed
    return objective.loss(params, batch[0], Texts(batch[1], NEGATIVE), key)

  params = wan.init_params(MODEL, jax.random.key(seed))
  return train_one(
    loss, params, OptimizerConfig(3e-3, "cosine", warmup=20), make_batch, updates, seed + 1
  )


def train_regression(stream: StreamConfig, params, teacher_params, seed: int, updates: int):
  """A causal model of few steps, by regression on the teacher's trajectories."""
  objective, table, pairs = Regression(stream), FlowSchedule(SHIFT, 24), 2048
  context = WORDS[jnp.arange(pairs) % 2]

  def flows(x, t, i):
    del i
    flow = wan.predict_flow(MODEL, teacher_params, x, t, context)
    return flow, flow

  keep = teacher.kept_states(table, stream.steps)
  trace = jax.jit(
    lambda noise: teacher.trace(flows, noise, table, 1.0, keep), compiler_options=COMPILER
  )
  paths = trace(jax.random.normal(jax.random.key(seed + 2), (pairs, FRAMES, *SHAPE)))

  def make_batch(key):
    chosen = jax.random.randint(key, (BATCH,), 0, pairs)
    return paths[chosen], context[chosen]

  def loss(params, fixed, batch, key):
    del fixed
    return objective.loss(params, batch[0], Texts(batch[1], NEGATIVE), key)

  return train_one(
    loss, params, OptimizerConfig(2e-3, "cosine", warmup=20), make_batch, updates, seed + 3
  )


def train_distillation(
  objective: Distillation, params, critic, teacher_params, seed: int, updates: int,
  rate=1e-3, critic_rate=2e-3, critic_updates=4,
):  # fmt: skip
  """Averaged weights of a student, and a critic, so many updates of which go before each of it."""
  average, frozen = Average(0.98), Frozen(teacher_params)
  adam = OptimizerConfig(rate, "linear", b1=0.0, b2=0.99).make(updates)
  critic_adam = OptimizerConfig(critic_rate, b1=0.0, b2=0.99).make(updates)
  parts = init_part(params, adam, average), init_part(critic, critic_adam, None)

  def student_loss(params, critic, texts, key):
    return objective.generator_loss(params, critic, frozen, texts, key)

  def critic_loss(critic, params, texts, key):
    return objective.critic_loss(critic, params, frozen, texts, key)

  update = make_update(student_loss, adam, average, MESH, parts[0])
  update_critic = make_update(critic_loss, critic_adam, None, MESH, parts[1])

  def texts(key):
    drawn = draw_texts(key)
    return one_microbatch(drawn)

  def step(parts, key):
    student, critic = parts
    keys = jax.random.split(key, critic_updates + 1)

    def follow(critic, key):
      one, two = jax.random.split(key)
      return update_critic(critic, student.params, texts(one), two)[0], None

    critic, _ = jax.lax.scan(follow, critic, keys[1:])
    one, two = jax.random.split(keys[0])
    student, figures = update(student, critic.params, texts(one), two)
    return (student, critic), figures["loss"]

  (student, critic), _ = train(step, parts, updates, seed + 4)
  return student.ema, critic.params


def sample_teacher(params):
  noise = jax.random.normal(jax.random.key(7), (SAMPLES, FRAMES, *SHAPE))
  return sample_clip(MODEL, params, WORDS[PROMPTS], noise, MultistepSolver("unipc", 16, SHIFT))


def sample_stream(config: StreamConfig, params, frames: int):
  text = wan.text_keys(config.model, params, WORDS[PROMPTS])
  keys = jax.random.split(jax.random.key(8), SAMPLES)
  chunks = frames // config.geometry.chunk
  return generate(config, params, init_state(config, text), keys, chunks)[1]


def stream(model: WanConfig, **geometry) -> StreamConfig:
  grid = Geometry(*SHAPE[:2], chunk=2, block=2, **geometry)
  return StreamConfig(model, grid, steps=(1000, 500), shift=SHIFT)


def with_memory(params, seed: int):
  """Weights of the hybrid model that are those given, and fresh where these have none."""

  def merge(new, old):
    return {
      k: merge(v, old[k]) if isinstance(v, dict) and k in old else old.get(k, v)
      for k, v in new.items()
    }

  return merge(wan.init_params(HYBRID_MODEL, jax.random.key(seed)), params)
