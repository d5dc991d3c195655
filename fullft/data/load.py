"""The data of a run: rows are read, tokenised, split and batched."""

import hashlib
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.data.batches import Batches
from fullft.data.describe import describe_data
from fullft.data.formats import find_format
from fullft.data.micro_batch import MicroBatch
from fullft.data.rows import Rows
from fullft.data.sources import load_held_out_rows, load_rows
from fullft.data.tokenise import TokenisedRows, tokenise
from fullft.errors import DataError
from fullft.ranks import first_on_this_machine, require_same


@dataclass(frozen=True)
class Data:
    """The rows of a run, split and batched.

    Attributes:
        train: the training batches.
        evaluation: the held-out batches, or None without any.
        largest_token_id: over all rows.
        fingerprint: changes when the tokenised rows do.
        description: lines for the user that say what was found.
    """

    train: Batches
    evaluation: Batches | None
    largest_token_id: int
    fingerprint: str
    description: str

    def dealt(self, config: Config) -> "Data":
        """Return the same rows, dealt into micro-batches as the plan has decided.

        Args:
            config: as the plan has decided.
        """
        evaluation = self.evaluation and self.evaluation.dealt(config)
        return replace(self, train=self.train.dealt(config), evaluation=evaluation)

    def largest(self, accumulation: int) -> tuple[list[MicroBatch], MicroBatch | None]:
        """Make the micro-batches that take most memory: for training, at most two, and for evaluation.

        Args:
            accumulation: micro-batches of one step. The second one finds gradients already there; more change nothing.
        """
        held_out = self.evaluation.largest() if self.evaluation is not None else None
        last = self.train.largest()
        return [replace(last, is_last=False), last][-accumulation:], held_out

    @property
    def longest(self) -> int:
        """Tokens of the longest document, held-out ones included: as many positions as the model needs."""
        return max(max(batches.lengths) for batches in (self.train, self.evaluation) if batches is not None)


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None) -> Data:
    """Load, tokenise, split and batch the rows; of several ranks, the first one of each machine fills the cache.

    Args:
        config: the options of the group "model and data", the seed and the batch sizes are read.
        tokenizer: fast, with an EOS token.
        num_embeddings: of the model; None if it has one for every token of the tokenizer.

    Raises:
        DataError: the data cannot be read, fits no format, or leaves nothing to train on; or ranks have unlike rows.
    """
    data = first_on_this_machine(lambda: _load(config, tokenizer, num_embeddings))
    require_same("the fingerprint of the tokenised rows", data.fingerprint)
    return data


def _load(config: Config, tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> Data:
    own = tokenise_rows(config, tokenizer)
    sources, (train_rows, held_out) = [own.tokens], _split(own.tokens, len(own.rows), config)
    num_held_out, elsewhere = len(held_out), None
    if (given := load_held_out_rows(config)) is not None:
        elsewhere = _tokenise(given, tokenizer, config)
        sources.append(elsewhere.tokens)
        held_out = concatenate_datasets([held_out, elsewhere.tokens]) if len(held_out) else elsewhere.tokens
        num_held_out += len(given)
    pad = tokenizer.pad_token_id
    # Nothing depends on padding, so any id serves. A tokenizer may name one that the model has no embedding for.
    if pad is None or not 0 <= pad < (num_embeddings or math.inf):
        pad = tokenizer.eos_token_id
    return Data(
        train=Batches(train_rows, config, pad),
        evaluation=Batches(held_out, config, pad) if len(held_out) else None,
        largest_token_id=max(max(tokens["largest_token_id"][:]) for tokens in sources),
        fingerprint=_fingerprint(*sources),
        description=describe_data(own, elsewhere, num_held_out, tokenizer, config),
    )


def tokenise_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> TokenisedRows:
    """Load and tokenise the rows that training is to have, held-out ones included.

    Args:
        config: the options of the group "model and data" are read.
        tokenizer: fast, with an EOS token.

    Returns:
        The rows, of which at least one teaches something.

    Raises:
        DataError: as from `load_data`.
    """
    return _tokenise(load_rows(config), tokenizer, config)


def _tokenise(rows: Rows, tokenizer: PreTrainedTokenizerBase, config: Config) -> TokenisedRows:
    row_format = find_format(rows.column_names, rows.name)
    tokenised = tokenise(rows, row_format, tokenizer, config)
    if len(tokenised) == 0:
        raise DataError(
            f"{rows.name}: none of the {len(rows)} rows has a token to learn: responses are empty, or "
            f"--max_length {config.max_length} cuts them off"
        )
    return TokenisedRows(rows, row_format, tokenised)


def _split(tokenised: Dataset, num_rows: int, config: Config) -> tuple[Dataset, Dataset]:
    """Hold out the last ceil(val_size x rows) of a seeded shuffle of the rows."""
    units = np.asarray(tokenised["row"][:])
    if num_rows == 1:
        # One document: its pieces take the place of rows, or there would be nothing left to train on.
        units, num_rows = np.arange(len(tokenised)), len(tokenised)
    count = math.ceil(round(config.val_size * num_rows, 9))  # rounded first: 0.07 x 100 is 7.000000000000001
    # The order of `Dataset.shuffle(seed)`.
    held_out = np.isin(units, np.random.default_rng(config.seed).permutation(num_rows)[num_rows - count :])
    if held_out.all():
        raise DataError(f"{config.dataset} has too few rows to hold any out: --val_size 0 trains on all of them")
    return tokenised.select(np.flatnonzero(~held_out)), tokenised.select(np.flatnonzero(held_out))


def _fingerprint(*tokenised: Dataset) -> str:
    """Hash the rows, held-out ones included: the same rows in another file, or read again, are the same rows."""
    digest = hashlib.sha256()
    for batch in itertools.chain(*(rows.with_format("arrow").iter(batch_size=1000) for rows in tokenised)):
        for name in ("row", "num_tokens"):
            digest.update(batch[name].to_numpy().tobytes())
        for name in ("input_ids", "labels"):
            for chunk in batch[name].chunks:
                digest.update(chunk.flatten().to_numpy().tobytes())
    return digest.hexdigest()[:32]
