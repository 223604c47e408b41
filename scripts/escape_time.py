"""Measure how long an optimizer stays in a minimum: mean escape time against sharpness.

    python scripts/escape_time.py --output_dir outputs/escape

Theory (``hf_dualadam/lab/escape.py`` has the formulas): an optimizer that multiplies gradients by a mobility P leaves
a minimum of sharpness H after tau = tau_0 * exp(2 B dL / (eta P H)) steps. So log(tau / tau_0) is proportional to H^-1
for SGD (P = 1), H^(-1/2) for Adam (P = v^(-1/2)) and H^(-3/2) for InvAdam (P = v^(1/2)). DualAdam at a fixed alpha
lies in between: the larger alpha, the sooner it leaves sharp minima and the longer it stays in flat ones. tau_0 is the
theoretical value; only the slopes are fitted. Their confidence intervals cover the scatter of the points; the theory
itself is an approximation for high barriers and small steps, accurate to a few percent here.

The theory holds for barriers of 3 temperatures or more. The fitted points end at 7 temperatures, above which escapes
are too rare to count here. It does not hold

- for barriers below about one temperature, which do not confine a particle: the waiting time is not exponential, and
  tau deviates from the line (hollow points in the plot; log(tau / tau_0) is 30 to 50 % too large at half of one);
- when eta * P * H, the fraction of the distance to the minimum covered in a step, approaches 1, or when the gradient
  of the barrier is not small compared with the noise (B * dL of order 1): v is then larger than H / B, and P differs
  from the theory's;
- when v has not converged to H / B (early in training, or with beta2 near 1 and escapes within 1/(1 - beta2) steps),
  or when the noise does not grow with the sharpness;
- for DualAdam in real networks: its inverse part matters only where v is near 1, as here. With the gradients of real
  networks (v of 1e-2 and far below), its mobility is Adam's, (1 - alpha) v^(-1/2), unless ``normalize_inverse`` is
  set.

Writes escape_times.csv (every point), escape_times.json (slopes with 95 % confidence intervals), escape_times.png and
trajectories.png (particles that start in the sharper of two valleys). About a minute on two cores.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from pathlib import Path

from hf_dualadam.extras import require_or_exit

require_or_exit("finetune")

import matplotlib
import torch

from hf_dualadam.finetuning.config import InputError
from hf_dualadam.finetuning.training import check_writable
from hf_dualadam.lab.escape import (
    BARRIER,
    FLAT,
    OUTSIDE,
    RULES,
    SHARP,
    EscapeTime,
    Rule,
    ValleyWalk,
    escape_times,
    fit_slope,
    two_valleys,
    walk_valleys,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import BoundaryNorm  # noqa: E402

OUTPUTS = ("escape_times.csv", "escape_times.json", "escape_times.png", "trajectories.png")
TITLES = {"sgd": "SGD", "adam": "Adam", "invadam": "InvAdam", "dualadam": "DualAdam"}
MAIN_ALPHA = 0.5  # its slope is reported as DualAdam's
VALLEY_STEPS = 3000


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the four files")
    parser.add_argument("--particles", type=int, default=1024, help="particles per sharpness and seed")
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="each repeats every measurement")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run")
    args = parser.parse_args(argv)
    for name, most in (("particles", 10**8), ("steps", 10**10)):
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"argument --{name}: {getattr(args, name)} - should be 1 or more, and at most {most}")
    if not all(0 <= seed < 2**63 for seed in args.seeds) or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"argument --seeds: {args.seeds} - should be distinct numbers, 0 or more and below 2**63")
    try:
        check_writable(args.output_dir)
    except InputError as error:
        parser.error(f"argument --{error}")
    existing = [name for name in OUTPUTS if (args.output_dir / name).exists()]
    if existing and not args.overwrite:
        parser.error(f"argument --output_dir: {args.output_dir} already has {', '.join(existing)}; add --overwrite")
    return args


def label(rule: Rule) -> str:
    return TITLES[rule.name] + (f", alpha = {rule.alpha:g}" if rule.name == "dualadam" else "")


def summarize(points: dict[Rule, list[EscapeTime]]) -> dict[str, dict]:
    """Slope, confidence interval and theory per optimizer; DualAdam's also per alpha."""
    slopes = {rule: fit_slope(points[rule]) | {"theory": rule.slope} for rule in RULES}
    summary = {rule.name: slopes[rule] for rule in RULES if rule.name != "dualadam"}
    by_alpha = {rule.alpha: slopes[rule] for rule in RULES if rule.name == "dualadam"}
    summary["dualadam"] = by_alpha[MAIN_ALPHA] | {"alpha": MAIN_ALPHA, "by_alpha": by_alpha}
    return summary


