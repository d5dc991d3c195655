"""What must happen before torch is imported: printing, options, the libraries' environment, errors, `--plan`.

Importing torch and transformers takes about 5 s. `--help` and mistakes in options are answered before that, and the
libraries read the environment while they are imported.
"""

import gc
import os
import sys

from fullft.config.config import Config
from fullft.config.parse import parse_config
from fullft.config.ranks import find_place
from fullft.cpu.kernel_caches import limit_kernel_caches
from fullft.errors import report_uncaught_errors
from fullft.run.ending import watch_ranks
from fullft.run.environment import prepare_hub, use_expandable_segments
from fullft.run.launch import launch, must_launch
from fullft.run.printing import keep_printing, silence


def start() -> Config:
    """Read the command line, and prepare the process. `--help`, `--plan`, `--preview` and a launcher end here.

    Returns:
        Checked and resolved options.

    Raises:
        SystemExit: a plan, a preview or the help was asked for, and has been shown; or the ranks have ended.
        OptionsError: naming every mistake in the options.
    """
    place = find_place()
    if place.rank != 0:
        silence()
    keep_printing()
    report_uncaught_errors(debug=False)
    if place.count > 1:
        watch_ranks(place)
    config = parse_config()
    report_uncaught_errors(debug=config.debug)
    prepare_hub(config)
    if must_launch(config):
        sys.exit(launch(config.gpus))
    limit_kernel_caches()
    use_expandable_segments()
    if place.count > 1 and not config.debug:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch's own account of a failure; ours is one message
    gc.disable()  # collections during the imports would find nothing, and take a quarter of their time
    if config.plan:
        from fullft.memory.screen import show_plan

        show_plan(config)
        sys.exit()
    if config.preview:
        from fullft.data.preview import show_preview

        show_preview(config)
        sys.exit()
    import fullft.memory.run  # noqa: F401 (which imports nearly all that train.py does)

    gc.enable()
    return config
