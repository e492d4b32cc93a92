"""Prompts of files, steps and lengths."""

from fractions import Fraction
from pathlib import Path

import pytest

from hfjax.sampling import flags, requests
from hfjax.sampling.flags import UsageError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("p.txt", 'a red square\n\n  two, "words" \n'),
    ("p.jsonl", '{"prompt": "a red square", "id": 1}\n\n"two, \\"words\\""\n'),
    ("p.csv", 'id,Prompt \n1,a red square\n2,"two, ""words"""\n'),
  ],
)
def test_prompts_come_from_files_of_three_kinds(name, text):
  Path(name).write_text("\ufeff" + text, encoding="utf-8")
  assert requests.read_prompts(Path(name)) == ["a red square", 'two, "words"']


@pytest.mark.parametrize(
  ("name", "text", "sentence"),
  [
    ("p.jsonl", '"a"\n{"prompt": \n', "line 2, is no JSON"),
    ("p.jsonl", '{"text": "a"}', "line 1, has no prompt"),
    ("p.jsonl", '{"prompt": 3}', "line 1, has no prompt"),
    ("p.csv", "text,id\na,1", "columns text, id; one must be `prompt`"),
    ("p.csv", "", "one must be `prompt`"),
    ("p.csv", "prompt,id\na,1\n,2\n", "line 3, has no prompt"),
    ("p.csv", 'prompt\n"a"b\n', "is no CSV"),
  ],
)
def test_lines_that_hold_no_prompt_are_named(name, text, sentence):
  Path(name).write_text(text)
  with pytest.raises(UsageError, match=sentence):
    requests.read_prompts(Path(name))


@pytest.mark.parametrize(
  ("given", "want"),
  [("50", 50), ("4", 4), ("1000", (1000.0,)), ("1000,500", (1000.0, 500.0)), ("999", 999)],
)
def test_steps_are_a_number_or_a_list(given, want):
  flags.parse([f"--steps={given}"])
  assert requests.steps() == want


def test_lengths():
  for args, default, want in (
    ([], 0, 80),
    ([], 33, 33),
    ([], None, None),
    (["--seconds=2"], 33, 32),
    (["--frames=7"], None, 7),
    (["--endless"], 33, None),
    (["--seconds=0.01"], 0, 1),
  ):
    flags.parse(args)
    assert requests.length(Fraction(16), default) == want
