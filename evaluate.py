"""What an encoder has learned, in numbers and in pictures.

    h = embed(network, dataset.test_x)                          # [N,D], frozen encoder, eval mode
    linear_probe(train_h, train_y, h, y), knn_accuracy(train_h, train_y, h, y)
    cluster_scores(h, y)                                        # {"ari", "nmi", "silhouette", "accuracy"}
    forgetting(per_class_accuracy), novelty_auroc(score, is_new)

`python evaluate.py RUN [RUN ...]` compares finished runs: a table (mean ± std over the seeds of the same settings), comparison.png,
progress.png and, of several shares of labels, budgets.png.
`python evaluate.py RUN --compact FILE` writes a run's network without its dead filters.
"""

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Six colours of Okabe & Ito's and four of Tol's, which colour-blind people can tell apart, and markers so that colour is not needed.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999933", "#332288", "#882255", "#44AA99")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")
STAGE_SHADES = ("#FFFFFF", "#E8EEF5", "#F7EBD8", "#E4F1EA", "#F5E3EC")

# ---- accuracy -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(network: nn.Module, x: Tensor, part: str = "h", batch_size: int = 512, bf16: bool = False) -> Tensor:
    """What a network makes of images uint8 or float [N,3,H,W], in eval mode: float32, on their device.

    part: "h" (embeddings [N,D]), "z" (unit rows) or "logits" [N,C]. The network goes back to the mode it was in, train or eval.
    """
    place = ("h", "z", "logits").index(part)
    training = network.training
    network.eval()
    out = []
    for images in x.split(batch_size):
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            out.append(network(images.contiguous(memory_format=torch.channels_last))[place].float())
    network.train(training)
    return torch.cat(out)


