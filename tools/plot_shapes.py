"""Plots of how the model of the shapes world was trained: `python tools/plot_shapes.py DIR`.

DIR has logs/STAGE.jsonl, metrics of runs, and details/NAME.json of tools/score_shapes.py; the plots
curves.png and accuracy.png are written beside them. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import json
import sys
from pathlib import Path

CURVES = {
  "vae": ("autoencoder/psnr", "autoencoder: PSNR, dB", False),
  "vae_long": ("autoencoder/psnr", "autoencoder, long clips: PSNR, dB", False),
  "teacher_short": ("student/unweighted_loss", "teacher, beginnings: flow-matching loss", True),
  "teacher": ("student/unweighted_loss", "teacher: flow-matching loss", True),
  "causal": ("student/unweighted_loss", "causal teacher: flow-matching loss", True),
  "ode": ("student/loss", "ode: regression loss", True),
  "stage1": ("student/score_gradient", "stage 1: score difference", True),
  "stage2": ("student/score_gradient", "stage 2: score difference", True),
}
_ORDER = ("judge", "vae", "teacher", "causal", "ode", "stage1", "student")
_SMOOTH = 15  # rows that a point is the mean of


def rows(path: Path) -> list[dict]:
  """Lines of a file of metrics."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def curves(folder: Path, plt):
  """A panel for each stage that has a log."""
  there = {k: v for k, v in CURVES.items() if (folder / "logs" / f"{k}.jsonl").is_file()}
  if not there:
    return
  figure, axes = plt.subplots(1, len(there), figsize=(4 * len(there), 3), squeeze=False)
  for axis, (stage, (key, title, is_log)) in zip(axes[0], there.items(), strict=True):
    found = [(r["step"], r[key]) for r in rows(folder / "logs" / f"{stage}.jsonl") if key in r]
    steps, values = zip(*found, strict=True)
    means = [
      sum(values[max(0, i - _SMOOTH + 1) : i + 1]) / len(values[max(0, i - _SMOOTH + 1) : i + 1])
      for i in range(len(values))
    ]
    axis.plot(steps, values, alpha=0.3)
    axis.plot(steps, means)
    axis.set(title=title, xlabel="step", yscale="log" if is_log else "linear")
    axis.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(folder / "curves.png", dpi=100)


def accuracies(folder: Path, plt):
  """Shares of videos in which all is right, with 95 % intervals, and of single attributes."""
  found = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "details").glob("*.json"))}
  if not found:
    return
  figure, axis = plt.subplots(figsize=(max(6, 1.8 * len(found)), 3.5))
  place = lambda name: next((i for i, x in enumerate(_ORDER) if name.startswith(x)), len(_ORDER))
  names = sorted(found, key=place)  # of equals as before
  for i, name in enumerate(names):
    d = found[name]
    error = [[d["accuracy"] - d["low"]], [d["high"] - d["accuracy"]]]
    axis.bar(i, d["accuracy"], color="tab:blue", alpha=0.7, yerr=error, capsize=4)
    for j, (attribute, share) in enumerate(d["attributes"].items()):
      axis.plot(
        i - 0.3 + 0.1 * j, share, ".", color=f"C{j + 1}", label=attribute if not i else None
      )
  axis.set(ylim=(0, 1.02), ylabel="share of videos")
  axis.set_xticks(range(len(names)), [n.replace("_accuracy", "").replace("_", " ") for n in names])
  axis.legend(fontsize=7, ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
  axis.grid(alpha=0.3, axis="y")
  figure.tight_layout()
  figure.savefig(folder / "accuracy.png", dpi=100)


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", metavar="DIR")
  folder = Path(parser.parse_args(argv).folder)
  try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
  except ImportError:
    print("plot_shapes: matplotlib is missing; install requirements-dev.txt.", file=sys.stderr)
    return 2
  if not (folder / "logs").is_dir() and not (folder / "details").is_dir():
    print(f"plot_shapes: {folder} has no logs or details to plot.", file=sys.stderr)
    return 2
  curves(folder, plt)
  accuracies(folder, plt)
  return 0


if __name__ == "__main__":
  sys.exit(main())
