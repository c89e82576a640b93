# SPDX-License-Identifier: Apache-2.0
"""Checks the test harness itself: harness_test.py PROBE [LAUNCHER WORD ...]

A harness that cannot fail proves nothing: a failure on one rank, a hang and a skip must each be
seen for what they are.
"""

import os
import subprocess
import sys
import time
import unittest

PROBE = ""
LAUNCHER = []
TIMEOUT_STATUS = 86  # watchdog.hpp


def run(tests, ranks=3, limit=30):
    """Runs the named tests of the probe; returns (exit status, all output, seconds)."""
    names = ":".join("HarnessProbe." + test for test in tests)
    command = LAUNCHER + ["-n", str(ranks)] if ranks else []
    start = time.monotonic()
    result = subprocess.run(
        command + [PROBE, "--gtest_filter=" + names],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        env=dict(os.environ, MICS_TEST_TIMEOUT=str(limit)),
    )
    return result.returncode, result.stdout, time.monotonic() - start


class Harness(unittest.TestCase):
    def test_pass_is_a_pass(self):
        status, output, _ = run(["Passes", "SeesEveryWorldSize"])
        self.assertEqual(status, 0, output)
        self.assertIn("[  PASSED  ] 2 tests.", output)
        self.assertEqual(output.count("[==========] Running"), 1, "one printer:\n" + output)
        self.assertNotIn("mics: passed, but skipped", output)

    def test_runs_without_a_launcher(self):
        status, output, _ = run(["Passes", "SeesEveryWorldSize"], ranks=0)
        self.assertEqual(status, 0, output)

    def test_output_is_quiet(self):
        _, output, _ = run(["Passes"])
        self.assertNotRegex(output, r"Kokkos.*WARNING|reachable pairing|No OpenFabrics|\x1b")

    def test_failure_on_one_rank_fails_the_run(self):
        for name, text in (("FailsOnRankOne", "as intended"), ("ThrowsOnRankOne", "C++ exception")):
            with self.subTest(name):
                status, output, _ = run(["Passes", name])
                self.assertNotEqual(status, 0, output)
                self.assertRegex(output, r"\[rank 1\] FAILURE .+:-?\d+")
                self.assertIn(text, output)
                self.assertIn("[  FAILED  ] HarnessProbe." + name, output)
                self.assertEqual(output.count("[rank "), 1, "one rank failed:\n" + output)
                self.assertIn("failed on another rank", output)
                self.assertIn("[       OK ] HarnessProbe.Passes", output)

    def test_hang_is_ended_and_named(self):
        status, output, seconds = run(["HangsOnRankOne"], limit=2)
        self.assertNotEqual(status, 0, output)
        self.assertRegex(output, r"\[rank \d\] TIMEOUT HarnessProbe.HangsOnRankOne")
        self.assertLess(seconds, 40, output)

    def test_skip_is_reported(self):
        status, output, _ = run(["Passes", "Skips"])
        self.assertEqual(status, 0, output)
        self.assertIn("mics: passed, but skipped 1 test(s): HarnessProbe.Skips", output)

    def test_skip_does_not_hide_a_failure(self):
        status, output, _ = run(["Skips", "FailsOnRankOne"])
        self.assertNotEqual(status, 0, output)
        self.assertNotIn("mics: passed, but skipped", output)


if __name__ == "__main__":
    PROBE, *LAUNCHER = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
