import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models import causal, layers, wan
from hfjax.models.presets import PRESETS
from tests.helpers import MODEL, assert_trees_close, context, random_params

PARAMS = random_params()
X = jax.random.normal(jax.random.key(0), (2, 3, 4, 6, 4))
T = jnp.array([900.25, 17.0])
TEXT = context(2)


def forward(params=PARAMS, x=X, t=T, text=TEXT, **kwargs):
  return jax.jit(lambda p, x, t, c: wan.predict_flow(MODEL, p, x, t, c, **kwargs))(
    params, x, t, text
  )


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("wan-1.3b", 1_418_996_800),
    ("hybrid-1.3b", 1_419_492_160),
    ("wan-14b", 14_288_491_584),
    ("wan-i2v-14b", 16_394_878_784),
  ],
)
def test_presets_have_the_published_number_of_parameters(name, count):
  shapes = jax.eval_shape(lambda k: wan.init_params(PRESETS[name], k), jax.random.key(0))
  assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) == count


def test_fresh_parameters_follow_the_published_initialisation():
  params = wan.init_params(PRESETS["tiny"], jax.random.key(0))
  blocks = params["blocks"]
  kernel = blocks["self_attn"]["qkv"]["kernel"]
  limit = np.sqrt(6 / 128)  # Xavier of one 64 x 64 matrix, not of the three side by side
  assert 0.98 * limit < np.abs(kernel).max() <= limit
  assert not np.array_equal(kernel[0], kernel[1])
  assert np.std(params["text"]["in"]["kernel"]) == pytest.approx(0.02, rel=0.1)
  assert np.std(blocks["modulation"]) == pytest.approx(1 / 8, rel=0.1)
  for zero in (params["head"]["projection"]["kernel"], blocks["self_attn"]["linear_proj"]["kernel"],
               blocks["ffn_in"]["bias"]):  # fmt: skip
    assert not np.any(zero)
  assert np.all(blocks["self_attn"]["norm_q"]["scale"] == 1)


def test_samples_do_not_see_each_other():
  both = forward()
  for i in range(2):
    one = forward(x=X[i : i + 1], t=T[i : i + 1], text=TEXT[i : i + 1])
    np.testing.assert_allclose(both[i], one[0], atol=2e-6)


def test_one_time_per_frame_and_one_per_sample_agree():
  per_frame = forward(t=jnp.broadcast_to(T[:, None], (2, 3)))
  np.testing.assert_allclose(per_frame, forward(), atol=2e-6)
  # And a time of its own changes a frame's flow.
  other = forward(t=jnp.broadcast_to(T[:, None], (2, 3)).at[:, 1].set(500))
  assert np.abs(other - per_frame).max() > 1e-2


def test_text_is_padded_with_zero_rows_that_count():
  padded = jnp.pad(TEXT, ((0, 0), (0, 1), (0, 0)))
  np.testing.assert_allclose(forward(text=padded), forward(), atol=1e-6)
  assert np.abs(forward(text=TEXT[:, :4]) - forward()).max() > 1e-3


def test_precomputed_text_keys_give_the_same_flow():
  kv = wan.text_keys(MODEL, PARAMS, TEXT)
  assert kv.k.shape == (2, 2, 6, 2, 16)
  for i in range(MODEL.layers):
    block = jax.tree.map(lambda x, i=i: x[i], PARAMS["blocks"]["cross_attn"])
    rows, _ = wan.TextEmbedding(MODEL, jnp.float32).apply({"params": PARAMS["text"]}, TEXT)
    cross = layers.CrossAttention(MODEL, jnp.float32)
    one = cross.apply({"params": block}, rows, method="keys_values")
    np.testing.assert_allclose(kv.k[i], one.k, atol=1e-6)


@pytest.mark.parametrize("latent", [(1, 2, 2), (2, 6, 4), (1, 4, 10)])
def test_any_latent_size_works(latent):
  x = jnp.ones((1, *latent, 4))
  out = forward(x=x, t=T[:1], text=TEXT[:1])
  assert out.shape == x.shape and bool(jnp.isfinite(out).all())


