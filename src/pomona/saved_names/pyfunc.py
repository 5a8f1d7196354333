"""The name that models registered by version 0.1 hold: `pomona.registry.pyfunc`."""

from pomona.registry.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
