"""The generalization lab: compare optimizers on equal terms, measure how flat their minima are, and report.

Needs the extra ``compare``. Entry points: ``scripts/compare_optimizers.py`` and ``scripts/measure_sharpness.py``.
"""
