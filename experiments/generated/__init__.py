"""Made-up data for the quickstart: a module for each task."""

from experiments.generated.arithmetic import ARITHMETIC
from experiments.generated.code import CODE
from experiments.generated.posts import POSTS

TASKS = {"tldr": POSTS, "arithmetic": ARITHMETIC, "code": CODE}
"""By the names of their configs."""
