"""Images a second of the training step, beside the bare network and beside the usual ways to write SimCLR.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py                             # three networks, on the GPU if there is one
    python benchmarks/speed.py --models vgg-small --sizes  # and the cost by the number of training images
    python benchmarks/speed.py --models vgg-small --run    # and a short run on CIFAR-10, an epoch in parts
    python benchmarks/speed.py --models vgg-small --busy   # and a step beside a busy process

    a    the network alone: both views ready in memory, forward, backward, step, in our precision
    b    a with our two views and NT-Xent: SimCLR
    c    the gradual step of train.py at the end of its curriculum; 10,000 images, 10 % of the labels
    d    SimCLR as in lightly's documentation: its transform and loss, a DataLoader with two workers, float32
    d'   d in our precision and memory format
    e    a hand-written loop: torchvision's transforms on PIL images, a DataLoader with two workers, float32

All train the same network with the same batch and the same strength of augmentation. An image counts once,
though it is seen in two views. Each contestant is a process of its own, so that its peak memory is its
own, and only ours has our allocator settings and OMP_WAIT_POLICY=PASSIVE. They take turns, in an order
that rotates from round to round, and a ratio is the median of the ratios within a round: a disturbance
that lasts longer than a turn affects both sides. A turn has LEAD untimed steps, then the timed ones. A
turn of a loader is one epoch of its persistent workers, with as many batches after the timed ones as the
workers fetch ahead: they are as busy in the last timed step as in the first, and idle while the others are
timed. On a GPU, c replays CUDA graphs as train.py does; Python starts the kernels of a and b, so that
their ratios to c say little.

--busy times c with and without OMP_WAIT_POLICY=PASSIVE, alone and beside a process that keeps one core
busy.
"""

import argparse
import importlib.util
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import augment
import curriculum
import data
import grow_prune
import losses
import model
import train

ROOT = Path(__file__).resolve().parents[1]
LEAD = 4  # untimed steps at the start of a turn
SIZES = [1_000, 10_000, 50_000, 200_000]  # training images
WORKERS, PREFETCH = 2, 2  # of a DataLoader; batches each worker fetches ahead, torch's default
CONTESTANTS = {
    "a": "network alone",
    "b": "our SimCLR step",
    "c": "our gradual step",
    "d": "lightly, as documented",
    "d'": "lightly, our precision",
    "e": "torchvision by hand",
}
RATIOS = (("b", "a"), ("c", "a"), ("b", "d"), ("b", "d'"), ("b", "e"))
BUSY = {  # name: OMP_WAIT_POLICY, whether another process is busy
    "default": (None, False),
    "passive": ("PASSIVE", False),
    "default, busy": (None, True),
    "passive, busy": ("PASSIVE", True),
}
BUSY_RATIOS = (
    *(("passive", "default"), ("passive, busy", "default, busy")),
    *(("default, busy", "default"), ("passive, busy", "passive")),
)
PARTS = {  # of an epoch, by the functions that train.py calls for them
    (train.State, "embed"): "embeddings",
    (grow_prune.HeadManager, "discover"): "discovery",
    (train, "make_targets"): "clusters and votes",
    (grow_prune, "prune"): "pruning",
    (model, "recompute_batchnorm"): "batch norm",
    (train, "evaluate_epoch"): "evaluation",
    (data, "write_atomically"): "files",
    (train, "finish"): "at the end",
}


@dataclass
class Job:
    """What a contestant is given.

    images: uint8 [M,3,32,32], labels: int64 [M], both repeated or cut to n; steps: timed ones in a turn;
    policy: its OMP_WAIT_POLICY; busy: whether another process keeps a core busy in its turns.
    """

    contestant: str
    model: str
    images: np.ndarray
    labels: np.ndarray
    n: int
    batch_size: int
    steps: int
    device: str
    policy: str | None
    busy: bool = False

    def dataset(self) -> data.Dataset:
        """The n images and labels, on the device."""
        index = torch.arange(self.n) % len(self.images)
        x, y = (torch.from_numpy(part)[index] for part in (self.images, self.labels))
        names, statistics = [str(c) for c in range(10)], data.channel_statistics(x[:1000])
        return data.Dataset(x, y, x[:1], y[:1], names, *statistics, True, True, (0.2, 1.0)).to(self.device)


# ---- contestants: generators that make one training step between two yields ----


def ours(job: Job) -> tuple[model.Network, torch.optim.Optimizer, torch.autocast]:
    """Network, optimizer and precision as train.py has them."""
    device = torch.device(job.device)
    network = model.build(job.model, 10).to(device, memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=model.supports_bf16(device))
    return network, model.configure_optimizer(network, 0.01), autocast


