"""What libraries read from the environment while they are imported: is the hub reachable, how CUDA's memory is kept.

Left alone, the hub's client retries for about 23 seconds per missing file. transformers and datasets read
`HF_HUB_OFFLINE` when they are imported, and torch reads the settings of its allocator.
"""

import os
import sys
import threading
from importlib.metadata import version

from fullft.config.config import Config
from fullft.model.bundled import bundled_config

PROBE_SECONDS = 4.0
# The settings of torch's allocator. Versions 2.9 to 2.11 pass over the first name, though they have it.
_ALLOCATOR, _ALLOCATOR_BEFORE_2_12 = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


def prepare_hub(config: Config) -> None:
    """Go offline unless a run needs the hub and reaches it; a plan needs it only for a config that is not bundled.

    Args:
        config: `model`, `dataset`, `eval_dataset` and `plan` are read.
    """
    if not config.plan:
        go_offline_if_unreachable(config.model, config.dataset, config.eval_dataset)
    elif config.model is None or bundled_config(config.model) is None:
        go_offline_if_unreachable(config.model)


def go_offline_if_unreachable(*names: str | None) -> None:
    """Make the hub's libraries use their cache alone, if the hub does not answer within `PROBE_SECONDS`.

    Args:
        names: hub ids or local paths. Without a hub id among them the hub is not asked.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return  # the user has decided
    # When all is local, the hub is not asked, and the libraries need no look-ups of their own.
    local = all(name is None or os.path.exists(name) for name in names)
    if local or not _answers():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _answers() -> bool:
    # In a daemon thread, since a name look-up has no timeout of its own.
    answered, asked = threading.Event(), threading.Event()
    threading.Thread(target=_ask, args=(answered, asked), daemon=True).start()
    asked.wait(PROBE_SECONDS)
    return answered.is_set()


def _ask(answered: threading.Event, asked: threading.Event) -> None:
    import ssl
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS)
        answered.set()
    except urllib.error.HTTPError:
        answered.set()  # a refusal is an answer
    except urllib.error.URLError as error:
        # So is a certificate that this Python cannot check: the hub's client brings certificates of its own.
        if isinstance(error.reason, ssl.SSLError):
            answered.set()
    except Exception:  # a malformed address or answer, a broken connection: no hub
        pass
    finally:
        asked.set()


def use_expandable_segments() -> None:
    """Make torch keep a card's memory in segments that grow, so that less of it is lost in fragments.

    Nothing is set where CUDA cannot map memory so (elsewhere than on Linux), or where the user has decided.

    Source: pytorch.org/docs/stable/notes/cuda.html, "Optimizing memory usage with PYTORCH_ALLOC_CONF". That the new
    name had no effect: github.com/pytorch/pytorch/issues/183387.
    """
    names = (_ALLOCATOR, _ALLOCATOR_BEFORE_2_12)
    if sys.platform != "linux" or any(name in os.environ for name in names):
        return
    major, minor = map(int, version("torch").split(".")[:2])
    os.environ[names[(major, minor) < (2, 12)]] = "expandable_segments:True"
