"""Prompt to pixels with a folder of weights as the converter writes it, and with random ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from hfjax import convert, pipeline
from hfjax.convert.registry import KINDS
from hfjax.models import umt5, wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.models.taehv import TAEHV
from hfjax.models.umt5 import Umt5Config
from hfjax.models.vae import WAN21
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.latent_stream import LatentStream
from hfjax.streaming.pixels import FrameDecoder
from tests.convert import helpers

WORDS = ["a", "red", "square", "moves"]
MODEL = WanConfig(
  dim=32, ffn_dim=48, heads=2, layers=2, text_dim=16, text_len=512, freq_dim=16, linear=True
)
CONFIGS = {
  "dit": MODEL,
  "vae": dataclasses.replace(WAN21, dim=4),
  "umt5": Umt5Config(vocab=20, dim=16, dim_attn=24, dim_ffn=12, heads=4, layers=2),
  "taehv": dataclasses.replace(TAEHV, encoder_dim=4, decoder_dims=(8, 6, 4, 4)),
}


def write(folder, configs, words=WORDS):
  """An original folder, its tokenizer included."""
  r = np.random.default_rng(0)
  for name, config in configs.items():
    kind = KINDS[name]
    tensors = {
      k: (r.normal(size=s) / max(1, np.prod(s[1:])) ** 0.5).astype(np.float32)
      for k, s in kind.table(config).shapes.items()
    }
    cfg = kind.published(config, "original") if name != "taehv" else None
    helpers.put(folder, tensors, cfg, kind.stems["original"] + ".safetensors")
  vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{w: 3 + i for i, w in enumerate(words)}}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(["<pad>", "</s>", "<unk>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  place = folder / "google" / "umt5-xxl"
  place.mkdir(parents=True)
  made.save(str(place / "tokenizer.json"))
  return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  base = tmp_path_factory.mktemp("weights")
  write(base / "wan", CONFIGS)
  assert helpers.convert(base / "wan", base / "ours", "--variant", "paper") == 0
  return base / "ours"


@pytest.mark.parametrize("autoencoder", ["full", "tiny"])
def test_a_prompt_becomes_frames(weights, autoencoder):
  p = pipeline.load(weights, autoencoder, dtype="float32")
  assert p.config == MODEL and p.variant == "paper" and p.preset == "hybrid"
  context = p.encode(["a red square", "a square moves"])
  assert context.shape == (2, 512, 16) and context.dtype == jnp.float32
  config = StreamConfig(p.config, Geometry(4, 6, ratio=0.5, variant=p.variant), steps=(1000, 500))
  stream, decoder = LatentStream(config, p.params, context), FrameDecoder(p.autoencoder)
  frames = np.concatenate([decoder(next(stream)) for _ in range(2)], axis=1)
  assert frames.shape == (2, 21, 32, 48, 3) and frames.dtype == np.uint8
  assert np.any(frames[0] != frames[1])


def test_the_text_encoder_is_the_folders(weights):
  p = pipeline.load(weights, dtype="float32")
  loaded = convert.load(weights, "umt5")
  ids = np.zeros((1, 512), np.int32)
  ids[0, :4] = [3, 4, 2, 1]  # "cat" is in no vocabulary
  encode = jax.jit(umt5.encode, static_argnums=0)
  want = encode(loaded.config, loaded.params, jnp.asarray(ids), jnp.array([4]))
  np.testing.assert_allclose(p.encode(["a  red cat "]), want, atol=1e-6)
  assert p.encode.surplus("a red") == 0 and p.encode.surplus("red " * 600) == 600 + 1 - 512


@pytest.mark.parametrize(
  ("given", "want"), [("bfloat16", "bfloat16"), ("float32", "float32"), (None, "float32")]
)
def test_weights_come_in_the_dtype_that_is_asked_for(weights, given, want):
  p = pipeline.load(weights, dtype=given)  # on a processor
  leaves = jax.tree.leaves([p.params, p.autoencoder.params, p.encode.loaded.params])
  assert {x.dtype for x in leaves} == {jnp.dtype(want)} and p.autoencoder.dtype == want


@pytest.mark.parametrize(
  ("change", "words", "sentence"),
  [
    ({"dit": dataclasses.replace(MODEL, text_dim=12)}, WORDS, "gives rows of 16 numbers, and the "
     "transformer takes 12"),
    ({}, [f"w{i}" for i in range(30)], "33 ids, and the text encoder knows 20"),
  ],
)  # fmt: skip
def test_networks_that_were_not_trained_together_are_refused(tmp_path, change, words, sentence):
  write(tmp_path / "wan", {**CONFIGS, **change}, words)
  assert helpers.convert(tmp_path / "wan", tmp_path / "ours") == 0
  with pytest.raises(convert.CheckpointError, match=sentence):
    pipeline.load(tmp_path / "ours").encode(["a"])


@pytest.mark.parametrize("missing", ["dit", "vae", "umt5", "google"])
def test_what_is_missing_is_named(weights, tmp_path, missing):
  import shutil

  folder = tmp_path / "part"
  shutil.copytree(weights, folder)
  shutil.rmtree(folder / missing)
  with pytest.raises(
    convert.CheckpointError, match="tokenizer" if missing == "google" else missing
  ):
    pipeline.load(folder).encode(["a"])


def test_names_that_are_unknown(tmp_path):
  for arguments, sentence in (
    ((tmp_path / "nothing" / "here" / "at" / "all",), "neither a file or folder here"),
    (("random:wan_9b",), "no model 'wan_9b' to draw weights for; choose one of wan-1.3b"),
    (("random:tiny", "huge"), "no autoencoder 'huge'; choose one of full, tiny"),
  ):
    with pytest.raises(convert.CheckpointError, match=sentence):
      pipeline.load(*arguments)


def test_how_weights_are_sampled_is_the_folders(tmp_path):
  dense = {**CONFIGS, "dit": dataclasses.replace(MODEL, linear=False)}
  write(tmp_path / "wan", dense)
  assert helpers.convert(tmp_path / "wan", tmp_path / "ours", "--preset", "longlive") == 0
  p = pipeline.load(tmp_path / "ours")
  assert p.preset == "longlive" and p.variant == "reference_dense"
  with pytest.warns(UserWarning, match="and for preset wan"):
    assert pipeline.load(tmp_path / "wan").preset == "wan"


def test_how_random_weights_are_sampled(monkeypatch):
  p = pipeline.load("random:tiny", "tiny")
  assert p.preset == "hybrid" and p.variant == "paper"
  dense = dataclasses.replace(pipeline.PRESETS["tiny"], linear=False)
  monkeypatch.setitem(pipeline.PRESETS, "dense", dense)
  p = pipeline.load("random:dense", "tiny")
  assert p.preset == "self_forcing" and p.variant == "reference_dense"


@pytest.mark.parametrize("autoencoder", ["full", "tiny"])
def test_random_weights_need_no_files(autoencoder):
  p = pipeline.load("random:tiny", autoencoder, dtype="float32")
  a, b = (pipeline.load("random:Tiny", autoencoder, dtype="float32") for _ in range(2))
  wan.check_params(p.config, p.params)
  assert jax.tree.all(jax.tree.map(np.array_equal, a.params, b.params))
  x = p.encode(["a red square", "a red  circle"])
  np.testing.assert_array_equal(x, a.encode(["a red square", "a red circle"]))
  assert np.any(x[0] != x[1]) and np.array_equal(x[0, :2], x[1, :2]) and not x[:, 3:].any()
  z = jax.random.normal(jax.random.key(0), (1, 1, 4, 6, p.autoencoder.config.z_dim))
  assert FrameDecoder(p.autoencoder)(z).shape == (1, 1, 32, 48, 3)
  assert p.encode.surplus("red " * 20) == 4