def bare(job: Job) -> Iterator[None]:
    """a"""
    network, optimizer, autocast = ours(job)
    x = torch.rand(2 * job.batch_size, 3, 32, 32, device=job.device)
    x = x.contiguous(memory_format=torch.channels_last)
    while True:
        with autocast:
            _, z, logits = network(x)
        optimizer.zero_grad()
        (z.mean() + logits.mean()).backward()
        optimizer.step()
        yield


def simclr(job: Job) -> Iterator[None]:
    """b"""
    network, optimizer, autocast = ours(job)
    images, draws = job.dataset().train_x, torch.Generator().manual_seed(0)
    generator = torch.Generator(job.device).manual_seed(0)
    everything = torch.ones(job.n, dtype=torch.bool, device=job.device)
    while True:
        for index in data.batches(everything, everything, job.batch_size, 100, 0.0, draws):
            x = torch.cat(augment.two_views(images[index], generator=generator))
            with autocast:
                _, z, _ = network(x.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            losses.nt_xent(*z.chunk(2)).backward()
            optimizer.step()
            yield


def gradual(job: Job) -> Iterator[None]:
    """c: what the clusters and the votes are costs the step nothing, so that they are random."""
    dataset = job.dataset()
    y, device = dataset.train_y, dataset.train_x.device
    state = train.State(argparse.Namespace(model=job.model, image_size=32, lr=0.01, seed=0), dataset, 10)
    stage = curriculum.stage("gradual", 99, 100, 10, 7, 0.1, 0.8)
    labelled = data.label_mask(data.leak_order(y, 0), y, stage.label_fraction, range(stage.named))
    everything = torch.ones_like(labelled)
    state.bank.rows = F.normalize(torch.randn_like(state.bank.rows), dim=1)
    state.masks = grow_prune.prune_smallest(state.network.encoder, stage.sparsity)
    targets = train.Targets(
        mix=stage.mix,
        active=everything,
        prior=torch.zeros(10, device=device),
        label=torch.where(labelled, y, -1),
        pseudo=torch.where(labelled, y, torch.randint_like(y, 10)),
        confidence=torch.rand(job.n, device=device),
        clusters=torch.randint(max(2, round(job.n / 42)), (3, job.n), device=device),
    )
    draws, generator = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    step = partial(train.train_step, state, dataset, targets, 0.99, generator)
    functions = [partial(step, turn) for turn in range(losses.searched(job.n)[1])]
    if device.type == "cuda":
        functions = model.capture(functions, state.optimizer, generator)
    record = torch.zeros(100, len(train.TERMS), device=device)
    order = (everything, labelled, job.batch_size, len(record), stage.labelled_share, draws)
    state.network.train()
    while True:
        for i, index in enumerate(data.batches(*order)):
            model.set_learning_rate(state.optimizer, curriculum.learning_rate(0.7, 0.01))
            record[i] = functions[i % len(functions)](index)
            yield


class Pictures(Dataset):
    """Images uint8 [N,3,H,W] as PIL images through a transform, as torchvision's data sets give them."""

    def __init__(self, images: np.ndarray, transform: Callable):
        self.images, self.transform = np.ascontiguousarray(images.transpose(0, 2, 3, 1)), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.images[i]))


def turns(job: Job, transform: Callable) -> Iterator[list[Tensor] | None]:
    """LEAD + steps batches from a DataLoader, then None, when its workers are idle."""
    use, pin = LEAD + job.steps, job.device.startswith("cuda")
    pictures = Pictures(job.images, transform)
    sampler = RandomSampler(pictures, num_samples=(use + WORKERS * PREFETCH) * job.batch_size)
    options = dict(num_workers=WORKERS, persistent_workers=True, pin_memory=pin)
    loader = DataLoader(pictures, job.batch_size, sampler=sampler, drop_last=True, **options)
    while True:
        for i, views in enumerate(loader):
            if i < use:
                yield [view.to(job.device, non_blocking=pin) for view in views]
        yield None


