"""One thing to check on an installation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pyattn import dispatch
from pyattn.checks import BackendError

from .report import ERROR, SKIPPED, CaseResult


@dataclasses.dataclass(frozen=True)
class Task:
    """One function on one backend and array library."""

    function: str
    backend: str
    library: str
    run: Callable[[], list[CaseResult]]

    @property
    def subject(self) -> str:
        """What is checked, in words."""
        return f"{self.function} on {self.backend}, {self.library} arrays"

    def results(self) -> list[CaseResult]:
        """Run it; what goes wrong is a result too."""
        try:
            with dispatch.use_backend(self.backend):
                found = self.run()
        except (NotImplementedError, BackendError) as error:
            found = [CaseResult("all", "", SKIPPED, message=str(error))]
        except Exception as error:      # one broken function must not hide the others
            found = [CaseResult("all", "", ERROR, message=f"{type(error).__name__}: {error}")]
        return [dataclasses.replace(result, subject=self.subject) for result in found]
