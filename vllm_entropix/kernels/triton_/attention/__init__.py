"""Queries and paged keys → attention statistics of each layer and row: ``attention.statistics.measure_layer`` of the package.

Five kernels, one launch of each for all layers that share a type and strides, however many they are:

1. ``_plan`` gives each layer's rows room for their scores, as far as there is any (``scores``).
2. ``_attend`` reads keys once, a tile at a time that all query heads of a group share, and keeps scores where there is room
   (``scores``).
3. ``_merge_splits`` adds up what the shares of a context say of each head (``heads``).
4. ``_deviate`` takes kept scores, all heads of a tile at once, to the heads' mean weights and the deviation from them.
   ``_deviate_again`` does so for rows without room, whose keys it reads a second time (``deviations``).
5. ``_finish`` makes the four statistics (``heads``).

Where there are far more rows than find room, ``_measure_whole`` stands in for all but the last of them: a program takes one row
of a layer after the other, all heads and shares of it, and needs room for one. So no key is read twice (``whole_rows``).

A context is cut into shares whose borders depend on the row alone, and whichever program takes them, the same scores are
reduced by the same code, so a row's bits are the same in any batch (``shares``).

Each module launches its own kernels. ``statistics`` calls them in their order, and so does ``over_ranks`` where heads are split
over tensor-parallel ranks: these exchange the sums of their heads' weights between the two passes, and what comes out is each
rank's share of the statistics (``attention.ranks`` of the package).
"""
