"""How every command line of molora ends: an error that the user can mend is one line and exit code 2."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

from molora.errors import UserError


def run(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and exit: 0 when it returns, 2 after a line ``error: …`` for a :class:`UserError` or a full disk,
    130 when interrupted.

    Any other exception is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'writing'}: {error.strerror}; make room and try again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
