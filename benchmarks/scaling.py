"""Weak scaling: what a step takes on 8 to 1024 GPUs, predicted from a step measured on one.

    python -m benchmarks.scaling                        from benchmarks/results/train_<this device>.json
    python -m benchmarks.scaling --results FILE         from another machine's
    python -m benchmarks.scaling --step_ms 60           from a time
    python -m benchmarks.scaling --check                the model against one and two ranks on this machine

Model. A step on n GPUs takes as long as on one, and what of the communication the backward does not hide:

    ring all-reduce of S bytes       2 (n - 1) (S / (n b) + a)      bandwidth b and latency a of a link
    tree all-reduce                  2 (S / b + ceil(log2 n) a)     pipelined; the faster of the two is taken
    reduce-scatter, all-gather       (n - 1) (S / (n b) + a)        half a ring
    several nodes                    reduce-scatter within the node, the same collective of S / g bytes between nodes
                                     by each of its g GPUs on a port of its own, all-gather within the node

What ZeRO sends (0: torch's DistributedDataParallel; 1 to 3: DeepSpeed 0.19), G bytes of gradients and W of weights:

    0        all-reduce G in buckets during the backward; --cuda_graph: all of it after the backward
    1, 2     all-reduce G in buckets during the backward (all ranks get all of it); all-gather W after the optimizer
    3        all-gather W in the forward and again in the backward, reduce-scatter G during the backward

Gradients become ready evenly over the backward; a bucket is sent when it is full and the one before it is through, so
one bucket that holds all hides nothing. ZeRO 3's gathers are taken to hide behind forward and backward as far as these
last.

Assumed, and so not in the figures: every rank loads its own crops in time, steps take the same time on every rank,
the optimizer takes as long sharded as whole, collectives don't slow kernels down, nobody else uses the network;
validation and checkpoints are ignored. Throughput measured on real nodes will be lower.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks import bench_train, training
from benchmarks.bench_pipeline import scans
from benchmarks.common import machine
from benchmarks.report import OURS
from engine.ranks.distributed import gather, init_ranks
from engine.sharding import BUCKET_ELEMENTS

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
UNETR_PARAMETERS = 49_667_123
FORWARD_SHARE, BACKWARD_SHARE = 0.32, 0.64
"""Of a step, where no breakdown says it: twice as much arithmetic backward as forward, and the optimizer."""
CHECK = training.Size((32, 32, 32), {"feature_size": 8, "hidden_size": 240, "mlp_dim": 960, "num_heads": 4})
"""Small crops and wide layers: communication is a good part of the step."""
CHECK_STEPS = 12
SIZES = (2**10, 2**24)
"""Bytes whose all-reduce calibrates latency and bandwidth of the check."""


@dataclass(frozen=True)
class Link:
    """Between a GPU and its neighbour in a collective: bytes per second each way, and seconds for each message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of `gpus_per_node`, with a network port for each GPU."""

    gpus_per_node: int
    inside: Link
    between: Link


@dataclass(frozen=True)
class Step:
    """One GPU's step.

    Fields:
        seconds: of the whole. forward, backward: of these parts. gradients, weights: bytes. batch: crops.
    """

    seconds: float
    forward: float
    backward: float
    gradients: int
    weights: int
    batch: int


def all_reduce(nbytes: float, ranks: int, link: Link) -> float:
    """Seconds, by ring or tree."""
    if ranks == 1:
        return 0.0
    tree = 2 * (nbytes / link.bandwidth + math.ceil(math.log2(ranks)) * link.latency)
    return min(2 * half_ring(nbytes, ranks, link), tree)


def half_ring(nbytes: float, ranks: int, link: Link) -> float:
    """Seconds of a reduce-scatter or an all-gather of `nbytes` in all."""
    return (ranks - 1) * (nbytes / ranks / link.bandwidth + link.latency)


def over_nodes(collective: Callable[[float, int, Link], float], nbytes: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of `all_reduce` or `half_ring` over `gpus` GPUs."""
    inside = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / inside)
    if nodes == 1:
        return collective(nbytes, inside, cluster.inside)
    # An all-reduce goes through the node twice, before and after; a half of one, once.
    passes = 2 if collective is all_reduce else 1
    return passes * half_ring(nbytes, inside, cluster.inside) + collective(nbytes / inside, nodes, cluster.between)


