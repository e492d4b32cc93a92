"""The Wan diffusion transformer (spec sections 2 and 3).

One parameter layout and one block serve the bidirectional teacher, the critic, causal training and
the streaming student. They differ in the attention strategy and in what the layers are given.

Latents are `[b f y x c]`: batch, frames, rows, columns, channels. Times are `[b]`, one for the
sample, or `[b f]`, one per frame.
"""

import functools
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax.models import checks, layers, rope
from hfjax.models.attention import Attend, ClipAttention, Span
from hfjax.models.presets import WanConfig

Params = Any


class Wan(nn.Module):
  """The network; see `predict_flow` for its use on whole clips.

  collect: also return every layer's keys and values, stacked over layers.
  remat: recompute each block in the backward pass instead of keeping its activations.
  unroll: blocks that a step of the loop over them holds; more take longer to compile, and small
    ones are faster if all stand in one program.
  """

  config: WanConfig
  attend: Attend
  dtype: Any = jnp.float32
  collect: bool = False
  remat: bool = False
  unroll: int = 1

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b f y x c"],
    t: Float[Array, "b"] | Float[Array, "b f"],
    shared: Any,
    *,
    past: Any = None,
    text: layers.TextKV | None = None,
    context: Float[Array, "b t w"] | None = None,
    image: Float[Array, "b i v"] | None = None,
    drop: int = 0,
  ) -> tuple[Float[Array, "b f y x c"], layers.LayerKV | None]:
    """Flow of the latents, float32, and keys and values if `collect`.

    shared, past: inputs of the attention strategy, common to all layers and per layer.
    text: cross-attention keys and values from `text_keys`; or context: text rows `[b t w]` with
      t at most text_len, zero-padded here. image: image embedding, for image-to-video models.
    drop: leading frames left out of the output.
    """
    c = self.config
    f, rows = x.shape[1], x.shape[2] // c.patch[0]
    tokens = rows * (x.shape[3] // c.patch[1])
    x = einops.rearrange(x, "b f (y p) (x q) c -> b (f y x) (p q c)", p=c.patch[0], q=c.patch[1])
    fans = (x.shape[-1], c.dim)
    x = layers.linear(c.dim, fans, self.dtype, "patch_embedding")(x.astype(self.dtype))

    e, modulation = TimeEmbedding(c, name="time")(t)
    inputs = layers.SharedInputs(modulation, shared)
    if text is None:
      if context is None:
        raise ValueError("The network got neither text keys nor a text context; give one of them.")
      rows_text, rows_image = TextEmbedding(c, self.dtype, name="text")(context, image)
      inputs = inputs._replace(text=rows_text, image=rows_image)

    block = layers.Block
    if self.remat:
      block = nn.remat(block, prevent_cse=False, policy=_keep_attention)
    stack = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=c.layers,
      unroll=self.unroll,
    )
    x, kv = stack(c, self.attend, self.dtype, self.collect, name="blocks")(
      x, layers.LayerInputs(past, text), inputs
    )

    if drop:
      x, f = x[:, drop * tokens :], f - drop
      e = e[:, drop:] if e.shape[1] > 1 else e
    y = Head(c, self.dtype, name="head")(x, e)
    flow = einops.rearrange(
      y, "b (f y x) (p q c) -> b f (y p) (x q) c", f=f, y=rows, p=c.patch[0], q=c.patch[1]
    )
    return flow.astype(jnp.float32), kv


def _keep_attention(primitive, *_, **parameters) -> bool:
  """What is not computed again in backward passes: cuDNN's attention, the dearest for its size."""
  return "dot_product_attention" in primitive.name


class TimeEmbedding(nn.Module):
  """Sinusoids of the time through two layers, and the blocks' modulation from them; float32."""

  config: WanConfig

  @nn.compact
  def __call__(
    self, t: Float[Array, "b"] | Float[Array, "b f"]
  ) -> tuple[Float[Array, "b g m"], Float[Array, "b g six m"]]:
    c = self.config
    t = t if t.ndim == 2 else t[:, None]
    small = nn.initializers.normal(0.02)
    make = lambda features, fan, name, init=None: layers.linear(
      features, (fan, c.dim), jnp.float32, name, init=init
    )
    e = make(c.dim, c.freq_dim, "in", small)(rope.timestep_embedding(t, c.freq_dim))
    e = make(c.dim, c.dim, "out", small)(nn.silu(e))
    modulation = layers.linear((6, c.dim), (c.dim, 6 * c.dim), jnp.float32, "projection")(
      nn.silu(e)
    )
    return e, modulation


