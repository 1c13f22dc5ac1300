"""What is taught when: six curricula, pure functions of progress from 0 (first epoch) to 1 (last epoch).

    gradual      7 of 10 classes without labels; labels leak in, then the other classes come one by one
    self         all classes, no labels at all
    self-known   only the known classes, no labels
    semi         all classes and the whole label budget from the first epoch
    supervised   all classes, all labels
    labels-only  the label budget, and losses only on the images that have a label

    plan = stage("gradual", epoch=12, epochs=30, num_classes=10)
    plan.classes, plan.named, plan.label_fraction, plan.mix, plan.sparsity

`python curriculum.py` prints the six schedules as tables.
"""

import argparse
import math
from dataclasses import dataclass, replace

# When things happen, in progress 0..1; the first three: gradual.
LEAK = (0.06, 0.26)  # labels of named classes leak in, from none to the budget
ARRIVAL = (0.13, 0.28)  # images of the late classes join: of the first and of the last one
NAMING = 0.10  # a late class gets its first labels this much after its images: time to be found
LABELLED_SHARE = (0.5, 0.2)  # share of each batch drawn from labelled images, at first and last
CROP = (0.2, 0.5)  # smallest part of an image in a view, at first and last
SETTLING = (0.40, 0.60)  # LABELLED_SHARE and CROP change in this interval, once labels have spread
PRUNE = (0.30, 0.85)  # weights are pruned in this interval, along a cubic

CIFAR = dict(model="vgg16", epochs=100, batch_size=128, lr=0.06, min_steps=1, image_size=32)
DEFAULTS = {
    "cifar": CIFAR,
    "digits": CIFAR | dict(model="cnn", epochs=60),
    "mnist": CIFAR | dict(model="cnn", epochs=15),
    "folder": CIFAR | dict(model="vgg-small", epochs=50, min_steps=50),
}


def defaults(dataset: str) -> dict:
    """The default settings of train.py for a data set."""
    return DEFAULTS.get(dataset.partition(":")[0], CIFAR)


@dataclass(frozen=True)
class Stage:
    """What one epoch teaches."""

    name: str  # of the phase, for people
    classes: int  # the first `classes` of the class order have images in the pool
    named: int  # the first `named` of them may have labels
    label_fraction: float  # share of each named class's images that is labelled, 0..1
    mix: dict[str, float]  # weight of each loss: ntxent, aggregation, propagation, supervised
    labelled_share: float  # share of each batch drawn from labelled images, 0..1
    sparsity: float  # share of the prunable weights that is zero after the epoch, 0..1
    crop: float = CROP[0]  # smallest part of an image in a view, 0..1
    discovery: bool = False  # whether images of unknown classes may open units without a name


def ramp(progress: float, start: float, end: float) -> float:
    """0 before start, 1 after end, a straight line in between."""
    return float(progress >= end) if end <= start else min(max((progress - start) / (end - start), 0.0), 1.0)


