# SPDX-License-Identifier: Apache-2.0
"""A reader of checkpoints made from lib/mics/checkpoint/FORMAT.md alone. It shares nothing with
mics: COMMIT, checksums, pieces and digests are read here, the index of the verified manifest by
h5py."""

import io
import json
import re
import struct

import h5py
import numpy as np

MIB = 1 << 20
WIDTH = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def _crc_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data):
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def hexadecimal(crc):
    return f"{crc:08x}"


class Damaged(Exception):
    pass


def need(condition, *what):
    if not condition:
        raise Damaged(" ".join(map(str, what)))


# Section 2.
_NUMBER = r"(0|[1-9][0-9]*)"
_COMMIT = re.compile(
    rf"mics-checkpoint 1\nstep {_NUMBER}\nsave ([0-9a-f]{{16}})\n"
    r"time ([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)\nwriter (\S+ \S+)\n"
    rf"layout world {_NUMBER} shard {_NUMBER} slices {_NUMBER} node {_NUMBER}\n"
    r"digest ([0-9a-f]{8})\n((?:file \S+ \S+ \S+\n)+)end ([0-9a-f]{8})\n"
)
_FILE = re.compile(rf"file ([A-Za-z0-9_-][A-Za-z0-9._-]*) {_NUMBER} ([0-9a-f]{{8}})")


class Commit:
    def __init__(self, text):
        match = _COMMIT.fullmatch(text.decode("ascii"))
        need(match, "COMMIT is not spelled as it should be")
        body = text[: text.rindex(b"end ")]
        need(hexadecimal(crc32c(body)) == match[11], "CRC of COMMIT")
        self.step, self.save = int(match[1]), match[2]
        self.world, self.shards, self.slices, self.node = (int(match[i]) for i in range(5, 9))
        self.digest = match[9]
        lines = [_FILE.fullmatch(line) for line in match[10].splitlines()]
        need(all(lines), "a line of a file")
        self.files = [(line[1], int(line[2]), line[3]) for line in lines]
        need(self.files[0][0] == "manifest.h5", "the manifest is the first file")


