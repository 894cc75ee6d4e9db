"""Stages of the pipeline as scripts: `python -m experiments.STAGE FILE.yaml ... key=value ...`."""
