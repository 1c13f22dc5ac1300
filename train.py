"""Raise an image encoder by gradual supervision: `python train.py --curriculum gradual`.

One loop: stage -> newcomers and names -> neighbours -> batch -> two views -> encode -> losses -> step -> masks and memory ->
prune -> evaluate -> log -> checkpoint. What it calls is in the other modules, each of which can be used without this one.
`python train.py --help` lists the flags; a run leaves args.json, log.csv, summary.json, checkpoint.pt and figures in its folder.
"""

import argparse
import csv
import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm import tqdm

import augment
import curriculum
import data
import evaluate
import grow_prune
import losses
import model

# What a data set is trained with unless a flag says otherwise. lr is the peak, for SGD with momentum at that batch size.
DEFAULTS = {
    "digits": dict(model="cnn", epochs=40, batch_size=128, lr=0.06),
    "mnist": dict(model="cnn", epochs=5, batch_size=128, lr=0.06),
    "cifar10": dict(model="vgg16", epochs=100, batch_size=128, lr=0.06),
    "cifar100": dict(model="vgg16", epochs=100, batch_size=128, lr=0.06),
    "folder": dict(model="vgg-small", epochs=50, batch_size=128, lr=0.06),
}
TERMS = ("ntxent", "aggregation", "propagation", "supervised")
VERSION = 1  # of the checkpoint; raise it when its contents change


# ---- command line ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        raise ValueError(message)


def parser() -> Parser:
    """Every flag, with its unit and its default."""
    parser = Parser(description="Gradual supervision of an image encoder.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what is taught").add_argument
    add("--curriculum", default="gradual", metavar="NAME", help=", ".join(curriculum.CURRICULA))
    add("--label-budget", type=float, default=0.1, metavar="F", help="largest fraction of each class's images whose labels ever leak, 0..1")
    add("--known-classes", type=int, metavar="N", help="classes there from the start; 7 of 10, in proportion, if not given")
    add("--class-order", type=int, default=0, metavar="SEED", help="seed of the order in which classes appear")
    add("--without", nargs="+", default=[], choices=TERMS, metavar="LOSS", help=f"leave out: {', '.join(TERMS)}")
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="auto",
        metavar="NAME",
        help="digits, mnist, cifar10, cifar100, folder:PATH; auto: cifar10 on a GPU, else digits",
    )
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are, or are downloaded to")
    add("--per-class", type=int, metavar="N", help="use only N training images of each class; all if not given")
    add("--inject", metavar="DATASET:CLASS,...", help="classes of another data set that arrive last, e.g. cifar100:wolf,tank")
    add = parser.add_argument_group("network and optimiser (defaults by data set)").add_argument
    add("--model", metavar="NAME", help=f"{', '.join(model.CONFIGS)}, or a torchvision classification model")
    add("--epochs", type=int, metavar="N", help="one epoch draws as many images as the training set has")
    add("--batch-size", type=int, metavar="N", help="images a step; each is seen in two views")
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--prune", type=float, default=0.8, metavar="SPARSITY", help="fraction of the encoder's weights that end at zero, 0..1")
    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=int, default=0, metavar="N", help="of initialisation, subset, label leak, batches and augmentation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--compile", action="store_true", help="compile the encoder: a slow first step, faster ones after it")
    add("--embedding", default="tsne", metavar="METHOD", help="picture of the test embeddings: pca, tsne or umap")
    add("--out", metavar="DIR", help="run folder; the next free runs/DATASET-CURRICULUM-sSEED if not given")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    return parser


def one_of(flag: str, value: str, known: tuple[str, ...] | list[str]) -> None:
    """ValueError, with the nearest name, unless value is known."""
    if value not in known:
        raise ValueError(f"unknown --{flag} '{value}'{data.suggest(value, known)}; use {', '.join(known)}")


