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
# # Which matrices lose most
#
# The frontier gives a compressed model one number. Here it is taken apart: the same sweep, matrix by matrix. A decoder
# block has a handful of matrices, each of which was fitted on its own to the inputs that it sees; some resist, and a
# budget that knows which may spend its bits there. All numbers are those of the weights as they are deployed, computed
# from the packed bytes.
#
# The points shown are a few of the Pareto-optimal ones, from the smallest to the largest.

# %%
import os

from analysis.cells import or_say_why, show, tabulate
from analysis.figures import Sweep
from analysis.tables import inside, points

results = os.environ.get("CALDERA_RESULTS", "results/demo")
sweep = Sweep.read(results)

# %%
shown = points(sweep)
tabulate(shown[shown["point"].isin(sweep.shown()["name"])])

# %% [markdown]
# ## The error of each matrix
#
# A cell is a matrix: its decoder block to the right, its place in the block downwards, in the order in which they run.
# The relative error is the share of what a matrix would have said of its typical inputs that is lost, as a root of
# energies: `sqrt(tr(E H E^T) / tr(W H W^T))` with `E` what is missing of `W` and `H` the second moments of the inputs.
# All panels have one scale of colours.
#
# Rows that stand out are kinds of matrices that are hard for the quantizer, columns that stand out are places in the
# model. A budget that gives every matrix the same number of bits is right only if there is neither. What the figure
# cannot say is what an error costs: the model may be deaf to one and not to the other.

# %%
show(sweep, "errors")

# %% [markdown]
# A matrix does not receive what it received in the uncompressed model: everything before it is compressed as well. The
# output error measures that too, between what the original matrix says of its original input and what the compressed
# one says of the input that reaches it. Where it is much larger than the relative error above, what is lost came in
# from before, and bits for this matrix are not the remedy. If it grew from block to block without an end, errors would
# add up; if it stays level, later blocks absorb them. Points of `method.inputs=original` never look at the compressed
# prefix: theirs is the relative error once more.

# %%
show(sweep, "output-errors")

# %% [markdown]
# ## How the fits converged
#
# CALDERA updates `Q` and `L R` in turns. A line is the median over a point's matrices of the relative error after each
# update, the shade the middle 80% of them. Updates beyond the place where a line is flat are time spent on nothing. A
# line that rises says that an update undid what the one before had fitted; deployed is the best of a trace, not its
# end.

# %%
show(sweep, "convergence")

# %% [markdown]
# ## What theory expected
#
# From the spectra of a matrix and of its inputs, and from what a quantizer loses on Gaussian numbers, the error can be
# predicted before anything is fitted. A mark is a matrix; on the diagonal theory and measurement agree. Marks that lie
# above it as one cloud mean that the theory leaves out something that all share, such as inputs other than those it was
# told. One kind of matrix that leaves the cloud is a matrix that is not as Gaussian as the transform should have made
# it: look there for outliers first.

# %%
show(sweep, "prediction")

# %% [markdown]
# ## Where a budget put its bits
#
# With `budget=allocated` rank and bits are chosen for every matrix, by what each would lose. Left the ranks, right the
# stored bits. Compare it with the errors above: bits should be where errors were large, unless the model was found to
# be deaf to them. If the picture is flat, a uniform budget would have done.

# %%
show(sweep, "allocation")

# %% [markdown]
# ## What is lost, direction by direction
#
# The singular values of a matrix together with its inputs, `W C` with `C C^T = H`: before compression, after it, and of
# what is missing. Rank is worth its bits where the first line falls steeply: a few directions carry most, and `L R` can
# take them whole. The dotted line is the rank. Left of it the missing part should lie well below; that it is flat is
# what a good backbone leaves, since noise has no direction. A missing part that falls steeply too says that more rank
# would have helped.

# %%
show(sweep, "spectra")

# %% [markdown]
# ## The ten worst
#
# The matrices with the largest relative errors among the points shown. If they are all of one kind or of one end of the
# model, try other bits for those alone; if they are spread over the model, its bits are spread well.

# %%
with or_say_why():
    worst = inside(sweep).nlargest(10, "relative_error")
    tabulate(worst[["settings", "matrix", "rows", "columns", "rank", "q", "relative_error", "output_error"]])

# %% [markdown]
# ## By kind of matrix
#
# The same by projection, over all blocks: medians, since a single outlier is in the table above already. A kind that is
# worse than the others in every point is a property of the model; one that is worse in some points only is a property
# of their settings.

# %%
with or_say_why():
    kinds = inside(sweep).groupby(["projection", "settings"], sort=False)
    tabulate(kinds["relative_error"].median().unstack(), index=True)

# %% [markdown]
# And where the bytes are. An error in a kind of matrix that takes few of them is cheap to mend: doubling its bits
# hardly moves the total. In megabytes:

# %%
with or_say_why():
    kinds = inside(sweep).groupby(["projection", "settings"], sort=False)
    tabulate(kinds["stored_bytes"].sum().div(1e6).unstack(), index=True)
