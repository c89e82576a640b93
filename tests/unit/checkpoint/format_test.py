# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as FORMAT.md describes them: a reader made from that text alone finds every bit that
was saved, and what mics says of it. Usage: format_test.py SAMPLE"""

import pathlib
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy as np
except ImportError as error:
    print(f"SKIPPED: {error}; the format was not read by an independent reader")
    sys.exit(77)

from format_reader import Checkpoint, Damaged, crc32c

SAMPLE = sys.argv[1]
STEP = "step-000000012"


def save(folder, *layout):
    subprocess.run([SAMPLE, folder, *map(str, layout)], check=True)
    return folder / STEP


def check_tensors(folder, checkpoint):
    """Against the bits that the saving program had in memory, and the views."""
    bits = (folder / "sample.bin").read_bytes()
    lines = (folder / "sample.txt").read_text().splitlines()
    assert len(lines) == len(checkpoint.tensors) > 30, len(lines)
    with h5py.File(folder / STEP / "manifest.h5", "r") as manifest:
        for line in lines:
            path, dtype, kind, layout, offset, length, *shape = line.split()
            view = manifest[path]
            name = view.attrs.get("name", path.removeprefix("/model/"))
            name = name.decode() if isinstance(name, bytes) else name
            array = ["master_weights", "weights"]
            if path.startswith("/optimizer/"):
                array = [path.split("/")[2]]
                name = name.removeprefix(f"/optimizer/{array[0]}/")
            array = next(a for a in array if (a, name) in checkpoint.tensors)
            data = checkpoint.tensors[array, name]
            assert data == bits[int(offset) : int(offset) + int(length)], path
            tensor = next(t for t in checkpoint.description["tensors"] if t["name"] == name)
            assert tensor["shape"] == [int(extent) for extent in shape], path
            assert (tensor["complex"], tensor["layout"]) == (kind == "complex", layout), path
            # What others see through the view is the tensor, a column-major one transposed.
            values = checkpoint.view(array, name)
            shown = view[()]
            shown = shown.T if layout == "left" else shown.reshape(values.shape)
            np.testing.assert_array_equal(shown, values, path)
            dtypes = {"bf16": "bfloat16", "fp16": "float16"}
            found = view.attrs.get("dtype")
            found = found.decode() if isinstance(found, bytes) else found
            assert found == dtypes.get(dtype), path


def check_pieces(folder, checkpoint):
    """Each piece is an HDF5 file whose datasets are where the description has them."""
    for i, piece in enumerate(checkpoint.description["pieces"]):
        shard, part = divmod(i, checkpoint.parts)
        assert piece["file"] == f"s{shard:04}_r{part:02}-{checkpoint.commit.save[:8]}.h5"
        with h5py.File(folder / piece["file"], "r") as file:
            expected = dict(mics_checkpoint_piece=1, step=12, shard=shard, part=part)
            expected.update(shards=checkpoint.commit.shards, parts=checkpoint.parts)
            for key, value in expected.items():
                assert file.attrs[key] == value, (piece["file"], key)
            objects = []
            file.visititems(lambda name, item: objects.append((name, isinstance(item, h5py.Dataset))))
            paths = ["/" + name for name, is_dataset in objects if is_dataset]
            datasets = checkpoint.datasets(shard, part)
            assert sorted(paths) == sorted(datasets), piece["file"]
            for path, at in zip(datasets, piece["offsets"]):
                scalars = sum(last - first for _, _, first, last in datasets[path])
                assert file[path].id.get_offset() == at, path
                assert file[path].shape == (scalars // (2 if "complex_" in path else 1),), path
                assert file[path].chunks is None and not file[path].external, path


def check_damage(folder):
    """The reader is no oracle if it takes anything."""
    for name in sorted(path.name for path in folder.iterdir()):
        sound = (folder / name).read_bytes()
        for at in (0, len(sound) // 3, len(sound) - 1):
            damaged = bytearray(sound)
            damaged[at] ^= 1 << at % 8
            (folder / name).write_bytes(damaged)
            try:
                Checkpoint(folder)
                raise AssertionError(f"byte {at} of {name} may be anything")
            except (Damaged, UnicodeDecodeError):
                pass
        (folder / name).write_bytes(sound)


def main():
    assert crc32c(b"123456789") == 0xE3069283
    digests = set()
    # The last two have pieces of more than a MiB.
    for layout in ((1, 1), (4, 2), (6, 3), (8, 8), (3, 1, 300), (2, 2, 300)):
        with tempfile.TemporaryDirectory(prefix="mics-format-") as temporary:
            folder = pathlib.Path(temporary)
            checkpoint = Checkpoint(save(folder, *layout))
            assert checkpoint.description["values"]["integers"] == {"calls": 13}
            scale = checkpoint.reals()["loss_scale"]
            assert scale[0] == 65536 and str(scale[1]) == "-0.0" and scale[2] != scale[2]
            assert checkpoint.blobs == {"position": b"\x01\x00\xff", "empty": b""}
            check_tensors(folder, checkpoint)
            check_pieces(folder / STEP, checkpoint)
            digests.add((layout[2:], checkpoint.commit.digest))
            blocks = max(-(-len(piece) // (1 << 20)) for piece in checkpoint.pieces)
            assert blocks > 1 or len(layout) == 2
            if layout == (4, 2):
                check_damage(folder / STEP)
            print(f"layout {layout}: {len(checkpoint.tensors)} tensors, {blocks} blocks a piece")
    assert len(digests) == 2, f"the digest depends on the layout: {digests}"


main()
