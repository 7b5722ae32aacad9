"""A Hub on loopback that speaks its HTTP: downloads, uploads, and faults when they are wanted."""

from tests.support.fake_hub.server import LocalHub
from tests.support.fake_hub.uploads import TOKEN, Fault

__all__ = ["TOKEN", "Fault", "LocalHub"]
