"""Networks of a few numbers in place of transformers, and objectives of them by hand.

All of it works on NumPy's arrays as on JAX's: in float64 it is the oracle's network.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hfjax.distill import clip, inputs, objectives
from hfjax.models import wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.models.vae import VaeConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.step import draw_noise
from tests.helpers import shapes_of

SIZES = {"dim": 8, "ffn_dim": 8, "heads": 1, "in_dim": 3, "out_dim": 3, "text_dim": 4,
         "text_len": 2, "freq_dim": 4, "patch": (1, 1)}  # fmt: skip
# Told apart by their layers, which scale the stand-in's flow.
STUDENT, CRITIC, TEACHER = (WanConfig(layers=layers, **SIZES) for layers in (1, 2, 3))
STREAM = StreamConfig(
  STUDENT, Geometry(2, 3, chunk=2, window=4, sink=1, patch=(1, 1)), steps=(1000, 750, 500)
)
VAE = VaeConfig(dim=2, z_dim=3, mean=(0.0,) * 3, std=(1.0,) * 3)
VAE_PARAMS = 0.5
CRITIC_PARAMS = np.array([0.3, -0.2, 0.4, 0.15])
TEACHER_PARAMS = np.array([0.2, 0.1, -0.3, 0.2])
STUDENT_PARAMS = np.array([0.6, 0.3, -0.5, 0.2, 0.4])


def mean(x, axes):
  return x.mean(axis=axes, keepdims=True)


def per_sample(x):
  """A number for each sample, of anything that has an axis for them, beside latents."""
  return x.reshape(x.shape[0], -1).mean(axis=1).reshape(-1, 1, 1, 1, 1)


def per_frame(t):
  return t.reshape(*t.shape, *(1,) * (5 - t.ndim))


def predict_flow(config, params, x, t, context, **options):
  """Of whole clips: linear in parameters, and each frame sees all others."""
  del options
  features = x, mean(x, 1), per_frame(t) / 1000, per_sample(context)
  return config.layers * sum(params[i] * feature for i, feature in enumerate(features))


class Student:
  """A stream that remembers one number of each sample."""

  def __init__(self, config, context):
    self.context = context
    self.timesteps, self.sigmas = config.timesteps, config.sigmas

  def init(self, params):
    return 0 * params[0] + jnp.zeros((self.context.shape[0], 1, 1, 1, 1))

  def begin(self, state):
    return state

  @staticmethod
  def features(chunk, x, t, context):
    return x, chunk, per_frame(t) / 1000, per_sample(context)

  def flow(self, params, chunk, x, t, final):
    features = self.features(chunk, x, t, self.context)
    return sum(params[i] * feature for i, feature in enumerate(features))

  def commit(self, params, chunk, x0):
    return 0.5 * chunk + params[4] * x0[:, -1:, -1:, -1:, -1:]


def first_of_clip(config, params, latents, chunks, chunk, last, dtype, decoded):
  """Stands for decoding and encoding; what `clip` makes of them has a test of its own."""
  assert (config, chunk, dtype, decoded) == (VAE, STREAM.geometry.chunk, jnp.float32, 0)
  place = (chunks - last) * chunk
  again = params * jax.lax.dynamic_slice_in_dim(latents, place, 1, axis=1) + chunks
  return jax.lax.stop_gradient(again)


def drawn_params(config, seed=0):
  """Parameters of a transformer, none of them as it is initialised; nothing is compiled."""
  draw = np.random.default_rng(seed)
  leaf = lambda x: jnp.asarray(0.4 * draw.normal(size=x.shape), x.dtype)
  return jax.tree.map(leaf, shapes_of(wan.init_params, config))


def install(patch):
  """Puts the stand-ins in the networks' place."""
  patch.setattr(wan, "predict_flow", predict_flow)
  patch.setattr(clip, "first_of_clip", first_of_clip)
  patch.setattr(objectives, "StreamStudent", Student)


