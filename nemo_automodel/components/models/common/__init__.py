"""The name under which YAML files ask for `BackendConfig`."""

from nemo_automodel.shared.backend import BackendConfig

__all__ = ["BackendConfig"]
