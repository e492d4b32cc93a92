"""Low-rank updates."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hfjax.convert import CheckpointError, checkpoint, lora
from tests.convert.helpers import TENSORS, convert, put, refused, same


@pytest.mark.parametrize("style", ["original", "diffusers", "kohya"])
def test_low_rank_updates_are_merged(tmp_path, style):
  r = np.random.default_rng(0)
  up, down = (r.normal(size=s).astype(np.float32) for s in ((32, 4), (4, 32)))
  name = {
    "original": "diffusion_model.blocks.1.self_attn.q.{}",
    "diffusers": "transformer.blocks.1.attn1.to_q.{}",
    "kohya": "lora_unet_blocks_1_self_attn_q.{}",
  }[style]
  ends = ("lora_A.weight", "lora_B.weight") if style == "diffusers" else (
    "lora_down.weight", "lora_up.weight")  # fmt: skip
  update = {name.format(ends[0]): down, name.format(ends[1]): up}
  scale = 0.5
  if style != "diffusers":
    update[name.format("alpha")] = np.array(2.0, np.float32)
    scale *= 2 / 4
  save_file(update, tmp_path / "lora.safetensors")
  put(tmp_path / "wan")
  args = ("--lora", f"{tmp_path / 'lora.safetensors'}@0.5", "--to", "original")
  assert convert(tmp_path / "wan", tmp_path / "merged", *args) == 0
  merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
  key = "blocks.1.self_attn.q.weight"
  np.testing.assert_allclose(merged[key], TENSORS[key] + scale * (up @ down), atol=1e-6)
  same(
    {k: v for k, v in merged.items() if k != key}, {k: v for k, v in TENSORS.items() if k != key}
  )


Q = "diffusion_model.blocks.1.self_attn.q"
LOW = {f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (32, 4)}


@pytest.mark.parametrize(
  ("update", "sentence"),
  [
    ({"blocks.0.other.lora_A.weight": (4, 32)}, "1 tensors that update no weight"),
    ({"blocks.0.ffn.0.lora_A.weight": (4, 32), "blocks.0.ffn.0.lora_B.weight": (32, 4)},
     r"ffn.0.weight of shape \[48, 32\] with down \[4, 32\], up \[32, 4\], which does not fit"),
    ({"blocks.0.ffn.0.lora_A.weight": (4, 32)}, "does not fit"),
    ({}, "update no weight of this transformer: nothing"),
    ({f"{Q}.diff": (32, 32), f"{Q}.alpha": ()}, "does not fit"),
    ({f"{Q}.diff": (32, 32), **LOW}, "does not fit"),
    ({f"{Q}.diff": (32, 31)}, "does not fit"),
    ({**LOW, f"{Q}.alpha": (3,)}, "does not fit"),
    ({**LOW, f"{Q}.alpha": (0,)}, "does not fit"),
    ({f"{Q}.lora_A.weight": (0, 32), f"{Q}.lora_B.weight": (32, 0)}, "does not fit"),
    ({**LOW, "transformer.blocks.1.attn1.to_q.lora_A.weight": (4, 32)}, "updates weights twice"),
  ],
)  # fmt: skip
def test_updates_that_do_not_fit_are_refused(tmp_path, update, sentence):
  save_file({k: np.zeros(s, np.float32) for k, s in update.items()}, tmp_path / "l.safetensors")
  parts = checkpoint.open_parts(put(tmp_path / "wan"))
  with pytest.raises(CheckpointError, match=sentence):
    lora.merge(parts, tmp_path / "l.safetensors")


@pytest.mark.parametrize(
  ("names", "sentence"),
  [
    ([f"{Q}.dora_scale"], "is a DoRA"),
    ([f"{Q}.lora_magnitude_vector.weight"], "is a DoRA"),
    ([f"{Q}.lora_magnitude_vector"], "is a DoRA"),
    (["lora_unet_blocks_1_self_attn_q.hada_w1_a"], "is a LoHa"),
    ([f"{Q}.lokr_w1"], "is a LoKr"),
    ([f"{Q}.oft_blocks"], "is an OFT"),
    ([f"{Q}.lora_B.bias"], "with biases of its own"),
    ([f"{Q}.lora_B.default.bias"], "with biases of its own"),
    (["diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight"], "is of an image-to-video model"),
    (["transformer.blocks.0.attn2.add_v_proj.lora_A.weight"], "is of an image-to-video model"),
    (["lora_unet_blocks_0_cross_attn_v_img.lora_down.weight"], "is of an image-to-video model"),
    (["diffusion_model.img_emb.proj.1.lora_A.weight"], "is of an image-to-video model"),
    (["transformer.condition_embedder.image_embedder.ff.net.0.proj.lora_A.weight"], "is of an ima"),
  ],
)  # fmt: skip
def test_updates_of_other_kinds_are_named(tmp_path, names, sentence):
  with pytest.raises(CheckpointError, match=rf"{sentence}.* 1 of its tensors fit no weight: "):
    merged(tmp_path, {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP,
                      **{n: np.ones((4, 32), np.float32) for n in names}})  # fmt: skip


def test_whole_differences_are_added(tmp_path):
  put(tmp_path / "wan")
  update = {f"{Q}.diff": np.ones((32, 32), np.float32), f"{Q}.diff_b": np.ones(32, np.float32)}
  save_file(update, tmp_path / "l.safetensors")
  part = lora.merge(checkpoint.open_parts(tmp_path / "wan"), tmp_path / "l.safetensors", 2.0)[0]
  for name in ("weight", "bias"):
    key = f"blocks.1.self_attn.q.{name}"
    np.testing.assert_array_equal(part.tensors[key].read(), TENSORS[key] + 2)


@pytest.mark.parametrize(("value", "strength"), [(np.nan, ""), (1.0, "@1e39")])
def test_an_update_that_spoils_weights_is_blamed(tmp_path, capsys, value, strength):
  put(tmp_path / "wan")
  save_file({f"{Q}.diff": np.full((32, 32), value, np.float32)}, tmp_path / "l.safetensors")
  args = ("--lora", f"{tmp_path / 'l.safetensors'}{strength}")
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours", *args)
  assert "l.safetensors at strength" in error and "1024 numbers of blocks.1.self_attn.q" in error


UP, DOWN = (np.random.default_rng(1).normal(size=s).astype(np.float32) for s in ((32, 4), (4, 32)))


def merged(tmp_path, update, name="l.safetensors", **kwargs):
  """Tensors after an update."""
  put(tmp_path / "wan")
  save_file(update, tmp_path / name, **kwargs)
  part = lora.merge(checkpoint.open_parts(tmp_path / "wan"), tmp_path / name)[0]
  return {k: t.read() for k, t in part.tensors.items()}


def metadata(**settings):
  held = {f"transformer.{k}": v for k, v in settings.items()}
  return {"format": "pt", "lora_adapter_metadata": json.dumps(held)}


@pytest.mark.parametrize(
  ("settings", "scale"),
  [({"lora_alpha": 8}, 2), ({"lora_alpha": 8, "use_rslora": True}, 4), ({"r": 4}, 1)],
)
def test_alpha_of_the_metadata_counts(tmp_path, settings, scale):
  got = merged(tmp_path, {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP},
               metadata=metadata(**settings))["blocks.1.self_attn.q.weight"]  # fmt: skip
  want = TENSORS["blocks.1.self_attn.q.weight"] + scale * (UP @ DOWN)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_alpha_of_an_adapters_configuration_counts(tmp_path):
  (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
  update = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}
  want = TENSORS["blocks.1.self_attn.q.weight"]
  for name, scale in (("adapter_model.safetensors", 2), ("other.safetensors", 1)):
    got = merged(tmp_path, update, name)["blocks.1.self_attn.q.weight"]
    np.testing.assert_allclose(got, want + scale * (UP @ DOWN), atol=1e-5)


@pytest.mark.parametrize(
  "settings", [{"lora_alpha": "much"}, {"lora_alpha": 8, "alpha_pattern": {"q": 2}}]
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, settings):
  update = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}
  with pytest.raises(CheckpointError, match="settings that cannot be followed"):
    merged(tmp_path, update, metadata=metadata(**settings))


@pytest.mark.parametrize(
  "name",
  ["transformer.blocks.1.attn1.to_q.lora.{}.weight", "pipe.dit.blocks.1.self_attn.q.lora_{}.weight",
   "lora_transformer_blocks_1_attn1_to_q.lora_{}.weight",
   "lora_unet__blocks_1_self_attn_q.lora_{}.weight"],
)  # fmt: skip
def test_names_of_more_tools(tmp_path, name):
  update = {name.format("down"): DOWN, name.format("up"): UP}
  if "unet" in name:
    update[name.replace("lora_{}.weight", "alpha")] = np.array(2, np.int64)
  got = merged(tmp_path, update)["blocks.1.self_attn.q.weight"]
  scale = 0.5 if "unet" in name else 1
  want = TENSORS["blocks.1.self_attn.q.weight"] + scale * (UP @ DOWN)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_modulations_and_convolutions_are_updated(tmp_path):
  patch, shift = TENSORS["patch_embedding.weight"], TENSORS["blocks.1.modulation"]
  down = np.ones((4, *patch.shape[1:]), np.float32)
  up = np.ones((len(patch), 4, 1, 1, 1), np.float32)
  got = merged(tmp_path, {
    "diffusion_model.blocks.1.diff_m": np.ones_like(shift),
    "diffusion_model.patch_embedding.lora_down.weight": down,
    "diffusion_model.patch_embedding.lora_up.weight": up,
  })  # fmt: skip
  np.testing.assert_allclose(got["blocks.1.modulation"], shift + 1, atol=1e-6)
  np.testing.assert_allclose(got["patch_embedding.weight"], patch + 4, atol=1e-5)


def test_random_updates_never_give_a_traceback(tmp_path):
  put(tmp_path / "wan")
  parts, r = checkpoint.open_parts(tmp_path / "wan"), np.random.default_rng(0)
  ends = [*lora._ENDS, ".weight", ""]
  modules = [Q, "transformer.blocks.0.attn2.to_k", "lora_unet_blocks_0_ffn_0", "head", "blocks.9.x"]
  for _ in range(60):
    names = {r.choice(modules) + r.choice(ends) for _ in range(r.integers(1, 4))} - {""}
    shapes = [(), (0,), (1,), (32,), (4, 32), (32, 4), (32, 32), (1, 1, 1)]
    save_file(
      {n: np.full(shapes[r.integers(8)], r.choice([1.0, np.inf]), np.float32) for n in names},
      tmp_path / "l.safetensors",
    )
    try:
      for tensor in lora.merge(parts, tmp_path / "l.safetensors")[0].tensors.values():
        assert tensor.read().shape == tensor.shape
    except CheckpointError:
      pass


def test_strengths_of_updates():
  assert lora.parse("a.safetensors") == (Path("a.safetensors"), 1.0)
  assert lora.parse("x@y/a.safetensors@-0.5") == (Path("x@y/a.safetensors"), -0.5)
  for strength in ("much", "", "nan"):
    with pytest.raises(CheckpointError, match=f"strength '{strength}' of a.safetensors is no"):
      lora.parse(f"a.safetensors@{strength}")
  with pytest.raises(CheckpointError, match=r"'a.txt@0.5' names no file of weights"):
    lora.parse("a.txt@0.5")
