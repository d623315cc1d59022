"""The ways in which a step uses adapters.

A step is *unmerged* when every row adds its own adapter to the product with the base weights. It is
*merged* when it runs on a copy of the weights into which the one adapter of all its rows is folded,
and which costs nothing then; a *mixture* when other rows ride on that copy, too: they subtract what
is folded in, and add their own (paper, section 4).
"""

import enum


class Mode(enum.Enum):
    """How a step uses the adapters: none folded into the weights, one for all, one for some."""

    UNMERGED = "unmerged"
    MERGED = "merged"
    MIXTURE = "mixture"