def texts(batch=2):
  draw = np.random.default_rng(4).normal(size=(batch + 1, 2, 4)).astype(np.float32)
  return inputs.Texts(jnp.asarray(draw[1:]), jnp.asarray(draw[:1]))


def sigma(t, shift=5.0):
  """Noise level of the nearest of a schedule's 1000 times, float64."""
  u = 1 - np.arange(1000) / 1000
  table = shift * u / (1 + (shift - 1) * u)
  return table[np.abs(1000 * table - np.float64(t)[..., None]).argmin(axis=-1)]


@functools.cache
def rollouts(o):
  """Chunks and exit step by seed `[500 2]`."""
  steer = lambda seed: o.steer(jax.random.split(jax.random.key(seed), 3)[0])
  return np.stack(jax.jit(jax.vmap(steer))(jnp.arange(500)), axis=1)


def find_key(o, chunks, exit_step):
  """A key whose rollout is of so many chunks, each taken at that step."""
  found = np.all(rollouts(o) == (chunks, exit_step), axis=1)
  return jax.random.key(int(found.argmax()))


draw = jax.jit(draw_noise, static_argnums=0)
score_draws = jax.jit(
  objectives.Distillation(STREAM, CRITIC, TEACHER, None, most=2, last=1).draw_score_times
)


