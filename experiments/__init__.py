"""Stages of the pipeline as scripts: `python -m experiments.STAGE FILE.yaml ... key=value ...`."""

import signal
import sys

# "-m" while Python looks for the script that it shall run, whose imports take seconds. Until
# `run_main` begins, Ctrl-C ends the process without a traceback.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
