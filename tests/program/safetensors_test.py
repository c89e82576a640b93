# SPDX-License-Identifier: Apache-2.0
"""Reads what `mics checkpoint export` wrote with Python's safetensors, and compares the bits with those
that were saved. Usage: safetensors_test.py MICS SAMPLE"""

import pathlib
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import safetensors
except ImportError as error:
    print(f"SKIPPED: {error}; no export was read by it. Install safetensors and numpy.")
    sys.exit(77)

MICS, SAMPLE = sys.argv[1:3]
NAMES = {"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def row_major(bits, shape, width):
    """The bits of a column-major tensor in row-major order."""
    elements = np.frombuffer(bits, np.dtype(f"V{width}"))
    return np.ascontiguousarray(elements.reshape(shape, order="F")).tobytes()


def check(folder, array, group, samples, bits):
    out = folder / f"{array}.safetensors"
    subprocess.run([MICS, "checkpoint", "export", folder, out, "--array", array], check=True)
    tensors = dict(safetensors.deserialize(out.read_bytes()))
    with safetensors.safe_open(out, "np") as file:
        assert file.metadata() == {"format": "mics", "array": array, "step": "12"}, file.metadata()
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            if tensor["dtype"] != "BF16":  # which numpy has not
                assert file.get_tensor(name).tobytes() == bytes(tensor["data"]), name
    seen = 0
    for line in samples:
        path, dtype, kind, layout, offset, length, *shape = line.split()
        if not path.startswith(group):
            continue
        name = path.removeprefix(group).removesuffix("%")
        tensor = tensors[name]
        shape = [int(extent) for extent in shape]
        parts = 2 if kind == "complex" else 1
        expected = bits[int(offset) : int(offset) + int(length)]
        if layout == "left":
            count = int(np.prod(shape))
            expected = row_major(expected, shape, len(expected) // count)
        assert tensor["dtype"] == NAMES[dtype], (name, tensor["dtype"])
        assert tensor["shape"] == shape + ([2] if parts == 2 else []), (name, tensor["shape"])
        assert bytes(tensor["data"]) == expected, name
        seen += 1
    assert seen == len(tensors) > 0, (seen, len(tensors))
    print(f"{seen} tensors of {array} read with equal bits")


with tempfile.TemporaryDirectory(prefix="mics-safetensors-") as scratch:
    for world, shard in ((1, 1), (4, 2), (6, 3)):
        folder = pathlib.Path(scratch) / f"{world}_{shard}"
        subprocess.run([SAMPLE, folder, str(world), str(shard)], check=True)
        lines = (folder / "sample.txt").read_text().splitlines()
        data = (folder / "sample.bin").read_bytes()
        check(folder, "weights", "/model/", lines, data)
        check(folder, "exp_avg", "/optimizer/exp_avg/", lines, data)
        check(folder, "exp_avg_sq", "/optimizer/exp_avg_sq/", lines, data)
