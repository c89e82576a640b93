#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Steps of PyTorch's FSDP2 beside those of mics, on the same GPUs, in one table.

  fsdp2_step.py [--ranks 2] [--steps 20] [--cases parameters,1x16,8x1024] [--modes eager,compiled]
                [--mics PROGRAM --launch "mpirun ..."] [--json FILE]

Cases, all of the model of inputs/gpt_1b.json (24 layers of width 2048, 1.31e9 parameters):
  parameters  the parameter list without computation: every unit is gathered forward and backward and
              reduced, then fused AdamW. FSDP2's units pass one number on, and their gradients are
              memory that nobody wrote. Beside it: `mics bench step`, which also takes the norm.
  BxT         the GPT on B samples of T positions a rank, eager unless --modes says otherwise; the
              norm is clipped to 1. Beside it: `mics train` on inputs/gpt_1b.json.

FSDP2 has fp32 parameters and AdamW(fused=True), gathers and reduces in bf16, and frees units after
their forward pass. wall: of the slowest rank, in a row. busy: the union of the kernels, copies and
fills of rank 0's GPU, by torch.profiler. Of mics only the wall is known, which is at least as long.
memory: most that nvidia-smi shows of one GPU; allocated: most that PyTorch's tensors took.

--device cpu --tiny runs everything on processors through gloo: for testing this file.
Prints SKIPPED and ends with status 77 where PyTorch, CUDA or the GPUs are missing.
"""
import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
DECK = ROOT / "inputs" / "gpt_1b.json"
TINY = {"layers": 2, "heads": 4, "width": 64, "positions": 16, "vocabulary": 128}
WARM_UP = 4
PROFILED = 3
SECONDS = 100  # limit of one program; all of it is to end within four minutes


def skip(reason):
    print(f"SKIPPED: nothing is measured: {reason}", flush=True)
    sys.exit(77)


try:
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as multiprocessing
    import torch.nn.functional as F
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    skip(f"no PyTorch with FSDP2 ({error}); pip install torch")


def read_deck():
    text = re.sub(r"^\s*//.*$", "", DECK.read_text(), flags=re.M)
    return json.loads(text)


# ---- the model


def parameter(*shape):
    return nn.Parameter(torch.empty(shape))


class Embedding(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.token = parameter(model["vocabulary"], model["width"])
        self.position = parameter(model["positions"], model["width"])


class Block(nn.Module):
    """The parameters of mics' block, and its arithmetic."""

    def __init__(self, model):
        super().__init__()
        c = model["width"]
        self.heads = model["heads"]
        self.ln1_weight, self.ln1_bias = parameter(c), parameter(c)
        self.qkv_weight = parameter(3 * c, c)
        self.query_bias, self.value_bias = parameter(c), parameter(c)
        self.proj_weight, self.proj_bias = parameter(c, c), parameter(c)
        self.ln2_weight, self.ln2_bias = parameter(c), parameter(c)
        self.up_weight, self.up_bias = parameter(4 * c, c), parameter(4 * c)
        self.down_weight, self.down_bias = parameter(c, 4 * c), parameter(c)

    def forward(self, x):
        samples, positions, c = x.shape
        normal = F.layer_norm(x, (c,), self.ln1_weight, self.ln1_bias)
        bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        qkv = F.linear(normal, self.qkv_weight, bias)
        split = qkv.view(samples, positions, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(*split.unbind(), is_causal=True)
        attention = attention.transpose(1, 2).reshape(samples, positions, c)
        x = x + F.linear(attention, self.proj_weight, self.proj_bias)
        normal = F.layer_norm(x, (c,), self.ln2_weight, self.ln2_bias)
        up = F.gelu(F.linear(normal, self.up_weight, self.up_bias), approximate="tanh")
        return x + F.linear(up, self.down_weight, self.down_bias)


class Final(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.weight, self.bias = parameter(model["width"]), parameter(model["width"])


class Gpt(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.embedding = Embedding(model)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model["layers"]))
        self.final = Final(model)

    def forward(self, tokens, targets):
        # Embedding and head are the root's, which FSDP2 keeps gathered from forward to backward.
        token = self.embedding.token
        x = F.embedding(tokens, token) + self.embedding.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = F.layer_norm(x, x.shape[-1:], self.final.weight, self.final.bias)
        logits = F.linear(x, token)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Touch(torch.autograd.Function):
    """Nothing but a reason to gather parameters and to reduce their gradients."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.of_parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(
            torch.empty(shape, dtype=dtype, device=device)
            for shape, dtype, device in ctx.of_parameters
        )


class Unit(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return Touch.apply(x, *self.of.parameters())


class Units(nn.Module):
    """The parameter list unit by unit, as mics gathers it."""

    def __init__(self, model):
        super().__init__()
        parts = [Embedding(model), *(Block(model) for _ in range(model["layers"])), Final(model)]
        self.units = nn.ModuleList(Unit(part) for part in parts)

    def forward(self, x):
        for unit in self.units:
            x = unit(x)
        return x


# ---- a rank


class Machine:
    """What is measured on: GPUs through NCCL, or processors through gloo."""

    def __init__(self, arguments, rank):
        self.is_gpu = arguments.device == "cuda"
        self.device = torch.device("cuda", rank) if self.is_gpu else torch.device("cpu")
        if self.is_gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if self.is_gpu else "gloo",
            init_method=f"tcp://127.0.0.1:{arguments.port}",
            rank=rank,
            world_size=arguments.ranks,
            device_id=self.device if self.is_gpu else None,
        )
        self.mesh = init_device_mesh(arguments.device, (arguments.ranks,))

    def wait(self):
        if self.is_gpu:
            torch.cuda.synchronize()

    def barrier(self):
        self.wait()
        dist.barrier()
        self.wait()

    def slowest(self, seconds):
        value = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value.item()


def shard(machine, make, reshard_root):
    """A module whose parameters are made sharded: it never lies whole on one GPU."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    options = {"mesh": machine.mesh, "mp_policy": policy}
    with torch.device("meta"):
        module = make()
    for unit in module.units if reshard_root else module.blocks:
        fully_shard(unit, reshard_after_forward=True, **options)
    fully_shard(module, reshard_after_forward=reshard_root, **options)
    module.to_empty(device=machine.device)
    with torch.no_grad():
        for name, value in module.named_parameters():
            local = value.to_local()
            if value.dim() > 1:
                local.normal_(0, 0.02)
            else:
                local.fill_(1 if name.endswith(("ln1_weight", "ln2_weight", "final.weight")) else 0)
    return module


def make_optimizer(module, deck):
    params = deck["engine"]["optimizer"]["params"]
    return torch.optim.AdamW(
        module.parameters(),
        lr=params["lr"],
        betas=params["betas"],
        weight_decay=params["weight_decay"],
        fused=True,
    )


def busy_seconds(trace, steps):
    """Length of the union of the intervals in which the GPU did something, a step."""
    with open(trace) as file:
        events = json.load(file)["traceEvents"]
    # Without annotations, which the trace shows as ranges of the GPU, too.
    intervals = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    if not intervals:
        print("  note: torch.profiler saw no work of the GPU: busy is unknown", flush=True)
        return None
    total, end = 0.0, -math.inf
    for begin, stop in intervals:
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total * 1e-6 / steps


def measure(machine, step, arguments, rank):
    """Seconds of a step: wall, and busy on a GPU."""
    for _ in range(WARM_UP):
        step()
    machine.barrier()
    start = time.perf_counter()
    for _ in range(arguments.steps):
        step()
    machine.wait()
    wall = machine.slowest(time.perf_counter() - start) / arguments.steps
    busy = None
    machine.barrier()
    if machine.is_gpu:
        profile = contextlib.nullcontext()
        if rank == 0:
            profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        with profile:
            for _ in range(PROFILED):
                step()
            machine.wait()
        if rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                trace = os.path.join(folder, "trace.json")
                profile.export_chrome_trace(trace)
                busy = busy_seconds(trace, PROFILED)
    machine.barrier()
    return wall, busy


def run_parameters(machine, deck, arguments, rank):
    module = shard(machine, lambda: Units(deck["model"]), reshard_root=True)
    optimizer = make_optimizer(module, deck)
    one = torch.ones(1, dtype=torch.bfloat16, device=machine.device)

    def step():
        optimizer.zero_grad()
        x = torch.zeros(1, dtype=torch.bfloat16, device=machine.device, requires_grad=True)
        module(x).backward(one)
        optimizer.step()

    wall, busy = measure(machine, step, arguments, rank)
    for name, value in module.named_parameters():
        if value.grad is None:
            raise RuntimeError(f"{name}: no gradient was reduced")
    return {"wall": wall, "busy": busy}


def run_gpt(machine, deck, arguments, rank, batch, positions, compiled):
    model = dict(deck["model"], positions=positions)

    def make():
        whole = Gpt(model)
        if compiled:  # before they are sharded, so that FSDP2's hooks stay outside
            for i, block in enumerate(whole.blocks):
                whole.blocks[i] = torch.compile(block)
        return whole

    module = shard(machine, make, reshard_root=False)
    optimizer = make_optimizer(module, deck)
    generator = torch.Generator(device=machine.device).manual_seed(1 + rank)
    windows = torch.randint(
        model["vocabulary"], (batch, positions + 1), device=machine.device, generator=generator
    )
    tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    limit = deck["engine"]["gradient_clipping"]
    losses = []

    def step():
        optimizer.zero_grad()
        loss = module(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), limit)
        optimizer.step()
        losses.append(loss.detach())

    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if machine.is_gpu else contextlib.nullcontext()
    with flash:
        wall, busy = measure(machine, step, arguments, rank)
    first, last = losses[0].item(), losses[-1].item()
    if not (math.isfinite(last) and last < first):
        raise RuntimeError(f"loss {last} after {first}: the model does not learn its batch")
    return {"wall": wall, "busy": busy}


