"""Compare optimizers on equal terms: ``hf-dualadam compare`` under its older name.

    python scripts/compare_optimizers.py configs/compare/quickstart.yaml --output_dir outputs/compare
    python scripts/compare_optimizers.py --report_only --output_dir outputs/compare

See hf_dualadam/lab/compare.py, or --help.
"""

import os

# Threads that spin while they wait slow other workers on the same cores down by a factor of 7 or more. OpenMP reads
# this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hf_dualadam.extras import require_or_exit

require_or_exit("compare")

from hf_dualadam.lab.compare import main, run_command

__all__ = ["main"]

if __name__ == "__main__":
    run_command()
