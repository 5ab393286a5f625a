"""The program: `contracap`, `python -m contracap`, and `torchrun -m contracap`."""

import signal
import sys


def run() -> None:
    """Run the command line. While the program starts and ends, Ctrl-C ends it without a traceback, as SIGTERM does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from contracap.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
