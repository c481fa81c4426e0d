"""What authors of kernels check them with, in any language and framework.

>>> import numpy as np
>>> from pyattn import testing
>>> def kernel(q, k, v, causal=False):
...     s = q @ np.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5
...     return np.exp(s) @ v / np.exp(s).sum(-1, keepdims=True)    # causal is ignored
>>> report = testing.check(kernel, cases=["65 x 65", "causal"])
>>> [result.status for result in report.results][:2], report.failures[0].hint
(['ok', 'FAILED'], 'causality is ignored')
"""

from . import cases
from .check import check
from .compare import Comparison, compare
from .dump import Dump, DumpError, check_dump, read_dump, write_dump
from .gradcheck import GradientError, GradientResult, gradcheck
from .report import CaseResult, Report

__all__ = ["CaseResult", "Comparison", "Dump", "DumpError", "GradientError", "GradientResult",
           "Report", "cases", "check", "check_dump", "compare", "gradcheck", "read_dump",
           "write_dump"]