class TextEmbedding(nn.Module):
  """Text rows, zero-padded to text_len (padding is attended to), and image rows, at model width."""

  config: WanConfig
  dtype: Any

  @nn.compact
  def __call__(
    self, context: Float[Array, "b t w"], image: Float[Array, "b i v"] | None = None
  ) -> tuple[Float[Array, "b t m"], Float[Array, "b i m"] | None]:
    c = self.config
    small = nn.initializers.normal(0.02)
    y = jnp.pad(context, ((0, 0), (0, c.text_len - context.shape[1]), (0, 0))).astype(self.dtype)
    y = layers.linear(c.dim, (c.text_dim, c.dim), self.dtype, "in", init=small)(y)
    y = nn.gelu(y, approximate=True)
    y = layers.linear(c.dim, (c.dim, c.dim), self.dtype, "out", init=small)(y)
    if not c.image_dim:
      return y, None
    z = layers.layer_norm(1e-5, affine=True, name="image_norm_in")(image).astype(self.dtype)
    z = layers.linear(c.image_dim, (c.image_dim, c.image_dim), self.dtype, "image_in")(z)
    z = nn.gelu(z, approximate=False)
    z = layers.linear(c.dim, (c.image_dim, c.dim), self.dtype, "image_out")(z)
    return y, layers.layer_norm(1e-5, affine=True, name="image_norm_out")(z).astype(self.dtype)


class Head(nn.Module):
  """Modulated norm and projection of tokens to patches of the flow."""

  config: WanConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b s m"], e: Float[Array, "b g m"]) -> Float[Array, "b s o"]:
    c = self.config
    table = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (2, c.dim))
    shift, scale = (e + table[i].astype(jnp.float32) for i in range(2))
    y = layers.modulate(layers.layer_norm(c.eps)(x), shift, scale, self.dtype)
    patch = c.patch[0] * c.patch[1] * c.out_dim
    return layers.linear(
      patch, (c.dim, patch), self.dtype, "projection", init=nn.initializers.zeros
    )(y)


def init_params(config: WanConfig, key: Array) -> Params:
  """Freshly initialised parameters, float32 (spec section 2, Initialisation)."""
  p = config.patch
  x = jnp.zeros((1, 1, *p, config.in_dim))
  context = jnp.zeros((1, 1, config.text_dim))
  image = jnp.zeros((1, 1, config.image_dim)) if config.image_dim else None
  model = Wan(config, ClipAttention())
  shared = rope.grid_rotation(jnp.zeros((1, 1), jnp.int32), (1, 1), config.head_dim)
  return model.init(key, x, jnp.zeros((1,)), shared, context=context, image=image)["params"]


def text_keys(
  config: WanConfig,
  params: Params,
  context: Float[Array, "b t w"],
  dtype=jnp.float32,
  image: Float[Array, "b i v"] | None = None,
) -> layers.TextKV:
  """Cross-attention keys and values of a prompt for every layer, `[l b t h d]`.

  Computed once per prompt for sampling. Raises ValueError on a wrong text width or length.
  """
  check_params(config, params)
  check_context(config, context)
  check_image(config, image)
  return _text_keys(config, params["text"], params["blocks"]["cross_attn"], context, image, dtype)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _text_keys(config, embedding, cross_attn, context, image, dtype):
  embed = TextEmbedding(config, dtype)
  text, picture = embed.apply({"params": embedding}, context, image)
  cross = layers.CrossAttention(config, dtype)

  def one(p):
    return cross.apply({"params": p}, text, picture, method="keys_values")

  return jax.lax.map(one, cross_attn)


