"""What else one could have used: SimCLR, FixMatch, FlexMatch, and the labels alone with mild views.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py --method fixmatch --model vgg-small --per-class 1000 --epochs 30 --out a.json
    python benchmarks/peers.py --method simclr --model vgg-small --per-class 1000 --epochs 30 --out peers.csv
    python evaluate.py RUN peers.csv                # beside our runs: a table takes a row from each peer

    simclr            lightly's head, loss and transform as in its CIFAR-10 example, with the optimizer of its
                      SimCLR tutorial, in batches of 256, then a linear probe; stands beside our `self`
    fixmatch          arXiv 2001.07685: a confident answer to a weak view is the label of a strong view
    flexmatch         arXiv 2110.08263: the same with a threshold for each class, which rises as it is learned
    labels-only-mild  FixMatch without its unlabelled images; stands beside our `labels-only`

A peer has the network, images, labels and number of computed images of the run of train.py with the same
flags; --epochs are the epochs of that run. An image computed forward and backward counts 1, one computed
without gradient 1/3. Our runs compute each drawn image in two views. gradual and semi also embed all
images once an epoch, which is added to the budget of fixmatch and flexmatch. The figures are of the last
step and of all test images.

FixMatch's constants are the paper's: SGD with Nesterov momentum 0.9, rate lr cos(7 pi t / 16), weight decay
5e-4, threshold 0.95, 64 labelled and 7 x 64 unlabelled images a step, weight 1. What differs from the code of
the authors:
- The mean teacher's decay of 0.999 is made for a million steps. It begins lower, at (1 + step) / (10 + step).
- Weak views are a batch of their own, without gradient, which spares two thirds of their cost.
- RandAugment (two operations, each with probability 1/2 as in that code, magnitudes of the paper's table 12)
  and cutout run in batches on the device, with parameters of their own for each image. They interpolate
  linearly. The magnitudes of brightness, colour, contrast and sharpness there are larger (0.1 to 1.8).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as in train.py

import argparse
import copy
import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms.v2 import functional as vision
from tqdm import tqdm, trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speed import Pictures

import augment
import curriculum
import data
import evaluate
import model
import train

RATES = {"simclr": 0.06, "fixmatch": 0.03, "flexmatch": 0.03, "labels-only-mild": 0.03}
THRESHOLD, LABELLED, DECAY, NO_GRADIENT = 0.95, 64, 0.999, 1 / 3
SHOWN = "dataset image_size per_class validate model epochs label_budget seed class_order lr".split()

# ---- the strong view ----


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Images [B,C,H,W] through affine maps [B,2,3] from output to input, in halves of the image's side."""
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5  # grey from outside


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image about its centre by degrees [B]."""
    angle, zero = degrees.deg2rad(), torch.zeros_like(degrees)
    rows = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]
    return warp(x, torch.stack(rows, 1).view(-1, 2, 3))


def shear(x: Tensor, row: int, column: int, amount: Tensor) -> Tensor:
    """Shear (column 0 or 1) or shift (column 2) each image along x (row 0) or y (row 1) by amount [B]."""
    matrix = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    matrix[:, row, column] = amount
    return warp(x, matrix)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits [B] of each channel."""
    step = augment.per_image(x, 2 ** (8 - bits), "bits")
    return ((x * 255).round() / step).floor() * step / 255


GEOMETRIC = {  # of images float32 [B,3,H,W] in 0..1 and u [B], uniform in 0..1
    "identity": lambda x, u: x,
    "rotate": lambda x, u: rotate(x, 60 * u - 30),
    "shear x": lambda x, u: shear(x, 0, 1, 0.6 * u - 0.3),
    "shear y": lambda x, u: shear(x, 1, 0, 0.6 * u - 0.3),
    "translate x": lambda x, u: shear(x, 0, 2, 2 * (0.6 * u - 0.3)),
    "translate y": lambda x, u: shear(x, 1, 2, 2 * (0.6 * u - 0.3)),
}
PHOTOMETRIC = {  # only where colours may change
    "autocontrast": lambda x, u: vision.autocontrast(x),
    "brightness": lambda x, u: augment.adjust_brightness(x, 0.05 + 0.9 * u),
    "color": lambda x, u: augment.adjust_saturation(x, 0.05 + 0.9 * u),
    "contrast": lambda x, u: augment.adjust_contrast(x, 0.05 + 0.9 * u),
    "equalize": lambda x, u: vision.equalize(x),
    "posterize": lambda x, u: posterize(x, 4 + (4 * u).round()),
    "sharpness": lambda x, u: augment.blend(x, vision.adjust_sharpness(x, 0.0), 0.05 + 0.9 * u),
    "solarize": lambda x, u: torch.where(x < augment.per_image(x, u, "u"), x, 1 - x),
}