def print_summary(points: dict[Rule, list[EscapeTime]]) -> None:
    print("Slope of log(log(tau / tau_0)) against log(sharpness), barriers of 3 to 7 temperatures")
    for rule in RULES:
        fit = fit_slope(points[rule])
        low, high = fit["ci95"]
        print(f"  {label(rule):24} {fit['slope']:6.3f}  95 % CI [{low:6.3f}, {high:6.3f}]  theory {rule.slope:6.3f}")
    print("Outside the theory's range: measured / theoretical log(tau / tau_0) at low barriers (in temperatures)")
    for rule in RULES:
        ratios = [(theory, [p.log_ratio / theory for p in points[rule] if p.theory == theory]) for theory in OUTSIDE]
        means = [f"{theory:g}: {statistics.fmean(of_seeds):.2f}" for theory, of_seeds in ratios]
        print(f"  {label(rule):24} " + "  ".join(means))


def write_csv(points: dict[Rule, list[EscapeTime]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(EscapeTime._fields)
        writer.writerows(point for rule in RULES for point in points[rule])


def plot_escape_times(points: dict[Rule, list[EscapeTime]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 6.5), layout="constrained")
    for index, rule in enumerate(RULES):
        color = f"C{index}"
        ordered = sorted(points[rule], key=lambda point: point.sharpness)
        axis.plot([p.sharpness for p in ordered], [p.theory for p in ordered], color=color, linewidth=1.2)
        slope = fit_slope(points[rule])["slope"]
        text = f"{label(rule)}: slope {slope:.2f} (theory {rule.slope:g})"
        for fitted, fill in ((True, color), (False, "none")):
            chosen = [p for p in ordered if p.fitted is fitted and p.log_ratio > 0 and math.isfinite(p.log_ratio)]
            axis.scatter(
                [p.sharpness for p in chosen],
                [p.log_ratio for p in chosen],
                s=26,
                edgecolors=color,
                facecolors=fill,
                label=text if fitted else None,
            )
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("sharpness H of the minimum (second derivative of the loss)")
    axis.set_ylabel("log(tau / tau_0): escape time over attempt time; in theory dL / T")
    axis.set_yticks([0.5, 1, 2, 3, 5, 7], labels=["0.5", "1", "2", "3", "5", "7"])
    axis.set_xticks([0.5, 1, 2, 5, 10, 30, 100], labels=["0.5", "1", "2", "5", "10", "30", "100"])
    axis.minorticks_off()
    axis.set_title(
        "Mean escape time against sharpness\nlines: theory; filled points: fitted; hollow: outside its regime"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_trajectories(walks: dict[Rule, ValleyWalk], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, sharey=True, layout="constrained")
    x, y = torch.meshgrid(torch.linspace(-2, 3.5, 240), torch.linspace(-1.6, 1.6, 160), indexing="xy")
    loss = two_valleys(torch.stack([x, y], dim=-1)) / BARRIER
    levels = [0, 0.25, 0.5, 0.75, 1, 2, 4, 8]
    for axis, (rule, walk) in zip(axes.flat, walks.items()):
        norm = BoundaryNorm(levels, ncolors=256, extend="max")  # equal steps of gray, so that the barrier is visible
        shading = axis.contourf(x, y, loss, levels=levels, norm=norm, cmap="Greys", extend="max", alpha=0.6)
        for index in range(walk.paths.shape[1]):
            path_x, path_y = walk.paths[:, index].unbind(-1)
            axis.plot(path_x, path_y, color=f"C{index}", linewidth=0.4, alpha=0.8)
            axis.plot(path_x[-1], path_y[-1], "o", color=f"C{index}", markeredgecolor="black")
        axis.plot(*walk.paths[0, 0], "*", color="white", markeredgecolor="black", markersize=14)
        axis.set(xlim=(-2, 3.5), ylim=(-1.6, 1.6))
        axis.set_title(f"{label(rule)}: {walk.share_flat:.0%} end in the flat valley")
    figure.supxlabel(f"x: sharp valley (H = {SHARP:g}) on the left, flat valley (H = {FLAT:g}) on the right")
    figure.supylabel("y: across the valleys' common axis")
    figure.suptitle(
        f"Leaving a sharp valley: {VALLEY_STEPS:,} steps, same learning rate and noise, three of 512 particles\n"
        "(star: common start; dots: ends)"
    )
    figure.colorbar(shading, ax=axes, label="loss in units of the barrier between the valleys", format="%g")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    points = {}
    for rule in RULES:
        points[rule] = [point for seed in args.seeds for point in escape_times(rule, args.particles, args.steps, seed)]
        print(f"{label(rule)}: {sum(point.escapes for point in points[rule]):,} escapes", flush=True)
    try:
        summary = summarize(points)
    except ValueError as error:
        sys.exit(f"escape_time.py: {error}")
    print_summary(points)
    write_csv(points, args.output_dir / "escape_times.csv")
    (args.output_dir / "escape_times.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_escape_times(points, args.output_dir / "escape_times.png")
    walks = {rule: walk_valleys(rule, steps=VALLEY_STEPS) for rule in RULES if rule.alpha in (None, 0.0, 0.5, 1.0)}
    plot_trajectories(walks, args.output_dir / "trajectories.png")
    print(f"Written to {args.output_dir}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
