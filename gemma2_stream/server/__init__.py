"""An OpenAI-compatible server for one engine, from the extra `[server]`.

    app = create_app(engine)                                # an ASGI application
    app = create_app(engine, Settings(keys=Keys(["..."])))  # for those who have the key

Nothing else of the package imports this one.
"""

from __future__ import annotations

from ..errors import ParameterError

try:
    from . import run
    from .app import create_app
except ModuleNotFoundError as missing:
    raise ParameterError(
        f"the server needs {missing.name}: pip install 'gemma2-stream[server]'"
    ) from missing
from .settings import Keys, Settings

__all__ = ["Keys", "Settings", "create_app", "run"]