def rand_augment(x: Tensor, color: bool, generator: Generator) -> Tensor:
    """Two random operations for every image, each with probability 1/2 and a random magnitude."""
    operations = [*GEOMETRIC.values(), *(PHOTOMETRIC.values() if color else ())]
    for _ in range(2):
        which = torch.randint(len(operations), (len(x),), device=x.device, generator=generator)
        u, skip = torch.rand(2, len(x), device=x.device, generator=generator)
        which[skip < 0.5] = 0  # the identity
        x, before = torch.empty_like(x), x
        for number, operation in enumerate(operations):
            index = (which == number).nonzero()[:, 0]
            if len(index):
                x[index] = operation(before[index], u[index])
    return x


def cutout(x: Tensor, generator: Generator) -> Tensor:
    """A grey square in every image; its side is up to half the image's, its centre anywhere."""
    side, top, left = torch.rand(3, len(x), 1, device=x.device, generator=generator)  # (B, 1) each
    rows, columns = ((torch.arange(n, device=x.device) + 0.5) / n for n in x.shape[2:])
    rows, columns = (rows - top).abs() < side / 4, (columns - left).abs() < side / 4  # (B, H), (B, W)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.5)


def weak_view(dataset: data.Dataset, index: Tensor, generator: Generator) -> Tensor:
    """Training images `index` [B], shifted by up to an eighth of their side and perhaps mirrored.

    What comes from outside is reflected: the shift of a larger, reflected image is cut to the middle.
    """
    x, n = augment.to_float(dataset.train_x[index]), dataset.train_x.shape[-1] // 8
    x = augment.weak(F.pad(x, (n,) * 4, mode="reflect"), dataset.flip, n, generator)
    return x[:, :, n:-n, n:-n]


def strong_view(dataset: data.Dataset, index: Tensor, generator: Generator) -> Tensor:
    """A weak view after RandAugment and cutout."""
    x = weak_view(dataset, index, generator)
    return cutout(rand_augment(x, dataset.color, generator), generator)


# ---- training ----


def build(args: argparse.Namespace, dataset: data.Dataset) -> model.Network:
    """The network that train.py trains, with a unit for each class."""
    torch.manual_seed(args.seed)
    options = dict(mean=dataset.mean, std=dataset.std, image_size=args.image_size)
    network = model.build(args.model, len(dataset.classes), **options)
    return network.to(dataset.train_x.device, memory_format=torch.channels_last)


