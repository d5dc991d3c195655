"""The preview: rows as they are trained on, before any weight is loaded."""

import json

from fullft.config.config import Config
from fullft.data.describe import count_changes, notes_on, show_row
from fullft.data.load import tokenise_rows
from fullft.model.source import DEMO_MODEL, find_config, load_tokenizer


def show_preview(config: Config) -> None:
    """Print the first rows, with what is learned marked; or as JSON, one object a line.

    Args:
        config: `preview` says how many; the options of the group "model and data" are read, and `json`.

    Raises:
        FullftError: the tokenizer or the data cannot be loaded.
    """
    find_config(config)  # names what is wrong with the model; its weights need not be there
    tokenizer = load_tokenizer(config, config.model or str(DEMO_MODEL))
    source = tokenise_rows(config, tokenizer)
    rows, _, tokenised = source
    chosen = tokenised.select(range(min(config.preview, len(tokenised))))
    if config.json:
        for row in chosen:
            told = {
                "source": rows.place(row["row"]),
                "tokens": tokenizer.convert_ids_to_tokens(row["input_ids"]),
                "input_ids": row["input_ids"],
                "labels": row["labels"],
            }
            print(json.dumps(told))
        return
    print(f"{len(chosen)} of {len(tokenised):,} rows as they are trained on; [what is learned] stands in brackets")
    print(f"of {len(rows):,} rows read: {count_changes(source, config)}")
    for note in notes_on(source, tokenizer, config):
        print(note)
    for row in chosen:
        cut = f", cut at {config.max_length}" if row["truncated"] else ""
        print(
            f"\n--- {rows.place(row['row'])}: {row['num_tokens']} tokens, {row['num_target_tokens']} learned{cut}\n"
            f"{show_row(row, tokenizer)}"
        )