def exposed_after(buckets: Sequence[float], backward: float) -> float:
    """Seconds by which sending outlasts the backward.

    Args:
        buckets: seconds that each takes, in order; they become ready evenly over the backward. backward: its seconds.
    """
    done = 0.0
    for i, duration in enumerate(buckets, 1):
        done = max(done, backward * i / len(buckets)) + duration
    return max(0.0, done - backward)


def communication(
    step: Step, zero_stage: int, gpus: int, cluster: Cluster, bucket: float, after: bool = False
) -> tuple[float, float]:
    """Seconds of all collectives of a step, and of those that nothing hides.

    Args:
        bucket: bytes of gradients that are sent together.
        after: they are sent when the backward is over (stage 0).
    """
    if after:
        reduced = over_nodes(all_reduce, step.gradients, gpus, cluster)
        return reduced, reduced
    gathered = over_nodes(half_ring, step.weights, gpus, cluster) if zero_stage else 0.0
    count = max(1, math.ceil(step.gradients / bucket))
    collective = half_ring if zero_stage == 3 else all_reduce
    buckets = [over_nodes(collective, step.gradients / count, gpus, cluster)] * count
    if zero_stage == 3:
        late = max(0.0, gathered - step.forward)
        behind = max(exposed_after(buckets, step.backward), gathered + sum(buckets) - step.backward)
        return 2 * gathered + sum(buckets), late + behind
    return sum(buckets) + gathered, exposed_after(buckets, step.backward) + gathered


def predict(
    step: Step, zero_stage: int, cluster: Cluster, bucket: float, gpus: Sequence[int] = GPUS, after: bool = False
) -> list[dict[str, Any]]:
    """A row for each number of GPUs: seconds, efficiency (one GPU's step over this), crops per second."""
    rows = []
    for count in gpus:
        total, exposed = communication(step, zero_stage, count, cluster, bucket, after)
        seconds = step.seconds + exposed
        rows.append({"gpus": count, "step_seconds": seconds, "communication_seconds": total,
                     "exposed_seconds": exposed, "efficiency": step.seconds / seconds,
                     "samples_per_s": count * step.batch / seconds})  # fmt: skip
    return rows


# ---------- the step


def step_of(result: dict[str, Any], gradient_bytes: int) -> Step:
    """From what `bench_train` wrote: our first variant, and the parts of its step.

    Raises:
        ValueError: no step of ours in it.
    """
    rows = [row for row in result.get("steps", []) if row["variant"].startswith(OURS) and row["step_rounds"]]
    if not rows:
        raise ValueError(
            "the file has no step of ours: run python -m benchmarks.bench_train --sections steps breakdown"
        )
    seconds, parameters = rows[0]["step_seconds"], result["parameters"]
    parts = result.get("breakdown", {}).get("seconds", {})
    names = ("forward", "loss", "backward", "optimizer")
    whole = sum(parts.get(name, 0.0) for name in names)
    forward, backward = (
        (parts["forward"] / whole, parts["backward"] / whole) if whole else (FORWARD_SHARE, BACKWARD_SHARE)
    )
    return Step(seconds, forward * seconds, backward * seconds, parameters * gradient_bytes, parameters * 4,
                rows[0]["batch"])  # fmt: skip


# ---------- the model against this machine


def fit(measured: dict[int, float]) -> Link:
    """Latency and bandwidth of a link between two ranks, from the seconds of an all-reduce of two sizes (bytes)."""
    (small, quick), (large, slow) = sorted(measured.items())
    bandwidth = (large - small) / max(slow - quick, 1e-9)  # over two ranks a ring takes S / b + 2 a
    return Link(bandwidth, max(0.0, (quick - small / bandwidth) / 2))