def lightly(job: Job) -> Iterator[None]:
    """d and d': backbone and projection head, one forward pass a view, as in lightly's example."""
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    network, _, autocast = ours(job)
    if job.contestant == "d":
        network = network.to(memory_format=torch.contiguous_format)
        autocast = torch.autocast(autocast.device, enabled=False)
    layout = torch.contiguous_format if job.contestant == "d" else torch.channels_last
    project = nn.Sequential(network.encoder, network.norm, network.projector)  # the transform normalises
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(project.parameters(), lr=0.06)
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, min_scale=0.2, gaussian_blur=0.0)
    for views in turns(job, transform):
        if views:
            with autocast:
                z0, z1 = (project(view.contiguous(memory_format=layout)) for view in views)
                loss = criterion(z0, z1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


def one_view() -> transforms.Compose:
    """Our strong view, written with torchvision: PIL image -> float [3,32,32]."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
        ]
    )


class Twice:
    """Two independent views of an image."""

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]


def by_hand(job: Job) -> Iterator[None]:
    """e"""
    network = model.build(job.model, 10).to(job.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for views in turns(job, Twice(one_view())):
        if views:
            z = F.normalize(network.projector(network.embed(torch.cat(views))), dim=1)
            similarity = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
            target = torch.arange(len(z), device=z.device).roll(len(z) // 2)
            optimizer.zero_grad()
            F.cross_entropy(similarity, target).backward()
            optimizer.step()
        yield


# ---- taking turns ----


def resident() -> tuple[float, float, float]:
    """MB of memory: what this process holds, the most it ever held, and what its workers hold on their own.

    Linux's ru_maxrss will not do: a new process inherits that of its parent.
    """
    status, private = Path("/proc/self/status"), 0.0
    if not status.exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return peak, peak, 0.0
    for child in active_children():
        rollup = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        private += sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 2**10
    sizes = dict(line.split(":") for line in status.read_text().splitlines() if line.startswith("Vm"))
    held, peak = (int(sizes[name].split()[0]) / 2**10 for name in ("VmRSS", "VmHWM"))
    return held, peak, private


def contest(job: Job, pipe) -> None:
    """A contestant's process: for every True from the pipe a turn and its seconds, for False its memory."""
    steps = {"a": bare, "b": simclr, "c": gradual, "d": lightly, "d'": lightly, "e": by_hand}
    try:
        gpu = job.device.startswith("cuda")
        wait = torch.cuda.synchronize if gpu else lambda: None
        if job.policy:
            train.use_device(job.device)
        torch.manual_seed(0)
        step = steps[job.contestant](job)

        def seconds(count: int) -> float:
            wait()
            began = time.perf_counter()
            for _ in range(count):
                next(step)
            wait()
            return time.perf_counter() - began

        first = None
        while pipe.recv():
            lead = seconds(1)
            first = first or lead
            seconds(LEAD - 1)
            timed = seconds(job.steps)
            if job.contestant in ("d", "d'", "e"):
                next(step)  # the loader comes to rest
            pipe.send(timed)
        _, peak, workers = resident()
        memory = {"peak_mb": peak + workers, "workers_mb": workers, "first_step_s": first}
        pipe.send(memory | ({"gpu_mb": torch.cuda.max_memory_allocated() / 2**20} if gpu else {}))
    except Exception:
        pipe.send(traceback.format_exc())


def launch(target: Callable, args: tuple, policy: str | None) -> tuple:
    """A fresh process with this OMP_WAIT_POLICY, which it has before torch is imported, and a pipe to it."""
    context, before = get_context("spawn"), os.environ.pop("OMP_WAIT_POLICY", None)
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs))
    os.environ |= {"OMP_WAIT_POLICY": policy} if policy else {}
    process.start()
    os.environ.pop("OMP_WAIT_POLICY", None)
    os.environ |= {"OMP_WAIT_POLICY": before} if before else {}
    theirs.close()
    return process, pipe


def alternate(jobs: dict[str, Job], rounds: int) -> dict[str, dict]:
    """Let the jobs take turns, after one that does not count: {name: speed and memory, or why not}."""
    results, speeds = {}, {name: [] for name in jobs}
    started = {name: launch(contest, (job,), job.policy) for name, job in jobs.items()}
    pipes = {name: pipe for name, (_, pipe) in started.items()}

    def ask(name: str, question: bool):
        other = [sys.executable, "-c", "while True: pass"]
        busy = subprocess.Popen(other) if jobs[name].busy and question else None
        try:
            pipes[name].send(question)
            answer = pipes[name].recv()
        except (EOFError, BrokenPipeError):
            answer = "the process died"
        finally:
            if busy:
                busy.kill()
                busy.wait()
        if isinstance(answer, str):
            print(f"{name}: {answer}", file=sys.stderr)
            results[name] = {"not_measured": answer.strip().splitlines()[-1]}
            del pipes[name]
            return None
        return answer

    for turn in range(-1, rounds):
        names = list(pipes)
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            seconds = ask(name, True)
            if seconds and turn >= 0:
                speeds[name].append(jobs[name].batch_size * jobs[name].steps / seconds)
    for name in list(pipes):
        if memory := ask(name, False):
            results[name] = {"images_per_second": spread(speeds[name]), **memory}
    for process, _ in started.values():  # what is measured next is alone again
        process.join()
    return {name: results[name] for name in jobs}


