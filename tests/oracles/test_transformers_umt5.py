"""The text encoder and the tokenizer against Transformers (spec sections 10, 11.3).

Both encoders get the same random weights, by the name table of `hfjax.convert`, and both tokenizers
the same tokenizer.json. All work is in float32, but for one test.
"""

import functools
import io
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers

from hfjax import text
from hfjax.convert import umt5 as names
from hfjax.models import umt5
from hfjax.models.umt5 import Umt5Config, relative_buckets

# Relative to the largest value of the states. Both sides round the same float32 sums in other
# orders. Measured: 7e-7 to 2.2e-6.
TOLERANCE = 1e-5
# The same for bfloat16, in which Transformers also keeps scores and sums. Measured: 0.047.
HALF_TOLERANCE = 0.1

# Halves the time to compile, which is most of what these tests take.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

_SMALL = Umt5Config(vocab=50, dim=24, dim_attn=48, dim_ffn=40, heads=4, layers=3)
SIZES = {
  "wide_heads": _SMALL,
  "narrow_heads": replace(_SMALL, vocab=31, dim=40, dim_attn=18, heads=3, layers=2),
  "few_buckets": replace(_SMALL, heads=2, buckets=8, max_distance=20, eps=1e-3),
  "one_layer": replace(_SMALL, vocab=17, dim_ffn=8, heads=1, layers=1, buckets=10),
}


def make_theirs(config: Umt5Config):
  """Transformers' encoder of an architecture, with its own initial weights."""
  return transformers.UMT5EncoderModel(
    transformers.UMT5Config(
      vocab_size=config.vocab,
      d_model=config.dim,
      d_kv=config.head_dim,
      d_ff=config.dim_ffn,
      num_layers=config.layers,
      num_heads=config.heads,
      relative_attention_num_buckets=config.buckets,
      relative_attention_max_distance=config.max_distance,
      layer_norm_epsilon=config.eps,
    )
  ).eval()


def to_original_names(config: Umt5Config, tensors) -> dict[str, np.ndarray]:
  """Transformers' tensors under original names."""
  table = names.table(config)
  return {n: tensors[table.diffusers_name(n)].detach().numpy() for n in table.shapes}


@functools.cache
def build(size: str):
  """Transformers' encoder with random weights, and our parameters."""
  config = SIZES[size]
  model = make_theirs(config)
  generator = torch.Generator().manual_seed(7)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if p.ndim == 1:
        p.copy_(1 + 0.3 * noise)
      elif name == "shared.weight" or "bias" in name:
        p.copy_(noise)
      else:
        p.copy_(noise / p.shape[1] ** 0.5)
  return model, names.from_original(config, to_original_names(config, model.state_dict()))


