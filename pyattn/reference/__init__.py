"""The judge: dense textbook formulas in float64, written apart from the engines.

Nothing of the package is imported here, and dispatch never offers this as a backend: it exists so
that everything else can be measured against it. Memory and time are those of the N x M scores.
"""

from .merge import merge, merge_backward
from .precision import FLOAT64, LONGDOUBLE, Precision, plain
from .softmax import attention, attention_backward, weights

__all__ = ["FLOAT64", "LONGDOUBLE", "Precision", "attention", "attention_backward", "merge",
           "merge_backward", "plain", "weights"]
