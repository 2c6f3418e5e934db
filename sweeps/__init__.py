"""The sweep application: Hydra composes runs, each run leaves one record."""
