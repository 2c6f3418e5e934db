"""Points that an optimiser suggests instead of a grid: `hydra/sweeper=optuna`."""
