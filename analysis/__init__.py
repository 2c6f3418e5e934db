"""Reads the records of finished sweeps and turns them into tables and figures for papers.

`records` loads one `record.json` a point and makes tables of them, `frontier` finds the Pareto-optimal points and is
the `caldera-frontier` command, `plots` draws, `style` holds what all figures share. Nothing here imports torch or
Hydra, so a results folder copied to a laptop is enough to redraw every figure.
"""
