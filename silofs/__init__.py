"""silofs: a live-migratable disk-image store (see ARCHITECTURE.md)."""

__version__ = "0.1.0"
