#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The state of `mics bench checkpoint` through torch.distributed.checkpoint, beside raw files.

  checkpoint_dcp.py [--ranks N] [--size BYTES] [--pairs N] [--directory DIR]
                    [--mics PROGRAM --launch "mpirun ..."]

The state is 24 fp32 weights with two moments each, sharded over N/2 ranks and replicated twice where
N is even, as the bench has it. Raw files are written and read by the same processes in turn. With
--mics the bench runs too, before and after, on the same disk. Times are those of the slowest rank;
printed are medians. Prints SKIPPED and ends with status 77 where there is no PyTorch.
"""
import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    import torch.multiprocessing as multiprocessing
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
except ImportError as error:
    print(f"SKIPPED: no PyTorch to measure beside mics ({error}); pip install torch")
    sys.exit(77)

LAYERS = 24
ARRAYS = ("weight", "exp_avg", "exp_avg_sq")
CHUNK = 8 << 20


def timed(action):
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    action()
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def write_raw(path, size, buffer, direct):
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags, 0o666)
    os.posix_fallocate(descriptor, 0, size)
    for offset in range(0, size, CHUNK):
        part = buffer[: min(CHUNK, size - offset)]
        if os.pwrite(descriptor, part, offset) != len(part):
            raise OSError(f"short write to {path}")
    os.fsync(descriptor)
    os.close(descriptor)


def make_cold(directory):
    for folder, _, files in os.walk(directory):
        for name in files:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def clear(directory, rank):
    dist.barrier()
    if rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        os.sync()
    dist.barrier()


def make_state(arguments, fill):
    replicas = 2 if arguments.ranks % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (replicas, arguments.ranks // replicas))
    per_shard = arguments.size // (4 * LAYERS * len(ARRAYS)) // mesh.size(1)
    state = {}
    for layer in range(LAYERS):
        for array in ARRAYS:
            # Replicas hold the same: the seed is that of the shard.
            generator = torch.Generator().manual_seed(mesh.get_local_rank(1) * LAYERS + layer)
            local = torch.randn(per_shard, generator=generator) if fill else torch.zeros(per_shard)
            state[f"layer{layer}.{array}"] = DTensor.from_local(
                local, mesh, [Replicate(), Shard(0)], run_check=False
            )
    return state, per_shard * 4 * LAYERS * len(ARRAYS) * mesh.size(1)


def run_rank(rank, arguments, directory):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(arguments.port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=arguments.ranks)
    state, size = make_state(arguments, fill=True)
    import mmap

    buffer = mmap.mmap(-1, CHUNK)  # page-aligned, as direct I/O needs it
    buffer.write(os.urandom(CHUNK))
    share = size // arguments.ranks // 4096 * 4096
    saved = os.path.join(directory, "dcp")
    raw = os.path.join(directory, "raw")
    times = {"save": [], "raw write, O_DIRECT": [], "raw write, buffered + fsync": [],
             "load, cold": [], "asynchronous stall": []}
    for pair in range(-1, arguments.pairs):
        def record(name, seconds):
            if pair >= 0:
                times[name].append(seconds)

        clear(saved, rank)
        record("save", timed(lambda: dcp.save(state, checkpoint_id=saved)))
        if rank == 0:
            make_cold(saved)
        loaded, _ = make_state(arguments, fill=False)
        record("load, cold", timed(lambda: dcp.load(loaded, checkpoint_id=saved)))
        for name in state:
            if not torch.equal(loaded[name].to_local(), state[name].to_local()):
                raise RuntimeError(f"{name}: not what was saved")
        del loaded
        clear(saved, rank)
        for direct in (True, False):
            clear(raw, rank)
            path = os.path.join(raw, str(rank))
            name = "raw write, O_DIRECT" if direct else "raw write, buffered + fsync"
            record(name, timed(lambda: write_raw(path, share, memoryview(buffer), direct)))
        clear(raw, rank)
        pending = []
        record("asynchronous stall",
               timed(lambda: pending.append(dcp.async_save(state, checkpoint_id=saved))))
        pending[0].result()
    if rank == 0:
        print(f"torch.distributed.checkpoint, PyTorch {torch.__version__}, {arguments.ranks} "
              f"rank(s), {size / 2**20:.0f} MiB, medians of {arguments.pairs}", flush=True)
        best = min(statistics.median(times[name]) for name in times if name.startswith("raw"))
        for name, seconds in times.items():
            median = statistics.median(seconds)
            rate = f"{size / median / 1e9:8.2f} GB/s" if "stall" not in name else ""
            over = f"   {best / median:.2f} of raw writes" if name == "save" else ""
            print(f"  {name:30}{median * 1e3:10.0f} ms {rate}{over}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", type=int, default=1 << 30)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--port", type=int, default=29517)
    parser.add_argument("--directory", default=".")
    parser.add_argument("--mics", help="the program: its bench runs before and after")
    parser.add_argument("--launch", default="mpirun", help="of MPI programs, without -n")
    arguments = parser.parse_args()

    def bench():
        if arguments.mics is None:
            return
        subprocess.run(
            [*shlex.split(arguments.launch), "-n", str(arguments.ranks), arguments.mics, "bench",
             "checkpoint", "--sizes", str(arguments.size), "--pairs", str(arguments.pairs),
             "--directory", arguments.directory],
            check=True)

    bench()
    directory = tempfile.mkdtemp(prefix="dcp-", dir=arguments.directory)
    try:
        multiprocessing.spawn(run_rank, (arguments, directory), nprocs=arguments.ranks)
    finally:
        shutil.rmtree(directory)
    bench()


if __name__ == "__main__":
    main()