def check(rounds: int) -> dict[str, Any]:
    """Run one rank alone and two ranks, predict the second from the first, and say how far off that is."""
    alone, pairs = [], []
    for _ in range(rounds):
        alone.append(_launch(1)["step_seconds"])
        pairs.append(_launch(2))
    pair = {name: statistics.median(run[name] for run in pairs)
            for name in ("compute_seconds", "step_seconds", "latency", "bandwidth")}  # fmt: skip
    parameters = pairs[0]["parameters"]
    link = Link(pair["bandwidth"], pair["latency"])
    seconds, nbytes = pair["compute_seconds"], 4 * parameters
    step = Step(seconds, FORWARD_SHARE * seconds, BACKWARD_SHARE * seconds, nbytes, nbytes, training.BATCH)
    sent, exposed = communication(step, 0, 2, Cluster(2, link, link), 4 * BUCKET_ELEMENTS)
    predicted = seconds + exposed
    return {
        "parameters": parameters, "link": asdict(link), "alone_seconds": statistics.median(alone), **pair,
        "communication_seconds": sent, "exposed_seconds": exposed, "predicted_seconds": predicted,
        "error": predicted / pair["step_seconds"] - 1,
        "efficiency": statistics.median(alone) / pair["step_seconds"],
    }  # fmt: skip


