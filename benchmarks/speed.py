"""Images a second of the training step, beside the bare network and beside the usual ways to write SimCLR.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py                                   # all three networks, on the GPU if there is one
    python benchmarks/speed.py --models vgg-small --sizes        # and the cost against the number of training images
    python benchmarks/speed.py --models vgg-small --run          # and a whole short run on all of CIFAR-10

    a    the network alone: both views ready in memory, forward, backward, step, in our precision
    a'   a with a compiled encoder, as with --compile
    b    a and our two views and NT-Xent: SimCLR
    c    the whole gradual step: b, local aggregation, propagation, supervision, masks, memory; 10,000 images, 10 % labels
    d    SimCLR as in lightly's documentation: its SimCLRTransform and NTXentLoss, a DataLoader with two workers, float32
    d'   d in our precision and memory format
    e    a hand-written loop: torchvision's transforms on PIL images, a DataLoader with two workers, float32

All train the same network with the same batch and the same strength of augmentation; an image counts once, though it is seen
in two views. Each contestant is a process of its own, so that its peak memory is its own and only ours has our allocator
settings. They take turns, in an order that rotates from round to round, and a ratio is the median of its ratios within one
round: what disturbs the machine for longer than a turn disturbs both sides. A turn has LEAD untimed steps and then the timed
ones. A loader's turn is one epoch of its persistent workers with as many batches behind the timed ones as the workers fetch
ahead: they are as busy in the last timed step as in the first, and rest while the others are timed. On a GPU c repeats recorded
steps (`train.Recorded`), as train.py does; a and b are started by Python there, so that their ratios to c say little.
"""

import argparse
import copy
import importlib.util
import os
import platform
import resource
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import augment  # noqa: E402
import curriculum  # noqa: E402
import data  # noqa: E402
import grow_prune  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

LEAD = 4  # untimed steps at the start of a turn
SIZES = [1_000, 10_000, 50_000, 200_000]  # training images
WORKERS, PREFETCH = 2, 2  # of a DataLoader; batches each worker fetches ahead, torch's default
CONTESTANTS = {
    "a": "network alone",
    "a'": "network alone, compiled",
    "b": "our SimCLR step",
    "c": "our gradual step",
    "d": "lightly, as documented",
    "d'": "lightly, our precision",
    "e": "torchvision by hand",
}
RATIOS = (("a'", "a"), ("b", "a"), ("c", "a"), ("b", "d"), ("b", "d'"), ("b", "e"))
INSTALL = "pip install -r benchmarks/requirements.txt"


@dataclass
class Job:
    """What a contestant is given. images: uint8 [M,3,32,32], labels: int64 [M], repeated or cut to n; steps: timed ones a turn."""

    contestant: str
    model: str
    images: np.ndarray
    labels: np.ndarray
    n: int
    batch_size: int
    steps: int
    device: str

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The n images and labels, on the device."""
        index = torch.arange(self.n) % len(self.images)
        return torch.from_numpy(self.images)[index].to(self.device), torch.from_numpy(self.labels)[index].to(self.device)


# ---- contestants: generators that make one training step between two yields -----------------------------------------


def ours(job: Job) -> tuple[model.Network, torch.optim.Optimizer, torch.autocast]:
    """Network, optimiser and precision as train.py has them."""
    device = torch.device(job.device)
    network = model.build(job.model, 10).to(device, memory_format=torch.channels_last)
    return network, train.optimizer_for(network, 0.01), torch.autocast(device.type, torch.bfloat16, enabled=train.has_bf16(device))


def bare(job: Job) -> Iterator[None]:
    """a and a'"""
    network, optimizer, autocast = ours(job)
    if job.contestant == "a'":
        network.encoder.compile()
    x = torch.rand(2 * job.batch_size, 3, 32, 32, device=job.device).contiguous(memory_format=torch.channels_last)
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
    images, _ = job.tensors()
    generator = torch.Generator(job.device).manual_seed(0)
    everything = torch.ones(job.n, dtype=torch.bool, device=job.device)
    while True:
        for index in data.batches(everything, everything, job.batch_size, 100, 0.0, torch.Generator().manual_seed(0)):
            view1, view2 = augment.two_views(images[index], generator=generator)
            x = torch.cat([view1, view2]).contiguous(memory_format=torch.channels_last)
            with autocast:
                _, z, _ = network(x)
            optimizer.zero_grad()
            losses.nt_xent(*z.chunk(2)).backward()
            optimizer.step()
            yield