def precision(device: torch.device) -> torch.autocast:
    """bfloat16 where train.py has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=model.supports_bf16(device))


def class_thresholds(confident: Tensor, classes: int) -> Tensor:
    """FlexMatch's thresholds [C], 0.95 b / (2 - b) (equations 9 to 11).

    confident: int64 [N], the class of each image's latest confident answer, or -1. b: number of images of the
    class, relative to the largest class or to the number of images at -1, whichever is larger.
    """
    count = (confident + 1).bincount(minlength=classes + 1)
    b = count[1:] / count.max()
    return THRESHOLD * b / (2 - b)


def train_match(args: argparse.Namespace, dataset: data.Dataset, labelled: Tensor, budget: float) -> tuple:
    """FixMatch, FlexMatch or the labels alone (labelled: bool [N]); the mean teacher, the images computed."""
    y, device, classes = dataset.train_y, dataset.train_x.device, len(dataset.classes)
    network = build(args, dataset)
    teacher, optimizer = copy.deepcopy(network).eval(), model.configure_optimizer(network, args.lr)
    generator, draws = Generator(device).manual_seed(args.seed), Generator().manual_seed(args.seed)
    size = 0 if args.method == "labels-only-mild" else LABELLED * args.ratio
    cost = LABELLED + size * (1 + NO_GRADIENT)
    steps = max(1, int(budget / cost))
    known = data.draw(labelled.nonzero()[:, 0].cpu(), steps * LABELLED, draws).view(steps, -1).to(device)
    if size:
        others = data.draw(torch.arange(len(y)), steps * size, draws).view(steps, -1).to(device)
    confident, threshold = torch.full_like(y, -1), torch.full((classes,), THRESHOLD, device=device)

    def logits(x: Tensor) -> Tensor:
        with precision(device):
            return network.head(network.embed(x.contiguous(memory_format=torch.channels_last)))

    for step in trange(steps, desc=args.method, mininterval=10):
        model.set_learning_rate(optimizer, args.lr * math.cos(7 * math.pi / 16 * step / steps))
        x, target = weak_view(dataset, known[step], generator), y[known[step]]
        weight = torch.full((LABELLED,), 1 / LABELLED, device=device)
        if size:
            index = others[step]
            with torch.no_grad():
                sure, guess = logits(weak_view(dataset, index, generator)).softmax(1).max(1)  # (size) each
            if args.method == "flexmatch":
                threshold = class_thresholds(confident, classes)
                confident[index] = torch.where(sure >= THRESHOLD, guess, confident[index])
            x = torch.cat([x, strong_view(dataset, index, generator)])  # (LABELLED + size, 3, H, W)
            target = torch.cat([target, guess])
            weight = torch.cat([weight, (sure >= threshold[guess]) / size])
        loss = (weight * F.cross_entropy(logits(x), target, reduction="none")).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_ema(teacher, network, min(DECAY, (1 + step) / (10 + step)))
    return teacher, steps * cost


def train_simclr(args: argparse.Namespace, dataset: data.Dataset, budget: float) -> tuple:
    """SimCLR by lightly on our encoder; the network and the number of images computed."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    device, network = dataset.train_x.device, build(args, dataset)
    width, size = network.head.in_features, min(256, len(dataset.train_x))
    head, criterion = SimCLRProjectionHead(width, width, 128).to(device), NTXentLoss()
    whole = nn.Sequential(network.encoder, network.norm, head)  # the transform normalises
    options = {} if dataset.flip else {"hf_prob": 0.0}
    options |= {} if dataset.color else {"cj_prob": 0.0, "random_gray_scale": 0.0}
    options |= {"normalize": {"mean": list(dataset.mean), "std": list(dataset.std)}}
    pictures = Pictures(
        dataset.train_x.cpu().numpy(), SimCLRTransform(args.image_size, gaussian_blur=0.0, **options)
    )
    steps = max(1, int(budget / (2 * size)))
    sampler = RandomSampler(pictures, num_samples=steps * size)
    loader = DataLoader(pictures, size, sampler=sampler, num_workers=min(16, os.cpu_count()))
    optimizer = torch.optim.SGD(whole.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for views in tqdm(loader, "simclr", mininterval=10):
        with precision(device):
            z0, z1 = (whole(view.to(device, memory_format=torch.channels_last)) for view in views)
        optimizer.zero_grad()
        criterion(z0.float(), z1.float()).backward()
        optimizer.step()
        scheduler.step()
    return network, steps * 2 * size


# ---- one run ----


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; what is not given is as in train.py, or as in the paper."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=RATES, required=True)
    add("--out", type=Path, required=True, help="FILE.json, or FILE.csv, to which a row is added")
    add("--lr", type=float, help=f"peak learning rate; by method {RATES}")
    add("--ratio", type=int, default=7, help="unlabelled images for each labelled one in a step (7)")
    add("--epochs", type=int, help="of the run of train.py that computes as many images")
    add("--validate", action="store_true", help="test on a held-out tenth of the training images")
    for flag, kind, default in (  # as for train.py
        *(("--dataset", str, "cifar10"), ("--data-dir", str, "data"), ("--model", str, None)),
        *(("--per-class", int, None), ("--label-budget", float, None), ("--seed", int, 0)),
        *(("--class-order", int, 0), ("--device", str, "auto")),
    ):
        add(flag, type=kind, default=default, help=f"as for train.py ({default})")
    args = parser.parse_args(argv)
    defaults = curriculum.defaults(args.dataset) | {"lr": RATES[args.method]}
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | defaults | given)