def inputs(size: str, longest: int):
  """Random ids `[b t]`, and lengths from one token to all."""
  rng = np.random.default_rng(3)
  ids = rng.integers(0, SIZES[size].vocab, (4, longest)).astype(np.int32)
  return ids, np.asarray([longest, 1, longest // 2, longest - 1], np.int32)


def call_theirs(model, ids, length) -> np.ndarray:
  mask = np.arange(ids.shape[1]) < length[:, None]
  with torch.no_grad():
    out = model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
  return out.last_hidden_state.float().numpy()


def difference(actual, desired) -> float:
  """Largest difference, relative to the largest desired value."""
  actual = np.asarray(actual, np.float32)
  assert actual.shape == desired.shape
  return float(np.abs(actual - desired).max() / np.abs(desired).max())


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes(size):
  table, theirs = names.table(SIZES[size]), make_theirs(SIZES[size]).state_dict()
  ours = {table.diffusers_name(n): shape for n, shape in table.shapes.items()}
  assert {names.TIED.get(n, n) for n in theirs} == set(ours)
  assert all(ours[names.TIED.get(n, n)] == tuple(x.shape) for n, x in theirs.items())
  for n, x in theirs.items():
    assert torch.equal(x, theirs[names.TIED.get(n, n)])


@pytest.mark.parametrize("size", SIZES)
def test_architecture_from_its_config(size):
  config = make_theirs(SIZES[size]).config.to_dict()
  assert names.config_from_transformers(config) == SIZES[size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("longest", [11, 170])
def test_hidden_states(size, longest):
  (model, params), (ids, length) = build(size), inputs(size, longest)
  theirs = call_theirs(model, ids, length)
  call = fast_jit(umt5.encode, static_argnums=(0, 4, 5))
  kept = call(SIZES[size], params, ids, length, jnp.float32, True)
  assert 0.3 < theirs.std() < 3
  assert difference(kept, theirs) < TOLERANCE
  zeroed = call(SIZES[size], params, ids, length, jnp.float32, False)
  valid = (np.arange(longest) < length[:, None])[..., None]
  assert difference(zeroed, np.where(valid, theirs, 0)) < TOLERANCE


def test_hidden_states_in_bfloat16():
  size = "wide_heads"
  (model, params), (ids, length) = build(size), inputs(size, 40)
  half = make_theirs(SIZES[size])
  half.load_state_dict(model.state_dict())
  theirs = call_theirs(half.bfloat16(), ids, length)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  ours = umt5.encode(SIZES[size], params, ids, length, jnp.bfloat16, keep_padding=True)
  assert difference(ours, theirs) < HALF_TOLERANCE


@pytest.mark.parametrize(
  ("buckets", "most"), [(32, 128), (32, 64), (32, 512), (8, 20), (10, 128), (16, 33), (64, 1000)]
)
def test_buckets(buckets, most):
  config = transformers.UMT5Config(
    vocab_size=4, d_model=4, d_kv=4, d_ff=4, num_layers=1, num_heads=1,
    relative_attention_num_buckets=buckets, relative_attention_max_distance=most,
  )  # fmt: skip
  layer = transformers.UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
  distance = np.arange(-1100, 1101)
  theirs = layer._relative_position_bucket(torch.from_numpy(distance)).numpy()
  np.testing.assert_array_equal(relative_buckets(distance, buckets, most), theirs)


CORPUS = [
  "a red fox runs over the fresh snow in the morning",
  "the camera follows a blue whale & its calf, slowly",
  "café über naïve, 一只猫在雪地里奔跑",
]
PROMPTS = [
  *CORPUS,
  "",
  "  A red   fox\n runs &amp;amp; follows ",
  "cafÃ© “über” 猫🐈",
  "fox " * 100,
]
# Special tokens written out. T5Tokenizer of Transformers 5 puts a pre-tokenizer of its own in the
# place of the file's, which here loses a space; older ones use the file's.
SPECIAL = ["the camera </s> follows<pad>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder as google/umt5-xxl's, with a small vocabulary."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS * 20), model_writer=out, vocab_size=90, num_threads=1,
    hard_vocab_limit=False, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
  )  # fmt: skip
  pieces = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
  rows = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
  made = tokenizers.Tokenizer(tokenizers.models.Unigram(rows, unk_id=2))
  made.normalizer = tokenizers.normalizers.NFKC()
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.add_special_tokens(["<pad>", "</s>", "<unk>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", text.EOS)]
  )
  path = tmp_path_factory.mktemp("tokenizer")
  made.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
      }
    )
  )
  return path


@pytest.mark.parametrize("text_len", [6, 64, 512])
@pytest.mark.parametrize(
  ("kind", "prompts"),
  [
    (transformers.AutoTokenizer, PROMPTS),
    (transformers.PreTrainedTokenizerFast, PROMPTS + SPECIAL),
  ],
)
def test_tokens(folder, kind, prompts, text_len):
  theirs = kind.from_pretrained(folder)(
    [text.clean(p) for p in prompts],
    max_length=text_len,
    padding="max_length",
    truncation=True,
    add_special_tokens=True,
    return_tensors="np",
  )
  ids, length = text.Tokenizer.load(folder, text_len)(prompts)
  np.testing.assert_array_equal(ids, theirs["input_ids"])
  np.testing.assert_array_equal(length, theirs["attention_mask"].sum(axis=1))