def gradual(job: Job) -> Iterator[None]:
    """c: the step of train.py at the end of its curriculum. Clusters and votes are random; what they are costs the step nothing."""
    device, n = torch.device(job.device), job.n
    network, optimizer, _ = ours(job)
    images, y = job.tensors()
    dataset = data.Dataset(images, y, images, y, [], (), (), flip=True, color=True, scale=(0.2, 1.0))
    stage = curriculum.stage("gradual", 99, 100, 10, 7, 0.1, 0.8)
    labelled = data.label_mask(data.leak_order(y, 0), y, stage.label_fraction, range(stage.named))
    everything, units = torch.ones(n, dtype=torch.bool, device=device), grow_prune.Units(range(10), device=device)
    bank, monitor = losses.MemoryBank(n, network.projector[-1].out_features, device=device), grow_prune.ConfusionMonitor(n, device=device)
    bank.rows = F.normalize(torch.randn(bank.rows.shape, device=device), dim=1)
    args = argparse.Namespace(batch_size=job.batch_size)
    run = train.Run(args, dataset, y, train.has_bf16(device), network, copy.deepcopy(network), optimizer, bank, units, monitor)
    run.masks = grow_prune.prune_smallest(network.encoder, stage.sparsity)
    lesson = train.Lesson(
        mix=stage.mix,
        active=everything,
        in_use=torch.ones(10, dtype=torch.bool, device=device),
        label=torch.where(labelled, y, -1),
        pseudo=torch.where(labelled, y, torch.randint_like(y, 10)),
        confidence=torch.rand(n, device=device),
        clusters=torch.randint(max(2, round(n / 42)), (3, n), device=device),
    )
    record = torch.zeros(100, len(train.TERMS), device=device)
    draws, generator = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    functions = train.step_functions(run, lesson, generator)
    while True:
        for step, index in enumerate(data.batches(everything, labelled, job.batch_size, 100, stage.labelled_share, draws)):
            train.set_learning_rate(optimizer, curriculum.learning_rate(0.7, 0.01))
            for term, loss in functions[step % len(functions)](index).items():
                record[step, train.TERMS.index(term)] = loss
            yield


class Pictures(Dataset):
    """PIL images through a transform, as torchvision's CIFAR10 gives them."""

    def __init__(self, job: Job, transform):
        self.images, self.labels, self.transform = np.ascontiguousarray(job.images.transpose(0, 2, 3, 1)), job.labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def turns(job: Job, transform) -> Iterator[list[Tensor] | None]:
    """Batches from a DataLoader, LEAD + steps a turn; then what the workers fetched ahead is thrown away, and they rest."""
    use = LEAD + job.steps
    dataset = Pictures(job, transform)
    sampler = RandomSampler(dataset, num_samples=(use + WORKERS * PREFETCH) * job.batch_size)
    pin = job.device.startswith("cuda")
    loader = DataLoader(
        dataset, job.batch_size, sampler=sampler, drop_last=True, num_workers=WORKERS, persistent_workers=True, pin_memory=pin
    )
    while True:
        for i, (views, _) in enumerate(loader):
            if i < use:
                yield [view.to(job.device, non_blocking=pin) for view in views]
        yield None


def lightly(job: Job, our_format: bool = False) -> Iterator[None]:
    """d and d': backbone and projection head, one forward pass a view, as in lightly's example."""
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    device = torch.device(job.device)
    layout = torch.channels_last if our_format else torch.contiguous_format
    network = model.build(job.model, 10).to(device, memory_format=layout)
    project = torch.nn.Sequential(network.encoder, network.norm, network.projector)  # the transform normalises
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(project.parameters(), lr=0.06)
    transform = SimCLRTransform(
        input_size=32, cj_prob=0.8, cj_strength=0.5, min_scale=0.2, gaussian_blur=0.0, random_gray_scale=0.2, hf_prob=0.5, vf_prob=0.0
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=our_format and train.has_bf16(device))
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

    def __init__(self, transform):
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