def cubic_sparsity(progress: float, target: float) -> float:
    """target (1 - (1 - t)^3), t from 0 to 1 over PRUNE (Zhu & Gupta 2017, arXiv 1710.01878)."""
    return target * (1 - (1 - ramp(progress, *PRUNE)) ** 3)


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 5 % of the run, constant to 60 % for the late classes, then a cosine to 0."""
    return peak * min(1.0, progress / 0.05, 0.5 * (1 + math.cos(math.pi * ramp(progress, 0.6, 1.0))))


def settling(progress: float, sparsity: float) -> dict[str, float]:
    """The fields of a Stage that change as labels spread."""
    t = ramp(progress, *SETTLING)
    share, crop = (first + (last - first) * t for first, last in (LABELLED_SHARE, CROP))
    return dict(labelled_share=share, sparsity=cubic_sparsity(progress, sparsity), crop=crop)


def arrivals(num_classes: int, known: int) -> list[float]:
    """When the images of each class join the pool, in progress 0..1; 0 for the known classes."""
    late = num_classes - known
    step = (ARRIVAL[1] - ARRIVAL[0]) / max(late - 1, 1)
    return [0.0] * known + [ARRIVAL[0] + i * step for i in range(late)]


# A curriculum gets the progress, the numbers of classes at last and at first, and the largest shares of
# labels and of pruned weights, 0..1.


def gradual(progress, num_classes, known, budget, sparsity) -> Stage:
    """No labels at first; labels leak in; new classes come, images before labels; then all of it together."""
    joined = arrivals(num_classes, known)
    classes = sum(t <= progress + 1e-9 for t in joined)  # 1e-9: rounding
    named = sum(t + NAMING * (t > 0) <= progress + 1e-9 for t in joined)
    leak = ramp(progress, *LEAK)
    if leak == 0:
        name = "infancy"
    elif named == num_classes and leak == 1:
        name = "maturity"
    else:
        name = "new classes" if classes > known else "labels leak"
    mix = dict(
        ntxent=1.0 - 0.5 * leak,
        aggregation=(0.5 - 0.4 * leak) * ramp(progress, 0.05, 0.15),
        propagation=leak,
        supervised=float(leak > 0),
    )
    return Stage(name, classes, named, budget * leak, mix, **settling(progress, sparsity), discovery=leak > 0)


def self_supervised(progress, num_classes, known, budget, sparsity) -> Stage:
    """All classes, no labels: NT-Xent, joined by local aggregation."""
    mix = dict(ntxent=1.0, aggregation=0.5 * ramp(progress, 0.10, 0.20), propagation=0.0, supervised=0.0)
    return Stage("self", num_classes, 0, 0.0, mix, 0.0, cubic_sparsity(progress, sparsity))


def self_known(progress, num_classes, known, budget, sparsity) -> Stage:
    """The same on the known classes alone: an encoder that never saw the others."""
    return self_supervised(progress, known, known, budget, sparsity)


def semi(progress, num_classes, known, budget, sparsity) -> Stage:
    """All classes and the whole budget from the first epoch, with a constant mix of the losses."""
    mix = dict(ntxent=0.5, aggregation=0.1, propagation=1.0, supervised=1.0)
    return Stage("semi", num_classes, num_classes, budget, mix, **settling(progress, sparsity))


def fully_supervised(progress, num_classes, known, budget, sparsity) -> Stage:
    """The ceiling: cross-entropy with every label."""
    mix = dict(ntxent=0.0, aggregation=0.0, propagation=0.0, supervised=1.0)
    pruned = cubic_sparsity(progress, sparsity)
    return Stage("supervised", num_classes, num_classes, 1.0, mix, 1.0, pruned, CROP[1])


def labels_only(progress, num_classes, known, budget, sparsity) -> Stage:
    """The floor: cross-entropy on labelled images alone."""
    ceiling = fully_supervised(progress, num_classes, known, budget, sparsity)
    return replace(ceiling, name="labels only", label_fraction=budget, crop=CROP[0])


CURRICULA = {
    "gradual": gradual,
    "self": self_supervised,
    "self-known": self_known,
    "semi": semi,
    "supervised": fully_supervised,
    "labels-only": labels_only,
}


def stage(name, epoch: int, epochs: int, num_classes: int, known=None, budget=0.1, sparsity=0.0) -> Stage:
    """The Stage of an epoch (0..epochs-1) of the curriculum `name`.

    num_classes: number of classes; known: those at the start (None: 7 of 10); budget: the largest
    fraction of labels, 0..1; sparsity: fraction pruned in the end, 0..1. Raises ValueError for other values.
    """
    if name not in CURRICULA:
        raise ValueError(f"unknown curriculum '{name}'; use {', '.join(CURRICULA)}")
    known = default_known(num_classes) if known is None else known
    for label, value, low, high in (
        ("num_classes", num_classes, 1, math.inf),
        ("known", known, 1, num_classes),
        ("epoch", epoch, 0, epochs - 1),
        ("budget", budget, 0, 1),
        ("sparsity", sparsity, 0, 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{label} must be in {low}..{high}, not {value}")
    return CURRICULA[name](epoch / max(epochs - 1, 1), num_classes, known, budget, sparsity)


def schedule(name: str, epochs: int, *settings) -> list[Stage]:
    """The Stage of each epoch of a run; a single epoch is the last of two. settings: as for `stage`."""
    most = max(epochs, 2)
    return [stage(name, epoch, most, *settings) for epoch in range(most - epochs, most)]


def going_on(stages: list[Stage]) -> list[Stage]:
    """For a run that goes on from an earlier one: the last mix and all labels from the start."""
    return [replace(stages[-1], classes=s.classes, named=s.named, sparsity=s.sparsity) for s in stages]


def default_known(num_classes: int) -> int:
    """The number of classes at the start: seven of ten."""
    return max(1, round(0.7 * num_classes))


def table(name: str, epochs: int = 30, num_classes: int = 10, sparsity: float = 0.0) -> str:
    """The schedule as text: a line for each epoch that begins a stage or brings a class, and the last.

    in a batch: share drawn from the labelled images; crop: smallest part of an image in a view.
    """
    lines = [
        f"{name}: {CURRICULA[name].__doc__}",
        "epoch  stage        classes  named  labels  in a batch  crop  sparsity"
        "  ntxent  aggregation  propagation  supervised",
    ]
    before = None
    for epoch in range(epochs):
        s = stage(name, epoch, epochs, num_classes, sparsity=sparsity)
        key = (s.name, s.classes, s.named)
        if key != before or epoch == epochs - 1:
            drawn = s.labelled_share if s.label_fraction else 0.0
            line = f"{epoch + 1:5d}  {s.name:11s}  {s.classes:7d}  {s.named:5d}  {s.label_fraction:6.1%}"
            line += f"  {drawn:10.1%}  {s.crop:4.2f}  {s.sparsity:8.1%}  "
            lines.append(line + "  ".join(f"{s.mix[term]:{max(len(term), 6)}.2f}" for term in s.mix))
        before = key
    return "\n".join(lines)


def main(argv=None) -> None:
    """Print the six schedules as tables."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(argv)
    print("\n\n".join(table(name, sparsity=0.8) for name in CURRICULA))


if __name__ == "__main__":
    main()
