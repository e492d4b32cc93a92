"""Checkpoints of several models: original folders, Diffusers pipelines, autoencoders, encoder."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hfjax.convert import CheckpointError, checkpoint, load, stored
from hfjax.convert.recognise import original_name
from hfjax.convert.registry import KINDS
from hfjax.models.taehv import TAEHV
from hfjax.models.umt5 import Umt5Config
from hfjax.models.vae import WAN21
from tests.convert.helpers import DENSE, convert, flat, put, refused, same

CONFIGS = {
  "dit": DENSE,
  "vae": dataclasses.replace(WAN21, dim=4),
  "umt5": Umt5Config(vocab=20, dim=16, dim_attn=24, dim_ffn=12, heads=4, layers=2),
  "taehv": dataclasses.replace(TAEHV, encoder_dim=4, decoder_dims=(8, 6, 4, 4)),
}
PIPELINE = ("dit", "vae", "umt5")


def tensors_of(name, seed=0):
  r = np.random.default_rng(seed)
  shapes = KINDS[name].table(CONFIGS[name]).shapes
  return {k: r.normal(size=s).astype(np.float32) for k, s in shapes.items()}


TENSORS = {name: tensors_of(name) for name in CONFIGS}


def wan_folder(folder):
  for name in PIPELINE:
    kind = KINDS[name]
    cfg = kind.published(CONFIGS[name], "original")
    put(folder, TENSORS[name], cfg, kind.stems["original"] + ".safetensors")
  tokenizer = folder / "google" / "umt5-xxl"
  tokenizer.mkdir(parents=True)
  (tokenizer / "tokenizer.json").write_text("{}")
  return folder


def test_an_update_leaves_the_other_models_and_the_tokenizer(tmp_path):
  wan_folder(tmp_path / "wan")
  weight = "blocks.0.self_attn.q.weight"
  change = np.ones_like(TENSORS["dit"][weight])
  put(tmp_path, {weight.removesuffix("weight") + "diff": change}, name="style.safetensors")
  args = ("--lora", str(tmp_path / "style.safetensors"), "--to", "original")
  assert convert(tmp_path / "wan", tmp_path / "out", *args) == 0
  for name in PIPELINE:
    expected = dict(TENSORS[name])
    if name == "dit":
      expected[weight] = expected[weight] + change
    same(load_file(tmp_path / "out" / f"{KINDS[name].stems['original']}.safetensors"), expected)
  assert (tmp_path / "out" / "google" / "umt5-xxl" / "tokenizer.json").is_file()


def test_a_whole_original_folder_goes_everywhere_and_back(tmp_path, capsys):
  wan_folder(tmp_path / "wan")
  for source, target, to in (
    ("wan", "ours", "hfjax"), ("ours", "pipeline", "diffusers"), ("pipeline", "again", "hfjax"),
    ("again", "back", "original"),
  ):  # fmt: skip
    assert convert(tmp_path / source, tmp_path / target, "--to", to) == 0, capsys.readouterr().err
    tokenizer = "tokenizer" if to == "diffusers" else "google/umt5-xxl"
    assert (tmp_path / target / tokenizer / "tokenizer.json").is_file()
  for name in PIPELINE:
    stem = KINDS[name].stems["original"]
    same(load_file(tmp_path / "back" / f"{stem}.safetensors"), TENSORS[name])
    loaded = load(tmp_path / "again", name)
    assert loaded.config == CONFIGS[name]
    want = KINDS[name].table(CONFIGS[name]).from_original(TENSORS[name])
    jax.tree.map(np.testing.assert_array_equal, loaded.params, want)
  assert (tmp_path / "pipeline" / "text_encoder" / "model.safetensors").is_file()


def test_one_model_of_many(tmp_path, capsys):
  wan_folder(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours", "--model", "vae") == 0
  assert [*stored.hfjax_models(tmp_path / "ours")] == ["vae"]
  # Another one is added to it, and the first stays.
  assert convert(tmp_path / "wan", tmp_path / "ours", "--model", "dit", "--overwrite") == 0
  assert sorted(stored.hfjax_models(tmp_path / "ours")) == ["dit", "vae"]
  error = refused(capsys, tmp_path / "wan", tmp_path / "x", "--model", "taehv")
  assert "holds no taehv: only dit, umt5, vae" in error


def test_what_is_not_wanted_may_be_unreadable(tmp_path, capsys):
  wan_folder(tmp_path / "wan")
  (tmp_path / "wan" / "training_args.bin").write_bytes(b"no weights")
  assert convert(tmp_path / "wan", tmp_path / "all") == 0
  assert "Left out training_args.bin" in capsys.readouterr().out
  (tmp_path / "wan" / "Wan2.1_VAE.safetensors").write_bytes(b"damaged")
  assert convert(tmp_path / "wan", tmp_path / "one", "--model", "dit") == 0
  assert "Wan2.1_VAE" in refused(capsys, tmp_path / "wan", tmp_path / "x")
  error = refused(capsys, tmp_path / "wan", tmp_path / "x", "--model", "vae")
  assert "holds no vae: only dit, umt5. Wan2.1_VAE.safetensors could not be read" in error


def test_the_tiny_autoencoder_takes_the_last_frames_of_larger_ones(tmp_path, capsys):
  tensors = dict(TENSORS["taehv"])
  name = "decoder.7.conv.weight"
  tensors[name] = np.concatenate([np.ones_like(tensors[name]), tensors[name]])
  put(tmp_path / "tiny", tensors, None, "taew2_1.safetensors")
  assert convert(tmp_path / "tiny", tmp_path / "ours") == 0
  loaded = load(tmp_path / "ours", "taehv")
  assert loaded.config == CONFIGS["taehv"]
  want = flat(KINDS["taehv"].table(CONFIGS["taehv"]).from_original(TENSORS["taehv"]))
  same({k: np.asarray(v) for k, v in flat(loaded.params).items()}, want)
  error = refused(capsys, tmp_path / "ours", tmp_path / "x", "--to", "diffusers")
  assert "taehv has no diffusers naming" in error


def test_tied_embeddings_may_come_under_either_name(tmp_path):
  kind, config = KINDS["umt5"], CONFIGS["umt5"]
  table = kind.table(config)
  theirs = {table.diffusers_name(k): v for k, v in TENSORS["umt5"].items()}
  shared = theirs.pop("shared.weight")
  cfg = kind.published(config, "diffusers")
  for n, extra in enumerate((
    {"shared.weight": shared}, {"encoder.embed_tokens.weight": shared},
    {"shared.weight": shared, "encoder.embed_tokens.weight": shared},
  )):  # fmt: skip
    put(tmp_path / str(n), {**theirs, **extra}, cfg, "model.safetensors")
    part = checkpoint.open_parts(tmp_path / str(n))[0]
    same({k: t.read() for k, t in part.tensors.items()}, TENSORS["umt5"])
    # They go back under the names that they had.
    assert convert(tmp_path / str(n), tmp_path / f"ours{n}") == 0
    assert convert(tmp_path / f"ours{n}", tmp_path / f"back{n}", "--to", "diffusers") == 0
    back = load_file(tmp_path / f"back{n}" / "text_encoder" / "model.safetensors")
    same(back, {**theirs, **extra})
  assert convert(tmp_path / "ours2", tmp_path / "original", "--to", "original") == 0
  stem = kind.stems["original"]
  same(load_file(tmp_path / "original" / f"{stem}.safetensors"), TENSORS["umt5"])


def test_tied_embeddings_that_differ_are_refused(tmp_path, capsys):
  kind, config = KINDS["umt5"], CONFIGS["umt5"]
  theirs = {kind.table(config).diffusers_name(k): v for k, v in TENSORS["umt5"].items()}
  theirs["encoder.embed_tokens.weight"] = theirs["shared.weight"].copy()
  theirs["encoder.embed_tokens.weight"][-1, -1] += 1
  put(tmp_path / "t5", theirs, kind.published(config, "diffusers"), "model.safetensors")
  error = refused(capsys, tmp_path / "t5", tmp_path / "ours")
  assert "token_embedding.weight under two names with different numbers" in error


@pytest.mark.parametrize(
  ("name", "change", "sentence"),
  [
    ("dit", {"attention_head_dim": 128}, "attention_head_dim 256 against 32"),
    ("dit", {"image_dim": 1280}, "image_dim 1280 against 0"),
    ("dit", {"patch_size": [1, 4, 4]}, "patch_size"),
    ("dit", {"qk_norm": None}, "qk_norm None"),
    ("vae", {"base_dim": 96}, "base_dim 96 against 4"),
    ("vae", {"_class_name": "AutoencoderKL"}, "_class_name 'AutoencoderKL'"),
    ("umt5", {"d_kv": 8}, "d_kv 32 against 24"),
    ("umt5", {"relative_attention_num_buckets": 64}, "buckets 64 against 32"),
    ("umt5", {"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'"),
  ],
)
def test_configurations_of_pipelines_are_held_against_the_tensors(tmp_path, name, change, sentence):
  kind, config = KINDS[name], CONFIGS[name]
  theirs = {kind.table(config).diffusers_name(k): v for k, v in TENSORS[name].items()}
  put(tmp_path / "x", theirs, {**kind.published(config, "diffusers"), **change})
  with pytest.raises(CheckpointError, match=sentence):
    checkpoint.open_parts(tmp_path / "x")


def test_the_autoencoder_of_another_family_is_named():
  shapes = dict(KINDS["vae"].table(CONFIGS["vae"]).shapes)
  first = shapes["encoder.conv1.weight"]
  shapes["encoder.conv1.weight"] = (first[0], 12, *first[2:])
  with pytest.raises(CheckpointError, match="takes pixels of 12 channels, as that of Wan 2.2"):
    KINDS["vae"].infer(shapes, {}, [])


def test_latent_statistics_come_from_the_configuration(tmp_path):
  config = dataclasses.replace(CONFIGS["vae"], z_dim=2, mean=(0.5, 1.0), std=(2.0, 3.0))
  shapes = KINDS["vae"].table(config).shapes
  tensors = {k: np.ones(s, np.float32) for k, s in shapes.items()}
  table = KINDS["vae"].table(config)
  theirs = {table.diffusers_name(k): v for k, v in tensors.items()}
  put(tmp_path / "vae", theirs, KINDS["vae"].published(config, "diffusers"))
  assert checkpoint.open_parts(tmp_path / "vae")[0].config == config
  put(tmp_path / "plain", tensors, None, "x.safetensors")
  part = checkpoint.open_parts(tmp_path / "plain")[0]
  assert part.config.mean == (0.0, 0.0) and "statistics of the 2 latent" in part.notes[0]


def test_a_low_rank_update_needs_a_transformer(tmp_path):
  from hfjax.convert import lora

  put(tmp_path / "tiny", TENSORS["taehv"], None, "taew2_1.safetensors")
  with pytest.raises(CheckpointError, match="updates a transformer"):
    lora.merge(checkpoint.open_parts(tmp_path / "tiny"), tmp_path / "l.safetensors")


@pytest.mark.parametrize("name", PIPELINE)
def test_names_of_pipelines_lead_back(name):
  table = KINDS[name].table(CONFIGS[name])
  theirs = [table.diffusers_name(n) for n in table.shapes]
  assert [original_name(name, n) for n in theirs] == list(table.shapes)
