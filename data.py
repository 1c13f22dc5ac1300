"""Images and labels in memory: what is there, active, labelled.

Images are a uint8 tensor [N,3,S,S], labels an int64 tensor [N] (-1: none).
"""

import csv
import difflib
import hashlib
import io
import json
import math
import os
import re
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ARCHIVES = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
DATASETS = ("digits", *ARCHIVES)
TEST = ("test", "val", "valid", "validation")
UNLABELLED = ("unlabelled", "unlabeled")
LAYOUT = "a folder data set is PATH/train/<class>/*, optionally PATH/unlabelled/* and PATH/test/<class>/*"
NO_IMAGE = "not an image that Pillow opens"


@dataclass
class Dataset:
    """Images, labels, and how images may be changed."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: list[str]
    mean: tuple[float, ...]  # per channel, 0..1
    std: tuple[float, ...]
    flip: bool  # a mirrored image keeps its class
    color: bool  # colours may be changed
    scale: tuple[float, float]  # area that a crop keeps
    notes: list[str] = field(default_factory=list)  # on what was read

    def to(self, device) -> "Dataset":
        """The same data set on `device`."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)})


# ---- loading ----


def load_dataset(name: str, root="data", download=True, image_size: int = 32, least: int = 2) -> Dataset:
    """Load "digits", "mnist", "cifar10", "cifar100" or "folder:PATH" as images of image_size x image_size.

    torchvision's sets are in `root`, or fetched if `download`. least: fewest classes of a folder.
    ValueError or OSError.
    """
    root, folder, notes = Path(os.path.expanduser(root)), name.removeprefix("folder:"), []
    if name in ARCHIVES and (root / name / "train").is_dir() and not (root / ARCHIVES[name]).is_dir():
        folder = root / name  # its images as files
    if folder != name:
        splits, classes, notes = read_folder(folder, image_size, least)
    elif name == "digits":
        splits, classes = read_digits(image_size)
    elif name in DATASETS:
        splits, classes = read_torchvision(name, root, download, image_size)
    else:
        there = os.path.isdir(os.path.expanduser(name))
        near = f", did you mean 'folder:{name}'?" if there else suggest(name, DATASETS)
        raise wrong(f"unknown dataset '{name}'{near}; use {', '.join(DATASETS)} or folder:PATH")
    glyphs = name in ("digits", "mnist")
    kind = dict(flip=not glyphs, color=not glyphs, scale=(0.5 if glyphs else 0.2, 1.0))
    return Dataset(*splits[0], *splits[1], classes, *channel_statistics(splits[0][0]), **kind, notes=notes)


def suggest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean 'x'?" for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""


