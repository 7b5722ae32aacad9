"""A Hub on loopback that speaks its HTTP: downloads, uploads, and faults when they are wanted."""

from tests.hub.server import LocalHub
from tests.hub.uploads import TOKEN, Fault

__all__ = ["TOKEN", "Fault", "LocalHub"]