def spread(values: list[float]) -> dict:
    """Median, min and max, and the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def ratio(results: dict, left: str, right: str) -> dict | None:
    """left / right, round by round; None if one of them was not measured."""
    both = [results.get(name, {}).get("images_per_second") for name in (left, right)]
    if not all(both):
        return None
    return spread([p / q for p, q in zip(*(speeds["rounds"] for speeds in both), strict=True)])


def one_core(images: np.ndarray, rounds: int) -> dict:
    """Images a second of one strong view of 256 images on one core: ours, and torchvision's on PIL images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, pictures = torch.from_numpy(images[:256]), Pictures(images[:256], one_view())
    ways = {
        "batched": (10, lambda: augment.strong(x)),
        "torchvision": (1, lambda: [pictures[i] for i in range(len(pictures))]),
    }
    speeds = {name: [] for name in ways}
    for turn in range(-1, rounds):
        for name, (repeats, way) in ways.items():
            began = time.perf_counter()
            for _ in range(repeats):
                way()
            if turn >= 0:
                speeds[name].append(repeats * len(x) / (time.perf_counter() - began))
    torch.set_num_threads(threads)
    results = {name: {"images_per_second": spread(values)} for name, values in speeds.items()}
    return results | {"ratio": ratio(results, "batched", "torchvision")}


# ---- a whole run ----


def whole_run(flags: list[str], pipe) -> None:
    """A gradual run in this process: {seconds of each part, of the first step since Python started, peak_mb}.

    The time of a part that runs inside another one belongs to the outer one; "steps" is the rest.
    """
    spent, inside = dict.fromkeys((*PARTS.values(), "first step"), 0.0), []
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    began = boot + ticks / os.sysconf("SC_CLK_TCK")  # of this process
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def timed(function: Callable, part: str) -> Callable:
        def call(*args, **options):
            if inside:
                return function(*args, **options)
            inside.append(part)
            wait()
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                wait()
                spent[part] += time.perf_counter() - start
                inside.clear()

        return call

    def first(*args):
        result = step(*args)
        if not spent["first step"]:
            wait()
            spent["first step"] = time.time() - began
        return result

    step, train.train_step = train.train_step, first
    for (owner, name), part in PARTS.items():
        setattr(owner, name, timed(getattr(owner, name), part))
    begin, seconds = train.train, {}

    def whole(*args):
        start = time.perf_counter()
        begin(*args)
        seconds["whole"] = time.perf_counter() - start

    train.train = whole
    with tempfile.TemporaryDirectory() as folder:
        status = train.main([*flags, "--out", f"{folder}/run"])
    spent["steps"] = seconds.get("whole", 0.0) - sum(spent[part] for part in PARTS.values())
    pipe.send({"status": status, "seconds": spent, "peak_mb": resident()[1]})


# ---- what people see ----


def machine(device: str) -> dict:
    """The hardware and the versions the figures belong to."""
    cpu = torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None
    packages = ["torch", "torchvision", "numpy", "pillow", "scikit-learn"]
    packages += ["lightly"] if importlib.util.find_spec("lightly") else []
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "bfloat16": model.supports_bf16(torch.device(device)),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def show(title: str, results: dict, labels: dict[str, str]) -> None:
    """One table: images a second and memory of every contestant."""
    print(f"\n{title:34s} images/s      min      max   peak MB   GPU MB", flush=True)
    for name, result in results.items():
        label = f"{name:6s} {labels.get(name, '')}"
        if "not_measured" in result:
            print(f"  {label:30s}  not measured: {result['not_measured']}")
            continue
        s, sizes = result["images_per_second"], [result.get(key) for key in ("peak_mb", "gpu_mb")]
        memory = "".join(f"{'-':>9s}" if size is None else f"{size:9.0f}" for size in sizes)
        print(f"  {label:30s} {s['median']:10.0f} {s['min']:8.0f} {s['max']:8.0f} {memory}")


def show_ratios(results: dict, pairs: tuple) -> dict[str, dict | None]:
    """Print and return the ratio of each pair of contestants."""
    ratios = {f"{left} / {right}": ratio(results, left, right) for left, right in pairs}
    for name, value in ratios.items():
        told = [f"{value[key]:.3f}" for key in ("median", "min", "max")] if value else ["not measured"]
        print(f"  {name:30s} {'  '.join(told)}")
    return ratios


