"""placeholder."""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """A small GPT-2 on the standard library."""
    return default.get_config()
