"""Many configs of one set of files, which are read once: the points of a study's grid.

1. `load_with` gives the config of settings and of further `key=value`.
2. `shared_reads` says which values of `shared` a config may depend on, so that those which it
   cannot depend on make no config of their own.
"""

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

from copg_jax.config.load import load_settings
from copg_jax.config.schema import leaves
from copg_jax.config.settings import SHARED, Settings

_SHARED_READ = re.compile(r"\$\{(" + SHARED + r"\.[\w.\[\]]*)")  # as far as it is plain


def load_with(settings: Settings, arguments: Sequence[str]) -> Any:
    """The config of settings with further `key=value`; the settings stay as they are.

    Raises:
      InputError: see `load.load_config`.
    """
    own = copy.deepcopy(settings)
    for argument in arguments:
        own.add_argument(argument)
    return load_settings(own)[0]


def shared_reads(settings: Settings, more: Iterable[Any] = ()) -> set[str]:
    """Names of `shared` that the fields of a config may read, also through each other, as far as
    they are known before they are resolved: of ${shared.beta.${shared.loss}} they are shared.beta.
    and shared.loss.

    Args:
      settings: of the config.
      more: further values that its fields, or those of `shared`, may have.
    """
    written: dict[str, Any] = {}
    for layer in settings.shared:
        written |= dict(leaves({SHARED: layer}))
    texts = [text for layer in settings.layers for _, text in leaves(layer)]
    texts += [text for value in more for _, text in leaves(value)]
    found: set[str] = set()
    while texts:
        new = {name for text in texts for name in _SHARED_READ.findall(str(text))} - found
        found |= new
        texts = [t for name, t in written.items() if any(is_related(name, one) for one in new)]
    return found


def is_related(name: str, read: str) -> bool:
    """Whether reading one name may read the other: it is the same, above or below."""
    return name.startswith(read) or read.startswith(name)