def pictures() -> tuple[np.ndarray, np.ndarray, str]:
    """CIFAR-10's training images and labels if they are there, noise otherwise, and which of the two."""
    try:
        dataset = data.load_dataset("cifar10", ROOT / "data", download=False)
        return dataset.train_x.numpy(), dataset.train_y.numpy(), "cifar10"
    except ValueError:
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (10_000, 3, 32, 32), np.uint8), rng.integers(0, 10, 10_000), "noise"


def flags() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--models", nargs="+", default=["cnn", "vgg-small", "vgg16"], metavar="NAME", help="networks")
    add("--only", nargs="*", choices=CONTESTANTS, default=[*CONTESTANTS], help="contestants, perhaps none")
    add("--rounds", type=int, default=7, metavar="N", help="turns of each contestant")
    add("--steps", type=int, default=10, metavar="N", help=f"timed steps in a turn, after {LEAD} others")
    add("--batch-size", type=int, default=128, metavar="N", help="images in a step, in two views each")
    add("--sizes", type=int, nargs="*", metavar="N", help=f"time c with N training images; {SIZES}")
    add("--run", type=int, nargs="?", const=4, metavar="EPOCHS", help="time a gradual run on CIFAR-10; 4")
    add("--per-class", type=int, metavar="N", help="with so many images of each class")
    add("--busy", action="store_true", help="time c alone and beside a busy process")
    add("--device", default=device, help="cpu, cuda, cuda:1, ...")
    add("--out", type=Path, default=ROOT / "results" / "speed.json", metavar="FILE", help="the figures")
    return parser.parse_args()


def show_run(name: str, args: argparse.Namespace) -> dict:
    """Time a whole run, print it and return what `whole_run` measured."""
    own = ["--dataset", "cifar10", "--data-dir", ROOT / "data", "--model", name, "--epochs", args.run]
    own += ["--device", args.device, *(["--per-class", args.per_class] if args.per_class else [])]
    process, pipe = launch(whole_run, ([str(flag) for flag in own],), "PASSIVE")
    result = pipe.recv() | {"flags": shlex.join(map(str, own[4:])), "epochs": args.run}
    process.join()
    seconds = result["seconds"]
    epoch = sum(seconds.values()) - seconds["at the end"] - seconds["first step"]
    print(f"\n{name}, {args.run} epochs, seconds an epoch (share), peak {result['peak_mb']:.0f} MB")
    for part in sorted({*seconds} - {"at the end", "first step"}, key=seconds.get, reverse=True):
        print(f"  {part:20s} {seconds[part] / args.run:8.2f}  {100 * seconds[part] / epoch:5.1f} %")
    first, end = seconds["first step"], seconds["at the end"]
    print(f"  first step {first:.1f} s after Python starts, {end:.1f} s for the figures at the end")
    return result


def main() -> None:
    """Measure, print, write."""
    args = flags()
    images, labels, source = pictures()
    settings = {"rounds": args.rounds, "steps": args.steps, "batch_size": args.batch_size, "images": source}
    results = {"command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])}
    results |= {"machine": machine(args.device), "settings": settings, "models": {}}
    print(", ".join(f"{k} {v}" for k, v in results["machine"].items()))
    print(f"{args.batch_size} images a step, from {source}; {args.rounds} rounds of {args.steps} steps")

    def job(contestant: str, name: str, n: int = 10_000) -> Job:
        policy, some = "PASSIVE" if contestant in "abc" else None, slice(0, min(n, len(images)))
        sizes = (n, args.batch_size, args.steps)
        return Job(contestant, name, images[some], labels[some], *sizes, args.device, policy)

    for name in args.models:
        measured = alternate({c: job(c, name) for c in args.only}, args.rounds)
        show(name, measured, CONTESTANTS)
        result = {"contestants": measured, "ratios": show_ratios(measured, RATIOS)}
        if args.sizes is not None:
            sizes = {f"{n}": job("c", name, n) for n in args.sizes or SIZES}
            result["sizes"] = alternate(sizes, args.rounds)
            show(f"{name}: gradual step with N images", result["sizes"], {})
        if args.busy:
            jobs = {key: replace(job("c", name), policy=p, busy=b) for key, (p, b) in BUSY.items()}
            measured = alternate(jobs, args.rounds)
            show(f"{name}: OMP_WAIT_POLICY", measured, {})
            result["busy"] = {"turns": measured, "ratios": show_ratios(measured, BUSY_RATIOS)}
        if args.run:
            result["run"] = show_run(name, args)
        results["models"][name] = result

    results["view"] = one_core(images, args.rounds)
    show("one strong view on one core", {k: v for k, v in results["view"].items() if k != "ratio"}, {})
    show_ratios(results["view"], (("batched", "torchvision"),))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data.write_json(args.out, results)
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
