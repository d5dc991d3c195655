"""Write the demo's rows: short exercises in Alpaca format, of eight kinds.

Each kind follows a rule, such as "put the sentence in the past tense". Each row applies the rule to its own sentence.
No input comes twice within a kind, so the model is never trained on a held-out exercise.

What carries over is the rule, together with what it does to each word: "hot" becomes "cold", "knife" becomes "knives".
Every word is in many training rows, and so is every sum. A held-out row combines them anew: the model knows the words
of "one white knife" from other rows, and has to apply the rule to them. It does not learn the plural of a word that it
has never seen. One input fits several kinds ("Max drives to the library."), so the model has to read the instruction.

Run it from the repository root after a change, then train the tokenizer again on the new rows::

    python -m fullft.demo.make_rows
    python -m fullft.demo.make_tokenizer
"""

import json
import random
from itertools import permutations, product
from pathlib import Path

SEED = 18
ROWS_PER_KIND = 320

# Nouns, and the pairs of opposites that suit them.
OPPOSITES = (
    (("soup", "tea", "bread", "cake", "meal", "juice"), (("hot", "cold"), ("sweet", "bitter"), ("good", "bad"))),
    (
        ("friend", "neighbour", "teacher", "doctor", "baker", "driver"),
        (("happy", "sad"), ("strong", "weak"), ("early", "late")),
    ),
    (("room", "house", "shop", "street", "hall", "office"), (("big", "small"), ("clean", "dirty"), ("open", "closed"))),
    (("coat", "bag", "towel", "hat", "blanket", "carpet"), (("wet", "dry"), ("heavy", "light"), ("old", "new"))),
)
OWNERS = ("the", "my", "our", "this")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Laura", "Max")
# Present and past tense.
VERBS = (
    ("walks to", "walked to"),
    ("runs to", "ran to"),
    ("drives to", "drove to"),
    ("goes to", "went to"),
    ("waits at", "waited at"),
    ("sings at", "sang at"),
    ("works at", "worked at"),
    ("eats at", "ate at"),
)
PLACES = ("park", "school", "beach", "station", "market", "lake", "museum", "library", "bank", "farm")
# Singular and plural.
NOUNS = (
    ("apple", "apples"),
    ("pear", "pears"),
    ("egg", "eggs"),
    ("book", "books"),
    ("pen", "pens"),
    ("cup", "cups"),
    ("car", "cars"),
    ("box", "boxes"),
    ("dress", "dresses"),
    ("brush", "brushes"),
    ("berry", "berries"),
    ("pony", "ponies"),
    ("knife", "knives"),
    ("leaf", "leaves"),
    ("mouse", "mice"),
    ("goose", "geese"),
)
QUALITIES = (
    *("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "pink", "golden"),
    *("nice", "pretty", "cheap", "strange", "tiny", "round", "plain", "broken", "lovely", "lost"),
)

# An exercise: the input and the right output.
Exercise = tuple[str, str]


def _sentence(*words: str) -> str:
    """Join words, and start with a capital."""
    text = " ".join(words)
    return text[0].upper() + text[1:]


def opposites() -> list[Exercise]:
    """Return sentences, and the same sentences with the opposite word."""
    return [
        (_sentence(owner, noun, "is", f"{word}."), _sentence(owner, noun, "is", f"{opposite}."))
        for nouns, pairs in OPPOSITES
        for owner, noun, pair in product(OWNERS, nouns, pairs)
        for word, opposite in (pair, pair[::-1])
    ]


def questions() -> list[Exercise]:
    """Return statements, and the questions that they answer."""
    return [
        (_sentence(owner, noun, "is", f"{quality}."), _sentence("is", owner, noun, f"{quality}?"))
        for owner, (noun, _), quality in product(OWNERS, NOUNS, QUALITIES)
    ]


def past_tense() -> list[Exercise]:
    """Return sentences in the present tense and in the past tense."""
    return [
        (f"{name} {present} the {place}.", f"{name} {past} the {place}.")
        for name, (present, past), place in product(NAMES, VERBS, PLACES)
    ]


def people() -> list[Exercise]:
    """Return sentences and the person each of them is about."""
    return [(f"{name} {verb} the {place}.", name) for name, (verb, _), place in product(NAMES, VERBS, PLACES)]


def places() -> list[Exercise]:
    """Return sentences and the place that each of them names."""
    return [(f"{name} {verb} the {place}.", f"the {place}") for name, (verb, _), place in product(NAMES, VERBS, PLACES)]


def plurals() -> list[Exercise]:
    """Return things in the singular and in the plural."""
    return [(f"one {quality} {one}", f"two {quality} {many}") for quality, (one, many) in product(QUALITIES, NOUNS)]


def swaps() -> list[Exercise]:
    """Return pairs of people or things, and the same pairs in the other order."""
    pairs = [*permutations(NAMES, 2), *permutations([many for _, many in NOUNS], 2)]
    return [(f"{first} and {second}", f"{second} and {first}") for first, second in pairs]


def sums() -> list[Exercise]:
    """Return two numbers of things and their sum."""
    return [
        (f"{a} {first} and {b} {second}", f"{a} + {b} = {a + b}")
        for a, b in product((2, 3, 4), repeat=2)
        for (_, first), (_, second) in permutations(NOUNS, 2)
    ]


# Each kind: its exercises, and the instructions that ask for it.
KINDS = (
    (opposites(), ("Say the opposite.", "Write the opposite of this sentence.", "Turn this into its opposite.")),
    (questions(), ("Make this a question.", "Write this sentence as a question.", "Turn this into a question.")),
    (past_tense(), ("Say this in the past.", "Write this sentence in the past tense.", "Use the past tense.")),
    (people(), ("Who is this about?", "Write the name of the person.", "Find the person in this sentence.")),
    (places(), ("Where does this happen?", "Write the name of the place.", "Find the place in this sentence.")),
    (plurals(), ("Say this for two.", "Write the plural.", "Turn one into two.")),
    (swaps(), ("Swap the two.", "Write this in the other order.", "Reverse the order.")),
    (sums(), ("How many are there?", "Write the sum of the two numbers.", "Add the two numbers.")),
)


def make_rows() -> list[dict[str, str]]:
    """Draw the same number of exercises of every kind, and mix them.

    Returns:
        Rows with the keys ``instruction``, ``input`` and ``output``; the same ones at every call.
    """
    draw = random.Random(SEED)
    rows = [
        {"instruction": draw.choice(instructions), "input": given, "output": answer}
        for exercises, instructions in KINDS
        for given, answer in draw.sample(exercises, ROWS_PER_KIND)
    ]
    draw.shuffle(rows)
    return rows


def as_jsonl(rows: list[dict[str, str]]) -> str:
    """Write rows as JSON, one a line.

    Args:
        rows: What `make_rows` returns.

    Returns:
        The text of ``instructions.jsonl``.
    """
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write ``instructions.jsonl`` next to this file."""
    path = Path(__file__).resolve().parent / "instructions.jsonl"
    path.write_text(as_jsonl(make_rows()), encoding="utf-8", newline="\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