def predict_flow(
  config: WanConfig,
  params: Params,
  x: Float[Array, "b f y x c"],
  t: Float[Array, "b"] | Float[Array, "b f"],
  context: Float[Array, "b t w"],
  *,
  plan: tuple[tuple[Span, tuple[Span, ...]], ...] | None = None,
  clean: Float[Array, "b f y x c"] | None = None,
  clean_t: Float[Array, "b f"] | None = None,
  image: Float[Array, "b i v"] | None = None,
  dtype=jnp.float32,
  remat: bool = False,
  unroll: int = 1,
) -> Float[Array, "b f y x c"]:
  """Flow of whole clips: bidirectional by default, causal with a plan of `models.causal`.

  t: `[b]`, or `[b f]` for causal use.
  clean: clean clip put before the noisy one for teacher forcing, with times `clean_t` (0 by
    default); `plan` then covers both halves.
  image: image embedding, for image-to-video models.

  Raises ValueError on sizes that do not fit the model.
  """
  check_params(config, params)
  check_latents(config, x)
  check_context(config, context)
  check_image(config, image)
  b, f = x.shape[:2]
  t = checks.as_times(t, b, f)
  checks.check_batch("text context", context, b)
  positions = jnp.broadcast_to(jnp.arange(f)[None], (1, f))
  grid = (x.shape[2] // config.patch[0], x.shape[3] // config.patch[1])
  drop = 0
  if (clean is not None and plan is None) or (clean_t is not None and clean is None):
    raise ValueError(
      "A clean clip needs a plan of who sees it (models.causal.teacher_forcing), and times of it "
      "need the clip; give both."
    )
  if clean is not None:
    if clean.shape != x.shape:
      raise ValueError(
        f"The clean clip has shape {clean.shape} and the noisy one {x.shape}; teacher "
        "forcing needs equal shapes."
      )
    x = jnp.concatenate([clean.astype(x.dtype), x], axis=1)
    t = t if t.ndim == 2 else jnp.broadcast_to(t[:, None], (b, f))
    before = jnp.zeros((b, f)) if clean_t is None else checks.as_times(clean_t, b, f)
    t = jnp.concatenate([jnp.broadcast_to(before.reshape(b, -1), (b, f)), t], axis=1)
    positions = jnp.concatenate([positions, positions], axis=1)
    drop = f
  if plan is not None:
    check_plan(plan, positions.shape[1])
  shared = rope.grid_rotation(positions, grid, config.head_dim)
  attend = ClipAttention() if plan is None else ClipAttention(positions.shape[1], plan)
  model = Wan(config, attend, dtype, remat=remat, unroll=unroll)
  return model.apply({"params": params}, x, t, shared, context=context, image=image, drop=drop)[0]


@functools.cache
def _param_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
  shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
  return {"/".join(k.key for k in path): x.shape for path, x in paths}


def check_params(config: WanConfig, params: Params):
  """Raises ValueError unless `params` are the architecture's."""
  checks.check_params(params, _param_shapes(config))


def check_plan(plan: tuple[tuple[Span, tuple[Span, ...]], ...], frames: int):
  """Raises ValueError unless a plan's queries cover the clip in order and its keys lie in it."""
  at = 0
  for (start, stop), keys in plan:
    inside = keys and all(0 <= a < b <= frames for a, b in keys)
    if start != at or stop <= start or not inside:
      raise ValueError(
        f"The plan lets frames {start} to {stop} see {keys}, in a clip of {frames} frames of which "
        f"{at} are planned; make it for this clip (models.causal)."
      )
    at = stop
  if at != frames:
    raise ValueError(
      f"The plan covers {at} frames and the clip has {frames}, clean ones included; make it for "
      "this clip (models.causal)."
    )


def check_latents(config: WanConfig, x: Array):
  """Raises ValueError unless `x` is `[b f y x c]` with the model's channels and a fitting grid."""
  if x.ndim != 5 or x.shape[-1] != config.in_dim or not x.shape[0] * x.shape[1]:
    raise ValueError(
      f"Latents have shape {tuple(x.shape)}; the model takes [batch, frames, rows, "
      f"columns, channels] with {config.in_dim} channels."
    )
  checks.check_grid(x.shape[2], x.shape[3], config.patch)


def check_image(config: WanConfig, image: Array | None):
  """Raises ValueError unless an image embedding `[b i v]` is there if the model takes one."""
  if not config.image_dim:
    if image is not None:
      raise ValueError("This model takes no image embedding; leave it out.")
  elif image is None or image.ndim != 3 or image.shape[-1] != config.image_dim:
    raise ValueError(
      f"The image embedding has shape {'none' if image is None else tuple(image.shape)}; this "
      f"image-to-video model takes [batch, rows, {config.image_dim}]."
    )


def pad_text(config: WanConfig, context: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
  """Text of full length, so that prompts of any length share one compilation.

  Raises ValueError on a wrong text width or length.
  """
  context = jnp.asarray(context)
  check_context(config, context)
  return jnp.pad(context, ((0, 0), (0, config.text_len - context.shape[1]), (0, 0)))


def check_context(config: WanConfig, context: Array):
  """Raises ValueError unless `context` is `[b t w]` of the model's text width and length."""
  if context.ndim != 3 or context.shape[-1] != config.text_dim:
    raise ValueError(
      f"The text context has shape {tuple(context.shape)}; the model takes [batch, "
      f"rows, {config.text_dim}]. Use the text encoder the model was trained with."
    )
  if context.shape[1] > config.text_len:
    raise ValueError(
      f"The text context has {context.shape[1]} rows; the model takes at most "
      f"{config.text_len}. Truncate the prompt."
    )