def steps_of(job: Job) -> Iterator[None]:
    """The contestant's generator."""
    if job.contestant in ("a", "a'", "b", "c"):
        train.tune_machine()
    torch.manual_seed(0)
    if job.contestant in ("d", "d'"):
        return lightly(job, our_format=job.contestant == "d'")
    return {"a": bare, "a'": bare, "b": simclr, "c": gradual, "e": by_hand}[job.contestant](job)


# ---- taking turns ---------------------------------------------------------------------------------------------------


def resident() -> tuple[float, float]:
    """MB of memory: the largest this process ever held, and what its workers hold now that they do not share with it.

    Linux's ru_maxrss will not do: a new process inherits that of its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    private = 0.0
    for child in active_children():
        rollup = Path(f"/proc/{child.pid}/smaps_rollup")
        if rollup.exists():
            private += sum(int(line.split()[1]) for line in rollup.read_text().splitlines() if line.startswith("Private_")) / 2**10
    return peak, private


def contest(job: Job, pipe) -> None:
    """A contestant's process: a turn for every True from the pipe, its seconds sent back; for False, its memory, and the end."""
    try:
        gpu = job.device.startswith("cuda")
        wait = torch.cuda.synchronize if gpu else lambda: None
        step = steps_of(job)
        pipe.recv()
        began = time.perf_counter()
        next(step)
        wait()
        first = time.perf_counter() - began
        for _ in range(LEAD + job.steps):  # the rest of a turn that does not count
            next(step)
        pipe.send(first)
        while pipe.recv():
            for _ in range(LEAD):
                next(step)
            wait()
            began = time.perf_counter()
            for _ in range(job.steps):
                next(step)
            wait()
            seconds = time.perf_counter() - began
            next(step)  # a loader comes to rest
            wait()
            pipe.send(seconds)
        peak, workers = resident()
        pipe.send(
            {"peak_mb": peak + workers, "workers_mb": workers, "first_step_s": first}
            | ({"gpu_mb": torch.cuda.max_memory_allocated() / 2**20} if gpu else {})
        )
    except Exception:
        pipe.send(traceback.format_exc())


def spread(values: list[float]) -> dict:
    """Median, min and max, and the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def alternate(jobs: dict[str, Job], rounds: int) -> dict[str, dict]:
    """Let the jobs take turns, after one round that does not count: {name: images_per_second and memory, or why not}."""
    context = get_context("spawn")
    results, pipes, processes, speeds = {}, {}, [], {name: [] for name in jobs}
    for name, job in jobs.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contest, args=(job, theirs)))
        processes[-1].start()
        theirs.close()

    def ask(name: str, question: bool):
        try:
            pipes[name].send(question)
            answer = pipes[name].recv()
        except (EOFError, BrokenPipeError):
            answer = "the process died"
        if isinstance(answer, str):
            print(f"{name}: {answer}", file=sys.stderr)
            results[name] = {"not_measured": answer.strip().splitlines()[-1]}
            del pipes[name]
            return None
        return answer

    for name in list(pipes):
        ask(name, True)
    for r in range(rounds):
        names = list(pipes)
        turn = r % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            seconds = ask(name, True)
            if seconds:
                speeds[name].append(jobs[name].batch_size * jobs[name].steps / seconds)
    for name in list(pipes):
        memory = ask(name, False)
        if memory:
            results[name] = {"images_per_second": spread(speeds[name]), **memory}
    for process in processes:  # what is measured next is alone again
        process.join()
    return {name: results[name] for name in jobs}


def ratio(results: dict, left: str, right: str) -> dict | None:
    """left / right, round by round; None if one of them was not measured."""
    both = [results.get(name, {}).get("images_per_second") for name in (left, right)]
    return spread([p / q for p, q in zip(*(speeds["rounds"] for speeds in both), strict=True)]) if all(both) else None


def views(images: np.ndarray, rounds: int) -> dict:
    """Images a second of one strong view of 256 images on one core: ours, and torchvision's on PIL images, in alternation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.from_numpy(images[:256])
    pictures, transform = np.ascontiguousarray(images[:256].transpose(0, 2, 3, 1)), one_view()
    ways = {
        "batched": lambda: augment.strong(x),
        "torchvision": lambda: torch.stack([transform(Image.fromarray(picture)) for picture in pictures]),
    }
    speeds = {name: [] for name in ways}
    for r in range(-1, rounds):
        for name, way in ways.items():
            repeats = 10 if name == "batched" else 1
            began = time.perf_counter()
            for _ in range(repeats):
                way()
            if r >= 0:
                speeds[name].append(repeats * len(x) / (time.perf_counter() - began))
    torch.set_num_threads(threads)
    results = {name: {"images_per_second": spread(values)} for name, values in speeds.items()}
    return results | {"ratio": ratio(results, "batched", "torchvision")}


