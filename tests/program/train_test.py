# SPDX-License-Identifier: Apache-2.0
"""`mics train` on a small deck: train_test.py MICS [LAUNCHER WORD ...]

The same numbers however many ranks compute them and wherever they keep their state, and what the
user sees of it.
"""

import json
import math
import pathlib
import re
import shutil
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
import launch  # noqa: E402
from launch import edited  # noqa: E402

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="mics_train_"))
STEPS = 30
WARMUP = 5
PEAK = 0.01
ZERO = "engine.zero_optimization."
MICS = "engine.mics."
SIMILAR = 1e-4  # fp32 sums in another order, after 30 steps of AdamW
FP64 = (MICS + "compute_dtype=fp64",)


def deck_text():
    return edited(
        {"engine.optimizer.params.lr": PEAK, "engine.gradient_clipping": 1.0},
        steps=STEPS,
        warmup_steps=WARMUP,
        validate_every=10,
        print_every=10,
        sample_bytes=40,
        sample_prompt="state ",
    )


def setUpModule():
    launch.write_text(FOLDER / "text.txt")
    (FOLDER / "deck.json").write_text(deck_text())


def tearDownModule():
    shutil.rmtree(FOLDER)


def of(records, event):
    return [record for record in records if record["event"] == event]


def learning_rate(step):
    """Of step 1, 2, ...: linear to the peak, then a cosine to a tenth of it."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    return PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1 - WARMUP) / (STEPS - WARMUP))) / 2)


class Train(unittest.TestCase):
    reference = {}  # words -> metrics of one rank

    def train(self, *words, ranks=1, deck=FOLDER / "deck.json"):
        """Trains; returns (standard output, metrics)."""
        metrics = FOLDER / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        result = launch.run("train", deck, f"training.metrics={metrics}", *words, ranks=ranks)
        self.assertEqual((result.status, result.stderr), (0, ""), result)
        return result.stdout, [json.loads(line) for line in metrics.read_text().splitlines()]

    def one_rank(self, *words):
        if words not in self.reference:
            self.reference[words] = self.train(*words)
        return self.reference[words]

    def expect_similar(self, records, reference, similar):
        """The losses of all steps and all validations."""
        for event, key in (("step", "loss_bits_per_byte"), ("validation", "bits_per_byte")):
            found = [record[key] for record in of(records, event)]
            expected = [record[key] for record in of(reference, event)]
            self.assertEqual(len(found), len(expected))
            for i, (a, b) in enumerate(zip(found, expected)):
                self.assertLessEqual(abs(a - b), similar * abs(b), f"{event} {i}: {a} and {b}")

    def expect_learnt(self, records):
        steps = [record["loss_bits_per_byte"] for record in of(records, "step")]
        validation = [record["bits_per_byte"] for record in of(records, "validation")]
        self.assertAlmostEqual(steps[0], 8, delta=0.3)  # a byte, before anything is known of it
        self.assertLess(sum(steps[-5:]) / 5, steps[0] - 2)
        self.assertLess(validation[-1], steps[0] - 2)

    def test_same_losses_wherever_the_state_lies(self):
        _, reference = self.one_rank()
        self.expect_learnt(reference)
        hierarchical = (MICS + "ranks_per_node=2",)
        table = [
            (1, (ZERO + "stage=0",)),
            (1, (ZERO + "stage=2",)),
            (2, ()),
            (2, (ZERO + "stage=2", MICS + "prefetch=0")),
            (3, ()),
            (3, (ZERO + "stage=0",)),
            (4, ()),
            (4, (ZERO + "stage=0",)),
            (4, (ZERO + "stage=2",)),
            (4, (ZERO + "mics_shard_size=2",)),
            (4, (ZERO + "mics_shard_size=2", MICS + "ranks_per_node=2")),
            (4, (ZERO + "mics_shard_size=4", *hierarchical)),
            (4, (ZERO + "mics_shard_size=4", *hierarchical, MICS + "two_stage=off")),
            (4, (ZERO + "mics_shard_size=4", "engine.gradient_accumulation_steps=5")),
            (3, (MICS + "debug=true", ZERO + "stage3_param_persistence_threshold=100")),
        ]
        for ranks, words in table:
            with self.subTest(ranks=ranks, words=words):
                _, records = self.train(*words, ranks=ranks)
                self.expect_similar(records, reference, SIMILAR)

    def test_batches_that_the_ranks_do_not_divide(self):
        for batch, ranks in ((5, 4), (2, 3)):  # the second leaves a rank without a sample
            with self.subTest(batch=batch, ranks=ranks):
                words = (f"engine.train_batch_size={batch}",)
                _, records = self.train(*words, ranks=ranks)
                self.assertEqual({record["samples"] for record in of(records, "step")}, {batch})
                self.expect_similar(records, self.one_rank(*words)[1], SIMILAR)

    def test_micro_batch_size_counts_every_rank(self):
        words = ("engine.train_batch_size=null", "engine.train_micro_batch_size_per_gpu=3",
                 "engine.gradient_accumulation_steps=2")
        _, records = self.train(*words, ranks=2)
        self.expect_similar(records, self.one_rank()[1], SIMILAR)

    def test_fp64(self):
        reference_text, reference = self.one_rank(*FP64)
        self.expect_similar(reference, self.one_rank()[1], SIMILAR)
        text, records = self.train(*FP64, ranks=4)
        self.expect_similar(records, reference, 1e-11)
        self.assertIn("compute fp64", text)
        self.assertEqual(text[text.index("\nsample\n"):], reference_text[reference_text.index("\nsample\n"):])

    def test_bf16(self):
        for words in (("engine.bf16.enabled=true",), (MICS + "compute_dtype=bf16", MICS + "master_dtype=fp64")):
            with self.subTest(words):
                text, records = self.train(*words, ranks=2)
                self.assertIn("compute bf16", text)
                self.expect_learnt(records)
                self.expect_similar(records, self.one_rank()[1], 0.02)

    def test_sgd(self):
        words = ("engine.optimizer.type=SGD", 'engine.optimizer.params={"lr":0.5}')
        _, records = self.train(*words, ranks=4)
        losses = [record["loss_bits_per_byte"] for record in of(records, "step")]
        self.assertLess(losses[-1], losses[0] - 0.5)
        self.expect_similar(records, self.one_rank(*words)[1], SIMILAR)

    def test_a_run_can_be_repeated(self):
        first, second = (self.train(ranks=3)[1] for _ in range(2))
        self.expect_similar(first, second, 0)

    def test_metrics(self):
        for ranks in (1, 4):
            with self.subTest(ranks=ranks):
                _, records = self.train(ranks=ranks)
                steps = of(records, "step")
                self.assertEqual([record["step"] for record in steps], list(range(1, STEPS + 1)))
                self.assertEqual([record["step"] for record in of(records, "validation")], [10, 20, 30])
                self.assertEqual(records[-1]["event"], "result")
                self.assertEqual(len(records), STEPS + 4)
                for record in steps:
                    for key in ("loss_bits_per_byte", "tokens_per_second", "utilization", "gradient_norm",
                                "seconds"):
                        self.assertGreater(record[key], 0, record)
                    self.assertIs(record["skipped"], False)
                    self.assertAlmostEqual(record["learning_rate"], learning_rate(record["step"]), places=12)
                self.assertEqual(
                    records[-1]["validation_bits_per_byte"], of(records, "validation")[-1]["bits_per_byte"]
                )

    def expect_report(self, text, ranks):
        """The plan, then the steps, then the result and the sample, each once."""
        parts = ["model\n", "\nplan\n", f"{ranks} rank", "\nbatch\n", "step 10/30  loss ",
                 "validation after step 10: ", "step 20/30  loss ", "step 30/30  loss ",
                 "validation after step 30: ", "\nresult\n  30 steps in ", "bits/byte, bigram model ",
                 "\nsample\nstate "]
        places = [text.find(part) for part in parts]
        self.assertNotIn(-1, places, f"{parts}: {places}\n{text}")
        self.assertEqual(places, sorted(places), f"{parts}\n{text}")
        for part in ("\nplan\n", "step 10/30", "validation after step 10: ", "\nresult\n", "\nsample\n"):
            self.assertEqual(text.count(part), 1, part + text)
        sample = text[text.index("\nsample\n") + len("\nsample\n"):]
        self.assertEqual(len(sample), len("state ") + 40 + 1, sample)

    def test_plain_lines_in_a_pipe(self):
        for ranks in (1, 4):
            with self.subTest(ranks=ranks):
                text, _ = self.train(ranks=ranks)
                self.assertTrue(text.startswith("model\n"), text)
                self.assertNotRegex(text, r"[\r\x1b]")
                self.assertEqual(len(re.findall(r"^step \d+/30  loss \d\.\d{3} bits/byte  [\d.]+[kMG]? tokens/s"
                                                r"  \d+\.\d% of peak  ETA \d+:\d\d$", text, re.M)), 3, text)
                self.expect_report(text, ranks)

    def test_a_bar_in_a_terminal(self):
        for ranks in (1, 4):
            with self.subTest(ranks=ranks):
                status, shown = launch.run_in_terminal("train", FOLDER / "deck.json", ranks=ranks)
                self.assertEqual(status, 0, shown)
                self.assertRegex(shown, r"\r\[[=> ]{20}\] \d+/30  \d\.\d{3} bits/byte  [\d.]+[kMG]? tokens/s  \d+\.\d% of peak  ETA ")
                self.assertRegex(shown, r"\r\[={20}\] 30/30 ")
                self.assertNotRegex(shown, r"step \d+/30")
                # What the terminal shows in the end: a line is what was last written at each column.
                lines = []
                for line in shown.replace("\r\n", "\n").split("\n"):
                    cells = ""
                    for piece in line.split("\r"):
                        cells = piece + cells[len(piece):]
                    lines.append(cells.rstrip())
                self.assertEqual(sum(line.startswith("validation after step ") for line in lines), 3, shown)
                for line in lines:
                    if line.startswith("validation after"):
                        self.assertRegex(line, r"^validation after step \d+: \d\.\d{3} bits/byte$")
                self.assertIn("result", lines)
                self.assertIn("sample", lines)

    def test_share_of_a_peak_that_the_deck_gives(self):
        text, records = self.train("training.peak_flops=2e12", ranks=2)
        self.assertIn("\npeak\n  2.00T FLOP/s a rank, given by training.peak_flops\n", text)
        result = records[-1]
        self.assertEqual(result["peak_flops_per_second"], 4e12)
        self.assertAlmostEqual(result["utilization"], result["flops_per_second"] / 4e12, places=12)
        # Six operations a weight in a product, of 12 C^2 in the block and V C in the head, and
        # attention over whole squares.
        flops = 6 * (12 * 16**2 + 2 * 8 * 16 + 256 * 16)
        self.assertAlmostEqual(result["flops_per_second"] / result["tokens_per_second"], flops, places=6)
        self.assertRegex(self.one_rank()[0],
                         r"\npeak\n  [\d.]+[kMGT] FLOP/s a rank, measured: products of 512 x 512 matrices of fp32\n")

    def test_recomputed_blocks_change_no_number(self):
        def layers(*words, ranks):
            text, records = self.train("model.layers=3", *words, ranks=ranks)
            return int(re.search(r"activations (\d+) KiB", text)[1]), re.search(r"a step .*", text)[0], records

        for ranks, words in ((1, ()), (3, ()), (2, ("engine.bf16.enabled=true",))):
            with self.subTest(ranks=ranks, words=words):
                kept, plan, reference = layers(*words, ranks=ranks)
                less, same_plan, records = layers(*words, "model.recompute=true", ranks=ranks)
                self.assertLess(less, kept)
                self.assertEqual(plan, same_plan)
                self.expect_similar(records, reference, 0)

    def test_words_behind_the_deck_win(self):
        text, records = self.train("training.steps=2", "training.sample_bytes=0", "model.width=8", ranks=2)
        self.assertEqual(len(of(records, "step")), 2)
        self.assertIn("width 8", text)
        self.assertNotIn("\nsample\n", text)

    def test_a_deck_as_editors_write_it(self):
        """A byte order mark, comments, carriage returns, a path with spaces, the text beside it."""
        folder = FOLDER / "ä folder"
        folder.mkdir()
        shutil.copy(FOLDER / "text.txt", folder / "mein täxt.txt")
        text = "// first\n" + deck_text().replace("text.txt", "mein täxt.txt") + "/* last */"
        deck = folder / "ä deck.json"
        deck.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        _, records = self.train(deck=deck, ranks=2)
        self.expect_similar(records, self.one_rank()[1], SIMILAR)

    def test_a_folder_stands_for_its_text_files(self):
        folder = FOLDER / "folder"
        (folder / "inner").mkdir(parents=True)
        (folder / ".git").mkdir()
        half = (FOLDER / "text.txt").read_bytes()
        (folder / "inner" / "b.txt").write_bytes(half[5000:])
        (folder / "a.txt").write_bytes(half[:5000])
        (folder / ".git" / "c.txt").write_bytes(b"hidden" * 1000)
        (folder / "a.bin").write_bytes(b"\0binary" * 1000)
        (folder / "link").symlink_to(FOLDER)
        _, records = self.train("data.files=folder", ranks=2)
        self.expect_similar(records, self.one_rank()[1], SIMILAR)

    def test_metrics_of_a_new_run_replace_the_old_ones_in_a_new_folder(self):
        path = FOLDER / "new" / "folder" / "metrics.jsonl"
        for steps in (3, 2):
            words = (f"training.metrics={path}", f"training.steps={steps}")
            result = launch.run("train", FOLDER / "deck.json", *words, ranks=2)
            self.assertEqual((result.status, result.stderr), (0, ""), result)
            records = [json.loads(line) for line in path.read_text().splitlines()]
            self.assertEqual(len(of(records, "step")), steps)

    def test_help_and_version_are_printed_once(self):
        table = {("--help",): r"^Usage:", ("train", "--help"): r"^Usage:", ("--version",): r"^\d+\.\d+\.\d+$"}
        for words, pattern in table.items():
            for ranks in (1, 4):
                with self.subTest(words=words, ranks=ranks):
                    result = launch.run(*words, ranks=ranks)
                    self.assertEqual((result.status, result.stderr), (0, ""), result)
                    self.assertEqual(len(re.findall(pattern, result.stdout, re.M)), 1, result)
        self.assertRegex(launch.run("--help").stdout, r"(?m)^  train +\w")

    def test_help_and_version_need_nothing_that_could_fail_to_start(self):
        broken = {"MICS_START_LIMIT": "0", "KOKKOS_DEVICE_ID": "x", "OMPI_MCA_pml": "there_is_none"}
        self.assertNotEqual(launch.run("config", "explain", "none", environment=broken).status, 0)
        for words in (("--help",), ("train", "--help"), ("checkpoint", "diff", "--help"), ("--version",)):
            result = launch.run(*words, environment=broken)
            self.assertEqual((result.status, result.stderr), (0, ""), result)


if __name__ == "__main__":
    launch.PROGRAM, *launch.LAUNCHER = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
