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
# # How few bits, and what the next one should be spent on
#
# CALDERA writes a weight matrix as a low-precision backbone plus low-rank factors, `W ~ Q + L R`, all of them
# quantized. So there are two ways to spend a bit: a finer `Q`, or more rank. This article reads the records of one
# sweep and asks three things of them. Which points are worth having, in that no other is as small and as good? Is what
# separates them more than the noise of a measurement? And where would the next bit be better spent?
#
# Nothing below is typed in: every number comes from the records, and another folder of results gives another article.
# What a sweep has no data for is said in one sentence in its place.

# %%
import os

from analysis.cells import commands, or_say_why, show, tabulate
from analysis.facts import answers, caveats
from analysis.figures import Sweep
from analysis.tables import intervals, measures, neighbours, noise_floor, points

results = os.environ.get("CALDERA_RESULTS", "results/demo")
sweep = Sweep.read(results)
print(f"{results}: {len(sweep.table)} points, {', '.join(sweep.table['model'].dropna().unique())}")

# %% [markdown]
# ## What was measured
#
# A perplexity is a number about a text, windows of a length and a tokenizer, an accuracy one about some documents. Two
# values may be compared only where all of that agrees, so it comes first. If a line says that points were not measured
# alike, do not read on for that metric: evaluate the points again with the same settings.

# %%
tabulate(measures(sweep))

# %% [markdown]
# ## The points
#
# One line a point that was finished, the smallest first. *Stored bits* are bits of the files, scales included, over the
# parameters of the compressed matrices; *model bits* count embeddings and norms too, which stay in 16 bits: in a small
# model they are most of what is left. Scores are with their standard errors. *Optimal* says whether the point is on the
# frontier of the first perplexity (or else of the first metric), and *optimal in*, in which share of a thousand redrawn
# measurements it would be: a point that is optimal in half of them is one that another text might drop.

# %%
tabulate(points(sweep))

# %%
for _, row in sweep.table[sweep.table["status"] != "done"].iterrows():
    print(f"failed: {row['name']}: {row['error']}")

# %% [markdown]
# ## The frontier
#
# Each mark is a compressed model; to the left is smaller, and a perplexity is better the lower it lies. Colour is the
# rank of `L R`, shape the quantizer of `Q`. The steps join the points that no other beats in both, dominated ones are
# pale, and the dashed line is the model before compression. The shaded band holds 90% of the frontiers that the same
# points would have if the windows of the text had been drawn anew, the same ones for all points.
#
# What to look for: whether points with rank above zero are on the steps, or only on the pale side of them. What would
# change one's mind: a band that is wider than the gap between two steps, for then the order of those two is not known;
# or a second seed that moves a point further than its whisker, since no error bar here knows of seeds.

# %%
show(sweep, "frontier-stored")

# %% [markdown]
# The same in words: the smallest point that loses no more than a share of what the uncompressed model scores. An empty
# table means that there is no uncompressed model in the records, or more than one.

# %%
with or_say_why():
    tabulate(answers(sweep.table))

# %% [markdown]
# There is a floor under all of this. The uncompressed model itself is evaluated in the arithmetic of its checkpoint,
# and the same weights in float32 score a little differently. A difference between two points that is smaller than that
# says nothing about compression, whatever its statistics; for a divergence the floor is what the model in float32 has
# from itself. Beside the standard errors above it is usually small: where it is not, distrust the last digits.

# %%
with or_say_why():
    tabulate(noise_floor(sweep))

# %% [markdown]
# ## The same on other axes
#
# What "small" means is a choice, and a method can look better by it. *Nominal* bits are those of the codes alone, as
# papers print them: what moves to the right from here to the stored bits above has paid for scales. Compare the two
# axes before believing a table of a paper.

# %%
show(sweep, "frontier-nominal")

# %% [markdown]
# Over the *whole model* the embeddings are part of the bill. The order of the points does not change for one model, but
# the distances do: the smaller the model, the less a bit saved in its matrices is worth.

# %%
show(sweep, "frontier-model")

# %% [markdown]
# In *megabytes* models of different sizes share an axis. This is the axis on which a large model at few bits may be set
# against a small one at many; if the lines of two models cross below, that is where one should change over.

# %%
show(sweep, "frontier-megabytes")

# %%
show(sweep, "models")

# %% [markdown]
# ## Nearer to the model than perplexity: divergence and agreement
#
# A compressed model can lose what it knew and still guess the next word of a text as often. The KL divergence compares
# its distributions with the uncompressed model's at every token, and needs fewer tokens for the same certainty, because
# the text's own surprises cancel. If the order of points differs here from the one above, believe this one on the
# question of what compression did, and perplexity on the question of how good the model is.

# %%
show(sweep, "frontier-stored", metric="kl")

# %% [markdown]
# Agreement is the share of tokens whose most probable continuation is still the same: the number to look at if the
# model is to be decoded greedily. It is to be read upwards, so the frontier climbs to the right.

# %%
show(sweep, "frontier-stored", metric="agreement")

# %% [markdown]
# ## Is a difference real?
#
# Take the two neighbours on the frontier whose values are closest: if those can be told apart, so can the others. Both
# were scored on the same windows and documents, and what is hard for one is hard for the other. So the difference is
# taken window by window, and the *paired* interval is Student's over those differences. The *unpaired* one is what the
# two standard errors alone would give, as if each point had had a text of its own: it is the one that readers compute
# in their heads from whiskers, and with more than a handful of windows it is too wide by as much as windows differ from
# one another.
#
# Of perplexities the difference is in percent of A's. A letter under *better* means that the paired interval lacks
# zero. Accuracies over few documents hardly ever get one: that is not evidence that two points are equal, but that the
# documents are too few. More of them would change one's mind, another look at the same ones would not.

# %%
with or_say_why():
    a, b = neighbours(sweep)
    print(f"A: {a['name']}\nB: {b['name']}")
    tabulate(intervals(a, b))

# %% [markdown]
# ## Where is the next bit better spent?
#
# Left, every point lies where its bits went: upwards what `Q` takes, to the right what `L R` takes, and along a dashed
# line the total is the same. Compare two points on one dashed line: they cost the same. Right, a line from one size to
# the next is as high as what the step bought per bit, by more rank at the same `Q` or by a finer `Q` at the same rank.
#
# If the lines for rank lie above those for precision where both start from the same size, rank is the better buy there.
# Beware of short lines: a small step in size divides a small difference, noise included, by little. One would change
# one's mind by a point at the same total from the other side, measured on the same windows.

# %%
show(sweep, "spending")

# %% [markdown]
# ## What it costs
#
# Bits are paid once an inference, compression once a model, but someone has to wait for it. Left the minutes that
# compression took, right the memory of its largest process. Hollow marks had some of their blocks done before, so their
# times say less than they seem to; times of points that ran beside others on one machine are too long.

# %%
show(sweep, "costs")

# %% [markdown]
# ## The points to copy
#
# First what tells the optimal points apart, in the words of the command line; then, whole, the command of each. It
# fixes every setting and the seed, so that the same versions on the same kind of machine give the same bytes.

# %%
commands(sweep)

# %% [markdown]
# ## Before quoting a number from here
#
# What a reader should know first, as far as the records can tell.

# %%
print("\n".join(f"* {caveat}" for caveat in caveats(sweep.records, sweep.table)))
