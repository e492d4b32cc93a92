"""Lines of files: what is bad is named, and the rest is read."""

import pytest

from hfjax.data import rows
from hfjax.data.rejects import DataError, Rejects


@pytest.mark.parametrize(
  ("name", "content", "good", "bad"),
  [
    ("p.txt", "a\r\n\nb\xff\nc".encode("latin1"), ["a", "c"], ["line 3, is no UTF-8"]),
    ("p.jsonl", b'"a"\n{"prompt": 3}\n[]\n{\n{"prompt": "\xe2\x80\xa8 b"}', ["a", "\u2028 b"],
     ["line 2, has no prompt", "line 3, has no prompt", "line 4, is no JSON"]),
    ("p.csv", b'id,prompt\n1,a\n2,"b"c\n3\n\n4,d\n', ["a", "d"],
     ["line 3, is no CSV", "line 4, has no prompt"]),
  ],
)  # fmt: skip
def test_bad_lines_are_named_and_the_others_are_read(tmp_path, name, content, good, bad):
  path = tmp_path / name
  path.write_bytes(content)
  rejects = Rejects("skip")
  assert rows.read_prompts(path, rejects.add) == good
  assert rejects.count == len(bad)
  for sentence, words in zip(rejects.first, bad, strict=True):
    assert str(path) in sentence and words in sentence
  with pytest.raises(DataError, match=bad[0]):
    rows.read_prompts(path, Rejects("fail").add)


def test_two_columns_are_read_in_the_order_asked_for(tmp_path):
  (tmp_path / "c.csv").write_text("Caption ,file\nx y,1.mp4\n,2.mp4\n")
  (tmp_path / "c.jsonl").write_text('{"caption": "x y", "file": "1.mp4"}\n{"file": "2.mp4"}\n"a"')
  for name, count in (("c.csv", 1), ("c.jsonl", 2)):
    rejects = Rejects("skip")
    found = rows.read_rows(tmp_path / name, ("file", "caption"), rejects.add)
    assert found == [("1.mp4", "x y")] and rejects.count == count
    assert "has no caption" in rejects.first[0]


def test_the_first_ten_are_named_and_each_counts_once():
  rejects = Rejects("skip")
  named = [rejects.add(f"{i} is bad.", key=i) for i in range(13)]
  assert named == [True] * 10 + [False] * 3
  rejects.add("2 is bad.", key=2)
  assert rejects.count == 13
  lines = rejects.report().splitlines()
  assert lines[0] == "13 examples are left out:" and lines[-1].strip() == "... and 3 more."
  assert [line.strip() for line in lines[1:-1]] == [f"{i} is bad." for i in range(10)]
  assert Rejects().report() == ""
  with pytest.raises(DataError, match='give "fail" or "skip"'):
    Rejects("ignore")
