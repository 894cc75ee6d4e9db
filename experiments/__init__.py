"""Stages of the pipeline as scripts: `python -m experiments.<stage> CONFIG.yaml ... key=value ...`."""