def count_parameters(model):
    with torch.device("meta"):
        return sum(value.numel() for value in Units(model).parameters())


def run_rank(rank, arguments, deck, case, output):
    torch.set_num_threads(1)
    machine = Machine(arguments, rank)
    if case["kind"] == "parameters":
        result = run_parameters(machine, deck, arguments, rank)
    else:
        result = run_gpt(
            machine, deck, arguments, rank, case["batch"], case["positions"], case["compiled"]
        )
    if machine.is_gpu:
        allocated = torch.tensor([torch.cuda.max_memory_allocated()], device=machine.device)
        dist.all_reduce(allocated, op=dist.ReduceOp.MAX)
        result["allocated"] = allocated.item()
    machine.barrier()
    if rank == 0:
        pathlib.Path(output).write_text(json.dumps(result))
    dist.destroy_process_group()


# ---- both sides


class MemoryWatch:
    """The most memory that any GPU has in use, of all programs, by nvidia-smi; None without it."""

    def __enter__(self):
        self.most = None
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        try:
            self.process = subprocess.Popen(
                query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self.process = None
            return self
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        return self

    def read(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.most = max(self.most or 0, int(line) << 20)

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.thread.join()


def run_fsdp2(arguments, deck, case):
    with tempfile.TemporaryDirectory() as folder, MemoryWatch() as watch:
        output = os.path.join(folder, "result.json")
        context = multiprocessing.spawn(
            run_rank, (arguments, deck, case, output), nprocs=arguments.ranks, join=False
        )
        deadline = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"FSDP2, {case['name']}: not done after {SECONDS} s")
        finally:
            for process in context.processes:
                process.kill()
        result = json.loads(pathlib.Path(output).read_text())
    result["memory"] = watch.most
    return result


def run_program(arguments, *words):
    command = [*shlex.split(arguments.launch), "-n", str(arguments.ranks), arguments.mics, *words]
    with MemoryWatch() as watch:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS)
    if done.returncode != 0:
        print(done.stdout, flush=True)
        raise RuntimeError(f"status {done.returncode} of {shlex.join(command)}")
    return watch.most