class Checkpoint:
    """All tensors of all arrays, verified: `tensors[array, name]` are the bytes in stored order."""

    def __init__(self, folder):
        self.folder = folder
        self.commit = Commit((folder / "COMMIT").read_bytes())
        need(int(folder.name.removeprefix("step-")) == self.commit.step, "the folder's number")
        for name, size, _ in self.commit.files:
            need((folder / name).stat().st_size == size, name, "has another size")
        name, _, crc = self.commit.files[0]
        manifest = (folder / name).read_bytes()
        need(hexadecimal(crc32c(manifest)) == crc, "CRC of", name)
        with h5py.File(io.BytesIO(manifest), "r") as file:
            need(file.attrs["mics_checkpoint"] == 1, "the version of the manifest")
            need(_text(file.attrs["save"]) == self.commit.save, "the save of the manifest")
            need(file.attrs["step"] == self.commit.step, "the step of the manifest")
            self.description = json.loads(file["index/description"][()].tobytes())
            self.block_crcs = file["index/block_crc32c"][()].tolist()
            self.digests = file["index/digest_crc32c"][()].tolist()
            blobs = self.description["blobs"]
            self.blobs = {b["name"]: file[f"blobs/{i}"][()].tobytes() for i, b in enumerate(blobs)}
            for i, blob in enumerate(blobs):
                need(len(self.blobs[blob["name"]]) == blob["bytes"], "size of a blob")
                need(_text(file[f"blobs/{i}"].attrs["name"]) == blob["name"], "name of a blob")
        self._check_description()
        self.pieces = self._read_pieces()
        self.arrays = self._assemble()
        self.tensors = self._cut()
        self._check_digests()

    @property
    def parts(self):
        return self.description["parts"]

    def reals(self):
        reals = self.description["values"]["reals"]
        return {
            key: [struct.unpack(">d", bytes.fromhex(bits))[0] for bits in values]
            for key, values in reals.items()
        }

    def _check_description(self):
        d, commit = self.description, self.commit
        grid = d["grid"]
        need((d["step"], d["save"]) == (commit.step, commit.save), "step and save")
        found = (grid["world_size"], grid["shard_size"], grid["slices"], grid["ranks_per_node"])
        need(found == (commit.world, commit.shards, commit.slices, commit.node), "layout")
        need(len(d["pieces"]) == commit.shards * self.parts, "number of pieces")
        listed = [(piece["file"], piece["bytes"]) for piece in d["pieces"]]
        need(listed == [file[:2] for file in commit.files[1:]], "pieces in the order of COMMIT")

    def _read_pieces(self):
        """The verified bytes of each piece."""
        pieces, blocks = [], iter(self.block_crcs)
        for name, _, crc in self.commit.files[1:]:
            data = (self.folder / name).read_bytes()
            for at in range(0, len(data), MIB):
                block = crc32c(data[at : at + MIB])
                need(block == next(blocks), "CRC of MiB", at // MIB, "of", name)
            need(hexadecimal(crc32c(data)) == crc, "CRC of", name)
            pieces.append(data)
        need(next(blocks, None) is None, "blocks that no file has")
        return pieces

    # Section 3.
    def part(self, buffer, shard, part):
        length = buffer["count"] // self.commit.shards
        units = length // 256
        return [shard * length + 256 * (units * k // self.parts) for k in (part, part + 1)]

    # Section 5.
    def stretches(self, buffer):
        """[begin, end, complex] of the whole buffer."""
        result = []
        for tensor, first, scalars in buffer["segments"]:
            kind = self.description["tensors"][tensor]["complex"]
            if scalars and not result:
                result.append([0, buffer["count"], kind])
            elif scalars and kind != result[-1][2]:
                result[-1][1] = first
                result.append([first, buffer["count"], kind])
        return result or [[0, buffer["count"], False]]

    def datasets(self, shard, part):
        """Of a piece, in order: path -> [(buffer, array, begin, end), ...]."""
        result = {}
        for b, buffer in enumerate(self.description["buffers"]):
            begin, end = self.part(buffer, shard, part)
            for first, last, complex_ in self.stretches(buffer):
                first, last = max(first, begin), min(last, end)
                if first >= last:
                    continue
                for a, array in enumerate(buffer["arrays"]):
                    kind = "complex_" if complex_ else ""
                    path = f"/{array['name']}/{kind}{array['dtype']}"
                    result.setdefault(path, []).append((b, a, first, last))
        return result

    def _assemble(self):
        buffers = self.description["buffers"]
        arrays = [
            [bytearray(b["count"] * WIDTH[array["dtype"]]) for array in b["arrays"]]
            for b in buffers
        ]
        seen = 0
        for i, piece in enumerate(self.description["pieces"]):
            datasets = self.datasets(i // self.parts, i % self.parts)
            need(len(datasets) == len(piece["offsets"]), "datasets of", piece["file"])
            for runs, at in zip(datasets.values(), piece["offsets"]):
                for b, a, first, last in runs:
                    width = WIDTH[buffers[b]["arrays"][a]["dtype"]]
                    size = (last - first) * width
                    arrays[b][a][first * width : last * width] = self.pieces[i][at : at + size]
                    at += size
                    seen += size
        need(seen == sum(len(array) for of_buffer in arrays for array in of_buffer), "all elements")
        return arrays

    def _cut(self):
        tensors = {}
        for buffer, arrays in zip(self.description["buffers"], self.arrays):
            for array, data in zip(buffer["arrays"], arrays):
                width, end = WIDTH[array["dtype"]], 0
                for tensor, first, scalars in buffer["segments"]:
                    need(first % 64 == 0 and first >= end, "where a tensor begins")
                    need(not any(data[end * width : first * width]), "a gap that is not zero")
                    end = first + scalars
                    name = self.description["tensors"][tensor]["name"]
                    tensors[array["name"], name] = bytes(data[first * width : end * width])
                need(not any(data[end * width :]), "padding that is not zero")
        return tensors

    # Section 6.
    def _check_digests(self):
        lines, digests = [], iter(self.digests)
        for buffer in self.description["buffers"]:
            for array in buffer["arrays"]:
                for tensor, _, scalars in buffer["segments"]:
                    name = self.description["tensors"][tensor]["name"]
                    digest = crc32c(self.tensors[array["name"], name])
                    need(digest == next(digests), "digest of", array["name"], "of", name)
                    words = (name, array["name"], array["dtype"], scalars, hexadecimal(digest))
                    lines.append(" ".join(map(str, words)).encode() + b"\n")
        need(next(digests, None) is None, "digests of nothing")
        need(hexadecimal(crc32c(b"".join(sorted(lines)))) == self.commit.digest, "the digest")

    def view(self, array, name):
        """A tensor in its declared shape; bf16 widened to fp32."""
        tensor = next(t for t in self.description["tensors"] if t["name"] == name)
        buffers = self.description["buffers"]
        dtype = next(
            a["dtype"]
            for b in buffers
            for a in b["arrays"]
            if a["name"] == array
            and any(self.description["tensors"][s[0]]["name"] == name for s in b["segments"])
        )
        data = self.tensors[array, name]
        if dtype == "bf16":
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, {"fp64": "<f8", "fp32": "<f4", "fp16": "<f2"}[dtype])
        if tensor["complex"]:
            values = values.view({"<f4": "<c8", "<f8": "<c16"}[values.dtype.newbyteorder("<").str])
        return values.reshape(tensor["shape"], order="F" if tensor["layout"] == "left" else "C")


def _text(attribute):
    return attribute.decode() if isinstance(attribute, bytes) else attribute
