"""The tokenizer of the world of shapes: of its words, and of others letter by letter."""

import numpy as np
import pytest
import sentencepiece

from hfjax.data import shapes, shapes_words, vocabulary
from hfjax.data.rejects import DataError
from hfjax.text import EOS, PAD, Tokenizer

VOCAB, ROWS = 320, 48


@pytest.fixture(scope="module")
def prompts():
  return shapes.prompts("train", 4000, 0)


@pytest.fixture(scope="module")
def model(prompts):
  return vocabulary.train(prompts, VOCAB)


@pytest.fixture(scope="module")
def tokenizer(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  (folder / "spiece.model").write_bytes(model)
  return Tokenizer.load(folder, ROWS, VOCAB)


@pytest.fixture(scope="module")
def pieces(model):
  return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_special_ids_are_those_of_umt5(pieces):
  assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (PAD, EOS, 2) == (0, 1, 2)
  assert pieces.bos_id() == -1
  assert [pieces.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
  assert VOCAB // 2 < pieces.get_piece_size() <= VOCAB


def test_every_word_is_a_piece(pieces, prompts):
  told = {word.strip(",") for prompt in prompts for word in prompt.split()}
  assert set(shapes_words.WORDS) <= {part for word in told for part in word.split("-")}
  long = {word: row for word in told if len(row := pieces.encode(word, out_type=str)) > 1}
  assert long == {"mid-sized": ["▁mid", "-", "sized"]}


def test_captions_fit_and_differ(tokenizer):
  prompts = shapes.prompts("held_out", 2000, 7)
  tokens = tokenizer(prompts)
  assert not any(map(tokenizer.surplus, prompts)) and tokens.length.max() <= ROWS
  assert not np.any(tokens.ids == 2)
  assert len(set(map(bytes, tokens.ids))) == len(set(prompts))


def test_capitals_are_small_letters(tokenizer):
  prompt = "a large red circle moves left, on stripes"
  for other in (prompt.upper(), prompt.title(), f"  {prompt} "):
    np.testing.assert_array_equal(tokenizer([other]).ids, tokenizer([prompt]).ids)


def test_unknown_words_are_told_apart_and_unknown_letters_are_not(tokenizer, pieces):
  words = ["a dragon", "a wizard", "a quiz 4 jackdaws", "model-3.5"]
  rows = [tokenizer.split(word) for word in words]
  assert all(2 not in row for row in rows) and len(set(map(tuple, rows))) == len(rows)
  assert [pieces.decode(row) for row in rows] == words
  assert 2 in tokenizer.split("a röd cirkel") and 2 in tokenizer.split("猫")


def test_it_is_always_the_same(model, prompts):
  assert vocabulary.train(prompts, VOCAB) == model and b"tsv" not in model


def test_too_few_pieces_are_refused(prompts):
  with pytest.raises(DataError, match="No tokenizer of 20 pieces can be made of the texts"):
    vocabulary.train(prompts[:20], 20)
