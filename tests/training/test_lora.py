"""Low-rank adapters: made, merged, saved."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hfjax.convert import CheckpointError, checkpoint, dit
from hfjax.convert import lora as updates
from hfjax.convert.adapters import TARGETS
from hfjax.models import wan
from hfjax.training import lora
from tests.convert.helpers import CFG, HYBRID, flat, put

IMAGE = dataclasses.replace(HYBRID, linear=False, image_dim=10)
KEY = jax.random.key(0)
ALPHA, RANK = 3.0, 4
KERNELS = {name: f"blocks/{target.path}/kernel" for name, target in TARGETS.items()}


def shapes_of(config):
  return jax.eval_shape(lambda: wan.init_params(config, KEY))


def drawn(tree, seed=0):
  """A tree of the same shapes without zeros, float32."""
  r = np.random.default_rng(seed)
  return jax.tree.map(lambda x: r.normal(size=x.shape).astype(np.float32), tree)


SHAPES = shapes_of(HYBRID)
PARAMS = drawn(SHAPES)


def adapters_of(targets, shapes=SHAPES, seed=1):
  return drawn(lora.init(shapes, KEY, RANK, targets), seed)


def test_new_adapters_change_nothing():
  adapters = lora.init(SHAPES, KEY, RANK, "all")
  assert {x.dtype for x in jax.tree.leaves(adapters)} == {np.dtype(np.float32)}
  assert not any(np.any(pair["up"]) for pair in adapters.values())
  merged = lora.merge(PARAMS, adapters, ALPHA)
  for name, x in flat(merged).items():
    np.testing.assert_array_equal(x, flat(PARAMS)[name])


@pytest.mark.parametrize(("name", "fan"), [("q", 32), ("o", 32), ("linear_proj", 16),
                                           ("ffn_out", 48)])  # fmt: skip
def test_the_spread_of_new_adapters_is_that_of_pefts(name, fan):
  down = lora.init(SHAPES, KEY, 256, name)[name]["down"]
  assert 0.98 * fan**-0.5 < np.abs(down).max() <= fan**-0.5
  np.testing.assert_allclose(np.var(down), 1 / (3 * fan), rtol=0.05)


def test_targets_are_drawn_independently_of_each_other_and_differ():
  one, both = lora.init(SHAPES, KEY, RANK, "k"), lora.init(SHAPES, KEY, RANK, ("q", "k"))
  np.testing.assert_array_equal(one["k"]["down"], both["k"]["down"])
  assert np.any(both["q"]["down"] != both["k"]["down"])
  assert np.any(one["k"]["down"][0] != one["k"]["down"][1])


@pytest.mark.parametrize(
  ("config", "targets", "want"),
  [
    (HYBRID, "self", "q k v o"),
    (HYBRID, "cross", "cross_q cross_k cross_v cross_o"),
    (IMAGE, "cross", "cross_q cross_k cross_v cross_o cross_k_img cross_v_img"),
    (HYBRID, ("ffn", "v", "ffn_in"), "v ffn_in ffn_out"),
    (IMAGE, ["all"], "q k v o cross_q cross_k cross_v cross_o cross_k_img cross_v_img ffn_in "
     "ffn_out"),
    (HYBRID, "all", "q k v o linear_proj cross_q cross_k cross_v cross_o ffn_in ffn_out"),
  ],
)  # fmt: skip
def test_names_of_targets(config, targets, want):
  assert [*lora.init(shapes_of(config), KEY, 1, targets)] == want.split()


@pytest.mark.parametrize(
  ("targets", "sentence"),
  [
    (("q", "wo"), "Adapters of 'wo' were asked for, and there is no such layer; choose of q, k, v"),
    ("cross_k_img", "Adapters of 'cross_k_img' were asked for, and this model has no such layer"),
    ((), "Adapters of no layer were asked for; choose of q, k, v, .* or self, cross, ffn, all."),
  ],
)
def test_unknown_targets_are_named_with_the_choices(targets, sentence):
  with pytest.raises(ValueError, match=sentence):
    lora.init(SHAPES, KEY, RANK, targets)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None])
def test_ranks_that_can_be_none(rank):
  with pytest.raises(ValueError, match=f"The rank of adapters is {rank!r}"):
    lora.init(SHAPES, KEY, rank, "q")


@pytest.mark.parametrize("targets", [*lora.GROUPS, ("q", "v"), ("k",), ("cross_v",), ("o", "q")])
def test_a_saved_file_merged_by_the_converter_gives_the_same_weights(tmp_path, targets):
  adapters = adapters_of(targets)
  lora.save(tmp_path / "l.safetensors", HYBRID, adapters, ALPHA)
  parts = checkpoint.open_parts(put(tmp_path / "wan", dit.to_original(HYBRID, PARAMS), CFG))
  part = updates.merge(parts, tmp_path / "l.safetensors")[0]
  want = {name: tensor.read() for name, tensor in part.tensors.items()}
  got = dit.to_original(HYBRID, lora.merge(PARAMS, adapters, ALPHA))
  before = dit.to_original(HYBRID, PARAMS)
  changed = {f"blocks.{i}.{TARGETS[n].module}.weight" for n in adapters for i in range(2)}
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, rtol=0, atol=2e-5 if name in changed else 0)
    assert (np.abs(got[name] - before[name]).max() > 0.1) == (name in changed)


def test_files_are_as_public_tools_write_them(tmp_path):
  lora.save(tmp_path / "l.safetensors", HYBRID, adapters_of(("q", "ffn_in")), ALPHA)
  assert [p.name for p in tmp_path.iterdir()] == ["l.safetensors"]
  held = load_file(tmp_path / "l.safetensors")
  assert {name: x.shape for name, x in held.items()} == {
    f"diffusion_model.blocks.{i}.{module}.{end}": shape
    for i in range(2)
    for module, out in (("self_attn.q", 32), ("ffn.0", 48))
    for end, shape in (("lora_A.weight", (4, 32)), ("lora_B.weight", (out, 4)), ("alpha", ()))
  }
  assert all(x == ALPHA for name, x in held.items() if name.endswith("alpha"))


@pytest.mark.parametrize("config", [HYBRID, IMAGE])
def test_what_is_saved_is_loaded(tmp_path, config):
  adapters = adapters_of("all", shapes_of(config))
  lora.save(tmp_path / "l.safetensors", config, adapters, ALPHA)
  loaded, alpha = lora.load(tmp_path / "l.safetensors", config)
  assert alpha == ALPHA and loaded.keys() == adapters.keys()
  for name, x in flat(adapters).items():
    np.testing.assert_array_equal(flat(loaded)[name], x)


def renamed(old, new):
  return lambda held: {name.replace(old, new): x for name, x in held.items()}


def without(end):
  return lambda held: {name: x for name, x in held.items() if not name.endswith(end)}


def test_files_without_alpha_or_prefix_are_of_strength_one(tmp_path):
  adapters = adapters_of(("q", "o"))
  lora.save(tmp_path / "l.safetensors", HYBRID, adapters, ALPHA)
  held = renamed("diffusion_model.", "")(without("alpha")(load_file(tmp_path / "l.safetensors")))
  save_file(held, tmp_path / "l.safetensors")
  loaded, alpha = lora.load(tmp_path / "l.safetensors", HYBRID)
  assert alpha == RANK
  np.testing.assert_array_equal(loaded["o"]["down"], adapters["o"]["down"])


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (renamed("blocks.1.", "blocks.2."), "holds other things than adapters .*blocks.2.self_attn"),
    (renamed("self_attn.q", "self_attn.norm_q"), "holds other things than adapters"),
    (renamed("diffusion_model", "model"), "holds other things than adapters"),
    (lambda held: {}, r"holds other things than adapters of this model's blocks \(nothing\)"),
    (without("blocks.0.self_attn.q.lora_A.weight"), "do not fit its weight"),
    (lambda held: {n: x.T.copy() for n, x in held.items()}, "do not fit its weight"),
    (without("blocks.1.self_attn.q.alpha"), "several ranks and alphas"),
    (lambda held: {n: x for n, x in held.items() if "blocks.1.self_attn.q" not in n},
     "no adapters of blocks.1.self_attn.q"),
  ],
)  # fmt: skip
def test_files_that_are_not_of_this_model(tmp_path, change, sentence):
  lora.save(tmp_path / "l.safetensors", HYBRID, adapters_of(("q", "o")), ALPHA)
  held = load_file(tmp_path / "l.safetensors")
  save_file({n: np.ascontiguousarray(x) for n, x in change(held).items()}, tmp_path / "m")
  with pytest.raises(CheckpointError, match=sentence):
    lora.load(tmp_path / "m", HYBRID)


def test_files_that_cannot_be_read_or_written(tmp_path):
  adapters = adapters_of("q")
  with pytest.raises(CheckpointError, match="The adapters cannot be written to"):
    lora.save(tmp_path / "none" / "l.safetensors", HYBRID, adapters, ALPHA)
  lora.save(tmp_path / "l.safetensors", HYBRID, adapters, ALPHA)
  data = (tmp_path / "l.safetensors").read_bytes()
  (tmp_path / "l.safetensors").write_bytes(data[:-9])
  for name in ("l.safetensors", "none.safetensors"):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
      lora.load(tmp_path / name, HYBRID)


def test_gradients_are_those_of_the_product_and_flow_to_adapters_only():
  adapters, weight = adapters_of(("v", "o", "cross_k")), drawn(SHAPES, 2)

  def loss(params, adapters):
    merged = lora.merge(params, adapters, ALPHA)
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(weight)))

  to_params, to_adapters = jax.jit(jax.grad(loss, argnums=(0, 1)))(PARAMS, adapters)
  assert not any(np.any(x) for x in jax.tree.leaves(to_params))
  scale, held = ALPHA / RANK, flat(weight)
  for name, pair in adapters.items():
    g = held[KERNELS[name]]
    if TARGETS[name].part is not None:
      g = g[:, :, TARGETS[name].part]
    down, up = ("lhdr", "lrm") if name == "o" else ("lmr", "lrhd")
    both = "lhdm" if name == "o" else "lmhd"
    want = {
      "down": scale * np.einsum(f"{both},{up}->{down}", g, pair["up"]),
      "up": scale * np.einsum(f"{both},{down}->{up}", g, pair["down"]),
    }
    for key, x in want.items():
      np.testing.assert_allclose(to_adapters[name][key], x, atol=1e-4)


def test_the_sum_is_taken_in_float32_and_dtypes_stay():
  adapters = adapters_of(("q", "ffn_in"))
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
  got = flat(lora.merge(half, adapters, ALPHA))
  assert {x.dtype for x in got.values()} == {jnp.dtype(jnp.bfloat16)}
  wide = flat(lora.merge(jax.tree.map(lambda x: x.astype(np.float32), half), adapters, ALPHA))
  for name, x in wide.items():
    np.testing.assert_array_equal(got[name], x.astype(jnp.bfloat16))


@pytest.mark.parametrize("axis", [1, -1])
def test_sharded_weights_under_jit(axis):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))

  def split(x):
    axes: list[str | None] = [None] * x.ndim
    if x.ndim > 1 and x.shape[axis] % 2 == 0:
      axes[axis] = "fsdp"
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.device_put(x, where)

  params, adapters = (jax.tree.map(split, x) for x in (PARAMS, adapters_of("all")))
  assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params["blocks"])) > 10
  got, want = jax.jit(lora.merge)(params, adapters, ALPHA), lora.merge(PARAMS, adapters, ALPHA)
  for name, x in flat(got).items():
    np.testing.assert_allclose(x, flat(want)[name], rtol=0, atol=1e-5)


def test_parameters_given_are_left_as_they_are():
  leaves, copies = jax.tree.leaves(PARAMS), [x.copy() for x in jax.tree.leaves(PARAMS)]
  lora.merge(PARAMS, adapters_of("all"), ALPHA)
  for now, before, copy in zip(jax.tree.leaves(PARAMS), leaves, copies, strict=True):
    assert now is before and np.array_equal(now, copy)


def test_adapters_of_another_model_are_refused():
  image = adapters_of("cross_k_img", shapes_of(IMAGE))
  with pytest.raises(ValueError, match="adapters of 'cross_k_img', and the model has no such"):
    lora.merge(PARAMS, image, ALPHA)
  wider = adapters_of("ffn_in", shapes_of(dataclasses.replace(HYBRID, ffn_dim=64)))
  with pytest.raises(ValueError, match="adapters of ffn_in have shapes .* the model's layer takes"):
    lora.merge(PARAMS, wider, ALPHA)


def test_one_step_of_training_goes_downhill():
  config = dataclasses.replace(HYBRID, text_len=4)
  params = jax.tree.map(lambda x: 0.2 * x, PARAMS)
  x = drawn(jax.ShapeDtypeStruct((1, 1, 2, 2, config.in_dim), np.float32), 3)
  text = drawn(jax.ShapeDtypeStruct((1, 2, config.text_dim), np.float32), 4)

  def loss(adapters):
    merged = lora.merge(params, adapters, ALPHA)
    return jnp.mean((wan.predict_flow(config, merged, x, jnp.full((1,), 500.0), text) - x) ** 2)

  adapters = lora.init(SHAPES, KEY, RANK, "self")
  step = jax.jit(jax.value_and_grad(loss))
  before, grads = step(adapters)
  after, _ = step(jax.tree.map(lambda a, g: a - 0.1 * g, adapters, grads))
  assert after < before
