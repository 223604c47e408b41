"""The generalization lab: compare optimizers on equal terms, measure how flat their minima are, and report.

Needs the extra ``compare``. Entry points: ``hf-dualadam compare`` and ``scripts/measure_sharpness.py``.
"""
