"""The package's version, without the metadata that only an installed package has."""

__version__ = "0.1.0"
