"""What is taught when: six curricula, each a pure function of progress from 0 (first epoch) to 1 (last epoch).

    gradual      7 of 10 classes and no label at first; labels leak in, then the other classes arrive one by one
    self         all classes, no labels at all
    self-known   the known classes only, no labels
    semi         all classes, the whole label budget from the first epoch
    supervised   all classes, all labels
    labels-only  the label budget, and losses on the images that have a label alone

    now = stage("gradual", epoch=12, epochs=30, num_classes=10)
    now.classes, now.named, now.label_fraction, now.mix, now.sparsity

`python curriculum.py` prints the six schedules as tables and draws them to curriculum.png.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

# The gradual curriculum: when things happen, in progress 0..1.
LEAK = (0.06, 0.26)  # labels of the named classes leak in, from none to the budget
ARRIVAL = (0.13, 0.28)  # images of the late classes join, the first and the last of them
NAMING = 0.10  # this much later, the first labels of a late class: time to notice what has no name yet
LABELLED_SHARE = (0.5, 0.2)  # of each batch, drawn from the labelled images: at first and in the end, in `semi` too
RARER = (0.40, 0.60)  # it falls between these; by then the labels have spread to the other images
PRUNE = (0.30, 0.85)  # weights are pruned, along a cubic


@dataclass(frozen=True)
class Stage:
    """What one epoch teaches."""

    name: str  # of the phase, for people
    classes: int  # the first so many classes of the class order have images in the pool
    named: int  # the first so many of these may have labels
    label_fraction: float  # of each named class's images, 0..1
    mix: dict[str, float]  # weight of each loss: ntxent, aggregation, propagation, supervised
    labelled_share: float  # of each batch, drawn from the labelled images
    sparsity: float  # fraction of the prunable weights that are zero at the end of the epoch
    discovery: bool = False  # images that no names around them claim may open a unit that has no name yet


def ramp(progress: float, start: float, end: float) -> float:
    """0 before start, 1 after end, a straight line between."""
    return float(progress >= end) if end <= start else min(max((progress - start) / (end - start), 0.0), 1.0)


def cubic_sparsity(progress: float, target: float, start: float = PRUNE[0], end: float = PRUNE[1]) -> float:
    """target (1 - (1 - t)^3), t from 0 at start to 1 at end (Zhu & Gupta 2017, arXiv 1710.01878, equation 1)."""
    return target * (1 - (1 - ramp(progress, start, end)) ** 3)


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 5 % of the run, constant to 60 % so that late classes meet a plastic network, then a cosine to zero."""
    return peak * min(1.0, progress / 0.05, 0.5 * (1 + math.cos(math.pi * ramp(progress, 0.6, 1.0))))


def labelled_share(progress: float) -> float:
    """How much of a batch is drawn from the labelled images, 0..1, where they are taught beside all others."""
    return LABELLED_SHARE[0] + (LABELLED_SHARE[1] - LABELLED_SHARE[0]) * ramp(progress, *RARER)


def arrivals(num_classes: int, known: int) -> list[float]:
    """When the images of each class join the pool, in progress; 0 for the known ones."""
    late = num_classes - known
    step = (ARRIVAL[1] - ARRIVAL[0]) / max(late - 1, 1)
    return [0.0] * known + [ARRIVAL[0] + i * step for i in range(late)]


def gradual(progress: float, num_classes: int, known: int, budget: float, sparsity: float) -> Stage:
    """Infancy without labels; labels leak in; new classes arrive, images first; then all of it together."""
    joined = arrivals(num_classes, known)
    classes = sum(t <= progress + 1e-9 for t in joined)
    named = sum(t + NAMING * (t > 0) <= progress + 1e-9 for t in joined)
    leak = ramp(progress, *LEAK)
    if leak == 0:
        name = "infancy"
    elif named == num_classes and leak == 1:
        name = "maturity"
    else:
        name = "new classes" if classes > known else "labels leak"
    mix = {
        "ntxent": 1.0 - 0.5 * leak,
        "aggregation": (0.5 - 0.4 * leak) * ramp(progress, 0.05, 0.15),
        "propagation": leak,
        "supervised": float(leak > 0),
    }
    discovery = leak > 0 and name != "maturity"
    return Stage(name, classes, named, budget * leak, mix, labelled_share(progress), cubic_sparsity(progress, sparsity), discovery)


def self_supervised(progress: float, num_classes: int, known: int, budget: float, sparsity: float) -> Stage:
    """All classes, no labels: NT-Xent, joined by local aggregation."""
    mix = {"ntxent": 1.0, "aggregation": 0.5 * ramp(progress, 0.10, 0.20), "propagation": 0.0, "supervised": 0.0}
    return Stage("self", num_classes, 0, 0.0, mix, 0.0, cubic_sparsity(progress, sparsity))