def test_recomputing_blocks_changes_no_gradient():
  def loss(params, remat):
    return (wan.predict_flow(MODEL, params, X, T, TEXT, remat=remat) ** 2).sum()

  plain, again = (jax.jit(jax.grad(lambda p, r=r: loss(p, r)))(PARAMS) for r in (False, True))
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
  assert_trees_close(plain, again, 1e-6 * scale)
  text = str(jax.make_jaxpr(jax.grad(lambda p: loss(p, True)))(PARAMS))
  assert "remat" in text or "checkpoint" in text


def test_blocks_in_one_step_of_the_loop_are_the_same_blocks():
  def loss(params, unroll):
    return (wan.predict_flow(MODEL, params, X, T, TEXT, unroll=unroll) ** 2).sum()

  once, all_ = (jax.jit(jax.value_and_grad(lambda p, n=n: loss(p, n)))(PARAMS) for n in (1, 2))
  np.testing.assert_allclose(once[0], all_[0], rtol=1e-5)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(once[1]))
  assert_trees_close(once[1], all_[1], 1e-6 * scale)
  lines = [str(jax.make_jaxpr(lambda p, n=n: loss(p, n))(PARAMS)) for n in (1, 2)]
  assert ["unroll=2" in x for x in lines] == [False, True]


def test_half_precision_compute_keeps_float32_parameters():
  flow = forward(dtype=jnp.bfloat16)
  assert flow.dtype == jnp.float32
  # bfloat16 keeps 8 bits; the flow is of order one and passes two blocks.
  np.testing.assert_allclose(flow, forward(), atol=0.1)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  np.testing.assert_allclose(forward(params=half, dtype=jnp.bfloat16), forward(), atol=0.1)
  grads = jax.jit(
    jax.grad(lambda p: wan.predict_flow(MODEL, p, X, T, TEXT, dtype=jnp.bfloat16).sum())
  )(PARAMS)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"x": X[..., :3]}, r"shape \(2, 3, 4, 6, 3\); the model takes .* 4 channels"),
    ({"x": X[0]}, "the model takes"),
    ({"x": X[:, :, :3]}, "3 rows, which the patch of 2 does not divide"),
    ({"text": TEXT[..., :11]}, r"\(2, 5, 11\); the model takes \[batch, rows, 12\]"),
    ({"text": jnp.zeros((2, 7, 12))}, "7 rows; the model takes at most 6"),
    ({"image": jnp.zeros((2, 3, 8))}, "takes no image"),
    ({"clean": X[:, :2], "plan": causal.teacher_forcing(3, 1)}, "needs equal shapes"),
    ({"t": jnp.zeros(())}, r"times have shape \(\); give one for each of 2 samples"),
    ({"t": jnp.zeros((2, 2))}, r"times have shape \(2, 2\)"),
    ({"text": context(1)}, "text context is for 1 samples and the latents are for 2"),
    ({"x": X[:, :0]}, "the model takes"),
    ({"clean": X}, "needs a plan of who sees it"),
    ({"clean_t": jnp.zeros((2, 3))}, "times of it need the clip"),
    ({"plan": causal.teacher_forcing(3, 1)}, "see"),
    ({"plan": causal.block_causal(2, 1)}, "plan covers 2 frames and the clip has 3"),
    ({"plan": causal.block_causal(4, 2)}, "in a clip of 3 frames of which 2 are planned"),
    ({"plan": causal.block_causal(3, 3), "clean": X}, "covers 3 frames and the clip has 6"),
  ],
)
def test_wrong_inputs_are_refused(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    forward(**change)


def test_an_image_model_wants_an_image():
  model = dataclasses.replace(MODEL, image_dim=8)
  params = random_params(model)
  with pytest.raises(ValueError, match=r"shape none; .* \[batch, rows, 8\]"):
    wan.predict_flow(model, params, X, T, TEXT)
  images = jax.random.normal(jax.random.key(1), (2, 2, 5, 8))
  flow = jax.jit(lambda im: wan.predict_flow(model, params, X, T, TEXT, image=im))
  assert np.abs(flow(images[0]) - flow(images[1])).max() > 1e-3