def whole_run(name: str, epochs: int, batch_size: int, pipe) -> None:
    """The gradual curriculum on all of CIFAR-10 in this process: where its time goes, and the most memory it holds.

    start_up: seconds from the start of the process to the end of the first step, from_disk: the same without Python's imports.
    """
    began, spent = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + start_of_process(), {}

    def timed(what: str, function):
        def call(*args):
            start = time.perf_counter()
            result = function(*args)
            spent[what] = spent.get(what, 0.0) + time.perf_counter() - start
            if what == "learn":
                spent.setdefault("start_up", time.time() - began)
                spent.setdefault("from_disk", time.perf_counter() - spent["start"])
            return result

        return call

    for owner, what in ((train, "learn"), (train, "measure"), (train.Run, "embed_all"), (train, "finish")):
        setattr(owner, what, timed(what, getattr(owner, what)))
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset", "cifar10", "--data-dir", ROOT / "data", "--model", name, "--epochs", epochs, "--batch-size", batch_size]
        spent["start"] = time.perf_counter()
        status = train.main([str(flag) for flag in [*flags, "--out", Path(folder) / "run"]])
        seconds = time.perf_counter() - spent["start"]
    evaluation = (spent["measure"] + spent["embed_all"]) / (seconds - spent["finish"])
    result = {"status": status, "start_up": spent["start_up"], "from_disk": spent["from_disk"], "seconds": seconds}
    result |= {"evaluation_share_of_an_epoch": evaluation}
    pipe.send(result | {"at_the_end_s": spent["finish"], "peak_mb": resident()[0]})


def start_of_process() -> float:
    """Seconds from the start of the machine to the start of this process (Linux)."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


# ---- what people see ------------------------------------------------------------------------------------------------


def machine(device: str) -> dict:
    """The hardware and the versions the figures belong to."""
    cpu = torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None
    packages = ["torch", "torchvision", "numpy", "pillow"] + (["lightly"] if importlib.util.find_spec("lightly") else [])
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "bfloat16": train.has_bf16(torch.device(device)),
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
        s = result["images_per_second"]
        memory = "".join(f"{result[key]:9.0f}" if key in result else f"{'-':>9s}" for key in ("peak_mb", "gpu_mb"))
        print(f"  {label:30s} {s['median']:10.0f} {s['min']:8.0f} {s['max']:8.0f} {memory}")


def show_ratio(name: str, value: dict | None) -> None:
    """One line: median (min .. max)."""
    print(f"  {name:6s} " + ("not measured" if value is None else f"{value['median']:.3f}  ({value['min']:.3f} .. {value['max']:.3f})"))


def pictures() -> tuple[np.ndarray, np.ndarray, str]:
    """CIFAR-10's training images and labels if they are there, noise otherwise, and which of the two."""
    try:
        dataset = data.load_dataset("cifar10", ROOT / "data", download=False)
        return dataset.train_x.numpy(), dataset.train_y.numpy(), "cifar10"
    except ValueError:
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (10_000, 3, 32, 32), np.uint8), rng.integers(0, 10, 10_000), "noise"


