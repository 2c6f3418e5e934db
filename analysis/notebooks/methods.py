# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What else the same bytes could do
#
# A frontier of one method says how to use that method, not whether to. Here CALDERA stands beside what one could have
# done with the same bytes: rounding to nearest, error feedback without rank, rank alone, one-shot corrections, the same
# method with bits spent unevenly. They are run as they are usually run, each with its own kind of quantizer, on the
# same model, calibration text and held-out windows.
#
# That is a comparison of recipes and not of ideas: a method may win by its quantizer and lose by its choice of rank. To
# ask about an idea, change that one thing: `caldera-run -m method=... quantizer@q=...` with all else equal.

# %%
import os

from analysis.cells import or_say_why, show, tabulate
from analysis.facts import caveats
from analysis.figures import Sweep
from analysis.tables import best_points, measures, rivals

results = os.environ.get("CALDERA_RESULTS", "results/demo")
sweep = Sweep.read(results)
tabulate(measures(sweep))

# %% [markdown]
# ## All methods on one axis
#
# A colour and a shape a method, its points joined by size. What counts is the height at one size, so look along
# vertical lines: reading two methods off at their own favourite sizes compares nothing. The sizes are those of the
# files, 16-bit factors and scales of groups included, which is where methods that look cheap in nominal bits pay.
#
# A method may be written off for this model and these sizes if its line lies above another's everywhere, by more than
# the noise that the next tables measure. It may not be for other sizes: lines that come closer to the right cross
# outside of the picture. Methods with one point only are judged at that point only.

# %%
show(sweep, "methods")

# %% [markdown]
# The frontier of all of them together says by whom it is held. Shape and colour are here quantizer and rank: a frontier
# whose points share one quantizer says more about the quantizer than about the methods.

# %%
show(sweep, "frontier-stored")

# %% [markdown]
# ## The best of each
#
# Each method's best point by its score, whatever its size; budgets count apart, since who spends the bits is part of a
# method. The best score of a method is often that of its largest point, so this table is not a ranking. It is what each
# can reach within the sizes that were swept.

# %%
with or_say_why():
    tabulate(best_points(sweep))

# %% [markdown]
# ## The same bytes, used otherwise
#
# Now at its own size: beside each method's best point the best that is no larger, whoever made it. The difference is
# paired window by window, of perplexities in percent of the frontier's. *Bits more* is what the method's point takes
# beyond its rival: where that is large and the verdict still goes against it, the question is closed. *Not told apart*
# means that the interval holds zero: then the smaller of the two is the better buy, but the order may be otherwise on
# another text.

# %%
with or_say_why():
    tabulate(rivals(sweep))

# %% [markdown]
# ## What each costs to make
#
# Rounding takes seconds and needs no calibration; feedback takes second moments; alternating fits take iterations. A
# colour is a method. Whether a few percent are worth the wait depends on how often one compresses, and how often the
# result is used. Hollow marks had blocks done before, by another point or an earlier run.

# %%
show(sweep, "costs")

# %% [markdown]
# ## On divergence instead of perplexity
#
# Methods that are fitted to the calibration text may lose less on texts like it than elsewhere. The divergence from the
# uncompressed model is the stricter measure: a method that is better there and not in perplexity is nearer to the
# model; the reverse may be luck with a text. If the order of the methods changes between the two figures, quote both.

# %%
show(sweep, "methods", metric="kl")

# %% [markdown]
# ## What to believe
#
# Believe a difference that is paired, whose interval lacks zero, that is larger than the noise floor, and that holds at
# two sizes at least. Believe less what rests on one seed, one model, and a text that is like the calibration text. A
# method that was tuned here on the same validation text as the others were not has an advantage that no interval shows;
# and a small model loses more at few bits than a large one, so an order found on it is a conjecture about the large
# one.

# %%
print("\n".join(f"* {caveat}" for caveat in caveats(sweep.records, sweep.table)))
