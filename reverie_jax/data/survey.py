"""The survey of a training set: every record is tokenized once, so that one which does not fit fails before training."""

from __future__ import annotations

import array
import logging
from collections.abc import Callable, Sequence

import numpy as np

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.packing import WINDOW, bin_pack, element_sizes
from reverie_jax.data.pipeline import TreeBuilder
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.records import RecordSource
from reverie_jax.data.size_index import read_index
from reverie_jax.data.tokenization import UNTAUGHT
from reverie_jax.data.tree_sizes import FIELDS, DatasetStats, TreeSizes, record_check
from reverie_jax.errors import DataError

_log = logging.getLogger(__name__)

_WORTH_AN_INDEX = 1000
"""Records from which on a survey takes so many seconds that a line names the command which saves them."""


def find_sizes(source: Sequence[ImageRecord], training: Sequence[ImageRecord], builder: TreeBuilder) -> TreeSizes:
    """Return the sizes of the training records' trees: from their index, or by a survey if they have none.

    Args:
        source: all records; only a `RecordSource` can have an index.
        training: the first ones of them, which are trained on.
        builder: builds their trees.

    Raises:
        DataError, UserError: as for `survey`, or the index is damaged.
    """
    sizes = read_index(source, len(training), builder) if isinstance(source, RecordSource) else None
    if sizes is None:
        if isinstance(source, RecordSource) and len(training) >= _WORTH_AN_INDEX:
            _log.info(
                "no index of sizes for these %d records with this model and recipe: each is tokenized before the first step;"
                " `reverie data index %s --model MODEL --recipe RECIPE` does that once for all runs",
                *(len(training), source.folder),
            )
        sizes = survey(training, builder)
    if sizes.warning:
        _log.warning("%s", sizes.warning)
    return sizes


def survey(
    records: Sequence[ImageRecord], builder: TreeBuilder, on_progress: Callable[[int], object] = lambda count: None
) -> TreeSizes:
    """Tokenize every record once and return the sizes of its trees.

    Args:
        records: the records that are trained on.
        builder: builds their trees.
        on_progress: gets the number of records so far.

    Raises:
        DataError: a record does not fit, or nothing is supervised.
        UserError: a conversation is longer than the model's context.
    """
    flat_tokens = sequences = untaught = conversations = packed = 0
    first = ""
    datasets: dict[str, None] = {}
    trees = array.array("i")  # a Python integer for each size would take ten times as much
    for index in range(len(records)):
        record = records[index]
        check = record_check(record)
        for built in builder.build(record):
            datasets |= dict.fromkeys(conversation.dataset for conversation in built.conversations)
            untaught, conversations = untaught + built.untaught, conversations + len(built.conversations)
            first = first or (record.id if built.untaught else "")
            flat_tokens += built.tree.flat_tokens
            trees.extend((index, check, *element_sizes(builder.element(built, record, index + 1))))
        if len(trees) - packed >= WINDOW * len(FIELDS) or index + 1 == len(records):
            window = np.asarray(trees[packed:], np.int32).reshape(-1, len(FIELDS))
            sequences, packed = sequences + len(bin_pack(window[:, 2:], builder.shape)), len(trees)
            on_progress(index + 1)
    table = np.ascontiguousarray(np.asarray(trees, np.int32).reshape(-1, len(FIELDS)).T)
    tokens, edges = (table[FIELDS.index(name)].astype(np.int64) for name in ("tokens", "edges"))
    if not edges.any():
        missing = "pair of answers" if isinstance(builder.supervision, DPOConfig) else "supervised answer"
        why = f"; {untaught} conversations: {UNTAUGHT}" if untaught else ""
        raise DataError(f"nothing to train on: the records hold no {missing}{why}")
    warning = ""
    if untaught:
        teach = f"{untaught} of {conversations} conversations teach nothing"
        warning = f"{teach} (the first in record {first}): {UNTAUGHT}"
    totals = len(tokens), int(tokens.sum()), flat_tokens, int(edges.sum()), int(tokens.max())
    return TreeSizes(DatasetStats(len(records), *totals, sequences, tuple(datasets)), table, warning)