def linear_probe(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, l2: float | None = None, steps: int = 100) -> float:
    """Test accuracy (0..1) of multinomial logistic regression on frozen embeddings [N,D], standardised.

    Minimises mean cross-entropy + l2 |W|^2 with L-BFGS; scikit-learn's LogisticRegression with C = 1 / (2 l2 N) is the same.
    l2: if None, the best of four on a random fifth of the training images, before all of them are used.
    """
    if l2 is None:
        order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0)).to(train_y.device)
        held, rest = order[: max(1, len(order) // 5)], order[len(order) // 5 :]
        parts = train_h[rest], train_y[rest], train_h[held], train_y[held]
        l2 = max((1e-1, 1e-2, 1e-3, 1e-4), key=lambda value: linear_probe(*parts, value, steps))
    mean, std = train_h.mean(0), train_h.std(0, correction=0).clamp(min=1e-6)
    train_h, test_h = (train_h - mean) / std, (test_h - mean) / std
    linear = nn.Linear(train_h.shape[1], int(train_y.max()) + 1).to(train_h.device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(train_h), train_y) + l2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (linear(test_h).argmax(1) == test_y).float().mean().item()


@torch.no_grad()
def knn_accuracy(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.1) -> float:
    """Test accuracy (0..1) of the k nearest training embeddings by cosine, voting with weight exp(cosine / temperature)."""
    train_h, test_h = F.normalize(train_h, dim=1), F.normalize(test_h, dim=1)
    right = 0
    for h, y in zip(test_h.split(250), test_y.split(250), strict=True):
        similarity, near = (h @ train_h.T).topk(min(k, len(train_h)), dim=1)  # (b, k)
        votes = torch.zeros(len(h), int(train_y.max()) + 1, device=h.device)
        votes.scatter_add_(1, train_y[near], (similarity / temperature).exp())
        right += int((votes.argmax(1) == y).sum())
    return right / len(test_y)


def class_accuracy(predicted: Tensor, y: Tensor, num_classes: int) -> list[float]:
    """Accuracy (0..1) of each class; NaN for a class without images."""
    right = (predicted == y).double()
    count = y.bincount(minlength=num_classes)
    return (torch.zeros(num_classes, dtype=torch.double, device=y.device).index_add_(0, y, right) / count).tolist()


def forgetting(accuracy: Sequence[Sequence[float]]) -> np.ndarray:
    """Per class, best accuracy so far minus accuracy now: accuracy [epochs, classes] in 0..1 -> [classes]."""
    accuracy = np.asarray(accuracy, dtype=float)
    return np.fmax.reduce(accuracy, 0) - accuracy[-1]  # fmax passes over NaN: no test image of that class


def novelty_auroc(score: Tensor, is_new: Tensor) -> float:
    """How well a score [N] (higher: more novel) tells new images from known ones (is_new: bool [N]): area under the ROC, 0..1."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_new.cpu().numpy(), score.cpu().numpy()))


# ---- clusters -------------------------------------------------------------------------------------------------------


def cluster_scores(h: Tensor, y: Tensor, seed: int = 0, sample: int = 2000) -> dict[str, float]:
    """k-means on the unit embeddings h [N,D], one cluster per class in y [N], against the classes.

    ari (-0.5..1), nmi (0..1), accuracy (0..1, under the best one-to-one match of clusters and classes) and the silhouette
    (-1..1) of the clusters on a fixed sample. Read accuracy together with ari: alone it hides a collapse.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    unit, y = F.normalize(h.float(), dim=1).cpu().numpy(), y.cpu().numpy()
    _, y = np.unique(y, return_inverse=True)
    found = KMeans(int(y.max()) + 1, n_init=10, random_state=seed).fit_predict(unit)
    table = np.zeros((found.max() + 1, y.max() + 1), dtype=int)
    np.add.at(table, (found, y), 1)
    chosen = np.random.default_rng(seed).permutation(len(y))[:sample]
    several = 1 < len(np.unique(found[chosen])) < len(chosen)
    return {
        "ari": float(adjusted_rand_score(y, found)),
        "nmi": float(normalized_mutual_info_score(y, found)),
        "silhouette": float(silhouette_score(unit[chosen], found[chosen])) if several else 0.0,
        "accuracy": float(table[linear_sum_assignment(-table)].sum() / len(y)),
    }


# ---- figures --------------------------------------------------------------------------------------------------------


@contextmanager
def figure(path: str | Path, width: float, height: float, rows: int = 1, columns: int = 1, **options) -> Iterator[tuple]:
    """A matplotlib figure that needs no screen, and its axes, to be drawn on and then written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with plt.rc_context(plain | {"font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9}):
        fig, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
        try:
            yield fig, axes
            fig.savefig(path, dpi=150)
        finally:
            plt.close(fig)


BESIDE = dict(loc="center left", bbox_to_anchor=(1.01, 0.5))  # where a legend is in nobody's way


def style(i: int) -> dict:
    """Colour and marker of the i-th line."""
    return dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])


def column(rows: list[dict], key: str) -> np.ndarray:
    """A column of log.csv as numbers, NaN where there is none."""
    return np.array([row[key] for row in rows], dtype=float)


def whole_numbers(ax) -> None:
    """Only whole numbers along the x axis: epochs have no fractions."""
    ax.xaxis.get_major_locator().set_params(integer=True)


def shade_stages(ax, x: Sequence[float], names: Sequence[str], named: bool) -> None:
    """Tint the background by stage and, if `named`, write the stage's name along the top, at two heights in turn."""
    starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
    half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
    for n, i in enumerate(starts):
        left = x[i] - half
        right = x[starts[n + 1]] - half if n + 1 < len(starts) else x[-1] + half
        ax.axvspan(left, right, color=STAGE_SHADES[n % len(STAGE_SHADES)], zorder=0, linewidth=0)
        if named:
            place = ((left + right) / 2, 1.01 + 0.04 * (n % 2))
            ax.text(*place, names[i], transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
    ax.set_xlim(x[0] - half, x[-1] + half)


def draw_curves(rows: list[dict], classes: Sequence[str], known: int, path: str | Path) -> None:
    """The run over its epochs: accuracy by class, losses, labels and pseudo-labels. rows: those of log.csv."""
    x, met = column(rows, "epoch"), column(rows, "classes")
    with figure(path, 9, 9.5, 3, sharex=True, height_ratios=(5, 3, 3)) as (_, axes):
        for c, name in enumerate(classes if len(classes) <= len(COLOURS) else []):
            y = np.where((c < met) & ~np.isnan(column(rows, "accuracy")), column(rows, f"accuracy_{name}"), np.nan)
            late = dict(label=name) if c < known else dict(label=f"{name} (late)", linestyle="--")
            axes[0].plot(x, y, linewidth=1.1, alpha=0.9, markevery=(c % 4, 4), markersize=4, **style(c), **late)
        axes[0].plot(x, column(rows, "accuracy"), color="black", linewidth=2.5, label="all, also\nthose to come")
        axes[0].set(ylabel="test accuracy of the head", ylim=(-0.02, 1.02))
        for i, term in enumerate(key for key in rows[0] if key.startswith("loss_")):
            if not np.isnan(y := column(rows, term)).all():
                axes[1].plot(x, y, label=term.removeprefix("loss_"), markersize=3, **style(i))
        axes[1].set(ylabel="loss, unweighted", yscale="log")
        axes[2].plot(x, column(rows, "labelled"), color="black", linewidth=2, label="images with a known label")
        told = {"pseudo_accuracy": "pseudo-labels right", "pseudo_coverage": "pseudo-labels with confidence > 0.8"}
        for i, (key, label) in enumerate(told.items()):
            if not np.isnan(y := column(rows, key)).all():
                axes[2].plot(x, y, label=label, markersize=3, **style(i))
        axes[2].set(ylabel="share", xlabel="epoch", ylim=(-0.02, 1.02))
        for ax in axes:
            ax.legend(**BESIDE)
            shade_stages(ax, x, [row["stage"] for row in rows], named=ax is axes[0])
        whole_numbers(axes[0])


def unit_lives(rows: list[dict], events: list[dict], classes: Sequence[str]) -> list[list[tuple[int, int | None, dict | None]]]:
    """Of each unit: from which epoch on it was whose (a class, None: it had no name, -1: nobody's), and the event that made it so."""
    first_label = next((row["epoch"] for row in rows if row["labels"]), rows[-1]["epoch"] + 1)
    lives = [[(first_label, c, None)] for c in range(rows[0]["units"])]
    nameless = {"opened": None, "released": -1}
    for event in (event for event in events if event["unit"] is not None):
        lives += [[] for _ in range(event["unit"] + 1 - len(lives))]
        owner = nameless[event["event"]] if event["event"] in nameless else classes.index(event["class"])
        lives[event["unit"]].append((event["epoch"], owner, event))
    return lives


def draw_life(rows: list[dict], events: list[dict], classes: Sequence[str], known: int, path: str | Path) -> None:
    """The life of the head: which unit stands for what in each epoch, and how well the late classes and the unknown are told.

    rows: those of log.csv; events: those of events.csv. A hatched bar is a unit that has no name yet.
    """
    x, last, lives = column(rows, "epoch"), rows[-1]["epoch"], unit_lives(rows, events, classes)
    shown = [u for u, life in enumerate(lives) if len(lives) <= 25 or life[-1][2]]  # of a large head those that something happened to
    hatched = dict(facecolor="white", hatch="////", edgecolor="#777777")
    box = dict(facecolor="white", alpha=0.85, edgecolor="none", boxstyle="round,pad=0.1")
    tall = 0.27 * len(shown)
    with figure(path, 9, 3.6 + tall, 2, sharex=True, height_ratios=(1.2 + tall, 2.6)) as (fig, (above, below)):
        for line, life in enumerate(lives[unit] for unit in shown):
            for (start, owner, event), end in zip(life, [*(s for s, *_ in life[1:]), last + 1], strict=True):
                if owner == -1 or end <= start:  # nobody's
                    continue
                bar = hatched if owner is None else dict(color=COLOURS[owner % len(COLOURS)])
                above.barh(line, end - start, left=start - 0.5, height=0.7, **bar)
                if owner is None:  # two short lines, for these bars are short
                    text = f"{100 * event['purity']:.0f} %\n{event['class']}"
                    place = dict(x=(start + end) / 2 - 0.5, ha="center", fontsize=7, linespacing=0.95)
                else:
                    text, place = classes[owner], dict(x=start - 0.2, ha="left", fontsize=8)
                above.text(y=line, s=text, va="center", bbox=box, **place)
        arrival = {e["class"]: e["epoch"] for e in events if e["event"] == "arrived"}
        for epoch in (epochs := sorted(set(arrival.values()))):
            above.axvline(epoch - 0.5, color="black", linewidth=0.8, linestyle=":")
            names = [name for name, when in arrival.items() if when == epoch]
            text = f"{names[0]}\narrives" if len(names) == 1 else f"{len(names)}\narrive"
            if len(epochs) <= 10:
                above.text(epoch - 0.5, len(shown) - 0.3, text, ha="center", va="bottom", fontsize=8)
        if any(event["event"] == "opened" for event in events):
            above.barh(0, 0, label="opened for what has no name, and what it truly is", **hatched)
        above.set(ylabel="unit", ylim=(-0.6, len(shown) - 0.4))
        above.set_yticks(range(len(shown)), shown)
        for c in range(known, min(len(classes), known + 6)):
            y = np.where(x >= arrival.get(classes[c], 1), column(rows, f"accuracy_{classes[c]}"), np.nan)
            below.plot(x, y, markevery=(c % 3, 3), markersize=4, label=f"accuracy, {classes[c]}", **style(c))
        if len(classes) > known + 6:
            label = f"accuracy, all {len(classes) - known} late classes"
            below.plot(x, column(rows, "new_accuracy"), color="black", label=label)
        below.plot(x, column(rows, "open_accuracy"), color="#777777", linewidth=3, label="accuracy, unknown being an answer")
        below.plot(x, column(rows, "novelty_auroc"), color="black", linestyle="--", label="AUROC, nameless against named")
        below.set(xlabel="epoch", ylim=(-0.02, 1.02), ylabel="test images", xlim=(0.5, last + 0.5))
        handles, labels = (a + b for a, b in zip(*(ax.get_legend_handles_labels() for ax in (above, below)), strict=True))
        fig.legend(handles, labels, loc="outside lower center", ncol=2)
        whole_numbers(below)


def draw_curricula(schedules: dict[str, list], path: str | Path) -> None:
    """Schedules side by side: {name: the Stage of every epoch}. Classes and labels as shares, the mix as weights."""
    columns = min(3, len(schedules))
    lines, total = -(-len(schedules) // columns), max(stage.classes for stages in schedules.values() for stage in stages)
    with figure(path, max(8, 4.3 * columns), 0.8 + 3.1 * lines, lines, columns, squeeze=False) as (fig, axes):
        for ax, (name, stages) in zip(axes.flat, schedules.items(), strict=False):
            x = np.linspace(0, 1, len(stages))
            ax.fill_between(x, [s.classes / total for s in stages], step="post", color="#E8EEF5", label="classes seen")
            ax.fill_between(x, [s.named / total for s in stages], step="post", color="#C3D3E6", label="classes named")
            ax.plot(x, [s.label_fraction for s in stages], color="black", linewidth=2, label="labels, of a class")
            for i, term in enumerate(stages[0].mix):
                ax.plot(x, [s.mix[term] for s in stages], markevery=0.12, markersize=4, label=term, **style(i))
            ax.plot(x, [s.sparsity for s in stages], color="#777777", linestyle=":", label="sparsity")
            ax.set(title=name, xlabel="progress", xlim=(0, 1), ylim=(-0.03, 1.08))
        for ax in axes.flat[len(schedules) :]:
            ax.set_axis_off()
        fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncol=4)


METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}


def project(h: Tensor, method: str = "tsne", rounds: int = 1000) -> np.ndarray:
    """Embeddings [N,D] -> points [N,2] by "pca", "tsne" or "umap". Raises ValueError if umap-learn is not installed."""
    unit = F.normalize(h.float(), dim=1).cpu().numpy()
    if (unit == unit[0]).all():
        return np.zeros((len(unit), 2))  # a network that has collapsed: there is nothing to project
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError:
            raise ValueError("--embedding umap needs umap-learn: pip install umap-learn, or use --embedding tsne") from None
        return UMAP(random_state=0).fit_transform(unit)
    if method == "tsne":
        from sklearn.manifold import TSNE

        return TSNE(perplexity=min(30, (len(unit) - 1) / 3), init="pca", max_iter=rounds, random_state=0).fit_transform(unit)
    from sklearn.decomposition import PCA

    return PCA(2, random_state=0).fit_transform(unit)


def scatter(ax, points: np.ndarray, y: np.ndarray, classes: Sequence[str], known: int, size: float, seen: int | None = None) -> None:
    """Points [N,2] of classes y [N], one colour and marker a class; late ones have an outline, those not `seen` yet are grey."""
    for c, name in enumerate(classes):
        met = seen is None or c < seen
        colour = COLOURS[c % len(COLOURS)] if met else "#D5D5D5"
        edge = dict(edgecolors="black" if met else "#AAAAAA", linewidths=0.5) if c >= known else dict(linewidths=0)
        marker = MARKERS[(c + c // len(COLOURS)) % len(MARKERS)]
        label = f"{name} (late)" if c >= known else name
        ax.scatter(*points[y == c].T, s=size, color=colour, marker=marker, alpha=0.8, label=label, **edge)
    ax.set(xticks=[], yticks=[])


def draw_embedding(
    h: Tensor, y: Tensor, classes: Sequence[str], path: str | Path, method: str = "tsne", known: int | None = None, sample: int = 2000
) -> None:
    """A random sample of the embeddings in two dimensions, one colour and marker a class; late classes have an outline."""
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(y))[:sample])
    points, y = project(h[chosen.to(h.device)], method), y.cpu()[chosen].numpy()
    with figure(path, 8, 6.2) as (_, ax):
        scatter(ax, points, y, classes, len(classes) if known is None else known, 20)
        if len(classes) <= 20:
            for c in np.unique(y):
                box = dict(facecolor="white", alpha=0.75, edgecolor="none", boxstyle="round,pad=0.15")
                centre = np.median(points[y == c], 0)
                ax.text(*centre, classes[c], ha="center", va="center", fontsize=10, fontweight="bold", bbox=box)
            ax.legend(**BESIDE)
        ax.set(title=f"{len(y):,} test images, embeddings h in two dimensions ({METHODS[method]})")


def draw_story(looks: list[dict], classes: Sequence[str], known: int, path: str | Path, method: str = "tsne") -> None:
    """The same test images in the course of training, a panel for every look.

    looks: {"name": of the stage, "epoch": epochs done, "classes": those met so far, "h" [N,D], "y" int64 [N]} each.
    """
    y = looks[-1]["y"].numpy()
    with figure(path, 3.1 * len(looks), 3.9, 1, len(looks), squeeze=False) as (fig, axes):
        for ax, then in zip(axes[0], looks, strict=True):
            scatter(ax, project(then["h"], method, rounds=500), y, classes, known, 12, then["classes"])
            ax.set_title(then["name"] + (f", epoch {then['epoch']}" if then["epoch"] else ""))
        if len(classes) <= 20:
            below = dict(loc="outside lower center", ncol=min(len(classes), 10), handletextpad=0.1, columnspacing=1.6, markerscale=1.8)
            fig.legend(*axes[0, -1].get_legend_handles_labels(), fontsize=10, **below)
        fig.suptitle(f"{len(y):,} test images, embeddings h in two dimensions ({METHODS[method]}); grey: classes not met yet", fontsize=11)


def draw_confusion(predicted: Tensor, y: Tensor, classes: Sequence[str], path: str | Path) -> None:
    """Which class is taken for which: rows are true, columns predicted, in the order of arrival; per cent of the row."""
    n = len(classes)
    table = torch.zeros(n, n).index_put_((y.cpu(), predicted.cpu()), torch.ones(len(y)), accumulate=True).numpy()
    share = 100 * table / table.sum(1, keepdims=True).clip(min=1)
    size = max(5.5, 0.55 * n) if n <= 20 else 8
    with figure(path, size + 1, size) as (fig, ax):
        image = ax.imshow(share, cmap="cividis", vmin=0, vmax=100)
        fig.colorbar(image, ax=ax, shrink=0.8, label="% of the true class")
        if n <= 20:
            for (i, j), value in np.ndenumerate(share):
                if value >= 0.5:
                    ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="black" if value > 55 else "white", fontsize=9)
            ax.set_xticks(range(n), classes, rotation=45, ha="right")
            ax.set_yticks(range(n), classes)
        right = 100 * np.trace(table) / max(table.sum(), 1)
        ax.set(xlabel="predicted", ylabel="true", title=f"Test images: {right:.1f} % right")


# ---- one run, and several -------------------------------------------------------------------------------------------

FIGURES = {  # of a run's summary: name in a comparison (None: not there), factor, digits, and what it is
    "accuracy": ("accuracy", 100, 1, "of the head, all classes"),
    "old_accuracy": ("old", 100, 1, "of the head, the {known} classes known at the start"),
    "new_accuracy": ("new", 100, 1, "of the head, the late classes"),
    "first_sight": ("first sight", 100, 1, "late classes at the moment of their first labels, before any gradient step"),
    "first_sight_5": (None, 100, 1, "what a unit made of five labels would recognise then, heeding the other classes"),
    "probe": ("probe", 100, 1, "linear probe on the frozen encoder, all labels"),
    "probe_leaked": ("probe leaked", 100, 1, "linear probe, the label budget only"),
    "knn": ("kNN", 100, 1, "20 nearest neighbours, all labels"),
    "forgetting": ("forgetting", 100, 1, "best accuracy so far minus accuracy now, mean over the old classes"),
    "ari": ("ARI", 1, 3, "adjusted Rand index of k-means clusters and classes, test images"),
    "nmi": ("NMI", 1, 3, "normalised mutual information of the same"),
    "silhouette": ("silhouette", 1, 3, "silhouette of the clusters"),
    "novelty_auroc": ("novelty", 1, 3, "how well classes without a name are told from named ones, before any label"),
    "sparsity": ("sparsity", 100, 1, "of the encoder's weights are zero"),
    "labels_used": (None, 1, 0, "of {images:,}"),
    "label_epochs": ("label-epochs", 1, 0, "labels at hand, summed over the epochs"),
    "images_per_second": ("images/s", 1, 0, "each in two views"),
    "seconds": ("minutes", 1 / 60, 1, ""),
}
COLUMNS = {key: (name, factor, digits) for key, (name, factor, digits, _) in FIGURES.items() if name}


def describe(summary: dict, images: int, known: int) -> str:
    """The figures of one run as aligned text, each with what it is."""
    lines = []
    for key, (_, factor, digits, text) in FIGURES.items():
        factor, digits = (1, 0) if key == "seconds" else (factor, digits)  # as it is called in summary.json
        shown = "-" if summary[key] is None else f"{factor * summary[key]:,.{digits}f}" + " %" * (factor == 100)
        lines.append(f"{key:18s}{shown:>8s}   {text.format(known=known, images=images)}".rstrip())
    return "\n".join(lines)


NOT_SETTINGS = ("seed", "class_order", "out", "resume", "data_dir", "device", "embedding", "versions", "commit", "machine")


def read_run(folder: str | Path) -> tuple[dict, dict]:
    """args.json and summary.json of a finished run. Raises ValueError, in one line, if they are not there or not whole."""
    try:
        args, summary = (json.loads((Path(folder) / name).read_text()) for name in ("args.json", "summary.json"))
    except OSError as error:
        raise ValueError(f"{folder}: not a finished run ({Path(error.filename).name} is not there)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}: damaged ({error})") from None
    needed = {"curriculum", "seed", "class_order", "label_budget"}
    if not (isinstance(args, dict) and isinstance(summary, dict) and needed <= args.keys() and "labels_used" in summary):
        raise ValueError(f"{folder}: not a run (args.json or summary.json holds something else)")
    return args, summary


def runs_among(paths: Sequence[str | Path]) -> list[Path]:
    """The run folders among paths, each once: files are passed over, and a folder of runs stands for the finished ones in it."""
    folders = []
    for path in map(Path, paths):
        inside = sorted(args.parent for args in path.glob("*/args.json")) if not (path / "args.json").exists() else []
        for run in inside:
            if (run / "summary.json").exists():
                folders.append(run)
            else:
                print(f"{run}: not finished, left out", file=sys.stderr)
        if not inside and not path.is_file():
            folders.append(path)
    return list({folder.resolve(): folder for folder in folders}.values())


def compare(folders: Sequence[str | Path]) -> dict[str, dict]:
    """Group runs by their settings, seeds apart: {name: {"settings": ..., "runs": n, column: values [n], ...}}, in the order given.

    The name is the curriculum, followed by the settings in which the groups differ; learning rate and label budget, which each
    curriculum may have its own of, where those of one curriculum do. A figure that a run does not have is NaN.
    "folders": those of the runs.
    "again": runs of a group with the seed and class order of another one of it, which tell of other code rather than of chance.
    """
    groups: dict[str, list[tuple[dict, dict, Path]]] = {}
    for folder in folders:
        args, summary = read_run(folder)
        key = json.dumps({k: v for k, v in sorted(args.items()) if k not in NOT_SETTINGS})
        groups.setdefault(key, []).append((args, summary, Path(folder)))
    settings = [json.loads(key) for key in groups]
    every = dict.fromkeys(k for s in settings for k in s if k != "curriculum")
    result = {}
    for setting, runs in zip(settings, groups.values(), strict=True):
        alike = [s for s in settings if s["curriculum"] == setting["curriculum"]]
        values_of = {k: {json.dumps(s[k]) for s in (alike if k in ("lr", "label_budget") else settings) if k in s} for k in every}
        told = [k for k in every if len(values_of[k]) > 1 and json.dumps(setting.get(k)) not in ("null", "false", "[]")]
        given = {k.replace("_", "-"): setting[k] for k in told}
        name = " ".join([setting["curriculum"], *(f"{k}={','.join(v) if isinstance(v, list) else v}" for k, v in given.items())])
        name += f" ({len(result) + 1})" if name in result else ""  # differs in a setting that the others do not know
        values = {c: np.array([s[c] if s.get(c) is not None else np.nan for _, s, _ in runs], dtype=float) for c in COLUMNS}
        again = len(runs) - len({(args["seed"], args["class_order"]) for args, *_ in runs})
        about = {"settings": setting, "runs": len(runs), "again": again, "folders": [folder for *_, folder in runs]}
        result[name] = about | {"labels_used": runs[0][1]["labels_used"]} | values
    return result


def spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for one value), without a warning for what is missing."""
    there = values[~np.isnan(values)]
    return (there.mean() if len(there) else np.nan), (there.std(ddof=1) if len(there) > 1 else np.nan)


def comparison_table(result: dict[str, dict]) -> str:
    """The comparison as aligned text, mean ± std, in two blocks: accuracies, and then clusters, sparsity and what it took."""
    width, lines = max(len(name) for name in result) + 2, []
    for block in (list(COLUMNS)[:8], list(COLUMNS)[8:]):
        lines.append("".join([f"{'':{width}}", f"{'runs':>4} {'labels':>7}", *(f"{COLUMNS[key][0]:>14}" for key in block)]))
        for name, row in result.items():
            cells = []
            for key in block:
                _, factor, digits = COLUMNS[key]
                mean, std = spread(factor * row[key])
                text = "-" if np.isnan(mean) else f"{mean:.{digits}f}"
                cells.append(f"{text if np.isnan(std) else f'{text} ± {std:.{digits}f}':>14}")
            lines.append("".join([f"{name:{width}}", f"{row['runs']:4d} {row['labels_used']:7d}", *cells]))
        lines.append("")
    return "\n".join(lines[:-1])


def draw_comparison(result: dict[str, dict], path: str | Path) -> None:
    """Bars with the standard deviation over runs, one panel for accuracies and one for clusters."""
    panels = (
        ("test accuracy, %", dict(accuracy="head", probe_leaked="probe, same labels", probe="probe, all labels", knn="kNN, all labels")),
        ("clusters of the test embeddings", dict(ari="ARI", nmi="NMI")),
    )
    with figure(path, 11, 1.6 + 0.62 * len(result), 1, 2, sharey=True, width_ratios=(3, 2)) as (_, axes):
        for ax, (title, columns) in zip(axes, panels, strict=True):
            height = 0.8 / len(columns)
            for i, (key, label) in enumerate(columns.items()):
                _, factor, digits = COLUMNS[key]
                mean, std = np.array([spread(factor * row[key]) for row in result.values()]).T
                y = np.arange(len(result)) + (i - (len(columns) - 1) / 2) * height
                ax.barh(y, np.nan_to_num(mean), height * 0.92, xerr=np.nan_to_num(std), color=COLOURS[i], label=label)
                for place, m, s in zip(y, mean, np.nan_to_num(std), strict=True):
                    if not np.isnan(m):
                        ax.text(m + s + 0.01 * factor, place, f"{m:.{min(digits, 2)}f}", va="center", fontsize=8)
            ax.set(title=title, xlim=(0, 1.08 * factor))
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=4)
        names = [f"{name}\n{row['labels_used']:,} labels, {row['runs']} run{'s' * (row['runs'] > 1)}" for name, row in result.items()]
        axes[0].set_yticks(range(len(result)), names)
        axes[0].invert_yaxis()


def draw_progress(result: dict[str, dict], path: str | Path) -> bool:
    """Accuracy of the head over the epochs, a line a run and a colour a group; False if no run trains a head or has its log.csv."""
    lines: dict[str, list] = {}  # of each group
    for name, row in result.items():
        for log in (folder / "log.csv" for folder in row["folders"]):
            rows = csv.DictReader(log.read_text().splitlines()) if log.exists() else ()
            points = [(int(r["epoch"]), 100 * float(r["accuracy"])) for r in rows if r["accuracy"]]
            if points:
                lines.setdefault(name, []).append(list(zip(*points, strict=True)))
    if not lines:
        return False
    with figure(path, 9.5, 4.6) as (_, ax):
        for i, (name, runs) in enumerate(lines.items()):
            for j, (x, y) in enumerate(runs):
                ax.plot(x, y, markevery=max(1, len(x) // 10), markersize=4, linewidth=1.3, label=None if j else name, **style(i))
        ax.set(xlabel="epoch", ylabel="test accuracy of the head, all classes, %")
        whole_numbers(ax)
        ax.grid(alpha=0.25)
        ax.legend(**BESIDE)
    return True


def draw_budgets(result: dict[str, dict], path: str | Path) -> bool:
    """Accuracy against the share of labels, a line for all that differs in nothing else; False if all have the same share.

    Of the head, or, where no label is learned, of a linear probe on the labels of the budget and on all.
    """
    lines: dict[str, dict[float, tuple[float, float]]] = {}  # percent of the labels -> mean and standard deviation
    for name, row in result.items():
        budget, curriculum = row["settings"]["label_budget"], row["settings"]["curriculum"]
        line = name.replace(f" label-budget={budget}", "")
        if np.isnan(row["accuracy"]).all():
            points = {budget: "probe_leaked", 1.0: "probe"}
            line += ", then a probe"
        else:
            points = {1.0 if curriculum == "supervised" else budget: "accuracy"}
        found = {100 * share: spread(100 * row[column]) for share, column in points.items() if share}
        lines.setdefault(line, {}).update({x: point for x, point in found.items() if not np.isnan(point[0])})
    ticks = sorted({x for points in lines.values() for x in points})
    if len(ticks) < 2:
        return False
    with figure(path, 6.5, 4.2) as (_, ax):
        for i, (line, points) in enumerate(lines.items()):
            x, mean, std = np.array([(x, *points[x]) for x in sorted(points)]).reshape(-1, 3).T
            ax.errorbar(x, mean, np.nan_to_num(std), label=line, capsize=3, **style(i))
            one = np.isnan(std)
            ax.plot(x[one], mean[one], linestyle="", markerfacecolor="white", zorder=3, **style(i))
        ax.set(xscale="log", xlabel="labelled images, % of each class (hollow: one run)", ylabel="test accuracy, %")
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.legend()
    return True


COMPANIONS = {"progress.png": draw_progress, "budgets.png": draw_budgets}  # the figures that come with a comparison


def write_compact(folder: str | Path, path: str | Path, rounds: int = 7) -> str:
    """Write the network of a run without its dead filters, for `model.load`; what became of it, in one line.

    The outputs are compared and timed on 512 images of noise, in float32. Raises ValueError, in one line, if it cannot be done.
    """
    import model

    try:
        whole = model.load(Path(folder) / "checkpoint.pt")
    except Exception as error:
        raise ValueError(f"{folder}: no checkpoint.pt that can be read ({type(error).__name__})") from None
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: its folder is not there")
    small = model.compact(whole)
    x = torch.rand(512, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    apart = max(float((embed(whole, x, part) - embed(small, x, part)).abs().max()) for part in ("h", "z", "logits"))
    ratios = []
    for _ in range(rounds):
        times = []
        for network in (whole, small):
            began = time.perf_counter()
            embed(network, x)
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    content = io.BytesIO()
    torch.save(model.pack(small), content)
    Path(path).write_bytes(content.getvalue())  # OSError if it cannot be, where torch.save has errors of its own
    size = [sum(p.numel() for p in network.encoder.parameters()) for network in (whole, small)]
    return (
        f"{path}: {size[1]:,} of {size[0]:,} weights in the encoder; outputs apart by at most {apart:.1e}; "
        f"{sorted(ratios)[rounds // 2]:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the runs named on the command line."""
    parser = argparse.ArgumentParser(description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of them")
    parser.add_argument("--compact", metavar="FILE", help="write the network of one run to FILE, without its dead filters")
    parser.add_argument("--out", default="comparison.png", help="where the figure goes (default: comparison.png)")
    args = parser.parse_args(argv)
    try:
        if args.compact:
            if len(args.runs) > 1:
                raise ValueError(f"--compact takes one run, not {len(args.runs)}")
            print(write_compact(args.runs[0], args.compact))
            return 0
        if Path(args.out).name in COMPANIONS:
            raise ValueError(f"--out {args.out}: this name is for another figure beside it; choose another")
        folders = runs_among(args.runs)
        if not folders:
            raise ValueError(f"{args.runs[0]}: not a run folder")
        result = compare(folders)
        print(comparison_table(result))
        for name, row in result.items():
            if row["again"]:
                print(f"{name}: {row['again']} of {row['runs']} runs repeat a seed and class order: of other code?", file=sys.stderr)
        draw_comparison(result, args.out)
        more = {Path(args.out).with_name(name): draw for name, draw in COMPANIONS.items()}
        drawn = [args.out, *(path for path, draw in more.items() if draw(result, path))]
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\nDrawn to {', '.join(map(str, drawn))}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
