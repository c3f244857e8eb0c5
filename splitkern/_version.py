"""The one place that holds the version: pyproject.toml reads it, and setup.py compiles it into the native library."""

__version__ = "0.1.0"
