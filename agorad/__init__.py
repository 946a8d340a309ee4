"""The daemon and what people touch: roles, manifest, config, control socket, command line."""

__version__ = "0.1.0"