def check(args: argparse.Namespace) -> None:
    """Every flag that can be judged by itself. Raises ValueError, in one line."""
    one_of("curriculum", args.curriculum, list(curriculum.CURRICULA))
    one_of("embedding", args.embedding, ["pca", "tsne", "umap"])
    for name, low, high in (("label_budget", 0, 1), ("prune", 0, 1), ("lr", 0, 1e3)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must be in {low}..{high:g}, not {value}")
    for name, low in (("known_classes", 1), ("per_class", 1), ("epochs", 1), ("batch_size", 2), ("seed", 0), ("class_order", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value < 2**31:
            raise ValueError(f"--{name.replace('_', '-')} must be a whole number of at least {low}, not {value}")
    if args.label_budget == 0 and args.curriculum not in ("self", "self-known"):
        raise ValueError(f"--label-budget 0 leaves '{args.curriculum}' without labels; use more than 0, or --curriculum self")


def check_data(args: argparse.Namespace, dataset: data.Dataset) -> None:
    """The flags that depend on the data. Raises ValueError, in one line."""
    num_classes, count = len(dataset.classes), dataset.train_y.bincount(minlength=len(dataset.classes))
    if not 1 <= args.known_classes <= num_classes:
        raise ValueError(f"--known-classes must be in 1..{num_classes}, the number of classes, not {args.known_classes}")
    if args.batch_size > len(dataset.train_y):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(dataset.train_y)} training images")
    few = int(count.argmin())
    if args.curriculum not in ("self", "self-known") and args.label_budget * int(count[few]) < 0.5:
        raise ValueError(
            f"--label-budget {args.label_budget} gives class '{dataset.classes[few]}' with its {int(count[few])} images no label; "
            f"use at least {1 / int(count[few]):.2g}"
        )


def pick_device(name: str) -> torch.device:
    """The device called `name`, shown to work. Raises ValueError, in one line."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device '{name}' cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None


def run_folder(args: argparse.Namespace) -> Path:
    """A new, empty run folder. Raises ValueError if --out cannot be written or holds something already."""
    if args.out is None:
        stem = f"runs/{args.dataset.split(':')[0]}-{args.curriculum}-s{args.seed}"
        names = (Path(stem + (f"-{n}" if n > 1 else "")) for n in range(1, 10**6))
        out = next(name for name in names if not name.exists())
    else:
        out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ValueError(f"--out {out} is not empty; choose another folder, or --resume the run in it")
        (out / "args.json").touch()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror})") from None
    return out


# ---- machine --------------------------------------------------------------------------------------------------------


def tune_machine() -> None:
    """TF32 where there is a GPU, no denormals, and a malloc that keeps freed pages instead of giving them back every step."""
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    with suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and (features.get("avx512_bf16", False) or features.get("amx_bf16", False))


def provenance() -> dict:
    """What else it takes to run this again: versions, commit, machine."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True) if (here / ".git").exists() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    commit = git.stdout.strip() if git and git.returncode == 0 else None
    return {"versions": versions, "commit": commit, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}


# ---- files ----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write) -> None:
    """Call write(file) on a temporary file, flush it to disk, and only then give it its name."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: dict) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_log(path: Path, rows: list[dict]) -> None:
    """log.csv from its rows; a figure that does not exist yet is left empty."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


# ---- the method -----------------------------------------------------------------------------------------------------


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 5 % of the run, constant to 60 % so that late classes meet a plastic network, then a cosine to zero."""
    return peak * min(1.0, progress / 0.05, 0.5 * (1 + math.cos(math.pi * curriculum.ramp(progress, 0.6, 1.0))))


def parameter_groups(network: model.Network, weight_decay: float = 5e-4) -> list[dict]:
    """Weights of encoder and projector decay; biases, norms and the cosine head do not."""
    decays = {name: p.ndim > 1 and not name.startswith("head.") for name, p in network.named_parameters()}
    groups = [[p for n, p in network.named_parameters() if decays[n] == d] for d in (True, False)]
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def one_hot(y: Tensor, known: Tensor, units: int) -> Tensor:
    """Targets [B,units] for classes y [B]; a row of zeros where not known (bool [B])."""
    return F.one_hot(torch.where(known, y, 0), units) * known[:, None]


def start(args: argparse.Namespace) -> tuple:
    """A new run: everything checked, the data loaded, the folder made. Raises ValueError, in one line."""
    check(args)
    device = pick_device(args.device)
    if args.dataset == "auto":
        args.dataset = "cifar10" if device.type == "cuda" else "digits"
        other = "--dataset digits for a minute's run" if device.type == "cuda" else "--dataset cifar10 --model vgg-small for real images"
        print(f"--dataset auto: {args.dataset}, since there is {'a' if device.type == 'cuda' else 'no'} GPU ({other})")
    defaults = DEFAULTS.get(args.dataset.partition(":")[0], {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    dataset = load(args)
    network = model.build(args.model, 1)  # a wrong name is found before the folder is made
    del network
    out = run_folder(args)
    write_json(out / "args.json", vars(args) | provenance())
    return args, dataset, device, out, None


def load(args: argparse.Namespace) -> data.Dataset:
    """The data of a run, its classes in their order of arrival. Fills in the number of known classes."""
    dataset = data.load_dataset(args.dataset, args.data_dir)
    own = len(dataset.classes)
    if args.inject:
        dataset = data.inject(dataset, args.inject, args.data_dir)
    if args.per_class:
        dataset = data.class_subset(dataset, args.per_class, args.seed)
    if args.known_classes is None:
        args.known_classes = curriculum.default_known(own)
    check_data(args, dataset)
    return data.reorder(dataset, data.class_order(len(dataset.classes), args.class_order, late=len(dataset.classes) - own))


def resume(args: argparse.Namespace, argv: list[str] | None) -> tuple:
    """A run to go on with, its settings taken from args.json. Raises ValueError if it cannot be, or is asked to change."""
    out = Path(args.out)
    try:
        saved = json.loads((out / "args.json").read_text())
        checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"--resume: {error.filename} is not there; {out} holds no run that got past its first epoch") from None
    except Exception as error:
        raise ValueError(f"--resume: the run in {out} is damaged ({str(error).splitlines()[0]})") from None
    if checkpoint.get("version") != VERSION:
        raise ValueError(f"--resume: the checkpoint has version {checkpoint.get('version')}, this program writes {VERSION}")
    again = parser()
    names = vars(args).keys()
    again.set_defaults(**{k: v for k, v in saved.items() if k in names and k not in ("out", "resume", "device")})
    args = again.parse_args(argv)
    for name in names - {"out", "resume", "device", "data_dir", "embedding"}:
        kept, here = checkpoint["args"].get(name), getattr(args, name)
        if kept != here:
            raise ValueError(f"--resume: the run was made with --{name.replace('_', '-')} {kept}, not {here}")
    check(args)
    return args, load(args), pick_device(args.device), out, checkpoint


def train(args: argparse.Namespace, dataset: data.Dataset, device: torch.device, out: Path, checkpoint: dict | None) -> int:
    """The loop."""
    classes, known, n = len(dataset.classes), args.known_classes, len(dataset.train_y)
    dataset, bf16 = dataset.to(device), has_bf16(device)
    images, y = dataset.train_x, dataset.train_y
    leak = data.leak_order(y, args.seed)
    # During the run a part of the test images has to do; the last epoch sees all of them.
    some = torch.randperm(len(dataset.test_y), generator=torch.Generator().manual_seed(0))[: max(1000, n // 5)].to(device)

    def stage_of(epoch: int) -> curriculum.Stage:
        return curriculum.stage(args.curriculum, epoch, args.epochs, classes, known, args.label_budget, args.prune)

    torch.manual_seed(args.seed)
    units = len(checkpoint["network"]["head.weight"]) if checkpoint else stage_of(0).classes
    network = model.build(args.model, units, mean=dataset.mean, std=dataset.std).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(parameter_groups(network), lr=args.lr, momentum=0.9, nesterov=True)
    bank = losses.MemoryBank(n, network.projector[-1].out_features, device=device)
    masks, rows, first_sight, novelty, first_epoch = {}, [], [], [], 0
    if checkpoint:
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        bank.rows = checkpoint["bank"].to(device)
        masks = {name: mask.to(device) for name, mask in checkpoint["masks"].items()}
        rows, first_sight, novelty = checkpoint["rows"], checkpoint["first_sight"], checkpoint["novelty"]
        first_epoch = checkpoint["epoch"] + 1
        if first_epoch == args.epochs and (out / "summary.json").exists():
            print(f"{out} is finished: {args.epochs} epochs; nothing to do")
            return 0
    if args.compile:
        network.encoder.compile()
    announce(args, dataset, network, device, bf16, out)

    steps = math.ceil(n / args.batch_size)
    background = max(16, round(0.0064 * n))
    for epoch in range(first_epoch, args.epochs):
        began = time.perf_counter()
        stage, before = stage_of(epoch), stage_of(epoch - 1) if epoch else None
        mix = {term: 0.0 if term in args.without else weight for term, weight in stage.mix.items()}
        # Each epoch has its own seed, so that a resumed run draws what an uninterrupted one would.
        seed = (args.seed << 20) + epoch
        torch.manual_seed(seed)
        draws, generator = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)

        active = y < stage.classes
        labelled = data.label_mask(leak, y, stage.label_fraction, range(stage.named))
        taught = torch.bincount(y[labelled], minlength=classes) > 0  # classes with a label
        met = before.classes if before else 0
        had = data.label_mask(leak, y, before.label_fraction if before else 0.0, range(before.named if before else 0))

        # Newcomers: their images join the pool, and the memory bank, before anything is learned from them.
        if stage.classes > met:
            new = ((y >= met) & active).nonzero()[:, 0]
            bank.update(new, evaluate.embed(network, images[new], "z", bf16=bf16), momentum=0)
            if met and had.any():
                score = -scores(network, dataset.test_x, taught, bf16).amax(1)
                seen = (dataset.test_y < stage.classes) & (taught[dataset.test_y] | (dataset.test_y >= met))
                novelty.append(evaluate.novelty_auroc(score[seen], dataset.test_y[seen] >= met))

        # Names: the first labels of a class give it a unit that points at them, before any gradient step.
        if stage.named > network.head.out_features:
            grow_prune.grow_head(network.head, optimizer, stage.named - network.head.out_features)
        if epoch:
            for c in (taught & ~(torch.bincount(y[had], minlength=classes) > 0)).nonzero()[:, 0].tolist():
                mine = labelled & (y == c)
                grow_prune.imprint(network.head, c, evaluate.embed(network, images[mine], bf16=bf16))
                if c >= known:
                    theirs = dataset.test_y == c
                    guess = scores(network, dataset.test_x[theirs], taught, bf16).argmax(1)
                    first_sight.append(
                        {"class": dataset.classes[c], "labels": int(mine.sum()), "accuracy": (guess == c).float().mean().item()}
                    )

        # Neighbours: this epoch's clusters, and what the labelled neighbours say about the rest.
        pool = active.nonzero()[:, 0]
        clusters, pseudo, confidence = None, torch.full_like(y, -1), torch.zeros(n, device=device)
        if mix["aggregation"]:
            clusters = losses.clusterings(bank.rows, active, max(2, round(len(pool) / 42)), generator=generator)
        if labelled.any():
            pseudo[pool], confidence[pool] = losses.propagate_labels(bank.rows[pool], y[pool], labelled[pool], balance=True)

        use = taught[: network.head.out_features]
        network.train()
        record = torch.zeros(steps, len(TERMS), device=device)  # read once an epoch: no waiting for a GPU in the loop
        order = data.batches(active, labelled, args.batch_size, steps, stage.labelled_share, draws)
        for step, index in enumerate(tqdm(order, f"epoch {epoch + 1}", steps, unit="step", leave=False, mininterval=1, delay=2)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch + step / steps) / args.epochs, args.lr)
            view1, view2 = augment.two_views(images[index], dataset.scale, dataset.flip, dataset.color, generator)
            x = torch.cat([view1, view2]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                _, z, logits = network(x)
            z1, z2 = z.chunk(2)
            index2 = index.repeat(2)  # (2B)

            terms = {}
            if mix["ntxent"]:
                terms["ntxent"] = losses.nt_xent(z1, z2)
            if mix["aggregation"]:
                terms["aggregation"] = losses.local_aggregation(z, index2, bank, clusters, background)
            if mix["propagation"] and labelled.any():
                onehot = one_hot(pseudo[index2], pseudo[index2] >= 0, logits.shape[1])
                terms["propagation"] = losses.propagation(z, logits, index2, bank, pseudo, confidence, onehot, use, background)
            if mix["supervised"] and labelled.any():
                onehot = one_hot(y[index2], labelled[index2], logits.shape[1])
                terms["supervised"] = losses.supervised(logits, onehot, use)
            if terms:
                loss = sum(mix[term] * value for term, value in terms.items())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                grow_prune.apply_masks(network.encoder, masks)
            bank.update(index, z1.detach() + z2.detach())
            for term, value in terms.items():
                record[step, TERMS.index(term)] = value.detach()
        stop_if_not_finite(record, network, epoch, stage.name)

        if stage.sparsity > 0:
            masks = grow_prune.prune_smallest(network.encoder, stage.sparsity)

        trained = time.perf_counter()
        chosen = slice(None) if epoch == args.epochs - 1 else some
        test_x, test_y = dataset.test_x[chosen], dataset.test_y[chosen]
        guess = scores(network, test_x, taught, bf16).argmax(1) if taught.any() else None
        hidden = active & ~labelled & (pseudo >= 0)  # where propagation had to guess
        mean = {term: value.item() if mix[term] and value else None for term, value in zip(TERMS, record.mean(0), strict=True)}
        row = {
            "epoch": epoch + 1,
            "stage": stage.name,
            "classes": stage.classes,
            "units": network.head.out_features,
            "labels": int(labelled.sum()),
            "label_fraction": int(labelled.sum()) / n,
            "accuracy": None if guess is None else (guess == test_y).float().mean().item(),
            "old_accuracy": None if guess is None else share(guess == test_y, test_y < known),
            "new_accuracy": None if guess is None else share(guess == test_y, test_y >= known),
            "pseudo_accuracy": share(pseudo == y, hidden),
            "pseudo_coverage": share(confidence > 0.8, hidden),
            "pseudo_confident_accuracy": share(pseudo == y, hidden & (confidence > 0.8)),
            "sparsity": grow_prune.sparsity_of(network.encoder),
            **{f"loss_{term}": value for term, value in mean.items()},
            "learning_rate": optimizer.param_groups[0]["lr"],
            "images_per_second": steps * args.batch_size / (trained - began),
            "seconds": time.perf_counter() - began,
            **{
                f"accuracy_{name}": None if guess is None else accuracy
                for name, accuracy in zip(
                    dataset.classes, evaluate.class_accuracy(test_y if guess is None else guess, test_y, classes), strict=True
                )
            },
        }
        rows.append(row)
        write_log(out / "log.csv", rows)
        print(progress_line(row, args.epochs, rows), flush=True)
        state = {
            "version": VERSION,
            "args": vars(args),
            "epoch": epoch,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "bank": bank.rows,
            "masks": masks,
            "rows": rows,
            "first_sight": first_sight,
            "novelty": novelty,
        }
        write_atomically(out / "checkpoint.pt", lambda file, state=state: torch.save(state, file))
    finish(args, dataset, network, out, rows, first_sight, novelty, leak, bf16)
    return 0


def scores(network: model.Network, x: Tensor, taught: Tensor, bf16: bool) -> Tensor:
    """Probability [N,C] of each unit among those whose class has had a label."""
    logits = evaluate.embed(network, x, "logits", bf16=bf16)
    return logits.masked_fill(~taught[: logits.shape[1]], float("-inf")).softmax(1)


def share(right: Tensor, among: Tensor) -> float | None:
    """The fraction of True in right [N] where among [N] is true; None where it never is."""
    return right[among].float().mean().item() if among.any() else None


def stop_if_not_finite(record: Tensor, network: model.Network, epoch: int, stage: str) -> None:
    """Raises ValueError with the first step and loss term, or the weight, that is not finite. record: [steps, terms]."""
    bad = (~record.isfinite()).nonzero()
    if len(bad):
        step, term = bad[0].tolist()
        what = f"the loss '{TERMS[term]}' was {record[step, term].item()} in step {step + 1}"
    else:
        name = next((name for name, p in network.named_parameters() if not p.isfinite().all()), None)
        if name is None:
            return
        what = f"the weight '{name}' is not finite"
    raise ValueError(f"epoch {epoch + 1} ({stage}): {what}; the checkpoint of the epoch before is kept. Try a lower --lr")


def announce(args: argparse.Namespace, dataset: data.Dataset, network: model.Network, device: torch.device, bf16: bool, out: Path) -> None:
    """What is about to happen, and the heading of the lines that follow."""
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    late = ", ".join(dataset.classes[args.known_classes :][:5]) or "none"
    print(
        f"{args.curriculum}: {len(dataset.train_y):,} images of {args.dataset} in {len(dataset.classes)} classes (late: {late}), {args.epochs} epochs"
    )
    print(f"{args.model} with {weights:.2f} M weights on {where}, {'bfloat16' if bf16 else 'float32'}; writing to {out}\n")
    print("epoch    stage        classes  labels  ntxent  aggreg  propag  superv  accuracy    old    new  pruned   img/s    left")


def progress_line(row: dict, epochs: int, rows: list[dict]) -> str:
    """One epoch as one line."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}%"

    terms = "  ".join("     -" if row[f"loss_{t}"] is None else f"{row[f'loss_{t}']:6.3f}" for t in TERMS)
    recent = rows[-5:]
    left = round((epochs - row["epoch"]) * sum(r["seconds"] for r in recent) / len(recent))
    return (
        f"{row['epoch']:4d}/{epochs:<4d}{row['stage']:11s}  {row['classes']:7d}  {row['labels']:6d}  {terms}  {percent(row['accuracy']):>8s}"
        f"  {percent(row['old_accuracy']):>5s}  {percent(row['new_accuracy']):>5s}  {percent(row['sparsity']):>6s}"
        f"  {row['images_per_second']:6.0f}  {left // 60:3d}:{left % 60:02d}"
    )


def finish(args, dataset, network, out, rows, first_sight, novelty, leak, bf16) -> None:
    """The final figures: measured on the last epoch, written to summary.json, drawn, and printed."""
    y, classes = dataset.train_y, len(dataset.classes)
    budget = data.label_mask(leak, y, args.label_budget, range(classes))
    train_h, test_h = (evaluate.embed(network, x, bf16=bf16) for x in (dataset.train_x, dataset.test_x))
    last = rows[-1]
    per_class = [[row[f"accuracy_{name}"] for name in dataset.classes] for row in rows if row["accuracy"] is not None]
    at_sight = [s["accuracy"] for s in first_sight]
    summary = {
        **{key: last[key] for key in ("accuracy", "old_accuracy", "new_accuracy")},
        "probe": evaluate.linear_probe(train_h, y, test_h, dataset.test_y),
        "probe_leaked": evaluate.linear_probe(train_h[budget], y[budget], test_h, dataset.test_y) if budget.any() else None,
        "knn": evaluate.knn_accuracy(train_h, y, test_h, dataset.test_y),
        **{"cluster_accuracy" if k == "accuracy" else k: v for k, v in evaluate.cluster_scores(test_h, dataset.test_y).items()},
        "forgetting": float(evaluate.forgetting(per_class)[: args.known_classes].mean()) if per_class else None,
        "first_sight": sum(at_sight) / len(at_sight) if at_sight else None,
        "first_sight_classes": first_sight,
        "novelty_auroc": sum(novelty) / len(novelty) if novelty else None,
        "sparsity": last["sparsity"],
        "labels_used": last["labels"],
        "images_per_second": sorted(row["images_per_second"] for row in rows)[len(rows) // 2],
        "seconds": sum(row["seconds"] for row in rows),
        "classes": dataset.classes,
    }
    stages = [
        curriculum.stage(args.curriculum, e, args.epochs, classes, args.known_classes, args.label_budget, args.prune)
        for e in range(args.epochs)
    ]
    evaluate.draw_curves(rows, dataset.classes, args.known_classes, out / "curves.png")
    evaluate.draw_curricula({args.curriculum: stages}, out / "curriculum.png")
    evaluate.draw_embedding(test_h, dataset.test_y, dataset.classes, out / "embedding.png", args.embedding, args.known_classes)
    drawn = ["curves", "curriculum", "embedding"]
    if last["accuracy"] is not None:
        logits = evaluate.embed(network, dataset.test_x, "logits", bf16=bf16)
        evaluate.draw_confusion(logits.argmax(1), dataset.test_y, dataset.classes, out / "confusion.png")
        drawn.append("confusion")
    write_json(out / "summary.json", summary)

    print()
    for key, text in (
        ("accuracy", "head, all classes"),
        ("old_accuracy", f"head, the {args.known_classes} classes known at the start"),
        ("new_accuracy", "head, the late classes"),
        ("first_sight", "late classes at the moment of their first labels"),
        ("probe", "linear probe on the frozen encoder, all labels"),
        ("probe_leaked", "linear probe, the label budget only"),
        ("knn", "20 nearest neighbours, all labels"),
        ("ari", "adjusted Rand index of the k-means clusters"),
        ("nmi", "normalised mutual information of the same"),
        ("silhouette", "silhouette of the same"),
        ("forgetting", "lost since its best epoch, mean over old classes"),
        ("sparsity", "of the encoder's weights are zero"),
    ):
        value = summary[key]
        unit = "" if key in ("ari", "nmi", "silhouette") else "%"
        print(f"{key:13s} {'-' if value is None else f'{100 * value:.1f}%' if unit else f'{value:.3f}':>7s}   {text}")
    print(f"{'labels_used':13s} {summary['labels_used']:7d}   of {len(y):,}")
    print(f"{'seconds':13s} {summary['seconds']:7.0f}   {summary['images_per_second']:,.0f} images/s\n")
    print(f"{out}/: summary.json log.csv checkpoint.pt {' '.join(f'{name}.png' for name in drawn)}")


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; the exit status."""
    try:
        args = parser().parse_args(argv)
        if args.resume:
            if args.out is None:
                raise ValueError("--resume needs --out, the folder of the run to go on with")
            return train(*resume(args, argv))
        return train(*start(args))
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the last whole epoch is kept: python train.py --resume --out <its folder>", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
