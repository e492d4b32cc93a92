"""Tokenizers made on the fly: one kind of file against the other, padding, cleaning, sentences."""

import io
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from hfjax.text import EOS, Tokenizer, clean

ROOT = Path(__file__).resolve().parents[1]
CORPUS = [
  "a red fox runs over the fresh snow in the morning",
  "the camera follows a blue whale & its calf, slowly",
  "café über naïve, 一只猫在雪地里奔跑",
]


def train(**changes) -> bytes:
  """A SentencePiece model of the corpus, with the ids of UMT5."""
  options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **changes}
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS * 20), model_writer=out, vocab_size=90, num_threads=1,
    hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=2, **options,
  )  # fmt: skip
  return out.getvalue()


def same_as_json(model: bytes) -> tokenizers.Tokenizer:
  """A Unigram tokenizer with the pieces of a SentencePiece model, and an end token of its own."""
  pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
  rows = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
  made = tokenizers.Tokenizer(tokenizers.models.Unigram(rows, unk_id=2))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.add_special_tokens(["<pad>", "</s>", "<unk>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", EOS)]
  )
  return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Folders of checkpoints: `json` with one kind of file, `pieces` with the other."""
  model, base = train(), tmp_path_factory.mktemp("checkpoints")
  for name in ("json", "pieces"):
    (base / name / "google" / "umt5-xxl").mkdir(parents=True)
  same_as_json(model).save(str(base / "json/google/umt5-xxl/tokenizer.json"))
  (base / "pieces/google/umt5-xxl/spiece.model").write_bytes(model)
  return SimpleNamespace(json=base / "json", pieces=base / "pieces")


@pytest.fixture(scope="module", params=["json", "pieces"])
def folder(request, files):
  return getattr(files, request.param)


def test_padded_ids_and_lengths(folder):
  prompts = [CORPUS[0], "", "a fox"]
  ids, length = Tokenizer.load(folder, text_len=40)(prompts)
  assert ids.shape == (3, 40) and ids.dtype == length.dtype == np.int32
  assert length.tolist()[1] == 1 and ids[1, 0] == EOS
  for row, n in zip(ids, length, strict=True):
    assert row[n - 1] == EOS and not row[n:].any() and (row[: n - 1] > EOS).all()
  alone = Tokenizer.load(folder, text_len=40)(prompts[2:])
  np.testing.assert_array_equal(alone.ids[0], ids[2])


def test_pieces_are_those_of_the_text(files):
  """Ids of the published layout: pad 0, end 1, and pieces that spell the text."""
  pieces = sentencepiece.SentencePieceProcessor(
    model_file=str(files.pieces / "google/umt5-xxl/spiece.model")
  )
  ids, length = Tokenizer.load(files.json)([CORPUS[2]])
  assert ids.shape == (1, 512)
  assert pieces.decode(ids[0, : length[0] - 1].tolist()) == CORPUS[2]


@pytest.mark.parametrize("text_len", [1, 2, 5, 9])
def test_truncation_keeps_the_end_token(folder, text_len):
  whole = Tokenizer.load(folder)([CORPUS[0]]).ids[0]
  ids, length = Tokenizer.load(folder, text_len)([CORPUS[0]])
  assert length.tolist() == [text_len]
  assert ids[0].tolist() == [*whole[: text_len - 1], EOS]


# No slash: an end token that is written out is one token to tokenizer.json, and text to the other.
@given(st.text("aeforst é,雪 \n\tz&;<>ﬁ", max_size=40))
def test_both_kinds_of_file_agree(files, text):
  a, b = (Tokenizer.load(f, text_len=24)([text]) for f in (files.json, files.pieces))
  np.testing.assert_array_equal(a.ids, b.ids)
  np.testing.assert_array_equal(a.length, b.length)


def test_folder_may_be_the_tokenizers_own(files, tmp_path):
  expected = Tokenizer.load(files.json)(CORPUS)
  for folder in (files.json / "google/umt5-xxl", str(files.json)):
    np.testing.assert_array_equal(Tokenizer.load(folder)(CORPUS).ids, expected.ids)
  shutil.copytree(files.json / "google/umt5-xxl", tmp_path / "tokenizer")
  np.testing.assert_array_equal(Tokenizer.load(tmp_path)(CORPUS).ids, expected.ids)


def test_json_is_read_first_and_its_own_padding_and_truncation_do_not_count(files, tmp_path):
  shutil.copytree(files.json / "google/umt5-xxl", tmp_path, dirs_exist_ok=True)
  (tmp_path / "spiece.model").write_bytes(b"broken")
  own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  own.enable_truncation(3)
  own.enable_padding(length=7, pad_id=5)
  own.save(str(tmp_path / "tokenizer.json"))
  np.testing.assert_array_equal(
    Tokenizer.load(tmp_path)(CORPUS).ids, Tokenizer.load(files.json)(CORPUS).ids
  )


def test_no_prompts(folder):
  ids, length = Tokenizer.load(folder, text_len=7)([])
  assert ids.shape == (0, 7) and length.shape == (0,)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("  a\tfox\n\n runs  ", "a fox runs"),
    ("a\u00a0fox\u3000runs", "a fox runs"),
    ("fish &amp;amp; chips", "fish & chips"),
    ("&amp;lt;b&amp;gt;", "<b>"),
    ("&nbsp;a&amp;nbsp;", "a"),
    ("schÃ¶n", "schön"),
    ("ﬁne “quotes”", 'fine "quotes"'),
    ("a\x00b\x1b[31mc", "abc"),
    ("broken \ud83d", "broken \ufffd"),
    ("\uff21\uff22", "AB"),
    ("", ""),
    (" \n ", ""),
  ],
)
def test_cleaning(text, expected):
  assert clean(text) == expected


@given(st.text(max_size=30))
def test_clean_text_has_no_spaces_but_single_ones(text):
  cleaned = clean(text)
  assert cleaned == " ".join(cleaned.split())


def test_any_prompt_gets_ids(folder):
  prompts = ["\ud83d\x00", "👩‍👩‍👧", "\u202eabc", "</s> <pad>", "a" * 5000]
  _, length = Tokenizer.load(folder, text_len=30)(prompts)
  assert length.min() >= 1 and length.max() == 30


def put(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


@pytest.mark.parametrize(
  ("make", "error", "sentence"),
  [
    (shutil.rmtree, FileNotFoundError, "There is no folder .*; give the checkpoint's folder"),
    (lambda d: None, FileNotFoundError, "no tokenizer; download tokenizer.json or spiece.model of "
     "google/umt5-xxl .* put it into .*google/umt5-xxl"),
    (lambda d: put(d / "tokenizer.json", b"version https://git-lfs"), ValueError,
     "tokenizer.json is no tokenizer that can be read .*; download it again"),
    (lambda d: put(d / "google/umt5-xxl/tokenizer.json", b"{}"), ValueError, "can be read"),
    (lambda d: put(d / "tokenizer.json", b"\xff\xfe"), ValueError, "can be read"),
    (lambda d: put(d / "spiece.model", b"version https://git-lfs"), ValueError,
     "spiece.model is no tokenizer that can be read"),
    (lambda d: put(d / "spiece.model", b""), ValueError, "can be read"),
    (lambda d: put(d / "spiece.model", train(pad_id=-1, unk_id=0, eos_id=2)), ValueError,
     "Id 1 of the tokenizer .*, and UMT5's is '</s>'"),
    (lambda d: tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(d / "tokenizer.json")),
     ValueError, "Id 1 of the tokenizer .* is None"),
  ],
)  # fmt: skip
def test_folders_without_a_fitting_tokenizer_get_a_sentence(tmp_path, make, error, sentence):
  folder = tmp_path / "model"
  folder.mkdir()
  make(folder)
  with pytest.raises(error, match=sentence) as caught:
    Tokenizer.load(folder)
  assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_models_is_refused(folder):
  size = Tokenizer.load(folder).vocab
  assert Tokenizer.load(folder, vocab=size).vocab == size
  with pytest.raises(ValueError, match=f"has {size} ids, and the text encoder knows {size - 1}"):
    Tokenizer.load(folder, vocab=size - 1)


def test_other_calls_are_refused(folder):
  with pytest.raises(ValueError, match="one string; give a list of prompts"):
    Tokenizer.load(folder)("a fox")
  with pytest.raises(ValueError, match="0 tokens; make text_len a whole number, at"):
    Tokenizer.load(folder, text_len=0)
  with pytest.raises(ValueError, match="'512' tokens; make text_len a whole number"):
    Tokenizer.load(folder, text_len="512")
  with pytest.raises(ValueError, match="prompt of type NoneType; give strings"):
    Tokenizer.load(folder)(["a fox", None])


def test_no_other_framework_is_loaded():
  """In a process of its own, as this one may have loaded anything."""
  code = "import hfjax.text, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
  )
  assert run.stdout.strip() == "[]"
