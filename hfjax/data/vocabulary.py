"""A tokenizer of a small language, with the special ids of UMT5's."""

import io
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as messages

from hfjax.data.rejects import DataError
from hfjax.text import EOS, PAD

_UNKNOWN = 2


def train(texts: Sequence[str], vocab: int) -> bytes:
  """A SentencePiece model of at most `vocab` pieces, as spiece.model holds it.

  Capitals are read as small letters. Letters and digits have pieces of their own, so that words
  that are not in the texts can be told apart.

  Raises DataError if the texts need more pieces.
  """
  letters = " ".join(string.ascii_lowercase + string.digits + ".,'-")
  model = io.BytesIO()
  with tempfile.TemporaryDirectory() as folder:
    rules = Path(folder, "rules.tsv")
    rules.write_text("".join(f"{ord(c):X}\t{ord(c.lower()):X}\n" for c in string.ascii_uppercase))
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *[letters] * 2]), model_writer=model, vocab_size=vocab,
        model_type="bpe", hard_vocab_limit=False, character_coverage=1.0,
        normalization_rule_tsv=str(rules), pad_id=PAD, eos_id=EOS, unk_id=_UNKNOWN, bos_id=-1,
        num_threads=1, minloglevel=2,
      )  # fmt: skip
    except RuntimeError as e:
      raise DataError(f"No tokenizer of {vocab} pieces can be made of the texts: {e}") from e
  # It names the file of rules, which is gone, and whose name is always another.
  made = messages.ModelProto.FromString(model.getvalue())  # type: ignore[attr-defined]
  made.normalizer_spec.ClearField("normalization_rule_tsv")
  return made.SerializeToString(deterministic=True)
