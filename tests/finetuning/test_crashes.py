"""A killed training loses nothing: see crashing.py. CRASH_KILLS=20 kills more often than the default here."""

import json
import os
import subprocess
import sys
from pathlib import Path

KILLS = os.environ.get("CRASH_KILLS", "4")


def test_killed_trainings_end_with_the_weights_of_uninterrupted_ones(tmp_path):
    folder = Path(__file__).parent
    settings = {**os.environ, "PYTHONPATH": str(folder.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "crashing.py"), str(tmp_path), KILLS, "0"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == int(KILLS) and report["equal"] == report["runs"] > 0, report