def _launch(world_size: int) -> dict[str, Any]:
    """Run `worker` on `world_size` ranks of one thread each; returns what the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker"]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1",
             "LOCAL_WORLD_SIZE": str(world_size)}  # fmt: skip
    start = partial(subprocess.Popen, command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    ranks = [start(env=os.environ | world | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(world_size)]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{' '.join(command)} on {world_size} rank(s) failed: see above")
    return json.loads(outputs[0].splitlines()[-1])


def worker() -> None:
    """One rank of the check: steps with and without reducing gradients, in turns, and all-reduces of `SIZES`."""
    ranks = init_ranks("cpu")
    torch.set_num_threads(1)
    scene = training.Scene.of("unetr_monai", CHECK, scans(None), ranks)
    timed = training.Timed(scene, training.LoopVariant(f"{OURS} float32"))
    assert isinstance(timed.loop, training.Ours)
    reducer = timed.loop.step.ddp
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(CHECK_STEPS):
        for reduces in times:
            with nullcontext() if reduces or not reducer else reducer.no_sync():
                times[reduces].append(_slowest(timed.step, ranks))
    measured = {}
    for size in SIZES:
        tensor = torch.zeros(size // 4)
        sending = partial(dist.all_reduce, tensor)
        measured[size] = statistics.median(_slowest(sending, ranks) for _ in range(20))
    link = fit(measured) if ranks.world_size > 1 else Link(math.inf, 0.0)
    result = {"step_seconds": statistics.median(times[True]), "compute_seconds": statistics.median(times[False]),
              "parameters": sum(p.numel() for p in timed.loop.network.parameters()), **asdict(link)}  # fmt: skip
    if ranks.is_first:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def _slowest(work: Callable[[], Any], ranks: Any) -> float:
    """Seconds of the rank that takes longest, from a common start."""
    dist.barrier()
    started = time.perf_counter()
    work()
    return max(gather(time.perf_counter() - started, ranks))


# ---------- report


def print_prediction(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """A line for each number of GPUs."""
    table = Table(title=title)
    for column in ("GPUs", "step ms", "communication ms", "not hidden ms", "efficiency", "samples/s"):
        table.add_column(column, justify="right")
    for row in rows:
        milliseconds = [f"{1e3 * row[f'{name}_seconds']:.2f}" for name in ("step", "communication", "exposed")]
        table.add_row(
            str(row["gpus"]), *milliseconds, f"{100 * row['efficiency']:.1f} %", f"{row['samples_per_s']:.0f}"
        )
    console.print(table)


def print_check(found: dict[str, Any], console: Console) -> None:
    """The model against two ranks here."""
    ms = {name.removesuffix("_seconds"): f"{1e3 * value:.1f}" for name, value in found.items() if "seconds" in name}
    console.print(
        f"check, gloo, {found['parameters']:,} parameters, one thread per rank, ms a step\n"
        f"  one rank alone {ms['alone']}; two ranks side by side without communication {ms['compute']}\n"
        f"  all-reduce {ms['communication']}, from {found['link']['bandwidth'] / 1e9:.2f} GB/s and "
        f"{1e6 * found['link']['latency']:.0f} us measured at other sizes; not hidden by the backward {ms['exposed']}\n"
        f"  two ranks: predicted {ms['predicted']}, measured {ms['step']}, off by {100 * found['error']:+.1f} %\n"
        f"  weak scaling measured {100 * found['efficiency']:.0f} %: both ranks share this machine's memory and cores",
        highlight=False,
    )


def make_parser() -> argparse.ArgumentParser:
    """Bandwidths and latencies are assumed for H100 nodes with NVLink 4 (450 GB/s a direction) and a 400 Gb/s port per
    GPU, at 80 and 90 % of their nominal rates: to be replaced by what nccl-tests says on the cluster in question."""
    parser = argparse.ArgumentParser(description="Weak scaling, predicted from one GPU's step.")
    parser.add_argument("--results", type=Path, help="A file of bench_train; without it this device's.")
    parser.add_argument("--step_ms", type=float, help="One GPU's step, in place of a file.")
    parser.add_argument("--batch", type=int, default=training.BATCH, help="Crops per GPU, with --step_ms.")
    parser.add_argument("--parameters", type=int, default=UNETR_PARAMETERS, help="Of the network, with --step_ms.")
    parser.add_argument("--zero_stage", type=int, choices=range(4), default=0)
    parser.add_argument("--cuda_graph", action="store_true", help="Forward and backward are one CUDA graph (ZeRO 0).")
    parser.add_argument("--gradient_bytes", type=int, choices=(2, 4), default=4, help="Of each gradient when sent.")
    parser.add_argument(
        "--bucket_elements", type=int, default=BUCKET_ELEMENTS, help="Gradients that are sent together."
    )
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--nvlink_gbs", type=float, default=360, help="GB/s of a GPU, each way, within a node.")
    parser.add_argument("--nvlink_us", type=float, default=3, help="Latency of a message within a node.")
    parser.add_argument("--infiniband_gbs", type=float, default=45, help="GB/s of a GPU's port, each way.")
    parser.add_argument("--infiniband_us", type=float, default=7, help="Latency of a message between nodes.")
    parser.add_argument("--check", action="store_true", help="Compare the model with two ranks here (gloo, CPU).")
    parser.add_argument("--rounds", type=int, default=bench_train.ROUNDS, help="Of the check.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def read_step(options: argparse.Namespace) -> tuple[Step, str]:
    """The step that the options mean, and where it is from.

    Raises:
        ValueError: no such file, or no step of ours in it.
    """
    if options.step_ms is not None:
        seconds = options.step_ms / 1e3
        count = options.parameters
        parts = (FORWARD_SHARE * seconds, BACKWARD_SHARE * seconds)
        return Step(seconds, *parts, count * options.gradient_bytes, count * 4, options.batch), "given"
    path = options.results or bench_train.result_file()
    if not path.is_file():
        raise ValueError(f"no {path}: run python -m benchmarks.bench_train, or give --step_ms or --results")
    result = json.loads(path.read_text())
    return step_of(result, options.gradient_bytes), f"{result['model']} on {result['machine']['device']}"


def main() -> int:
    """Predict, or check; print and write benchmarks/results/scaling.json."""
    parser = make_parser()
    options = parser.parse_args()
    if options.cuda_graph and options.zero_stage:
        parser.error(f"--cuda_graph goes with --zero_stage 0, not {options.zero_stage}")
    if options.worker:
        worker()
        return 0
    console = Console(width=120)
    path = bench_train.result_file().with_name("scaling_check.json" if options.check else "scaling.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": {**machine(), "load_before": os.getloadavg()[0]}}
    if options.check:
        content["check"] = check(options.rounds)
        print_check(content["check"], console)
    else:
        try:
            step, source = read_step(options)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        cluster = Cluster(
            options.gpus_per_node,
            Link(options.nvlink_gbs * 1e9, options.nvlink_us / 1e6),
            Link(options.infiniband_gbs * 1e9, options.infiniband_us / 1e6),
        )
        bucket = options.bucket_elements * options.gradient_bytes
        rows = predict(step, options.zero_stage, cluster, bucket, after=options.cuda_graph)
        content |= {"step": asdict(step), "source": source, "zero_stage": options.zero_stage,
                    "cuda_graph": options.cuda_graph,
                    "bucket_elements": options.bucket_elements, "cluster": asdict(cluster), "rows": rows}  # fmt: skip
        print_prediction(rows, f"predicted, not measured: ZeRO {options.zero_stage}, step {source}", console)
        assert __doc__ is not None
        console.print("Assumed" + __doc__.partition("Assumed")[2].rstrip(), highlight=False)
    path.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"wrote {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