def run_mics(arguments, deck, case):
    with tempfile.TemporaryDirectory() as folder:
        records = os.path.join(folder, "records.jsonl")
        if case["kind"] == "parameters":
            memory = run_program(
                arguments, "bench", "step", "--sizes", str(deck["model"]["width"]), "--json", records
            )
        else:
            overrides = {
                "training.steps": WARM_UP + arguments.steps,
                "training.warmup_steps": 1,
                "training.metrics": records,
                "engine.train_micro_batch_size_per_gpu": case["batch"],
                "engine.mics.shard_size": arguments.ranks,
                **{f"model.{key}": value for key, value in deck["model"].items()},
                "model.positions": case["positions"],
                "data.synthetic_tokens": 2000 * (case["positions"] + 1),
            }
            words = [f"{key}={value}" for key, value in overrides.items()]
            memory = run_program(arguments, "train", str(DECK), *words)
        with open(records) as file:
            lines = [json.loads(line) for line in file]
    if case["kind"] == "parameters":
        return {"wall": lines[-1]["seconds"], "memory": memory}
    steps = [line["seconds"] for line in lines if line.get("event") == "step"]
    return {"wall": statistics.mean(steps[WARM_UP:]), "memory": memory}


def versions(arguments):
    text = [f"PyTorch {torch.__version__}"]
    if arguments.device == "cuda":
        text.append(f"CUDA {torch.version.cuda}")
        text.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())) + " (PyTorch's)")
        # Not by PyTorch, whose context in this process would take memory of the first GPU.
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            shown = subprocess.run(query, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            text += [f"{arguments.ranks} x {line}" for line in shown[:1]]
    if arguments.mics:
        version = subprocess.run([arguments.mics, "--version"], stdout=subprocess.PIPE, text=True)
        text.append(f"mics {version.stdout.strip()}")
    text.append(f"NCCL_NVLS_ENABLE={os.environ['NCCL_NVLS_ENABLE']}")
    return ", ".join(text)


class Table:
    def __init__(self, parameters, path):
        self.parameters = parameters
        self.file = open(path, "w") if path else None
        print(
            f"  {'case':12} {'library':16} {'wall':>9} {'GPU busy':>9} {'TFLOP/s a GPU':>14} "
            f"{'memory':>10} {'allocated':>10}",
            flush=True,
        )

    def row(self, case, library, result):
        def milliseconds(key):
            value = result.get(key)
            return f"{value * 1e3:6.1f} ms" if value else "-"

        def gibibytes(key):
            value = result.get(key)
            return f"{value / 2**30:6.2f} GiB" if value else "-"

        rate = "-"
        if case["kind"] == "gpt":
            tokens = case["batch"] * case["positions"]
            result["flops"] = 6 * self.parameters * tokens / result["wall"]
            rate = f"{result['flops'] * 1e-12:.1f}"
        print(
            f"  {case['name']:12} {library:16} {milliseconds('wall'):>9} {milliseconds('busy'):>9} "
            f"{rate:>14} {gibibytes('memory'):>10} {gibibytes('allocated'):>10}",
            flush=True,
        )
        if self.file:
            record = {"case": case["name"], "library": library, **result}
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


def read_cases(arguments):
    cases = []
    for name in arguments.cases.split(","):
        if name == "parameters":
            cases.append({"name": name, "kind": "parameters"})
            continue
        batch, positions = map(int, name.split("x"))
        case = {"name": name, "kind": "gpt", "batch": batch, "positions": positions}
        for mode in arguments.modes.split(","):
            cases.append({**case, "compiled": mode == "compiled"})
    return cases


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="one a GPU")
    parser.add_argument("--steps", type=int, default=20, help="that are timed in a row")
    parser.add_argument("--cases", default="parameters,1x16,8x1024")
    parser.add_argument("--modes", default="eager", choices=("eager", "compiled", "eager,compiled"))
    parser.add_argument("--mics", help="the program: its steps are measured beside")
    parser.add_argument("--launch", default="mpirun", help="of MPI programs, without -n")
    parser.add_argument("--json", help="file for the results, one JSON object a line")
    parser.add_argument("--port", type=int, default=29518)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.1e6 parameters")
    arguments = parser.parse_args()
    # A time limit's signal ends the ranks too, which would keep the GPUs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    # Without it NCCL may take NVLink's multicast on one machine and not on the next.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            skip(f"PyTorch {torch.__version__} sees no CUDA device")
        if torch.cuda.device_count() < arguments.ranks:
            skip(f"{arguments.ranks} ranks need as many GPUs, found {torch.cuda.device_count()}")
    deck = read_deck()
    if arguments.tiny:
        deck["model"] = TINY
    parameters = count_parameters(deck["model"])
    print(f"{parameters} parameters, {arguments.ranks} ranks, {arguments.steps} steps in a row")
    print(versions(arguments), flush=True)
    table = Table(parameters, arguments.json)
    for case in read_cases(arguments):
        compiled = case.get("compiled", False)
        table.row(case, "FSDP2 compiled" if compiled else "FSDP2", run_fsdp2(arguments, deck, case))
        if arguments.mics and not compiled:
            table.row(case, "mics", run_mics(arguments, deck, case))


if __name__ == "__main__":
    main()
