"""Reads the records of finished sweeps and turns them into tables and figures for papers.

`records` loads one `record.json` a point and makes tables of them, `wandb_runs` the same of W&B's runs; `pareto` finds
the optimal points, `uncertainty` says how sure that is; `plots`, `tradeoffs` and `layers` draw, `style` holds what all
figures share; `frontier`, `figures` and `report` are the commands `caldera-frontier`, `-figures` and `-report`.
`article` executes `notebooks`, whose cells call `cells` and show what `tables` finds. Nothing here imports torch or
Hydra, so a results folder copied to a laptop is enough to redraw every figure.
"""
