"""Prompts to tokens of the UMT5 text encoder (spec section 10)."""

import dataclasses
import html
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int

PAD, EOS = 0, 1
_EOS_PIECE = "</s>"
# Where checkpoints keep the tokenizer: the published ones, those of Diffusers, and the folder.
FILES = ("tokenizer.json", "spiece.model")
_FOLDERS = ("google/umt5-xxl", "tokenizer", ".")


class Tokens(NamedTuple):
  """Token ids of prompts, padded at the end, and how many of them are valid."""

  ids: Int[np.ndarray, "b t"]
  length: Int[np.ndarray, "b"]


def clean(prompt: str) -> str:
  """The prompt with broken characters mended, HTML entities resolved and spaces collapsed."""
  prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
  return re.sub(r"\s+", " ", prompt.strip()).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Tokenizer of prompts; see `load`.

  split: ids of a clean text, without special ones. vocab: number of ids. text_len: rows of ids.
  """

  split: Callable[[str], list[int]]
  vocab: int
  text_len: int = 512

  def __post_init__(self):
    if not isinstance(self.text_len, int) or self.text_len < 1:
      raise ValueError(
        f"Prompts would have {self.text_len!r} tokens; make text_len a whole number, at least 1."
      )

  @classmethod
  def load(
    cls, folder: str | os.PathLike, text_len: int = 512, vocab: int | None = None
  ) -> "Tokenizer":
    """The tokenizer in a checkpoint's folder, or in the folder itself.

    It is tokenizer.json, or spiece.model if there is no such file. vocab: rows of the text
    encoder's embedding, to be checked.

    Raises FileNotFoundError if there is none, ValueError if its file is broken, is another model's
    or has ids that the encoder lacks.
    """
    path = find(Path(folder))
    split, size = (_read_json if path.suffix == ".json" else _read_pieces)(path)
    if vocab is not None and size > vocab:
      raise ValueError(
        f"The tokenizer {path} has {size} ids, and the text encoder knows {vocab}; use the "
        "tokenizer that the encoder was trained with."
      )
    return cls(split, size, text_len)

  def __call__(self, prompts: Sequence[str]) -> Tokens:
    """Ids of the cleaned prompts, `[b text_len]`, and their lengths, `[b]`; both int32.

    Every text ends with the end token, if need be after its first text_len - 1 tokens.
    Raises ValueError unless the prompts are a list of strings.
    """
    if isinstance(prompts, str):
      raise ValueError("The tokenizer got one string; give a list of prompts.")
    odd = [type(p).__name__ for p in prompts if not isinstance(p, str)]
    if odd:
      raise ValueError(f"The tokenizer got a prompt of type {odd[0]}; give strings.")
    ids = np.full((len(prompts), self.text_len), PAD, np.int32)
    length = np.zeros(len(prompts), np.int32)
    for n, prompt in enumerate(prompts):
      row = [*self.split(clean(prompt))[: self.text_len - 1], EOS]
      ids[n, : len(row)] = row
      length[n] = len(row)
    return Tokens(ids, length)

  def surplus(self, prompt: str) -> int:
    """Tokens of a prompt that are cut off, as there is no room for them."""
    return max(0, len(self.split(clean(prompt))) + 1 - self.text_len)


def find(folder: Path) -> Path:
  """The tokenizer's file in a checkpoint's folder; FileNotFoundError if there is none."""
  if not folder.is_dir():
    raise FileNotFoundError(
      f"There is no folder {folder} to read the tokenizer from; give the checkpoint's folder."
    )
  paths = [folder / f / name for f in _FOLDERS for name in FILES]
  found = next((p for p in paths if p.is_file()), None)
  if found is None:
    raise FileNotFoundError(
      f"{folder} holds no tokenizer; download tokenizer.json or spiece.model of google/umt5-xxl "
      f"from huggingface.co and put it into {folder / _FOLDERS[0]}."
    )
  return found


def _read_json(path: Path) -> tuple[Callable[[str], list[int]], int]:
  try:
    model = tokenizers.Tokenizer.from_file(str(path))
  except Exception as e:  # the library raises nothing narrower
    raise _broken(path, e) from e
  _check_eos(path, model.id_to_token(EOS))
  # The file may ask for both; here the text's length decides.
  model.no_truncation()
  model.no_padding()
  size = model.get_vocab_size()
  return lambda text: model.encode(text, add_special_tokens=False).ids, size


def _read_pieces(path: Path) -> tuple[Callable[[str], list[int]], int]:
  try:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (RuntimeError, OSError) as e:
    raise _broken(path, e) from e
  size = model.get_piece_size()
  _check_eos(path, model.id_to_piece(EOS) if size > EOS else None)
  return lambda text: model.encode(text, out_type=int), size


def _broken(path: Path, error: Exception) -> ValueError:
  return ValueError(
    f"{path} is no tokenizer that can be read ({error}); download it again. It has megabytes: a "
    "file of some hundred bytes is Git LFS's pointer to it."
  )


def _check_eos(path: Path, piece: str | None):
  if piece != _EOS_PIECE:
    raise ValueError(
      f"Id {EOS} of the tokenizer {path} is {piece!r}, and UMT5's is {_EOS_PIECE!r}; use the "
      "tokenizer of google/umt5-xxl."
    )
