# SPDX-License-Identifier: Apache-2.0
"""Reads every tensor of a checkpoint through its manifest, with h5py and with HDF5's own tools, and
compares the bits with those that were saved, and with those that `mics checkpoint export` writes.
Usage: h5py_test.py SAMPLE [MICS]"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy as np
except ImportError as error:
    print(f"SKIPPED: {error}; the manifest was not read by h5py. Install python3-h5py.")
    sys.exit(77)
for tool in ("h5dump", "h5repack"):
    if not shutil.which(tool):
        print(f"SKIPPED: no {tool}; nothing was read by HDF5's own tools. Install hdf5-tools.")
        sys.exit(77)

DTYPES = {"fp64": np.float64, "fp32": np.float32, "fp16": np.float16}


def widened(bits, dtype):
    """Values as numpy has them; bfloat16, which it has not, as float32."""
    if dtype == "bf16":
        return (np.frombuffer(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(bits, DTYPES[dtype])


def raw_bits(dataset):
    """The elements' bytes, without any conversion by HDF5."""
    width = dataset.id.get_type().get_size()
    out = np.empty(dataset.shape, f"V{width}")
    dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, out, dataset.id.get_type())
    return out.tobytes()


def check(folder, samples, bits):
    read = 0
    with h5py.File(folder / "manifest.h5", "r") as manifest:
        for line in samples:
            path, dtype, kind, layout, offset, length, *shape = line.split()
            shape = [int(extent) for extent in shape]
            expected = bits[int(offset) : int(offset) + int(length)]
            dataset = manifest[path]
            assert dataset.is_virtual or not expected, path
            shown = shape or [1]
            assert list(dataset.shape) == (shown[::-1] if layout == "left" else shown), path
            assert raw_bits(dataset) == expected, f"{path}: other bits"
            values = widened(expected, dtype)
            if kind == "complex":
                values = values.view(np.complex64 if dtype == "fp32" else np.complex128)
            got = dataset[()]
            assert got.dtype.kind == ("c" if kind == "complex" else "f"), (path, got.dtype)
            np.testing.assert_array_equal(got.ravel(), values, path)
            if layout == "left":
                assert list(dataset.attrs["shape"]) == shape and dataset.attrs["layout"] == b"left"
            read += 1
        tensors = []
        manifest.visititems(lambda n, o: tensors.append(n) if isinstance(o, h5py.Dataset) else None)
        tensors = [t for t in tensors if t.startswith(("model/", "optimizer/"))]
        assert len(tensors) == len(samples), "tensors that were not saved"
        step = manifest.attrs["step"]
    return read, step


def check_hole(folder, samples):
    """What is missing shows as NaN, not as numbers."""
    piece = sorted(folder.glob("s0000_*.h5"))[0]
    piece.rename(folder / "away")
    with h5py.File(folder / "manifest.h5", "r") as manifest:
        path = samples[0].split()[0]
        assert np.isnan(manifest[path][()]).any(), "a hole that nobody sees"
    (folder / "away").rename(piece)


def check_repack(folder, samples, bits, scratch):
    """h5repack makes ordinary datasets of the views."""
    full = scratch / "full.h5"
    subprocess.run(["h5repack", "-l", "CONTI", folder / "manifest.h5", full], check=True)
    # Alone: nothing of it is a view any longer.
    with h5py.File(full, "r") as file:
        for line in samples:
            path, _, _, _, offset, length, *_ = line.split()
            assert not file[path].is_virtual
            assert raw_bits(file[path]) == bits[int(offset) : int(offset) + int(length)], path


def check_dump(folder, samples, bits, scratch):
    """h5dump, for those who have no Python, shows the bits of every tensor."""
    out = scratch / "dump.bin"
    for line in samples:
        path, _, _, _, offset, length, *_ = line.split()
        command = ["h5dump", "-d", path, "-b", "FILE", "-o", out, folder / "manifest.h5"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        dumped = out.read_bytes() if int(length) else b""
        assert dumped == bits[int(offset) : int(offset) + int(length)], path


def exported(file):
    """Tensors of a safetensors file, by its specification: name -> (shape, bytes)."""
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    header.pop("__metadata__")
    return {
        name: (entry["shape"], data[length:][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def check_export(program, folder, samples, scratch):
    """The views have the bits that `mics checkpoint export` writes, which is row-major."""
    seen = 0
    with h5py.File(folder / "manifest.h5", "r") as manifest:
        for array in ("weights", "exp_avg", "exp_avg_sq"):
            out = scratch / array
            command = [program, "checkpoint", "export", folder, out, "--array", array]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            group = manifest["model" if array == "weights" else f"optimizer/{array}"]
            for name, (shape, data) in exported(out).items():
                dataset = group[name + "%" if f"{name}%" in group else name]
                pairs = [dataset.id.get_type().get_size()]
                elements = np.frombuffer(raw_bits(dataset), f"V{pairs[0]}").reshape(dataset.shape)
                if dataset.attrs.get("layout") == b"left":
                    elements = elements.T
                assert np.ascontiguousarray(elements).tobytes() == data, (array, name)
                complex_ = dataset.dtype.kind == "c"
                assert shape == list(elements.shape) + [2] * complex_ or shape == [], (array, name)
                seen += 1
    assert seen == len(samples), (seen, len(samples))


def main():
    program, mics = (sys.argv + [None])[1:3]
    for world, shard in ((1, 1), (4, 2), (6, 3), (8, 8)):
        with tempfile.TemporaryDirectory(prefix="mics-h5py-") as temporary:
            scratch = pathlib.Path(temporary)
            run = scratch / "run"
            subprocess.run([program, run, str(world), str(shard)], check=True)
            samples = (run / "sample.txt").read_text().splitlines()
            bits = (run / "sample.bin").read_bytes()
            folder = run / "step-000000012"
            # The views go with their folder, wherever a reader stands.
            folder = folder.rename(scratch / "moved")
            read, step = check(folder, samples, bits)
            assert read == len(samples) > 30 and step == 12
            check_hole(folder, samples)
            check_repack(folder, samples, bits, scratch)
            check_dump(folder, samples, bits, scratch)
            if mics:
                check_export(mics, folder, samples, scratch)
            print(f"world {world}, shard size {shard}: {read} tensors")
    print(f"h5py {h5py.__version__} on HDF5 {h5py.version.hdf5_version}")


main()
