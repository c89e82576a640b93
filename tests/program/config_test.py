# SPDX-License-Identifier: Apache-2.0
"""What the program makes of configurations: config_test.py MICS [LAUNCHER WORD ...]

ds_configs/ holds files of the kinds that users of DeepSpeed have, and beside each what `mics config
explain` prints of it. After a wanted change of that text,

    MICS_WRITE_GOLDEN=1 python3 tests/program/config_test.py build/apps/mics

writes it anew; read the difference before committing it.
"""

import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
import launch  # noqa: E402

CONFIGS = pathlib.Path(__file__).resolve().parent / "ds_configs"
REFUSED = {"offload", "wrong", "zero1"}
WANTS_A_DECK = {"hugging_face_auto"}


def leaves(value, path=""):
    """The full keys of all values in an object."""
    if not isinstance(value, dict) or not value:
        return {path}
    return set().union(*(leaves(v, f"{path}.{k}" if path else k) for k, v in value.items()))


def without_comments(text):
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("//"))


class Explain(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="mics_config_"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.deck = self.folder / "deck.json"
        self.deck.write_text(launch.edited(warmup_steps=1))

    def explain(self, *words, **more):
        return launch.run("config", "explain", *words, folder=CONFIGS, **more)

    def check_golden(self, name, text):
        golden = CONFIGS / (name + ".txt")
        if os.environ.get("MICS_WRITE_GOLDEN"):
            golden.write_text(text)
        self.assertEqual(text, golden.read_text())

    def test_each_file_is_explained(self):
        files = sorted(CONFIGS.glob("*.json"))
        self.assertGreaterEqual(len(files), 10)
        for file in files:
            with self.subTest(file.stem):
                result = self.explain(file.name)
                self.assertEqual(result.stderr, "")
                usable = file.stem not in REFUSED | WANTS_A_DECK
                self.assertEqual(result.status, 0 if usable else 1, result)
                self.check_golden(file.stem, result.stdout)

    def test_every_key_is_accounted_for(self):
        for file in sorted(CONFIGS.glob("*.json")):
            text = self.explain(file.name).stdout
            for key in leaves(json.loads(without_comments(file.read_text()))):
                # A key may be listed with the object that it is in.
                names = key.split(".")
                above = (re.escape(".".join(names[:n])) for n in range(1, len(names) + 1))
                listed = any(re.search(rf"(?m)^  (?:.*, )?{part}(?: = |,|$)", text) for part in above)
                self.assertTrue(listed, f"{file.name}: {key}")

    def test_auto_takes_the_values_of_a_deck(self):
        result = self.explain("hugging_face_auto.json", "--deck", self.deck)

        self.assertEqual((result.status, result.stderr), (0, ""), result)
        self.check_golden("hugging_face_auto.with_deck", result.stdout)

    def test_a_deck_is_explained_by_its_engine_section(self):
        result = self.explain(self.deck)

        self.assertEqual((result.status, result.stderr), (0, ""), result)
        self.assertIn("optimizer.params.lr = 0.003", result.stdout)

    def test_one_rank_speaks(self):
        alone = self.explain("mics.json")
        together = self.explain("mics.json", ranks=4)

        self.assertEqual((together.status, together.stdout), (0, alone.stdout), together)

    def test_bad_files(self):
        for words, expects in (
            (("gone.json",), "gone.json: expected a file that can be read"),
            ((self.folder,), "found a folder"),
            (("mics.json", "--deck", "gone.json"), "gone.json: expected a file"),
        ):
            with self.subTest(words):
                result = self.explain(*words)
                self.assertEqual((result.status, result.stdout), (1, ""), result)
                self.assertIn(expects, result.stderr)
                self.assertEqual(result.stderr.count("\n"), 1)


class Train(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="mics_config_"))
        self.addCleanup(shutil.rmtree, self.folder)
        launch.write_text(self.folder / "text.txt")
        self.deck = self.folder / "deck.json"
        self.deck.write_text(launch.edited({"engine.bf16": {"enabled": True}}))
        self.config = self.folder / "ds_config.json"

    def train(self, config, *words, ranks=2):
        self.config.write_text(config if isinstance(config, str) else json.dumps(config))
        return launch.run("train", self.deck, "--deepspeed", self.config, *words, ranks=ranks)

    def test_a_file_replaces_the_engine_section(self):
        config = {"train_batch_size": 6, "zero_optimization": {"stage": 2}, "steps_per_print": 5}
        result = self.train(config)

        self.assertEqual((result.status, result.stderr), (0, ""), result)
        self.assertIn("  6 samples a step", result.stdout)
        self.assertIn("zero2", result.stdout)
        self.assertNotIn("bf16", result.stdout)
        self.assertIn("ds_config.json: steps_per_print has no effect here: ", result.stdout)

    def test_auto_takes_the_values_of_the_deck(self):
        config = {
            "train_batch_size": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": 3},
        }
        result = self.train(config)

        self.assertEqual((result.status, result.stderr), (0, ""), result)
        self.assertIn("  12 samples a step", result.stdout)
        self.assertIn("bf16", result.stdout)

    def test_words_behind_the_deck_change_the_file(self):
        result = self.train({"train_batch_size": 6}, "engine.train_batch_size=8", "training.steps=2")

        self.assertEqual((result.status, result.stderr), (0, ""), result)
        self.assertIn("  8 samples a step in 1 micro-step", result.stdout)
        self.assertIn("2 steps in", result.stdout)

    def test_a_scheduler_takes_the_place_of_the_decks_rates(self):
        scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
        result = self.train({"train_batch_size": 6, "scheduler": scheduler})

        self.assertEqual((result.status, result.stderr), (0, ""), result)
        self.assertIn("ds_config.json: scheduler, not the deck's training section", result.stdout)

    def test_a_file_that_is_refused_says_where(self):
        for config, expects in (
            ({"zero_optimization": {"stage": 1}},
             r"ds_config\.json: zero_optimization\.stage: expected 0, 2 or 3, found 1; stage 2"),
            ({"train_batch_size": 6, "gradient_clipping": -1},
             r"ds_config\.json: gradient_clipping: expected .*at least 0, found -1"),
            ({}, r"ds_config\.json: train_batch_size: expected train_batch_size or .*, found neither"),
            ({"amp": {"enabled": True}, "elasticity": {"enabled": True}}, r"; and 1 more refused$"),
            ("{", r"ds_config\.json:1: expected valid JSON"),
        ):
            with self.subTest(config):
                result = self.train(config)
                self.assertEqual((result.status, result.stdout), (1, ""), result)
                self.assertRegex(result.stderr, expects)
                self.assertEqual(result.stderr.count("\n"), 1)


if __name__ == "__main__":
    launch.PROGRAM, *launch.LAUNCHER = sys.argv[1:]
    launch.PROGRAM = os.path.abspath(launch.PROGRAM)
    unittest.main(argv=sys.argv[:1], verbosity=2)