class ByHand:
  """An objective's losses and gradients from formulas of the spec, sections 8.3 to 8.8.

  The stand-ins' flows are linear in their parameters, so that gradients are products.
  """

  def __init__(self, o, batch, key, chunks, exit_step):
    """Gives the last chunks' latents, by parameter their derivatives, and the same of firsts."""
    self.o, self.chunks, self.exit_step = o, chunks, exit_step
    _, noise_key, self.score_key = jax.random.split(key, 3)
    self.keys = jax.vmap(lambda row: jax.random.fold_in(noise_key, row))(jnp.arange(batch))
    self.noise_key = noise_key
    self.texts = [np.float64(x) for x in texts(batch)]
    rolled = [self.one_chunk(n) for n in self.rollout()][-o.last :]
    join = lambda i: np.concatenate([chunk[i] for chunk in rolled], axis=-4)
    self.latents, self.derivatives, self.firsts, self.first_derivatives, self.start = (
      join(i) for i in range(5)
    )
    # What is matched: where chunks came before, its first latent is encoded anew and a constant.
    self.image, self.image_derivatives = self.latents.copy(), self.derivatives.copy()
    if o.vae is not None and chunks > o.last:
      self.image[:, 0] = VAE_PARAMS * self.image[:, 0] + chunks
      self.image_derivatives[:, :, 0] = 0

  def rollout(self):
    self.history = np.zeros((len(self.keys), 1, 1, 1, 1))
    return range(self.chunks)

  def predicted(self, x, i):
    """Clean latents that step `i` predicts, and by parameter their derivatives `[p b f y x c]`."""
    u = self.o.stream.steps[i] / 1000
    level = 5 * u / (1 + 4 * u)
    t = np.full(len(x), 1000 * level)
    features = Student.features(self.history, x, t, self.texts[0])
    features = np.stack([np.broadcast_to(f, x.shape) for f in (*features, np.zeros(x.shape))])
    derivatives = -level * features
    return x + np.tensordot(STUDENT_PARAMS, derivatives, 1), derivatives

  def one_chunk(self, number):
    o = self.o
    drawn = draw(o.stream, self.keys, jnp.full(len(self.keys), number))
    start, again = np.float64(drawn.start), np.float64(drawn.again)
    x = start
    for i in range(self.exit_step):
      x0, _ = self.predicted(x, i)
      u = o.stream.steps[i + 1] / 1000
      level = 5 * u / (1 + 4 * u)
      if i > 0 or o.renoise_first:
        x = (1 - level) * x0 + level * again[i]
    x0, derivatives = self.predicted(x, self.exit_step)
    first, first_derivatives = self.predicted(start, 0)
    kept = x0
    if o.noisy_context:
      key = jax.random.fold_in(jax.random.fold_in(self.noise_key, number), len(x0))
      kept = (1 - 0.00498008) * x0 + 0.00498008 * np.float64(jax.random.normal(key, x0.shape))
    self.history = Student.commit(None, STUDENT_PARAMS, self.history, kept)
    return x0, derivatives, first, first_derivatives, start

  def scored(self):
    """The clip noised, its noise, and its times."""
    t, noise = (np.float64(x) for x in score_draws(self.score_key, self.image))
    level = per_frame(sigma(t))
    return (1 - level) * self.image + level * noise, noise, t

  def both(self, config, params, x, t):
    context, negative = self.texts
    negative = np.broadcast_to(negative, context.shape)
    return [predict_flow(config, params, x, t, text) for text in (context, negative)]

  def clean(self, config, params, x, t, shift=None):
    """What a network sees in `x` with the text and without."""
    level = per_frame(sigma(t, shift or self.o.score_shift or 5.0))
    return [x - level * flow for flow in self.both(config, params, x, t)]

  def mask(self):
    chunk = self.o.stream.geometry.chunk
    counts = np.ones(self.image.shape, bool)
    if self.chunks > self.o.last:
      counts[:, :chunk] = False
    return counts

  def matching(self):
    """Loss, gradient by the student's parameters, and mean size of the direction."""
    o, (x, _, t) = self.o, self.scored()
    with_text, without = self.clean(CRITIC, CRITIC_PARAMS, x, t)
    fake = with_text + o.critic_guidance * (with_text - without)
    with_text, without = self.clean(TEACHER, TEACHER_PARAMS, x, t)
    base = with_text if o.guidance_form == "conditional" else without
    real = base + o.guidance * (with_text - without)
    real = np.where(per_frame(t) <= o.guided_below, real, with_text)
    direction = (fake - real) / mean(np.abs(self.image - real), (1, 2, 3, 4))
    counts = self.mask()
    gradient = [(direction * d)[counts].mean() for d in self.image_derivatives]
    return 0.5 * (direction[counts] ** 2).mean(), np.array(gradient), np.abs(direction).mean()

  def trajectory(self):
    """Where the teacher's Euler steps end."""
    o, x = self.o, self.start
    u = 1 - np.arange(o.reflow_steps + 1) / o.reflow_steps
    levels = 5 * u / (1 + 4 * u)
    stop = o.reflow_stop or o.reflow_steps
    for i in range(stop):
      t = np.full(len(x), 1000 * levels[i])
      if i + 1 == stop < o.reflow_steps:
        with_text, without = self.clean(TEACHER, TEACHER_PARAMS, x, t)
        return with_text + o.reflow_guidance * (with_text - without)
      with_text, without = self.both(TEACHER, TEACHER_PARAMS, x, t)
      guided = without + o.reflow_guidance * (with_text - without)
      x = x + (levels[i + 1] - levels[i]) * guided
    return x

  def reflow(self):
    """Loss and gradient; of the first step's predictions, which may be the latents."""
    if self.exit_step and not self.o.reflow_always:
      return np.nan, 0.0
    error, counts = self.firsts - self.trajectory(), self.mask()
    gradient = [2 * (error * d)[counts].mean() for d in self.first_derivatives]
    return (error[counts] ** 2).mean(), np.array(gradient)

  def critic(self):
    """Loss, and gradient by the critic's parameters."""
    x, noise, t = self.scored()
    features = x, mean(x, 1), per_frame(t) / 1000, per_sample(self.texts[0])
    ratio = 1.0 if self.o.score_shift is None else sigma(t, self.o.score_shift) / sigma(t)
    derivatives = [
      np.broadcast_to(CRITIC.layers * per_frame(ratio * np.ones(len(x))) * f, x.shape)
      for f in features
    ]
    error = np.tensordot(CRITIC_PARAMS, derivatives, 1) - (noise - self.image)
    return (error**2).mean(), np.array([2 * (error * d).mean() for d in derivatives])