def self_known(progress: float, num_classes: int, known: int, budget: float, sparsity: float) -> Stage:
    """The same on the known classes alone: what an encoder is worth that never met the others."""
    return self_supervised(progress, known, known, budget, sparsity)


def semi(progress: float, num_classes: int, known: int, budget: float, sparsity: float) -> Stage:
    """Everything at once: all classes and the whole budget from the first epoch, in a constant mix of the losses."""
    mix = {"ntxent": 0.5, "aggregation": 0.1, "propagation": 1.0, "supervised": 1.0}
    return Stage("semi", num_classes, num_classes, budget, mix, labelled_share(progress), cubic_sparsity(progress, sparsity))


def fully_supervised(progress: float, num_classes: int, known: int, budget: float, sparsity: float) -> Stage:
    """The ceiling: cross-entropy with every label."""
    mix = {"ntxent": 0.0, "aggregation": 0.0, "propagation": 0.0, "supervised": 1.0}
    return Stage("supervised", num_classes, num_classes, 1.0, mix, 1.0, cubic_sparsity(progress, sparsity))


def labels_only(progress: float, num_classes: int, known: int, budget: float, sparsity: float) -> Stage:
    """The floor: cross-entropy on the images of the budget, again and again."""
    mix = {"ntxent": 0.0, "aggregation": 0.0, "propagation": 0.0, "supervised": 1.0}
    return Stage("labels only", num_classes, num_classes, budget, mix, 1.0, cubic_sparsity(progress, sparsity))


CURRICULA: dict[str, Callable[..., Stage]] = {
    "gradual": gradual,
    "self": self_supervised,
    "self-known": self_known,
    "semi": semi,
    "supervised": fully_supervised,
    "labels-only": labels_only,
}


def stage(
    name: str,
    epoch: int,
    epochs: int,
    num_classes: int,
    known: int | None = None,
    budget: float = 0.1,
    sparsity: float = 0.0,
) -> Stage:
    """The Stage of an epoch (0..epochs-1) of the curriculum `name`.

    num_classes: classes in all; known: classes at the start (7 of 10, in proportion); budget: the largest fraction of
    labels, 0..1; sparsity: pruned at the end, 0..1. Raises ValueError for a name that is not there.
    """
    if name not in CURRICULA:
        raise ValueError(f"unknown curriculum '{name}'; use {', '.join(CURRICULA)}")
    known = default_known(num_classes) if known is None else known
    return CURRICULA[name](epoch / max(epochs - 1, 1), num_classes, known, budget, sparsity)


def default_known(num_classes: int) -> int:
    """Seven of ten classes are there from the start."""
    return max(1, round(0.7 * num_classes))


def table(name: str, epochs: int = 30, num_classes: int = 10, sparsity: float = 0.0) -> str:
    """The schedule as text: one line for every epoch in which anything but a ramp changes, and the last.

    labels: the share of the images that have one; in a batch: of its images, those drawn from the labelled ones.
    """
    lines = [f"{name}: {CURRICULA[name].__doc__}"]
    lines.append("epoch  stage        classes  named  labels  in a batch  sparsity  ntxent  aggregation  propagation  supervised")
    before = None
    for epoch in range(epochs):
        s = stage(name, epoch, epochs, num_classes, sparsity=sparsity)
        key = (s.name, s.classes, s.named)
        if key != before or epoch == epochs - 1:
            mix = f"{s.mix['ntxent']:6.2f}  {s.mix['aggregation']:11.2f}  {s.mix['propagation']:11.2f}  {s.mix['supervised']:10.2f}"
            head = f"{epoch + 1:5d}  {s.name:11s}  {s.classes:7d}  {s.named:5d}"
            drawn = s.labelled_share if s.label_fraction else 0.0
            lines.append(f"{head}  {100 * s.label_fraction:5.1f}%  {100 * drawn:9.1f}%  {100 * s.sparsity:7.1f}%  {mix}")
        before = key
    return "\n".join(lines)


if __name__ == "__main__":
    from evaluate import draw_curricula

    print("\n\n".join(table(name, sparsity=0.8) for name in CURRICULA))
    draw_curricula({n: [stage(n, e, 200, 10, sparsity=0.8) for e in range(200)] for n in CURRICULA}, "curriculum.png")
    print("\nDrawn to curriculum.png (10 classes, label budget 10 %, pruned to 80 %).")