def flags() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["cnn", "vgg-small", "vgg16"], metavar="NAME", help="networks of model.py")
    add("--rounds", type=int, default=7, metavar="N", help="turns each contestant has, after one that does not count")
    add("--steps", type=int, default=10, metavar="N", help=f"timed steps a turn, after {LEAD} that are not")
    add("--batch-size", type=int, default=128, metavar="N", help="images a step; each is seen in two views")
    add("--sizes", type=int, nargs="*", metavar="N", help=f"also the gradual step with N training images; {SIZES} if none is named")
    add(
        "--run",
        type=int,
        nargs="?",
        const=4,
        metavar="EPOCHS",
        help="also a whole run on all of CIFAR-10, batch 256; 4 epochs if not given",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--out", type=Path, default=ROOT / "results" / "speed.json", metavar="FILE", help="where the figures go")
    return parser


def main() -> None:
    """Measure, print, write."""
    args = flags().parse_args()

    images, labels, source = pictures()
    results = {
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "machine": machine(args.device),
        "settings": {"rounds": args.rounds, "steps": args.steps, "batch_size": args.batch_size, "images": source},
    }
    print(", ".join(f"{k} {v}" for k, v in results["machine"].items() if k != "versions"))
    print(", ".join(f"{k} {v}" for k, v in results["machine"]["versions"].items()))
    print(f"{args.batch_size} images a step, two views each, from {source}; {args.rounds} rounds of {args.steps} steps")

    def job(contestant: str, name: str, n: int) -> Job:
        some = slice(0, min(n, len(images)))
        return Job(contestant, name, images[some], labels[some], n, args.batch_size, args.steps, args.device)

    results["models"] = {}
    for name in args.models:
        missing = () if importlib.util.find_spec("lightly") else ("d", "d'")
        measured = alternate({c: job(c, name, 10_000) for c in CONTESTANTS if c not in missing}, args.rounds)
        measured |= {c: {"not_measured": f"lightly is missing; {INSTALL}"} for c in missing}
        measured = {c: measured[c] for c in CONTESTANTS}
        show(name, measured, CONTESTANTS)
        ratios = {f"{p}/{q}": ratio(measured, p, q) for p, q in RATIOS}
        for pair, value in ratios.items():
            show_ratio(pair, value)
        results["models"][name] = {"contestants": measured, "ratios": ratios}

    results["view"] = views(images, args.rounds)
    print("\none strong view of 256 images on one core, images/s")
    for way in ("batched", "torchvision"):
        s = results["view"][way]["images_per_second"]
        print(f"  {way:30s} {s['median']:10.0f} {s['min']:8.0f} {s['max']:8.0f}")
    show_ratio("ratio", results["view"]["ratio"])

    if args.sizes is not None:
        results["sizes"] = {}
        for name in args.models:
            measured = alternate({f"{n}": job("c", name, n) for n in args.sizes or SIZES}, args.rounds)
            show(f"{name}: gradual step with N images", measured, {})
            results["sizes"][name] = measured

    if args.run:
        results["runs"] = {}
        for name in args.models:
            context = get_context("spawn")
            pipe, theirs = context.Pipe()
            process = context.Process(target=whole_run, args=(name, args.run, 256, theirs))
            process.start()
            theirs.close()
            results["runs"][name] = run = pipe.recv() | {"epochs": args.run, "batch_size": 256}
            process.join()
            print(f"\n{name}: {run['epochs']} epochs of all of CIFAR-10, batch {run['batch_size']}: {run['seconds']:.0f} s")
            print(f"  first step done {run['start_up']:.1f} s after Python starts, {run['from_disk']:.1f} s after its imports")
            print(f"  peak {run['peak_mb']:.0f} MB")
            share, end = 100 * run["evaluation_share_of_an_epoch"], run["at_the_end_s"]
            print(f"  evaluation {share:.1f} % of an epoch, and {end:.0f} s at the end")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    train.write_json(args.out, results)
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
