"""Images and labels in memory: what is there, what is active, what is labelled.

A data set is one uint8 tensor [N,3,32,32] and one int64 tensor [N] per split, small enough to live on the training device,
so there is no loader and no worker. Labels leak out class by class in a fixed random order, so that more labels always
include the earlier ones.

    dataset = load_dataset("digits")
    order = leak_order(dataset.train_y, seed=0)
    labelled = label_mask(order, dataset.train_y, fraction=0.1, classes=[3, 1, 4])     # bool [N]
    now = pools(stages, dataset.train_y, order, classes=10, known=7)[epoch]            # now.active, now.labelled, ...
"""

import difflib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor

SIZE = 32
DATASETS = ("digits", "mnist", "cifar10", "cifar100")
ARCHIVES = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@dataclass
class Dataset:
    """Images uint8 [N,3,32,32], labels int64 [N], class names, and what may be done to the images."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: list[str]
    mean: tuple[float, ...]  # of the training images, per channel, in 0..1
    std: tuple[float, ...]
    flip: bool  # a mirrored image keeps its class
    color: bool  # colours may be changed
    scale: tuple[float, float]  # range of the area that a crop may keep

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its four tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **moved)


# ---- loading --------------------------------------------------------------------------------------------------------


def load_dataset(name: str, root: str | Path = "data", download: bool = True) -> Dataset:
    """Load "digits", "mnist", "cifar10", "cifar100" or "folder:PATH" (PATH/train/<class>/*, PATH/test/<class>/*).

    The torchvision sets are read from `root`, and fetched to it if they are not there and `download` is true; a folder
    of images `root/<name>/{train,test}/<class>` serves as well. Raises ValueError, in one line, if that fails.
    """
    if name.startswith("folder:"):
        splits, classes = read_folder(Path(name.removeprefix("folder:")))
    elif name == "digits":
        splits, classes = read_digits()
    elif name in DATASETS:
        folder = Path(root) / name
        archive = Path(root) / ARCHIVES[name]
        if (folder / "train").is_dir() and not archive.is_dir():
            splits, classes = read_folder(folder)
        else:
            splits, classes = read_torchvision(name, Path(root), download)
    else:
        raise ValueError(f"unknown dataset '{name}'{suggest(name, DATASETS)}; use {', '.join(DATASETS)} or folder:PATH")
    (train_x, train_y), (test_x, test_y) = splits
    glyphs = name in ("digits", "mnist")
    return Dataset(
        *(train_x, train_y, test_x, test_y, classes, *channel_statistics(train_x)),
        flip=not glyphs,
        color=not glyphs,
        scale=(0.5, 1.0) if glyphs else (0.2, 1.0),
    )


def suggest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean 'x'?" for the known name nearest to a mistyped one, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""


def reason(error: BaseException) -> str:
    """An error's message on one line, or its name if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def channel_statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel of uint8 images, in 0..1, from histograms."""
    value = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(x[:, c].flatten(), minlength=256) for c in range(3)]).double()
    share /= share.sum(1, keepdim=True)
    mean = share @ value
    std = (share @ value**2 - mean**2).clamp(min=1e-4).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def read_digits() -> tuple[tuple, list[str]]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fixed, stratified quarter of them is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    x = F.interpolate(x, (SIZE, SIZE), mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    y = torch.from_numpy(digits.target).long()
    train, test = train_test_split(np.arange(len(y)), test_size=0.25, stratify=y, random_state=0)
    return tuple((x[i].contiguous(), y[i]) for i in (train, test)), [str(i) for i in range(10)]


def read_torchvision(name: str, root: Path, download: bool) -> tuple[tuple, list[str]]:
    """MNIST, CIFAR-10 or CIFAR-100 from torchvision's files in `root`, fetched first if need be."""
    make = {
        "mnist": torchvision.datasets.MNIST,
        "cifar10": torchvision.datasets.CIFAR10,
        "cifar100": torchvision.datasets.CIFAR100,
    }[name]
    found = (root / ARCHIVES[name]).exists()
    try:
        try:
            parts = [make(root, train=train, download=False) for train in (True, False)]
        except RuntimeError:  # missing or altered, which torchvision does not tell apart
            if not download:
                raise
            parts = [make(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        state = "is incomplete or altered" if found else "is not there"
        cause = reason(error) if download else "no download was asked for"
        raise ValueError(
            f"{name}: {root / ARCHIVES[name]} {state} and could not be downloaded ({cause}); "
            f"put the original files there, or use --dataset digits"
        ) from None
    splits = []
    for part in parts:
        x = torch.as_tensor(part.data)
        if x.ndim == 3:  # MNIST, 28x28
            x = F.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
        else:
            x = x.permute(0, 3, 1, 2)
        splits.append((x.contiguous(), torch.as_tensor(part.targets).long()))
    return tuple(splits), [str(c).split(" - ")[0] for c in parts[0].classes]


def read_folder(path: Path) -> tuple[tuple, list[str]]:
    """An ImageFolder tree, PATH/{train,test}/<class>/*; images of any size and mode become 32x32 RGB.

    The result is kept in PATH/.cache-32.pt and used again until a file is added, removed or changed.
    """
    folders = []
    for split in ("train", "test"):
        if not (path / split).is_dir():
            raise ValueError(f"{path / split} is not there; a folder data set is PATH/train/<class>/* and PATH/test/<class>/*")
        try:
            folders.append(torchvision.datasets.ImageFolder(path / split))
        except FileNotFoundError as error:
            raise ValueError(f"{path / split}: {reason(error)}") from None
    train, test = folders
    missing = sorted(set(train.classes) ^ set(test.classes))
    if missing:
        raise ValueError(f"{path}: class '{missing[0]}' must be in both train and test")
    if len(train.classes) < 2:
        raise ValueError(f"{path}: only the class '{train.classes[0]}'; at least two are needed")

    digest = hashlib.sha256()
    for name, _ in train.samples + test.samples:
        stat = os.stat(name)
        digest.update(f"{os.path.relpath(name, path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    signature, cache = digest.hexdigest(), path / f".cache-{SIZE}.pt"
    if cache.is_file():
        try:
            kept = torch.load(cache, weights_only=True)
            if kept["signature"] == signature:
                return kept["splits"], train.classes
        except Exception:  # a damaged cache is made again
            pass
    splits = []
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        for folder in folders:
            images = list(pool.map(read_image, (name for name, _ in folder.samples)))
            x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
            splits.append((x, torch.tensor([y for _, y in folder.samples])))
    part = cache.with_suffix(f".{os.getpid()}")
    try:
        torch.save({"signature": signature, "splits": tuple(splits)}, part)
        os.replace(part, cache)
    except (OSError, RuntimeError):  # a read-only folder works as well, it only starts slower
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return tuple(splits), train.classes


def read_image(name: str) -> np.ndarray:
    """One image file as uint8 [32,32,3]: scaled to cover the square, cut at the centre."""
    try:
        with Image.open(name) as image:
            if image.mode.startswith("I;16"):  # 16-bit grey, which PIL would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except Exception as error:  # PIL's readers raise whatever a torn file makes them trip over
        raise ValueError(f"{name}: not a readable image ({reason(error)})") from None


# ---- choosing -------------------------------------------------------------------------------------------------------


def class_subset(dataset: Dataset, per_class: int, seed: int) -> Dataset:
    """The data set with at most `per_class` random training images of each class; the test set is untouched."""
    keep = leak_order(dataset.train_y, seed) < per_class
    return replace(dataset, train_x=dataset.train_x[keep], train_y=dataset.train_y[keep])


def hold_out(dataset: Dataset, share: float = 0.1) -> Dataset:
    """A random `share` of each class's training images, always the same ones, in place of the test images.

    Settings chosen by such images have not seen the test set.
    """
    order, y = leak_order(dataset.train_y, seed=2**20), dataset.train_y
    held = label_mask(order, y, share, range(len(dataset.classes)))
    return replace(dataset, train_x=dataset.train_x[~held], train_y=y[~held], test_x=dataset.train_x[held], test_y=y[held])


def inject(dataset: Dataset, spec: str, root: str | Path = "data", download: bool = True) -> Dataset:
    """Append classes of another data set: spec "DATASET:class[,class]", for instance "cifar100:wolf,tank".

    A folder is "folder:PATH:class[,class]". The new classes come after the old ones. Raises ValueError, in one line,
    for a data set or a class that is not there.
    """
    source, _, names = spec.rpartition(":")
    if not source or not names or source == "folder":
        raise ValueError(f"--inject '{spec}' must be DATASET:class[,class], for instance cifar100:wolf,tank")
    other = load_dataset(source, root, download)
    parts = {"train": [], "test": []}
    classes = list(dataset.classes)
    for name in (n.strip() for n in names.split(",")):
        if name not in other.classes:
            raise ValueError(f"--inject: no class '{name}' in {source}{suggest(name, other.classes)}")
        if name in classes:
            raise ValueError(f"--inject: a class '{name}' is there already")
        for split, x, y in (("train", other.train_x, other.train_y), ("test", other.test_x, other.test_y)):
            chosen = x[y == other.classes.index(name)]
            parts[split].append((chosen, torch.full((len(chosen),), len(classes))))
        classes.append(name)
    train_x, train_y = (torch.cat(t) for t in zip((dataset.train_x, dataset.train_y), *parts["train"], strict=True))
    test_x, test_y = (torch.cat(t) for t in zip((dataset.test_x, dataset.test_y), *parts["test"], strict=True))
    return replace(dataset, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, classes=classes)


def class_order(num_classes: int, seed: int, late: int = 0) -> list[int]:
    """The order in which classes appear: a seeded permutation, but for the last `late` ones, which keep their place."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(num_classes - late, generator=generator).tolist()
    return first + list(range(num_classes - late, num_classes))


def leak_order(labels: Tensor, seed: int) -> Tensor:
    """The place of each image in the random order in which the labels of its class become known: int64 [N], from 0."""
    labels_cpu = labels.cpu()
    key = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    index = key.argsort()
    index = index[labels_cpu[index].argsort(stable=True)]  # by class, random inside a class
    count = labels_cpu.bincount()
    order = torch.empty_like(index)
    order[index] = torch.arange(len(labels)) - (count.cumsum(0) - count)[labels_cpu[index]]
    return order.to(labels.device)


def label_mask(order: Tensor, labels: Tensor, fraction: float, classes: Sequence[int]) -> Tensor:
    """Which labels are known: the first round(fraction n_c) images of each class c in `classes`. bool [N].

    order: from `leak_order`; fraction in 0..1. Nested (a larger fraction contains a smaller one) and stratified.
    Raises ValueError for a fraction outside 0..1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of labels must be in 0..1, not {fraction}")
    count = labels.bincount()
    quota = (count.double() * fraction + 0.5).floor().long()
    known = torch.zeros(len(count), dtype=torch.bool, device=labels.device)
    known[torch.as_tensor([c for c in classes if c < len(count)], dtype=torch.long, device=labels.device)] = True
    return (order < quota[labels]) & known[labels]


@dataclass
class Pool:
    """What is there to learn from in an epoch: bool masks over the images [N] and the classes [C]."""

    active: Tensor
    labelled: Tensor
    taught: Tensor  # the classes that have a label
    arrived: Tensor  # the images that are there now and were not an epoch ago
    labelled_before: Tensor  # those that had their label an epoch ago and are still there
    taught_before: Tensor


def pools(stages: Sequence, y: Tensor, order: Tensor, classes: int, known: int, replay: int | None = None) -> list[Pool]:
    """What is there in each epoch, by its Stage (of curriculum.py), of images with labels y int64 [N], which leak in `order`.

    classes: in all; known: those there from the start; replay: of classes that came before the latest late ones, only so many
    exemplars remain (None: all).
    """
    result, there, latest = [], 0, 0
    nothing, untaught = torch.zeros_like(y, dtype=torch.bool), torch.zeros(classes, dtype=torch.bool, device=y.device)
    now = Pool(nothing, nothing, untaught, nothing, nothing, untaught)
    for stage in stages:
        if stage.classes > there:
            latest, there = there, stage.classes  # the classes from `latest` on came last
        active = y < there
        if replay is not None and there > known:
            active &= (y >= latest) | (order < replay)
        labelled = label_mask(order, y, stage.label_fraction, range(stage.named)) & active
        taught = y[labelled].bincount(minlength=classes) > 0
        now = Pool(active, labelled, taught, active & ~now.active, now.labelled & active, now.taught)
        result.append(now)
    return result


def sample(mask: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the places where mask (bool [N]) is True, at random, the same for the same seed: int64."""
    index = mask.nonzero()[:, 0]
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:count].to(mask.device)]


def draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` entries of pool [M]: whole random permutations, one after the other, the last one cut off. int64 [count]."""
    rounds = math.ceil(count / len(pool))
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)])[:count]


def batches(active: Tensor, labelled: Tensor, size: int, steps: int, labelled_share: float, generator: torch.Generator) -> Iterator[Tensor]:
    """The batches of one epoch: `steps` index tensors int64 [size], on the device of `active`.

    active, labelled: bool [N]. `labelled_share` of every batch is drawn from the labelled images as long as there are
    any, the rest from all active ones. generator: on the CPU. Nothing is transferred during the epoch.
    """
    known = (active & labelled).nonzero()[:, 0].cpu()
    size_known = max(1, round(size * labelled_share)) if len(known) and labelled_share else 0
    parts = []
    if size_known:
        parts.append(draw(known, size_known * steps, generator).view(steps, size_known))
    if size_known < size:
        pool = active.nonzero()[:, 0].cpu()
        parts.append(draw(pool, (size - size_known) * steps, generator).view(steps, size - size_known))
    yield from torch.cat(parts, 1).to(active.device)


def reorder(dataset: Dataset, order: Sequence[int]) -> Dataset:
    """The data set with its classes renumbered by their place in `order`: class order[0] becomes 0, and so on."""
    rank = torch.as_tensor(order).argsort().to(dataset.train_y.device)
    classes = [dataset.classes[c] for c in order]
    return replace(dataset, train_y=rank[dataset.train_y], test_y=rank[dataset.test_y], classes=classes)
