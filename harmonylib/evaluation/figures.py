"""The figures of the notebooks and the report (seaborn and matplotlib)."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from ..data.iharmony4_statistics import GENUINE, LEVELS

FOLDER = Path("reports/figures")


def style() -> None:
    """One look for every figure."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    np.random.seed(0)  # the jitter and error bars of seaborn draw from the global state
    plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 120, "axes.titlesize": 11, "axes.grid": True})


def _finished(figure):
    """Laid out, and closed for pyplot: a cell displays it, and the inline backend not once more when the cell ends."""
    figure.tight_layout()
    plt.close(figure)
    return figure


def save(figure, name: str):
    """The figure, written byte-stable as reports/figures/<name>.png: a cell that ends with this call displays it."""
    path = FOLDER / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    _finished(figure).savefig(path, bbox_inches="tight", metadata={"Software": None})
    return figure


def show(figure, name: str) -> None:
    """`save` a figure and display it in the notebook, where the cell goes on."""
    from IPython.display import display  # here: only notebooks have it

    display(save(figure, name))


def image_grid(rows, titles=(), row_labels=(), masks=None, size: float = 1.9):
    """A grid of HxWx3 images, a list per row; an (image, masks) pair is shown with its HxW bool masks outlined.

    titles: over the columns, or a list per row: over each image. masks: one per row, outlined in its first image.
    """
    over_each = bool(titles) and not isinstance(titles[0], str)
    shape = len(rows), max(map(len, rows))
    figure, axes = plt.subplots(*shape, squeeze=False, figsize=(size * shape[1], size * shape[0]))
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            own = masks[r : r + 1] if masks is not None and c == 0 else ()
            image, outlines = cell if isinstance(cell, tuple) else (cell, own)
            axes[r, c].imshow(image, interpolation="nearest")
            for mask, colour in zip(outlines, ("yellow", "cyan", "magenta", "lime"), strict=False):
                axes[r, c].contour(mask, levels=[0.5], colors=colour, linewidths=1)
            if over_each or titles and r == 0:
                axes[r, c].set_title(titles[r][c] if over_each else titles[c], fontsize=9 if over_each else None)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    for axis, label in zip(axes[:, 0], row_labels or (), strict=False):
        axis.set_ylabel(label, fontsize=9)
    return _finished(figure)


def diagram(boxes: dict[str, tuple[float, float]], arrows, size=(9, 2.6)):
    """A drawn idea: `boxes` {text: (x, y) of its middle}, and `arrows` (from, to, label) between them."""
    figure, axis = plt.subplots(figsize=size)
    box = {"boxstyle": "round,pad=.5", "facecolor": "#e8f4ec", "edgecolor": "none"}
    middle = {"ha": "center", "va": "center"}
    texts = {text: axis.text(*place, text, fontsize=10, bbox=box, **middle) for text, place in boxes.items()}
    for start, end, label in arrows:
        ends = {"patchA": texts[start].get_bbox_patch(), "patchB": texts[end].get_bbox_patch()}
        axis.annotate("", boxes[end], boxes[start], arrowprops={"arrowstyle": "-|>", "color": "#0b6e99"} | ends)
        place = np.mean([boxes[start], boxes[end]], axis=0)
        axis.text(*place, label, fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, **middle)
    low, high = np.min(list(boxes.values()), axis=0), np.max(list(boxes.values()), axis=0)
    axis.set(xlim=(low[0] - 0.8, high[0] + 0.8), ylim=(low[1] - 0.4, high[1] + 0.4))
    axis.axis("off")
    return _finished(figure)


def error_map(output: np.ndarray, real: np.ndarray, ceiling: float = 60.0) -> np.ndarray:
    """Mean absolute difference over RGB as an HxWx3 picture: black is 0, yellow is `ceiling` grey levels or more."""
    error = np.abs(output.astype(float) - real.astype(float)).mean(-1) / ceiling
    return (plt.get_cmap("inferno")(np.clip(error, 0, 1))[..., :3] * 255).astype(np.uint8)


def training_curve(history, key: str = "loss", title: str = "", log: bool = True):
    """One quantity of a training history over steps, or of several: {label: history}."""
    figure, axis = plt.subplots(figsize=(6, 2.8))
    for label, entries in (history if isinstance(history, dict) else {None: history}).items():
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, label=label)
    axis.set(xlabel="training step", ylabel=key.replace("_", " "), title=title, yscale="log" if log else "linear")
    if isinstance(history, dict):
        axis.legend()
    return _finished(figure)


def cumulative_foreground(ratios: dict[str, np.ndarray]):
    """Cumulative distribution of the foreground area ratio per data set (DiffHarmony++ Figure 2)."""
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    for name, values in ratios.items():
        sns.ecdfplot(x=np.asarray(values), ax=axis, label=name)
    axis.axvline(0.2, color="grey", linestyle=":", linewidth=1)
    axis.set(xlabel="foreground area ratio", ylabel="share of images at or below", xlim=(0, 1))
    axis.legend()
    return _finished(figure)


def intervals(estimates: dict, label: str, zero: bool = False, axis=None):
    """A dot and its interval per name: {name: (mean, lo, hi)}, each None or NaN where there is none; axis: where to."""
    axis = axis or plt.subplots(figsize=(7, 0.42 * len(estimates) + 1))[1]
    means, *ends = np.array(list(estimates.values()), float).T
    axis.hlines(range(len(means)), *ends, color="black", linewidth=1.2)
    axis.plot(means, range(len(means)), "o", color="C0", markersize=7)
    if zero:
        axis.axvline(0, color="grey", linewidth=1)
    axis.set(yticks=range(len(estimates)), yticklabels=estimates, ylim=(len(estimates) - 0.5, -0.5), xlabel=label)
    return _finished(axis.figure)


def scatter(table, x: str, y: str, hue: str, labels: tuple[str, str], zero: bool = False):
    """Rows of a table as dots, coloured by a column; labels of both axes."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    sns.scatterplot(table, x=x, y=y, hue=hue, style=hue, ax=axis)
    if zero:
        axis.axhline(0, color="grey", linewidth=1)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    sns.move_legend(axis, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return _finished(figure)


def beside_genuine(measured):
    """Cumulative shares of composites by fMSE and by foreground share, with iHarmony4's own quantiles as dots.

    measured: rows with "subset", "fmse" and "share" (its foreground's share of the picture).
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    titles = {"fmse": "fMSE of the foreground", "share": "share of the picture that the foreground covers"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for (subset, rows), colour in zip(measured.groupby("subset"), sns.color_palette(), strict=False):
            sns.ecdfplot(rows, x=name, ax=axis, color=colour, label=subset)
            if subset in GENUINE:
                axis.plot(getattr(GENUINE[subset], name), LEVELS, "o", color=colour)
        axis.set(xscale="log", xlabel=title, ylabel="share of composites")
    for axis, ticks in zip(axes, ((100, 300, 1000, 3000), (0.01, 0.03, 0.1, 0.3)), strict=True):
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axes[1].legend(title="made (lines), genuine (dots)", loc="center left", bbox_to_anchor=(1, 0.5))
    return _finished(figure)
