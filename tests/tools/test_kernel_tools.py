"""The benchmark of the kernels and their check on a GPU, on the processor at small sizes."""

import json

import benchmark
import check_gpu
import kernel_cases
import numpy as np
import pytest

from pallas_kernels import xla

CASES = ["--backends", "xla", "--repeats", "2", "--seed", "1", "--cases", "short"]


@pytest.fixture(autouse=True)
def short_rollout(monkeypatch):
  latents = np.ones((1, 2), np.float32)
  monkeypatch.setattr(check_gpu, "sample", lambda backend, dtype: latents)
  monkeypatch.setattr(check_gpu, "STREAM", kernel_cases.SMALL)


def test_lists_are_distinct_ascending_and_end_with_the_ragged_block():
  inputs = kernel_cases.draw(kernel_cases.SMALL, 0.4)
  index = np.asarray(inputs.index)
  assert index.shape == (1, 2, 5, 3) and np.all(index[..., -1] == 7)  # 4 + 4 blocks
  assert np.all(np.diff(index, axis=-1) > 0) and index.min() >= 0
  assert len(np.unique(index[..., 0])) > 1


@pytest.mark.slow
def test_the_benchmark_writes_its_figures(tmp_path, capsys):
  out = tmp_path / "figures.json"
  assert benchmark.main(["kernels", "--ratios", "0.2", "--out", str(out), "--commit", "abc"]) == 0
  figures = json.loads(out.read_text())
  for key in ("forward_64x64_ms", "backward_64x64_ms", "block_map_ms", "forward_128x64_ms",
              "two_buffer_forward_64x64_ms", "dense_xla_ms"):  # fmt: skip
    assert figures[key] > 0, key
  assert figures["command"] == "python tools/benchmark.py kernels --ratios 0.2"
  assert figures["size"]["s"] == kernel_cases.SMALL.s  # what was measured is on record
  assert figures["commit"] == "abc" and "xla" in figures["backends"]
  text = capsys.readouterr().out
  assert "tpu is left out: it runs on TPUs." in text and "TFLOP/s" in text


def test_a_ratio_out_of_range_is_refused(capsys):
  assert benchmark.main(["kernels", "--ratios", "1.5"]) == 2
  assert "every ratio must be" in capsys.readouterr().err


def test_the_check_passes_what_is_right(tmp_path, capsys):
  out = tmp_path / "check.json"
  assert check_gpu.main([*CASES, "--out", str(out)]) == 0
  assert json.loads(out.read_text())["ok"] is True
  assert capsys.readouterr().out.count(" ok") == 4  # two dtypes, block map, rollout


def test_a_check_that_is_stopped_keeps_its_figures(tmp_path, monkeypatch):
  def stop(seed):
    raise KeyboardInterrupt

  monkeypatch.setattr(check_gpu, "check_block_map", stop)
  out = tmp_path / "check.json"
  with pytest.raises(KeyboardInterrupt):
    check_gpu.main([*CASES, "--out", str(out), "--commit", "abc"])
  figures = json.loads(out.read_text())
  assert figures["ok"] is None and figures["commit"] == "abc"
  assert set(figures["xla"]) == {"short, bfloat16", "short, float32"}


@pytest.mark.parametrize("what", ["out", "lse", "dk", "bits"])
def test_the_check_finds_what_is_wrong(what, monkeypatch, capsys):
  forward, backward, calls = xla.forward, xla.backward, []

  def wrong_forward(problem, inputs):
    out, lse = forward(problem, inputs)
    half = inputs.q.dtype == "bfloat16"
    return (1.02 * out if what == "out" and half else out), lse + 0.001 * (what == "lse" and half)

  def wrong_backward(problem, inputs, *rest):
    got = backward(problem, inputs, *rest)
    return got._replace(k=1.02 * got.k) if what == "dk" and got.k.dtype == "bfloat16" else got

  run = check_gpu.run

  def wrong_run(p, inputs, dout, repeats):
    named, same = run(p, inputs, dout, repeats)
    calls.append(same)
    return named, same and not (what == "bits" and repeats > 1)

  monkeypatch.setattr(xla, "forward", wrong_forward)
  monkeypatch.setattr(xla, "backward", wrong_backward)
  monkeypatch.setattr(check_gpu, "run", wrong_run)
  assert check_gpu.main(CASES) == 1
  assert "FAIL" in capsys.readouterr().out and all(calls)


def test_a_backend_that_serves_no_case_does_not_pass(monkeypatch, capsys):
  refuse = lambda problem, inputs: None if inputs.q.shape[1] == 64 else "it is a quiet day."
  monkeypatch.setattr(xla, "unsupported", refuse)
  assert check_gpu.main(CASES) == 1
  assert "serves none of the cases FAIL" in capsys.readouterr().out


def test_without_a_kernel_to_check_it_says_so(capsys):
  assert check_gpu.main([]) == 2
  assert "no backend to check" in capsys.readouterr().err
