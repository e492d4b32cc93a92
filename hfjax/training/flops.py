"""Floating-point operations that models need, a multiplication and an addition being two.

What is computed again to save memory does not count, nor do norms, softmax and the autoencoder.
"""

from hfjax.distill.objectives import Distillation
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig


def forward(config: WanConfig, queries: int, keys: float, text: bool = True) -> float:
  """Of one forward of one sample.

  queries: its tokens. keys: tokens that each of them attends to. text: whether keys and values of
  the text are computed as well.
  """
  c = config
  patch = c.patch[0] * c.patch[1]
  per_token = 2 * c.dim * (4 * c.dim + 2 * c.dim + 2 * c.ffn_dim)  # self, cross and feed-forward
  attention = 4 * queries * (keys + c.text_len) * c.dim
  ends = 2 * queries * patch * (c.in_dim + c.out_dim) * c.dim
  total = c.layers * (queries * per_token + attention) + ends
  if text:
    rows = 2 * c.text_len * c.dim
    total += rows * (c.text_dim + c.dim) + c.layers * rows * 2 * c.dim
  return float(total)


def keys_of_chunk(geometry: Geometry, number: int) -> float:
  """Tokens that a token of chunk `number` attends to, past and current."""
  g = geometry
  frames = min(number * g.chunk, g.past) + g.chunk
  return frames * g.tokens * (g.ratio if g.sparse else 1.0)


def rollout(objective: Distillation, chunks: int, exit_step: int) -> float:
  """Of one sample's rollout, without what gradients take."""
  c, g = objective.stream.model, objective.stream.geometry
  tokens = g.chunk * g.tokens
  each = (forward(c, tokens, keys_of_chunk(g, i), text=False) for i in range(chunks))
  return (exit_step + 2) * sum(each)  # noised again, taken, committed


def follow(stream: StreamConfig, chunks: int) -> float:
  """Of one sample's regression along given chunks: each one's forward, backward and commit."""
  m, g = stream.model, stream.geometry
  tokens, keys = g.chunk * g.tokens, [keys_of_chunk(g, i) for i in range(chunks)]
  return sum(3 * forward(m, tokens, k) + forward(m, tokens, k, text=False) for k in keys)


def critic_step(objective: Distillation, chunks: int, exit_step: int) -> float:
  """Of one sample's critic update: a rollout, and a forward and a backward of the critic."""
  tokens = objective.last * objective.stream.geometry.chunk * objective.stream.geometry.tokens
  return rollout(objective, chunks, exit_step) + 3 * forward(objective.critic, tokens, tokens)


def generator_step(objective: Distillation, chunks: int, exit_step: int) -> float:
  """Of one sample's generator update: a rollout with gradients, the critic and the teacher."""
  o, g = objective, objective.stream.geometry
  tokens = o.last * g.chunk * g.tokens
  chunk = g.chunk * g.tokens
  last = range(chunks - o.last, chunks)
  # A backward for each forward that carries gradients, which computes keys of the text anew.
  m, gradients = o.stream.model, 0.0
  for keys in (keys_of_chunk(g, i) for i in last):
    with_text = forward(m, chunk, keys)
    gradients += 3 * with_text - forward(m, chunk, keys, text=False)
  total = rollout(o, chunks, exit_step) + gradients
  texts = 2 if o.critic_guidance else 1
  teacher = 2 * forward(o.teacher, tokens, tokens)
  total += texts * forward(o.critic, tokens, tokens) + teacher
  if o.reflow_weight and (o.reflow_always or exit_step == 0):
    total += teacher * (o.reflow_steps if o.reflow_stop is None else o.reflow_stop)
    if o.reflow_always and exit_step:
      total += gradients  # of the first step
  return total
