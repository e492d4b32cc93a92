"""The notebook runs as it stands, but for its installation."""

import ast
import json
import sys
import types
from pathlib import Path

import pytest

from hfjax import pipeline
from hfjax.data import shapes_words
from hfjax.video import read_video
from tests import shapes_model

NOTEBOOK = json.loads(
  (Path(__file__).resolve().parents[1] / "tools" / "colab" / "sample.ipynb").read_text()
)
CODE = {c["id"]: "".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"}


def test_it_is_a_notebook_without_outputs_whose_prompts_the_model_knows():
  assert NOTEBOOK["nbformat"] == 4 and len({c["id"] for c in NOTEBOOK["cells"]}) == 7
  for cell in NOTEBOOK["cells"]:
    assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
  texts = [
    x.value
    for code in CODE.values()
    for x in ast.walk(ast.parse(code))
    if isinstance(x, ast.Constant) and str(x.value).startswith("a large")
  ]
  assert len(texts) == 2
  for text in texts:
    shapes_words.read(text)


@pytest.mark.slow
def test_its_cells_run_in_order(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  if not (pipeline.EMBEDDED / "dit").is_dir():
    monkeypatch.setattr(pipeline, "EMBEDDED", shapes_model.write(tmp_path / "tiny"))
  shown = []
  display = types.ModuleType("IPython.display")
  display.Video = lambda path, embed, width, html_attributes: (path, embed)
  display.display = shown.append
  monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
  monkeypatch.setitem(sys.modules, "IPython.display", display)
  scope = {}
  for name, code in CODE.items():
    if name != "install":
      exec(code, scope)
  assert shown == [("first.mp4", True), ("switch.mp4", True)]
  assert read_video("first.mp4").frames.shape == (81, 128, 128, 3)
  assert read_video("switch.mp4").frames.shape == (108, 128, 128, 3)
  assert "189 frames so far, 11.8 s" in capsys.readouterr().out
