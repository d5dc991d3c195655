"""What must happen before torch is imported: printing, options, the libraries' environment, errors, `--plan`.

Importing torch and transformers takes about 5 s. `--help` and mistakes in options are answered before that, and the
libraries read the environment while they are imported.
"""

import gc
import sys

from fullft.config.config import Config
from fullft.config.parse import parse_config
from fullft.cpu.kernel_caches import limit_kernel_caches
from fullft.errors import report_uncaught_errors
from fullft.run.environment import prepare_hub
from fullft.run.printing import keep_printing


def start() -> Config:
    """Read the command line, and prepare the process. `--help`, `--plan` and `--preview` end here.

    Returns:
        Checked and resolved options.

    Raises:
        SystemExit: a plan, a preview or the help was asked for, and has been shown.
        OptionsError: naming every mistake in the options.
    """
    keep_printing()
    report_uncaught_errors(debug=False)
    config = parse_config()
    report_uncaught_errors(debug=config.debug)
    prepare_hub(config)
    limit_kernel_caches()
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
