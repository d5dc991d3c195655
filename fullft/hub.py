"""Whether the Hugging Face hub can be reached: asked once, briefly.

Left alone, the hub's client retries for about 23 seconds per missing file. Owns only this probe; downloading stays
with transformers and datasets, which read `HF_HUB_OFFLINE` when they are imported: call this before that.
"""

import os
import threading
from pathlib import Path

PROBE_SECONDS = 4.0


def go_offline_if_unreachable(*names: str | None) -> None:
    """Make the hub's libraries use their cache alone when the hub does not answer within `PROBE_SECONDS`.

    Args:
        names: hub ids or local paths; without a hub id among them nothing is asked.
    """
    if not any(name is not None and not Path(name).exists() for name in names):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local: spare the libraries' own look-ups
    elif "HF_HUB_OFFLINE" not in os.environ and not _answers():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _answers() -> bool:
    # In a daemon thread, since a name look-up has no timeout of its own.
    answered = threading.Event()
    threading.Thread(target=_ask, args=(answered,), daemon=True).start()
    return answered.wait(PROBE_SECONDS)


def _ask(answered: threading.Event) -> None:
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS)
    except urllib.error.HTTPError:
        answered.set()  # a refusal is an answer
    except OSError:
        pass
    else:
        answered.set()