def reason(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def printable(text: str) -> str:
    """Text, escaped where not printable."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def wrong(text: str) -> ValueError:
    """An error with this text on one line."""
    return ValueError(printable(text))


def some(names: Sequence[str], most: int = 10) -> str:
    """The first names, how many more."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def check_room(count: int, size: int, room: float = math.inf) -> None:
    """ValueError, with a size that fits, if images [count,3,size,size] exceed `room` bytes or half of RAM."""
    with suppress(AttributeError):  # not on Windows
        room = min(room, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2)
    if 3 * count * size**2 > room:
        fits = math.isqrt(int(room / 3 / count)) // 8 * 8
        way = f" or --image-size {fits}" * (fits > 0)
        raise ValueError(f"{count:,} images of {size}x{size} exceed {room / 1e6:,.0f} MB; use fewer{way}")


def channel_statistics(x: Tensor) -> tuple[tuple, tuple]:
    """Mean and deviation per channel of uint8 images, in 0..1."""
    value = torch.arange(256, dtype=torch.float64) / 255
    count = torch.stack([x[:, c].flatten().bincount(minlength=256) for c in range(3)]).double()
    share = count / count.sum(1, keepdim=True)
    mean = share @ value
    std = (share @ value**2 - mean**2).clamp(min=1e-4).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def read_digits(size: int) -> tuple[tuple, list[str]]:
    """scikit-learn's 1,797 digits; a stratified quarter is test."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    x = F.interpolate(x, (size, size), mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    y = torch.from_numpy(digits.target).long()
    split = model_selection.train_test_split(np.arange(len(y)), test_size=0.25, stratify=y, random_state=0)
    return tuple((x[i].contiguous(), y[i]) for i in split), [*"0123456789"]


def read_torchvision(name: str, root: Path, download: bool, size: int) -> tuple[tuple, list[str]]:
    """MNIST, CIFAR-10 or CIFAR-100 from torchvision's files in `root`."""
    archive, make = root / ARCHIVES[name], getattr(torchvision.datasets, name.upper())
    absent = [folder for folder in (archive, *archive.parents) if not folder.exists()]
    try:
        parts = [make(root, train=train, download=download) for train in (True, False)]
    except Exception as error:
        state = "is not there" if archive in absent else "is incomplete or altered"
        cause = f"could not be downloaded ({reason(error) if download else 'not asked for'})"
        raise wrong(f"{name}: {archive} {state} and {cause}; put the original files there") from None
    finally:
        for folder in absent:  # if empty
            with suppress(OSError):
                folder.rmdir()
    check_room(sum(map(len, parts)), size)
    splits = []
    for part in parts:
        x = torch.as_tensor(part.data)
        x = x.permute(0, 3, 1, 2) if x.ndim == 4 else F.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
        x = x.contiguous()
        if size != 32:
            chunks = x.split(1000)
            x = torch.cat([F.interpolate(x, (size, size), mode="bicubic", antialias=True) for x in chunks])
        splits.append((x, torch.as_tensor(part.targets)))
    return tuple(splits), [str(c).split(" - ")[0] for c in parts[0].classes]


# ---- folders of images ----


def read_folder(path: str | Path, size: int, least: int) -> tuple[tuple, list[str], list[str]]:
    """Read PATH/train/<class>/*, PATH/unlabelled/* and PATH/test/<class>/* as RGB images of size x size.

    unlabelled/ is optional and may be nested. test/ may be called val/, valid/ or validation/; without it a
    tenth of each class is held out, at least one image by a hash of its name.
    PATH/.cache-SIZE.pt keeps the result until a file changes.

    Returns ((train_x, train_y), (test_x, test_y)), classes, notes. ValueError for another layout.
    """
    path = os.path.normpath(os.path.expanduser(path))
    files, classes, odd = list_folder(path, least)
    places = [f"{path}/{file}" for file in files]
    stamps = [os.path.exists(p) and (os.path.getsize(p), os.path.getmtime(p)) for p in places]
    facts = ascii((size, Image.__version__, [*files], [*odd.items()], stamps)).encode()
    signature, cache = hashlib.sha256(facts).hexdigest(), f"{path}/.cache-{size}.pt"
    with suppress(Exception):  # damaged
        kept = torch.load(cache, weights_only=True)
        if kept["signature"] == signature:
            return kept["splits"], classes, kept["notes"]

    x, errors, scaled = read_images(places, size, "reading")
    bad = {file: error for file, error in zip(files, errors, strict=True) if error}
    good = {file: group for file, group in files.items() if file not in bad}
    odd[NO_IMAGE] = [file for file, error in bad.items() if error == NO_IMAGE]
    odd["unreadable"] = [f"{file} ({error})" for file, error in bad.items() if error != NO_IMAGE]
    for split, name in set(files.values()) - set(good.values()):
        if name:
            own = some([f"{file} ({bad[file]})" for file in bad if files[file] == (split, name)], 3)
            raise wrong(f"{path}: class '{name}' has no readable image in {split}: {own}")
    x = x[torch.tensor([not error for error in errors])]
    y = torch.tensor([classes.index(name) if name else -1 for _, name in good.values()])
    title, held = "test", set()
    if not any(split in TEST for split, _ in good.values()):
        title = "test, a tenth of each class held out of train"
        by_hash = sorted(good, key=lambda file: hashlib.sha256(os.fsencode(file)).digest())
        for name in classes:
            own = [file for file in by_hash if good[file][1] == name]
            if len(own) < 2:
                raise wrong(f"{path}: class '{name}' has one image and needs two, or a folder test/")
            held.update(own[: max(1, round(len(own) / 10))])
    test = torch.tensor([split in TEST or file in held for file, (split, _) in good.items()])
    notes = []
    for part, mask in {"train": ~test & (y >= 0), "unlabelled": y < 0, title: test}.items():
        count = Counter(y[mask].tolist())
        each = some([f"{name[:40]} {count[c]}" for c, name in enumerate(classes) if count[c]], 12)
        if count:
            notes.append(f"{part}: {count.total()} images" + f" ({each})" * bool(each))
    alike = defaultdict(list)
    for file, image, out in zip(good, x, test.tolist(), strict=True):
        alike[hashlib.sha256(image.numpy()).digest()].append((file, good[file][1], out))
    for same in alike.values():
        _, names, tested = zip(*same, strict=True)
        odd["in train and in test, used in both"] += [file for file, _, out in same if not out] * any(tested)
        odd["in several classes"] += [file for file, name, _ in same if name] * (len({*names} - {""}) > 1)
    notes += [f"{kind}: {len(them)}: {some(them)}" for kind, them in odd.items() if them]
    notes = [printable(note) for note in [*notes, some(scaled, 4)] if note]
    splits = (x[~test], y[~test]), (x[test], y[test])
    kept = dict(signature=signature, splits=splits, notes=notes)
    with suppress(OSError, RuntimeError):
        if "[Errno" not in f"{odd}":  # may pass
            write_atomically(cache, lambda file: torch.save(kept, file), f".{os.getpid()}")
    return splits, classes, notes


def list_folder(path: str, least: int) -> tuple[dict, list[str], dict]:
    """{file: (split, class or "")}, the classes, and {kind: files that are not read}."""
    beside = [name for name in sorted(os.listdir(path)) if name[0] != "."] if os.path.isdir(path) else []
    if not os.path.isdir(f"{path}/train"):
        raise wrong(f"{path}/train is not there{', but ' * bool(beside)}{some(beside, 4)}; {LAYOUT}")
    test = [name for name in TEST if os.path.isdir(f"{path}/{name}")][:1]
    used = [name for name in ("train", *UNLABELLED, *test) if name in beside]
    odd, files = defaultdict(list), {}
    odd["not read, beside train"] = [name for name in beside if name not in used]
    for split in used:
        for file in walk(path, split, odd):
            inner = [""] if split in UNLABELLED else file.split("/")[1:-1]
            if inner:
                files[file] = split, inner[0].encode(errors="backslashreplace").decode()
            else:
                odd["not read, in no class folder"].append(file)
    there = set(files.values())
    classes = sorted({name for _, name in there if name})
    odd["only in test, never trained"] = [name for name in classes if ("train", name) not in there]
    for name in classes:
        if re.fullmatch(r"unknown|unlabell?ed|unit \d+", name):
            raise wrong(f"{path}: no class may be called '{name}'; images without a label: unlabelled/")
    for name in classes if test else ():
        if (test[0], name) not in there:
            raise wrong(f"{path}: class '{name}' must be in train and test, is not in {test[0]}; {LAYOUT}")
    if len(classes) < least:
        raise wrong(f"{path}/train: {classes} is too few classes; {LAYOUT}")
    return files, classes, odd


def walk(root: str, top: str, odd: dict) -> list[str]:
    """Files below root/top, relative to root, sorted; `odd` gets what is not read."""

    def refuse(error):
        raise error

    found, seen = [], {os.path.realpath(parent) for parent in Path(root, top, "x").absolute().parents}
    for path, folders, files in os.walk(Path(root, top), onerror=refuse, followlinks=True):
        here = Path(path).relative_to(root).as_posix()
        target = {name: os.path.realpath(Path(path, name)) for name in folders}
        out = {name for name in folders + files if name[0] == "." or target.get(name) in seen}
        seen.update(target.values())
        folders[:] = sorted(set(folders) - out)
        files = [name for name in files if name not in out]
        found += [f"{here}/{name}" for name in files]
        odd["not read, hidden or a link back up"] += [f"{here}/{name}" for name in sorted(out)]
        odd["not read, empty"] += [] if folders or files else [here]
    return sorted(found, key=lambda file: file.split("/"))


# ---- image files ----


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files among `paths`, and for a folder all files in it that are not hidden; if none, the folder."""
    found = []
    for path in map(os.path.expanduser, paths):
        files = walk(path, "", defaultdict(list)) if os.path.isdir(path) else []
        found += [Path(path, file) for file in files] or [Path(path)]
    return found


def read_images(files: Sequence, size: int, progress: str | None = None) -> tuple[Tensor, list, list[str]]:
    """Read files in parallel: uint8 [M,3,size,size], the square in the middle of each image.

    Also returns for each file None or why it could not be read, and notes on what was cut and scaled.
    progress: label of a bar.
    """
    from tqdm import tqdm

    check_room(len(files), size)
    x = torch.zeros(len(files), 3, size, size, dtype=torch.uint8)
    pixels, errors, shapes = x.numpy(), [None] * len(files), [(size, size)] * len(files)

    def read(start: int) -> None:
        for i in range(len(files))[start : start + 16]:
            try:
                image = read_image(files[i])
                shapes[i] = image.size
                if image.size != (size, size):
                    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
                pixels[i] = np.asarray(image).transpose(2, 0, 1)
            except Exception as error:  # torn files
                errors[i] = reason(error)

    tasks, look = range(0, len(files), 16), dict(leave=False, delay=2, disable=None if progress else True)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        list(tqdm(pool.map(read, tasks), progress, len(tasks), **look))
    notes = [
        f"{w}x{h} -> {size}x{size}: {'the middle' if w != h else 'shrunk' if w > size else 'enlarged'} ({n})"
        for (w, h), n in Counter(shapes).most_common()
        if (w, h) != (size, size)
    ]
    return x, errors, notes


def read_image(path) -> Image.Image:
    """An image file as RGB, upright, of several frames the first."""
    if not os.path.isfile(path):  # a pipe would block
        os.stat(path)
        raise ValueError("no file, nor a folder with images")
    try:
        with Image.open(path) as image:
            image.load()
            with suppress(Exception):  # odd metadata
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except UnidentifiedImageError:
        named = Image.registered_extensions().get(Path(path).suffix.lower()) in Image.OPEN
        raise ValueError("not a readable image" if named else NO_IMAGE) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: transparency on white, more than 8 bits scaled by their range.

    The range is the smallest of 8, 12 and 16 bits that holds all pixels, of floats 0..1 or, above 32, 0..255,
    else from darkest to brightest pixel.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ValueError("no pixel is a number")
        low, high = finite.min().item(), finite.max().item()
        ends = (255, 4095, 65535) if values.dtype.kind in "iu" else (255 if high > 32 else 1,)
        low, high = next(((0, end) for end in ends if 0 <= low and high <= end), (low, high))
        values = np.where(values == image.info.get("transparency"), high, values.astype(np.float64))
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        image = Image.fromarray(((values - low) * (255.999 / ((high - low) or 1))).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# ---- choosing ----


def class_subset(dataset: Dataset, per_class: int, seed: int) -> Dataset:
    """At most `per_class` random training images of each class, and all without a label."""
    keep = (leak_order(dataset.train_y, seed) < per_class) | (dataset.train_y < 0)
    return replace(dataset, train_x=dataset.train_x[keep], train_y=dataset.train_y[keep])


def hold_out(dataset: Dataset, share: float = 0.1) -> Dataset:
    """A fixed random `share` of each class's training images, at least one, as test images."""
    x, y = dataset.train_x, dataset.train_y
    order = leak_order(y, seed=2**20)
    held = label_mask(order, y, share, range(len(dataset.classes))) | (order == 0)
    notes = [*dataset.notes, f"--validate: the test is {held.sum()} images of train instead"]
    return replace(dataset, train_x=x[~held], train_y=y[~held], test_x=x[held], test_y=y[held], notes=notes)


def inject(dataset: Dataset, spec: str, root="data") -> Dataset:
    """Append classes of another data set: spec "DATASET:class[,class]".

    Unlabelled images stay out. ValueError if absent.
    """
    source, _, text = spec.rpartition(":")
    if not text or source in ("", "folder"):
        raise wrong(f"--inject '{spec}' must be DATASET:class[,class], as cifar100:wolf,tank")
    other = load_dataset(source, root, True, dataset.train_x.shape[-1], 1)
    names = [text] if text in other.classes else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in other.classes:
            raise wrong(f"--inject: no class '{name}' in {source}{suggest(name, other.classes)}")
        if name in dataset.classes or names.count(name) > 1:
            raise wrong(f"--inject: a class '{name}' is there already")
    notes = [f"{source} (only {some(names)}): {note}" for note in other.notes]
    rank = torch.full((len(other.classes) + 1,), -1)  # new labels of other's classes; the last: of -1
    rank[[other.classes.index(name) for name in names]] = torch.arange(len(names)) + len(dataset.classes)
    parts = {"classes": dataset.classes + names, "notes": dataset.notes + notes}
    for x, y in ("train_x", "train_y"), ("test_x", "test_y"):
        label = rank[getattr(other, y)]
        parts[x] = torch.cat([getattr(dataset, x), getattr(other, x)[label >= 0]])
        parts[y] = torch.cat([getattr(dataset, y), label[label >= 0]])
    return replace(dataset, **parts)


def class_order(num_classes: int, seed: int) -> list[int]:
    """The order of classes: a permutation."""
    return torch.randperm(num_classes, generator=torch.Generator().manual_seed(int(seed))).tolist()


def leak_order(labels: Tensor, seed: int) -> Tensor:
    """Each image's place in the random order in which its class's labels leak: int64 [N]; N for label -1."""
    y = labels.cpu().long() + 1
    key = torch.rand(len(y), generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64)
    index = torch.from_numpy(np.lexsort((key, y)))  # by class, then by key
    count = y.bincount()
    first = count.cumsum(0) - count  # of each class in index
    order = index.argsort() - first[y]
    return order.masked_fill(y == 0, len(y)).to(labels.device)


def label_mask(order: Tensor, labels: Tensor, fraction: float, classes: Sequence[int]) -> Tensor:
    """Which labels are known: the first round(fraction n_c) images of each class c in `classes`. bool [N].

    order: from `leak_order`. A larger fraction contains a smaller one. ValueError outside 0..1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of labels must be in 0..1, not {fraction}")
    y = labels.long() + 1  # 0: no label, whose order exceeds any quota
    quota = (y.bincount(minlength=1).double() * fraction + 0.5).long()
    return (order < quota[y]) & torch.isin(y, y.new_tensor([int(c) + 1 for c in classes]))


@dataclass
class Pool:
    """What an epoch learns from: bool masks of images [N], classes [C]."""

    active: Tensor  # may be drawn
    labelled: Tensor  # active, and the label may be used
    taught: Tensor  # classes that have a label, now or in an earlier run
    arrived: Tensor  # active, but not in the epoch before
    labelled_before: Tensor  # active, and labelled in the epoch before
    taught_before: Tensor


def pools(stages, y: Tensor, order: Tensor, classes: int, known: int, replay, taught: Tensor) -> list[Pool]:
    """The Pool of each epoch, by its Stage (of curriculum.py); the labels y int64 [N] leak in `order`.

    Images without a label are always there. classes: in all; known: at the start; replay: images kept
    of a class when later ones come (None: all); taught: bool [C], earlier.
    """
    nothing, result, latest = y < -1, [], 0
    there = int(taught.sum())
    now = Pool(nothing, nothing, taught, nothing, nothing, taught)
    for stage in stages:
        if stage.classes > there:
            latest, there = there, stage.classes  # classes from `latest` on are the newest
        active = y < there
        if replay is not None and there > known:
            active &= (y >= latest) | (order < replay) | (y < 0)
        labelled = label_mask(order, y, stage.label_fraction, range(stage.named)) & active
        named = taught | (y[labelled].bincount(minlength=classes) > 0)
        now = Pool(active, labelled, named, active & ~now.active, now.labelled & active, now.taught)
        result.append(now)
    return result


def sample(mask: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` random places where mask (bool [N]) is True, by a seed: int64."""
    index = mask.nonzero()[:, 0]
    chosen = torch.randperm(len(index), generator=torch.Generator().manual_seed(int(seed)))[:count]
    return index[chosen.to(mask.device)]


def draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` entries of pool [M]: whole random permutations, the last cut. int64 [count]."""
    rounds = [torch.randperm(len(pool), generator=generator) for _ in range(0, count, len(pool))]
    return pool[torch.cat(rounds)[:count]]


def batches(active: Tensor, labelled: Tensor, size: int, steps: int, labelled_share: float, generator):
    """The batches of an epoch: `steps` tensors of indices, int64 [size], of `active` (bool [N]) images.

    `labelled_share` of each batch is drawn from the `labelled` images, if any, the rest from active ones.
    generator: on the CPU.
    """
    known, pool = ((active & mask).nonzero()[:, 0].cpu() for mask in (labelled, active))
    first = max(1, round(size * labelled_share)) if len(known) and labelled_share else 0
    drawn = [(known, first), (pool, size - first)]
    parts = [draw(index, n * steps, generator).view(steps, n) for index, n in drawn if n]
    yield from torch.cat(parts, 1).to(active.device)


def reorder(dataset: Dataset, order: Sequence[int]) -> Dataset:
    """The data set with its classes in `order`: order[0] becomes 0."""
    classes = [dataset.classes[c] for c in order]
    rank = torch.tensor([*map(classes.index, dataset.classes), -1], device=dataset.train_y.device)
    return replace(dataset, train_y=rank[dataset.train_y], test_y=rank[dataset.test_y], classes=classes)


def fingerprint(dataset: Dataset) -> dict:
    """{"images": a digest of all pixels and labels, "classes": the names}."""
    digest = hashlib.sha256()
    for part in filter(torch.is_tensor, vars(dataset).values()):
        digest.update(f"{part.shape}".encode())
        digest.update(part.cpu().contiguous().numpy())
    return {"images": digest.hexdigest(), "classes": list(dataset.classes)}


# ---- files of a run ----


def write_atomically(path, content, mark: str = "") -> None:
    """Write bytes, or what a function writes; a kill or full disk leaves the old file."""
    part = Path(f"{path}{mark}.part")
    try:
        with open(part, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:  # torch.save hides a full disk
        raise (error.__context__ or error) from None
    finally:
        with suppress(OSError):
            part.unlink()


def as_json(value: dict) -> bytes:
    """A dictionary as JSON in UTF-8."""
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode(errors="backslashreplace")


def write_json(path, value: dict) -> None:
    """Write `as_json`."""
    write_atomically(path, as_json(value))


def write_csv(path, rows: list[dict], columns=None) -> None:
    """Rows as CSV in UTF-8, floats with six digits."""
    columns = columns or [*dict.fromkeys(key for row in rows for key in row)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\r\n")  # quotes \r
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items() if v == v})
    write_atomically(path, text.getvalue().replace("\r\n", "\n").encode(errors="backslashreplace"))


def write_table(path, rows: list[dict], columns=None) -> str | None:
    """`write_csv`; None, or a warning if the file may not be replaced."""
    try:
        write_csv(path, rows, columns)
    except PermissionError as error:
        return printable(f"{path} was not written ({error.strerror}); is it open in another program?")
    return None


def read_checkpoint(path, version: int) -> dict:
    """A checkpoint of this version, on the CPU; else ValueError."""
    try:
        with zipfile.ZipFile(path) as file:
            if torn := file.testzip():  # torch.load ignores checksums
                raise ValueError(f"the checksum of {torn} is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved.get("version")
    except Exception as error:
        state = "damaged" if os.path.exists(path) else "not there"
        raise wrong(f"{path} is {state} ({reason(error)})") from None
    if found != version:
        raise wrong(f"{path} has version {found}, this program writes {version}")
    return saved