def load(args: argparse.Namespace) -> data.Dataset:
    """The images of train.py's runs, classes in the same order."""
    dataset = data.load_dataset(args.dataset, args.data_dir, image_size=args.image_size)
    dataset = data.hold_out(dataset) if args.validate else dataset
    dataset = data.class_subset(dataset, args.per_class, args.seed) if args.per_class else dataset
    args.batch_size = min(args.batch_size, max(2, len(dataset.train_y)))
    if args.label_budget is None:
        args.label_budget = 1.0 if (dataset.train_y < 0).any() else 0.1
    return data.reorder(dataset, data.class_order(len(dataset.classes), args.class_order))


def run(args: argparse.Namespace) -> dict:
    """Train a peer and measure it: a row with settings (args.*), machine, commit and figures."""
    device = train.use_device(args.device)
    dataset = load(args).to(device)
    y, test_y, n = dataset.train_y, dataset.test_y, len(dataset.train_y)
    leak, named = data.leak_order(y, args.seed), range(len(dataset.classes))
    labelled, truth = data.label_mask(leak, y, args.label_budget, named), y >= 0
    if not labelled.any():
        raise ValueError(f"--label-budget {args.label_budget} leaves no label")
    drawn = args.epochs * max(math.ceil(n / args.batch_size), args.min_steps) * args.batch_size
    match, began, headless = args.method[-5:] == "match", time.perf_counter(), args.method == "simclr"
    budget = 2 * drawn + match * NO_GRADIENT * args.epochs * n
    if headless:
        network, computed = train_simclr(args, dataset, budget)
    else:
        network, computed = train_match(args, dataset, labelled, budget)
    seconds = time.perf_counter() - began

    def embed(x: Tensor, part: str = "h") -> Tensor:
        return evaluate.embed(network, x, part, bf16=model.supports_bf16(device))

    right = embed(dataset.test_x, "logits").argmax(1) == test_y
    h, test = embed(dataset.train_x), (embed(dataset.test_x), test_y)
    git = f"git -C {Path(__file__).parent} describe --always --abbrev=40 --exclude=* --dirty".split()
    return {
        "args.curriculum": args.method,
        **{f"args.{name}": getattr(args, name) for name in SHOWN},
        "args.ratio": args.ratio if match else None,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "machine": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "accuracy": None if headless else right.float().mean().item(),
        "probe": evaluate.linear_probe(h[truth], y[truth], *test),
        "probe_leaked": evaluate.linear_probe(h[labelled], y[labelled], *test),
        "knn": evaluate.knn_accuracy(h[truth], y[truth], *test),
        "labels_used": 0 if headless else int(labelled.sum()),
        "images_computed": round(computed),
        "images_budget": round(budget),
        "images_per_second": drawn / seconds,
        "seconds": seconds,
    }


def write_row(path: Path, row: dict) -> None:
    """Write a row as JSON, or add it to a table such as record.py writes."""
    if path.suffix != ".csv":
        return data.write_json(path, row)
    rows = list(csv.DictReader(path.read_text("utf-8").splitlines())) if path.exists() else []
    row = {key: value if isinstance(value, str | None) else json.dumps(value) for key, value in row.items()}
    data.write_csv(path, [*rows, row])


def main() -> int:
    """Train one peer and write its row; the exit status."""
    try:
        args = settings()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        row = run(args)
        write_row(args.out, row)
    except (ValueError, OSError, ImportError) as error:
        print(f"peers.py: error: {error}", file=sys.stderr)
        return 2
    print("  ".join(f"{key} {row[key]}" for key in ("accuracy", "probe", "probe_leaked", "knn", "seconds")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
